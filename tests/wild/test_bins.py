"""Token files as other programs write them, and files that are none."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import losses

from support.text.prepare import write_text_dataset
from support.text.tokens import check_split, fingerprint, open_split, read_info, say_once

GPT2_IDS = np.random.default_rng(0).integers(0, 50257, 3000).astype(np.uint16)


@pytest.fixture(autouse=True)
def say_again():
    say_once.cache_clear()


def write_llm_c(path, ids, count=None, magic=20240520, version=1):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())


def refused(folder, split='train', error=ValueError):
    with pytest.raises(error) as caught:
        tokens = open_split(folder, split)
        tokens[:], check_split(tokens, f'{split}.bin', 8, 50304)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- llm.c, modded-nanogpt

@pytest.mark.parametrize('name, first', [('fineweb', 1), ('edu_fineweb', 0)])
def test_files_of_llm_c_and_modded_nanogpt_are_read_as_they_are(name, first, tmp_path):
    for i, part in enumerate(np.split(GPT2_IDS, [1000, 1700]), first):
        write_llm_c(tmp_path / f'{name}_train_{i:06}.bin', part)
    write_llm_c(tmp_path / f'{name}_val_000000.bin', GPT2_IDS[:500])
    train, val = open_split(tmp_path, 'train'), open_split(tmp_path, 'val')
    assert np.array_equal(train[:], GPT2_IDS) and np.array_equal(val[:], GPT2_IDS[:500])
    assert np.array_equal(train[np.array([999, 1000, 2999])], GPT2_IDS[[999, 1000, 2999]])
    check_split(train, 'train.bin', 8, 50304)
    assert fingerprint(tmp_path, 'train', train) == fingerprint(tmp_path, 'train', GPT2_IDS)


def test_a_run_trains_on_them(tmp_path, train):
    (tmp_path / 'data').mkdir()
    for i in (1, 2):
        write_llm_c(tmp_path / f'data/fineweb_train_{i:06}.bin', GPT2_IDS)
    write_llm_c(tmp_path / 'data/fineweb_val_000000.bin', GPT2_IDS)
    log = train('--max_iters=1', '--n_layer=1', data_dir=tmp_path / 'data')['log']
    assert sorted(losses(log)) == [0, 1]


def test_header_in_a_file_of_the_plain_name_is_known_too(tmp_path):
    write_llm_c(tmp_path / 'train.bin', GPT2_IDS)
    assert np.array_equal(open_split(tmp_path, 'train'), GPT2_IDS)


@pytest.mark.parametrize('how, told', [
    ({'count': 2999}, '_000001.bin has 3,000 tokens, but 2,999 by its header: truncated, or damaged'),
    ({'count': 100_000_000}, '_000001.bin has 3,000 tokens, but 100,000,000 by its header'),
    ({'count': -1}, 'but -1 by its header'),
    ({'version': 2}, 'header 20240520, 2, of other tokens than uint16'),
    ({'magic': 20240801, 'version': 7}, 'header 20240801, 7, of other tokens than uint16'),
])
def test_header_that_is_not_that_of_the_file_is_told(how, told, tmp_path):
    write_llm_c(tmp_path / 'fineweb_train_000001.bin', GPT2_IDS, **how)
    assert told in refused(tmp_path)


@pytest.mark.parametrize('size', [12, 500, 1024, 1025, 6023])
def test_truncated_file_with_a_header_is_told(size, tmp_path):
    write_llm_c(tmp_path / 'train.bin', GPT2_IDS)
    os.truncate(tmp_path / 'train.bin', size)
    assert 'by its header' in refused(tmp_path)


def test_missing_or_doubled_or_mixed_files_are_told(tmp_path):
    def folder(*names):
        shutil.rmtree(tmp_path / 'x', ignore_errors=True)
        (tmp_path / 'x').mkdir()
        for name in names:
            write_llm_c(tmp_path / 'x' / name, GPT2_IDS)
        return tmp_path / 'x'
    names = [f'fineweb_train_{i:06}.bin' for i in range(4)]
    told = refused(folder(names[1], names[3]), error=FileNotFoundError)
    assert 'fineweb_train_000002.bin is missing, but fineweb_train_000003.bin exists' in told
    assert 'fineweb_train_000001.bin is missing' in refused(folder(names[2]), error=FileNotFoundError)
    assert 'has files of several datasets, a_train, b_train: leave one' in refused(
        folder('a_train_000.bin', 'b_train_000.bin'))
    assert 'has train_0001.bin and train_001.bin: remove one' in refused(
        folder('train_000.bin', 'train_001.bin', 'train_0001.bin'))
    assert open_split(folder(*names, 'train.bin'), 'train').size == 3000  # its own name wins
    assert 'val.bin is missing' in refused(folder(*names), 'val', FileNotFoundError)
    assert 'train.bin is missing' in refused(folder('pretrain_000.bin'), error=FileNotFoundError)


def test_the_thousandth_file_is_read_or_told(tmp_path):
    for i in range(1002):
        GPT2_IDS[i:i + 1].tofile(tmp_path / f'train_{i:03}.bin')
    assert np.array_equal(open_split(tmp_path, 'train')[:], GPT2_IDS[:1002])
    for i in range(1000):
        (tmp_path / f'train_{i:03}.bin').unlink()
    told = refused(tmp_path, error=FileNotFoundError)
    assert 'train_0000.bin is missing, but train_1000.bin exists' in told
    GPT2_IDS.tofile(tmp_path / 'train.bin')
    assert 'has train.bin and train_1000.bin: remove one' in refused(tmp_path)


# ---------------------------------------------------------------------------- other numbers than uint16

TEXT = np.frombuffer(b'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 100, np.uint8)
CHARS = np.random.default_rng(0).choice(65, 6000, p=np.arange(1, 66) / 2145)


BYTES, BIG, SKEWED = (np.random.default_rng(1).integers(0, 256, 9000), np.random.default_rng(1).integers(
    0, 128_000, 9000), np.random.default_rng(1).zipf(1.2, 9000) % 64_000)


@pytest.mark.parametrize('numbers, vocab_size, told', [
    (CHARS.astype(np.uint8), 65, 'it seems to hold 8-bit numbers, not uint16: write it with'),
    (CHARS.astype(np.uint8), 50304, 'seems to hold text or 8-bit numbers, not uint16 token ids: write'),
    (TEXT, 50304, 'seems to hold text or 8-bit numbers'), (TEXT, 128, 'it seems to hold 8-bit numbers'),
    (BYTES.astype(np.uint8), 50304, 'it seems to hold 8-bit numbers'),
    (CHARS.astype(np.uint32), 65, '32-bit numbers, not raw uint16 tokens'),
    (GPT2_IDS.astype(np.uint32), 50304, '32-bit numbers, not raw uint16 tokens'),
    (BIG.astype(np.uint32), 50304, 'seems to hold 32-bit numbers'),
    (SKEWED.astype(np.uint16), 50304, 'prepared for another tokenizer'),
    (CHARS.astype(np.uint16), 60, 'prepared for another tokenizer'),
])
def test_numbers_of_another_width_are_refused_with_the_reason(numbers, vocab_size, told, tmp_path):
    numbers.tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match=told) as error:
        check_split(open_split(tmp_path, 'train'), 'train.bin', 8, vocab_size)
    assert '\n' not in str(error.value) and 'train.bin' in str(error.value)


@pytest.mark.parametrize('ids', [
    GPT2_IDS, CHARS, np.arange(3000), np.full(3000, 0x2020), np.zeros(3000), np.arange(3000) % 300,
    np.random.default_rng(1).integers(0, 512, 3000), np.random.default_rng(1).zipf(1.2, 9000) % 50257])
def test_tokens_of_any_kind_are_taken_for_what_they_are(ids):
    for size in (20, 64, 1000, len(ids)):
        check_split(ids[:size].astype(np.uint16), 'train.bin', 8, 50304)


# ---------------------------------------------------------------------------- dataset.json of other files

@pytest.fixture
def copied(tmp_path, capsys):
    """The usual tutorial: a data folder of ours, in which another script then writes its own files."""
    write_text_dataset(tmp_path, 'to be or not to be\n' * 50, 'char', 'a test')
    capsys.readouterr()
    return tmp_path


def test_other_script_s_files_beside_our_dataset_json_are_read_with_one_line(copied, capsys):
    for split, n in (('train', 2000), ('val', 300)):
        GPT2_IDS[:n].tofile(copied / f'{split}.bin')
    assert [len(open_split(copied, split)) for split in ('train', 'val')] == [2000, 300]
    fingerprint(copied, 'train', open_split(copied, 'train'))
    out = capsys.readouterr().out
    assert out.startswith(f'ignoring {copied / "dataset.json"}, which is not of the files beside it') \
        and out.count('\n') == 1
    assert read_info(copied) == {}


def test_file_of_the_same_length_is_read_if_it_is_newer(copied, capsys):
    np.zeros(95, np.uint16).tofile(copied / 'val.bin')
    assert len(fingerprint(copied, 'val', open_split(copied, 'val'))) == 64
    assert capsys.readouterr().out.startswith('ignoring the SHA-256 of val.bin in dataset.json')
    os.utime(copied / 'dataset.json')
    with pytest.raises(ValueError, match='SHA-256'):
        fingerprint(copied, 'val', open_split(copied, 'val'))


@pytest.mark.parametrize('is_newest', [True, False])
def test_single_other_file_is_known_by_its_age(is_newest, copied):
    (copied / 'train.bin').unlink()
    np.zeros(90, np.uint16).tofile(copied / 'val.bin')
    if is_newest:
        os.utime(copied / 'dataset.json')
        assert 'has 90 tokens, but dataset.json says 95' in refused(copied, 'val')
    else:
        assert len(open_split(copied, 'val')) == 90


def test_files_that_are_both_others_are_read_even_if_dataset_json_is_newer(copied, capsys):
    for split in ('train', 'val'):
        GPT2_IDS.tofile(copied / f'{split}.bin')
    os.utime(copied / 'dataset.json')
    assert len(open_split(copied, 'train')) == 3000 and capsys.readouterr().out.count('\n') == 1


@pytest.mark.parametrize('is_newest', [True, False])
def test_truncated_file_is_refused_as_before(is_newest, copied):
    os.truncate(copied / 'train.bin', 100)  # val.bin matches, so dataset.json belongs to both files
    if is_newest:
        os.utime(copied / 'dataset.json')
    assert refused(copied).endswith('dataset.json says 855: truncated, or written by another program. '
                                    'Prepare it again, or delete dataset.json')


def test_run_goes_on_with_other_files(copied, train):
    for split in ('train', 'val'):
        (copied / f'{split}.bin').write_bytes((copied / 'val.bin').read_bytes() * 2)
    log = train('--max_iters=1', data_dir=copied)['log']
    assert sorted(losses(log)) == [0, 1] and log.count('dataset.json') == 1


@pytest.mark.parametrize('text', [
    '{"tokens": {"train": "9"}}', '{"tokens": {"train": 1e400}}', '{"tokens": {"train": -1}}',
    '{"sha256": {"a": 1}}', '{"tokens": {"train": 1' + '0' * 30 + '}}',
    '{"tokens": {"train": 1' + '0' * 5000 + '}}', '[' * 100_000, '"x"', '{"tokens": null}',
    '{"tokens": []}', '{"source": 5}', '{"tokenizer": ["a"]}', '{"a": "' + 'x' * 2_000_000 + '"}',
    '{"tokens": {"train": NaN}}', '{"tokens": {"train": true, "train": {}}}'])
def test_hostile_dataset_json_is_one_line(text, copied):
    (copied / 'dataset.json').write_text(text)
    assert 'dataset.json is damaged; prepare the data again' in refused(copied)


def test_names_in_dataset_json_reach_no_other_file(copied):
    for name in ('secret_000.bin', '[_000.bin'):
        (copied / name).write_bytes(b'xx')
    info = {'tokens': {'train': 855, 'val': 95, '../**/*': 3, '[': 1, '': 5, 'secret': 9}}
    (copied / 'dataset.json').write_text(json.dumps(info))
    assert len(open_split(copied, 'train')) == 855
