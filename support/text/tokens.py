"""
Token files, and the windows that make a batch.

A dataset is a folder, `data/<name>/`:
    train.bin, val.bin   token ids, uint16 in machine order, no header; either may be cut into train_000.bin,
                         train_001.bin, ..., files of any size; or llm.c's and modded-nanogpt's files, with a
                         header and names like fineweb_train_000001.bin
    train.mask, val.mask optional: what to learn of conversations (support/text/masks.py)
    tokenizer.json       of a tokenizer of its own
    meta.pkl             {'vocab_size': int}, and for characters 'itos': {id: char}, 'stoi': {char: id}
    dataset.json         optional: source, tokenizer, number of tokens, checksums
Without tokenizer.json and meta.pkl the ids are GPT-2 BPE.

A batch is a function, not state: the windows of iteration n depend only on (seed, n).
"""

import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure
from support.text.dataset import (AS_UINT16, check_length, header_size, is_older, read_info, say_once,
                                  split_files, width_of)
from support.text.masks import Conversations, with_mask


# ---------------------------------------------------------------------------- reading

def open_split(data_dir, split):
    """The tokens of `split` ('train' or 'val') as a read-only array, (N,) uint16: a memory map of SPLIT.bin,
    or Shards of several files; Conversations if there is a mask.

    Raises FileNotFoundError, or ValueError if a file is empty, of an odd size or of another length than its
    header or dataset.json says.
    """
    path, paths = Path(data_dir, f'{split}.bin'), split_files(data_dir, split)
    if not paths:
        prepare = Path(data_dir, 'prepare.py')
        how = f'run: python {prepare}' if prepare.is_file() else 'see "Your own text" in README.md'
        raise MissingFile(f'{path} is missing; {how}')
    tokens = Shards(paths) if len(paths) > 1 else open_tokens(paths[0])
    expected = read_info(data_dir).get('tokens', {}).get(split, len(tokens))
    if len(tokens) != expected:
        raise UserError(f'{path} has {len(tokens):,} tokens, but dataset.json says {expected:,}: truncated, '
                         'or written by another program. Prepare it again, or delete dataset.json')
    return with_mask(tokens, data_dir, split)


def count_tokens(path):
    """Number of tokens in a file, from its size."""
    size = path.stat().st_size - header_size(path)
    if size % 2 or size == 0:
        raise UserError(f'{path} has {size:,} bytes, not a positive multiple of 2: truncated, or not '
                         'uint16 tokens. Prepare it again')
    return size // 2


def open_tokens(path):
    """A file as a read-only memory map, (N,) uint16."""
    count_tokens(path)
    with explain_failure(f'{path} can\'t be read'):
        tokens = np.memmap(path, dtype=np.uint16, mode='r', offset=header_size(path))
    start = tokens[:4096]
    if start.tobytes().startswith(b'\x93NUMPY') or (start[::2].any() and len(start) > 16
                                                   and not start[1::2].any()):
        raise UserError(f'{path} holds a NumPy header or 32-bit numbers, not raw uint16 tokens: {AS_UINT16}')
    return tokens


class Shards:
    """Several files read as one array of tokens, indexed by slices or by an array of positions. At most eight
    files are open at a time."""

    def __init__(self, paths):
        self.ends = np.cumsum([count_tokens(path) for path in paths])
        self.starts = self.ends - np.diff(self.ends, prepend=0)
        self.open = functools.lru_cache(maxsize=8)(lambda i: open_tokens(paths[i]))

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, at):
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1, f'step {step}, not 1'
            touched = np.flatnonzero((self.starts < stop) & (self.ends > start))
            parts = [self.open(i)[max(0, start - self.starts[i]):stop - self.starts[i]]
                     for i in touched.tolist()]
            return np.concatenate([np.empty(0, np.uint16), *parts])
        tokens, shard = np.empty(at.shape, np.uint16), np.searchsorted(self.ends, at, side='right')
        for i in np.unique(shard).tolist():
            check_length(self.open(i))
            tokens[shard == i] = self.open(i)[at[shard == i] - self.starts[i]]
        return tokens


def pieces(tokens, at_most):
    """Yield `tokens` whole if they are at most `at_most`, else 64 pieces spread over them."""
    n_pieces = 1 if len(tokens) <= at_most else 64
    size = min(len(tokens), at_most) // n_pieces
    for start in np.linspace(0, len(tokens) - size, n_pieces, dtype=np.int64):
        yield tokens[start:start + size]


def check_split(tokens, name, block_size, vocab_size, at_most=1 << 26):
    """Raise ValueError if a split is too short for a window or holds a token id beyond the vocabulary.

    Of a split with more than `at_most` tokens, only 64 pieces spread over the file are read.
    """
    if len(tokens) <= block_size and not isinstance(tokens, Conversations):
        raise UserError(f'{name} has {len(tokens):,} tokens, too few for block_size={block_size}: use at '
                         f'most --block_size={len(tokens) - 1}, or more text')
    largest, width = max(int(piece.max()) for piece in pieces(tokens, at_most)), width_of(tokens[:4096])
    if largest >= vocab_size:
        reason = f'it seems to hold {width}-bit numbers, not uint16: {AS_UINT16}' if width != 16 else \
            'the data was prepared for another tokenizer'
        raise UserError(f'{name} holds token id {largest}, but the model\'s vocab_size is {vocab_size}: '
                         f'{reason}')
    if width == 8 and vocab_size > 1 << 15 and tokens[:4096].tobytes().isascii():
        raise UserError(f'{name} seems to hold text or 8-bit numbers, not uint16 token ids: {AS_UINT16}')


def fingerprint(data_dir, split, tokens, at_most=1 << 26):
    """SHA-256 of a split in hex: of the whole file if it has at most `at_most` tokens, else of its length and
    64 pieces spread over it; with its mask, if it has one. Raises ValueError if dataset.json has another
    SHA-256 for the whole file."""
    is_whole = len(tokens) <= at_most
    digest = hashlib.sha256(b'' if is_whole else str(len(tokens)).encode())
    for piece in pieces(tokens, at_most):
        digest.update(piece)
    if is_whole:
        check_sha256(data_dir, f'{split}.bin', split, digest.hexdigest())
    if isinstance(tokens, Conversations):
        if is_whole:
            check_sha256(data_dir, f'{split}.mask', split, hashlib.sha256(tokens.mask).hexdigest())
        for piece in pieces(tokens.mask, at_most):
            digest.update(piece)
    return digest.hexdigest()


def check_sha256(data_dir, name, split, found):
    """ValueError if dataset.json has another SHA-256 for a file and is newer than the split's."""
    if read_info(data_dir).get('sha256', {}).get(name) in (None, found):
        return
    if is_older(data_dir, split):
        say_once(f'ignoring the SHA-256 of {name} in dataset.json, which is older than that file')
    else:
        raise UserError(f'{Path(data_dir, name)} doesn\'t match its SHA-256 in dataset.json: damaged, '
                         'or written by another program. Prepare the data again, or delete dataset.json')


# ---------------------------------------------------------------------------- windows

def train_windows(seed, iteration, count, n_tokens, block_size):
    """Starts of the `count` windows in the global batch of an iteration, (count,) int64.

    Stratified sampling: window i starts at random in the i-th of `count` equal parts of the split, so all
    starts are equally likely, but every batch covers the whole text. Philox (Salmon et al. 2011) is a
    counter-based generator, so an iteration's numbers need no history.
    """
    bits = np.random.Philox(key=np.array([seed, iteration]).astype(np.uint64)).random_raw(count)
    uniform = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1), all 53 bits of a double
    return ((np.arange(count) + uniform) / count * (n_tokens - block_size)).astype(np.int64)


def epoch_windows(seed, first, count, n_tokens, block_size):
    """Starts of windows `first` to `first + count - 1` in a run that sees each once an epoch: (count,)."""
    n = windows_an_epoch(n_tokens, block_size)
    at, parts = np.arange(count) + first % n, []  # within the first epoch and the ones after it
    for epoch in range(int(at[-1]) // n + 1 if count else 0):
        within = at[at // n == epoch] % n
        parts.append(epoch_order(seed % 2**64, first // n + epoch, n_tokens, block_size, within))
    return np.concatenate([np.empty(0, np.int64), *parts])


def windows_an_epoch(n_tokens, block_size):
    """Windows in an epoch: one fewer than fit side by side, which leaves room for a random offset."""
    return max(1, (n_tokens - 1) // block_size - 1)


LARGEST_TABLE = 1 << 24  # windows whose order is held in memory


def epoch_order(seed, epoch, n_tokens, block_size, at):
    """Starts of the windows at positions `at` of an epoch: they lie side by side from a random offset, in
    random order."""
    n, generator = windows_an_epoch(n_tokens, block_size), np.random.default_rng((seed, epoch))
    offset = generator.integers(min(block_size, n_tokens - n * block_size))
    if n <= LARGEST_TABLE:
        return offset + block_size * epoch_table(seed, epoch, n_tokens, block_size)[at]
    return offset + block_size * shuffled(at, n, generator.integers(2**64, size=6, dtype=np.uint64))


@functools.lru_cache(maxsize=2)
def epoch_table(seed, epoch, n_tokens, block_size):
    """An epoch's random permutation of its windows."""
    n, generator = windows_an_epoch(n_tokens, block_size), np.random.default_rng((seed, epoch))
    generator.integers(min(block_size, n_tokens - n * block_size))  # the offset
    return generator.permutation(n)


def shuffled(at, n, keys):
    """The numbers at positions `at`, below n, of a pseudorandom permutation of 0 to n - 1, without a table.

    A Feistel network with a round for each key (Luby & Rackoff 1988) permutes the numbers of 2 b bits; one
    that is n or more is permuted again until it isn't (Black & Rogaway 2002, "cycle walking").
    """
    bits = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask, x = np.uint64((1 << int(bits)) - 1), np.array(at, np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> bits, x[todo] & mask
        for key in keys:
            h = (right + key) * np.uint64(0x9e3779b97f4a7c15)  # Fibonacci hashing, Knuth 6.4
            h = (h ^ (h >> np.uint64(32))) * np.uint64(0xd6e8feb86659fd93)
            left, right = right, left ^ ((h >> np.uint64(32)) & mask)
        x[todo] = left << bits | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def epoch_length(tokens, block_size):
    """Positions in an epoch: the split's tokens; of conversations, those of all windows."""
    return len(tokens.windows(block_size)) * block_size if isinstance(tokens, Conversations) else len(tokens)


SAMPLERS = {'random': train_windows, 'epoch': epoch_windows}


def choose_windows(tokens, sampler, seed, at, count, block_size):
    """Starts of `count` training windows, (count,) int64: at is the iteration for the sampler 'random', the
    number of windows before for 'epoch'."""
    if not isinstance(tokens, Conversations):
        return SAMPLERS[sampler](seed, at, count, len(tokens), block_size)
    windows = tokens.windows(block_size)
    room = {'random': 1, 'epoch': 2}[sampler]  # the samplers' numbers are then those of the windows
    return windows[SAMPLERS[sampler](seed, at, count, len(windows) + room, 1)]


def target_share(tokens, starts, first, batch_size, block_size):
    """What a micro-batch weighs in the mean of the micro-batches' losses, if that is to be the mean over all
    targets in the windows at `starts`: 1 where each window has as many."""
    if not isinstance(tokens, Conversations):
        return 1.0
    counts = tokens.count_targets(starts, block_size)
    return float(counts[first:first + batch_size].mean() / counts.mean())


def eval_windows(tokens, block_size, batch_size, n_batches=0):
    """Starts of n_batches * batch_size windows, spread evenly over those that lie side by side in a split:
    (n_batches, batch_size) int64. n_batches=0 takes all windows. The last batch is padded with starts at
    len(tokens), which have no targets."""
    windows = tokens.windows(block_size) if isinstance(tokens, Conversations) else None
    n_windows = -(-(len(tokens) - 1) // block_size) if windows is None else len(windows)
    count = min(n_batches * batch_size, n_windows) or n_windows
    at = np.arange(count) * n_windows // count
    starts = at * block_size if windows is None else windows[at]
    return np.pad(starts, (0, -count % batch_size), constant_values=len(tokens)).reshape(-1, batch_size)


def read_windows(tokens, starts, block_size):
    """x, y: (B, T) int64, y one token ahead of x, -1 past the end of the split and at what is no target."""
    check_length(tokens)
    at = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    is_target = at[:, 1:] < len(tokens)
    if isinstance(tokens, Conversations):
        is_target &= tokens.is_target(at[:, 1:])
    return ids[:, :-1], np.where(is_target, ids[:, 1:], -1)


def prefetch(function, arguments):
    """Yield function(*a) for each a; a thread computes the next result while the caller uses the last."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = None
        for a in arguments:
            ready, ahead = ahead, reader.submit(function, *a)
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


class BatchRamp:
    """Micro-steps of an iteration on each process, which rise to `micro_steps` within `iterations`.

        ramp = BatchRamp(micro_steps=8, iterations=100)
        for micro_step in range(ramp.at(iteration)):
    """

    def __init__(self, micro_steps, iterations):
        self.micro_steps, self.iterations = micro_steps, iterations

    def at(self, iteration):
        return math.ceil(self.micro_steps * min(1, (iteration + 1) / (self.iterations + 1)))

    def before(self, iteration):
        """Number of micro-steps in all earlier iterations."""
        rising = min(iteration, self.iterations)
        return sum(map(self.at, range(rising))) + (iteration - rising) * self.micro_steps
