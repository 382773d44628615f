"""
Faster matrix products on a CPU, put into a model from outside.

    use_fast_products(model, run)        # for training and evaluation
    with fast_linears(model, n_rows=1):  # for decoding
        ...
"""

import functools
import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from model import MLP
from support.training.fsdp import is_sharded
from support.machine.hardware import OneDNN, prefers_onednn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
MAX_PACKED = 1 << 30  # bytes of weights to copy into oneDNN's layout
MAX_SCORES = 1 << 22  # of a layer, kept for the backward pass: 16 MB


def use_fast_products(model, run):
    """Have the products of linear layers, and in training those of attention, made by the fastest exact
    library of this CPU. In bfloat16 attention trains in float32, where it is fast. Changes nothing on other
    devices and for compiled models."""
    if run.device_type != 'cpu' or run.compile:
        return
    if run.dtype == 'float32' and prefers_onednn():
        for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            linear.forward = partial(onednn_forward, linear)
    for block in model.transformer.h if model.config.attn_type == 'SM' else ():
        if prefers_onednn():
            block.attn.attend = partial(attend_at_once, block.attn.attend)
        if run.dtype == 'bfloat16':
            block.attn.attend = partial(attend_in_float32, block.attn.attend)


def onednn_forward(linear, x):
    """nn.Linear.forward. The flag is on for its product only: PyTorch's own attention is slower with it."""
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, linear.weight, linear.bias)
    with OneDNN():
        return F.linear(x, linear.weight, linear.bias)


class OneDNNLinear(torch.autograd.Function):
    """x w^T + b. x: (..., inputs), w: (outputs, inputs), b: (outputs,) or None -> (..., outputs)"""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        ctx.has_bias = b is not None
        with OneDNN():
            return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        g = grad.flatten(0, -2)  # (N, outputs)
        with OneDNN():
            dx = (g @ w).view(x.shape) if ctx.needs_input_grad[0] else None
            dw = g.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw, g.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[2] else None


def attend_in_float32(attend, q, k, v, *args):
    """Attention whose backward pass is slow in bfloat16 on a CPU."""
    if not torch.is_grad_enabled():
        return attend(q, k, v, *args)
    with torch.autocast('cpu', enabled=False):
        return attend(q.float(), k.float(), v.float(), *args).to(v.dtype)


def attend_at_once(attend, q, k, v, dropout=0.0, bias=None):
    """softmax_attention by whole products for each head, where all scores fit into MAX_SCORES."""
    B, nh, T, hs = q.shape
    if not torch.is_grad_enabled() or dropout or bias is not None or B * nh * T * T > MAX_SCORES:
        return attend(q, k, v, dropout, bias)
    return OneDNNAttention.apply(q, k, v)


@functools.lru_cache(maxsize=4)
def causal_mask(T, n_shared):
    """(n_shared T, T), to add to scores: 0 for earlier keys, -inf for later ones"""
    return torch.full((T, T), -math.inf).triu(1).repeat(n_shared, 1)


class OneDNNAttention(torch.autograd.Function):
    """Causal softmax attention. q: (B, nh, T, hs), k, v: (B, n_kv_head, T, hs) -> (B, nh, T, hs)

    Queries that share a key's head lie one below the other, so each head is one product.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        B, nh, T, hs = ctx.shape = q.shape
        q = q.reshape(-1, nh // k.shape[1] * T, hs)  # (B n_kv_head, n_shared T, hs)
        k, v = k.reshape(-1, T, hs), v.reshape(-1, T, hs)
        with OneDNN():
            p = torch.baddbmm(causal_mask(T, q.shape[1] // T), q, k.mT, alpha=hs ** -0.5).softmax(dim=-1)
            y = p @ v
        ctx.save_for_backward(q, k, v, p)
        return y.view(B, nh, T, hs)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        B, nh, T, hs = ctx.shape
        g = grad.reshape(q.shape)
        with OneDNN():
            dv = p.mT @ g
            ds = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype).mul_(hs ** -0.5)
            dq, dk = ds @ k, ds.mT @ q
        return dq.view(ctx.shape), dk.view(B, -1, T, hs), dv.view(B, -1, T, hs)


@contextmanager
def fast_linears(model, n_rows):
    """Use faster, equivalent linear kernels while decoding n_rows positions at a time.

    Under autocast the weights are cast once, not at each position. In float32 on a CPU oneDNN multiplies: it
    uses all cores for a few rows, the default library only one. It applies the GELU after a layer in passing,
    and for several rows it gets a copy of the weights in its own layout.
    """
    linears = [] if is_sharded(model) else [m for m in model.modules() if isinstance(m, nn.Linear) and (
        'forward' not in m.__dict__ or getattr(m.forward, 'func', None) is onednn_forward)]
    gelus = {m.c_fc: m.gelu for m in model.modules() if isinstance(m, MLP) and type(m.gelu) is nn.GELU
             and 'forward' not in m.gelu.__dict__ and not is_watched(m.c_fc) and not is_watched(m.gelu)}
    before = {m: m.__dict__.get('forward') for m in (*linears, *gelus.values())}
    packing = n_rows > 1 and sum(m.weight.nbytes for m in linears) <= MAX_PACKED
    is_plain = not is_compiled(model)  # a compiler chooses for itself
    for m in linears:
        kind, w, b = m.weight.device.type, m.weight, m.bias
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            m.forward = partial(F.linear, weight=w.to(dtype), bias=b if b is None else b.to(dtype))
        elif HAS_ONEDNN and kind == 'cpu' and w.dtype == torch.float32 and is_plain:
            w = torch.ops.mkldnn._reorder_linear_weight(w, n_rows) if packing else w
            m.forward = partial(onednn_linear, weight=w, bias=b, gelu=gelus.get(m))
            if m in gelus:
                gelus[m].forward = nn.Identity().forward
    try:
        yield
    finally:
        for m, forward in before.items():
            m.__dict__.pop('forward', None)
            if forward is not None:
                m.forward = forward


def is_compiled(model):
    return getattr(model, '_compiled_call_impl', None) is not None


def is_watched(module):
    return module._forward_hooks or module._forward_pre_hooks


def onednn_linear(x, weight, bias, gelu=None):
    if gelu is None:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, 'none', [], '')
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, 'gelu', [], gelu.approximate)
