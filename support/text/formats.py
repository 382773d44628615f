"""
Files of text as they lie on disks: compressed or not, in any encoding, rows of tables.

    how = Reading(text_column='text')
    with open('posts.jsonl.gz', 'rb') as raw:
        for piece in pieces_of(raw, 'posts.jsonl.gz', how, leave_out=print): ...

A piece has some megabytes at most, so memory doesn't grow with the file.
"""

import codecs
import csv
import json
import lzma
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from support.errors import UserError
from support.machine.console import print0

PIECE = 1 << 20  # bytes that are read at a time
LONGEST_ROW = 1 << 26  # characters
COMPRESSED = ('.gz', '.xz', '.bz2', '.zst')
LINES, TABLES = ('.jsonl', '.ndjson', '.json'), ('.csv', '.tsv')
ROWS = (*LINES, *TABLES, '.parquet')  # with rows, of which text_column names the text
EXPORT_FIRST = ('.pdf', '.docx', '.doc', '.odt', '.rtf', '.epub')
MARKS = {codecs.BOM_UTF8: 'utf-8',
         codecs.BOM_UTF32_LE: 'utf-32-le', codecs.BOM_UTF32_BE: 'utf-32-be',  # these begin as
         codecs.BOM_UTF16_LE: 'utf-16-le', codecs.BOM_UTF16_BE: 'utf-16-be'}  # these
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)  # of what can't be read


class NotText(UserError):
    """A file that isn't text. A folder's other files are read without it."""


@dataclass(frozen=True)
class Reading:
    """How files are read."""
    text_column: str = ''  # of the files with rows; '' reads them as plain text
    encoding: str = 'utf-8'  # of files without a byte-order mark
    strict: bool = False  # whether a row without text is an error

    def check(self):
        """UserError for an encoding that Python doesn't know."""
        try:
            is_text = codecs.lookup(self.encoding)._is_text_encoding
        except LookupError:
            is_text = False
        if not is_text:
            raise UserError(f'encoding={self.encoding} is no encoding that Python knows: utf-8, '
                            'utf-16, latin-1, cp1252, cp949, gb18030, shift_jis, ...')


class LeftOut:
    """Rows that are left out, counted by the reason; with `strict`, the first is a UserError."""

    def __init__(self, strict=False):
        self.strict, self.rows = strict, {}  # {reason: (number of rows, the first)}

    def add(self, where, reason):
        if self.strict:
            raise UserError(f'{where}: {reason}. Without --strict=True such rows are left out')
        count, first = self.rows.get(reason, (0, where))
        self.rows[reason] = count + 1, first

    def in_words(self):
        """The five most frequent reasons."""
        found = sorted(self.rows.items(), key=lambda item: -item[1][0])[:5]
        return '; '.join(f'{reason} ({count:,}, the first: {where})'
                         for reason, (count, where) in found)

    def report(self):
        if self.rows:
            n_rows = sum(count for count, _ in self.rows.values())
            print0(f'left out {n_rows:,} rows: {self.in_words()}. --strict=True refuses them')


def suffixes(path):
    """A file's suffix in lower case, and that of its compression or '': ('.jsonl', '.gz')."""
    path = Path(path)
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, '')


def pieces_of(raw, path, how, leave_out):
    """Yield a file's text. raw: the file, opened in binary. how: a Reading. leave_out: called with
    the place of each row without text, and the reason. Raises NotText, or UserError if no row has
    text."""
    suffix, compression = suffixes(path)
    if suffix in EXPORT_FIRST:
        raise NotText(f'{path} is not plain text: export its text first')
    if suffix == '.parquet':
        if compression:
            raise UserError(f'{path} is a compressed table: decompress it first')
        texts = rows_of_parquet(raw, path, how.text_column, leave_out)
    else:
        pieces = decoded(decompressed(raw, path, compression), path, how.encoding)
        if suffix in LINES and how.text_column:
            texts = rows_of_json(pieces, path, how.text_column, leave_out)
        elif suffix in TABLES and how.text_column:
            texts = rows_of_csv(pieces, path, how.text_column, leave_out)
        else:
            texts = pieces
    return ended_lines(texts, path, how)


def ended_lines(texts, path, how):
    """The texts of a file, which ends its line; so does each row."""
    is_rows, last = bool(how.text_column) and suffixes(path)[0] in ROWS, ''
    for text in texts:
        if is_rows and not text.endswith('\n'):
            text += '\n'
        last = text[-1:] or last
        yield text
    if not is_rows and last != '\n':
        yield '\n'


# ---------------------------------------------------------------------------- bytes

def decompressed(raw, path, compression):
    """A binary stream of what a compressed file holds."""
    if compression == '.gz':
        import gzip
        return gzip.GzipFile(fileobj=raw)
    if compression == '.xz':
        return lzma.open(raw)
    if compression == '.bz2':
        import bz2
        return bz2.open(raw)
    if compression == '.zst':
        try:
            import pyarrow
        except ImportError:
            raise UserError(f'{path} needs a library: pip install pyarrow, or decompress it '
                            'first') from None
        again = open(os.dup(raw.fileno()), 'rb')  # noqa: SIM115, the library closes it
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(again), 'zstd')
    return raw


def decoded(stream, path, encoding):
    """Yield a binary stream's text, without its byte-order mark and with Unix's line ends. The
    mark, if there is one, says which encoding it is. Raises NotText."""
    start = b''
    while len(start) < 4 and (data := stream.read(4 - len(start))):
        start += data
    mark = next((mark for mark in MARKS if start.startswith(mark)), b'')
    encoding = MARKS.get(mark, encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    at, held, is_last = len(mark), '', False
    data = start[len(mark):] or stream.read(PIECE)
    while not is_last:
        is_last = not data
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece began
        try:
            text = held + decoder.decode(data, is_last)
        except UnicodeDecodeError as error:
            raise NotText(f'{path} is not {encoding.upper()} text ({error.reason} at byte '
                          f'{at - waiting + error.start:,}): {how_to_read(start)}') from None
        at, data = at + len(data), stream.read(PIECE)
        held = '\r' if text.endswith('\r') and not is_last else ''  # the line end may go on
        text = text[:len(text) - len(held)]
        if '\0' in text:
            raise NotText(f'{path} is not text: it has zero bytes; {how_to_read(start)}')
        if text:
            yield text.replace('\r\n', '\n') if '\r' in text else text


def how_to_read(start):
    """What to do about a file that can't be decoded. start: its first bytes."""
    if start.startswith(b'%PDF'):
        return 'it is a PDF, export its text first'
    if start.startswith(b'PK\3\4'):
        return 'it is a Word, Excel or zip file, export its text first'
    return 'save it as UTF-8, or name its encoding with --encoding'


# ---------------------------------------------------------------------------- rows

def rows_of_json(pieces, path, column, leave_out):
    """Yield the texts of a file's JSON lines."""
    n_good, names = 0, {}
    for number, line in enumerate(lines(pieces, path), 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith('['):
            raise UserError(f'{path} is a JSON list, which can\'t be read in pieces: make a row of '
                            f'each item, as `jq -c ".[]" {Path(path).name}` does')
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            leave_out(f'{path}, line {number}', 'no JSON')
            continue
        text = row.get(column) if isinstance(row, dict) else None
        if is_good(text):
            n_good += 1
            yield clean(text)
        else:
            names |= dict.fromkeys(row) if isinstance(row, dict) and not names else {}
            leave_out(f'{path}, line {number}', f'no text in column {column}')
    if not n_good and not names:
        raise UserError(f'{path} has no line that is a JSON object, such as {{"{column}": "..."}}')
    check_column(n_good, names, path, column)


def rows_of_csv(pieces, path, column, leave_out):
    """Yield the texts of a table's rows. Fields are separated by what the first line has most
    of."""
    csv.field_size_limit(LONGEST_ROW)
    whole = (line + '\n' for line in lines(pieces, path))
    header = next(whole, '')
    separator = max(',;\t', key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator), ())]
    if column not in names:
        check_column(0, names, path, column)
    at, n_good = names.index(column), 0
    table = csv.reader(whole, delimiter=separator)
    for row in table:
        text = row[at] if at < len(row) else None
        if is_good(text):
            n_good += 1
            yield clean(text)
        elif row:
            leave_out(f'{path}, line {table.line_num + 1}', f'no text in column {column}')
    check_column(n_good, names, path, column)


def rows_of_parquet(raw, path, column, leave_out):
    """Yield the texts of a Parquet file's rows."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path} needs a library: pip install pyarrow') from None
    try:
        table = parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        if column not in names:
            check_column(0, names, path, column)
        kind = table.schema_arrow.field(column).type
        if 'string' not in str(kind):
            raise UserError(f'{path} has {kind} in column {column}, not text: name another with '
                            '--text_column')
        batches = table.iter_batches(64, columns=[column], use_threads=False)
        texts, n_good = (text for batch in batches for text in batch.column(0).to_pylist()), 0
        for number, text in enumerate(texts, 1):
            if is_good(text):
                n_good += 1
                yield clean(text)
            else:
                leave_out(f'{path}, row {number}', f'no text in column {column}')
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} can\'t be read ({str(error).splitlines()[0][:200]})') from None
    check_column(n_good, names, path, column)


def is_good(text):
    return isinstance(text, str) and bool(text.strip())


def clean(text):
    """A row's text with Unix's line ends, and without halves of surrogate pairs, which no UTF-8
    has."""
    text = text.replace('\r\n', '\n')
    if text.isascii():
        return text
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def check_column(n_good, names, path, column):
    """UserError if no row of a file has text. names: of its columns."""
    if n_good:
        return
    found = ', '.join(map(str, [*names][:20])) or 'none'
    if not column:
        raise UserError(f'{path} has the columns {found}: name that of the text with --text_column')
    if column not in names:
        raise UserError(f'{path} has no column {column}, only {found}: name one with '
                        '--text_column')
    raise UserError(f'{path} has no row with text in column {column}: name another with '
                    '--text_column')


def lines(pieces, path):
    """Yield the lines of a text in pieces, without their ends."""
    held = ''
    for piece in pieces:
        *whole, held = (held + piece).split('\n')
        yield from whole
        if len(held) > LONGEST_ROW:
            raise UserError(f'{path} has a row of more than {LONGEST_ROW:,} characters: damaged, '
                            'or not a file of rows')
    if held:
        yield held
