"""Token files as other programs write them, and files that are none."""

import json
import os

import numpy as np
import pytest
from conftest import losses

from support.errors import MissingFile, UserError
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset
from support.text.windows import Split

RANDOM = np.random.default_rng(0)
GPT2_IDS = RANDOM.integers(0, 50257, 3000).astype(np.uint16)
CHARS = RANDOM.choice(65, 6000, p=np.arange(1, 66) / 2145)
BYTES, BIG = RANDOM.integers(0, 256, 9000), RANDOM.integers(0, 128_000, 9000)
SKEWED = RANDOM.zipf(1.2, 9000) % 64_000
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


# ---------------------------------------------------------------------------- llm.c, modded-nanogpt

@pytest.mark.parametrize('name, first', [('fineweb', 1), ('edu_fineweb', 0)])
def test_files_of_llm_c_and_modded_nanogpt_are_read_and_trained_on_as_they_are(name, first, tmp_path, train):
    for i, part in enumerate(np.split(GPT2_IDS, [1000, 1700]), first):
        write_llm_c(tmp_path / f'{name}_train_{i:06}.bin', part)
    write_llm_c(tmp_path / f'{name}_val_000000.bin', GPT2_IDS[:500])
    data = Dataset(tmp_path)
    assert np.array_equal(data['train'][:], GPT2_IDS)
    assert np.array_equal(data['val'][:], GPT2_IDS[:500])
    at = np.array([[999, 1000], [2999, 0]])
    assert np.array_equal(data['train'][at], GPT2_IDS[at])
    data.check(8, 50304)
    assert data.fingerprints()['train'] == Split('train', GPT2_IDS).fingerprint({})
    log = train('--max_iters=1', '--n_layer=1', data_dir=tmp_path)['log']
    assert sorted(losses(log)) == [0, 1]


@pytest.mark.parametrize('how, told', [
    ({'count': 2999}, 'train.bin has 3,000 tokens, but 2,999 by its header: truncated, or'),
    ({'count': 100_000_000}, '3,000 tokens, but 100,000,000 by its header'),
    ({'count': -1}, 'but -1 by its header'),
    ({'version': 2}, 'header 20240520, 2, of other tokens than uint16'),
    ({'magic': 20240801, 'version': 7}, 'header 20240801, 7, of other tokens than uint16'),
    *((size, 'by its header') for size in (12, 500, 1024, 1025, 6023))])
def test_header_that_is_not_that_of_the_file_is_refused(how, told, tmp_path):
    write_llm_c(tmp_path / 'train.bin', GPT2_IDS, **how if isinstance(how, dict) else {})
    if isinstance(how, int):
        os.truncate(tmp_path / 'train.bin', how)
    assert told in refused(tmp_path)
    if isinstance(how, int):
        (tmp_path / 'dataset.json').write_text('{"dtype": "uint32"}')
        assert 'header of uint16 tokens, but dataset.json says uint32' in refused(tmp_path)


@pytest.mark.parametrize('names, told', [
    (['fineweb_train_000001.bin', 'fineweb_train_000003.bin'],
     'fineweb_train_000002.bin is missing, but fineweb_train_000003.bin exists'),
    (['fineweb_train_000002.bin'], 'fineweb_train_000001.bin is missing'),
    (['a_train_000.bin', 'b_train_000.bin'], 'files of several datasets, a_train, b_train: leave one'),
    (['train_000.bin', 'train_001.bin', 'train_0001.bin'], 'has train_0001.bin and train_001.bin: '),
    (['train.bin', 'train_000.bin'], 'has train.bin and train_000.bin: remove one'),
    (['train_1000.bin'], 'train_0000.bin is missing, but train_1000.bin'),
    (['pretrain_000.bin'], 'train.bin is missing'), (['val.bin'], 'train.bin is missing')])
def test_missing_or_doubled_or_mixed_files_are_named(names, told, tmp_path):
    for name in names:
        write_llm_c(tmp_path / name, GPT2_IDS)
    assert told in refused(tmp_path, error=(MissingFile, UserError))


def test_a_file_s_own_name_wins_and_the_thousandth_is_read(tmp_path):
    for i in range(1002):
        GPT2_IDS[i:i + 1].tofile(tmp_path / f'train_{i:03}.bin')
    assert np.array_equal(Dataset(tmp_path, ['train'])['train'][:], GPT2_IDS[:1002])
    for i in range(4):
        write_llm_c(tmp_path / f'fineweb_val_{i:06}.bin', GPT2_IDS)
    write_llm_c(tmp_path / 'val.bin', GPT2_IDS)
    assert len(Dataset(tmp_path, ['val'])['val']) == 3000


# ---------------------------------------------------------------------------- other numbers

AS_UINT16 = 'write it with array.astype(numpy.uint16).tofile(path), or put "dtype": "uint32" into '
AS_UINT32 = 'write it with array.astype(numpy.uint32)'


@pytest.mark.parametrize('dtype, numbers, vocab_size, told', [
    ('uint16', TEXT[:0], 65, 'train.bin has 0 bytes'),
    ('uint16', TEXT[:3], 65, 'has 3 bytes, not a positive multiple of 2'),
    ('uint16', CHARS.astype(np.uint8), 65, 'it seems to hold 8-bit numbers, not uint16: write it with'),
    ('uint16', CHARS.astype(np.uint8), 50304, 'seems to hold text or 8-bit numbers, not uint16 token ids'),
    ('uint16', TEXT, 50304, 'seems to hold text or 8-bit'), ('uint16', TEXT, 128, 'hold 8-bit numbers'),
    ('uint16', BYTES.astype(np.uint8), 50304, 'it seems to hold 8-bit numbers'),
    ('uint16', CHARS.astype(np.uint32), 65, f'32-bit numbers, not raw uint16 tokens: {AS_UINT16}'),
    ('uint16', GPT2_IDS.astype(np.int32), 50304, '32-bit numbers, not raw uint16 tokens'),
    ('uint16', GPT2_IDS.astype(np.int64), 50304, '64-bit numbers, not raw uint16 tokens'),
    ('uint16', BIG.astype(np.uint32), 50304, f'hold 32-bit numbers, not uint16: {AS_UINT16}'),
    ('uint16', SKEWED.astype(np.uint16), 50304, 'prepared for another tokenizer'),
    ('uint16', CHARS.astype(np.uint16), 60, 'prepared for another tokenizer'),
    ('uint32', BIG.astype(np.uint16), 128_000, f'16-bit numbers, not uint32: {AS_UINT32}'),
    ('uint32', BIG, 128_000, f'64-bit numbers, not raw uint32 tokens: {AS_UINT32}'),
])
def test_numbers_of_another_width_are_refused_with_the_reason(dtype, numbers, vocab_size, told, tmp_path):
    (tmp_path / 'train.bin').write_bytes(bytes(numbers.data))
    if dtype != 'uint16':
        (tmp_path / 'dataset.json').write_text(json.dumps({'dtype': dtype}))
    message = refused(tmp_path, vocab_size=vocab_size)
    assert told in message and 'train.bin' in message


def test_numpy_file_is_refused(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as file:
        np.save(file, GPT2_IDS)
    assert 'holds a NumPy header, not raw uint16 tokens: write it with' in refused(tmp_path)


@pytest.mark.parametrize('ids', [
    GPT2_IDS, CHARS, np.arange(3000), np.full(3000, 0x2020), np.zeros(3000), np.arange(3000) % 300,
    [5, 0] * 8, [0, 7] * 100, [1, 1] * 5, RANDOM.integers(0, 512, 3000),
    RANDOM.zipf(1.2, 9000) % 50257])
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


@pytest.mark.parametrize('time', [1e9, 2e9])
def test_other_script_s_files_beside_our_dataset_json_are_read_with_one_line(time, copied, train):
    for split, n in (('train', 2000), ('val', 300)):
        (GPT2_IDS[:n] % 8).tofile(copied / f'{split}.bin')
    os.utime(copied / 'dataset.json', (time, time))
    data = Dataset(copied)
    assert [len(split) for split in data.splits.values()] == [2000, 300] and data.info == {}
    assert data.fingerprints()
    log = train('--max_iters=1', data_dir=copied)['log']
    assert sorted(losses(log)) == [0, 1] and log.count('dataset.json') == 1
    assert f'ignoring {copied / "dataset.json"}, which is not of the files beside' in log


@pytest.mark.parametrize('time', [1e9, 2e9])
@pytest.mark.parametrize('n, told', [
    (95, 'val.bin doesn\'t match its SHA-256 in dataset.json'),
    (90, 'val.bin has 90 tokens, but dataset.json says 95: truncated, or written by another '
         'program. Prepare it again, or delete dataset.json')])
@pytest.mark.parametrize('is_alone', [True, False])
def test_one_other_file_is_refused_whatever_its_time(is_alone, n, told, time, copied):
    np.zeros(n, np.uint16).tofile(copied / 'val.bin')
    if is_alone:
        (copied / 'train.bin').unlink()
    os.utime(copied / 'dataset.json', (time, time))
    assert told in refused(copied, 'val')
    (copied / 'dataset.json').unlink()
    assert len(Dataset(copied, ['val'])['val']) == n


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '\xff', '"x"', '[' * 100_000, '{"a": "' + 'x' * 2_000_000 + '"}',
    '{"tokens": 3}', '{"tokens": null}', '{"tokens": []}', '{"tokens": {"train": "9"}}',
    '{"tokens": {"train": 1e400}}', '{"tokens": {"train": NaN}}', '{"tokens": {"train": -1}}',
    '{"tokens": {"train": 1' + '0' * 30 + '}}', '{"tokens": {"train": 1' + '0' * 5000 + '}}',
    '{"tokens": {"train": true, "train": {}}}', '{"sha256": {"a": 1}}', '{"sha256": 5}',
    '{"source": 5}', '{"tokenizer": ["a"]}'])
def test_hostile_dataset_json_is_one_line(text, copied):
    (copied / 'dataset.json').write_bytes(text.encode('latin-1'))
    assert 'dataset.json is damaged; prepare the data again' in refused(copied)


def test_names_in_dataset_json_reach_no_other_file(copied):
    for name in ('secret_000.bin', '[_000.bin'):
        (copied / name).write_bytes(b'xx')
    info = {'tokens': {'train': 855, 'val': 95, '../**/*': 3, '[': 1, '': 5, 'secret': 9}}
    (copied / 'dataset.json').write_text(json.dumps(info))
    assert len(Dataset(copied)['train']) == 855
