"""
The windows that make a batch, and a split's tokens in them.

    split = Split('train', tokens)  # an array; or Dataset(folder)['train']
    starts = split.train_windows('random', seed, iteration, batch_size, block_size)
    x, y = split.read(starts, block_size)

A batch is a function, not state: the windows of iteration n depend only on (seed, n).
"""

import bisect
import functools
import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.text.tokens import how_to_write, pieces, width_of

READ_AT_START = 1 << 26  # tokens of a split that are checked at most, in 64 pieces if it has more


# ---------------------------------------------------------------------------- which windows

def random_windows(seed, iteration, count, n_tokens, block_size):
    """Starts of the `count` windows in the global batch of an iteration, (count,) int64.

    Stratified sampling: window i starts at random in the i-th of `count` equal parts of the split,
    so all starts are equally likely, but every batch covers the whole text. Philox (Salmon et al.
    2011) is a counter-based generator, so an iteration's numbers need no history.
    """
    bits = np.random.Philox(key=np.array([seed, iteration]).astype(np.uint64)).random_raw(count)
    uniform = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1), all 53 bits of a double
    return ((np.arange(count) + uniform) / count * (n_tokens - block_size)).astype(np.int64)


def epoch_windows(seed, first, count, n_tokens, block_size):
    """Starts of windows `first` to `first + count - 1` in a run that sees each once an epoch:
    (count,)."""
    n = windows_an_epoch(n_tokens, block_size)
    at, parts = np.arange(count) + first % n, []  # within the first epoch and the ones after it
    for epoch in range(int(at[-1]) // n + 1 if count else 0):
        order = epoch_order(seed % 2**64, first // n + epoch, n_tokens, block_size)
        parts.append(order[at[at // n == epoch] % n])
    return np.concatenate([np.empty(0, np.int64), *parts])


def windows_an_epoch(n_tokens, block_size):
    """Windows in an epoch: one fewer than fit side by side, which leaves room for a random
    offset."""
    return max(1, (n_tokens - 1) // block_size - 1)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n_tokens, block_size):
    """Starts of an epoch's windows, which lie side by side from a random offset, in random order: 8
    bytes each, 70 MB for 9 billion tokens in windows of 1,024."""
    n, generator = windows_an_epoch(n_tokens, block_size), np.random.default_rng((seed, epoch))
    offset = generator.integers(min(block_size, n_tokens - n * block_size))
    starts = generator.permutation(n)
    starts *= block_size  # in place: no second array of this size
    starts += offset
    return starts


SAMPLERS = {'random': random_windows, 'epoch': epoch_windows}


# ---------------------------------------------------------------------------- a split

class Split:
    """The tokens of a split, (N,) uint16 or uint32, and the windows in them.

    tokens: an array or a FileArray. path: the file's, or what errors call it. vocab_size: of the
    model, once `check` has been called.
    """
    vocab_size = None

    def __init__(self, name, tokens, path=None):
        self.name, self.tokens, self.path = name, tokens, str(path or f'{name}.bin')

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, at):
        return self.tokens[at]

    def arrays(self):
        """{file name: its numbers}"""
        return {f'{self.name}.bin': self.tokens}

    def train_windows(self, sampler, seed, at, count, block_size):
        """Starts of `count` training windows, (count,) int64: at is the iteration for the sampler
        'random', the number of windows before for 'epoch'."""
        return SAMPLERS[sampler](seed, at, count, len(self), block_size)

    def eval_windows(self, block_size, batch_size, n_batches=0):
        """Starts of n_batches * batch_size windows, spread evenly over those that lie side by side:
        (n_batches, batch_size) int64. n_batches=0 takes all windows. The last batch is padded with
        starts at len(self), which have no targets."""
        n_windows = self.count_windows(block_size)
        count = min(n_batches * batch_size, n_windows) or n_windows
        starts = self.nth_windows(np.arange(count) * n_windows // count, block_size)
        starts = np.pad(starts, (0, -count % batch_size), constant_values=len(self))
        return starts.reshape(-1, batch_size)

    def count_windows(self, block_size):
        """Number of windows that lie side by side."""
        return -(-(len(self) - 1) // block_size)

    def nth_windows(self, n, block_size):
        """Starts of the windows numbered n, (count,) int64."""
        return n * block_size

    def read(self, starts, block_size):
        """x, y: (B, T) int64, y one token ahead of x, -1 past the end of the split and at what is
        no target. Raises UserError for an id beyond the vocabulary, in a place that `check` didn't
        read."""
        at = self.places(starts, block_size)  # (B, T + 1)
        ids = self.tokens[np.minimum(at, len(self) - 1)].astype(np.int64)
        if self.vocab_size and ids.max(initial=0) >= self.vocab_size:
            raise UserError(f'{self.path} holds token id {ids.max()}, but the model\'s vocab_size '
                            f'is {self.vocab_size}: damaged in places that weren\'t read at the '
                            'start, or written to since. Prepare it again')
        return ids[:, :-1], np.where(self.is_target(at), ids[:, 1:], -1)

    def places(self, starts, block_size):
        """The places in the split of each window's tokens, (B, T + 1); len(self) or more for
        none."""
        return starts[:, None] + np.arange(block_size + 1)

    def is_target(self, at):
        """Whether the tokens at each window's places but the first are targets, (B, T) bool."""
        return at[:, 1:] < len(self)

    def target_share(self, starts, first, batch_size, block_size):
        """What a micro-batch weighs in the mean of the micro-batches' losses, if that is to be the
        mean over all targets in the windows at `starts`: 1 where each window has as many."""
        return 1.0

    def epoch_length(self, block_size):
        """Positions in an epoch."""
        return len(self)

    def padding(self, block_size):
        """The share of the training windows that holds no tokens of theirs."""
        return 0.0

    def check_length(self, block_size):
        """UserError if there is no room for a window."""
        if len(self) <= block_size:
            raise UserError(f'{self.path} has {len(self):,} tokens, too few for '
                            f'block_size={block_size}: use at most --block_size={len(self) - 1}, '
                            'or more text')

    def check(self, block_size, vocab_size):
        """UserError if there is no room for a window, or an id is beyond the model's vocabulary. Of
        more than READ_AT_START tokens, pieces are read here, and `read` checks the rest."""
        self.check_length(block_size)
        largest = max(int(piece.max()) for piece in pieces(self.tokens, READ_AT_START))
        start = self.tokens[:4096]
        width, reason = width_of(start), 'the data was prepared for another tokenizer'
        if width != 8 * start.itemsize:
            reason = (f'it seems to hold {width}-bit numbers, not {start.dtype}: '
                      f'{how_to_write(start.dtype, width)}')
        if largest >= vocab_size:
            raise UserError(f'{self.path} holds token id {largest}, but the model\'s vocab_size is '
                            f'{vocab_size}: {reason}')
        if width == 8 and vocab_size > 1 << 15 and start.tobytes().isascii():
            raise UserError(f'{self.path} seems to hold text or 8-bit numbers, not {start.dtype} '
                            f'token ids: {how_to_write(start.dtype)}')
        self.vocab_size = vocab_size

    def is_read_whole(self):
        """Whether all tokens are read at the start, by `check` and `fingerprint`."""
        return len(self) <= READ_AT_START

    def fingerprint(self, digests):
        """SHA-256 of the files in hex: of all tokens, or of their number and of pieces.

        digests: {file name: SHA-256 in hex}, as dataset.json has them. UserError if a file that is
        read whole has another.
        """
        is_whole = self.is_read_whole()
        digest = hashlib.sha256(b'' if is_whole else str(len(self)).encode())
        for name, numbers in self.arrays().items():
            for piece in pieces(numbers, READ_AT_START):
                digest.update(piece)
            if not is_whole or name not in digests:
                continue
            own = digest if numbers is self.tokens else hashlib.sha256(numbers[:])
            if own.hexdigest() != digests[name]:
                raise UserError(f'{Path(self.path).with_name(name)} doesn\'t match its SHA-256 in '
                                'dataset.json: damaged, or written by another program. Prepare the '
                                'data again, or delete dataset.json')
        return digest.hexdigest()


# ---------------------------------------------------------------------------- a run's batches

def prefetch(function, arguments):
    """Yield function(*a) for each a; a thread computes the next result while the caller uses the
    last."""
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

    @functools.cached_property
    def earlier(self):
        """[m]: the first iterations with at least 1, 2, ..., m micro-steps, added up."""
        firsts = (bisect.bisect_left(range(self.iterations), m, key=self.at)
                  for m in range(1, self.micro_steps + 1))
        return [0, *itertools.accumulate(firsts)]

    def before(self, iteration):
        """Number of micro-steps in all earlier iterations: the m-th of an iteration is in all since
        the first that has m."""
        if iteration == 0 or self.iterations == 0:
            return iteration * self.micro_steps
        m = self.at(iteration - 1)
        return m * iteration - self.earlier[m]
