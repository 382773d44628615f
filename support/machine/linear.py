"""
Linear layers for a CPU, put in the place of a model's own: the same product, made by a faster library.

    use_cpu_linears(model, run)                    # print(model) then shows CPULinear
    keep_weights(model, n_rows=10, n_steps=500)    # they no longer change: for sampling ten texts at a time

PyTorch's default library, MKL, uses AVX-512 on Intel's processors only, and one core for the few rows of a
decoding step. oneDNN uses both on any, but prepares each call for longer than a small product takes. FBGEMM
multiplies float32 rows with a float16 matrix, for a row or a few at a higher rate than either.
"""

import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F

from support.machine.console import print0
from support.machine.hardware import OneDNN, prefers_onednn
from support.machine.runtime import return_freed_memory

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
HAS_FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines  # PyTorch has announced its removal
FEW_ROWS = 64  # of an input
SMALL = 1 << 18  # multiplications of a product that the default library finishes first
MAX_PACKED = 1 << 30  # bytes of weights to copy into a library's layout
MOST_ROWS = 3  # that two float16 matrices multiply faster than oneDNN one float32 matrix
MANY_STEPS = 500  # products after which the time to make two float16 matrices has paid


class CPULinear(nn.Linear):
    """x: (..., inputs) -> (..., outputs). The weight may have 16 bits, as its file has it."""
    kept = None  # Kept or Halves, after keep_weights

    def forward(self, x):
        if self.kept is not None and (not torch.is_grad_enabled() or self.weight.is_meta):
            return self.kept(x)
        return self.own_product(x)

    def own_product(self, x):
        return product(x, self.weight.to(x.dtype), self.bias)

    def hide_product(self):
        """From torch.compile, see as_operator."""
        self.kept = as_operator(self.kept or self.own_product, self.out_features)


def has_cpu_linears(run):
    """Whether linear layers of a run are CPULinears: in float32 on a CPU, not compiled."""
    return HAS_ONEDNN and run.device_type == 'cpu' and run.dtype == 'float32' and not run.compile


def use_cpu_linears(model, run, quiet=False):
    """Replace a model's plain linear layers where a run has_cpu_linears; prints a line about it unless
    quiet."""
    if not has_cpu_linears(run):
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


# ---------------------------------------------------------------------------- weights that stay as they are

def keep_weights(model, n_rows, n_steps):
    """Have the larger products of n_rows rows made from copies of the weights in a library's own layout,
    where that pays within n_steps of them. The weights must not change after it. A layer that one float16
    copy is enough for lets go of its weight, which then has a shape and no memory."""
    layers = [m for m in model.modules() if isinstance(m, CPULinear) and m.kept is None]
    has_copies = sum(m.weight.nbytes for m in layers) <= MAX_PACKED
    has_two = has_copies and n_rows <= MOST_ROWS and n_steps >= MANY_STEPS

    def keep(layer):
        weight, halves = layer.weight.detach(), None
        is_large = n_rows * weight.numel() >= SMALL
        if is_large and HAS_FBGEMM:
            halves = in_halves(weight, 2 if has_two else 1)
        if halves is not None and len(halves) == len(weight):
            layer.weight = nn.Parameter(weight.to('meta'), requires_grad=False)
        elif weight.dtype != torch.float32:
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        if halves is not None:
            layer.kept = Halves(layer, halves)
        elif is_large:
            layer.kept = Kept(layer, n_rows if has_copies else 1)
        del weight, halves
        return_freed_memory()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(keep, layers))


def in_halves(weight, most):
    """float16 numbers, in float32, that hold a weight, (out, in): itself, (out, in), or, where that isn't
    enough and `most` is 2, a sum of two, (2 out, in), the second 2^11 times as large; else None. One is
    enough for numbers of 16 bits, of which float16 rounds the smallest only."""
    half = weight.half()
    largest = half.abs().max().float()
    if not 2**-12 < largest < math.inf:
        return None  # beyond the range of float16
    pieces = zip(weight.split(256), half.split(256))
    if all((piece - rounded).abs().max() <= 2**-20 * largest for piece, rounded in pieces):
        return half.float()
    if most == 1:
        return None
    halves = weight.new_empty(2 * len(weight), weight.shape[1], dtype=torch.float32)
    high, low = halves.split(len(weight))
    high.copy_(half)
    torch.sub(weight, high, out=low).mul_(2**11)
    return halves


class Kept:
    """oneDNN's product of few rows, with a weight in its own layout if n_rows > 1."""

    def __init__(self, layer, n_rows):
        self.weight, self.bias = layer.weight.detach(), layer.bias
        if n_rows > 1:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, n_rows)

    def __call__(self, x):
        return few_rows(x, self.weight, self.bias)


class Halves:
    """FBGEMM's product with a weight in float16, or the sum of two, which hold nearly all of float32's 24
    bits. See in_halves."""

    def __init__(self, layer, halves):
        self.layer, self.n_outputs, self.is_sum = layer, layer.out_features, len(halves) > layer.out_features
        bias = layer.bias
        if bias is not None and self.is_sum:
            bias = F.pad(bias, (0, len(bias)))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a removal
            self.packed = torch.ops.quantized.linear_prepack_fp16(halves, bias)

    def __call__(self, x):
        if self.is_sum and x.numel() > MOST_ROWS * x.shape[-1]:
            return self.layer.own_product(x)
        y = torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)
        if not self.is_sum:
            return y
        n = self.n_outputs
        return torch.add(y.narrow(-1, 0, n), y.narrow(-1, n, n), alpha=2**-11)


# ---------------------------------------------------------------------------- within compiled code

PRODUCTS = []  # functions of x


@functools.cache
def operators():
    """Our library of operators, whose results torch.compile knows by their shapes alone."""
    library = torch.library.Library('gpt', 'DEF')
    library.define('product(Tensor x, int number, int n_outputs) -> Tensor')
    library.impl('product', lambda x, number, n_outputs: PRODUCTS[number](x), 'CPU')
    library.impl('product', lambda x, number, n_outputs: x.new_empty(*x.shape[:-1], n_outputs), 'Meta')
    return library


def as_operator(product, n_outputs):
    """A library's product, a function of x, (..., inputs) -> (..., n_outputs) of x's type, as an operator
    that torch.compile calls as it is: it can't look into such a library, and its own products of one row are
    slower."""
    operators()
    PRODUCTS.append(product)
    number = len(PRODUCTS) - 1
    return lambda x: torch.ops.gpt.product(x, number, n_outputs)


# ---------------------------------------------------------------------------- products

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
