"""Runs data/*/prepare.py into a folder of the test's, and reads what they write."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from support.errors import USER_ERRORS
from support.text.dataset import Dataset

CUT_OFF = {'https_proxy': 'http://127.0.0.1:9', 'no_proxy': '', 'NO_PROXY': ''}  # a closed port
SPEECH = 'To be, or not to be, that is the question:\nWhether \'tis nobler in the mind\n' * 20
# what tokenizers join and part: contractions, digits, runs of white space, scripts, signs in two parts
ODD = '''  When spring comes, it's the year 1995 – they'll say "so".\tTabs,  two  spaces,\r\nlines\n\n\n
 lone\rreturn 봄이 오면 산과 들에 꽃이 핀다. 春天来了，山上和田野里开满了花。春が来ると、野山に花が咲く。
Когда придёт весна, 7 раз; Όταν έρθει η άνοιξη· عندما يأتي الربيع، תבוא האביב, जब वसंत आता है, เมื่อฤดู
cafe\u0301 ﬁn ①½ x² 'll x've\u00a0\u3000x\ufeff \x1c \x85 \u200b 🙂👩\u200d👩\u200d👧 𝔘𝔫𝔦 $100,000.50 a_b
__init__(self): -> [x for x in y if x != 'z'] <b>&amp;</b>\n\n  \n'''
META = {'vocab_size': 3, 'itos': {0: '\n', 1: 'a', 2: 'é'}, 'stoi': {'\n': 0, 'a': 1, 'é': 2}}


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys, run_here):
    """Runs a copy of data/NAME/prepare.py from the folder prepare.here, and gives what it printed;
    prepare.data has the copies. prepare.fails gives its error, and asserts that nothing was written."""
    for path in (*ROOT.glob('data/*/prepare.py'), ROOT / 'data/chat/example.jsonl'):
        copy = tmp_path / 'data' / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
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
        message = refusal(run, name, *args)
        assert files_below(run.data) == before
        return message

    run.data, run.here, run.fails = tmp_path / 'data', here, fails
    return run


def refusal(function, *args, error=USER_ERRORS, **how):
    """The line of the error that a call raises."""
    with pytest.raises(error) as caught:
        function(*args, **how)
    assert str(caught.value) and '\n' not in str(caught.value)
    return str(caught.value)


def files_below(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def read(folder):
    """A dataset's files: ids of both splits as lists, dataset.json, and both texts."""
    data = Dataset(folder)
    ids = {split: data[split][:].tolist() for split in ('train', 'val')}
    info = json.loads((folder / 'dataset.json').read_text(encoding='utf-8'))
    for split, numbers in ids.items():
        assert np.fromfile(folder / f'{split}.bin', info.get('dtype', 'uint16')).tolist() == numbers
    texts = [data.tokenizer.decode(numbers) for numbers in ids.values()]
    return SimpleNamespace(**ids, info=info, texts=texts, text=''.join(texts),
                           tokenizer=data.tokenizer)
