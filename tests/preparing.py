"""Runs data/*/prepare.py into a folder of the test's, and reads what they write."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from support.errors import USER_ERRORS
from support.text.dataset import Dataset

SHAKESPEARE = os.environ.get('SHAKESPEARE', '')
CLOSED = 'http://127.0.0.1:9'  # nothing listens at this port
CUT_OFF = {'http_proxy': CLOSED, 'https_proxy': CLOSED, 'no_proxy': '', 'NO_PROXY': ''}
with_shakespeare = pytest.mark.skipif(not os.path.isfile(SHAKESPEARE),
                                      reason='SHAKESPEARE names no file')


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys, run_here):
    """Runs a copy of data/NAME/prepare.py in this process, from the folder prepare.here, and gives
    what it printed; prepare.data is the copy's data folder. prepare.fails gives its one-line error
    instead, and asserts that nothing was written."""
    for path in ROOT.glob('data/*/prepare.py'):
        copy = tmp_path / 'data' / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        shutil.copy(path, copy)
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(sys, 'path', [*sys.path])

    def run(name, *args):
        return run_here(run.data / name / 'prepare.py', *args)['log']

    def fails(name, *args):
        before = files_below(run.data)
        with pytest.raises(USER_ERRORS) as error:
            run(name, *args)
        assert '\n' not in str(error.value) and files_below(run.data) == before
        return str(error.value)

    run.data, run.here, run.fails = tmp_path / 'data', here, fails
    return run


def files_below(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def read(folder):
    """A dataset's files: ids of both splits as lists, dataset.json, and both texts."""
    data = Dataset(folder)
    ids = {split: data[split][:].tolist() for split in ('train', 'val')}
    info = json.loads((folder / 'dataset.json').read_text(encoding='utf-8'))
    for split, numbers in ids.items():
        assert len(numbers) == info['tokens'][split]
        assert np.fromfile(folder / f'{split}.bin', info.get('dtype', 'uint16')).tolist() == numbers
    texts = [data.tokenizer.decode(numbers) for numbers in ids.values()]
    return SimpleNamespace(**ids, info=info, texts=texts, text=''.join(texts),
                           tokenizer=data.tokenizer)
