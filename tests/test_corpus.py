"""Corpora of documents: from files of any format and the hub, with their own splits or none, resumed."""
# ruff: noqa: F811 (fixtures)

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from preparing import prepare, read, refusal  # noqa: F401

from support.text.bpe import train_bpe
from support.text.corpus import prepare_corpus
from support.text.dataset import Dataset
from support.text.documents import Corpus, load_documents
from support.text.prepare import name_after

DOCUMENTS = [f'Document {i}' + ' and more' * (i % 7) + '<|endoftext|>\n' * (i % 50 == 3)
             for i in range(2500)]
END = 50256


@pytest.fixture
def corpus(bpe, prepare, monkeypatch, tmp_path):
    """`prepare`, with the caches of `datasets` in tmp_path."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    return prepare


def write_table(path, texts, column='text'):
    """A parquet or jsonl file with a row for each text."""
    import datasets
    table = datasets.Dataset.from_dict({'id': [*range(len(texts))], column: texts})
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path) if path.suffix == '.parquet' else table.to_json(path)


def documents_of(ids, end=END, decode=None):
    """Token ids cut at the ends of documents and decoded."""
    import tiktoken
    decode = decode or tiktoken.get_encoding('gpt2').decode
    assert ids[-1] == end
    ends = [-1, *(i for i, token in enumerate(ids) if token == end)]
    return [decode(ids[a + 1:b]) for a, b in zip(ends, ends[1:])]


def plain(texts):
    import tiktoken
    encode = tiktoken.get_encoding('gpt2').encode_ordinary
    return [token for text in texts for token in [*encode(text), END]]


# ---------------------------------------------------------------------------- documents

def test_openwebtext_equals_the_documented_procedure(corpus, tmp_path):
    import datasets
    write_table(tmp_path / 'documents.parquet', DOCUMENTS)
    for threads in (1, 3):
        out = corpus('openwebtext', f'--source={tmp_path / "documents.parquet"}', f'--num_proc={threads}')
        found = read(corpus.data / 'documents')
        loaded = datasets.load_dataset('parquet', data_files=str(tmp_path / 'documents.parquet'))['train']
        splits = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        assert (found.train, found.val) == (plain(splits['train']['text']), plain(splits['test']['text']))
        assert found.train.count(END) == 2498 and found.info['tokenizer'] == 'gpt2'
        n_characters = sum(map(len, splits['train']['text']))
        assert f'train has {len(found.train):,} tokens of {n_characters:,} characters' in out
        names = {p.name for p in (corpus.data / 'documents').iterdir()}
        assert names == {'dataset.json', 'train.bin', 'val.bin'}


@pytest.mark.parametrize('source, name', [
    ('stas/openwebtext-10k', 'openwebtext-10k'), ('a b/c.d', 'c.d'), ('x/my corpus/', 'my_corpus'),
    ('one.jsonl', 'one'), ('ONE.JSONL', 'ONE'), ('뉴스', '뉴스')])
def test_a_corpus_is_named_after_its_source(source, name):
    assert name_after(source) == name


def test_limit_column_share_and_name_are_those_asked_for(corpus, tmp_path):
    write_table(tmp_path / 'a.jsonl', DOCUMENTS, 'body')
    args = ('openwebtext', f'--source={tmp_path / "a.jsonl"}', '--text_column=body', '--name=mine',
            '--limit=200', '--val_fraction=0.25', '--tokenizer=gpt2')
    corpus(*args)
    found = read(corpus.data / 'mine')
    texts = documents_of(found.train), documents_of(found.val)
    assert [*map(len, texts)] == [150, 50] and sorted(sum(texts, [])) == sorted(DOCUMENTS[:200])
    corpus(*args)  # the same source may be written again
    told = corpus.fails('openwebtext', '--source=another.jsonl', '--name=mine')
    assert 'mine has another data set, of ' in told and 'choose another --name' in told
    assert 'val_fraction=1.0' in corpus.fails(*args[:2], '--val_fraction=1.0')
    assert 'name=a/b must be a plain folder name' in corpus.fails(*args[:2], '--name=a/b')


def test_a_corpus_s_tokenizer_is_trained_on_its_training_part(corpus, tmp_path):
    write_table(tmp_path / 'a.jsonl', DOCUMENTS)
    source = 'openwebtext', f'--source={tmp_path / "a.jsonl"}'
    out = corpus(*source, '--tokenizer=bpe', '--vocab_size=265')
    found = read(corpus.data / 'a')
    own = found.tokenizer
    assert own.n_vocab == found.info['vocab_size'] == 265 and found.train.count(own.end) == 2498
    texts = documents_of(found.train, own.end, own.decode)
    assert {*texts} <= {*DOCUMENTS} and own.json == train_bpe(texts, 265).json
    assert 'the tokenizer is trained on 2,498 of 2,498 documents\n' in out
    corpus(*source, f'--tokenizer={corpus.data / "a"}', '--name=again')
    assert read(corpus.data / 'again').train == found.train


@pytest.mark.parametrize('kind', ['parquet', 'json', 'txt', 'TXT', 'JSONL'])
def test_documents_come_from_a_folder_of_files_of_any_format(kind, corpus, tmp_path):
    texts = {name: f'Document {name}:\n\nits text\n' for name in ('a', 'b/c', 'd')}
    for name, text in texts.items():
        path = tmp_path / f'documents/{name}.{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == 'parquet':
            write_table(path, [text])
        elif kind.lower() == 'txt':
            path.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
        else:
            path.write_text(json.dumps({'text': text}) + '\n')
    for name in ('README', '.cache/a.txt', '.b.jsonl', 'c.csv'):
        (tmp_path / 'documents' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'documents' / name).write_text('no document')
    out = corpus('openwebtext', f'--source={tmp_path / "documents"}', '--name=out')
    found = read(corpus.data / 'out')
    assert sorted(documents_of(found.train + found.val)) == [*texts.values()]
    assert 'read 3 files, left out 2 hidden, 1 with the suffix .csv, 1 without a suffix\n' in out


def test_rows_without_text_are_left_out_and_counted(corpus, tmp_path):
    write_table(tmp_path / 'a.parquet', [None, *DOCUMENTS[:9], None])
    for args in ([], ['--limit=11']):
        out = corpus('openwebtext', f'--source={tmp_path / "a.parquet"}', '--name=out', *args)
        found = read(corpus.data / 'out')
        assert sorted(documents_of(found.train + found.val)) == sorted(DOCUMENTS[:9])
        assert 'left out 2 of 11 rows: no text in column text' in out
    error = corpus.fails('openwebtext', f'--source={tmp_path / "a.parquet"}', '--name=new', '--strict=True')
    assert 'no text in column text in 2 of 11 rows' in error and '--strict=True' in error


def test_limit_reads_no_more_than_it_takes_and_tells_texts_apart(corpus, tmp_path):
    def key(limit):
        return load_documents(Corpus(str(tmp_path / 'a.jsonl'), limit=limit))._fingerprint

    write_table(tmp_path / 'copy/a.jsonl', DOCUMENTS[:9])
    (tmp_path / 'copy/b.jsonl').write_text('{"text": \n')  # damaged
    documents = load_documents(Corpus(str(tmp_path / 'copy'), limit=5))
    assert documents['text'][:] == DOCUMENTS[:5]
    assert 'copy' in refusal(load_documents, Corpus(str(tmp_path / 'copy')))
    write_table(tmp_path / 'a.jsonl', DOCUMENTS[:9])
    first = [key(5), key(5), key(6)]
    write_table(tmp_path / 'a.jsonl', DOCUMENTS[1:9])
    assert first[0] == first[1] and len({*first, key(5)}) == 3


@pytest.mark.parametrize('source, column, words', [
    ('good.jsonl', 'body', ['no column body', 'text, id', '--text_column']),
    ('good.jsonl', 'id', ['int64 in column id']), ('none.jsonl', 'text', ['in column text']),
    ('damaged.jsonl', 'text', ['damaged.jsonl', '--source=PATH']),
    ('damaged.parquet', 'text', ['damaged.parquet', '--source=PATH']),
    ('empty.jsonl', 'text', ['empty.jsonl']), ('one.txt', 'text', ['1 documents', 'data/text/prepare.py']),
    ('table.csv', 'text', ['.parquet, .jsonl']), ('folder', 'text', ['.parquet, .jsonl']),
    ('.', 'text', ['mixes .jsonl, .parquet, .txt']),
    ('nothing.jsonl', 'text', ['nothing.jsonl doesn\'t exist']),
    ('no_folder/', 'text', ['no_folder/ doesn\'t exist']), ('nobody/nothing', 'text', ['--source=PATH'])])
def test_source_without_documents_is_refused_in_one_line(source, column, words, corpus):
    rows = ''.join(json.dumps({'text': t, 'id': i}) + '\n' for i, t in enumerate(DOCUMENTS[:5]))
    files = {'good.jsonl': rows, 'none.jsonl': '{"text": null}\n' * 3, 'damaged.jsonl': '{"text": \n',
             'damaged.parquet': 'PAR1', 'empty.jsonl': '', 'one.txt': 'one document',
             'table.csv': 'text\na\n'}
    for name, content in files.items():
        (corpus.here / name).write_text(content)
    (corpus.here / 'folder').mkdir()
    error = corpus.fails('openwebtext', f'--source={source}', f'--text_column={column}', '--name=out')
    assert all(word in error for word in words), error


KILLED = """
import sys
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
from support.text.bpe import train_bpe
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
prepare_corpus(sys.argv[3], Corpus(sys.argv[1]), num_proc=1)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='SIGKILL')
@pytest.mark.parametrize('is_changed', [False, True])
def test_killed_run_goes_on_where_it_was_if_the_text_is_the_same(is_changed, corpus, tmp_path, capsys):
    source, texts = tmp_path / 'a.jsonl', [f'{text} ' * 30 for text in DOCUMENTS * 4]
    write_table(source, texts)
    process = subprocess.Popen([sys.executable, '-c', KILLED, source, tmp_path / 'cache', tmp_path / 'out'],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*tmp_path.glob('out/parts-*/train-*.bin')] and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 'train.bin is missing' in refusal(Dataset, tmp_path / 'out')
    if is_changed:
        texts[5] = 'Another text, of another length'
        write_table(source, texts)
    prepare_corpus(tmp_path / 'out', Corpus(str(source)))
    bar = capsys.readouterr().err.partition('train: ')[2]
    assert (int(bar.partition('%')[0]) > 0) == (not is_changed)
    found = read(tmp_path / 'out')
    assert sorted(documents_of(found.train) + documents_of(found.val)) == sorted(texts)
    assert (tmp_path / 'out').exists() and len([*(tmp_path / 'out').glob('*.*')]) == 3


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


def assert_has(corpus, name, documents):
    found = read(corpus.data / name)
    assert (found.train, found.val) == (plain(documents['train']), plain(documents['validation']))


@pytest.mark.parametrize('dataset, names', [
    ('tinystories', ('data/train-0-of-1.parquet', 'data/validation-0-of-1.parquet')),
    ('tinystories', ('train.jsonl', 'valid.jsonl')), ('lambada', ('train/0.parquet', 'dev/0.parquet'))])
def test_folder_with_both_splits_equals_a_plain_tokenization(dataset, names, corpus, tmp_path):
    for name, texts in zip(names, STORIES.values()):
        write_table(tmp_path / 'copy' / name, texts)
    write_table(tmp_path / 'copy' / f'test{names[0][-8:]}', ['never seen'])
    corpus(dataset, f'--source={tmp_path / "copy"}')
    assert_has(corpus, dataset, STORIES)
    corpus(dataset, f'--source={tmp_path / "copy"}', '--limit=2', '--num_proc=2')
    assert_has(corpus, dataset, {split: texts[:2] for split, texts in STORIES.items()})


@pytest.mark.parametrize('dataset, name, texts, documents', [
    ('wikitext', 'wiki.{}.raw', {s: ''.join(lines) for s, lines in LINES.items()}, ARTICLES),
    ('ptb', 'ptb.{}.txt', {s: '\n'.join([*lines, '']) for s, lines in SENTENCES.items()}, NEWS),
    ('tinystories', '{}.txt', {s: '\n<|endoftext|>\n'.join(t) + '\n' for s, t in STORIES.items()}, STORIES)])
def test_lines_of_text_files_become_documents(dataset, name, texts, documents, corpus, tmp_path):
    (tmp_path / 'copy').mkdir()
    paths = [tmp_path / 'copy' / name.format(split) for split in ('train', 'valid')]
    for path, text in zip(paths, texts.values()):
        path.write_text(text, encoding='utf-8')
    corpus(dataset, f'--source={tmp_path / "copy"}')
    assert_has(corpus, dataset, documents)
    if dataset == 'tinystories':
        corpus(dataset, f'--source={paths[0]}')
        found = read(corpus.data / dataset)  # one file is cut at random
        assert sorted(documents_of(found.train + found.val)) == sorted(STORIES['train'])


# ---------------------------------------------------------------------------- the hub

@pytest.mark.parametrize('dataset, where, column, rows, documents', [
    ('tinystories', {'path': 'roneneldan/TinyStories'}, 'text', STORIES, STORIES),
    ('wikitext', {'path': 'Salesforce/wikitext', 'name': 'wikitext-103-raw-v1'}, 'text',
     {s: [t if t.strip() else '' for t in lines] for s, lines in LINES.items()}, ARTICLES),
    ('lambada', {'path': 'cimec/lambada'}, 'text', STORIES, STORIES),
    ('ptb', {'path': 'ptb-text-only/ptb_text_only', 'revision': 'refs/convert/parquet'}, 'sentence',
     SENTENCES, NEWS)])
def test_hub_is_asked_for_both_splits_and_local_files_are_named_where_it_is_out_of_reach(
        dataset, where, column, rows, documents, corpus, monkeypatch):
    import datasets
    told, asked = corpus.fails(dataset), []
    assert 'can\'t load' in told and '--source=PATH' in told

    def load_dataset(path, split, **how):
        asked.append({'path': path, **how})
        return datasets.Dataset.from_dict({column: rows[split]})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    corpus(dataset)
    assert asked == [where, where] and read(corpus.data / dataset).info['source'] == where['path']
    assert_has(corpus, dataset, documents)


@pytest.mark.parametrize('args, asked', [
    (['openwebtext', '--source=me/corpus', '--subset=small'], {'path': 'me/corpus', 'name': 'small'}),
    (['fineweb', '--name=corpus'], {'path': 'HuggingFaceFW/fineweb-edu', 'name': 'sample-10BT'})])
def test_hub_streams_what_a_limit_takes_of_a_subset(args, asked, corpus, monkeypatch, tmp_path):
    import datasets
    write_table(tmp_path / 'a.parquet', DOCUMENTS[:50])
    build, found = datasets.load_dataset_builder, []

    def load_dataset_builder(path, **how):
        found.append({'path': path, **how})
        return build('parquet', data_files=str(tmp_path / 'a.parquet'))

    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets, 'load_dataset_builder', load_dataset_builder)
    corpus(*args, '--limit=20')
    written = read(corpus.data / 'corpus')
    assert found == [asked]
    assert sorted(documents_of(written.train + written.val)) == sorted(DOCUMENTS[:20])


# ---------------------------------------------------------------------------- tokens that are ready

SHARDS = {'fineweb_val_000000.bin': 3000, **{f'fineweb_train_{i:06}.bin': 4000 + i for i in (1, 2, 3)}}


@pytest.fixture
def held(tmp_path):
    """A folder with files of tokens that have llm.c's header."""
    generator, folder = np.random.default_rng(0), tmp_path / 'held'
    folder.mkdir()
    for name, count in SHARDS.items():
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, count
        ids = generator.integers(0, 50257, count).astype(np.uint16)
        (folder / name).write_bytes(header.tobytes() + ids.tobytes())
    return folder


@pytest.mark.parametrize('where', ['folder', 'hub'])
def test_ready_files_are_taken_as_they_are(where, held, prepare, monkeypatch):
    import huggingface_hub
    wanted, source = [], 'me/shards' if where == 'hub' else held
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda source, repo_type, allow_patterns:
                        wanted.extend(allow_patterns) or str(held))
    for _ in range(2):
        out = prepare('fineweb', f'--shards_from={source}', '--shards=2')
    names, folder = [*SHARDS][:3], prepare.data / 'fineweb'
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, 'prepare.py'])
    assert all((folder / name).read_bytes() == (held / name).read_bytes() for name in names)
    assert 'train has 8,003 tokens in 2 files' in out and len(Dataset(folder)['train']) == 8003
    assert wanted[:3] == (['*_val_*.bin', '*_train_000001.bin', '*_train_000002.bin'] * (where == 'hub'))


def spoil(number, *header, size=None):
    """A function that writes another header, and cuts the file."""
    def write(held):
        path = held / [*SHARDS][number]
        numbers = np.fromfile(path, dtype=np.int32, count=256)
        numbers[:len(header)] = header
        path.write_bytes(numbers.tobytes() + path.read_bytes()[1024:size])
    return write


@pytest.mark.parametrize('how, words', [
    (spoil(2, 20240520, 1, 100_000_000), '_000002.bin has 4,002 tokens, but 100,000,000 by its header'),
    (spoil(0, size=5000), 'by its header'), (spoil(0, 20240520, 2), '20240520, 2'),
    (spoil(1, 0), '_000001.bin has no header'),
    (lambda held: (held / 'fineweb_train_000001.bin').unlink(), '_000001.bin is missing'),
    (lambda held: (held / 'fineweb_val_000000.bin').unlink(), '0 for validation'),
    (lambda held: (held / 'fineweb_train_000003.bin').unlink(), '2 training files and 1 for')])
def test_ready_file_whose_header_lies_is_one_line_and_nothing_is_written(how, words, held, prepare):
    how(held)
    assert words in prepare.fails('fineweb', f'--shards_from={held}', '--shards=3')


def test_ready_files_are_not_put_beside_others(held, prepare):
    (prepare.data / 'fineweb/train.bin').write_bytes(b'ab')
    told = prepare.fails('fineweb', f'--shards_from={held}', '--shards=3')
    assert 'has train.bin, which is not among these files' in told
    assert 'shards=-1 must be at least 0' in prepare.fails('fineweb', '--shards=-1')
