"""Corpora of documents: from files of any format and the hub, with their own splits or none, resumed."""
# ruff: noqa: F811 (fixtures)

import multiprocessing
import os
import time

import numpy as np
import pytest
from preparing import prepare, read, refusal  # noqa: F401

from support.text.bpe import train_bpe
from support.text.corpus import prepare_corpus
from support.text.dataset import Dataset
from support.text.documents import Corpus

DOCUMENTS = [f'Document {i}' + ' and more' * (i % 7) + '<|endoftext|>\n' * (i % 50 == 3)
             for i in range(2500)]
END = 50256


@pytest.fixture
def corpus(bpe, prepare, monkeypatch, tmp_path):
    """`prepare`, with the caches of `datasets` in tmp_path."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))  # of a process of its own
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
        corpus('openwebtext', f'--source={tmp_path / "documents.parquet"}', f'--num_proc={threads}')
        found = read(corpus.data / 'documents')
        loaded = datasets.load_dataset('parquet', data_files=str(tmp_path / 'documents.parquet'))['train']
        splits = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        assert (found.train, found.val) == (plain(splits['train']['text']), plain(splits['test']['text']))
        assert found.train.count(END) == 2498 and found.info['tokenizer'] == 'gpt2'


def test_limit_column_share_and_name_are_those_asked_for(corpus, tmp_path):
    write_table(tmp_path / 'a.jsonl', DOCUMENTS, 'body')
    corpus('openwebtext', f'--source={tmp_path / "a.jsonl"}', '--text_column=body', '--name=mine',
           '--limit=200', '--val_fraction=0.25', '--tokenizer=gpt2')
    found = read(corpus.data / 'mine')
    texts = documents_of(found.train), documents_of(found.val)
    assert [*map(len, texts)] == [150, 50] and sorted(sum(texts, [])) == sorted(DOCUMENTS[:200])


def test_a_corpus_s_tokenizer_is_trained_on_its_training_part(corpus, tmp_path):
    write_table(tmp_path / 'a.jsonl', DOCUMENTS)
    source = 'openwebtext', f'--source={tmp_path / "a.jsonl"}'
    corpus(*source, '--tokenizer=bpe', '--vocab_size=265')
    found = read(corpus.data / 'a')
    own = found.tokenizer
    assert own.n_vocab == found.info['vocab_size'] == 265 and found.train.count(own.end) == 2498
    texts = documents_of(found.train, own.end, own.decode)
    assert {*texts} <= {*DOCUMENTS} and own.json == train_bpe(texts, 265).json
    corpus(*source, f'--tokenizer={corpus.data / "a"}', '--name=again')
    assert read(corpus.data / 'again').train == found.train


@pytest.mark.parametrize('kind', ['parquet', 'json', 'TXT'])
def test_documents_come_from_a_folder_of_files_of_any_format(kind, corpus, tmp_path):
    texts = {name: f'Document {name}:\n\nits text\n' for name in ('a', 'b/c', 'd')}
    for name, text in texts.items():
        path = tmp_path / f'documents/{name}.{kind}'
        write_table(path, [text])
        if kind == 'TXT':
            path.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    for name in ('.b.jsonl', 'c.csv'):
        (tmp_path / 'documents' / name).write_text('no document')
    corpus('openwebtext', f'--source={tmp_path / "documents"}', '--name=out')
    found = read(corpus.data / 'out')
    assert sorted(documents_of(found.train + found.val)) == [*texts.values()]


def test_rows_without_text_are_left_out_and_counted(corpus, tmp_path):
    write_table(tmp_path / 'a.parquet', [None, *DOCUMENTS[:9], None])
    for args in ([], ['--limit=11']):
        out = corpus('openwebtext', f'--source={tmp_path / "a.parquet"}', '--name=out', *args)
        found = read(corpus.data / 'out')
        assert sorted(documents_of(found.train + found.val)) == sorted(DOCUMENTS[:9])
        assert 'left out 2 of 11 rows: no text in column text' in out
    error = corpus.fails('openwebtext', f'--source={tmp_path / "a.parquet"}', '--name=new', '--strict=True')
    assert 'no text in column text in 2 of 11 rows' in error and '--strict=True' in error


@pytest.mark.parametrize('source, content, words', [
    ('a.jsonl', '{"body": "x"}\n' * 5, 'no column text'), ('a.jsonl', '{"text": \n', 'a.jsonl'),
    ('a.txt', 'one document', '1 documents'), ('a.csv', 'text\na\n', '.parquet, .jsonl'),
    ('nobody/nothing', None, '--source=PATH')])
def test_source_without_documents_is_refused_in_one_line(source, content, words, corpus):
    if content:
        (corpus.here / source).write_text(content)
    assert words in corpus.fails('openwebtext', f'--source={source}', '--name=out')


@pytest.mark.parametrize('is_changed', [False, True])
def test_killed_run_goes_on_where_it_was_if_the_text_is_the_same(is_changed, corpus, tmp_path, capsys):
    source, texts = tmp_path / 'a.jsonl', [f'{text} ' * 30 for text in DOCUMENTS * 4]
    write_table(source, texts)
    process = multiprocessing.get_context('spawn').Process(
        target=prepare_corpus, args=(tmp_path / 'out', Corpus(str(source))), kwargs={'num_proc': 1})
    process.start()
    while not [*tmp_path.glob('out/parts-*/train-*.bin')] and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 'train.bin is missing' in refusal(Dataset, tmp_path / 'out')
    if is_changed:
        texts[5] = 'Another text, of another length'
        write_table(source, texts)
    prepare_corpus(tmp_path / 'out', Corpus(str(source)))
    bar = capsys.readouterr().err.partition('train: ')[2]
    assert (int(bar.partition('%')[0]) > 0) == (not is_changed)
    found = read(tmp_path / 'out')
    assert sorted(documents_of(found.train) + documents_of(found.val)) == sorted(texts)
    assert len([*(tmp_path / 'out').glob('*.*')]) == 3


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
    for split, text in zip(('train', 'valid'), texts.values()):
        (tmp_path / 'copy' / name.format(split)).write_text(text, encoding='utf-8')
    corpus(dataset, f'--source={tmp_path / "copy"}')
    assert_has(corpus, dataset, documents)


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


def test_ready_files_are_taken_as_they_are(held, prepare):
    for _ in range(2):
        out = prepare('fineweb', f'--shards_from={held}', '--shards=2')
    names, folder = [*SHARDS][:3], prepare.data / 'fineweb'
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, 'prepare.py'])
    assert all((folder / name).read_bytes() == (held / name).read_bytes() for name in names)
    assert 'train has 8,003 tokens in 2 files' in out and len(Dataset(folder)['train']) == 8003


def test_ready_files_that_are_not_whole_or_not_alone_are_refused(held, prepare):
    args, other = ('fineweb', f'--shards_from={held}', '--shards=3'), prepare.data / 'fineweb/train.bin'
    other.write_bytes(b'ab')
    assert 'has train.bin, which is not among these files' in prepare.fails(*args)
    other.unlink()
    os.truncate(held / 'fineweb_train_000002.bin', 5000)
    assert '_000002.bin has 1,988 tokens, but 4,002 by its header' in prepare.fails(*args)
    (held / 'fineweb_train_000001.bin').unlink()
    assert '_000001.bin is missing' in prepare.fails(*args)
