"""Faster matrix products, put into a model's linear layers from outside."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from support.machine.fsdp import is_sharded

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
MAX_PACKED = 1 << 30  # bytes of weights to copy into oneDNN's layout


@contextmanager
def fast_linears(model, n_rows):
    """Use faster, equivalent linear kernels while decoding n_rows positions at a time.

    Under autocast the weights are cast once, not at each position. In float32 on a CPU oneDNN multiplies: it
    uses all cores for a few rows, the default library only one. For several rows it gets a copy of the
    weights in its own layout.
    """
    linears = [] if is_sharded(model) else [
        m for m in model.modules() if isinstance(m, nn.Linear) and 'forward' not in m.__dict__]
    packing = n_rows > 1 and sum(m.weight.nbytes for m in linears) <= MAX_PACKED
    is_compiled = getattr(model, '_compiled_call_impl', None) is not None  # the compiler chooses for itself
    for m in linears:
        kind, w, b = m.weight.device.type, m.weight, m.bias
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            m.forward = partial(F.linear, weight=w.to(dtype), bias=b if b is None else b.to(dtype))
        elif HAS_ONEDNN and kind == 'cpu' and w.dtype == torch.float32 and not is_compiled:
            w = torch.ops.mkldnn._reorder_linear_weight(w, n_rows) if packing else w
            m.forward = partial(onednn_linear, weight=w, bias=b)
    try:
        yield
    finally:
        for m in linears:
            m.__dict__.pop('forward', None)


def onednn_linear(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, 'none', [], '')
