"""support/text/tokens.py: token files, the windows of a batch, and batches that grow."""

import builtins
import hashlib
import io
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.text import tokens
from support.text.prepare import write_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, read_meta, read_tokenizer
from support.text.tokens import (
    BatchRamp,
    check_split,
    epoch_windows,
    eval_windows,
    fingerprint,
    open_split,
    prefetch,
    read_info,
    read_windows,
    train_windows,
    windows_an_epoch,
)

META = {'vocab_size': 3, 'itos': {0: '\n', 1: 'a', 2: 'é'}, 'stoi': {'\n': 0, 'a': 1, 'é': 2}}


def write_bin(folder, split, ids):
    np.array(ids, dtype=np.uint16).tofile(folder / f'{split}.bin')


def assert_one_line(error):
    assert str(error.value) and '\n' not in str(error.value)



# ---------------------------------------------------------------------------- training windows

def test_train_windows_follow_from_seed_and_iteration_alone():
    first = train_windows(1337, 5, 100, 10_000, 64)
    np.random.seed(1)
    train_windows(1337, 6, 100, 10_000, 64)
    np.testing.assert_array_equal(train_windows(1337, 5, 100, 10_000, 64), first)
    assert (train_windows(1337, 6, 100, 10_000, 64) != first).any()
    assert (train_windows(1338, 5, 100, 10_000, 64) != first).any()
    assert (train_windows(1338, 4, 100, 10_000, 64) != first).any()


@pytest.mark.parametrize('n_tokens', [65, 129, 1000, 1024, 1025])
def test_an_epoch_has_each_window_once_side_by_side(n_tokens):
    n = windows_an_epoch(n_tokens, 64)
    first, second = (np.sort(epoch_windows(7, e * n, n, n_tokens, 64)) for e in (0, 1))
    for starts in (first, second):
        assert (np.diff(starts) == 64).all() and starts[0] >= 0 and starts[-1] + 64 < n_tokens
    if n_tokens >= 1000:
        assert n == n_tokens // 64 - 1 - (n_tokens == 1024)
        assert (first != second).any() and (epoch_windows(7, 0, n, n_tokens, 64) != first).any()


def test_windows_of_an_epoch_follow_from_their_number_alone():
    whole = epoch_windows(7, 0, 50, 1000, 64)
    np.testing.assert_array_equal(np.concatenate([epoch_windows(7, i, 7, 1000, 64) for i in range(0, 49, 7)]),
                                  whole[:49])
    assert (epoch_windows(8, 0, 50, 1000, 64) != whole).any()


def test_train_windows_stay_the_same_from_version_to_version():
    """A run resumed with a later version gets the batches that it would have had."""
    np.testing.assert_array_equal(train_windows(1337, 0, 4, 1_003_854, 256), [230731, 497885, 530148, 960125])


def test_train_windows_reach_the_first_and_the_last_token_and_no_further():
    starts = train_windows(0, 0, 5000, 50, 8)
    assert starts.dtype == np.int64 and set(starts) == set(range(42))
    _, y = read_windows(np.arange(50, dtype=np.uint16), starts, 8)
    assert y.min() == 1 and y.max() == 49


@pytest.mark.parametrize('n_tokens', [9, 2**33])
def test_train_windows_fit_the_smallest_and_the_largest_split(n_tokens):
    starts = train_windows(0, 0, 10_000, n_tokens, 8)
    assert starts.min() >= 0 and starts.max() < n_tokens - 8
    assert starts.max() >= (n_tokens - 9) * 0.99


@pytest.mark.parametrize('count', [1, 3, 8, 11])
def test_every_training_window_is_as_likely_as_any_other(count):
    starts = np.concatenate([train_windows(0, i, count, 18, 10) for i in range(12_000 // count)])
    counts = np.bincount(starts, minlength=8)
    assert len(counts) == 8 and (abs(counts - 1500) < 200).all()  # more than five standard deviations


def test_batch_has_a_window_from_every_equal_part_of_the_split():
    for iteration in range(100):
        starts = train_windows(1337, iteration, 10, 1008, 8)
        np.testing.assert_array_equal(starts // 100, np.arange(10))


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_processes_share_the_global_batch_as_micro_steps_do(world_size):
    """train.py's slices of an iteration's windows, for four micro-steps over all processes."""
    batch_size, accumulation, iteration = 3, 4, 7
    seen = []
    for micro_step in range(accumulation // world_size):
        for rank in range(world_size):
            starts = train_windows(1337, iteration, accumulation * batch_size, 1000, 16)
            first = (micro_step * world_size + rank) * batch_size
            seen.append(starts[first:first + batch_size])
    np.testing.assert_array_equal(np.concatenate(seen), train_windows(1337, iteration, 12, 1000, 16))


def test_negative_seed_is_a_seed_too():
    assert (train_windows(-1, 0, 50, 1000, 8) != train_windows(1, 0, 50, 1000, 8)).any()


# ---------------------------------------------------------------------------- evaluation windows

@settings(deadline=None, max_examples=200)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7))
@example(33, 8, 4)
@example(34, 8, 4)
@example(2, 40, 7)
def test_whole_split_has_every_target_exactly_once(n_tokens, block_size, batch_size):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    targets = []
    for starts in eval_windows(range(n_tokens), block_size, batch_size, 0):
        assert starts.shape == (batch_size,)
        x, y = read_windows(tokens, starts, block_size)
        assert (x + 1 == y)[y >= 0].all()
        targets += y[y >= 0].tolist()
    assert targets == list(range(1, n_tokens))


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 2000), st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
def test_eval_windows_are_distinct_and_spread_evenly(n_tokens, block_size, batch_size, n_batches):
    batches = eval_windows(range(n_tokens), block_size, batch_size, n_batches)
    np.testing.assert_array_equal(batches, eval_windows(range(n_tokens), block_size, batch_size, n_batches))
    n_windows = -(-(n_tokens - 1) // block_size)
    if n_batches * batch_size >= n_windows:
        np.testing.assert_array_equal(batches, eval_windows(range(n_tokens), block_size, batch_size, 0))
        return
    assert batches.shape == (n_batches, batch_size) and batches.dtype == np.int64
    starts = np.append(batches, n_windows * block_size)
    assert starts[0] == 0 and (starts % block_size == 0).all()
    assert np.ptp(np.diff(starts)) <= block_size and np.diff(starts).min() >= block_size


def test_eval_windows_of_a_long_split_do_not_overflow():
    starts = eval_windows(range(9_035_582_198), 1024, 12, 200)
    assert starts.shape == (200, 12) and starts[0, 0] == 0
    assert 9_035_582_198 * 0.999 < starts[-1, -1] < 9_035_582_198 - 1024


# ---------------------------------------------------------------------------- reading windows

def test_targets_are_the_inputs_one_token_further():
    tokens = np.arange(100, 120, dtype=np.uint16)
    x, y = read_windows(tokens, np.array([0, 3, 15]), 4)
    assert x.dtype == y.dtype == np.int64
    np.testing.assert_array_equal(x, [[100, 101, 102, 103], [103, 104, 105, 106], [115, 116, 117, 118]])
    np.testing.assert_array_equal(y, [[101, 102, 103, 104], [104, 105, 106, 107], [116, 117, 118, 119]])


def test_targets_past_the_end_are_ignored_and_inputs_stay_in_the_vocabulary():
    tokens = np.arange(100, 110, dtype=np.uint16)
    x, y = read_windows(tokens, np.array([8, 10]), 4)
    np.testing.assert_array_equal(y, [[109, -1, -1, -1], [-1, -1, -1, -1]])
    assert x.tolist()[0][:2] == [108, 109] and x.min() >= 100 and x.max() <= 109


def test_largest_uint16_stays_positive():
    _, y = read_windows(np.array([0, 65535], dtype=np.uint16), np.array([0]), 1)
    assert y.tolist() == [[65535]]


def test_prefetched_results_are_the_function_s_in_order_and_one_ahead():
    asked = []

    def arguments():
        for i in range(5):
            asked.append(i)
            yield i, 10

    results = prefetch(lambda a, b: a + b, arguments())
    assert next(results) == 10 and asked == [0, 1]
    assert list(results) == [11, 12, 13, 14]
    assert list(prefetch(max, [])) == [] and list(prefetch(max, [(3, 4)])) == [4]


def test_error_while_prefetching_reaches_the_caller():
    results = prefetch(lambda x: 1 // x, [(1,), (0,), (1,)])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


# ---------------------------------------------------------------------------- opening a split

def test_folder_that_nanogpt_made_is_read(tmp_path):
    write_bin(tmp_path, 'train', [2, 1, 0, 1])
    write_bin(tmp_path, 'val', [1, 2])
    with open(tmp_path / 'meta.pkl', 'wb') as file:
        pickle.dump(META, file)
    tokens = open_split(tmp_path, 'train')
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable and tokens.dtype == np.uint16
    assert tokens.tolist() == [2, 1, 0, 1] and open_split(tmp_path, 'val').tolist() == [1, 2]
    assert read_meta(tmp_path) == META and read_info(tmp_path) == {}
    assert read_tokenizer(tmp_path).decode([2, 1]) == 'éa'


def test_folder_without_meta_holds_gpt2_tokens(tmp_path):
    write_bin(tmp_path, 'train', [50256])
    assert read_meta(tmp_path) is None
    assert isinstance(read_tokenizer(tmp_path), GPT2Tokenizer) and read_tokenizer(tmp_path).n_vocab == 50257


def test_missing_split_names_the_command_that_makes_it(tmp_path):
    (tmp_path / 'prepare.py').touch()
    with pytest.raises(FileNotFoundError, match=r'val.bin is missing; run: python .*prepare.py') as error:
        open_split(tmp_path, 'val')
    assert_one_line(error)


def test_missing_split_of_ones_own_data_names_the_page_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'val.bin is missing; .*README.md'):
        open_split(tmp_path / 'nowhere', 'val')


@pytest.mark.parametrize('data', [b'', b'abc', b'a'])
def test_split_that_is_empty_or_cut_within_a_token_is_refused(data, tmp_path):
    (tmp_path / 'train.bin').write_bytes(data)
    with pytest.raises(ValueError, match=f'train.bin has {len(data)} bytes') as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


def test_split_shorter_than_dataset_json_tells_is_refused(tmp_path):
    write_dataset(tmp_path, {'train': [[1, 2, 1, 0]], 'val': [[0, 1]]}, CharTokenizer(META['itos']), 'a test')
    assert open_split(tmp_path, 'train').tolist() == [1, 2, 1, 0]
    write_bin(tmp_path, 'train', [1, 2, 1])
    with pytest.raises(ValueError, match='train.bin has 3 tokens, but dataset.json says 4') as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


@pytest.mark.parametrize('text', ['', '{', '[]', '{"tokens": 3}', 'null', '\xff'])
def test_damaged_dataset_json_is_told(text, tmp_path):
    write_bin(tmp_path, 'train', [1])
    (tmp_path / 'dataset.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match='dataset.json is damaged') as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


def test_split_without_room_for_a_window_names_the_largest_block_size():
    tokens = np.zeros(10, dtype=np.uint16)
    check_split(tokens, 'val.bin', 9, 1)
    with pytest.raises(ValueError, match=r'^val.bin has 10 tokens.*--block_size=9,') as error:
        check_split(tokens, 'val.bin', 10, 1)
    assert_one_line(error)


@pytest.mark.parametrize('at', [0, 57, 99])
def test_token_beyond_the_vocabulary_is_refused(at):
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[at] = 64
    check_split(tokens, 'train.bin', 8, 65)
    with pytest.raises(ValueError, match='^train.bin holds token id 64, but the model\'s vocab_size is 64'):
        check_split(tokens, 'train.bin', 8, 64)


@pytest.mark.parametrize('at', [0, 9, 158, 167, 9990, 9999])
def test_token_beyond_the_vocabulary_is_found_in_the_places_read_of_a_long_split(at):
    tokens = np.zeros(10_000, dtype=np.uint16)  # 64 places of 10 tokens, 158.6 apart
    tokens[at] = 64
    with pytest.raises(ValueError, match='holds token id 64'):
        check_split(tokens, 'train.bin', 8, 64, at_most=640)


def test_long_split_is_not_read_from_end_to_end():
    tokens = np.zeros(10_000, dtype=np.uint16)
    tokens[75] = 64  # between the first place and the second
    check_split(tokens, 'train.bin', 8, 64, at_most=640)


@pytest.mark.parametrize('kind', ['int32', 'int64', 'uint32', 'npy'])
def test_split_of_another_type_is_refused(kind, tmp_path):
    ids = np.arange(1, 100, dtype=np.uint16)
    if kind == 'npy':
        np.save(tmp_path / 'train.npy', ids)
        (tmp_path / 'train.npy').rename(tmp_path / 'train.bin')
    else:
        ids.astype(kind).tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match='not raw uint16 tokens: write it with') as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


@pytest.mark.parametrize('ids', [[0] * 50, [5, 0] * 8, [1, 1], [0, 7] * 100])
def test_split_of_many_zeros_is_read(ids, tmp_path):
    write_bin(tmp_path, 'train', ids)
    assert open_split(tmp_path, 'train').tolist() == ids


def test_folder_in_the_place_of_a_split_is_told(tmp_path):
    (tmp_path / 'train.bin').mkdir()
    with pytest.raises(FileNotFoundError, match='train.bin is missing') as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


@pytest.mark.parametrize('name, function', [('train.bin', lambda folder: open_split(folder, 'train')),
                                            ('meta.pkl', read_meta), ('dataset.json', read_info)])
def test_file_that_may_not_be_read_is_told(name, function, tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(path))

    write_bin(tmp_path, 'train', [1, 2])
    (tmp_path / name).touch()
    monkeypatch.setattr(builtins, 'open', refuse)
    monkeypatch.setattr(io, 'open', refuse)
    with pytest.raises(ValueError, match=f'{name}.* denied') as error:
        function(tmp_path)
    assert_one_line(error)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.none() | st.binary(max_size=40) | st.integers(-1, 110))
@example(b'\x93NUMPY\1\0', None)
@example(bytes(2), 0)
def test_random_files_are_read_whole_or_refused_in_one_line(tmp_path_factory, data, info):
    folder = tmp_path_factory.mktemp('fuzz', numbered=True)
    (folder / 'train.bin').write_bytes(data)
    if info is not None:
        text = info if isinstance(info, bytes) else json.dumps({'tokens': {'train': info}}).encode()
        (folder / 'dataset.json').write_bytes(text)
    try:
        tokens = open_split(folder, 'train')
        check_split(tokens, 'train.bin', 3, 30_000)
    except ValueError as error:
        assert str(error) and '\n' not in str(error)
    else:
        assert tokens.tobytes() == data and info in (None, len(tokens))


# ---------------------------------------------------------------------------- fingerprints

def test_fingerprint_is_the_file_s_sha256(tmp_path):
    write_bin(tmp_path, 'train', range(100))
    digest = hashlib.sha256((tmp_path / 'train.bin').read_bytes()).hexdigest()
    assert fingerprint(tmp_path, 'train', open_split(tmp_path, 'train')) == digest


@pytest.mark.parametrize('at_most', [640, 1 << 26])
def test_fingerprint_changes_with_any_token_that_is_read_and_with_the_length(at_most, tmp_path):
    tokens = np.zeros(10_000, dtype=np.uint16)  # 64 places of 10 tokens, 158.6 apart
    found = {fingerprint(tmp_path, 'train', t, at_most) for t in (tokens, tokens[:-1])}
    for at in (0, 9, 158, 167, 9990, 9999):
        changed = tokens.copy()
        changed[at] = 1
        found.add(fingerprint(tmp_path, 'train', changed, at_most))
    assert len(found) == 8


def test_long_split_is_fingerprinted_in_places(tmp_path):
    tokens = np.zeros(10_000, dtype=np.uint16)
    first = fingerprint(tmp_path, 'train', tokens, at_most=640)
    tokens[75] = 1  # between the first place and the second
    assert fingerprint(tmp_path, 'train', tokens, at_most=640) == first


def test_file_that_does_not_match_dataset_json_is_refused(tmp_path):
    write_dataset(tmp_path, {'train': [[1, 2, 1, 0]], 'val': [[0, 1]]}, CharTokenizer(META['itos']), 'a test')
    assert fingerprint(tmp_path, 'train', open_split(tmp_path, 'train'))
    write_bin(tmp_path, 'train', [1, 2, 1, 1])
    os.utime(tmp_path / 'dataset.json')  # it is the newest file, as prepare.py leaves it
    with pytest.raises(ValueError, match=r'train.bin doesn.t match its SHA-256 in dataset.json') as error:
        fingerprint(tmp_path, 'train', open_split(tmp_path, 'train'))
    assert_one_line(error)
    assert fingerprint(tmp_path, 'val', open_split(tmp_path, 'val'))


# ---------------------------------------------------------------------------- shards

def cut_in_shards(folder, ids, sizes):
    for i, part in enumerate(np.split(ids, np.cumsum(sizes)[:-1])):
        part.tofile(folder / f'train_{i:03}.bin')


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 1000))
def test_shards_read_as_one_file(tmp_path_factory, sizes, seed):
    folder, generator = tmp_path_factory.mktemp('shards'), np.random.default_rng(seed)
    ids = generator.integers(1, 30_000, sum(sizes)).astype(np.uint16)
    cut_in_shards(folder, ids, sizes)
    tokens = open_split(folder, 'train')
    assert len(tokens) == len(ids) and len(list(folder.iterdir())) == len(sizes)
    for start, stop in generator.integers(0, len(ids) + 3, (20, 2)):
        assert np.array_equal(tokens[start:stop], ids[start:stop])
    assert np.array_equal(tokens[:], ids) and tokens[:1].tolist() == ids[:1].tolist()
    starts = generator.integers(0, len(ids), 20)
    for shard, file in zip(read_windows(tokens, starts, 7), read_windows(ids, starts, 7)):
        assert np.array_equal(shard, file) and shard.dtype == file.dtype
    for at_most in (1 << 26, 64):
        assert fingerprint(folder, 'train', tokens, at_most) == fingerprint(folder, 'train', ids, at_most)


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='it looks into /proc')
def test_few_shards_are_open_at_a_time_and_none_before_it_is_read(tmp_path, monkeypatch):
    cut_in_shards(tmp_path, np.arange(1, 401, dtype=np.uint16), [4] * 100)
    (tmp_path / 'train_050.bin').write_bytes(b'\x93NUMPY  ')
    tokens = open_split(tmp_path, 'train')
    for i in range(50):
        assert tokens[4 * i:4 * i + 1] == 4 * i + 1
    with open('/proc/self/maps') as maps:
        assert sum('/train_' in line for line in maps) <= 8
    with pytest.raises(ValueError, match='train_050.bin holds a NumPy header'):
        tokens[200:201]


@pytest.mark.parametrize('spoil, reason', [
    (lambda folder: (folder / 'train_001.bin').unlink(), '_001.bin is missing, but train_002.bin exists'),
    (lambda folder: (folder / 'train_001.bin').write_bytes(b''), 'train_001.bin has 0 bytes'),
    (lambda folder: (folder / 'train.bin').write_bytes(b'ab'), 'has train.bin and train_000.bin: remove'),
])
def test_shards_that_are_not_whole_are_refused(spoil, reason, tmp_path):
    cut_in_shards(tmp_path, np.arange(30, dtype=np.uint16), [10] * 3)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        open_split(tmp_path, 'train')
    assert_one_line(error)


# ---------------------------------------------------------------------------- batches that grow

@pytest.mark.parametrize('micro_steps, iterations', [(1, 0), (4, 0), (4, 3), (8, 100), (100, 8)])
def test_batch_grows_from_one_micro_step_to_all(micro_steps, iterations):
    ramp = BatchRamp(micro_steps, iterations)
    sizes = [ramp.at(i) for i in range(iterations + 5)]
    assert sizes == sorted(sizes) and sizes[iterations:] == [micro_steps] * 5
    assert abs(sizes[0] - micro_steps / (iterations + 1)) < 1
    assert [ramp.before(i) for i in range(len(sizes))] == [sum(sizes[:i]) for i in range(len(sizes))]


# ---------------------------------------------------------------------------- faults

def test_data_whose_preparation_was_broken_off_is_refused(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    (tmp_path / 'dataset.json').write_text('{"unfinished": true}')
    with pytest.raises(ValueError, match='was broken off; prepare it again'):
        tokens.open_split(tmp_path, 'train')


@pytest.mark.parametrize('name', ['train.bin', 'train_000.bin'])
def test_file_cut_in_mid_run_is_an_error_not_a_bus_error(name, tmp_path):
    np.arange(9000, dtype=np.uint16).tofile(tmp_path / name)
    split = tokens.open_split(tmp_path, 'train')
    tokens.read_windows(split, np.array([8000]), 16)
    os.truncate(tmp_path / name, 100)
    with pytest.raises(ValueError, match=f'{name} has become shorter since it was opened'):
        tokens.read_windows(split, np.array([8000]), 16)


@pytest.mark.parametrize('n', [1, 2, 3, 64, 1000, 65537])
def test_order_without_a_table_is_a_permutation(n):
    keys = np.random.default_rng(n).integers(2**64, size=6, dtype=np.uint64)
    order = tokens.shuffled(np.arange(n), n, keys)
    assert (np.sort(order) == np.arange(n)).all()
    if n > 100:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.1 and (np.diff(order) == 1).mean() < 0.02


def test_epochs_are_whole_with_and_without_a_table(monkeypatch):
    n = tokens.windows_an_epoch(10_000, 16)
    with_table = tokens.epoch_windows(5, n - 3, n + 7, 10_000, 16)
    assert (with_table[:3] == tokens.epoch_windows(5, n - 3, 3, 10_000, 16)).all()
    monkeypatch.setattr(tokens, 'LARGEST_TABLE', 10)
    for epoch in range(2):
        starts = tokens.epoch_windows(5, epoch * n, n, 10_000, 16)
        assert (np.diff(np.sort(starts)) == 16).all() and starts.max() + 17 <= 10_000
    assert (tokens.epoch_windows(5, 0, n, 10_000, 16) != starts).any()


def test_windows_of_a_vast_epoch_take_no_memory():
    starts = tokens.epoch_windows(1, 10**10, 1000, 10**14, 1024)
    assert len(set(starts.tolist())) == 1000 and starts.max() < 10**14
