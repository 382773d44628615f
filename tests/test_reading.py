"""Text as it lies on disks: formats, encodings, folders, and what is left out of them."""
# ruff: noqa: F811 (fixtures)

import codecs
import gzip
import json
import lzma

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


COMPRESS = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress, '.ZST': zstd}


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
    (codecs.BOM_UTF8, 'utf-8', {}), (codecs.BOM_UTF32_LE, 'utf-32-le', {}),
    (codecs.BOM_UTF16_BE, 'utf-16-be', {'encoding': 'latin-1'}),
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
    assert 'left out 3 rows: no text in column body' in capsys.readouterr().out
    strict = refusal(text_of, tmp_path / name, text_column='body', strict=True)
    assert strict.startswith(f'{tmp_path / name}, {place}: no text in column body')


def test_halves_of_surrogate_pairs_and_lines_that_are_no_json_do_no_harm(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"t": "a\\ud83d\\r\\nb"}\n{"t": \n' + '[' * 100_000)
    assert text_of(tmp_path / 'a.jsonl', text_column='t') == 'a\ufffd\nb\n'


@pytest.mark.parametrize('name, content, args, words', [
    ('a.txt.gz', gzip.compress(SPEECH.encode() * 99)[:-9], [], 'can\'t be read (EOFError'),
    ('a.parquet', b'PAR1', ['--text_column=body'], 'a.parquet can\'t be read (Parquet'),
    ('a.jsonl', b'{"id": 1}', ['--text_column=x'], 'no column x, only id'),
    ('a.jsonl', b'{"x": "a"}\n5', ['--text_column=x', '--strict=True'], 'a.jsonl, line 2: '),
    ('a.json', b'{\n"x": "a"\n}', ['--text_column=x'], 'a.json has no line that is a JSON object'),
    ('a.csv', b'id, body\n1,', ['--text_column=body'], 'no row with text in column body'),
    ('a.txt', b'a' * 5_000_000 + b'\xed', [], 'end of data at byte 5,000,000'),
    ('a.txt', b'a b', ['--encoding=klingon'], 'encoding=klingon is no encoding'),
    ('a.txt', b'a b', ['--val=no.txt'], 'no.txt is missing')])
def test_bad_input_is_one_line_and_nothing_is_written(name, content, args, words, prepare):
    (prepare.here / name).write_bytes(content)
    assert words in prepare.fails('text', name, *args)


def test_file_that_changes_while_it_is_read_or_between_is_refused(tmp_path):
    path, told = tmp_path / 'a.txt', 'a.txt was changed while it was read'
    path.write_text('a line\n' * 500_000)
    pieces = iter(TextFiles([path]))
    next(pieces)
    with open(path, 'a') as log:
        log.write('one more line\n')
    assert told in refusal(list, pieces)
    text = TextFiles([path])
    path.write_bytes(b'\xff no text')
    assert told in refusal(write_text_dataset, tmp_path / 'data', text, 'char', 'a test')


# ---------------------------------------------------------------------------- folders

FILES = {'notes.txt': b'first\n' * 30, 'books/a.txt': b'\xef\xbb\xbfsecond\n', 'books/B.MD': b'third\r\nline',
         'books/a/z.txt': b'in a\n', 'books/deep/c': b'fourth', 'letters/d.txt': b'fifth\n',
         'books/zeros.txt': b'a\0b', 'books/picture.png': b'\x89PNG\r\n\x1a\n\0', 'books/.hidden.txt': b'x'}
LIBRARY = 'first\n' * 30 + 'third\nline\nin a\nsecond\nfourth\nfifth\n'


def test_files_and_folders_become_one_text_in_order_and_the_rest_is_named(prepare):
    for name, content in FILES.items():
        (prepare.here / name).parent.mkdir(parents=True, exist_ok=True)
        (prepare.here / name).write_bytes(content)
    out = prepare('text', 'notes.txt', 'books', 'letters/', '--name=library', '--val_fraction=0.25')
    at = int(len(LIBRARY) * 0.75)
    assert read(prepare.data / 'library').texts == [LIBRARY[:at], LIBRARY[at:]]
    assert 'read 6 files, left out 1 hidden, 1 that are no text, 1 with the suffix .png\n' in out
    prepare('text', 'notes.txt', '--val=letters')
    assert read(prepare.data / 'my_text').texts == ['first\n' * 30, 'fifth\n']
