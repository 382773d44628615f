"""
A decoding step as a CUDA graph: recorded once for each shape, then repeated on the same memory without
Python's work, also by later calls.

    cache, step = in_cuda_graph(model, cache, at, step)   # as they were, where a graph isn't possible
    step()                                                # the next position
"""

import math
import weakref
from dataclasses import replace

import torch

from model import KVCache
from support.machine.console import print0
from support.machine.linear import is_watched

N_EAGER = 3  # calls before the first recording, in which libraries choose their kernels
SHORTEST = 128  # positions of a cache to read, then twice as many and so on: a recording for each
MOST_KEPT = 2  # shapes of a model whose memory and recordings stay


def in_cuda_graph(model, cache, at, step):
    """A StaticCache and a step that repeats recordings. at: the next position to fill, (1,) int64."""
    is_sharded = hasattr(model, 'set_requires_gradient_sync')
    has_mask = getattr(model.config, 'attn_type', 'SM') == 'SM' and cache.document_begin is None
    is_ours = type(cache) is KVCache and has_mask  # attention must take the cache's mask
    if is_sharded or not is_ours or any(is_watched(m) for m in model.modules()):
        return cache, step
    if not agrees(model, cache, at):
        print0('sampling without a CUDA graph: this model computes something else from a static cache')
        return cache, step
    static = StaticCache(cache, at)
    return static, Recorded(static, step)


def length_to_read(n, most):
    """128, 256, 512, ...: the first that has room for n positions, at most `most`."""
    length = SHORTEST
    while length < n:
        length *= 2
    return min(length, most)


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
    """A step that becomes a graph for each length of the cache that it reads, on CUDA."""

    def __init__(self, cache, step):
        self.cache, self.step = cache, step
        self.graphs, self.n_calls = {}, {}  # of each length

    def __call__(self):
        cache = self.cache
        n = cache.n_read = length_to_read(cache.length + 1, cache.n_positions)
        self.n_calls[n] = self.n_calls.get(n, 0) + 1
        n_eager = 1 if self.graphs else N_EAGER
        if n not in self.graphs and cache.at.is_cuda and self.n_calls[n] > n_eager:
            self.graphs[n] = self.record()
        if n in self.graphs:
            self.graphs[n].replay()
        else:
            self.whole_step()
        cache.length += 1

    def whole_step(self):
        """Without autocast's cache: its weights in 16 bits end with this call. In the first calls too, or
        torch.compile would make other code while the step is recorded, which fails."""
        is_cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self.cache.begin()
            self.step()
        finally:
            torch.set_autocast_cache_enabled(is_cached)

    def record(self):
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool, capture_error_mode='thread_local'):  # threads may copy batches
            self.whole_step()  # recorded, not computed
        return graph


class StaticCache(KVCache):
    """A KVCache that appends one position at a time by the same operations on the same memory: the position
    is a tensor, and attention sees all positions through a mask."""

    def __init__(self, cache, at):
        """cache: the KVCache of the prompt, whose memory it takes over. at: one more than the position."""
        super().__init__(cache.n_positions)
        self.length, self.kv, self.ids, self.at = cache.length, cache.kv, cache.last_ids, at
        self.dtype = next(iter(cache.kv.values()))[0].dtype
        self.all = torch.arange(cache.n_positions, device=at.device)
        self.n_read = cache.n_positions  # positions that attention reads

    def load(self, cache):
        """Take the positions of another KVCache into this one's memory."""
        self.length = n = cache.length
        for layer, kv in cache.kv.items():
            for own, other in zip(self.kv[layer], kv):
                own[:, :, :n].copy_(other[:, :, :n])
                own[:, :, n:].zero_()
        self.last_ids = cache.last_ids

    def begin(self):
        """What all layers of a step need."""
        self.angles = None  # of the position before
        self.now = self.at - 1  # (1,)
        is_later = self.all[:self.n_read] > self.now[:, None]  # (1, n_read)
        self.visible = is_later.to(self.dtype).masked_fill(is_later, -math.inf)

    def positions(self, T, device):
        return self.now

    def append(self, layer, k, v):
        """k, v: (B, n_kv_head, 1, hs) -> keys, values, (B, n_kv_head, n_read, hs)"""
        return [t.index_copy_(2, self.now, new).narrow(2, 0, self.n_read)
                for t, new in zip(self.kv[layer], (k, v))]

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


# ---------------------------------------------------------------------------- kept for later calls

KEPT = weakref.WeakKeyDictionary()  # {model: {shape: Kept}}, while no call uses them


class Kept:
    """The memory of texts of one shape, and a step recorded on it."""

    def __init__(self, rows, cache, step):
        self.cache, self.step = cache, step
        self.memory = {name: getattr(rows, name) for name in ('ids', 'keys', 'at', 'given')}

    def load(self, rows, cache, step):
        """Have other rows and their cache use this memory."""
        for name, own in self.memory.items():
            if own is not None:
                own.copy_(getattr(rows, name))
                setattr(rows, name, own)
        self.cache.load(cache)
        self.step.step = step


def shape_of(model, rows, n_positions):
    """All that a recording has in it as constants."""
    device_type = rows.ids.device.type
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    sampling = replace(rows.sampling, max_new_tokens=0, seed=0, stop=None)
    weights = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    return (*rows.ids.shape, n_positions, sampling, rows.n_vocab, rows.given is None, model.training,
            autocast, str(model.config), weights)


def take(model, shape):
    """The Kept of a shape, which is then the caller's alone; None if there is none."""
    return KEPT.get(model, {}).pop(shape, None)


def give_back(model, shape, kept):
    kept.step.step = None  # it holds the model
    of_model = KEPT.setdefault(model, {})
    of_model[shape] = kept
    if len(of_model) > MOST_KEPT:
        of_model.pop(next(iter(of_model)))
