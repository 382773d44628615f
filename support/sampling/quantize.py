"""
Models with 8-bit or 4-bit weights, for sampling and evaluation: less memory to hold, and to read for
each token.

    model = build_quantized(config, named_weights, 'int8')   # one tensor at a time: little memory
    model = build_quantized(model.config, model.state_dict().items(), 'int4')

int8: a row of a weight matrix, which makes one output, is int8 numbers times a scale: w = scale q,
with scale = max |w| / 127 (Dettmers et al. 2022, "LLM.int8()", section 2.1, of weights only).

int4: a group of 32 inputs of a row is 4-bit numbers times a scale, plus a constant: w = scale (q - 8)
+ zero, where q = 0 is the group's least weight and q = 15 its largest.

Of an int8 model all linear layers and the token embedding are int8. Of an int4 model the blocks'
linear layers are int4, if their sizes fit; the output layer and the token embedding, in which 4 bits
cost the most loss, are int8. Positions, n-grams, norms and biases stay as they are.
"""

import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from support.errors import UserError
from support.machine.linear import HAS_FBGEMM, as_operator
from support.machine.runtime import return_freed_memory

WEIGHTS = ('full', 'int8', 'int4')
PIECE = 1 << 18  # weights quantised at once, so that temporary tensors stay small
GROUP = 32  # inputs of a row that share an int4 scale
DIGIT = 63  # largest digit of an activation: two products add up to 16 bits on older processors
SMALL = 1 << 20  # weights that stay in a cache, where PyTorch's own int8 product is as fast
FEW_ROWS = 32  # of an input to PyTorch's own int8 product; for more, bfloat16 is faster
HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
TINY = torch.finfo(torch.float32).tiny


def check_weights(weights):
    """ValueError unless it is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UserError(f'weights={weights} is not one of {", ".join(WEIGHTS)}')


# ---------------------------------------------------------------------------- numbers

@torch.no_grad()
def quantize(weight):
    """weight: (out, in) -> int8 of the same shape, and scales, (out,) float32, bfloat16 numbers"""
    int8 = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    n = max(1, PIECE // weight.shape[1])  # rows
    for rows, int8_rows, scales in zip(weight.split(n), int8.split(n), scale.split(n)):
        rows = rows.float()
        exact = (rows.abs().amax(dim=1) / 127).clamp(min=TINY)
        scales.copy_((exact * (1 + 2**-8)).bfloat16())  # not rounded down
        int8_rows.copy_((rows / scales[:, None]).round())
    return int8, scale


@torch.no_grad()
def quantize4(weight):
    """weight: (out, in) -> uint8 of the same shape, from 0 to 15, and scales and zeros,
    (in / GROUP, out, 2) bfloat16"""
    n_out, n_in = weight.shape
    uint4 = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n_out, n_in // GROUP, 2, dtype=torch.bfloat16, device=weight.device)
    n = max(1, PIECE // n_in)  # rows
    for rows, uint4_rows, scales in zip(weight.split(n), uint4.split(n), scale.split(n)):
        groups = rows.float().unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2, keepdim=True)
        step = ((high - low) / 15).clamp(min=TINY)
        scales.copy_(torch.cat((step, low + 8 * step), dim=2))
        step, zero = scales.float().split(1, dim=2)  # as they were rounded
        uint4_rows.copy_(((groups - zero) / step + 8).round().clamp(0, 15).flatten(1))
    return uint4, scale.transpose(0, 1).contiguous()


def in_digits(x):
    """x: (N, ..., in) -> digits, (2 N, ..., in) from -DIGIT to DIGIT, and steps, (N, ..., 1). A row of x is
    its step times its first digits plus, over 2 DIGIT, its second, which are rounded by who uses them."""
    step = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).mul_(1 / DIGIT)
    x = x / step.clamp_(min=TINY)
    first = x.round()
    return torch.cat((first, (x - first).mul_(2 * DIGIT))), step


# ---------------------------------------------------------------------------- layers

class QuantizedLinear(nn.Module):
    """A linear layer whose weight, (out, in), is small integers and scales. Not for training.

    On a CPU a library's product reads the integers in an order of its own. They are brought into it
    at the first use, and the others are dropped: `weight` then has a shape and no memory.
    """
    hidden = None  # `multiply` as an operator, within compiled code

    def __init__(self, linear, dtype, scale, is_tied=False):
        """scale: a tensor like the scales to load. is_tied: an embedding has the same weight."""
        super().__init__()
        weight = torch.empty_like(linear.weight, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer('scale', scale)
        self.bias, self.is_tied, self.packed = linear.bias, is_tied, None

    def forward(self, x):
        """x: (..., in) -> (..., out), in autocast's type or, without autocast, in that of x"""
        assert not x.requires_grad, 'quantised weights are not for training'
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if self.packed is None and kind == 'cpu' and self.has_product():
            self.keep_packed()
        if self.packed is not None:
            return self.product(x).to(dtype)
        return self.plain_product(x, dtype).to(dtype)

    def keep_packed(self):
        self.packed = self.pack()
        if not self.is_tied:
            self.weight = nn.Parameter(self.weight.to('meta'), requires_grad=False)
        return_freed_memory()

    def hide_product(self):
        """From torch.compile, see as_operator."""
        if self.packed is None and self.has_product():
            self.keep_packed()
        self.hidden = as_operator(self.multiply, len(self.weight))

    def plain_product(self, x, dtype):
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.full_weight().to(dtype), bias)


class Int8Linear(QuantizedLinear):
    """The weight, (out, in), is int8 times scale, (out,)."""
    scale16 = None  # in bfloat16, for PyTorch's own product

    def __init__(self, linear, is_tied=False):
        scale = linear.weight.new_empty(len(linear.weight))
        super().__init__(linear, torch.int8, scale, is_tied)

    def full_weight(self):
        return self.weight * self.scale[:, None]

    def has_product(self):
        return FBGEMM is not None and self.weight.numel() >= SMALL

    def pack(self):
        return fbgemm_weight(self.weight, self.scale)

    def product(self, x):
        """x: (..., in) -> (..., out) float32. Sums of integers are exact, so a row's don't depend on
        other rows."""
        digits, step = in_digits(x.float())
        y = torch.add(*(self.hidden or self.multiply)(digits).chunk(2), alpha=0.5 / DIGIT)
        return y.mul_(step) if self.bias is None else torch.addcmul(self.bias, y, step)

    def multiply(self, x):
        """The libraries' products, without scales: of digits, or of rows, (N, in) bfloat16."""
        if self.packed is not None:
            return FBGEMM(x, 1.0, DIGIT + 1, self.packed)
        if self.scale16 is None:
            self.scale16 = self.scale.bfloat16()
        return INT8PACK(x, self.weight, self.scale16)

    def plain_product(self, x, dtype):
        if dtype == torch.float16:  # without its scale a product may exceed float16
            return super().plain_product(x, dtype)
        is_cpu = x.device.type == 'cpu'
        if is_cpu and can_use_int8pack(x):
            rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
            y = (self.hidden or self.multiply)(rows).view(*x.shape[:-1], -1)
            return y if self.bias is None else self.bias + y
        factor = torch.bfloat16 if is_cpu and HAS_BF16 else dtype
        y = F.linear(x.to(factor), self.weight.to(factor))  # a compiler fuses the conversion
        return y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)


class Int4Linear(QuantizedLinear):
    """The weight, (out, in), is 4-bit numbers with a scale and a zero for each GROUP inputs."""

    def __init__(self, linear):
        n_out, n_in = linear.weight.shape
        scale = linear.weight.new_empty(n_in // GROUP, n_out, 2, dtype=torch.bfloat16)
        super().__init__(linear, torch.uint8, scale)

    def full_weight(self):
        scale, zero = self.scale.float().permute(2, 1, 0)[..., None]  # (out, in / GROUP, 1) each
        groups = self.weight.float().unflatten(1, (-1, GROUP))
        return ((groups - 8) * scale + zero).flatten(1)

    def has_product(self):
        return INT4PACK is not None

    def pack(self):
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.weight.int(), 1)

    def product(self, x):
        """x: (..., in) -> (..., out), of bfloat16 numbers, summed in float32"""
        y = (self.hidden or self.multiply)(x.bfloat16().flatten(0, -2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else self.bias + y

    def multiply(self, x):
        return INT4PACK(x, self.packed, GROUP, self.scale)


class Int8Embedding(nn.Module):
    """An embedding whose table, (rows, C), is int8 times scale, (rows,). Not for training."""

    def __init__(self, embedding):
        super().__init__()
        weight = torch.empty_like(embedding.weight, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer('scale', embedding.weight.new_empty(len(weight)))

    def forward(self, idx):
        """idx: (B, T) -> (B, T, C) float32"""
        return F.embedding(idx, self.weight) * F.embedding(idx, self.scale[:, None])


# ---------------------------------------------------------------------------- libraries

def operator(namespace, name):
    """An operator of PyTorch's, None where this PyTorch lacks it."""
    return getattr(namespace, name).default if hasattr(namespace, name) else None


FBGEMM = None  # its int8 product; PyTorch has announced to remove the tensors that it takes
if HAS_FBGEMM:
    FBGEMM = operator(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32')
INT8PACK = None if sys.platform == 'win32' else operator(torch.ops.aten, '_weight_int8pack_mm')  # slow there
INT4PACK = operator(torch.ops.aten, '_weight_int4pack_mm_for_cpu')


def fbgemm_weight(weight, scale):
    """An int8 weight in FBGEMM's order, with its scales."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the removal
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        q = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(q, None)


def can_use_int8pack(x):
    """Whether PyTorch's own int8 product computes with x: (..., in), and pays."""
    is_whole = x.shape[-1] % 16 == 0  # it doesn't check for a remainder
    return INT8PACK is not None and is_whole and x.numel() <= FEW_ROWS * x.shape[-1]


# ---------------------------------------------------------------------------- models

def build_quantized(config, named_weights, weights):
    """A GPT in evaluation mode from (name, tensor) pairs of a GPT's state dict. weights: 'int8' or
    'int4'. Each tensor is quantised or copied as it comes, so that the pairs need not be in memory
    together."""
    with torch.device('meta'):  # shapes without memory
        model = GPT(config).requires_grad_(False)
    is_tied = model.lm_head.weight is model.transformer.wte.weight
    replace_layers(model, weights, is_tied)
    layers, state = dict(model.named_modules()), {}
    for name, tensor in named_weights:
        layer, _, kind = name.rpartition('.')
        if layer == 'lm_head' and is_tied:
            continue
        if kind == 'weight' and isinstance(layers[layer], Int4Linear):
            state[name], state[f'{layer}.scale'] = quantize4(tensor)
        elif kind == 'weight' and isinstance(layers[layer], (Int8Linear, Int8Embedding)):
            state[name], state[f'{layer}.scale'] = quantize(tensor)
        else:
            state[name] = tensor.detach().to(torch.float32, copy=True)
    head, wte = model.lm_head, model.transformer.wte
    if is_tied:
        state['lm_head.weight'] = state['transformer.wte.weight']
        state['lm_head.scale'] = state['transformer.wte.scale']
    model.load_state_dict(state, assign=True)
    if is_tied:
        head.weight, head.scale = wte.weight, wte.scale
    return model.eval()


def replace_layers(model, weights, is_tied):
    """Put quantised layers in the place of a model's linear layers and its token embedding."""
    for parent in [*model.modules()]:
        for name, module in [*parent.named_children()]:
            if module is model.lm_head:
                setattr(parent, name, Int8Linear(module, is_tied))
            elif type(module) is nn.Linear and weights == 'int4' and fits_int4(module):
                setattr(parent, name, Int4Linear(module))
            elif type(module) is nn.Linear:
                setattr(parent, name, Int8Linear(module))
    model.transformer.wte = Int8Embedding(model.transformer.wte)


def fits_int4(linear):
    return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0
