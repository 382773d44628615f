"""
A text of files, and of folders of them: read in pieces, as often as needed.

    text = TextFiles(['notes.txt', 'books/', 'posts.jsonl.gz'], Reading(text_column='text'))
    for piece in text: ...  # strings of some megabytes, the same ones each time
"""

import itertools
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from support.errors import MissingFile, UserError
from support.machine.files import download, reason_of
from support.text.formats import (DAMAGED, EXPORT_FIRST, PIECE, ROWS, LeftOut, NotText, Reading, pieces_of,
                                  suffixes)
from support.text.tokens import identity_of

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                    'data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # sha256


def tiny_shakespeare(folder):
    """Path of folder/input.txt, downloaded unless it exists."""
    path = Path(folder, 'input.txt')
    download(*TINY_SHAKESPEARE, path)
    return path


# of text, markup and programs; a file without a suffix may be text, too
SUFFIXES = frozenset((
    '', '.txt', '.text', '.md', '.markdown', '.rst', '.adoc', '.org', '.tex', '.bib', '.srt',
    '.vtt', '.html', '.htm', '.xml', '.css', '.csv', '.tsv', '.json', '.jsonl', '.ndjson', '.yaml',
    '.yml', '.toml', '.ini', '.cfg', '.conf', '.log', '.py', '.pyi', '.pyx', '.c', '.h', '.cc',
    '.cpp', '.hpp', '.cu', '.java', '.kt', '.scala', '.js', '.ts', '.jsx', '.tsx', '.go', '.rs', '.rb',
    '.php', '.swift', '.m', '.cs', '.hs', '.ml', '.el', '.lisp', '.clj', '.scm', '.lua', '.pl', '.r',
    '.jl', '.f90', '.sh', '.sql', '.proto', '.cmake', '.vim', '.asm'))
MARKUP = ('.html', '.htm', '.xml')


class TextFiles:
    """The text of files, and of folders in sorted order, as an iterable of strings. Every file ends
    its line, and so does every row.

    In a folder, hidden files and folders, files with suffixes that aren't of text, files that can't
    be opened and files that turn out not to be text are left out. What was left out is printed when
    the text has been read once. UserError for a file that was named itself and is no text, and for
    one that was changed since this object was made.
    """

    def __init__(self, paths, how=None):
        self.how = how or Reading()
        self.how.check()
        self.files, self.left_out = [], []  # (path, identity, may be no text); (path, reason)
        self.bad_rows = LeftOut(self.how.strict)
        self.is_first = True
        for path in (Path(path).expanduser() for path in paths):
            if path.is_dir():
                self.add_folder(path)
            elif path.is_file():
                self.files.append((str(path), identity_of(path.stat()), False))
            else:
                raise MissingFile(f'{path} is {"no file" if path.exists() else "missing"}')

    def add_folder(self, folder):
        known = SUFFIXES | {'.parquet'} if self.how.text_column else SUFFIXES
        n_before = len(self.files)
        for path, found in walk(folder):
            if reason := found if isinstance(found, str) else reason_to_leave_out(path, known):
                self.left_out.append((path, reason))
            else:
                self.files.append((path, identity_of(found), not self.has_rows(path)))
        if len(self.files) == n_before:
            report_files(0, self.left_out)
            raise UserError(f'{folder} has no files of text')

    def __iter__(self):
        is_first, self.is_first = self.is_first, False
        size = sum(identity[0] for _, identity, _ in self.files)
        with tqdm(total=size, unit='B', unit_scale=True, desc='reading', delay=1, leave=False,
                  disable=not is_first) as bar:
            yield from merged(self.texts(is_first, bar.update))
        if is_first:
            report_files(len(self.files), self.left_out, self.hints())
            self.bad_rows.report()

    def texts(self, is_first, advance):
        """Yield the texts of all files. The first time, files that turn out to be none are
        removed. advance: called with the number of bytes that were read."""
        kept = []
        for file in self.files:
            path, _, is_optional = file
            read = self.try_to_read if is_first and is_optional else self.read
            try:
                pieces = read(file, advance)
            except NotText:
                self.left_out.append((path, 'that are no text'))
                continue
            kept.append(file)
            yield from pieces
        self.files = kept

    def try_to_read(self, file, advance):
        """The pieces of a file that has been read to its end once. Raises NotText at once."""
        pieces = merged(self.read(file, advance))
        start = [*itertools.islice(pieces, 2)]
        for _ in pieces:
            pass
        return start if len(start) < 2 else self.read(file)

    def read(self, file, advance=lambda n: None):
        """Yield the text of a file."""
        path, identity, _ = file
        try:
            with open(path, 'rb') as raw:
                check_unchanged(path, identity, raw)
                at = 0
                for piece in pieces_of(raw, path, self.how, self.bad_rows.add):
                    yield piece
                    advance(raw.tell() - at)
                    at = raw.tell()
                check_unchanged(path, identity, raw)
        except DAMAGED as error:
            raise UserError(f'{path} can\'t be read ({reason_of(error)})') from None

    def has_rows(self, path):
        return bool(self.how.text_column) and suffixes(path)[0] in ROWS

    def hints(self):
        """What to do about files that were read, or left out, in another way than may be wanted."""
        read = Counter(suffixes(path)[0] for path, *_ in self.files)
        tables = {s: n for s, n in read.items() if s in ROWS and not self.how.text_column}
        markup = {s: n for s, n in read.items() if s in MARKUP}
        others = {suffixes(path)[0] for path, _ in self.left_out}
        exported = sorted(others & {*EXPORT_FIRST})
        found = []
        if tables:
            found.append(f'read as plain text, with all their marks: {counts_in_words(tables)}; '
                         '--text_column=NAME takes their texts alone')
        if markup:
            found.append(f'read with all their tags: {counts_in_words(markup)}')
        if '.parquet' in others:
            found.append('.parquet files need --text_column=NAME')
        if exported:
            found.append(f'export the text of {", ".join(exported)} files first')
        return found


def check_unchanged(path, identity, raw):
    """UserError if an open file isn't the one that was found."""
    if identity_of(os.fstat(raw.fileno())) != identity:
        raise UserError(f'{path} was changed while it was read: prepare it when nothing writes to '
                        'it')


def merged(texts):
    """Yield texts joined to at least PIECE characters each."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PIECE:
            yield ''.join(held)
            held, size = [], 0
    if held:
        yield ''.join(held)


# ---------------------------------------------------------------------------- folders

def walk(folder):
    """Yield (path, os.stat_result) for each file below a folder, sorted as their paths are, or
    (path, reason) for what can't be read: hidden files and folders, and those that can't be
    opened."""
    waiting = [(str(folder), True)]
    while waiting:
        path, is_folder = waiting.pop()
        try:
            if is_folder:
                entries = sorted(os.scandir(path), key=lambda e: os.path.normcase(e.name))[::-1]
                hidden = [e.path for e in entries if e.name.startswith('.')]
                waiting += [(e.path, e.is_dir(follow_symlinks=False)) for e in entries
                            if not e.name.startswith('.')]
                yield from ((path, 'hidden') for path in reversed(hidden))
            elif os.path.isfile(path):
                yield path, os.stat(path) if os.access(path, os.R_OK) else 'that can\'t be opened'
        except PermissionError:
            yield path, 'that can\'t be opened'


def reason_to_leave_out(path, known=SUFFIXES):
    """Why a file of a folder isn't read, in words; None if it may be."""
    suffix, compression = suffixes(path)
    if suffix in known:
        return None
    return f'with the suffix {suffix}{compression}' if suffix or compression else 'without a suffix'


def report_files(n_read, left_out, hints=()):
    """Print how many files were read, and which were left out. left_out: [(path, reason)]."""
    counts = Counter(reason for _, reason in left_out)
    print(f'read {n_read:,} file{"s" * (n_read != 1)}{", left out " * bool(counts)}'
          + ', '.join(f'{count:,} {reason}' for reason, count in sorted(counts.items())))
    if left_out:
        names = [path for path, _ in sorted(left_out, key=lambda one: one[1] == 'hidden')[:5]]
        more = f' and {len(left_out) - 5:,} more' if len(left_out) > 5 else ''
        print(f'left out: {", ".join(names)}{more}. To read one of them, name it on the command line')
    for hint in hints:
        print(hint)


def counts_in_words(counts):
    """{'.csv': 2} as '2 .csv'."""
    return ', '.join(f'{count:,} {suffix}' for suffix, count in sorted(counts.items()))
