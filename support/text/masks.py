"""
Which tokens of a split are targets, and where its conversations begin: SPLIT.mask beside the token
files.

A mask has a byte for each token: 1 for a target, 0 for a token that is read but not learned, 2 for
the first token of a conversation, which isn't learned either. A window of an evaluation holds one
conversation, or a further piece of one that is longer than a window; what follows the
conversation's end is no target. So each answer is measured by its own conversation alone. A
training window holds one as well, or as many as fit if they are packed.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import regular_file
from support.text.packing import Packing
from support.text.tokens import FileArray, describe_file
from support.text.windows import SAMPLERS, Split

READ, TARGET, BEGIN = 0, 1, 2


class Pieces(NamedTuple):
    """Conversations in order, the long ones cut into pieces of at most a window, (N,) each."""
    starts: np.ndarray
    lengths: np.ndarray  # in tokens, at most block_size + 1
    n_targets: np.ndarray  # at least 1: others are left out


class Conversations(Split):
    """A split with a mask, (N,) uint8, an array or a FileArray.

    pack: whether a training window holds as many pieces as fit. `train_windows` then gives their
    starts, (count, S) int64, filled up with -1; attention reaches across them, as in pretraining.
    """
    pack = False

    def __init__(self, name, tokens, mask, path=None):
        super().__init__(name, tokens, path)
        self.mask = mask
        self.pieces = functools.lru_cache(maxsize=4)(self.find_pieces)
        self.packing = functools.lru_cache(maxsize=1)(self.find_packing)

    def arrays(self):
        return super().arrays() | {f'{self.name}.mask': self.mask}

    def find_pieces(self, block_size):
        mask = self.mask[:]
        begins = np.flatnonzero(mask == BEGIN)
        lengths = np.diff(begins, append=len(mask))
        n_windows = np.maximum(1, -(-(lengths - 1) // block_size))  # of each conversation
        nth = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        starts = np.repeat(begins, n_windows) + nth * block_size
        lengths = np.minimum(np.repeat(lengths, n_windows) - nth * block_size, block_size + 1)
        # a window's targets end where the next one's begin: the token between conversations is none
        is_target = np.append(mask == TARGET, False)  # the last window may begin at the last token
        counts = np.add.reduceat(is_target, starts + 1, dtype=np.int64)
        return Pieces(starts[counts > 0], lengths[counts > 0], counts[counts > 0])

    def find_packing(self, block_size):
        return Packing(self.pieces(block_size).lengths, block_size + 1)

    def train_windows(self, sampler, seed, at, count, block_size):
        starts = self.pieces(block_size).starts
        room = {'random': 1, 'epoch': 2}[sampler]  # so that their starts are numbers of windows
        if not self.pack:
            return starts[SAMPLERS[sampler](seed, at, count, len(starts) + room, 1)]
        packing = self.packing(block_size)
        windows = SAMPLERS[sampler](seed, at, count, packing.n_windows + room, 1)
        first = at if sampler == 'epoch' else at * count  # windows before these
        pieces = packing.items(seed, (first + np.arange(count)) // packing.n_windows, windows)
        return np.where(pieces < 0, -1, starts[pieces])

    def count_windows(self, block_size):
        return len(self.pieces(block_size).starts)

    def nth_windows(self, n, block_size):
        return self.pieces(block_size).starts[n]

    def numbers_of_pieces(self, starts, block_size):
        """Which pieces begin at these starts, (B, S), and whether one does."""
        starts = starts.reshape(len(starts), -1)
        is_one = (starts >= 0) & (starts < len(self))
        return np.searchsorted(self.pieces(block_size).starts, starts * is_one), is_one

    def places(self, starts, block_size):
        pieces, is_one = self.numbers_of_pieces(starts, block_size)
        starts = starts.reshape(is_one.shape)
        lengths = self.pieces(block_size).lengths[pieces] * is_one
        begins = np.cumsum(lengths, axis=1) - lengths  # in the window
        at = np.full((len(starts), block_size + 1), len(self))  # past the end: no target
        rows = np.nonzero(is_one)[0]
        for row, begin, length, start in zip(rows, begins[is_one], lengths[is_one], starts[is_one]):
            at[row, begin:begin + length] = np.arange(start, start + length)
        return at

    def is_target(self, at):
        kind, is_next = self.mask[np.minimum(at[:, 1:], len(self) - 1)], np.diff(at) == 1
        return (at[:, 1:] < len(self)) & (kind == TARGET) & is_next

    def target_share(self, starts, first, batch_size, block_size):
        pieces, is_one = self.numbers_of_pieces(starts, block_size)
        counts = (self.pieces(block_size).n_targets[pieces] * is_one).sum(axis=1)
        return float(counts[first:first + batch_size].mean() / counts.mean())

    def epoch_length(self, block_size):
        if self.pack:
            return self.packing(block_size).n_windows * block_size
        return self.count_windows(block_size) * block_size

    def padding(self, block_size):
        if self.pack:
            return self.packing(block_size).padding
        return 1 - self.pieces(block_size).lengths.mean() / (block_size + 1)

    def check_length(self, block_size):
        """A conversation may be shorter than a window."""


def open_mask(data_dir, split, n_tokens, is_chat):
    """A split's mask, or None if the dataset has none. Raises UserError if it isn't of these
    tokens, MissingFile if one of two is missing, or both although the data is conversations."""
    masks = {name: Path(data_dir, f'{name}.mask') for name in ('train', 'val')}
    if missing := [path for path in masks.values() if not regular_file(path)]:
        if len(missing) == 1 or is_chat:
            raise MissingFile(f'{missing[0]} is missing, which says what to learn of the '
                              f'conversations in {data_dir}: prepare them again')
        return None
    path, file = masks[split], describe_file(masks[split], 'uint8')
    if file.count != n_tokens:
        raise UserError(f'{path} has {file.count:,} bytes, but {split} has {n_tokens:,} tokens, '
                        'and each needs one: prepare the data again')
    array = FileArray([file], 'uint8')
    mask = array[:]
    if mask.max() > BEGIN or mask[0] != BEGIN or not (mask == TARGET).any():
        raise UserError(f'{path} is no mask of conversations: it begins with 2, as each of them, '
                        'and has 1 for tokens to learn, of which there must be some, and 0 for '
                        'others')
    return array
