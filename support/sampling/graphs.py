"""
A decoding step recorded once and then repeated on the same memory, without the Python of the model's layers:
on CUDA as a CUDA graph, on a CPU as a list of operators.

    cache = StaticCache(cache, at)  # what a recording needs to know is in tensors: it freezes numbers
    step = Recorded(step, cache, device)
    with folded_queries(model):
        step()  # the next position
"""

import math
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import KVCache
from support.training.fsdp import is_sharded
from support.machine.linear import is_compiled, is_watched

N_EAGER = 3  # the call that is recorded first; libraries choose their kernels in those before
REACH = 64  # positions that a CPU's recording serves: its attention reads all their keys each time
COPY = torch.ops.aten.copy_.default
CONVERSIONS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}  # each one copy when repeated
NOT_REPEATABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # values known to Python


def can_record(model, device, n_rows):
    """Whether a position can be recorded: attention must take a mask, the model be whole, and nobody watch
    its layers, which a recording doesn't call. On a CPU it pays for a single row, unless a compiler is at
    work: the more rows, the more there is to read from memory beside Python's work."""
    if device.type == 'cpu' and (n_rows > 1 or is_compiled(model)):
        return False
    return device.type in ('cpu', 'cuda') and model.config.attn_type == 'SM' and not is_sharded(model) \
        and not any(is_watched(m) for m in model.modules())


class Recorded:
    """A step that appends a position to a StaticCache; when called, it runs or is repeated."""

    def __init__(self, step, cache, device):
        self.step = self.repeat = step
        self.cache, self.device, self.n_calls = cache, device, 0
        self.next = N_EAGER  # the call to record

    def __call__(self):
        self.n_calls += 1
        if self.n_calls < self.next:
            self.repeat()
        else:
            self.next += REACH if self.device.type == 'cpu' else self.cache.n_positions
            self.cache.n_keys = min(self.cache.n_positions, self.cache.length + self.next)
            self.repeat = record(self.step, self.device)


def record(step, device):
    """Run step(), and return a function that repeats its operators on the same tensors."""
    if device.type == 'cuda':
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):  # other threads may copy batches
            step()
        graph.replay()  # the capture itself computes nothing
        return graph.replay
    tape = Tape()
    with tape:
        step()
    return tape.repeat if tape.is_complete else step


class Tape(TorchDispatchMode):
    """The operators that run within a with statement, in order. `repeat` calls each on the arguments that it
    had and writes what it makes over what it made."""

    def __init__(self):
        super().__init__()
        self.calls = []  # (operator, arguments, named arguments, what it made: a tensor or a tuple of them)
        self.is_complete = True

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # to be skipped, PyTorch would import its compiler, which takes a second

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        made, given = list(tensors_in((result,))), {memory_of(t) for t in tensors_in(args)}
        is_view = all(memory_of(t) in given for t in made)  # of memory that other operators keep up to date
        if op in CONVERSIONS and not is_view:
            self.calls.append((COPY, (result, args[0]), {}, ()))
        elif op._schema.is_mutable or not is_view:
            self.calls.append((op, args, kwargs or {}, () if is_view else result))
        if not made or NOT_REPEATABLE & set(op.tags):
            self.is_complete = False
        return result

    def repeat(self):
        with torch.autocast('cpu', enabled=False):  # which has already chosen the arguments' types
            for op, args, kwargs, made in self.calls:
                result = op(*args, **kwargs)
                if isinstance(made, torch.Tensor):
                    made.copy_(result)
                else:
                    for old, new in zip(made, result):
                        old.copy_(new)


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def memory_of(tensor):
    """The same for tensors that share memory. Weights in oneDNN's own layout have none to ask for."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class StaticCache(KVCache):
    """A KVCache that appends one position at a time by the same operations on the same memory, which can be
    recorded: the position is a tensor, and attention sees the first n_keys positions through a mask."""

    def __init__(self, cache, at):
        """cache: the KVCache of the prompt, whose memory it takes over. at: (1,) int64, on the device."""
        super().__init__(cache.n_positions)
        self.length, self.kv, self.at, self.ids = cache.length, cache.kv, at, cache.last_ids
        self.n_keys, self.dtype = cache.n_positions, next(iter(cache.kv.values()))[0].dtype
        self.positions = torch.arange(cache.n_positions, device=at.device)

    def next_positions(self, T, device):
        is_later = self.positions[:self.n_keys] > self.at[:, None]
        self.mask = is_later.to(self.dtype).masked_fill(is_later, -math.inf)  # (1, n_keys)
        return self.at, self.n_keys

    def append(self, layer, k, v):
        """k, v: (B, nh, 1, hs) -> keys, values, (B, nh, n_keys, hs), and the mask to add to the scores."""
        keys, values = (t.index_copy_(2, self.at, new) for t, new in zip(self.kv[layer], (k, v)))
        return keys[:, :, :self.n_keys], values[:, :, :self.n_keys], self.mask

    @property
    def last_ids(self):
        return self.ids

    @last_ids.setter
    def last_ids(self, ids):
        self.ids = None if ids is None else self.ids.copy_(ids)

    def advance(self, T):
        pass


@contextmanager
def folded_queries(model):
    """Within a with statement, attend from one position without grouped queries: PyTorch's fused kernels take
    a mask or grouped queries, not both."""
    config = model.config
    attentions = [block.attn for block in model.transformer.h if config.n_kv_head not in (0, config.n_head)]
    before = [attention.attend for attention in attentions]
    for attention in attentions:
        attention.attend = partial(attend_folded, attention.attend)
    try:
        yield
    finally:
        for attention, attend in zip(attentions, before):
            attention.attend = attend


def attend_folded(attend, q, k, v, dropout=0.0, bias=None):
    """attend(q, k, v, ...), where a single position's queries that share a key become positions of one head.
    q: (B, nh, T, hs), k, v: (B, n_kv_head, keys, hs), bias: (T, keys), (nh, T, keys) -> (B, nh, T, hs)"""
    if q.shape[2] > 1 or bias is None:
        return attend(q, k, v, dropout, bias)
    n_kv_head = k.shape[1]
    if bias.dim() == 3:
        bias = bias.unflatten(0, (n_kv_head, -1)).flatten(1, 2)  # (n_kv_head, nh / n_kv_head, keys)
    y = attend(q.unflatten(1, (n_kv_head, -1)).flatten(2, 3), k, v, dropout, bias)
    return y.flatten(1, 2)[:, :, None]
