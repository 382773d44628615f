"""support/text/prepare.py; and the data/*/prepare.py, run in a copy of the repository from another folder."""

import hashlib
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import support.text.prepare as preparation
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset, write_tokens
from support.text.tokenizer import GPT2Tokenizer

META = {'vocab_size': 3, 'itos': {0: '\n', 1: 'a', 2: 'é'}, 'stoi': {'\n': 0, 'a': 1, 'é': 2}}
SHAKESPEARE = ROOT.parent / 'shared/data/tinyshakespeare/input.txt'
SPEECH = 'To be, or not to be, that is the question:\nWhether \'tis nobler in the mind to suffer\n' * 20
CLOSED = 'http://127.0.0.1:9'  # nothing listens at this port
CUT_OFF = {'http_proxy': CLOSED, 'https_proxy': CLOSED, 'no_proxy': '', 'NO_PROXY': ''}
with_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f'{SHAKESPEARE} is not there')


@pytest.fixture
def prepare(tmp_path):
    """Runs a prepare.py of the copy; prepare.data is the copy's data folder, prepare.here where it is run."""
    for path in [*ROOT.glob('*.py'), *(ROOT / 'data').rglob('*.py'), *(ROOT / 'support').rglob('*.py')]:
        copy = tmp_path / 'repository' / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)

    def run(dataset, *args, ok=True, **env):
        script = run.data / dataset / 'prepare.py'
        hugging_face = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path),
                        'HF_DATASETS_CACHE': str(tmp_path / 'hf')}
        done = subprocess.run([sys.executable, script, *map(str, args)], cwd=run.here, timeout=300,
                              env=os.environ | hugging_face | env, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, encoding='utf-8')
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    run.data, run.here = tmp_path / 'repository' / 'data', tmp_path / 'elsewhere'
    run.here.mkdir()
    return run


def read(folder):
    """A dataset's tokens as lists, and its dataset.json."""
    splits = [np.fromfile(folder / f'{split}.bin', dtype=np.uint16).tolist() for split in ('train', 'val')]
    return *splits, json.loads((folder / 'dataset.json').read_text(encoding='utf-8'))


def decode(folder):
    """A dataset's two texts."""
    *splits, info = read(folder)
    if info['tokenizer'] == 'bpe':
        return [Dataset(folder).tokenizer.decode(ids) for ids in splits]
    if info['tokenizer'] == 'char':
        itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
        return [''.join(itos[i] for i in ids) for ids in splits]
    import tiktoken
    return [tiktoken.get_encoding('gpt2').decode(ids) for ids in splits]


def assert_mistake(done, kind, *words):
    """What the user sees last is one line, and no traceback."""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f'{kind}: ') and 'Traceback' not in done.stderr, done.stderr
    for word in words:
        assert word in line


# ---------------------------------------------------------------------------- writing

def test_tokens_are_written_as_raw_uint16(tmp_path):
    path = tmp_path / 'new folder' / 'train.bin'
    result = write_tokens(path, [[1, 2], np.array([65535]), [], np.array([0], dtype=np.uint32)])
    assert path.read_bytes() == np.array([1, 2, 65535, 0], dtype=np.uint16).tobytes()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert result == {'tokens': 4, 'largest_id': 65535, 'sha256': digest}


@pytest.mark.parametrize('bad', [65536, -1, 2**40])
def test_token_that_does_not_fit_is_named_and_nothing_is_left(bad, tmp_path):
    with pytest.raises(ValueError, match=f'token id {bad} ') as error:
        write_tokens(tmp_path / 'train.bin', [[1, 2], [3, bad]])
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('interruption', [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file(interruption, tmp_path):
    def chunks():
        yield [7, 8]
        raise interruption

    write_tokens(tmp_path / 'train.bin', [[1, 2]])
    with pytest.raises(interruption):
        write_tokens(tmp_path / 'train.bin', chunks())
    assert [p.name for p in tmp_path.iterdir()] == ['train.bin']
    assert np.fromfile(tmp_path / 'train.bin', dtype=np.uint16).tolist() == [1, 2]


def test_sizes_are_told_in_tokens_bytes_and_characters(bpe, tmp_path, capsys):
    text = '한국어 글 ' * 100
    for tokenizer, told in (('char', '540 tokens of 540 characters (2.33 bytes, 1.00 characters a token)'),
                            ('gpt2', '1,170 tokens of 540 characters (1.08 bytes, 0.46 characters a token)')):
        write_text_dataset(tmp_path, text, tokenizer, 'a test')
        out = capsys.readouterr().out
        assert told in out and ('tokens a character of this text' in out) == (tokenizer == 'gpt2')
    assert 'GPT-2\'s encoding takes 2.17 tokens a character of this text; to train from scratch, --tok' in out
    write_text_dataset(tmp_path, 'in English, ' * 100, 'gpt2', 'a test')
    assert 'tokens a character of' not in capsys.readouterr().out


def test_dataset_json_tells_what_the_files_hold(tmp_path):
    write_text_dataset(tmp_path, 'hello world, ' * 100, 'char', 'a test', val_fraction=0.25)
    info = json.loads((tmp_path / 'dataset.json').read_text(encoding='utf-8'))
    splits = {split: np.fromfile(tmp_path / f'{split}.bin', dtype=np.uint16) for split in ('train', 'val')}
    assert info['tokens'] == {'train': len(splits['train']), 'val': len(splits['val'])}
    assert info['tokens'] == {'train': 975, 'val': 325}
    assert info['largest_id'] == max(ids.max() for ids in splits.values()) == info['vocab_size'] - 1
    assert (info['tokenizer'], info['source']) == ('char', 'a test')
    for name, digest in info['sha256'].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert set(info['sha256']) == {'train.bin', 'val.bin'} and Dataset(tmp_path).info == info


def test_meta_is_what_nanogpt_reads(tmp_path):
    write_text_dataset(tmp_path, 'é\naa' * 10, 'char', 'a test')
    assert pickle.loads((tmp_path / 'meta.pkl').read_bytes()) == META


def test_text_is_split_by_characters_with_its_end_for_validation(tmp_path):
    text = ''.join(chr(97 + i % 26) for i in range(1001))
    write_text_dataset(tmp_path, text, 'char', 'a test')
    data = Dataset(tmp_path)
    decode = data.tokenizer.decode
    assert decode(data['train'][:]) == text[:900] and decode(data['val'][:]) == text[900:]


def test_text_in_bpe_leaves_no_vocabulary_of_characters_behind(bpe, tmp_path):
    text = 'It was a bright cold day in April. ' * 20
    write_text_dataset(tmp_path, text, 'char', 'a test')
    write_text_dataset(tmp_path, text, 'gpt2', 'a test')
    data = Dataset(tmp_path)
    assert not (tmp_path / 'meta.pkl').exists() and data.info['tokenizer'] == 'gpt2'
    parts = [data.tokenizer.decode(data[split][:]) for split in ('train', 'val')]
    assert parts == [text[:630], text[630:]]


@pytest.mark.parametrize('text, arguments, message', [
    ('', {}, 'too few to split'), ('a', {}, 'too few to split'),
    ('abc', {'val_fraction': 0.0}, 'val_fraction=0'), ('abc', {'val_fraction': 1.5}, 'between 0 and 1'),
    ('abc', {'tokenizer': 'words'}, 'not one of char, gpt2'),
])
def test_text_that_can_not_be_split_is_refused_and_nothing_is_left(text, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        write_text_dataset(tmp_path, text, **({'tokenizer': 'char', 'source': 'a test'} | arguments))
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- from any folder

@pytest.mark.parametrize('safe_path', ['', '1'])  # 1: Python doesn't search the script's folder
def test_every_script_runs_from_its_own_folder_and_by_a_relative_path(safe_path, prepare):
    scripts = sorted(prepare.data.glob('*/prepare.py'))
    assert len(scripts) == len(list(ROOT.glob('data/*/prepare.py'))) >= 9
    for script in scripts:
        for folder in (script.parent, prepare.here):
            command = [sys.executable, os.path.relpath(script, folder), '--help']
            done = subprocess.run(command, cwd=folder, env=os.environ | {'PYTHONSAFEPATH': safe_path},
                                  capture_output=True, text=True, encoding='utf-8', timeout=60)
            assert done.returncode == 0 and 'Settings (--key=value)' in done.stdout, done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='symbolic links need rights on Windows')
def test_linked_repository_gets_its_data(prepare, tmp_path):
    (prepare.here / 'speech.txt').write_text(SPEECH, encoding='utf-8')
    (tmp_path / 'link').symlink_to(prepare.data.parent)
    command = [sys.executable, tmp_path / 'link/data/text/prepare.py', 'speech.txt']
    subprocess.run(command, cwd=prepare.here, check=True, timeout=60)
    assert ''.join(decode(prepare.data / 'my_text')) == SPEECH


# ---------------------------------------------------------------------------- Shakespeare

def test_shakespeare_char_takes_a_text_of_ones_own(prepare):
    (prepare.here / 'speech.txt').write_text(SPEECH, encoding='utf-8')
    out = prepare('shakespeare_char', '--input=speech.txt').stdout
    folder, cut = prepare.data / 'shakespeare_char', len(SPEECH) * 9 // 10
    assert decode(folder) == [SPEECH[:cut], SPEECH[cut:]]
    assert f'train has {cut:,} tokens' in out and f'val has {len(SPEECH) - cut:,} tokens' in out
    assert read(folder)[2]['source'] == 'speech.txt'
    assert list(prepare.here.iterdir()) == [prepare.here / 'speech.txt']


def test_shakespeare_takes_a_text_of_ones_own_in_bpe(bpe, prepare):
    (prepare.data / 'shakespeare' / 'input.txt').write_text(SPEECH, encoding='utf-8')
    prepare('shakespeare', **CUT_OFF)  # a file put there by hand needs no network
    folder, cut = prepare.data / 'shakespeare', len(SPEECH) * 9 // 10
    assert decode(folder) == [SPEECH[:cut], SPEECH[cut:]]
    assert not (folder / 'meta.pkl').exists() and read(folder)[2]['vocab_size'] == 50257


@with_shakespeare
def test_shakespeare_char_has_the_known_counts(prepare):
    prepare('shakespeare_char', f'--input={SHAKESPEARE}')
    train, val, info = read(prepare.data / 'shakespeare_char')
    assert (len(train), len(val), info['vocab_size']) == (1_003_854, 111_540, 65)
    assert set(train) == set(range(65))


@with_shakespeare
def test_shakespeare_has_the_known_counts(bpe, prepare):
    prepare('shakespeare', f'--input={SHAKESPEARE}')
    train, val, _ = read(prepare.data / 'shakespeare')
    assert (len(train), len(val)) == (301_966, 36_059)


@pytest.mark.parametrize('dataset', ['shakespeare', 'shakespeare_char'])
def test_failing_download_is_one_line_that_names_the_way_round(dataset, prepare):
    done = prepare(dataset, ok=False, **CUT_OFF)
    assert_mistake(done, 'FileNotFoundError', '--input=FILE', str(prepare.data / dataset / 'input.txt'))
    assert done.stderr.count('\n') == 1
    assert [p.name for p in (prepare.data / dataset).iterdir()] == ['prepare.py']


def test_missing_input_is_told_and_a_mistyped_setting_too(prepare):
    assert_mistake(prepare('shakespeare_char', '--input=no.txt', ok=False), 'FileNotFoundError', 'no.txt')
    assert_mistake(prepare('shakespeare_char', '--inptu=no.txt', ok=False), 'ValueError', 'inptu', 'input')


# ---------------------------------------------------------------------------- the standard library

def test_standard_library_is_some_megabytes_of_ascii_and_the_same_every_time(prepare):
    folder, digests = prepare.data / 'stdlib_char', []
    for _ in range(2):
        prepare('stdlib_char', **CUT_OFF)
        digests.append([hashlib.sha256((folder / name).read_bytes()).hexdigest()
                        for name in ('train.bin', 'val.bin', 'meta.pkl', 'dataset.json')])
    assert digests[0] == digests[1]
    train, val = (np.fromfile(folder / f'{split}.bin', dtype=np.uint16) for split in ('train', 'val'))
    assert 5e6 < len(train) + len(val) < 12e6 and abs(len(val) - len(train) / 9) < 1
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert ''.join(meta['itos'].values()).isascii() and '\r' not in meta['stoi']
    start = ''.join(meta['itos'][i] for i in train[:100_000].tolist())
    assert 'import ' in start and 'def ' in start


# ---------------------------------------------------------------------------- one's own text

@pytest.fixture
def texts(prepare):
    """Files and folders of text, and something that is no text."""
    files = {'notes.txt': 'first\n' * 30, 'books/b.md': 'third, no newline', 'letters/d.txt': 'fifth\n',
             'books/a.txt': '\ufeffé second\n', 'books/deep/c.txt': 'fourth\r\n'}
    for name, text in files.items():
        path = prepare.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (prepare.here / 'books' / 'picture.png').write_bytes(b'\x89PNG\r\n\x1a\n\0\0')
    (prepare.here / 'books' / 'zeros.txt').write_bytes(b'a\0b')
    (prepare.here / 'books' / '.git').mkdir()
    for name in ('.git/config', '.hidden.txt', 'letter.docx'):
        (prepare.here / 'books' / name).write_text('left out', encoding='utf-8')
    text = ''.join(files[n] for n in ('notes.txt', 'books/a.txt', 'books/b.md')) + '\nfourth\nfifth\n'
    return text.replace('\ufeff', '')


@pytest.mark.parametrize('tokenizer', ['char', 'gpt2', 'bpe'])
def test_files_and_folders_become_one_text_in_order(tokenizer, texts, prepare, request):
    if tokenizer == 'gpt2':
        request.getfixturevalue('bpe')
    out = prepare('text', 'notes.txt', 'books', 'letters/', '--name=library', f'--tokenizer={tokenizer}',
                  '--val_fraction=0.25').stdout
    folder, cut = prepare.data / 'library', int(len(texts) * 0.75)
    assert decode(folder) == [texts[:cut], texts[cut:]]
    assert (folder / 'meta.pkl').exists() == (tokenizer != 'gpt2')
    assert (folder / 'tokenizer.json').exists() == (tokenizer == 'bpe')
    assert ('read 5 files, left out 2 hidden, 1 not UTF-8 text, 1 with the suffix .docx, '
            '1 with the suffix .png\n') in out


def test_own_text_has_a_folder_by_default_and_a_tenth_for_validation(texts, prepare):
    prepare('text', prepare.here / 'notes.txt')
    assert decode(prepare.data / 'my_text') == ['first\n' * 27, 'first\n' * 3]
    prepare('text', prepare.here / 'notes.txt', '--name=2024')
    assert decode(prepare.data / '2024') == ['first\n' * 27, 'first\n' * 3]


@pytest.mark.parametrize('args, kind, words', [
    ([], 'ValueError', ['FILE_OR_FOLDER']),
    (['no.txt'], 'FileNotFoundError', ['no.txt is missing']),
    (['notes.txt', 'books/picture.png'], 'ValueError', ['picture.png']),
    (['empty'], 'ValueError', ['too few']),
    (['notes.txt', '--tokenizer=words'], 'ValueError', ['tokenizer=words', 'char', 'gpt2', 'bpe']),
    (['notes.txt', '--tokenizer=notes.txt'], 'ValueError', ['notes.txt is neither GPT-2\'s tokenizer']),
    (['notes.txt', '--tokenizer=letters'], 'ValueError', ['letters has no tokenizer.json']),
    (['notes.txt', '--tokenizer=bpe', '--vocab_size=65537'], 'ValueError', ['vocab_size=65537', '65536']),
    (['notes.txt', '--val_fraction=1.5'], 'ValueError', ['val_fraction=1.5']),
    (['notes.txt', '--name=../up'], 'ValueError', ['name=../up']),
    (['notes.txt', '--name=..'], 'ValueError', ['name=..']),
    (['notes.txt', '--name='], 'ValueError', ['name=']),
    (['notes.txt', '--nmae=x'], 'ValueError', ['nmae', 'name']),
])
def test_mistake_with_ones_own_text_is_one_line_and_nothing_is_written(args, kind, words, texts, prepare):
    (prepare.here / 'empty').mkdir()
    before = sorted(prepare.data.parent.rglob('*'))
    done = prepare('text', *args, ok=False)
    assert_mistake(done, kind, *words)
    assert done.stderr.count('\n') == 1
    assert [p for p in sorted(prepare.data.parent.rglob('*')) if '__pycache__' not in str(p)] == before


# ---------------------------------------------------------------------------- documents

DOCUMENTS = [f'Document {i}' + ' and more' * (i % 7) + '<|endoftext|>\n' * (i % 50 == 3) for i in range(2500)]


@pytest.fixture
def corpus(bpe, monkeypatch, tmp_path):
    """support/text/prepare.py, with the caches of `datasets` in tmp_path."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    return preparation


def documents_of(ids):
    """Token ids cut at 50256 and decoded."""
    import tiktoken
    assert ids[-1] == 50256
    ends = [-1, *(i for i, token in enumerate(ids) if token == 50256)]
    return [tiktoken.get_encoding('gpt2').decode(ids[a + 1:b]) for a, b in zip(ends, ends[1:])]


def test_openwebtext_equals_the_documented_procedure(bpe, prepare, tmp_path):
    import datasets
    import tiktoken
    datasets.Dataset.from_dict({'text': DOCUMENTS}).to_parquet(tmp_path / 'documents.parquet')
    prepare('openwebtext', f'--source={tmp_path / "documents.parquet"}', '--num_proc=1')
    train, val, info = read(prepare.data / 'documents')
    assert [p.name for p in (prepare.data / 'openwebtext').iterdir()] == ['prepare.py']

    loaded = datasets.load_dataset('parquet', data_files=str(tmp_path / 'documents.parquet'),
                                   cache_dir=str(tmp_path / 'cache'))['train']
    splits = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encode = tiktoken.get_encoding('gpt2').encode_ordinary
    assert train == [i for text in splits['train']['text'] for i in encode(text) + [50256]]
    assert val == [i for text in splits['test']['text'] for i in encode(text) + [50256]]
    assert train.count(50256) == 2498 and val.count(50256) == 2 and info['tokenizer'] == 'gpt2'
    assert sorted(p.name for p in (prepare.data / 'documents').iterdir()) == [
        'dataset.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('source, name', [
    ('stas/openwebtext-10k', 'openwebtext-10k'), ('a b/c.d', 'c.d'),
    ('x/my corpus/', 'my_corpus'), ('one.jsonl', 'one'), ('뉴스', '뉴스'),
])
def test_a_corpus_is_named_after_its_source(source, name):
    assert preparation.name_after(source) == name


def test_a_corpus_of_ones_own_gets_the_folder_and_the_share_that_are_asked_for(corpus, tmp_path, jsonl):
    for name in ('..', 'a/b'):
        with pytest.raises(ValueError, match='must be a plain folder name'):
            preparation.dataset_folder(tmp_path / 'data/openwebtext/prepare.py', name)
    folder = preparation.dataset_folder(tmp_path / 'data/openwebtext/prepare.py', 'mine')
    corpus.prepare_corpus(folder, jsonl, limit=200, val_fraction=0.25, num_proc=1)
    train, val, _ = read(tmp_path / 'data' / 'mine')
    assert (len(documents_of(train)), len(documents_of(val))) == (150, 50)
    with pytest.raises(ValueError, match='val_fraction=1'):
        corpus.prepare_corpus(folder, jsonl, val_fraction=1.0)


def test_a_corpus_s_tokenizer_is_trained_on_its_training_part(corpus, jsonl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, 'PART', 100)
    monkeypatch.setattr(corpus, 'SAMPLE', 5000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, 'write_dataset', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        corpus.prepare_corpus(tmp_path / 'out', jsonl, tokenizer='bpe', vocab_size=265)
    parts, = (tmp_path / 'out').glob('parts-*')
    trained = (parts / 'tokenizer.json').read_bytes()
    assert re.search(r'trained on 1\d\d of 2,498 documents', capsys.readouterr().out)
    monkeypatch.setattr(corpus, 'train_bpe', None)  # what was interrupted has its tokenizer already
    corpus.prepare_corpus(tmp_path / 'out', jsonl, tokenizer='bpe', vocab_size=265)
    own, (train, val, info) = Dataset(tmp_path / 'out').tokenizer, read(tmp_path / 'out')
    assert own.json.encode() == trained and own.n_vocab == info['vocab_size'] == 265 and not parts.exists()
    ends = [i for i, token in enumerate(train) if token == own.end]
    documents = [own.decode(train[a + 1:b]) for a, b in zip([-1, *ends], ends)]
    assert len(ends) == 2498 and val.count(own.end) == 2
    assert train[-1] == val[-1] == own.end and set(documents) <= set(DOCUMENTS)
    corpus.prepare_corpus(tmp_path / 'again', jsonl, tokenizer=str(tmp_path / 'out'))
    assert read(tmp_path / 'again')[:2] == (train, val)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / 'documents.jsonl'
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in DOCUMENTS))
    return str(path)


def test_threads_and_parts_do_not_change_the_files(corpus, jsonl, monkeypatch, tmp_path):
    for threads, part in ((1, 100_000), (3, 100), (2, 2499)):
        monkeypatch.setattr(corpus, 'PART', part)
        corpus.prepare_corpus(tmp_path / str(threads), jsonl, num_proc=threads)
    assert read(tmp_path / '1') == read(tmp_path / '2') == read(tmp_path / '3')


def count_documents(monkeypatch, fail_at=float('inf')):
    """A list that grows by every document encoded from now on; from the fail_at-th on it stops the run."""
    encoded, encode_array = [], GPT2Tokenizer.encode_array

    def encode(self, text):
        encoded.append(text)
        if len(encoded) >= fail_at:
            raise KeyboardInterrupt
        return encode_array(self, text)

    monkeypatch.setattr(GPT2Tokenizer, 'encode_array', encode)
    return encoded


def test_stopped_run_goes_on_where_it_was(corpus, jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, 'PART', 100)
    corpus.prepare_corpus(tmp_path / 'whole', jsonl, num_proc=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_documents(patch, fail_at=1050)
        corpus.prepare_corpus(tmp_path / 'stopped', jsonl, num_proc=1)
    assert not list((tmp_path / 'stopped').glob('*.*')) and not list(tmp_path.rglob('*.part'))
    encoded = count_documents(monkeypatch)
    corpus.prepare_corpus(tmp_path / 'stopped', jsonl, num_proc=1)
    assert len(encoded) == len(DOCUMENTS) - 1000  # ten parts were there
    assert read(tmp_path / 'stopped') == read(tmp_path / 'whole')
    assert len(list((tmp_path / 'stopped').iterdir())) == 3


@pytest.mark.parametrize('changed', [0, 1249, 2499])
def test_stopped_run_takes_nothing_from_a_text_that_was_changed_since(changed, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, 'PART', 100)
    path, texts = tmp_path / 'documents.jsonl', list(DOCUMENTS)
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_documents(patch, fail_at=2480)
        corpus.prepare_corpus(tmp_path / 'out', str(path), num_proc=1)
    texts[changed] = 'Another text, of another length'
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    corpus.prepare_corpus(tmp_path / 'out', str(path), num_proc=1)
    train, val, _ = read(tmp_path / 'out')
    assert sorted(documents_of(train) + documents_of(val)) == sorted(texts)


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', 'json', 'txt'])
def test_documents_come_from_a_folder_of_files_of_any_format(kind, corpus, tmp_path, capsys):
    import datasets
    folder, names = tmp_path / 'documents', ['a', 'b/c', 'd']
    documents = [f'Document {name}:\n\nits text\n' for name in names]
    for name, text in zip(names, documents):
        path = folder / f'{name}.{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == 'parquet':
            datasets.Dataset.from_dict({'text': [text]}).to_parquet(path)
        else:
            path.write_text(text if kind == 'txt' else json.dumps({'text': text}) + '\n', encoding='utf-8')
    (folder / 'README').write_text('no document')
    (folder / '.cache').mkdir()
    for name in ('.cache/a.txt', '.b.jsonl', 'c.csv'):
        (folder / name).write_text('no document')
    if kind == 'txt':
        (folder / 'a.txt').write_bytes(b'\xef\xbb\xbf' + documents[0].replace('\n', '\r\n').encode())
    corpus.prepare_corpus(tmp_path / 'out', str(folder), num_proc=1)
    train, val, _ = read(tmp_path / 'out')
    assert sorted(documents_of(train) + documents_of(val)) == documents
    told = 'read 3 files, left out 2 hidden, 1 with the suffix .csv, 1 without a suffix\n'
    assert told in capsys.readouterr().out


def test_limit_takes_the_first_documents_and_text_column_their_text(corpus, tmp_path):
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'id': i, 'body': t}) + '\n'
                                              for i, t in enumerate(DOCUMENTS)))
    corpus.prepare_corpus(tmp_path / 'out', str(tmp_path / 'a.jsonl'), text_column='body', limit=9)
    train, val, _ = read(tmp_path / 'out')
    texts = [t for ids in (train, val) for t in documents_of(ids)]
    assert sorted(texts) == sorted(DOCUMENTS[:9])

def test_limit_reads_no_more_than_it_takes(corpus, tmp_path):
    write_table(tmp_path / 'copy/a.jsonl', DOCUMENTS[:9])
    (tmp_path / 'copy/b.jsonl').write_text('{"text": \n')  # damaged
    documents = corpus.load_documents(str(tmp_path / 'copy'), 'text', limit=5)
    assert documents['text'][:] == DOCUMENTS[:5]
    with pytest.raises(ValueError, match='can.t load .*copy'):
        corpus.load_documents(str(tmp_path / 'copy'), 'text', limit=0)


def test_documents_of_a_limit_are_told_from_others(corpus, tmp_path):
    """So that a stopped preparation takes up its own parts, and no others."""
    def key(limit):
        return corpus.load_documents(str(tmp_path / 'a.jsonl'), 'text', limit)._fingerprint

    write_table(tmp_path / 'a.jsonl', DOCUMENTS[:9])
    first = [key(5), key(5), key(6)]
    write_table(tmp_path / 'a.jsonl', DOCUMENTS[1:9])
    assert first[0] == first[1] and len({*first, key(5)}) == 3


def test_hub_streams_what_a_limit_takes_of_a_subset(corpus, monkeypatch, tmp_path):
    import datasets
    write_table(tmp_path / 'a.parquet', DOCUMENTS[:50])
    build, asked = datasets.load_dataset_builder, []

    def load_dataset_builder(path, **how):
        asked.append({'path': path, **how})
        return build('parquet', data_files=str(tmp_path / 'a.parquet'))

    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets, 'load_dataset_builder', load_dataset_builder)
    corpus.prepare_corpus(tmp_path / 'out', 'me/corpus', limit=20, subset='small', num_proc=1)
    train, val, _ = read(tmp_path / 'out')
    assert asked == [{'path': 'me/corpus', 'name': 'small'}]
    assert sorted(documents_of(train) + documents_of(val)) == sorted(DOCUMENTS[:20])


def test_folder_of_several_formats_takes_no_metadata_for_a_document(corpus, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'Document {i}')
    (tmp_path / 'dataset_info.json').write_text('{"license": "MIT"}')
    try:
        documents = corpus.load_documents(str(tmp_path), 'text', 0)['text']
    except ValueError as error:
        assert 'json' in str(error) and '\n' not in str(error)
    else:
        assert list(documents) == ['Document 0', 'Document 1', 'Document 2']


def write_sources(folder):
    rows = [json.dumps({'text': t, 'id': i}) + '\n' for i, t in enumerate(DOCUMENTS[:5])]
    (folder / 'good.jsonl').write_text(''.join(rows))
    (folder / 'gaps.jsonl').write_text(''.join(rows) + '{"text": null, "id": 5}\n')
    (folder / 'damaged.jsonl').write_text('{"text": \n')
    (folder / 'damaged.parquet').write_text('PAR1')
    (folder / 'empty.jsonl').write_text('')
    (folder / 'one.txt').write_text('one document')
    (folder / 'table.csv').write_text('text\na\n')
    (folder / 'folder').mkdir()


@pytest.mark.parametrize('source, column, words', [
    ('good.jsonl', 'body', ['no column body', 'text, id', '--text_column']),
    ('good.jsonl', 'id', ['id']),
    ('gaps.jsonl', 'text', ['text']),
    ('damaged.jsonl', 'text', ['damaged.jsonl', '--source=PATH']),
    ('damaged.parquet', 'text', ['damaged.parquet', '--source=PATH']),
    ('empty.jsonl', 'text', ['empty.jsonl']),
    ('one.txt', 'text', ['1 documents', 'data/text/prepare.py']),
    ('table.csv', 'text', ['.parquet, .jsonl']),
    ('folder', 'text', ['.parquet, .jsonl']),
    ('nothing.jsonl', 'text', ['nothing.jsonl doesn\'t exist']),
    ('no_folder/', 'text', ['no_folder doesn\'t exist']),
])
def test_source_without_documents_is_refused_in_one_line(source, column, words, corpus, tmp_path):
    write_sources(tmp_path)
    with pytest.raises(ValueError) as error:
        corpus.prepare_corpus(tmp_path / 'out', str(tmp_path / source), text_column=column)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)
    assert not (tmp_path / 'out').exists() or list((tmp_path / 'out').iterdir()) == []


@pytest.mark.parametrize('args, words', [
    (['--source=nobody/nothing'], ['nobody/nothing', '--source=PATH']),
    (['--source=no_folder/'], ['no_folder/ doesn\'t exist']),
    (['--source=good.jsonl', '--text_column=body'], ['no column body', '--text_column']),
])
def test_mistake_with_documents_is_one_line_for_the_user(args, words, bpe, prepare):
    write_sources(prepare.here)
    assert_mistake(prepare('openwebtext', *args, ok=False, **CUT_OFF), 'ValueError', *words)
    assert [p.name for p in (prepare.data / 'openwebtext').iterdir()] == ['prepare.py']


def test_missing_bpe_files_are_one_line(prepare, tmp_path):
    (prepare.here / 'speech.txt').write_text(SPEECH)
    nowhere = CUT_OFF | {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'no')}
    done = prepare('shakespeare', '--input=speech.txt', ok=False, **nowhere)
    assert_mistake(done, 'FileNotFoundError', 'GPT-2 BPE', 'TIKTOKEN_CACHE_DIR')
    assert done.stderr.count('\n') == 1


# ---------------------------------------------------------------------------- splits of their own

STORIES = {'train': [f'Once there was a cat called {n}.\n\nIt slept.' for n in 'abcdefgh'] + ['The end.'],
           'validation': ['One day, Tim saw a <dog>.', 'A bird sang.']}
LINES = {'train': [' \n', ' = Ada Lovelace = \n', ' \n', ' Ada wrote notes on 1 @,@ 843 pages . \n',
                   ' = not a title = \n', ' \n', ' = = Life = = \n', ' \n', ' She lived in London . \n',
                   ' \n', ' = Zeno = \n', ' \n', ' Zeno never arrived . \n', ' \n'],
         'validation': [' \n', ' = Café = \n', ' \n', ' A place for coffee . \n', ' \n']}
ARTICLES = {'train': [''.join(LINES['train'][:10]), ''.join(LINES['train'][10:])],
            'validation': [''.join(LINES['validation'])]}
SENTENCES = {'train': [' no it was n\'t black monday ', ' mr. <unk> is chairman of N firms '],
             'validation': [' consumers may want to move ']}
NEWS = {'train': ['no it was n\'t black monday\nmr. <unk> is chairman of N firms\n'],
        'validation': ['consumers may want to move\n']}


def plain(texts):
    import tiktoken
    encode = tiktoken.get_encoding('gpt2').encode_ordinary
    return [token for text in texts for token in [*encode(text), 50256]]


def write_table(path, rows, column='text'):
    import datasets
    table = datasets.Dataset.from_dict({'id': list(range(len(rows))), column: rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        table.to_parquet(path)
    else:
        table.to_json(path)


@pytest.fixture
def prepare_here(corpus, prepare, monkeypatch):
    """`prepare`, in this process: gives train.bin, val.bin and dataset.json."""
    def run(dataset, *args):
        script = prepare.data / dataset / 'prepare.py'
        hook, path = sys.excepthook, list(sys.path)
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        try:
            runpy.run_path(str(script), run_name='__main__')
        finally:
            sys.excepthook, sys.path[:] = hook, path
        assert sorted(p.name for p in script.parent.iterdir()) == [
            'dataset.json', 'prepare.py', 'train.bin', 'val.bin']
        return read(script.parent)
    return run


@pytest.mark.parametrize('names', [('data/train-0-of-1.parquet', 'data/validation-0-of-1.parquet'),
                                   ('train.jsonl', 'valid.jsonl'), ('train/0.parquet', 'dev/0.parquet')])
@pytest.mark.parametrize('dataset', ['tinystories', 'lambada'])
def test_folder_with_both_splits_equals_a_plain_tokenization(dataset, names, prepare_here, tmp_path):
    for name, texts in zip(names, STORIES.values()):
        write_table(tmp_path / 'copy' / name, texts)
    write_table(tmp_path / 'copy' / f'test{names[0][-8:]}', ['never seen'])
    train, val, info = prepare_here(dataset, f'--source={tmp_path / "copy"}')
    assert (train, val) == (plain(STORIES['train']), plain(STORIES['validation']))
    assert info['tokens'] == {'train': len(train), 'val': len(val)} and info['tokenizer'] == 'gpt2'
    assert prepare_here(dataset, f'--source={tmp_path / "copy"}', '--limit=2', '--num_proc=2')[:2] == (
        plain(STORIES['train'][:2]), plain(STORIES['validation'][:2]))


def test_stories_of_a_text_file_are_those_between_its_separators(prepare_here, tmp_path):
    for name, texts in zip(('train', 'valid'), STORIES.values()):
        (tmp_path / f'TinyStories-{name}.txt').write_text('\n<|endoftext|>\n'.join(texts) + '\n')
    train, val, _ = prepare_here('tinystories', f'--source={tmp_path}')
    assert (train, val) == (plain(STORIES['train']), plain(STORIES['validation']))
    train, val, _ = prepare_here('tinystories', f'--source={tmp_path / "TinyStories-train.txt"}')
    assert sorted(documents_of(train + val)) == sorted(STORIES['train'])  # one file is cut at random


def test_articles_are_the_same_from_the_hub_s_rows_and_from_the_raw_files(prepare_here, tmp_path):
    for name, lines in zip(('train', 'valid', 'test'), [*LINES.values(), [' = T = \n']]):
        write_table(tmp_path / f'hub/{name}.parquet', [line if line.strip() else '' for line in lines])
        (tmp_path / f'wiki.{name}.raw').write_text(''.join(lines), encoding='utf-8')
    rows = prepare_here('wikitext', f'--source={tmp_path / "hub"}')
    (tmp_path / 'hub').rename(tmp_path.parent / f'{tmp_path.name}-hub')  # a folder has files of one kind
    raw = prepare_here('wikitext', f'--source={tmp_path}')
    assert rows[:2] == raw[:2] == (plain(ARTICLES['train']), plain(ARTICLES['validation']))
    assert ''.join(documents_of(raw[0])) == ''.join(LINES['train'])


def test_sentences_are_one_text_from_the_hub_s_rows_and_from_text_files(prepare_here, tmp_path):
    for name, sentences in zip(('train', 'valid'), SENTENCES.values()):
        write_table(tmp_path / f'hub/{name}.parquet', [s.strip() for s in sentences], 'sentence')
        path = tmp_path / f'simple-examples/ptb.{name}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text(''.join(s + '\n' for s in sentences))
    rows = prepare_here('ptb', f'--source={tmp_path / "hub"}')
    text = prepare_here('ptb', f'--source={tmp_path / "simple-examples"}')
    assert rows[:2] == text[:2] == (plain(NEWS['train']), plain(NEWS['validation']))


@pytest.mark.parametrize('dataset, where, column, rows, documents', [
    ('tinystories', {'path': 'roneneldan/TinyStories'}, 'text', STORIES, STORIES),
    ('wikitext', {'path': 'Salesforce/wikitext', 'name': 'wikitext-103-raw-v1'}, 'text', LINES, ARTICLES),
    ('lambada', {'path': 'cimec/lambada'}, 'text', STORIES, STORIES),
    ('ptb', {'path': 'ptb-text-only/ptb_text_only', 'revision': 'refs/convert/parquet'}, 'sentence',
     SENTENCES, NEWS),
])
def test_hub_is_asked_for_both_splits(dataset, where, column, rows, documents, prepare_here, monkeypatch):
    import datasets
    asked = []

    def load_dataset(path, split, **how):
        asked.append({'path': path, **how})
        return datasets.Dataset.from_dict({column: rows[split]})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    train, val, info = prepare_here(dataset)
    assert asked == [where, where] and info['source'] == where['path']
    assert (train, val) == (plain(documents['train']), plain(documents['validation']))


def test_fineweb_takes_a_subset_of_the_hub_s(prepare_here, monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, **how: asked.append({'path': path, **how})
                        or datasets.Dataset.from_dict({'text': DOCUMENTS[:30], 'id': [*range(30)]}))
    train, val, _ = prepare_here('fineweb')
    assert asked == [{'path': 'HuggingFaceFW/fineweb-edu', 'name': 'sample-10BT', 'split': 'train'}]
    assert sorted(documents_of(train) + documents_of(val)) == sorted(DOCUMENTS[:30])


@pytest.mark.parametrize('dataset', ['tinystories', 'wikitext', 'lambada', 'ptb'])
def test_corpus_out_of_reach_is_one_line_that_names_local_files(dataset, bpe, prepare):
    assert_mistake(prepare(dataset, ok=False, **CUT_OFF), 'ValueError', 'can\'t load', '--source=PATH')


# ---------------------------------------------------------------------------- tokens that are ready

SHARDS = {'fineweb_val_000000.bin': 3000, **{f'fineweb_train_{i:06}.bin': 4000 + i for i in (1, 2, 3)}}


@pytest.fixture
def take_shards(tmp_path, prepare, monkeypatch):
    """Runs data/fineweb/prepare.py in this process on the files in .held; .folder has the result."""
    def run(*args, source=tmp_path / 'held'):
        script = run.folder / 'prepare.py'
        hook, path = sys.excepthook, list(sys.path)
        monkeypatch.setattr(sys, 'argv', [str(script), f'--shards_from={source}', *args])
        try:
            runpy.run_path(str(script), run_name='__main__')
        finally:
            sys.excepthook, sys.path[:] = hook, path

    run.folder, run.held = prepare.data / 'fineweb', tmp_path / 'held'
    run.held.mkdir()
    generator = np.random.default_rng(0)
    for name, count in SHARDS.items():
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, count
        ids = generator.integers(0, 50257, count).astype(np.uint16)
        (run.held / name).write_bytes(header.tobytes() + ids.tobytes())
    return run


@pytest.mark.parametrize('where', ['folder', 'hub'])
def test_ready_files_are_taken_as_they_are(where, take_shards, capsys, monkeypatch):
    import huggingface_hub
    wanted = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda source, repo_type, allow_patterns:
                        wanted.extend(allow_patterns) or str(take_shards.held))
    for _ in range(2):
        take_shards('--shards=2', **({'source': 'me/shards'} if where == 'hub' else {}))
    names = ['fineweb_train_000001.bin', 'fineweb_train_000002.bin', 'fineweb_val_000000.bin']
    assert sorted(p.name for p in take_shards.folder.iterdir()) == [*names, 'prepare.py']
    for name in names:
        assert (take_shards.folder / name).read_bytes() == (take_shards.held / name).read_bytes()
    assert 'train has 8,003 tokens in 2 files' in capsys.readouterr().out
    assert len(Dataset(take_shards.folder)['train']) == 8003
    assert wanted[:3] == (['*_val_*.bin', '*_train_000001.bin', '*_train_000002.bin'] * (where == 'hub'))


def spoil(path, *numbers, size=None):
    header = np.fromfile(path, dtype=np.int32, count=256)
    header[:len(numbers)] = numbers
    path.write_bytes(header.tobytes() + path.read_bytes()[1024:size])


@pytest.mark.parametrize('how, words', [
    (lambda folder: spoil(folder / 'fineweb_train_000002.bin', 20240520, 1, 100_000_000),
     ['_000002.bin has 4,002 tokens, but 100,000,000 by its header']),
    (lambda folder: spoil(folder / 'fineweb_val_000000.bin', size=5000), ['val_000000.bin', 'by its header']),
    (lambda folder: spoil(folder / 'fineweb_val_000000.bin', 20240520, 2), ['20240520, 2']),
    (lambda folder: spoil(folder / 'fineweb_train_000001.bin', 0), ['_000001.bin has no header']),
    (lambda folder: (folder / 'fineweb_train_000001.bin').unlink(), ['_000001.bin is missing']),
    (lambda folder: (folder / 'fineweb_val_000000.bin').unlink(), ['0 for validation']),
    (lambda folder: (folder / 'fineweb_train_000003.bin').unlink(), ['2 training files', '--shards=3']),
])
def test_ready_file_whose_header_lies_is_one_line_and_nothing_is_written(how, words, take_shards):
    how(take_shards.held)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        take_shards('--shards=3')
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)
    assert [p.name for p in take_shards.folder.iterdir()] == ['prepare.py']


def test_ready_files_are_not_put_beside_others(take_shards):
    (take_shards.folder / 'train.bin').write_bytes(b'ab')
    with pytest.raises(ValueError, match='has train.bin, which is not among these files'):
        take_shards('--shards=3')
    assert len(list(take_shards.folder.iterdir())) == 2
    with pytest.raises(ValueError, match='shards=-1 must be at least 0'):
        take_shards('--shards=-1')


@pytest.mark.skipif(sys.platform == 'win32', reason='SIGKILL')
def test_killed_preparation_never_opens_as_another_tokenizer_s(tmp_path):
    import soak
    assert soak.kill_prepare(tmp_path, None, 3)[1] == []


def test_failing_preparation_leaves_the_data_that_was_there(tmp_path):
    write_text_dataset(tmp_path, 'abc' * 100, 'char', 'first')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def chunks():
        yield [0]
        raise RuntimeError('killed')

    with pytest.raises(RuntimeError):
        preparation.write_dataset(tmp_path, {'train': [[1]], 'val': chunks()}, GPT2Tokenizer(), 'second')
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_character_data_without_its_characters_is_not_opened_as_gpt2_s(tmp_path):
    write_text_dataset(tmp_path, 'abc' * 100, 'char', 'test')
    (tmp_path / 'meta.pkl').unlink()
    with pytest.raises(ValueError, match='meta.pkl is missing, but dataset.json says'):
        Dataset(tmp_path)
