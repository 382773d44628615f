"""Text as it lies on disks: formats, encodings, folders, and what is left out of them."""
# ruff: noqa: F811 (fixtures)

import bz2
import codecs
import gzip
import json
import lzma
import os

import pytest
from preparing import prepare, read  # noqa: F401

from support.errors import UserError
from support.text.formats import Reading
from support.text.prepare import write_text_dataset
from support.text.reading import TextFiles

SPEECH = 'To be, or not to be: é, 한국어, 🙂.\n' * 30
ROWS = [{'id': 1, 'body': 'First, "quoted"\nand long'}, {'id': 2, 'body': 'naïve 한국어\n'}]
BAD_ROWS = [{'id': 3, 'body': None}, {'id': 4}, {'id': 5, 'body': '  '}]
OF_ROWS = 'First, "quoted"\nand long\nnaïve 한국어\n'


def text_of(*paths, **how):
    return ''.join(TextFiles(paths, Reading(**how)))


def write_table(path, rows):
    """A file with rows, in the format of its suffix."""
    import pyarrow
    from pyarrow import parquet
    if path.suffix == '.parquet':
        table = pyarrow.table({'id': [row['id'] for row in rows],
                               'body': [row.get('body') for row in rows]})
        parquet.write_table(table, path)
    elif path.suffix in ('.csv', '.tsv'):
        separator = {'.csv': ',', '.tsv': '\t'}[path.suffix]
        quoted = ('"' + (row.get('body') or '').replace('"', '""') + '"' for row in rows)
        lines = (f'{row["id"]}{separator}{body}' for row, body in zip(rows, quoted))
        path.write_text('\n'.join((f'id{separator}body', *lines)), encoding='utf-8')
    else:
        path.write_text('\n\n'.join(map(json.dumps, rows)), encoding='utf-8')


def write_zst(path, data):
    import pyarrow
    with pyarrow.CompressedOutputStream(str(path), 'zstd') as file:
        file.write(data)


WRITERS = {'': lambda path, data: path.write_bytes(data),
           '.gz': lambda path, data: path.write_bytes(gzip.compress(data)),
           '.xz': lambda path, data: path.write_bytes(lzma.compress(data)),
           '.bz2': lambda path, data: path.write_bytes(bz2.compress(data)),
           '.ZST': write_zst}


# ---------------------------------------------------------------------------- one file

@pytest.mark.parametrize('compression', WRITERS)
@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.CSV', '.tsv'])
def test_compressed_files_give_the_text_of_the_others(suffix, compression, tmp_path):
    plain = tmp_path / f'plain{suffix.lower()}'
    if suffix == '.txt':
        plain.write_text(SPEECH, encoding='utf-8')
    else:
        write_table(plain, ROWS)
    path = tmp_path / f'FILE{suffix}{compression}'
    WRITERS[compression](path, plain.read_bytes())
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


@pytest.mark.parametrize('mark', [b'', codecs.BOM_UTF8])
def test_edges_of_pieces_cut_neither_characters_nor_line_ends(mark, tmp_path):
    """Each of the 11 bytes of the pattern comes to lie at the edge once."""
    for shift in range(11):
        text = 'x' * shift + 'é한🙂\r\n' * 400_000 + '\r'
        (tmp_path / 'a.txt').write_bytes(mark + text.encode())
        assert text_of(tmp_path / 'a.txt') == text.replace('\r\n', '\n') + '\n'


@pytest.mark.parametrize('suffix', ['.jsonl', '.csv', '.parquet'])
def test_rows_without_text_are_left_out_counted_and_refused_if_strict(suffix, tmp_path, capsys):
    path = tmp_path / f'a{suffix}'
    write_table(path, BAD_ROWS[:1] + ROWS + BAD_ROWS[1:])
    assert text_of(path, text_column='body') == OF_ROWS
    place = {'.parquet': 'row 1', '.csv': 'line 2', '.jsonl': 'line 1'}[suffix]
    assert (f'left out 3 rows: no text in column body (3, the first: {path}, {place}). '
            '--strict=True refuses them\n') in capsys.readouterr().out
    with pytest.raises(UserError, match=f'{place}: no text in column body'):
        text_of(path, text_column='body', strict=True)


def test_halves_of_surrogate_pairs_and_lines_that_are_no_json_do_no_harm(tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text('{"t": "a\\ud83d\\r\\nb"}\n{"t": \n' + '[' * 100_000)
    assert text_of(tmp_path / 'a.jsonl', text_column='t') == 'a\ufffd\nb\n'
    assert 'left out 2 rows: no JSON (2, the first: ' in capsys.readouterr().out


def cut(writer, n=9):
    """A function that writes a file without its last n bytes."""
    def write(path):
        writer(path)
        path.write_bytes(path.read_bytes()[:-n])
    return write


@pytest.mark.parametrize('name, write, args, words', [
    ('a.txt.gz', cut(lambda p: WRITERS['.gz'](p, SPEECH.encode() * 99)), [], 'can\'t be read (EOFE'),
    ('a.jsonl.xz', cut(lambda p: WRITERS['.xz'](p, SPEECH.encode())), [], 'can\'t be read (EOFError'),
    ('a.txt.zst', cut(lambda p: write_zst(p, SPEECH.encode())), [], 'can\'t be read (OSError: Trunc'),
    ('a.gz', lambda p: p.write_text(SPEECH, encoding='utf-8'), [], 'can\'t be read (BadGzipFile'),
    ('a.parquet', cut(lambda p: write_table(p, ROWS)), ['--text_column=body'], 'can\'t be read (Parq'),
    ('a.parquet', lambda p: write_table(p, ROWS), [], 'has the columns id, body: name that of'),
    ('a.parquet', lambda p: write_table(p, ROWS), ['--text_column=id'], 'int64 in column id, not text'),
    ('a.parquet', lambda p: write_table(p, ROWS), ['--text_column=x'], 'no column x, only id, body'),
    ('a.csv', lambda p: write_table(p, ROWS), ['--text_column=x'], 'no column x, only id, body'),
    ('a.jsonl', lambda p: write_table(p, ROWS), ['--text_column=x'], 'no column x, only id, body'),
    ('a.jsonl', lambda p: write_table(p, ROWS), ['--text_column=id'], 'no row with text in column id'),
    ('a.json', lambda p: p.write_text(json.dumps(ROWS)), ['--text_column=body'], 'is a JSON list'),
    ('a.pdf', lambda p: p.write_text(SPEECH, encoding='utf-8'), [], 'export its text first'),
    ('a.txt', lambda p: p.write_bytes(b'%PDF-1.7 \xff'), [], 'it is a PDF, export its text first'),
    ('a.txt', lambda p: p.write_bytes(b'a' * 9 + b'\xe9b'), [], 'UTF-8 text (invalid continuation by'),
    ('a.txt', lambda p: p.write_bytes(b'a' * 5_000_000 + b'\xed'), [], 'end of data at byte 5,000,000'),
    ('a.txt', lambda p: p.write_bytes(b'a\0b'), [], 'zero bytes. save it as UTF-8, or name its enc'),
    ('a.txt', lambda p: p.write_text('a b'), ['--encoding=klingon'], 'encoding=klingon is no encoding'),
    ('a.txt', lambda p: p.write_text('a b'), ['--encoding=hex'], 'encoding=hex is no encoding'),
    ('a.txt', lambda p: p.write_text('a b'), ['--val=no.txt'], 'no.txt is missing'),
    ('a.txt', lambda p: p.write_text('a b'), ['--val=empty'], 'empty has no files of text'),
])
def test_bad_input_is_one_line_and_nothing_is_written(name, write, args, words, prepare):
    (prepare.here / 'empty').mkdir()
    write(prepare.here / name)
    assert words in prepare.fails('text', name, *args)


@pytest.mark.parametrize('change', [
    lambda path: path.write_text(SPEECH * 2, encoding='utf-8'), lambda path: os.utime(path),
    lambda path: path.replace(path.with_name('b')) and path.write_text(SPEECH, encoding='utf-8')])
def test_file_that_changes_while_it_is_read_is_refused(change, tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text(SPEECH, encoding='utf-8')
    text = TextFiles([path])
    assert ''.join(text) == ''.join(text)
    change(path)
    with pytest.raises(UserError, match='a.txt was changed while it was read'):
        write_text_dataset(tmp_path / 'data', text, 'char', 'a test')
    assert not (tmp_path / 'data').exists()


# ---------------------------------------------------------------------------- folders

FILES = {'notes.txt': 'first\n' * 30, 'books/a.txt': '\ufeffé second\n', 'books/B.MD': 'third\r\nline',
         'books/a/z.txt': 'in a\n', 'books/deep/c': 'fourth', 'letters/d.txt': 'fifth\n'}
OTHERS = {'books/zeros.txt': b'a\0b', 'books/picture.png': b'\x89PNG\r\n\x1a\n\0', 'books/.git/config': b'x',
          'books/.hidden.txt': b'x', 'books/letter.docx': b'x', 'books/large.txt': b'a' * 5_000_000 + b'\xff'}


@pytest.fixture
def library(prepare):
    """Files and folders in prepare.here, and their text in the order of the paths."""
    for name, content in (FILES | OTHERS).items():
        path = prepare.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    order = ('notes.txt', 'books/B.MD', 'books/a/z.txt', 'books/a.txt', 'books/deep/c', 'letters/d.txt')
    texts = (FILES[name].removeprefix('\ufeff').replace('\r\n', '\n') for name in order)
    return ''.join(text if text.endswith('\n') else text + '\n' for text in texts)


def test_files_and_folders_become_one_text_in_order_and_the_rest_is_named(library, prepare):
    out = prepare('text', 'notes.txt', 'books', 'letters/', '--name=library', '--val_fraction=0.25')
    found, at = read(prepare.data / 'library'), int(len(library) * 0.75)
    assert found.texts == [library[:at], library[at:]]
    assert ('read 6 files, left out 2 hidden, 2 that are no text, 1 with the suffix .docx, '
            '1 with the suffix .png\nleft out: books/letter.docx, books/picture.png, '
            'books/large.txt, books/zeros.txt, books/.git and 1 more. To read one of them, name it '
            'on the command line\nexport the text of .docx files first\n') in out


def test_rows_and_markup_in_a_folder_are_said_to_be_read_as_they_are(prepare):
    for suffix in ('.jsonl', '.csv', '.parquet'):
        write_table(prepare.here / f'a{suffix}', ROWS)
    (prepare.here / 'b.html').write_text('<p>to be or not to be')
    out = prepare('text', '.')
    assert 'with all their marks: 1 .csv, 1 .jsonl; --text_column=NAME takes their texts alone\n' in out
    assert 'read with all their tags: 1 .html\n.parquet files need --text_column=NAME\n' in out
    prepare('text', '.', '--text_column=body', '--name=rows')
    assert read(prepare.data / 'rows').text == OF_ROWS * 3 + '<p>to be or not to be\n'


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='everything is open to this user')
def test_files_and_folders_that_are_closed_are_counted(library, prepare):
    (prepare.here / 'books/deep').chmod(0)
    (prepare.here / 'books/B.MD').chmod(0)
    try:
        assert '2 that can\'t be opened' in prepare('text', 'books')
    finally:
        (prepare.here / 'books/deep').chmod(0o700)


def test_text_for_validation_may_be_a_file_of_its_own(library, prepare):
    out = prepare('text', 'notes.txt', '--val=letters')
    assert read(prepare.data / 'my_text').texts == [FILES['notes.txt'], FILES['letters/d.txt']]
    assert 'notes.txt: 180 characters, and 6 for validation\n' in out
