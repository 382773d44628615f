"""Text as it lies on disks: formats, encodings, folders, and what is left out of them."""
# ruff: noqa: F811 (fixtures)

import bz2
import codecs
import gzip
import json
import lzma
import os

import pyarrow
import pytest
from preparing import prepare, read, refusal  # noqa: F401
from pyarrow import parquet

from support.text.formats import Reading
from support.text.prepare import write_text_dataset
from support.text.reading import TextFiles

SPEECH = 'To be, or not to be: é, 한국어, 🙂.\n' * 30
ROWS = [{'id': 1, 'body': 'First, "quoted"\nand long'}, {'id': 2, 'body': 'naïve 한국어\n'}]
BAD_ROWS = [{'id': 3, 'body': None}, {'id': 4}, {'id': 5, 'body': '  '}]
OF_ROWS = 'First, "quoted"\nand long\nnaïve 한국어\n'


def text_of(*paths, **how):
    return ''.join(TextFiles(paths, Reading(**how)))


def write_table(path, rows=ROWS):
    """A file with rows, in the format of its suffix."""
    if path.suffix == '.parquet':
        columns = {'id': [row['id'] for row in rows], 'body': [row.get('body') for row in rows]}
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix in ('.csv', '.tsv'):
        separator = {'.csv': ',', '.tsv': '\t'}[path.suffix]
        quoted = ('"' + (row.get('body') or '').replace('"', '""') + '"' for row in rows)
        lines = (f'{row["id"]}{separator}{body}' for row, body in zip(rows, quoted))
        path.write_text('\n'.join((f'id{separator}body', *lines)), encoding='utf-8')
    else:
        path.write_text('\n\n'.join(map(json.dumps, rows)), encoding='utf-8')


def zstd(data):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, 'zstd') as file:
        file.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress, '.bz2': bz2.compress, '.ZST': zstd}


# ---------------------------------------------------------------------------- one file

@pytest.mark.parametrize('compression', COMPRESS)
@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.CSV', '.tsv'])
def test_compressed_files_give_the_text_of_the_others(suffix, compression, tmp_path):
    plain, path = tmp_path / f'plain{suffix.lower()}', tmp_path / f'FILE{suffix}{compression}'
    if suffix == '.txt':
        plain.write_text(SPEECH, encoding='utf-8')
    else:
        write_table(plain)
    path.write_bytes(COMPRESS[compression](plain.read_bytes()))
    assert text_of(path, text_column='body') == (SPEECH if suffix == '.txt' else OF_ROWS)
    assert text_of(path) == text_of(plain)  # without a column, rows are plain text


@pytest.mark.parametrize('mark, encoding, how', [
    (codecs.BOM_UTF8, 'utf-8', {}), (codecs.BOM_UTF16_LE, 'utf-16-le', {}),
    (codecs.BOM_UTF16_BE, 'utf-16-be', {'encoding': 'latin-1'}),
    (codecs.BOM_UTF32_LE, 'utf-32-le', {}), (b'', 'utf-16-le', {'encoding': 'utf-16-le'}),
    (b'', 'gb18030', {'encoding': 'GB18030'})])
def test_encoding_is_that_of_the_mark_else_the_one_named(mark, encoding, how, tmp_path):
    (tmp_path / 'a.txt').write_bytes(mark + SPEECH.replace('\n', '\r\n').encode(encoding))
    assert text_of(tmp_path / 'a.txt', **how) == SPEECH


@pytest.mark.parametrize('shift', range(11))
def test_edges_of_pieces_cut_neither_characters_nor_line_ends(shift, tmp_path):
    text = 'x' * shift + 'é한🙂\r\n' * 400_000 + '\r'  # each of its 11 bytes lies at an edge once
    (tmp_path / 'a.txt').write_bytes(codecs.BOM_UTF8 * (shift % 2) + text.encode())
    assert text_of(tmp_path / 'a.txt') == text.replace('\r\n', '\n') + '\n'


@pytest.mark.parametrize('name, place', [('a.parquet', 'row 1'), ('a.csv', 'line 2'), ('a.jsonl', 'line 1')])
def test_rows_without_text_are_left_out_counted_and_refused_if_strict(name, place, tmp_path, capsys):
    write_table(tmp_path / name, BAD_ROWS[:1] + ROWS + BAD_ROWS[1:])
    assert text_of(tmp_path / name, text_column='body') == OF_ROWS
    assert (f'left out 3 rows: no text in column body (3, the first: {tmp_path / name}, {place}). '
            '--strict=True refuses them\n') in capsys.readouterr().out
    strict = refusal(text_of, tmp_path / name, text_column='body', strict=True)
    assert strict.startswith(f'{tmp_path / name}, {place}: no text in column body. Without --strict')


def test_halves_of_surrogate_pairs_and_lines_that_are_no_json_do_no_harm(tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text('{"t": "a\\ud83d\\r\\nb"}\n{"t": \n' + '[' * 100_000)
    assert text_of(tmp_path / 'a.jsonl', text_column='t') == 'a\ufffd\nb\n'
    assert 'left out 2 rows: no JSON (2, the first: ' in capsys.readouterr().out


def cut(compress):
    """A writer of a file that lacks its last bytes."""
    return lambda path: path.write_bytes(compress(SPEECH.encode() * 99)[:-9])


def of(content):
    """A writer of a file with this content."""
    content = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize('name, write, args, words', [
    ('a.txt.gz', cut(gzip.compress), [], 'can\'t be read (EOFError'),
    ('a.jsonl.xz', cut(lzma.compress), [], 'can\'t be read (EOFError'),
    ('a.txt.zst', cut(zstd), [], 'can\'t be read (OSError: Truncated'),
    ('a.gz', of(SPEECH), [], 'can\'t be read (BadGzipFile'),
    ('a.parquet', of('PAR1'), ['--text_column=body'], 'a.parquet can\'t be read (Parquet'),
    ('a.parquet', write_table, [], 'has the columns id, body: name that of'),
    ('a.parquet', write_table, ['--text_column=id'], 'int64 in column id, not text'),
    ('a.parquet', write_table, ['--text_column=x'], 'no column x, only id, body'),
    ('a.csv', write_table, ['--text_column=x'], 'no column x, only id, body'),
    ('a.jsonl', write_table, ['--text_column=x'], 'no column x, only id, body'),
    ('a.jsonl', write_table, ['--text_column=id'], 'no row with text in column id'),
    ('a.jsonl', lambda p: write_table(p, ROWS + BAD_ROWS), ['--text_column=body', '--strict=True'],
     'a.jsonl, line 5: no text in column body'),
    ('a.json', of(json.dumps(ROWS)), ['--text_column=body'], 'is a JSON list'),
    ('a.pdf', of(SPEECH), [], 'export its text first'),
    ('a.txt', of(b'%PDF-1.7 \xff'), [], 'it is a PDF, export its text first'),
    ('a.txt', of(b'a' * 9 + b'\xe9b'), [], 'UTF-8 text (invalid continuation byte at byte 9)'),
    ('a.txt', of(b'a' * 5_000_000 + b'\xed'), [], 'end of data at byte 5,000,000'),
    ('a.txt', of(b'a\0b'), [], 'zero bytes. save it as UTF-8, or name its encoding'),
    ('a.txt', of('a b'), ['--encoding=klingon'], 'encoding=klingon is no encoding'),
    ('a.txt', of('a b'), ['--encoding=hex'], 'encoding=hex is no encoding'),
    ('a.txt', of('a b'), ['--val=no.txt'], 'no.txt is missing'),
    ('a.txt', of('a b'), ['--val=empty'], 'empty has no files of text')])
def test_bad_input_is_one_line_and_nothing_is_written(name, write, args, words, prepare):
    (prepare.here / 'empty').mkdir()
    write(prepare.here / name)
    assert words in prepare.fails('text', name, *args)


@pytest.mark.parametrize('change', [
    of(SPEECH * 2), of(b'\xff no text'), os.utime,
    lambda path: path.replace(path.with_name('b')) and path.write_text(SPEECH, encoding='utf-8')])
def test_file_that_changes_while_it_is_read_or_between_is_refused(change, tmp_path):
    path, told = tmp_path / 'a.txt', 'a.txt was changed while it was read'
    path.write_text(SPEECH, encoding='utf-8')
    text = TextFiles([path])
    assert ''.join(text) == ''.join(text)
    change(path)
    assert told in refusal(write_text_dataset, tmp_path / 'data', text, 'char', 'a test')
    assert not (tmp_path / 'data').exists()
    path.write_text('a line\n' * 500_000)
    pieces = iter(TextFiles([path]))
    next(pieces)
    with open(path, 'a') as log:
        log.write('one more line\n')
    assert told in refusal(list, pieces)


# ---------------------------------------------------------------------------- folders

FILES = {'notes.txt': 'first\n' * 30, 'books/a.txt': '\ufeffé second\n', 'books/B.MD': 'third\r\nline',
         'books/a/z.txt': 'in a\n', 'books/deep/c': 'fourth', 'letters/d.txt': 'fifth\n',
         'books/zeros.txt': b'a\0b', 'books/picture.png': b'\x89PNG\r\n\x1a\n\0', 'books/.git/config': b'x',
         'books/.hidden.txt': b'x', 'books/letter.docx': b'x', 'books/large.txt': b'a' * 5_000_000 + b'\xff'}
LIBRARY = 'first\n' * 30 + 'third\nline\nin a\né second\nfourth\nfifth\n'


@pytest.fixture
def library(prepare):
    for name, content in FILES.items():
        (prepare.here / name).parent.mkdir(parents=True, exist_ok=True)
        of(content)(prepare.here / name)
    return prepare


def test_files_and_folders_become_one_text_in_order_and_the_rest_is_named(library):
    out = library('text', 'notes.txt', 'books', 'letters/', '--name=library', '--val_fraction=0.25')
    at = int(len(LIBRARY) * 0.75)
    assert read(library.data / 'library').texts == [LIBRARY[:at], LIBRARY[at:]]
    assert ('read 6 files, left out 2 hidden, 2 that are no text, 1 with the suffix .docx, '
            '1 with the suffix .png\nleft out: books/letter.docx, books/picture.png, '
            'books/large.txt, books/zeros.txt, books/.git and 1 more. To read one of them, name it '
            'on the command line\nexport the text of .docx files first\n') in out
    out = library('text', 'notes.txt', '--val=letters')
    assert read(library.data / 'my_text').texts == [FILES['notes.txt'], FILES['letters/d.txt']]
    assert 'notes.txt: 180 characters, and 6 for validation\n' in out


def test_rows_and_markup_in_a_folder_are_said_to_be_read_as_they_are(prepare):
    for suffix in ('.jsonl', '.csv', '.parquet'):
        write_table(prepare.here / f'a{suffix}')
    (prepare.here / 'b.html').write_text('<p>to be or not to be')
    out = prepare('text', '.')
    assert 'with all their marks: 1 .csv, 1 .jsonl; --text_column=NAME takes their texts alone\n' in out
    assert 'read with all their tags: 1 .html\n.parquet files need --text_column=NAME\n' in out
    prepare('text', '.', '--text_column=body', '--name=rows')
    assert read(prepare.data / 'rows').text == OF_ROWS * 3 + '<p>to be or not to be\n'


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='everything is open to this user')
def test_files_and_folders_that_are_closed_are_counted(library):
    (library.here / 'books/deep').chmod(0)
    (library.here / 'books/B.MD').chmod(0)
    try:
        assert '2 that can\'t be opened' in library('text', 'books')
    finally:
        (library.here / 'books/deep').chmod(0o700)
