"""From texts to token files: tokenizers, splits, what is replaced, and the scripts of one text each."""
# ruff: noqa: F811 (fixtures)

import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from preparing import CUT_OFF, META, ODD, SPEECH, files_below, prepare, read, refusal  # noqa: F401

from support.text.bpe import BPETokenizer, train_bpe
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer
from support.text.writing import write_dataset, write_tokens

SHAKESPEARE = os.environ.get('SHAKESPEARE', '')


def in_pieces(text, size=99_991):
    """A text in strings of odd sizes."""
    return [text[i:i + size] for i in range(0, len(text), size)]


# ---------------------------------------------------------------------------- token files

def test_tokens_are_written_as_raw_numbers_or_not_at_all(tmp_path):
    path = tmp_path / 'new folder' / 'train.bin'
    for dtype, largest in ((np.uint16, 65535), (np.uint32, 2**32 - 1)):
        write_tokens(path, [[1, 2], np.array([largest]), [], np.array([0], np.uint32)], dtype)
        assert path.read_bytes() == np.array([1, 2, largest, 0], dtype).tobytes()
    write_text_dataset(tmp_path, 'abc' * 100, 'char', 'first')
    before = files_below(tmp_path)
    for bad in (65536, -1, 2**40):
        told = refusal(write_dataset, tmp_path, {'train': [[3, bad]]}, GPT2Tokenizer(), 'second')
        assert f'token id {bad} doesn\'t fit into uint16' in told and files_below(tmp_path) == before


def test_dataset_json_and_meta_pkl_say_what_the_files_hold(tmp_path):
    write_text_dataset(tmp_path, 'a\naa' * 324 + 'é\naa', 'char', 'a test', val_fraction=0.25)
    found = read(tmp_path)
    assert found.info == Dataset(tmp_path).info == {
        'tokens': {'train': 975, 'val': 325}, 'largest_id': 2, 'dtype': 'uint16', 'vocab_size': 3,
        'tokenizer': 'char', 'source': 'a test', 'text': found.info['text'], 'how': 'char, val_fraction=0.25',
        'sha256': {
            f'{split}.bin': hashlib.sha256((tmp_path / f'{split}.bin').read_bytes()).hexdigest()
            for split in ('train', 'val')}}
    assert pickle.loads((tmp_path / 'meta.pkl').read_bytes()) == META  # as nanoGPT reads it
    text = ''.join(map(chr, [*range(0x4e00, 0x9fff), *range(0xac00, 0xd7a3), *range(0x20000, 0x2a6d6)]))
    write_text_dataset(tmp_path, text * 2, 'char', 'a test')
    found = read(tmp_path)
    assert found.text == text * 2 and found.info['dtype'] == 'uint32' and found.info['vocab_size'] > 65536


# ---------------------------------------------------------------------------- in pieces as in one

@pytest.mark.parametrize('kind', ['gpt2', 'ours', 'the library\'s'])
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(kind, bpe, tmp_path):
    parts = np.random.default_rng(0).permutation([*(ODD * 99), *ODD.split(' ') * 99])
    text = ''.join(parts.tolist()) + ODD * 5000
    name, whole = 'gpt2', GPT2Tokenizer()
    if kind != 'gpt2':
        changes = {} if kind == 'ours' else {'normalizer': {'type': 'NFC'}}  # which tiktoken doesn't know
        whole = BPETokenizer(json.dumps(json.loads(train_bpe([ODD], 500).json) | changes))
        name = tmp_path / 'tokenizer.json'
        name.write_text(whole.json, encoding='utf-8')
    write_text_dataset(tmp_path / 'out', in_pieces(text), str(name), 'a test', val_fraction=0.2)
    found, at = read(tmp_path / 'out'), int(len(text) * 0.8)
    assert len(text) > 1_900_000
    assert found.train == whole.encode_array(text[:at]).tolist()
    assert found.val == whole.encode_array(text[at:]).tolist()


@pytest.mark.parametrize('size', [1, 7, 5000])
def test_pieces_of_any_size_give_the_same_characters_and_byte_pairs(size, tmp_path):
    text, at = ODD * 9, int(len(ODD) * 9 * 0.7)
    for tokenizer in ('char', 'bpe'):
        write_text_dataset(tmp_path, in_pieces(text, size), tokenizer, 'a test', 0.3, vocab_size=400)
        assert read(tmp_path).texts == [text[:at], text[at:]]
    found = read(tmp_path)
    assert found.tokenizer.json == train_bpe([text[:at]], 400).json
    write_text_dataset(tmp_path, in_pieces('x' + text[1:], size), 'char', 'another')
    assert read(tmp_path).info['text'] != found.info['text']


def test_a_stretch_without_a_place_to_cut_is_cut_and_said_to_be(bpe, tmp_path, capsys):
    text = 'ab' * 1_200_000
    write_text_dataset(tmp_path, in_pieces(text), 'gpt2', 'a test')
    assert read(tmp_path).text == text
    assert 'without a place to cut them, beginning with \'ababab' in capsys.readouterr().out


# ---------------------------------------------------------------------------- tokenizers

@pytest.mark.parametrize('tokenizer', ['char', 'bpe', 'gpt2'])
def test_a_second_text_takes_the_vocabulary_of_the_first(tokenizer, prepare, bpe):
    for name, text in (('first', SPEECH + 'z'), ('second', SPEECH[::-1]), ('third', 'Où ' * 99)):
        (prepare.here / f'{name}.txt').write_text(text, encoding='utf-8')
    prepare('text', 'first.txt', f'--tokenizer={tokenizer}')
    same = f'--tokenizer={prepare.data / "my_text"}'
    prepare('text', 'second.txt', same, '--name=second')
    first, second = read(prepare.data / 'my_text'), read(prepare.data / 'second')
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict() and second.text == SPEECH[::-1] + '\n'
    if tokenizer == 'char':
        told = prepare.fails('text', 'third.txt', same, '--name=third')
        assert 'not in this model\'s vocabulary: \'O\' \'ù\'' in told


@pytest.mark.parametrize('args, words', [
    (['no.txt'], 'no.txt is missing'),
    (['notes.txt', '--tokenizer=words'], 'tokenizer=words is not one of char, gpt2, bpe, nor the path'),
    (['notes.txt', '--tokenizer=me/model'], 'me/model'),  # of the hub, which is out of reach
    (['notes.txt', '--tokenizer=../data/plain'], 'encode text: the meta.pkl of its data has no itos'),
    (['notes.txt', '--val_fraction=1.5'], 'val_fraction=1.5'), (['notes.txt', '--name=../up'], 'name=../up')])
def test_mistake_with_ones_own_text_is_one_line_and_nothing_is_written(args, words, prepare):
    (prepare.data / 'plain').mkdir()
    (prepare.data / 'plain/meta.pkl').write_bytes(pickle.dumps({'vocab_size': 9}))
    (prepare.here / 'notes.txt').write_text(SPEECH)
    assert words in prepare.fails('text', *args)


# ---------------------------------------------------------------------------- what was there before

def test_another_text_replaces_a_data_set_only_on_demand(prepare, bpe):
    prepare_text, folder = functools.partial(prepare, 'text', 'a.txt'), prepare.data / 'my_text'
    (prepare.here / 'a.txt').write_text(SPEECH)
    prepare_text()
    before = files_below(folder)
    assert 'my_text has this text already; its files are written again\n' in prepare_text()
    assert files_below(folder) == before
    (prepare.here / 'a.txt').write_text(SPEECH + 'more')
    for more in ('--tokenizer=char', '--tokenizer=bpe', '--val_fraction=0.5'):
        message = prepare.fails('text', 'a.txt', more)
        assert 'my_text has another data set, of a.txt (char, val_fraction=0.1): choose' in message
        assert '--overwrite=True' in message
    assert 'replacing the data set in ' in prepare_text('--overwrite=True', '--tokenizer=bpe')
    own = {'meta.pkl', 'tokenizer.json'}
    for tokenizer, files in (('char', {'meta.pkl'}), ('gpt2', set()), ('bpe', own)):
        prepare_text(f'--tokenizer={tokenizer}', '--overwrite=True')
        assert 'has this text already' in prepare_text(f'--tokenizer={tokenizer}')
        assert read(folder).text == SPEECH + 'more\n' and read(folder).info['tokenizer'] == tokenizer
        assert own & {p.name for p in folder.iterdir()} == files


def test_a_folder_of_ones_own_tokens_is_not_replaced(prepare):
    (prepare.data / 'mine').mkdir()
    np.arange(99, dtype=np.uint16).tofile(prepare.data / 'mine/train.bin')
    (prepare.here / 'a.txt').write_text(SPEECH)
    for args in (('text', 'a.txt'), ('openwebtext', '--source=a.txt')):
        assert 'mine has another data set: choose' in prepare.fails(*args, '--name=mine')


class Broken:
    """A text that can be read to its end once."""
    n_times = 0

    def __iter__(self):
        self.n_times += 1
        yield from (SPEECH[:1000], SPEECH[1000:]) if self.n_times == 1 else (SPEECH[:1000],)
        if self.n_times > 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
def test_interrupted_preparation_leaves_what_was_there(tokenizer, tmp_path):
    for expected in ([], ['dataset.json', 'meta.pkl', 'train.bin', 'val.bin']):
        before = files_below(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            write_text_dataset(tmp_path, Broken(), tokenizer, 'second', vocab_size=300)
        assert files_below(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == expected
        write_text_dataset(tmp_path, 'abc' * 100, 'char', 'first')
    broken = CharTokenizer({0: 'a'})
    broken.stoi = lambda: None  # can't be written to meta.pkl, which comes after the tokens
    with pytest.raises((pickle.PicklingError, AttributeError)):
        write_dataset(tmp_path, {'train': [[0]], 'val': [[0]]}, broken, 'second')
    assert 'broken off; prepare it again' in refusal(Dataset, tmp_path)


# ---------------------------------------------------------------------------- scripts

def test_every_script_runs_from_its_own_folder_and_by_a_relative_path(tmp_path):
    scripts = sorted(ROOT.glob('data/*/prepare.py'))
    assert len(scripts) >= 9
    for i, script in enumerate(scripts):
        folder, safe_path = (script.parent, tmp_path)[i % 2], ('', '1')[i // 2 % 2]
        done = subprocess.run([sys.executable, os.path.relpath(script, folder), '--help'], cwd=folder,
                              env=os.environ | {'PYTHONSAFEPATH': safe_path}, capture_output=True,
                              text=True, encoding='utf-8', timeout=60)
        assert done.returncode == 0 and 'Settings (--key=value)' in done.stdout, done.stderr


def test_missing_bpe_files_are_one_line_before_the_text_is_read(run_script, tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xff no text')
    done = run_script('data/text/prepare.py', tmp_path / 'a.txt', '--tokenizer=gpt2', ok=False,
                      env=CUT_OFF | {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'no')})
    assert 'FileNotFoundError: the GPT-2 BPE files' in done.stderr
    assert 'TIKTOKEN_CACHE_DIR' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('name, tokenizer, counts', [('shakespeare_char', 'char', (1_003_854, 111_540, 65)),
                                                     ('shakespeare', 'gpt2', (301_966, 36_059, 50257))])
def test_shakespeare_has_the_known_counts_and_may_be_a_text_of_ones_own(name, tokenizer, counts, bpe, prepare,
                                                                        monkeypatch):
    for variable, value in CUT_OFF.items():
        monkeypatch.setenv(variable, value)
    assert '--input=FILE' in prepare.fails(name) and 'no.txt' in prepare.fails(name, '--input=no.txt')
    (prepare.here / 'speech.txt').write_text(SPEECH)
    (prepare.data / name / 'input.txt').write_text(SPEECH[::-1])
    cut = len(SPEECH) * 9 // 10
    for args, text in (([], SPEECH[::-1]), (['--input=speech.txt'], SPEECH)):
        prepare(name, *args)
        found = read(prepare.data / name)
        assert found.texts == [text[:cut], text[cut:]] and found.info['tokenizer'] == tokenizer
    if not os.path.isfile(SHAKESPEARE):
        pytest.skip('SHAKESPEARE names no file')
    prepare(name, f'--input={SHAKESPEARE}')
    found = read(prepare.data / name)
    assert (len(found.train), len(found.val), found.info['vocab_size']) == counts


def test_standard_library_is_some_megabytes_of_ascii_and_the_same_every_time(prepare):
    prepare('stdlib_char')
    before = files_below(prepare.data / 'stdlib_char')
    prepare('stdlib_char')
    found = read(prepare.data / 'stdlib_char')
    assert files_below(prepare.data / 'stdlib_char') == before and isinstance(found.tokenizer, CharTokenizer)
    assert 5e6 < len(found.text) < 12e6 and abs(len(found.val) - len(found.train) / 9) < 1
    assert found.text.isascii() and '\r' not in found.text and 'import ' in found.text[:100_000]
