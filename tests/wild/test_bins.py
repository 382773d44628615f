"""Token files as other programs write them, and files that are none."""

import json

import numpy as np
import pytest
from conftest import losses

from support.errors import MissingFile, UserError
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset

RANDOM = np.random.default_rng(0)
GPT2_IDS = RANDOM.integers(0, 50257, 3000).astype(np.uint16)
CHARS = RANDOM.choice(65, 6000, p=np.arange(1, 66) / 2145)
BIG = RANDOM.integers(0, 128_000, 9000)
TEXT = np.frombuffer(b'First Citizen:\nBefore we proceed any further, hear me.\n' * 100, np.uint8)


def write_llm_c(path, ids, count=None, magic=20240520, version=1):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())


def refused(folder, split='train', vocab_size=50304, error=UserError):
    with pytest.raises(error) as caught:
        data = Dataset(folder, [split])
        data[split][:], data.check(8, vocab_size), data.fingerprints()
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_files_of_llm_c_and_modded_nanogpt_are_read_and_trained_on_as_they_are(tmp_path, train):
    for i, part in enumerate(np.split(GPT2_IDS, [1000, 1700]), 1):
        write_llm_c(tmp_path / f'fineweb_train_{i:06}.bin', part)
    write_llm_c(tmp_path / 'fineweb_val_000000.bin', GPT2_IDS[:500])
    data = Dataset(tmp_path)
    assert np.array_equal(data['train'][:], GPT2_IDS)
    assert np.array_equal(data['val'][:], GPT2_IDS[:500])
    at = np.array([[999, 1000], [2999, 0]])
    assert np.array_equal(data['train'][at], GPT2_IDS[at])
    log = train('--max_iters=1', '--n_layer=1', data_dir=tmp_path)['log']
    assert sorted(losses(log)) == [0, 1]


@pytest.mark.parametrize('how, told', [
    ({'count': 2999}, 'train.bin has 3,000 tokens, but 2,999 by its header'),
    ({'count': -1}, 'but -1 by its header'), ({'version': 2}, 'of other tokens than uint16')])
def test_header_that_is_not_that_of_the_file_is_refused(how, told, tmp_path):
    write_llm_c(tmp_path / 'train.bin', GPT2_IDS, **how)
    assert told in refused(tmp_path)


@pytest.mark.parametrize('names, told', [
    (['fineweb_train_000001.bin', 'fineweb_train_000003.bin'],
     'fineweb_train_000002.bin is missing, but fineweb_train_000003.bin exists'),
    (['a_train_000.bin', 'b_train_000.bin'], 'files of several datasets, a_train, b_train: leave one'),
    (['train.bin', 'train_000.bin'], 'has train.bin and train_000.bin: remove one')])
def test_missing_or_doubled_or_mixed_files_are_named(names, told, tmp_path):
    for name in names:
        write_llm_c(tmp_path / name, GPT2_IDS)
    assert told in refused(tmp_path, error=(MissingFile, UserError))


# ---------------------------------------------------------------------------- other numbers

@pytest.mark.parametrize('dtype, numbers, vocab_size, told', [
    ('uint16', CHARS.astype(np.uint8), 65, 'it seems to hold 8-bit numbers, not uint16'),
    ('uint16', TEXT, 50304, 'seems to hold text or 8-bit numbers, not uint16 token ids'),
    ('uint16', GPT2_IDS.astype(np.int64), 50304, '64-bit numbers, not raw uint16 tokens'),
    ('uint16', CHARS.astype(np.uint16), 60, 'prepared for another tokenizer'),
    ('uint32', BIG.astype(np.uint16), 128_000, '16-bit numbers, not uint32')])
def test_numbers_of_another_width_are_refused_with_the_reason(dtype, numbers, vocab_size, told, tmp_path):
    (tmp_path / 'train.bin').write_bytes(bytes(numbers.data))
    if dtype != 'uint16':
        (tmp_path / 'dataset.json').write_text(json.dumps({'dtype': dtype}))
    message = refused(tmp_path, vocab_size=vocab_size)
    assert told in message and 'train.bin' in message


@pytest.mark.parametrize('ids', [
    GPT2_IDS, CHARS, np.arange(3000), np.zeros(3000), [0, 7] * 100, RANDOM.integers(0, 512, 3000)])
def test_tokens_of_any_kind_are_taken_for_what_they_are(ids, tmp_path):
    for size in (10, 64, 1000, len(ids)):
        np.array(ids[:size]).astype(np.uint16).tofile(tmp_path / 'train.bin')
        Dataset(tmp_path, ['train']).check(8, 50304)


# ---------------------------------------------------------------------------- dataset.json

@pytest.fixture
def copied(tmp_path, capsys):
    """The usual tutorial: a data folder of ours, in which another script then writes its files."""
    write_text_dataset(tmp_path, 'to be or not to be\n' * 50, 'char', 'a test')
    capsys.readouterr()
    return tmp_path


def test_other_script_s_files_beside_our_dataset_json_are_read_with_one_line(copied, train):
    for split, n in (('train', 2000), ('val', 300)):
        (GPT2_IDS[:n] % 8).tofile(copied / f'{split}.bin')
    data = Dataset(copied)
    assert [len(split) for split in data.splits.values()] == [2000, 300] and data.info == {}
    log = train('--max_iters=1', data_dir=copied)['log']
    assert sorted(losses(log)) == [0, 1] and log.count('dataset.json') == 1


@pytest.mark.parametrize('n, told', [
    (95, 'val.bin doesn\'t match its SHA-256'), (90, 'has 90 tokens, but dataset.json says 95: truncated')])
def test_one_other_file_is_refused(n, told, copied):
    np.zeros(n, np.uint16).tofile(copied / 'val.bin')
    assert told in refused(copied, 'val')


@pytest.mark.parametrize('text', [
    '{', '\xff', '[' * 100_000, '{"tokens": {"train": -1}}', '{"sha256": 5}', '{"tokenizer": ["a"]}'])
def test_hostile_dataset_json_is_one_line(text, copied):
    (copied / 'dataset.json').write_bytes(text.encode('latin-1'))
    assert 'dataset.json is damaged; prepare the data again' in refused(copied)
