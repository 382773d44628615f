"""
A decoding step as a CUDA graph: recorded once, then repeated on the same memory without Python's work.

    cache, step = in_cuda_graph(model, cache, at, step)   # as they were, where a graph isn't possible
    step()                                                # the next position
"""

import math

import torch

from model import KVCache
from support.machine.console import print0
from support.machine.linear import is_watched

N_EAGER = 3  # calls before the recording, in which libraries choose their kernels


def in_cuda_graph(model, cache, at, step):
    """A StaticCache and a step that repeats a recording. at: the next position to fill, (1,) int64."""
    is_sharded = hasattr(model, 'set_requires_gradient_sync')
    is_softmax = getattr(model.config, 'attn_type', 'SM') == 'SM'
    is_ours = type(cache) is KVCache and is_softmax  # attention must take the cache's mask
    if is_sharded or not is_ours or any(is_watched(m) for m in model.modules()):
        return cache, step
    if not agrees(model, cache, at):
        print0('sampling without a CUDA graph: this model computes something else from a static cache')
        return cache, step
    static = StaticCache(cache, at)

    def whole_step():
        static.begin()
        step()
    return static, Recorded(whole_step)


def agrees(model, cache, at):
    """Whether the model gives the same logits from a StaticCache as from the cache, for the first row."""
    logits = []
    for kind in (KVCache, StaticCache):
        row = KVCache(cache.n_positions)
        row.kv = {layer: [t[:1].clone() for t in kv] for layer, kv in cache.kv.items()}
        row.length = cache.length
        row.last_ids = None if cache.last_ids is None else cache.last_ids[:1].clone()
        if kind is StaticCache:
            row = StaticCache(row, at)
            row.begin()
        token = torch.zeros(1, 1, dtype=torch.int64, device=at.device)
        logits.append(model(token, cache=row)[0].float())
    a, b = logits
    return (a - b).abs().max() <= 0.02 * a.abs().max()  # 16-bit kernels differ


class Recorded:
    """A step; from its fourth call on, a graph of it."""

    def __init__(self, step):
        self.step, self.n_calls, self.graph = step, 0, None

    def __call__(self):
        self.n_calls += 1
        if self.n_calls <= N_EAGER:
            self.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode='thread_local'):  # threads may copy batches
                self.step()  # recorded, not computed
        self.graph.replay()


class StaticCache(KVCache):
    """A KVCache that appends one position at a time by the same operations on the same memory: the position
    is a tensor, and attention sees all positions through a mask."""

    def __init__(self, cache, at):
        """cache: the KVCache of the prompt, whose memory it takes over. at: one more than the position."""
        super().__init__(cache.n_positions)
        self.length, self.kv, self.ids, self.at = cache.length, cache.kv, cache.last_ids, at
        self.dtype = next(iter(cache.kv.values()))[0].dtype
        self.all = torch.arange(cache.n_positions, device=at.device)

    def begin(self):
        """What all layers of a step need."""
        self.angles = None  # of the position before
        self.now = self.at - 1  # (1,)
        is_later = self.all > self.now[:, None]  # (1, n_positions)
        self.visible = is_later.to(self.dtype).masked_fill(is_later, -math.inf)

    def positions(self, T, device):
        return self.now

    def append(self, layer, k, v):
        """k, v: (B, n_kv_head, 1, hs) -> keys, values, (B, n_kv_head, n_positions, hs)"""
        keys, values = self.kv[layer]
        return keys.index_copy_(2, self.now, k), values.index_copy_(2, self.now, v)

    def mask(self, T, n_keys, device):
        return self.visible

    @property
    def last_ids(self):
        return self.ids

    @last_ids.setter
    def last_ids(self, ids):
        self.ids = None if ids is None else self.ids.copy_(ids)

    def advance(self, T):
        pass
