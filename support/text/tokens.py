"""
Token files: which make up a split, in which format, and their numbers as one array.

    tokens = open_tokens(split_files('data/openwebtext', 'train'), 'uint16')
    tokens[:100], tokens[np.array([5, 900_000_000])]

A split is one file, `train.bin`, or several that are read as one: `train_000.bin`, `train_001.bin`,
..., of any size; or those of llm.c and modded-nanogpt, which have a header and names like
`fineweb_train_000001.bin`.
"""

import functools
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure

DTYPES = ('uint16', 'uint32')


def how_to_write(dtype, bits=16):
    """What to do about a file that should hold numbers of a dtype, but holds `bits` bits for
    each."""
    how = f'write it with array.astype(numpy.{dtype}).tofile(path)'
    if (bits, dtype) == (32, 'uint16'):
        how += ', or put "dtype": "uint32" into dataset.json'
    return how


def split_files(data_dir, split):
    """A split's files: [SPLIT.bin], or [SPLIT_000.bin, SPLIT_001.bin, ...], or
    [NAME_SPLIT_000001.bin, ...], numbered from 0 or 1; [] if there are none. Raises an error if it
    isn't clear which, or one is missing."""
    whole, groups = Path(data_dir, f'{split}.bin'), {}
    for path in sorted(Path(data_dir).glob(f'*{split}_*.bin')):
        if found := re.fullmatch(rf'((?:.*[_-])?{split})_([0-9]{{3,}})\.bin', path.name):
            group = groups.setdefault(found[1], {})
            if twin := group.get(int(found[2])):
                raise UserError(f'{data_dir} has {twin.name} and {path.name}: remove one or the '
                                'other')
            group[int(found[2])] = path
    if whole.is_file() and split in groups:
        first = next(iter(groups[split].values()))
        raise UserError(f'{data_dir} has {whole.name} and {first.name}: remove one or the other')
    if whole.is_file() or not groups:
        return [whole] if whole.is_file() else []
    name = split if split in groups else next(iter(groups))
    if len(groups) > 1 and name != split:
        raise UserError(f'{data_dir} has files of several datasets, {", ".join(groups)}: leave one')
    group = groups[name]
    first = 1 if name != split and 0 not in group else 0
    for i, (number, path) in enumerate(sorted(group.items()), first):
        if number != i:
            digits = len(path.stem) - len(name) - 1
            missing = path.with_name(f'{name}_{i:0{digits}}.bin')
            raise MissingFile(f'{missing} is missing, but {path.name} exists')
    return [group[number] for number in sorted(group)]


# ---------------------------------------------------------------------------- one file

class File(NamedTuple):
    """A file of numbers as it was when it was first opened."""
    path: Path
    offset: int  # bytes before the numbers
    count: int
    identity: tuple  # size in bytes, time of the last change in ns, inode

    def check(self, found):
        """UserError if the file isn't this one any more. found: an os.stat_result."""
        now = identity_of(found)
        if now == self.identity:
            return
        if now[0] < self.identity[0]:
            what = 'has become shorter'
        elif now[2] != self.identity[2]:
            what = 'was replaced'
        else:
            what = 'was written to'
        raise self.changed(what)

    def changed(self, what):
        return UserError(f'{self.path} {what} since it was opened: put it back as it was, then '
                         'resume')


def identity_of(found):
    return found.st_size, found.st_mtime_ns, found.st_ino


def describe_file(path, dtype):
    """A file of numbers, as a File. Raises UserError if its size isn't that of whole numbers, or of
    as many as its header says."""
    with explain_failure(f'{path} can\'t be read'), open(path, 'rb') as file:
        found, start = os.fstat(file.fileno()), file.read(12)
    offset = header_size(path, start, found.st_size, dtype)
    size, width = found.st_size - offset, np.dtype(dtype).itemsize
    if size % width or size == 0:
        raise UserError(f'{path} has {size:,} bytes, not a positive multiple of {width}: '
                        f'truncated, or not {dtype} tokens. Prepare it again')
    return File(path, offset, size // width, identity_of(found))


def header_size(path, start, size, dtype):
    """Bytes before a file's tokens: 0, or 1024 in llm.c's and modded-nanogpt's files, which begin
    with 256 int32: 20240520, 1, the number of tokens. start: its first 12 bytes. size: in bytes."""
    magic, version, count = np.frombuffer(start.ljust(12, b'\0'), '<i4').tolist()
    if (magic, version) == (20240801, 7) or magic == 20240520 and version != 1:
        raise UserError(f'{path} has llm.c\'s header {magic}, {version}, of other tokens than '
                        f'uint16, whose header is 20240520, 1: {how_to_write("uint16", 32)}')
    if magic != 20240520:
        return 0
    if dtype != 'uint16':
        raise UserError(f'{path} has llm.c\'s header of uint16 tokens, but dataset.json says '
                        f'{dtype}: correct one or the other')
    held = max(0, size - 1024) // 2
    if count != held:
        raise UserError(f'{path} has {held:,} tokens, but {count:,} by its header: truncated, or '
                        'damaged. Download or prepare it again')
    return 1024


def check_kind(path, start):
    """UserError if a file's first numbers, (N,), seem to be those of a NumPy file, or wider
    ones."""
    if start.tobytes().startswith(b'\x93NUMPY'):
        raise UserError(f'{path} holds a NumPy header, not raw {start.dtype} tokens: '
                        f'{how_to_write(start.dtype)}')
    for bits in (64, 32):  # small numbers, each followed by zeros
        step = max(1, bits // 8 // start.dtype.itemsize)
        low, *high = (start[i::step].any() for i in range(step))
        if len(start) > 16 and low and high and not any(high):
            raise UserError(f'{path} holds {bits}-bit numbers, not raw {start.dtype} tokens: '
                            f'{how_to_write(start.dtype, bits)}')


def width_of(start):
    """Bits of the numbers that a file's first tokens, (N,), seem to be made of: 8, 16 or 32."""
    if start.dtype != np.uint16:
        return 16 if start.max() >= 1 << 24 else 32  # no vocabulary is as large
    if len(start) < 64:
        return 16
    low, high = (np.bincount(byte, minlength=256) for byte in (start & 255, start >> 8))
    if abs(low - high).sum() < len(start) / 2 and np.count_nonzero(high) > 8:  # one distribution
        return 8
    return 32 if start[1::2].max() < 16 <= 256 <= start[::2].max() else 16


# ---------------------------------------------------------------------------- all files

class FileArray:
    """Files of numbers as one read-only array, indexed by a slice or by an array of positions.

    At most eight files are open at a time. What is read is read from the files as they were first
    opened: UserError if one has become shorter, or is another when it is opened again. check: a
    function of a file's path and its first numbers, called when it is opened.
    """

    def __init__(self, files, dtype, check=None):
        self.files, self.dtype, self.check = files, np.dtype(dtype), check
        self.ends = np.cumsum([file.count for file in files])
        self.starts = self.ends - [file.count for file in files]
        self.open = functools.lru_cache(maxsize=8)(self.map_file)

    def __len__(self):
        return int(self.ends[-1])

    def map_file(self, i):
        """File i as a memory map, and its numbers."""
        file = self.files[i]
        with explain_failure(f'{file.path} can\'t be read', passing=UserError), \
                open(file.path, 'rb') as opened:
            file.check(os.fstat(opened.fileno()))
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            numbers = np.frombuffer(mapped, self.dtype, file.count, file.offset)
        if self.check:
            self.check(file.path, numbers[:4096])
        return mapped, numbers

    def numbers(self, i):
        """The numbers of file i."""
        mapped, numbers = self.open(i)
        if mapped.size() < self.files[i].identity[0]:  # reading beyond the end kills the process
            raise self.files[i].changed('has become shorter')
        return numbers

    def __getitem__(self, at):
        if len(self.files) == 1:
            return self.numbers(0)[at]
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1, f'step {step}, not 1'
            touched = np.flatnonzero((self.starts < stop) & (self.ends > start))
            parts = [self.numbers(i)[max(0, start - self.starts[i]):stop - self.starts[i]]
                     for i in touched.tolist()]
            return np.concatenate([np.empty(0, self.dtype), *parts])
        tokens, shard = np.empty(at.shape, self.dtype), np.searchsorted(self.ends, at, side='right')
        for i in np.unique(shard).tolist():
            tokens[shard == i] = self.numbers(i)[at[shard == i] - self.starts[i]]
        return tokens

    def check_unchanged(self):
        """UserError if the size, the time or the inode of a file differs from what was opened."""
        for file in self.files:
            try:
                found = os.stat(file.path)
            except (FileNotFoundError, NotADirectoryError):
                raise file.changed('is gone') from None
            except OSError:  # what can't be asked now may well be unchanged
                continue
            file.check(found)


def open_tokens(paths, dtype):
    """A split's files as a FileArray. Raises UserError if one is empty, or isn't of whole
    tokens."""
    tokens = FileArray([describe_file(path, dtype) for path in paths], dtype, check_kind)
    tokens.numbers(0)  # so that files of another kind are refused here
    return tokens


def pieces(tokens, at_most):
    """Yield `tokens` whole if they are at most `at_most`, else 64 pieces spread over them."""
    n_pieces = 1 if len(tokens) <= at_most else 64
    size = min(len(tokens), at_most) // n_pieces
    for start in np.linspace(0, len(tokens) - size, n_pieces, dtype=np.int64):
        yield tokens[start:start + size]
