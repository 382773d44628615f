"""meta.pkl as other repositories' data scripts write it."""

import collections
import pickle

import numpy as np
import pytest
from conftest import losses

from support.errors import UserError
from support.text.dataset import Dataset
from support.text.tokenizer import NoTokenizer

CHARS = ['\n', 'a', 'é']
ITOS, STOI = dict(enumerate(CHARS)), {c: i for i, c in enumerate(CHARS)}
WITH_TEXT = {
    'list': {'vocab_size': 3, 'itos': CHARS},
    'stoi alone': {'vocab_size': 3, 'stoi': STOI},
    'padded': {'vocab_size': 64, 'itos': ITOS, 'stoi': STOI, 'more': [1, {'a': None}]},
    'NumPy ids': {'vocab_size': np.uint16(3), 'itos': {np.int32(i): c for i, c in ITOS.items()}},
    'OrderedDict': collections.OrderedDict(vocab_size=3, itos=collections.OrderedDict(ITOS)),
    'bytes': {'vocab_size': 3, 'itos': {i: c.encode() for i, c in ITOS.items()}},
}


def opened(folder):
    return Dataset(folder, splits=())


def pickles_of(folder, meta):
    """Writes it once in each protocol and, where modules are named in plain text, once as NumPy 1."""
    for protocol in range(6):
        data = pickle.dumps(meta, protocol)
        for content in {data, data.replace(b'numpy._core', b'numpy.core') if protocol < 3 else data}:
            (folder / 'meta.pkl').write_bytes(content)
            yield


@pytest.mark.parametrize('name', WITH_TEXT)
def test_vocabulary_is_read_however_it_is_written(name, tmp_path):
    for _ in pickles_of(tmp_path, WITH_TEXT[name]):
        data = opened(tmp_path)
        itos, size = data.tokenizer.itos, data.vocab_size
        assert (type(size), size) == (int, 64 if name == 'padded' else 3)
        assert itos == ITOS and {*map(type, itos)} == {int} and {*map(type, itos.values())} == {str}
        assert data.tokenizer.decode([1, 2]) == 'aé' and data.tokenizer.n_vocab == 3


def test_vocabulary_of_numbers_has_a_size_and_no_text(tmp_path):
    for _ in pickles_of(tmp_path, {'vocab_size': 3, 'itos': {0: 97, 1: 98, 2: 99}}):
        tokenizer = opened(tmp_path).tokenizer
        assert isinstance(tokenizer, NoTokenizer) and tokenizer.n_vocab == 3


@pytest.mark.parametrize('data', [
    {'itos': ITOS}, {'vocab_size': '3'}, {'vocab_size': 3, 'itos': range(3)}, b'\x80\x04}r\xff\xff\xff\x7f.'])
def test_other_files_are_refused_in_one_line(data, tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    with pytest.raises(UserError, match='meta.pkl is not a character vocabulary'):
        opened(tmp_path)


def test_size_alone_trains_resumes_and_measures_and_sampling_says_what_is_missing(train, run_here, tmp_path):
    folder = tmp_path / 'data'
    folder.mkdir()
    for split, n in (('train', 500), ('val', 100)):
        (np.arange(n) % 21).astype(np.uint16).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': np.int64(21)}))
    log = train('--max_iters=2', '--eval_interval=1', data_dir=folder)['log']
    assert 'found vocab_size = 21 (inside' in log and sorted(losses(log)) == [0, 1, 2]
    assert sorted(losses(train('--max_iters=3', '--init_from=resume', data_dir=folder)['log'])) == [3]
    out = run_here('eval.py', f'--out_dir={tmp_path}/out', '--device=cpu', f'--data_dir={folder}')['log']
    assert 'perplexity' in out and 'bits_per_byte' not in out
    with pytest.raises(ValueError, match="^this model's tokens have no text: "):
        run_here('sample.py', f'--out_dir={tmp_path}/out', '--device=cpu')
