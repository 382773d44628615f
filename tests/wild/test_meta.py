"""meta.pkl as other repositories' data scripts write it."""

import collections
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import evaluations, losses

from support.errors import UserError
from support.text.dataset import Dataset
from support.text.tokenizer import CharTokenizer, NoTokenizer, tokenizer_from

CHARS = ['\n', 'a', 'é']
ITOS, STOI = dict(enumerate(CHARS)), {c: i for i, c in enumerate(CHARS)}
WITH_TEXT = {
    'list': {'vocab_size': 3, 'itos': CHARS},
    'string': {'vocab_size': 3, 'itos': ''.join(CHARS)},
    'stoi alone': {'vocab_size': 3, 'stoi': STOI},
    'padded': {'vocab_size': 64, 'itos': ITOS, 'stoi': STOI, 'more': [1, {'a': None}]},
    'NumPy size': {'vocab_size': np.int64(3), 'itos': ITOS},
    'NumPy ids': {'vocab_size': np.uint16(3), 'itos': {np.int32(i): c for i, c in ITOS.items()}},
    'NumPy strings': {'vocab_size': 3, 'itos': {i: np.str_(c) for i, c in ITOS.items()}},
    'NumPy array of strings': {'vocab_size': 3, 'itos': np.array(CHARS)},
    'OrderedDict': collections.OrderedDict(vocab_size=3, itos=collections.OrderedDict(ITOS)),
    'bytes': {'vocab_size': 3, 'itos': {i: c.encode() for i, c in ITOS.items()}},
    'ids beyond the vocabulary': {'vocab_size': 3, 'itos': ITOS | {10**12: 'z', -1: 'y'}},
}
WITHOUT = {
    'size alone': {'vocab_size': 3}, 'NumPy size alone': {'vocab_size': np.int64(3)},
    'ints': {'vocab_size': 3, 'itos': {0: 97, 1: 98, 2: 99}},
    'raw bytes': {'vocab_size': 3, 'itos': {0: b'\xff', 1: b'a', 2: b'b'}},
    'array': {'vocab_size': 3, 'itos': np.arange(3), 'chars': np.arange(6).reshape(2, 3)},
    'swapped': {'vocab_size': 3, 'itos': STOI}, 'None': {'vocab_size': 3, 'itos': None, 'stoi': None},
}


def opened(folder):
    """Its vocabulary is read without any tokens."""
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


@pytest.mark.parametrize('name', WITHOUT)
def test_vocabulary_without_text_has_a_size_and_says_what_is_missing(name, tmp_path):
    for _ in pickles_of(tmp_path, WITHOUT[name]):
        tokenizer = opened(tmp_path).tokenizer
        assert isinstance(tokenizer, NoTokenizer) and tokenizer.n_vocab == 3
        for one in (tokenizer, tokenizer_from(tokenizer.to_dict())):
            for use in (one.encode, one.decode, one.decode_bytes):
                with pytest.raises(ValueError, match='has no itos, a table of ids and strings$'):
                    use('a')


@pytest.mark.parametrize('data', [
    *({}, {'itos': ITOS}, {'vocab_size': 0}, {'vocab_size': -3}, {'vocab_size': '3'}, {'vocab_size': True},
      {'vocab_size': 3.0}, [3], None, {'vocab_size': 3, 'itos': range(3)},
      {'vocab_size': np.timedelta64(3, 's')}),
    b'\x80\x04}r\xff\xff\xff\x7f.', b'\x80\x04\x8e' + b'\xff' * 6 + b'\0\0.'], ids=str)
def test_other_files_are_refused_in_one_line_and_little_memory(data, tmp_path):
    """The last two are a few bytes that ask for much."""
    (tmp_path / 'meta.pkl').write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    tracemalloc.start()
    with pytest.raises(UserError, match='meta.pkl is not a character vocabulary') as error:
        opened(tmp_path)
    assert '\n' not in str(error.value) and tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


def test_size_alone_trains_resumes_and_measures_and_sampling_says_what_is_missing(train, run_here, tmp_path):
    folder = tmp_path / 'data'
    folder.mkdir()
    for split, n in (('train', 500), ('val', 100)):
        (np.arange(n) % 21).astype(np.uint16).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': np.int64(21)}))
    out_dir = f'--out_dir={tmp_path / "out"}'
    with pytest.raises(ValueError, match='tokens have no text'):
        train('--max_iters=2', '--sample_interval=1', data_dir=folder)
    log = train('--max_iters=2', '--eval_interval=1', data_dir=folder)['log']
    assert 'found vocab_size = 21 (inside' in log and sorted(losses(log)) == [0, 1, 2] and evaluations(log)
    assert sorted(losses(train('--max_iters=3', '--init_from=resume', data_dir=folder)['log'])) == [3]
    out = run_here('eval.py', out_dir, '--device=cpu', f'--data_dir={folder}')['log']
    assert 'perplexity' in out and 'bits_per_byte' not in out
    for script, args in (('sample.py', ['--device=cpu']), ('export.py', [f'--export_dir={tmp_path / "x"}'])):
        with pytest.raises(ValueError, match="^this model's tokens have no text: "):
            run_here(script, out_dir, *args)
    assert not (tmp_path / 'x').exists()

    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 21, 'itos': list('abcdefghijklmnopqrstu')}))
    train('--max_iters=2', '--eval_interval=1', data_dir=folder, out_dir=tmp_path / 'list')
    out = run_here('sample.py', f'--out_dir={tmp_path / "list"}', '--device=cpu', '--start=abc',
                   '--num_samples=1', '--max_new_tokens=4')['log']
    assert len(out.splitlines()[-2]) == 7 and out.splitlines()[-2].startswith('abc')
    assert isinstance(opened(folder).tokenizer, CharTokenizer)
