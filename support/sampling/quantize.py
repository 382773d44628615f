"""
Models with 8-bit or 4-bit weights, for sampling and evaluation: less memory to hold, and to read for a token.

    model = build_quantized(config, named_weights, 'int8')    # one tensor after the other: little memory
    model = build_quantized(model.config, model.state_dict().items(), 'int4')

int8  A row of a weight matrix, which makes one output, is int8 times a scale: w = scale q, scale = max |w| / 127
      (Dettmers et al. 2022, "LLM.int8()", section 2.1, of weights only).
int4  A group of 32 inputs of a row is 4-bit times a scale, plus a constant: w = scale (q - 8) + zero, so that
      q = 0 is the group's least weight and q = 15 its largest.

All linear layers and the token embedding are int8. With int4, linear layers whose sizes fit are int4, but for
the output layer, which costs the most loss. Positions, n-grams, norms and biases stay as they are.
"""

import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from support.errors import UserError

WEIGHTS = ('full', 'int8', 'int4')
PIECE = 1 << 18  # weights quantised at once, so that temporary tensors stay small
GROUP = 32  # inputs that share an int4 scale
HALF = 63  # largest digit of an activation: sums of two products must fit into 16 bits on older processors
MAX_PACKED_ROWS = 32  # of an input to _weight_int8pack_mm; for more, a product in bfloat16 is faster
# FBGEMM's int8 product; PyTorch has announced to remove the quantised tensors that it takes
HAS_FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines \
    and hasattr(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32')
HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_weights(weights):
    """ValueError unless it is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UserError(f'weights={weights} is not one of {", ".join(WEIGHTS)}')


# ---------------------------------------------------------------------------- numbers

@torch.no_grad()
def quantize(weight):
    """weight: (out, in) -> int8 of the same shape, and scales, (out,) float32, bfloat16 numbers"""
    int8, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    int8, scale = int8.to(weight.device), scale.to(weight.device)
    n_rows = max(1, PIECE // weight.shape[1])
    for rows, int8_rows, scales in zip(weight.split(n_rows), int8.split(n_rows), scale.split(n_rows)):
        rows = rows.float()
        exact = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scales.copy_((exact * (1 + 2**-8)).bfloat16())  # a rounding error more, so it isn't rounded down
        int8_rows.copy_((rows / scales[:, None]).round())
    return int8, scale


@torch.no_grad()
def quantize4(weight):
    """weight: (out, in) -> uint8 of the same shape, from 0 to 15, and scales and zeros, (in / GROUP, out, 2)
    bfloat16"""
    n_out, n_in = weight.shape
    uint4 = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n_out, n_in // GROUP, 2, dtype=torch.bfloat16, device=weight.device)
    n_rows = max(1, PIECE // n_in)
    for rows, uint4_rows, pairs in zip(weight.split(n_rows), uint4.split(n_rows), scales.split(n_rows)):
        groups = rows.float().unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        pairs.copy_(torch.cat((scale, low + 8 * scale), dim=2))
        scale, zero = pairs.float().split(1, dim=2)  # as they were rounded
        uint4_rows.copy_(((groups - zero) / scale + 8).round().clamp(0, 15).flatten(1))
    return uint4, scales.transpose(0, 1).contiguous()


def halves(x):
    """x: (N, in) -> digits, (2 N, in) between -HALF and HALF, and steps, (N, 1). A row of x is its step times the
    first N digits plus the last N, rounded, over 2 HALF. A row's depend on itself alone."""
    step = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).mul_(1 / HALF)
    x = x / step.clamp_(min=torch.finfo(torch.float32).tiny)
    first = x.round()
    return torch.cat((first, (x - first).mul_(2 * HALF))), step


# ---------------------------------------------------------------------------- layers

class QuantizedLinear(nn.Module):
    """A linear layer whose weight, (out, in), is small integers and scales. Not for training.

    On a CPU a library's product reads the integers in an order of its own. They are brought into it at the
    first use, and the others are dropped: `weight` then has a shape and no memory.
    """

    def __init__(self, linear, dtype, scale, is_tied=False):
        """scale: a tensor like the scales to load. is_tied: an embedding has the same weight."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=dtype), requires_grad=False)
        self.register_buffer('scale', scale)
        self.bias, self.is_tied, self.packed = linear.bias, is_tied, None

    def forward(self, x):
        """x: (..., in) -> (..., out), in autocast's type or, without autocast, in that of x"""
        assert not x.requires_grad, 'quantised weights are for sampling and evaluation, not for training'
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if kind == 'cpu' and self.has_product():
            if self.packed is None:
                self.packed = self.pack()
                if not self.is_tied:
                    self.weight = nn.Parameter(self.weight.to('meta'), requires_grad=False)
            return self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1).to(dtype)
        return self.plain_product(x, dtype).to(dtype)

    def plain_product(self, x, dtype):
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.full_weight().to(dtype), bias)


class Int8Linear(QuantizedLinear):
    """The weight, (out, in), is int8 times scale, (out,)."""

    def __init__(self, linear, is_tied=False):
        super().__init__(linear, torch.int8, linear.weight.new_empty(len(linear.weight)), is_tied)

    def full_weight(self):
        return self.weight * self.scale[:, None]

    def has_product(self):
        return HAS_FBGEMM

    def pack(self):
        return fbgemm_weight(self.weight, self.scale)

    def product(self, x):
        """x: (N, in) -> (N, out) float32. Sums of integers are exact, so a row's don't depend on other rows."""
        rows, step = halves(x.float())
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, HALF + 1, self.packed)
        y = torch.add(y[:len(x)], y[len(x):], alpha=0.5 / HALF)
        return y.mul_(step) if self.bias is None else torch.addcmul(self.bias, y, step)

    def plain_product(self, x, dtype):
        if dtype == torch.float16:  # without its scale a product may exceed float16
            return super().plain_product(x, dtype)
        is_cpu = x.device.type == 'cpu'
        if is_cpu and can_pack(x):
            rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else self.bias + y
        factor = torch.bfloat16 if is_cpu and HAS_BF16 else dtype
        y = F.linear(x.to(factor), self.weight.to(factor))  # a compiler fuses the conversion
        return y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)


class Int4Linear(QuantizedLinear):
    """The weight, (out, in), is 4-bit numbers with a scale and a zero for each GROUP inputs of a row."""

    def __init__(self, linear, is_tied=False):
        n_out, n_in = linear.weight.shape
        scale = linear.weight.new_empty(n_in // GROUP, n_out, 2, dtype=torch.bfloat16)
        super().__init__(linear, torch.uint8, scale, is_tied)

    def full_weight(self):
        scale, zero = self.scale.float().permute(2, 1, 0)[..., None]  # (out, in / GROUP, 1) each
        return ((self.weight.float().unflatten(1, (-1, GROUP)) - 8) * scale + zero).flatten(1)

    def has_product(self):
        return hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu')

    def pack(self):
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.weight.int(), 1)

    def product(self, x):
        """x: (N, in) -> (N, out), of bfloat16, summed in float32"""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, GROUP, self.scale)
        return y if self.bias is None else self.bias + y


class Int8Embedding(nn.Module):
    """An embedding whose table, (rows, C), is int8 times scale, (rows,). Not for training."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(embedding.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer('scale', embedding.weight.new_empty(len(embedding.weight)))

    def forward(self, idx):
        """idx: (B, T) -> (B, T, C) float32"""
        return F.embedding(idx, self.weight) * F.embedding(idx, self.scale[:, None])


# ---------------------------------------------------------------------------- libraries



def fbgemm_weight(weight, scale):
    """An int8 weight in FBGEMM's order, with its scales."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the removal
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        q = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(q, None)


def can_pack(x):
    """Whether PyTorch's own int8 product computes with x: (..., in), and pays."""
    n_in = x.shape[-1]
    has_it = hasattr(torch.ops.aten, '_weight_int8pack_mm') and sys.platform != 'win32'  # a plain loop there
    fits = n_in % 16 == 0 and x.numel() <= MAX_PACKED_ROWS * n_in  # it doesn't check for a remainder
    return has_it and fits and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------- models

def build_quantized(config, named_weights, weights):
    """A GPT in evaluation mode from (name, tensor) pairs of a GPT's state dict. weights: 'int8' or 'int4'.
    Each tensor is quantised or copied as it comes, so the pairs need not be in memory together."""
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
    if is_tied:
        state |= {f'lm_head.{kind}': state[f'transformer.wte.{kind}'] for kind in ('weight', 'scale')}
    model.load_state_dict(state, assign=True)
    if is_tied:
        model.lm_head.weight, model.lm_head.scale = model.transformer.wte.weight, model.transformer.wte.scale
    return model.eval()


def replace_layers(model, weights, is_tied):
    """Put quantised layers in the place of a model's linear layers and its token embedding."""
    for parent in [*model.modules()]:
        for name, module in [*parent.named_children()]:
            if module is model.lm_head:
                setattr(parent, name, Int8Linear(module, is_tied))
            elif type(module) is nn.Linear:
                is_int4 = weights == 'int4' and fits_int4(module)
                setattr(parent, name, Int4Linear(module) if is_int4 else Int8Linear(module))
    model.transformer.wte = Int8Embedding(model.transformer.wte)


def fits_int4(linear):
    return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0
