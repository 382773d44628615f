"""
Which conversations share a window: best fit, the longest first.

    packing = Packing(lengths, room=1025)
    packing.items(seed, np.array([0, 0]), np.array([3, 7]))  # of two windows: (2, S), filled with -1

What lies together is drawn anew for each epoch. The windows' sizes stay: items of one length change
places.
"""

import bisect
import functools

import numpy as np


class Packing:
    """Items in as few windows as best fit finds. lengths: (N,), of the items. room: of a window."""

    def __init__(self, lengths, room):
        counts = np.bincount(lengths, minlength=room + 1)
        patterns, times = zip(*best_fit(counts, room))
        n_slots = np.repeat([len(pattern) for pattern in patterns], times)  # of each window
        slots = np.concatenate([np.tile(pattern, n) for pattern, n in zip(patterns, times)])
        self.lengths, self.n_windows = lengths, len(n_slots)
        self.ends = np.cumsum(n_slots)
        self.window_of = np.repeat(np.arange(self.n_windows), n_slots)  # of each slot
        self.by_length = np.argsort(slots, kind='stable')
        self.padding = 1 - lengths.sum() / (self.n_windows * room)  # share of the windows' room
        self.order = functools.lru_cache(maxsize=2)(self.draw_order)

    def draw_order(self, seed, epoch):
        """The item in each slot, (N,): any of the slot's length, at any place of its window."""
        generator = np.random.default_rng((seed % 2**64, epoch, 1))
        items = np.empty(len(self.lengths), np.int64)
        items[self.by_length] = np.lexsort((generator.random(len(items)), self.lengths))
        return items[np.lexsort((generator.random(len(items)), self.window_of))]

    def items(self, seed, epochs, windows):
        """Items of the given windows in their epochs, (B, S) int64, padded with -1."""
        begins, ends = self.ends[windows - 1] * (windows > 0), self.ends[windows]
        at = begins[:, None] + np.arange((ends - begins).max(initial=0))
        found = np.empty_like(at)
        for epoch in np.unique(epochs).tolist():
            row = epochs == epoch
            found[row] = self.order(seed, epoch)[np.minimum(at[row], len(self.lengths) - 1)]
        return np.where(at < ends[:, None], found, -1)


def best_fit(counts, room):
    """[(lengths, how often)]: the windows that best fit makes of items, the longest first.
    counts: how many items each length has. Items of one length are placed together, so the work
    doesn't grow with their number (Krell et al. 2021, arXiv:2107.02027)."""
    spaces, windows = [], {}  # room that is left, sorted; {it: [(lengths, how often)]}

    def put(pattern, times, left):
        if times and left not in windows:
            bisect.insort(spaces, left)
            windows[left] = []
        if times:
            windows[left].append((pattern, times))

    def take(length, n):
        """Windows with the least room that an item of this length fits into, else n new ones."""
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            return (), n, room
        left = spaces[at]
        pattern, times = windows[left].pop()
        if not windows[left]:
            del windows[left], spaces[at]
        return pattern, times, left

    for length in range(room, 0, -1):
        n = int(counts[length])
        while n:
            pattern, times, left = take(length, n)
            each = min(left // length, n)  # a window is filled before the next
            used = min(times, n // each)
            if pattern:
                put(pattern, times - used, left)
            put(pattern + (length,) * each, used, left - each * length)
            n -= used * each
    return [window for left in spaces for window in windows[left]]
