"""A data set as one object: its files, its windows, its fingerprints, and batches that grow."""

import hashlib
import json
import os
import pickle
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preparing import META, refusal

from support.errors import MissingFile
from support.text.dataset import Dataset, find_dataset
from support.text.prepare import write_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer
from support.text.windows import BatchRamp, Split, prefetch

LONG = 1 << 27  # tokens of a file that isn't read whole at the start


def make(folder, train=range(1, 100), val=range(1, 50), info=None, dtype=np.uint16):
    """A folder with these token files and this dataset.json."""
    for split, ids in (('train', train), ('val', val)):
        np.array(ids, dtype).tofile(folder / f'{split}.bin')
    if info is not None:
        (folder / 'dataset.json').write_text(info if isinstance(info, str) else json.dumps(info))
    return folder


def cut_in_shards(folder, ids, sizes, split='train'):
    for i, part in enumerate(np.split(ids, np.cumsum(sizes)[:-1])):
        part.tofile(folder / f'{split}_{i:03}.bin')


def change_a_token(path, at, token):
    with open(path, 'r+b') as file:
        file.seek(2 * at)
        file.write(np.uint16(token).tobytes())


# ---------------------------------------------------------------------------- training windows

@pytest.mark.parametrize('sampler, seed, at, n_tokens, block_size, starts', [
    ('random', 1337, 0, 1_003_854, 256, [230731, 497885, 530148, 960125]),
    ('random', -1, 10**6, 2**33, 1024, [1096299394, 2526030435, 5706966294, 7894185042]),
    ('epoch', 1337, 3918, 1_003_854, 256, [668043, 606347, 918579, 931379, 129331, 589619]),
    ('epoch', -5, 10**9, 9_035_582_198, 1024, [6937418867, 3505034355, 1981193331, 4408383603]),
    ('epoch', 7, 12, 1000, 64, [380, 636, 503, 567, 119, 759, 887, 55, 439, 631, 695, 247, 311]),
])
def test_a_resumed_run_reads_what_it_always_did(sampler, seed, at, n_tokens, block_size, starts):
    split = Split('train', range(n_tokens))
    for other in (seed + 1, seed):
        found = split.train_windows(sampler, other, at, len(starts), block_size).tolist()
        np.random.seed(1)
        assert (found == starts) == (other == seed)


@pytest.mark.parametrize('n_tokens', [65, 129, 1000, 1024, 1025])
def test_an_epoch_has_each_window_once_side_by_side(n_tokens):
    split, n = Split('train', range(n_tokens)), max(1, (n_tokens - 1) // 64 - 1)
    whole = split.train_windows('epoch', 7, 0, 3 * n, 64)
    for starts in map(np.sort, whole.reshape(3, n)):
        assert (np.diff(starts) == 64).all() and starts[0] >= 0 and starts[-1] + 64 < n_tokens
    parts = [split.train_windows('epoch', 7, i, 4, 64) for i in range(0, 3 * n, 4)]
    assert np.array_equal(np.concatenate(parts)[:3 * n], whole)
    assert n < 9 or (whole[:n] != whole[n:2 * n]).any()


# ---------------------------------------------------------------------------- evaluation, reading

@settings(deadline=None, max_examples=200)
@given(st.integers(2, 400), st.integers(1, 40), st.integers(1, 7), st.integers(0, 9))
@example(33, 8, 4, 0)
def test_evaluation_reads_each_target_once_or_windows_spread_evenly(n, block_size, batch_size,
                                                                    n_batches):
    split = Split('val', np.arange(n, dtype=np.uint16))
    batches = split.eval_windows(block_size, batch_size, n_batches)
    n_windows = -(-(n - 1) // block_size)
    if n_batches and n_batches * batch_size < n_windows:
        assert batches.shape == (n_batches, batch_size) and batches.dtype == np.int64
        gaps = np.diff(np.append(batches, n_windows * block_size))
        assert batches[0, 0] == 0 and gaps.min() >= block_size and np.ptp(gaps) in (0, block_size)
        return
    found = []
    for starts in batches:
        x, y = split.read(starts, block_size)
        assert x.shape == y.shape == (batch_size, block_size) and (x + 1 == y)[y >= 0].all()
        found += y[y >= 0].tolist()
    assert found == list(range(1, n))


def test_targets_are_the_inputs_one_token_further_and_there_are_none_past_the_end():
    split = Split('val', np.array([*range(100, 109), 65535], np.uint16))
    x, y = split.read(np.array([0, 8, 10]), 4)
    assert x.dtype == y.dtype == np.int64
    assert x[:2].tolist() == [[100, 101, 102, 103], [108, 65535, 65535, 65535]]
    assert y.tolist() == [[101, 102, 103, 104], [65535, -1, -1, -1], [-1] * 4]
    assert split.epoch_length(4) == 10 and split.target_share(np.array([0, 8]), 0, 1, 4) == 1


def test_what_a_thread_reads_is_in_order_and_its_error_reaches_the_caller():
    results = prefetch(lambda a, b: a // b, iter([(8, 1), (8, 2), (8, 0), (8, 4)]))
    assert (next(results), next(results)) == (8, 4)
    with pytest.raises(ZeroDivisionError):
        next(results)


# ---------------------------------------------------------------------------- batches that grow

@pytest.mark.parametrize('micro_steps, iterations', [(1, 0), (4, 1), (8, 100), (100, 8), (49, 98)])
def test_batch_grows_from_one_micro_step_to_all(micro_steps, iterations):
    ramp = BatchRamp(micro_steps, iterations)
    sizes = [ramp.at(i) for i in range(iterations + 5)]
    assert sizes == sorted(sizes) and sizes[iterations:] == [micro_steps] * 5
    assert abs(sizes[0] - micro_steps / (iterations + 1)) < 1
    assert [ramp.before(i) for i in range(len(sizes) + 1)] == [0, *np.cumsum(sizes)]
    assert BatchRamp(100, 99).at(6) == 8  # not 7: 100 * 0.07 is above 7 in floating point


# ---------------------------------------------------------------------------- what a folder holds

def test_folder_that_nanogpt_made_is_one_object(tmp_path):
    make(tmp_path, [2, 1, 0, 1], [1, 2])
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META))
    data = Dataset(tmp_path)
    assert [*data.splits] == ['train', 'val'] and [len(s) for s in data.splits.values()] == [4, 2]
    assert data['train'][:].tolist() == [2, 1, 0, 1] and data['val'][np.array([1])].tolist() == [2]
    assert (data.vocab_size, data.vocab_path) == (3, tmp_path / 'meta.pkl')
    assert data.tokenizer.decode([2, 1]) == 'éa'


def test_splits_are_opened_as_asked_for_and_without_a_vocabulary_ids_are_gpt2_s(tmp_path):
    make(tmp_path)
    (tmp_path / 'val.bin').unlink()
    for splits in (['train'], ()):
        data = Dataset(tmp_path, splits)
        assert [*data.splits] == [*splits] and isinstance(data.tokenizer, GPT2Tokenizer)
        assert (data.vocab_size, data.vocab_path) == (50304, None)
    assert 'see "Your own text" in README.md' in refusal(Dataset, tmp_path, error=MissingFile)
    (tmp_path / 'prepare.py').touch()
    assert f'val.bin is missing; run: python {tmp_path / "prepare.py"}' in refusal(Dataset, tmp_path)


@pytest.mark.parametrize('data_dir, dataset, found', [
    ('', 'mine', 'data/mine'), ('', './elsewhere', './elsewhere'), ('elsewhere', 'mine', 'elsewhere'),
    ('', 'elsewhere', 'data/elsewhere'),  # a name, not a path
    ('', 'shakespeare_char', str(ROOT / 'data/shakespeare_char'))])
def test_dataset_is_a_name_in_data_or_the_path_of_a_folder(data_dir, dataset, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/mine').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    assert find_dataset(data_dir, dataset) == found


@pytest.mark.parametrize('info, told', [
    ({'tokens': {'train': 98}}, 'train.bin has 99 tokens, but dataset.json says 98'),
    ({'dtype': 'uint32'}, 'train.bin has 198 bytes, not a positive multiple of 4'),
    ('\ufeff{"tokens": {"train": 98}}', 'dataset.json says 98'), ({'chat': 5}, 'chat a table'),
    ({'tokenizer': 'char'}, 'meta.pkl is missing, but dataset.json says that the tokens are char'),
])
def test_dataset_json_that_is_not_of_the_files_is_refused(info, told, tmp_path):
    assert told in refusal(Dataset, make(tmp_path, info=info))


@pytest.mark.skipif(sys.platform != 'linux', reason='has no file whose reading fails')
@pytest.mark.parametrize('name', ['dataset.json', 'meta.pkl', 'tokenizer.json'])
def test_file_that_the_disk_can_not_give_now_is_not_called_damaged(name, tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda _: None)
    (make(tmp_path) / name).symlink_to('/proc/self/mem')  # EIO at its beginning
    told = refusal(Dataset, tmp_path)
    assert f'{name} can\'t be read now (OSError: [Errno 5] Input/output error)' in told


# ---------------------------------------------------------------------------- ids and fingerprints

def test_split_without_room_or_with_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    data = Dataset(make(tmp_path, val=range(1, 11)))
    data.check(9, 100)
    told = refusal(data.check, 10, 100)
    assert 'val.bin has 10 tokens, too few for block_size=10: use at most --block_size=9,' in told
    for at in (0, 57, 98):
        data = Dataset(make(tmp_path, train=np.where(np.arange(99) == at, 64, 1)))
        data.check(8, 65)
        told = refusal(data.check, 8, 64)
        assert 'train.bin holds token id 64, but the model\'s vocab_size is 64' in told


def test_of_a_long_split_64_pieces_are_checked_and_the_rest_when_it_is_read(tmp_path):
    path = make(tmp_path, train=range(1, 60)) / 'train.bin'
    os.truncate(path, 2 * LONG)  # zeros without room on the disk
    change_a_token(path, LONG // 64 - 3, 65)  # between the first two pieces
    data = Dataset(tmp_path)
    data.check(8, 65)
    assert data.fingerprints()['train'].startswith('ee75289e959b75141986f3eca8edd882e69d7baca94140')
    data['train'].read(np.array([0, 1000]), 8)
    assert 'train.bin holds token id 65, but the model\'s vocab_size is 65' in refusal(
        data['train'].read, np.array([0, LONG // 64 - 8]), 8)
    for at in (0, LONG // 2, LONG - 1):  # pieces begin and end there
        change_a_token(path, at, 64)
        assert 'holds token id 64' in refusal(Dataset(tmp_path).check, 8, 64)


def test_ids_of_32_bits_are_read_where_dataset_json_says_so(tmp_path):
    ids, vocab_size = [70_000, 3, 127_999] * 30, 128_000
    info = {'dtype': 'uint32', 'tokenizer': 'llama-3', 'vocab_size': vocab_size}
    data = Dataset(make(tmp_path, ids, ids, info, np.uint32))
    data.check(8, vocab_size), data.check_unchanged()
    x, y = data['val'].read(np.array([1]), 3)
    assert x.tolist() == [ids[1:4]] and y.tolist() == [ids[2:5]] and data.vocab_size == vocab_size
    assert data.fingerprints()['val'] == hashlib.sha256(np.array(ids, np.uint32)).hexdigest()
    cut_in_shards(tmp_path, np.array(ids, np.uint32), [40, len(ids) - 40])
    (tmp_path / 'train.bin').unlink()
    assert Dataset(tmp_path)['train'][:].tolist() == ids


def test_file_that_is_not_that_of_dataset_json_is_refused(tmp_path):
    splits = {'train': [[1, 2, 1, 0]], 'val': [[0, 1]]}
    write_dataset(tmp_path, splits, CharTokenizer(META['itos']), 'a test')
    assert Dataset(tmp_path).fingerprints()
    change_a_token(tmp_path / 'train.bin', 3, 1)
    told = refusal(Dataset(tmp_path).fingerprints)
    assert 'train.bin doesn\'t match its SHA-256 in dataset.json' in told
    assert Dataset(tmp_path, ['val']).fingerprints()


# ---------------------------------------------------------------------------- shards

def test_shards_read_as_one_file(tmp_path):
    generator, starts = np.random.default_rng(0), np.arange(99)
    ids = generator.integers(1, 30_000, 99).astype(np.uint16)
    cut_in_shards(tmp_path, ids, [1, 40, 7, 1, 5, 5, 5, 5, 5, 5, 5, 15])  # more than are kept open
    data = Dataset(tmp_path, ['train'])
    split, whole = data['train'], Split('train', ids)
    for start, stop in generator.integers(0, 102, (200, 2)):
        assert np.array_equal(split[start:stop], ids[start:stop])
    for one, other in zip(split.read(starts, 7), whole.read(starts, 7)):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert len(split) == 99 and data.fingerprints()['train'] == hashlib.sha256(ids).hexdigest()


# ---------------------------------------------------------------------------- files that change


def replace(path):
    other, was = path.with_name('other'), path.stat()
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    os.replace(other, path)


CHANGES = {'has become shorter': lambda path: os.truncate(path, 8),
           'was written to': lambda path: os.utime(path, (1, 1)),
           'was replaced': replace, 'is gone': os.remove}


@pytest.mark.parametrize('name', ['val.bin', 'val.mask'])
@pytest.mark.parametrize('what', CHANGES)
def test_file_that_changed_since_it_was_opened_is_named(what, name, tmp_path):
    make(tmp_path)
    if name == 'val.mask':
        for split, n in (('train', 99), ('val', 49)):
            (tmp_path / f'{split}.mask').write_bytes(bytes([2] + [1] * (n - 1)))
    data = Dataset(tmp_path)
    data.check_unchanged()
    CHANGES[what](tmp_path / name)
    assert f'{tmp_path / name} {what} since it was opened: ' in refusal(data.check_unchanged)


@pytest.mark.parametrize('name', ['train.bin', 'train_000.bin'])
def test_what_was_opened_is_what_is_read(name, tmp_path):
    np.arange(9000, dtype=np.uint16).tofile(tmp_path / name)
    data = Dataset(tmp_path, ['train'])
    (tmp_path / name).rename(tmp_path / 'elsewhere')
    assert data['train'].read(np.array([8000]), 1)[0] == 8000
    os.truncate(tmp_path / 'elsewhere', 100)  # reading there would kill the process
    told = refusal(data['train'].read, np.array([8000]), 16)
    assert f'{name} has become shorter since it was opened' in told
