"""
Which tokens of a split are targets, and where its conversations begin: SPLIT.mask beside the token
files.

A mask has a byte for each token: 1 for a target, 0 for a token that is read but not learned, 2 for
the first token of a conversation, which isn't learned either. A window holds one conversation, or a
further piece of one that is longer than a window; what follows the conversation's end is no target.
So each answer is learned from its own conversation alone.
"""

import functools
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.text.tokens import FileArray, describe_file
from support.text.windows import SAMPLERS, Split

READ, TARGET, BEGIN = 0, 1, 2


class Conversations(Split):
    """A split with a mask, (N,) uint8, an array or a FileArray."""

    def __init__(self, name, tokens, mask, path=None):
        super().__init__(name, tokens, path)
        self.mask = mask
        self.table = functools.lru_cache(maxsize=4)(self.find_windows)

    def arrays(self):
        return super().arrays() | {f'{self.name}.mask': self.mask}

    def find_windows(self, block_size):
        """Starts of all windows that have targets, in order, and the number of their targets."""
        mask = self.mask[:]
        begins = np.flatnonzero(mask == BEGIN)
        lengths = np.diff(begins, append=len(mask))
        n_windows = np.maximum(1, -(-(lengths - 1) // block_size))  # of each conversation
        nth = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        starts = np.repeat(begins, n_windows) + nth * block_size
        # a window's targets end where the next one's begin: the token between conversations is none
        is_target = np.append(mask == TARGET, False)  # the last window may begin at the last token
        counts = np.add.reduceat(is_target, starts + 1, dtype=np.int64)
        return starts[counts > 0], counts[counts > 0]

    def train_windows(self, sampler, seed, at, count, block_size):
        windows, _ = self.table(block_size)
        room = {'random': 1, 'epoch': 2}[sampler]  # so that their starts are numbers of windows
        return windows[SAMPLERS[sampler](seed, at, count, len(windows) + room, 1)]

    def count_windows(self, block_size):
        return len(self.table(block_size)[0])

    def nth_windows(self, n, block_size):
        return self.table(block_size)[0][n]

    def is_target(self, at):
        kind = self.mask[np.minimum(at, len(self) - 1)]
        has_ended = np.logical_or.accumulate(kind == BEGIN, axis=1)
        return (at < len(self)) & (kind == TARGET) & ~has_ended

    def target_share(self, starts, first, batch_size, block_size):
        windows, counts = self.table(block_size)
        counts = counts[np.searchsorted(windows, starts)]
        return float(counts[first:first + batch_size].mean() / counts.mean())

    def epoch_length(self, block_size):
        return self.count_windows(block_size) * block_size

    def check_length(self, block_size):
        """A conversation may be shorter than a window."""


def open_mask(data_dir, split, n_tokens, is_chat):
    """A split's mask, or None if the dataset has none. Raises UserError if it isn't of these
    tokens, MissingFile if one of two is missing, or both although the data is conversations."""
    masks = {name: Path(data_dir, f'{name}.mask') for name in ('train', 'val')}
    if missing := [path for path in masks.values() if not path.is_file()]:
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
