"""
A GPT, all of it: configuration, layers, weights from GPT-2, optimizer groups, generation.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    logits, loss = model(idx, targets)

The architecture is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
learned positions, pre-norm blocks, tied embeddings. Shapes below are written with
    B batch, T positions, C = n_embd channels, nh = n_head heads, hs = C / nh head size, V = vocab_size.
"""

import math
import re
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from decoding import positions_after, stream
from huggingface import load_gpt2
from loss import linear_cross_entropy
from optim import AdamW, Muon


def swiglu(x):
    """Gated SiLU (Shazeer 2020, "GLU Variants"): (..., 2 n) -> (..., n)"""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # the approximation GPT-2 was trained with
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021, "Primer"
    'swiglu': swiglu,
}
CHOICES = {
    'activation': tuple(ACTIVATIONS),
    'pos_emb': ('learned', 'rope', 'alibi', 'none'),
    'norm': ('layernorm', 'rmsnorm'),
    'pa_norm': ('length', 'block_size', 'none'),
    'init': ('gpt2', 'zero_proj'),
}


@dataclass
class GPTConfig:
    """Architecture of a GPT. Raises ValueError for sizes that don't fit together."""
    block_size: int = 1024  # positions the model can look back over, its own included
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in the linear and normalisation layers, as GPT-2 has them
    # what GPT-2 hasn't got
    activation: str = 'gelu'  # gelu, gelu_tanh, relu2, swiglu
    pos_emb: str = 'learned'  # learned, rope, alibi, none
    norm: str = 'layernorm'  # layernorm, rmsnorm
    qk_norm: bool = False  # queries and keys of length sqrt(hs)
    tie_weights: bool = True  # one matrix for the token embedding and the output layer
    value_residual: bool = False  # layers mix their values with the first layer's
    residual_scale: bool = False  # learned weights of the residual stream and of the embedding in each block
    logit_softcap: float = 0.0  # logits between -cap and cap; 0: unlimited
    n_kv_head: int = 0  # heads of keys and values, shared by n_head / n_kv_head queries; 0: n_head
    ngram: int = 1  # embeddings of the last 2 to `ngram` tokens together; 1: none
    ngram_rows: int = 16384  # of the table of these, which they are hashed into
    init: str = 'gpt2'  # gpt2, zero_proj: see GPT.init_weights
    attn_type: str = 'SM'  # SM, GK, GKpoly-n, PA_f: see attention
    pa_norm: str = 'length'  # what PA_f is divided by: tokens so far (length), block_size, or none

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'ngram', 'ngram_rows'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must lie in [0, 1)')
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f'{name}={getattr(self, name)} is not one of {", ".join(choices)}')
        if self.n_kv_head and (self.n_kv_head < 0 or self.n_head % self.n_kv_head):
            raise ValueError(f'n_kv_head={self.n_kv_head} must be a divisor of n_head={self.n_head}')
        if self.pos_emb == 'rope' and (self.n_embd // self.n_head) % 2:
            raise ValueError(f'pos_emb=rope turns pairs of channels: n_embd / n_head = '
                             f'{self.n_embd // self.n_head} must be even')
        self.attn_type = canonical_attn_type(self.attn_type)
        if self.pos_emb == 'alibi' and self.attn_type != 'SM':
            raise ValueError(f'pos_emb=alibi biases a softmax, which attn_type={self.attn_type} has none of')
        if self.logit_softcap < 0:
            raise ValueError(f'logit_softcap={self.logit_softcap} must not be negative')

    def to_args(self):
        """The dict that checkpoints keep: GPT-2's seven settings, and any other that isn't at its default."""
        gpt2 = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
        default = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k in gpt2 or v != default[k]}

    @classmethod
    def from_args(cls, args):
        """The inverse of `to_args`; ValueError for a setting this version doesn't know."""
        unknown = set(args) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f'the checkpoint has model settings unknown here: {", ".join(sorted(unknown))}')
        return cls(**args)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels, its bias optional."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


NORMS = {
    'layernorm': LayerNorm,
    'rmsnorm': lambda config: nn.RMSNorm(config.n_embd, eps=1e-5),  # Zhang & Sennrich 2019
}


def rotation(positions, hs, base=10000.0):
    """cos and sin of the angles of rotary positions (Su et al. 2021, eq. 15): (T,) -> twice (T, hs / 2)"""
    frequency = base ** (-torch.arange(0, hs, 2, device=positions.device) / hs)  # (hs / 2,)
    angle = positions[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel i with channel i + hs / 2 by their angle. x: (B, nh, T, hs) -> (B, nh, T, hs)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def alibi_bias(positions, n_keys, nh):
    """Attention with linear biases (Press et al. 2022): minus the distance to a key, times a slope for each
    head; -inf for keys to come. positions of the queries (T,) -> (nh, T, n_keys)"""
    n = 2 ** math.floor(math.log2(nh))
    head, key = (torch.arange(count, device=positions.device) for count in (nh, n_keys))
    slope = 2 ** -(torch.where(head < n, 8 * head + 8, 8 * (head - n) + 4) / n)  # (nh,), as they give them
    distance = positions[:, None] - key  # (T, n_keys)
    bias = -slope[:, None, None] * distance
    return bias.masked_fill(distance < 0, -math.inf)


def truth(x):
    """A bool, of what is a symbol where torch.compile leaves shapes open: bool(x) would be one too."""
    return True if x else False  # noqa: SIM210


# Attention. q: (B, nh, T, hs), k, v: (B, n_kv_head, T so far, hs) -> y: (B, nh, T, hs)

def softmax_attention(q, k, v, dropout=0.0, bias=None):
    """softmax(q k^T / sqrt(hs) + bias) v, over the keys up to each query."""
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, truth(bias is None and q.shape[2] > 1),
                                          enable_gqa=truth(q.shape[1] != k.shape[1]))


def gaussian_attention(q, k, v, dropout=0.0, bias=None):
    """exp(-|q - k|^2 / (2 sqrt(hs))) v, weights that aren't normalised, without a T x T matrix.

    A softmax over the same exponents and one of 0, whose share is 1 / (1 + their sum), is divided by that
    share. For |q - k|^2 = |q|^2 + |k|^2 - 2 q.k the squares stand in further channels, as sums of three
    numbers of q's type, which is as exact as float32. Dropout needs the weights themselves.
    """
    if dropout or q.shape[2] == 1:
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
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=hs ** -0.5,
                                           enable_gqa=truth(q.shape[1] != k.shape[1]))[:, :, 1:]
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
    """weigh(q, k, t) v, where t are the queries' positions, (n, 1). Some rows at a time, whose weights are
    computed again for the gradient, so that memory grows with T and not with its square."""
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
    to_come = torch.arange(n_keys, device=q.device) > t  # (n, n_keys)
    weights = weigh(q, k, t).masked_fill(to_come, 0.0)  # (B, nh, n, n_keys)
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


def pointwise(q, k, t, f, length):
    """f(q.k / sqrt(hs)) / length, which is t + 1 where it is given as None."""
    return f(q @ k.mT * q.shape[-1] ** -0.5) / (t + 1 if length is None else length)


POINTWISE = {name: getattr(F, name) for name in (
    'gelu', 'relu', 'sigmoid', 'tanh', 'silu', 'mish', 'softplus', 'softsign', 'elu', 'celu', 'selu', 'relu6',
    'leaky_relu', 'logsigmoid', 'hardsigmoid', 'hardswish', 'hardtanh', 'tanhshrink')}
POINTWISE |= {'square': torch.square, 'relu-square': ACTIVATIONS['relu2']}


def canonical_attn_type(name):
    """The name as it is stored, from any case: SM, GK, GKpoly-8, PA_relu. Raises ValueError for another."""
    lower = name.lower()
    if lower in ('sm', 'gk'):
        return lower.upper()
    if re.fullmatch(r'gkpoly-([0-9]|1[0-9]|20)', lower):
        return 'GKpoly' + lower[6:]
    if lower.startswith('pa_') and lower[3:] in POINTWISE:
        return 'PA' + lower[2:]
    raise ValueError(f'attn_type={name} is not one of SM, GK, GKpoly-n (n from 0 to 20), PA_'
                     f'{", PA_".join(POINTWISE)}')


def attention(config):
    """The function for config.attn_type: the weights of the past tokens by

        SM        a softmax of q.k / sqrt(hs) (Vaswani et al. 2017, eq. 1)
        GK        a Gaussian kernel, exp(-|q - k|^2 / (2 sqrt(hs)))
        GKpoly-n  that exponential's polynomial (1 + x / 2^n)^(2^n)
        PA_f      f(q.k / sqrt(hs)) / length, by default the number of tokens so far, so that nothing of a
                  token's output depends on how many come after it
    """
    kind, _, n = config.attn_type.partition('-')
    if kind == 'SM':
        return softmax_attention
    if kind == 'GK':
        return gaussian_attention
    if kind == 'GKpoly':
        return partial(weighted_attention, weigh=partial(gaussian_poly, n=int(n)))
    length = {'length': None, 'block_size': config.block_size, 'none': 1}[config.pa_norm]
    f = POINTWISE[config.attn_type.removeprefix('PA_')]
    return partial(weighted_attention, weigh=partial(pointwise, f=f, length=length))


class Linear(nn.Linear):
    """nn.Linear, and while text is generated a faster function that does the same: decoding.fast_linears."""
    fast = None

    def forward(self, x):
        return super().forward(x) if self.fast is None else self.fast(x)


class Shared:
    """What all blocks of a forward pass use, None where the configuration has no need of it. No dataclass: of
    those FSDP gives each block a copy."""

    def __init__(self, embedding, mask):
        self.embedding = embedding  # (B, T, C), what the first block gets, for residual_scale
        self.first_v = None  # (B, n_kv_head, T, hs), the first block's, for value_residual
        self.cos_sin = None  # of the positions' angles, for rope
        self.bias = mask  # of keys that aren't there yet; or what alibi adds to the scores, (nh, T, keys)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to oneself and the past (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config, layer):
        super().__init__()
        hs, n_kv_head = config.n_embd // config.n_head, config.n_kv_head or config.n_head
        self.heads = (config.n_head, n_kv_head, n_kv_head)  # of queries, keys and values
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, sum(self.heads) * hs, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        self.attend = attention(config)
        # Zhou et al. 2024, "Value Residual Learning"
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual and layer else None

    def forward(self, x, shared, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)  # (B, heads, T, hs)
        q, k, v = qkv.split(self.heads, dim=1)
        if self.qk_norm:
            q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
        if shared.cos_sin is not None:
            q, k = rotate(q, *shared.cos_sin), rotate(k, *shared.cos_sin)
        if self.value_mix is None:
            shared.first_v = v
        else:
            v = self.value_mix[0] * v + self.value_mix[1] * shared.first_v
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, T so far, hs)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, shared.bias)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config):
        super().__init__()
        hidden = 4 * config.n_embd
        if config.activation == 'swiglu':  # three matrices instead of two, so two thirds as wide
            hidden = -(-2 * hidden // 3 // 64) * 64
        self.c_fc = Linear(config.n_embd, hidden * (1 + (config.activation == 'swiglu')), bias=config.bias)
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)
        self.residual_scale = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scale else None

    def forward(self, x, shared, cache=None):
        if self.residual_scale is not None:
            x = self.residual_scale[0] * x + self.residual_scale[1] * shared.embedding
        x = x + self.attn(self.ln_1(x), shared, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # for training: keep the blocks' inputs only (Chen et al. 2016)
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd) if config.pos_emb == 'learned' else None,
            'wne': nn.Embedding(config.ngram_rows, config.n_embd) if config.ngram > 1 else None,
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            'ln_f': NORMS[config.norm](config),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal weights, biases 0, normalisations' weights 1. Standard deviations:

            init         embeddings   linear layers       projections into the residual (2 n_layer of them)
            gpt2         0.02         0.02                0.02 / sqrt(2 n_layer)
            zero_proj    0.02         1 / sqrt(inputs)    0
        """
        is_gpt2, depth = self.config.init == 'gpt2', math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 2 and name.endswith('c_proj.weight'):
                p.normal_(std=0.02 / depth if is_gpt2 else 0.0)
            elif p.dim() == 2:
                p.normal_(std=0.02 if is_gpt2 or name.startswith('transformer.w') else p.shape[1] ** -0.5)
            elif 'ln_' in name and name.endswith('weight'):
                p.fill_(1.0)
            elif name.endswith('bias'):
                p.zero_()

    def forward(self, idx, targets=None, caches=None, return_logits=True):
        """idx, targets: (B, T) int64; a target of -1 counts for nothing.

        Returns logits (B, T, V) and the mean cross-entropy in nats; without targets the logits of the
        last position, (B, 1, V), and None. caches: a KVCache for each layer; idx goes on where they end.
        return_logits=False gives None for the logits, and the loss without holding them in memory.
        """
        positions, n_keys, mask = positions_after(caches, idx)
        most = self.config.block_size
        assert n_keys <= most, f'{n_keys} positions, but block_size is {most}'
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos_emb == 'learned':
            x = x + self.transformer.wpe(positions)
        if self.config.ngram > 1:
            x = x + self.embed_ngrams(idx, caches and caches[0])
        x = self.transformer.drop(x)
        shared = Shared(x, mask)
        if self.config.pos_emb == 'rope':
            shared.cos_sin = rotation(positions, self.config.n_embd // self.config.n_head)
        elif self.config.pos_emb == 'alibi':
            shared.bias = alibi_bias(positions, n_keys, self.config.n_head).to(x.dtype)
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared, caches[i] if caches else None)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.softcap(self.lm_head(x[:, -1:])), None
        if not return_logits and not torch.compiler.is_compiling():  # a compiler fuses the two by itself
            x, targets = x.flatten(0, 1), targets.flatten()
            return None, linear_cross_entropy(x, self.lm_head.weight, targets, self.config.logit_softcap)
        logits = self.softcap(self.lm_head(x))  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def embed_ngrams(self, idx, cache):
        """Embeddings of each position's last 2 to `ngram` tokens, added up: idx (B, T) -> (B, T, C).

        An n-gram's row is a hash of it, so that rare ones share rows (Huang et al. 2025, "Over-Tokenized
        Transformer"). Before the window's first token there is token -1.
        """
        n_before, T = self.config.ngram - 1, idx.shape[1]
        before = cache.last_ids if cache and cache.length else idx.new_full((len(idx), n_before), -1)
        ids = torch.cat((before, idx), dim=1)  # (B, n_before + T)
        if cache:
            cache.remember(ids[:, T:])
        x, key = 0, idx
        for n in range(1, n_before + 1):
            key = key * (self.config.vocab_size + 1) + ids[:, n_before - n:n_before - n + T] + 1
            x = x + self.transformer.wne((key * 2654435761 >> 15) % self.config.ngram_rows)
        return x

    def softcap(self, logits):
        """Logits between -cap and cap, as in Gemma 2 (2024, section 2)."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continue each row of idx, (B, T) int64, n_samples times, to (B n_samples, T + max_new_tokens).

        Arguments are those of decoding.stream, which gives the tokens while they are made.
        """
        made = list(stream(self, idx, max_new_tokens, temperature, top_k, **options))
        given = idx[:, :idx.shape[1] + max_new_tokens - len(made)]  # (B, positions before the first made)
        return torch.cat((given.repeat_interleave(options.get('n_samples', 1), dim=0), *made), dim=1)

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on, to train or run a model on shorter windows."""
        assert block_size <= self.config.block_size, f'{block_size} > {self.config.block_size}'
        self.config.block_size = block_size
        for block in self.transformer.h:
            block.attn.attend = attention(self.config)
        if self.config.pos_emb == 'learned':
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default, as GPT sizes are quoted, without the tables that are only looked
        up: positions, n-grams, and token embeddings, unless these are the output layer's weights too."""
        count = sum(p.numel() for p in self.parameters())
        t = self.transformer
        tables = (t.wpe, t.wne, None if self.config.tie_weights else t.wte)
        return count - sum(e.weight.numel() for e in tables if e is not None) * non_embedding

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Share of `peak_flops` (default: an A100's, bfloat16) used by an iteration of `dt` seconds that
        runs `fwdbwd_per_iter` sequences of block_size tokens forward and backward.

        Counted as in Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 L nh hs T FLOPs a token; with
        frozen weights, which need no gradient of their own, 4 N.
        """
        c = self.config
        per_weight = 6 if self.lm_head.weight.requires_grad else 4
        flops_per_token = per_weight * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=None):
        """AdamW in two groups, in `named_parameters` order: matrices and embeddings, which are decayed,
        then biases and normalisation weights, which are not.

        muon: arguments of a third group, for optim.Muon: the matrices of the blocks.
        """
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        blocks = {n: p for n, p in named.items() if muon and n.startswith('transformer.h.') and p.dim() == 2}
        others = [p for n, p in named.items() if n not in blocks]
        groups = [{'params': [p for p in others if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in others if p.dim() < 2], 'weight_decay': 0.0}]
        fused = device_type in ('cuda', 'cpu', 'mps')
        if not muon:
            return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
        qkv = [n * self.config.n_embd // self.config.n_head for n in self.transformer.h[0].attn.heads]
        parts = [qkv if n.endswith('c_attn.weight') else [len(p)] for n, p in blocks.items()]
        muon = {'params': list(blocks.values()), 'parts': parts, **muon}
        return Muon(groups, [muon], learning_rate, betas, fused)

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT with the weights of a Hugging Face GPT-2.

        model_type: one of huggingface.GPT2_SIZES (from the hub or its local cache) or a folder with a GPT-2's
        config.json and weights, of any size. override_args: dropout, attn_type, pa_norm.
        Raises ValueError where the weights are no GPT-2's, FileNotFoundError where they can't be had.
        """
        unknown = set(override_args or {}) - {'dropout', 'attn_type', 'pa_norm'}
        if unknown:
            raise ValueError(f'{", ".join(unknown)} cannot be overridden here')
        args, weights = load_gpt2(model_type)
        model = cls(GPTConfig(**args | (override_args or {})))
        model.load_state_dict(weights)
        return model
