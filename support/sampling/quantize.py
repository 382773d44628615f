"""
Models with 8-bit weights, for sampling and evaluation: a quarter of the memory to hold and to read.

    model = build_int8(config, named_weights)                    # one tensor after the other: little memory
    model = build_int8(model.config, model.state_dict().items())

A row of a weight matrix, which makes one output, becomes int8 times a scale: w = scale q, where scale =
max |w| / 127 (Dettmers et al. 2022, "LLM.int8()", section 2.1, of weights only), rounded up to a bfloat16
number, which is what PyTorch's packed product multiplies by. The linear layers and the token embedding are
quantised, positions, n-grams, norms and biases stay as they are.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT

from support.errors import UserError

WEIGHTS = ('full', 'int8')
HAS_PACKED = hasattr(torch.ops.aten, '_weight_int8pack_mm') and sys.platform != 'win32'  # a plain loop there
HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MAX_PACKED_ROWS = 32  # of an input; for more, a product with the weights as bfloat16 is faster
PACKED_MULTIPLE = 16  # inputs that the packed product reads at once; it doesn't check for a remainder
BEFORE_SHORT = ('c_fc', 'c_proj')  # what follows takes bfloat16: another product, or a sum
PIECE = 1 << 18  # weights quantised at once, so that temporary tensors stay small


def check_weights(weights):
    """ValueError unless it is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UserError(f'weights={weights} is not one of {", ".join(WEIGHTS)}')


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


class Int8Linear(nn.Module):
    """A linear layer whose weight, (out, in), is int8 times scale, (out,). Not for training."""

    def __init__(self, linear, keep_short=False):
        super().__init__()
        self.keep_short = keep_short
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer('scale', linear.weight.new_empty(len(linear.weight)))
        self.bias, self.short_scale = linear.bias, None

    def forward(self, x):
        """x: (..., in) -> (..., out), in autocast's type or, without autocast, in that of x; with keep_short
        a packed product stays in bfloat16"""
        assert not x.requires_grad, 'int8 weights are for sampling and evaluation, not for training'
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if kind == 'cpu' and can_pack(x):
            if self.short_scale is None:
                self.short_scale = self.scale.bfloat16()
            y = packed_product(x, self.weight, self.short_scale)
            y = y if self.bias is None else self.bias + y
            return y if self.keep_short else y.to(dtype)
        if dtype == torch.float16:  # without its scale a product may exceed float16
            return F.linear(x.to(dtype), self.full_weight(dtype), self.bias if self.bias is None else
                            self.bias.to(dtype))
        factor = torch.bfloat16 if kind == 'cpu' and HAS_BF16 else dtype
        y = F.linear(x.to(factor), self.weight.to(factor))  # a compiler fuses the conversion
        y = y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)
        return y.to(dtype)

    def full_weight(self, dtype):
        return (self.weight * self.scale[:, None]).to(dtype)


class Int8Embedding(nn.Module):
    """An embedding whose table, (rows, C), is int8 times scale, (rows,). Not for training."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(embedding.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer('scale', embedding.weight.new_empty(len(embedding.weight)))

    def forward(self, idx):
        """idx: (B, T) -> (B, T, C) float32"""
        return F.embedding(idx, self.weight) * F.embedding(idx, self.scale[:, None])


def can_pack(x):
    """Whether the packed product computes with x: (..., in), and pays."""
    n_in = x.shape[-1]
    return HAS_PACKED and n_in % PACKED_MULTIPLE == 0 and x.numel() <= MAX_PACKED_ROWS * n_in


def packed_product(x, weight, scale):
    """x (..., in), weight (out, in) int8, scale (out,) bfloat16 -> (..., out) bfloat16, summed in float32;
    reads int8 from memory."""
    rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
    return torch.ops.aten._weight_int8pack_mm(rows, weight, scale).view(*x.shape[:-1], -1)


def build_int8(config, named_weights):
    """A GPT with int8 weights, in evaluation mode, from (name, tensor) pairs of a GPT's state dict. Each
    tensor is quantised or copied as it comes, so the pairs need not be in memory together."""
    with torch.device('meta'):  # shapes without memory
        model = GPT(config).requires_grad_(False)
    is_tied = model.lm_head.weight is model.transformer.wte.weight
    for parent in [*model.modules()]:
        for name, module in [*parent.named_children()]:
            if isinstance(module, nn.Linear):
                setattr(parent, name, Int8Linear(module, keep_short=name in BEFORE_SHORT))
    model.transformer.wte = Int8Embedding(model.transformer.wte)
    layers = {name for name, m in model.named_modules() if isinstance(m, (Int8Linear, Int8Embedding))}
    state = {}
    for name, tensor in named_weights:
        layer, _, kind = name.rpartition('.')
        if layer == 'lm_head' and is_tied:
            continue
        if layer in layers and kind == 'weight':
            state[name], state[f'{layer}.scale'] = quantize(tensor)
        else:
            state[name] = tensor.detach().to(torch.float32, copy=True)
    if is_tied:
        state |= {f'lm_head.{kind}': state[f'transformer.wte.{kind}'] for kind in ('weight', 'scale')}
    model.load_state_dict(state, assign=True)
    if is_tied:
        model.lm_head.weight, model.lm_head.scale = model.transformer.wte.weight, model.transformer.wte.scale
    return model.eval()
