"""
The attention laboratory: types of attention that weigh the past by something other than a softmax.

    SM        a softmax of q.k / sqrt(hs) (Vaswani et al. 2017, eq. 1), which is model.py's own
    GK        a Gaussian kernel, exp(-|q - k|^2 / (2 sqrt(hs)))
    GKpoly-n  its polynomial (1 + x / 2^n)^(2^n) in place of exp(x)
    PA_f      pointwise attention, f(q.k / sqrt(hs)) / length

model.py looks this file up where attn_type isn't SM; it imports nothing of ours. To add a type, write
a function (q, k, v, dropout, bias) -> y, or one of weights for `weighted_attention`, and a row of ATTN_TYPES.
Shapes: q: (B, nh, T, hs), k, v: (B, n_kv_head, T so far, hs) -> y: (B, nh, T, hs).
"""

from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def attention(config):
    """The function (q, k, v, dropout, bias) -> y of config.attn_type."""
    kind, parameter = find_type(config.attn_type)
    return ATTN_TYPES[kind][1](config, parameter)


def canonical_attn_type(name):
    """The name as it is stored, from any case: GK, GKpoly-8, PA_relu. ValueError for an unknown one."""
    return ''.join(find_type(name))


def find_type(name):
    """A key of ATTN_TYPES, and the parameter that follows it in the name."""
    for kind, (parameters, _) in ATTN_TYPES.items():
        parameter = name.lower().removeprefix(kind.lower())
        if name.lower().startswith(kind.lower()) and parameter in parameters:
            return kind, parameter
    raise ValueError(f'attn_type={name} is not one of SM, GK, GKpoly-n (n from 0 to 20), PA_'
                     f'{", PA_".join(POINTWISE)}')


def gaussian_attention(q, k, v, dropout=0.0, bias=None):
    """exp(-|q - k|^2 / (2 sqrt(hs))) v, weights that aren't normalised, without a T x T matrix.

    A softmax over the same exponents and an extra 0 is divided by the extra one's share, 1 / (1 + their sum).
    |q - k|^2 = |q|^2 + |k|^2 - 2 q.k: the squares go into extra channels, each as a sum of three numbers of
    q's type, which is as exact as float32. Dropout needs the weights themselves.
    """
    if dropout or q.shape[2] < k.shape[2]:  # SDPA's causal mask is for as many queries as keys
        return weighted_attention(q, k, v, dropout, weigh=gaussian)
    if q.dtype == torch.float16:  # no room for squares
        return gaussian_attention(q.float(), k.float(), v.float()).half()
    hs, q, k = q.shape[-1], q.to(v.dtype), k.to(v.dtype)
    q2, k2 = three_parts(half_square(q), q.dtype), three_parts(half_square(k), k.dtype)
    q = torch.cat((q, torch.ones_like(q2), -q2), dim=-1)
    k = torch.cat((k, -k2, torch.ones_like(k2)), dim=-1)
    v = F.pad(v, (0, 6))
    q, k, v = (F.pad(x, (0, -x.shape[-1] % 8, 1, 0)) for x in (q, k, v))  # a first key, with exponent 0
    v[:, :, 0, hs] = 1.0
    is_grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210, SDPA rejects a SymBool
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=hs ** -0.5,
                                           enable_gqa=is_grouped)[:, :, 1:]
    return y[..., :hs] / y[..., hs:hs + 1]


def half_square(x):
    """|x|^2 / 2, in float32 at least: (..., hs) -> (..., 1)"""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=-1, keepdim=True) / 2


def three_parts(x, dtype):
    """Three numbers of a type that add up to x: (..., 1) -> (..., 3)"""
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return torch.cat(parts, dim=-1)


def weighted_attention(q, k, v, dropout=0.0, bias=None, *, weigh, rows=128):
    """weigh(q, k, t) v, where t are the queries' positions, (n, 1). It works on `rows` queries at a time and
    recomputes their weights in the backward pass, so memory grows with T, not with its square."""
    n_shared, n_before = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    if n_shared > 1:
        k, v = k.repeat_interleave(n_shared, dim=1), v.repeat_interleave(n_shared, dim=1)
    if q.shape[2] <= rows:
        return weigh_rows(q, k, v, dropout, weigh)
    return torch.cat([checkpoint(weigh_rows, q[:, :, i:i + rows], k[:, :, :n_before + i + rows],
                                 v[:, :, :n_before + i + rows], dropout, weigh, use_reentrant=False)
                      for i in range(0, q.shape[2], rows)], dim=2)


def weigh_rows(q, k, v, dropout, weigh):
    """The last queries' part of weighted_attention: q: (B, nh, n, hs) -> (B, nh, n, hs)"""
    n, n_keys = q.shape[2], k.shape[2]
    t = torch.arange(n_keys - n, n_keys, device=q.device)[:, None]  # (n, 1)
    is_later = torch.arange(n_keys, device=q.device) > t  # (n, n_keys)
    weights = weigh(q, k, t).masked_fill(is_later, 0.0)  # (B, nh, n, n_keys)
    return F.dropout(weights, dropout).to(v.dtype) @ v


def gaussian_exponent(q, k):
    """-|q - k|^2 / (2 sqrt(hs)), never above 0, in float32 at least: (B, nh, n, n_keys)"""
    with torch.autocast(q.device.type, enabled=False):
        q2, k2 = half_square(q), half_square(k)
        x = q.to(q2.dtype) @ k.to(q2.dtype).mT - q2 - k2.mT
    return x.clamp(max=0.0) * q.shape[-1] ** -0.5


def gaussian(q, k, t):
    return gaussian_exponent(q, k).exp()


def gaussian_poly(q, k, t, n):
    """(1 + x / 2^n)^(2^n), by n squarings, which tends to exp(x). Below x = -2^n it rises again."""
    weights = 1 + gaussian_exponent(q, k) / 2 ** n
    for _ in range(n):
        weights = weights.square()
    return weights


def pointwise(q, k, t, f, config):
    """f(q.k / sqrt(hs)) / length. By default the length is that of the text so far, so that a token's output
    does not depend on how many follow it."""
    length = {'length': t + 1, 'block_size': config.block_size, 'none': 1}[config.pa_norm]
    return f(q @ k.mT * q.shape[-1] ** -0.5) / length


def relu2(x):
    return F.relu(x).square()


POINTWISE = {name: getattr(F, name) for name in (
    'gelu', 'relu', 'sigmoid', 'tanh', 'silu', 'mish', 'softplus', 'softsign', 'elu', 'celu', 'selu', 'relu6',
    'leaky_relu', 'logsigmoid', 'hardsigmoid', 'hardswish', 'hardtanh', 'tanhshrink')}
POINTWISE |= {'square': torch.square, 'relu-square': relu2}


ATTN_TYPES = {  # name: (parameters that may follow it, function of config and parameter)
    'GK': ([''], lambda config, _: gaussian_attention),
    'GKpoly-': ([str(n) for n in range(21)], lambda config, n: partial(
        weighted_attention, weigh=partial(gaussian_poly, n=int(n)))),
    'PA_': (POINTWISE, lambda config, name: partial(
        weighted_attention, weigh=partial(pointwise, f=POINTWISE[name], config=config))),
}
