"""
Which tokens of a split are targets, and where its conversations begin: SPLIT.mask beside the token files.

    tokens = with_mask(tokens, 'data/chat', 'train')    # Conversations, if there is a train.mask
    starts = tokens.windows(block_size)
    tokens.is_target(starts[:, None] + np.arange(1, block_size + 1))

A mask has a byte for each token: 1 for a target, 0 for a token that is read but not learned, 2 for the first
token of a conversation, which isn't learned either. A window holds one conversation, or a further piece of
one that is longer than a window; what follows the conversation's end is no target. So each answer is learned
from its own conversation alone.
"""

import functools
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure
from support.text.dataset import check_length, read_info

READ, TARGET, BEGIN = 0, 1, 2


class Conversations:
    """The tokens of a split, (N,) uint16, and their mask, (N,) uint8. template: how text becomes a
    conversation, as dataset.json has it, or None."""

    def __init__(self, tokens, mask, template=None):
        self.tokens, self.mask, self.template = tokens, mask, template
        self.table = functools.lru_cache(maxsize=4)(self.find_windows)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, at):
        check_length(self.tokens)
        return self.tokens[at]

    def find_windows(self, block_size):
        """Starts of all windows that have targets, in order, and the number of their targets."""
        begins = np.flatnonzero(self.mask == BEGIN)
        lengths = np.diff(begins, append=len(self.mask))
        n_windows = np.maximum(1, -(-(lengths - 1) // block_size))  # of each conversation
        nth = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        starts = np.repeat(begins, n_windows) + nth * block_size
        # a window's targets end where the next one's begin: the token between two conversations is none
        is_target = np.append(self.mask == TARGET, False)  # the last window may begin at the last token
        counts = np.add.reduceat(is_target, starts + 1, dtype=np.int64)
        return starts[counts > 0], counts[counts > 0]

    def windows(self, block_size):
        """Starts of all windows, (n,) int64."""
        return self.table(block_size)[0]

    def count_targets(self, starts, block_size):
        """Number of targets in the windows that begin at `starts`, in the shape of `starts`."""
        windows, counts = self.table(block_size)
        return counts[np.searchsorted(windows, starts)]

    def is_target(self, at):
        """Whether the tokens at these positions are targets of their windows, (B, T) bool: row b holds the
        positions after its window's first."""
        check_length(self.mask)
        kind = self.mask[np.minimum(at, len(self) - 1)]
        return (kind == TARGET) & ~np.logical_or.accumulate(kind == BEGIN, axis=1)


def with_mask(tokens, data_dir, split):
    """`tokens` as Conversations if the split has a mask. Raises ValueError if the mask isn't of these tokens,
    FileNotFoundError if a mask is missing."""
    masks, info = {name: Path(data_dir, f'{name}.mask') for name in ('train', 'val')}, read_info(data_dir)
    if missing := [path for path in masks.values() if not path.is_file()]:
        if len(missing) == 1 or info.get('chat'):
            raise MissingFile(f'{missing[0]} is missing, which says what to learn of the conversations '
                                    f'in {data_dir}: prepare them again')
        return tokens
    path = masks[split]
    if (size := path.stat().st_size) != len(tokens):
        raise UserError(f'{path} has {size:,} bytes, but {split} has {len(tokens):,} tokens, and each needs '
                         'one: prepare the data again')
    with explain_failure(f'{path} can\'t be read'):
        mask = np.memmap(path, dtype=np.uint8, mode='r')
    if mask.max() > BEGIN or mask[0] != BEGIN or not (mask == TARGET).any():
        raise UserError(f'{path} is no mask of conversations: it begins with 2, as each of them, and has '
                         '1 for tokens to learn, of which there must be some, and 0 for others')
    return Conversations(tokens, mask, info.get('chat'))


