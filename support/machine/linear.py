"""
Linear layers for a CPU, put in the place of a model's own: the same product, made by a faster library.

    use_cpu_linears(model, run)      # print(model) then shows CPULinear
    keep_weights(model, n_rows=10)   # they no longer change: for sampling ten texts at a time

PyTorch's default library, MKL, uses AVX-512 on Intel's processors only, and one core for the few rows of a
decoding step. oneDNN uses both on any, but prepares each call for longer than a small product takes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from support.machine.console import print0
from support.machine.hardware import OneDNN, prefers_onednn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
FEW_ROWS = 64  # of an input
SMALL = 1 << 18  # multiplications of a product that the default library finishes first
MAX_PACKED = 1 << 30  # bytes of weights to copy into oneDNN's layout


class CPULinear(nn.Linear):
    kept = None  # the weight, perhaps in oneDNN's layout, after keep_weights

    def forward(self, x):
        if self.kept is not None and not torch.is_grad_enabled():
            return few_rows(x, self.kept, self.bias)
        return product(x, self.weight, self.bias)


def use_cpu_linears(model, run, quiet=False):
    """Replace a model's plain linear layers, if it computes in float32 on a CPU and isn't compiled; prints a
    line about it unless quiet."""
    if not HAS_ONEDNN or run.device_type != 'cpu' or run.dtype != 'float32' or run.compile:
        return
    n = replace_linears(model, CPULinear)
    if quiet or n == 0:
        return
    print0(f'linear layers: {n} of CPULinear (support/machine/linear.py), products by '
           f'{"oneDNN" if prefers_onednn() else "the default library, of a few rows by oneDNN"}')


def replace_linears(model, kind):
    """Put a layer of a class derived from nn.Linear, with the same parameters, in the place of each plain
    one. One that somebody watches or has changed stays. Returns their number."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if is_plain(child)]
    for parent, name, old in found:
        new = kind.__new__(kind)  # its constructor would make weights to throw away
        nn.Module.__init__(new)
        new.in_features, new.out_features = old.in_features, old.out_features
        new.weight = old.weight
        new.register_parameter('bias', old.bias)
        setattr(parent, name, new.train(old.training))
    return len(found)


def is_plain(module):
    return type(module) is nn.Linear and 'forward' not in vars(module) and not is_watched(module)


def is_watched(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def keep_weights(model, n_rows):
    """Have oneDNN make the larger products of n_rows rows, from copies of the weights in its own layout if
    there are several rows and the copies fit. The weights must not change after it."""
    layers = [m for m in model.modules() if isinstance(m, CPULinear)]
    has_copies = n_rows > 1 and sum(m.weight.nbytes for m in layers) <= MAX_PACKED
    for layer in layers:
        weight = layer.weight.detach()
        if has_copies:
            layer.kept = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
        elif n_rows * weight.numel() >= SMALL:
            layer.kept = weight


def product(x, w, b):
    """x w^T + b. x: (..., inputs), w: (outputs, inputs), b: (outputs,) or None -> (..., outputs)"""
    is_plain_float32 = x.dtype == w.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    if not is_plain_float32 or not x.is_cpu:
        return F.linear(x, w, b)
    if torch.is_grad_enabled():
        return OneDNNProduct.apply(x, w, b) if prefers_onednn() else F.linear(x, w, b)
    n_rows = x.numel() // x.shape[-1]
    if n_rows * w.numel() < SMALL:
        return F.linear(x, w, b)
    if n_rows <= FEW_ROWS:
        return few_rows(x, w, b)
    if not prefers_onednn():
        return F.linear(x, w, b)
    with OneDNN():  # for its product only: PyTorch's own attention is slower under that flag
        return F.linear(x, w, b)


def few_rows(x, w, b):
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), w, b, 'none', [], '')


class OneDNNProduct(torch.autograd.Function):
    """`product` with gradients, by oneDNN."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        ctx.has_bias = b is not None
        with OneDNN():
            return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, outputs)
        dx = dw = db = None
        with OneDNN():
            if ctx.needs_input_grad[0]:
                dx = (rows @ w).view(x.shape)
            if ctx.needs_input_grad[1]:
                dw = rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = rows.sum(dim=0)
        return dx, dw, db
