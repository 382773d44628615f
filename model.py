"""
A GPT in one file: configuration, layers, cache, generation, GPT-2's weights. It needs nothing but PyTorch.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    logits, loss = model(idx, targets)
    idx = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=200)

It is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned positions,
pre-norm blocks, tied embeddings. Every option beyond GPT-2 is off by default and is an `if` where it acts.
Training, evaluation and sampling all run these lines. Shapes are written with
    B batch, T positions, C = n_embd channels, nh = n_head heads, hs head size, V = vocab_size.
"""

import importlib
import inspect
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """Architecture of a GPT. Raises ValueError for sizes that don't fit together."""
    block_size: int = 1024  # positions of a window: the longest text that the model sees at once
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in the linear and normalisation layers, as GPT-2 has them
    # beyond GPT-2
    activation: str = 'gelu'  # gelu, gelu_tanh, relu2, swiglu
    pos_emb: str = 'learned'  # learned, rope, alibi, none
    norm: str = 'layernorm'  # layernorm, rmsnorm
    norm_eps: float = 1e-5  # added to the variance in each normalisation
    qk_norm: bool = False  # scale queries and keys to length sqrt(hs)
    qk_norm_weights: bool = False  # with a learned weight for each channel of a head, as in Qwen 3
    qkv_bias: bool = False  # biases for queries, keys and values also where bias=False
    tie_weights: bool = True  # one matrix for the token embedding and the output layer
    value_residual: bool = False  # each layer mixes its values with those of the first layer
    logit_softcap: float = 0.0  # keep logits between -cap and cap; 0: unlimited
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, for swiglu 8/3 n_embd rounded up to 64
    rope_theta: float = 10000.0  # rope: base of the wavelengths
    rope_scaling: tuple = ()  # rope: Llama 3's factor, low and high frequency factor, original block_size
    ngram: int = 1  # add embeddings of the last 2 to `ngram` tokens; 1: none
    ngram_rows: int = 16384  # rows of the table into which n-grams are hashed
    init: str = 'gpt2'  # gpt2, zero_proj (see GPT._init_weights)
    init_gain: float = 1.0  # zero_proj: linear layers start with a deviation of this / sqrt(inputs)
    zero_head: bool = False  # the output layer starts at 0: the first loss is ln(vocab_size)
    embd_norm: bool = False  # a normalisation after the embeddings
    x0_residual: bool = False  # add the embedding to each block's output, times a learned weight
    attn_scale: float = 0.0  # of q.k in the softmax; 0: 1 / sqrt(head_size)
    document_end: int = -1  # a token at which attention stops, so that a document sees itself alone; -1: none
    attn_type: str = 'SM'  # SM (softmax), GK, GKpoly-n, PA_f (support/attention.py)
    pa_norm: str = 'length'  # divisor of PA_f: length (the tokens so far), block_size, none

    def __post_init__(self):
        check_config(self)
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        if self.head_size == 0:
            self.head_size = self.n_embd // self.n_head
        if self.n_inner == 0 and self.activation == 'swiglu':
            self.n_inner = math.ceil(8 * self.n_embd / 3 / 64) * 64
        elif self.n_inner == 0:
            self.n_inner = 4 * self.n_embd
        self.rope_scaling = tuple(self.rope_scaling)
        if self.attn_type.upper() == 'SM':
            self.attn_type = 'SM'
        else:
            self.attn_type = attention_types().canonical_attn_type(self.attn_type)


def check_config(c):
    """ValueError for sizes that don't fit together and options that don't exist."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'ngram', 'ngram_rows'):
        if getattr(c, name) < 1:
            raise ValueError(f'{name}={getattr(c, name)} must be at least 1')
    for name in ('logit_softcap', 'n_kv_head', 'head_size', 'n_inner', 'init_gain', 'attn_scale'):
        if getattr(c, name) < 0:
            raise ValueError(f'{name}={getattr(c, name)} must not be negative')
    choices = {
        'activation': ('gelu', 'gelu_tanh', 'relu2', 'swiglu'),
        'pos_emb': ('learned', 'rope', 'alibi', 'none'),
        'norm': ('layernorm', 'rmsnorm'),
        'init': ('gpt2', 'zero_proj'),
        'pa_norm': ('length', 'block_size', 'none'),
    }
    for name, known in choices.items():
        if getattr(c, name) not in known:
            raise ValueError(f'{name}={getattr(c, name)} is not one of {", ".join(known)}')
    if c.head_size == 0 and c.n_embd % c.n_head:
        raise ValueError(f'n_embd={c.n_embd} must be a multiple of n_head={c.n_head}')
    if not 0 <= c.dropout < 1:
        raise ValueError(f'dropout={c.dropout} must lie in [0, 1)')
    if c.n_kv_head and c.n_head % c.n_kv_head:
        raise ValueError(f'n_kv_head={c.n_kv_head} must be a divisor of n_head={c.n_head}')
    head_size = c.head_size or c.n_embd // c.n_head
    if c.pos_emb == 'rope' and head_size % 2:
        raise ValueError(f'pos_emb=rope turns pairs of channels: a head\'s {head_size} must be even')
    if c.zero_head and c.tie_weights:
        raise ValueError('zero_head=True needs an output layer of its own: tie_weights=False')
    if c.attn_scale and c.attn_type.upper() != 'SM':
        raise ValueError(f'attn_scale={c.attn_scale} is of a softmax, which attn_type={c.attn_type} has '
                         'none of')
    if not -1 <= c.document_end < c.vocab_size:
        raise ValueError(f'document_end={c.document_end} must be -1 or a token of vocab_size={c.vocab_size}')
    if c.document_end >= 0 and (c.attn_type.upper() != 'SM' or c.pos_emb == 'alibi'):
        raise ValueError(f'document_end={c.document_end} masks a softmax, without pos_emb=alibi')
    if c.pos_emb == 'alibi' and c.attn_type.upper() != 'SM':
        raise ValueError(f'pos_emb=alibi biases a softmax, which attn_type={c.attn_type} has none of')


# ---------------------------------------------------------------------------- layers

class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels, with an optional bias."""

    def __init__(self, ndim, bias, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config):
    if config.norm == 'rmsnorm':  # Zhang & Sennrich 2019
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return LayerNorm(config.n_embd, config.bias, config.norm_eps)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the position itself and those before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.config, self.layer = config, layer
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.n_embd, self.dropout = config.n_embd, config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size  # 3 C in GPT-2
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.flash = True  # code written for nanoGPT reads it: attention is a fused kernel
        self.value_mix = self.weigh = self.q_norm = self.k_norm = None
        if config.qk_norm_weights:
            self.q_norm = nn.RMSNorm(self.head_size, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_size, eps=config.norm_eps)
        if config.value_residual and layer > 0:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))
        if config.attn_type != 'SM':
            self.weigh = attention_types().attention(config)  # instead of a softmax

    def forward(self, x, cache=None, first_v=None, begins=None):
        """x: (B, T, C) -> (B, T, C). cache: a KVCache with what came before x. first_v: the first layer's
        values, (B, n_kv_head, T, hs), for value residuals; without them a layer's own stand in. begins: the
        first position that each one sees, (B, T)."""
        B, T, C = x.shape
        q, k, v = self.heads(x, cache)
        if self.value_mix is not None:  # Zhou et al. 2024, "Value Residual Learning", eq. 6
            v = self.value_mix[0] * v + self.value_mix[1] * (v if first_v is None else first_v)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.attend(q, k, v, cache, begins)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, nh hs)
        return self.resid_dropout(self.c_proj(y))

    def project(self, x):
        """x: (B, T, C) -> queries and keys, (B, nh + n_kv_head, T, hs), and values, (B, n_kv_head, T, hs)"""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, 3 nh, T, hs)
        return qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)

    def heads(self, x, cache=None):
        """What the positions of x, (B, T, C), attend with, normed and turned: q: (B, nh, T, hs), k, v:
        (B, n_kv_head, T, hs)"""
        n_heads = (self.n_head, self.n_kv_head)
        qk, v = self.project(x)
        if self.q_norm is not None:
            q, k = qk.split(n_heads, dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1).type_as(v)
        elif self.config.qk_norm:  # Henry et al. 2020, "Query-Key Normalization for Transformers"
            qk = F.rms_norm(qk, (self.head_size,)).type_as(v)  # autocast on CUDA normalises in float32
        if self.config.pos_emb == 'rope':
            qk = rotate(qk, *angles(x.shape[1], cache, x.device, self.config))
        return *qk.split(n_heads, dim=1), v

    def attend(self, q, k, v, cache=None, begins=None):
        """softmax(q k^T / sqrt(hs)) v over the keys up to each query (Vaswani et al. 2017, eq. 1); attn_scale
        may stand for 1 / sqrt(hs). q: (B, nh, T, hs), k, v: (B, n_kv_head, n_keys, hs) -> (B, nh, T, hs)"""
        (B, nh, T, hs), n_keys = q.shape, k.shape[2]
        dropout = self.dropout if self.training else 0.0
        if self.weigh is not None:
            return self.weigh(q, k, v, dropout)
        mask = None  # each query sees the keys up to its own position
        if self.config.pos_emb == 'alibi':
            mask = alibi(positions_of(T, cache, q.device), n_keys, self.n_head).type_as(q)
        elif begins is not None:
            key, last = torch.arange(n_keys, device=q.device), positions_of(T, cache, q.device)
            mask = (key >= begins[:, None, :, None]) & (key <= last[:, None])  # (B, 1, T, n_keys)
        elif cache is not None:
            mask = cache.mask(T, n_keys, q.device)
        is_causal = True if mask is None and T > 1 else False  # noqa: SIM210, SDPA rejects a SymBool
        is_grouped = self.n_kv_head < self.n_head  # Ainslie et al. 2023
        if is_grouped and T == 1:  # SDPA is faster with a group's queries as positions of one head
            is_grouped, q = False, q.reshape(B, self.n_kv_head, -1, hs)  # (B, n_kv_head, nh / n_kv_head, hs)
            if self.config.pos_emb == 'alibi':
                mask = mask.view(self.n_kv_head, -1, n_keys)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal,
                                           scale=self.config.attn_scale or None, enable_gqa=is_grouped)
        return y.reshape(B, nh, T, hs)


def angles(T, cache, device, config):
    """`rotary` of the next T positions; a cache keeps them for all layers."""
    if cache is None:
        return rotary(torch.arange(T, device=device), config)
    if cache.angles is None:
        cache.angles = rotary(cache.positions(T, device), config)
    return cache.angles


def rotary(positions, config):
    """cos and sin of the angles of Su et al. 2021, "RoFormer", eq. 15, as `rotate` takes them: the sines of
    the first half are negative. (T,) -> (T, hs) each"""
    hs = config.head_size
    frequency = config.rope_theta ** (-torch.arange(0, hs, 2, device=positions.device) / hs)  # (hs / 2,)
    if config.rope_scaling:
        frequency = stretched(frequency, *config.rope_scaling)
    angle = positions[:, None] * frequency
    # as_strided: a compiler then makes the angles once, not within each layer's kernels
    cos, sin = torch.cat((angle.cos(),) * 2, dim=1), torch.cat((-angle.sin(), angle.sin()), dim=1)
    return [t.as_strided(t.shape, t.stride()) for t in (cos, sin)]


def stretched(frequency, factor, low, high, original):
    """Frequencies for longer texts (Llama 3.1's): those with fewer than `low` turns within the original
    length are divided by the factor, those with more than `high` stay, and those between are interpolated."""
    turns = original * frequency / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the frequency that stays
    return share * frequency + (1 - share) * frequency / factor


def rotate(x, cos, sin):
    """Turn channel i with channel i + hs / 2. x: (B, nh, T, hs) -> (B, nh, T, hs)"""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def alibi(positions, n_keys, n_head):
    """Press et al. 2022, "Train Short, Test Long": minus the distance to a key, times the head's slope; -inf
    for later keys. positions: (T,) -> (nh, T, n_keys)"""
    n = 2 ** math.floor(math.log2(n_head))
    head, key = torch.arange(n_head, device=positions.device), torch.arange(n_keys, device=positions.device)
    slope = 2 ** -(torch.where(head < n, 8 * head + 8, 8 * (head - n) + 4) / n)  # (nh,), the paper's
    distance = positions[:, None] - key  # (T, n_keys)
    bias = -slope[:, None, None] * distance
    return bias.masked_fill(distance < 0, -math.inf)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config):
        super().__init__()
        n_matrices = 2 if config.activation == 'swiglu' else 1  # gate and value
        self.c_fc = nn.Linear(config.n_embd, n_matrices * config.n_inner, bias=config.bias)
        self.gelu = make_activation(config.activation)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


def make_activation(name):
    if name == 'relu2':
        return ReLU2()
    if name == 'swiglu':
        return SwiGLU()
    return nn.GELU(approximate='tanh' if name == 'gelu_tanh' else 'none')  # tanh: GPT-2's own approximation


class ReLU2(nn.Module):  # So et al. 2021, "Primer"
    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """Gated SiLU (Shazeer 2020, "GLU Variants"): (..., 2 n) -> (..., n)"""

    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Block(nn.Module):

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        """x: (B, T, C) -> (B, T, C). context: further arguments of the attention, if there are any."""
        x = x + self.attn(self.ln_1(x), *context)
        return x + self.mlp(self.ln_2(x))

    def values(self, x):
        """The values of this block's attention, (B, n_kv_head, T, hs)."""
        return self.attn.project(self.ln_1(x))[1]


class NgramEmbedding(nn.Embedding):
    """Embeddings of each position's last 2 to `ngram` tokens, added up. An n-gram's row is a hash of its
    tokens, so rare ones share rows (Huang et al. 2025, "Over-Tokenized Transformer"). Before the window's
    first token stands token -1."""

    def __init__(self, config):
        super().__init__(config.ngram_rows, config.n_embd)
        self.n_before, self.vocab_size = config.ngram - 1, config.vocab_size

    def forward(self, idx, cache=None):
        """idx: (B, T) -> (B, T, C)"""
        T, before = idx.shape[1], None if cache is None else cache.last_ids
        if before is None:
            before = idx.new_full((len(idx), self.n_before), -1)
        ids = torch.cat((before, idx), dim=1)  # (B, n_before + T)
        if cache is not None:
            cache.last_ids = ids[:, T:]
        rows, key = [], idx
        for n in range(1, self.n_before + 1):
            key = key * (self.vocab_size + 1) + ids[:, self.n_before - n:self.n_before - n + T] + 1
            rows.append((key * 2654435761 >> 15) % self.num_embeddings)
        return super().forward(torch.stack(rows)).sum(dim=0)  # one gradient of the table, not one for each n


# ---------------------------------------------------------------------------- generation's memory

class KVCache:
    """Keys and values of the positions that a model has seen, with room for n_positions. Each forward pass
    may bring any number of positions."""

    def __init__(self, n_positions):
        self.n_positions, self.length = n_positions, 0
        self.kv = {}  # {layer: (k, v)}, (B, n_kv_head, n_positions, hs) each
        self.last_ids = None  # (B, ngram - 1), for NgramEmbedding
        self.document_begin = None  # of the last token's document, (B, 1), with document_end
        self.angles = None  # of the positions that are being appended, for rotary embeddings

    def positions(self, T, device):
        """Positions of the next T tokens, (T,)."""
        return torch.arange(self.length, self.length + T, device=device)

    def append(self, layer, k, v):
        """k, v: (B, n_kv_head, T, hs) -> all keys and values so far, (B, n_kv_head, length + T, hs)"""
        if layer not in self.kv:
            self.kv[layer] = [t.new_zeros(*t.shape[:2], self.n_positions, t.shape[3]) for t in (k, v)]
        keys, values = self.kv[layer]
        T = k.shape[2]
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)

    def mask(self, T, n_keys, device):
        """Which keys each of the last T positions sees, (T, n_keys) bool; None if no mask is needed: one
        position sees all, and SDPA's own causal mask is for as many queries as keys."""
        if T == 1 or T == n_keys:
            return None
        return torch.arange(n_keys, device=device) <= self.positions(T, device)[:, None]

    def advance(self, T):
        """Count the T positions that all layers have appended."""
        self.length += T
        self.angles = None


def positions_of(T, cache, device):
    """Positions of the T tokens of a forward pass, (T,)."""
    return torch.arange(T, device=device) if cache is None else cache.positions(T, device)


# ---------------------------------------------------------------------------- the model

class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: less memory in training, a third more arithmetic
        self.residual_16bit = False  # True: under autocast the residual stream has its 16 bits too
        self.x0_weights = wpe = wne = ln_embd = None
        if config.pos_emb == 'learned':
            wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.ngram > 1:
            wne = NgramEmbedding(config)
        if config.embd_norm:
            ln_embd = make_norm(config)
        if config.x0_residual:
            self.x0_weights = nn.Parameter(torch.zeros(config.n_layer))
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': wpe,
            'wne': wne,
            'ln_embd': ln_embd,
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            'ln_f': make_norm(config),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017
        for name, module in self.named_modules():
            if module is not self.lm_head or not config.tie_weights:
                self._init_weights(module, name)

    @torch.no_grad()
    def _init_weights(self, module, name=''):
        """Initial weights, normal with mean 0; biases are 0, factors of norms 1, value_mix is 0.5.

        standard deviation of              init=gpt2                  init=zero_proj
        c_proj, into the residual stream   0.02 / sqrt(2 n_layer)     0: each block begins as the identity
        other linear layers                0.02                       init_gain / sqrt(inputs)
        ... lm_head with zero_head         0                          0
        embeddings, a tied output layer    0.02                       0.02
        ... untied, with embd_norm         1                          1
        """
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return
        std, is_residual = 0.02, name.endswith('c_proj')
        if isinstance(module, nn.Embedding) and self.config.embd_norm and not self.config.tie_weights:
            std = 1.0
        if self.config.init == 'gpt2' and is_residual:
            std = 0.02 / math.sqrt(2 * self.config.n_layer)
        elif self.config.init == 'zero_proj' and isinstance(module, nn.Linear):
            std = 0.0 if is_residual else self.config.init_gain * module.in_features ** -0.5
        if name == 'lm_head' and self.config.zero_head:
            std = 0.0
        module.weight.normal_(std=std)
        if getattr(module, 'bias', None) is not None:
            module.bias.zero_()

    def forward(self, idx, targets=None, cache=None, loss=None):
        """idx, targets: (B, T) int64; a target of -1 doesn't count. Returns logits (B, T, V) and the mean
        cross-entropy in nats; without targets the logits of the last position, (B, 1, V), and None.
        cache: a KVCache with what came before idx. loss: called instead of self.loss."""
        T, block_size = idx.shape[1], self.config.block_size
        n_seen = T if cache is None else cache.length + T
        assert n_seen <= block_size, f'{n_seen} positions, but block_size is {block_size}'
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(positions_of(T, cache, idx.device))
        if self.transformer.wne is not None:
            x = x + self.transformer.wne(idx, cache)
        if self.transformer.ln_embd is not None:
            x = self.transformer.ln_embd(x)
        if self.residual_16bit and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x0 = self.transformer.drop(x)
        context = self.context(idx, x, cache)
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:  # Chen et al. 2016
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
            if self.x0_weights is not None:  # Jordan et al. 2024, modded-nanogpt
                x = x + self.x0_weights[i] * x0
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        if targets is None:
            return self.logits(x[:, -1:]), None
        return (loss or self.loss)(x, targets)

    def context(self, idx, x, cache):
        """What the blocks get besides x: nothing in GPT-2's training, else what attention's forward takes."""
        context = [cache, None, None]
        if self.config.value_residual:
            context[1] = self.transformer.h[0].values(x)  # computed there once more
        if self.config.document_end >= 0:
            context[2] = self.document_begins(idx, cache)
        while context and context[-1] is None:
            context.pop()
        return context

    def document_begins(self, idx, cache):
        """Where each token's document begins, (B, T): an end is the first token of the next one."""
        positions = positions_of(idx.shape[1], cache, idx.device)
        before = 0 if cache is None or cache.document_begin is None else cache.document_begin
        begins = torch.where(idx == self.config.document_end, positions, before).cummax(dim=1).values
        if cache is not None:
            cache.document_begin = begins[:, -1:]
        return begins

    def logits(self, x):
        """x: (..., C) -> (..., V)"""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits  # Gemma 2, 2024, section 2

    def loss(self, x, targets):
        """x: (..., C), targets: (...) -> logits (..., V) and the mean cross-entropy in nats."""
        logits = self.logits(x)
        return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue each row of idx, (B, T) int64, to (B, T + max_new_tokens). temperature 0 takes the
        likeliest token, top_k draws from the k likeliest. Past block_size all positions change with each
        token, so the cache is of no use. Without cuDNN's attention, which makes a plan for each length."""
        block_size = self.config.block_size
        cache, new = self.make_cache(min(block_size, idx.shape[1] + max_new_tokens)), idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > block_size:
                cache = None
            if cache is None:
                new = idx[:, -block_size:]
            logits = self(new, cache=cache)[0][:, -1]  # (B, V)
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def make_cache(self, n_positions):
        """A KVCache; None if an attention was replaced by one that takes x alone."""
        attentions = [block.attn for block in self.transformer.h]
        if all('cache' in inspect.signature(attn.forward).parameters for attn in attentions):
            return KVCache(n_positions)
        return None

    def crop_block_size(self, block_size):
        """Drop the positions from block_size on, to train or run a model on shorter windows."""
        assert block_size <= self.config.block_size, f'{block_size} > {self.config.block_size}'
        self.config.block_size = block_size
        if self.transformer.wpe is not None:
            kept = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without tables that are only looked up: positions, n-grams, and
        token embeddings if the output layer has weights of its own."""
        n = sum(p.numel() for p in self.parameters())
        if not non_embedding:
            return n
        t = self.transformer
        tables = [t.wpe, t.wne, None if self.config.tie_weights else t.wte]
        return n - sum(table.weight.numel() for table in tables if table is not None)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Share of an A100's 312e12 dense bf16 FLOP/s used by an iteration of `dt` seconds that runs
        `fwdbwd_per_iter` sequences of block_size tokens forward and backward. A token costs
        6 N + 12 L nh hs T FLOPs (Chowdhery et al. 2022, PaLM, appendix B); frozen weights cost 4 N."""
        c = self.config
        per_weight = 6 if self.lm_head.weight.requires_grad else 4
        attention = 12 * c.n_layer * c.n_head * c.head_size * c.block_size
        flops_per_token = per_weight * self.get_num_params() + attention
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / 312e12

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, cls=torch.optim.AdamW):
        """AdamW (Loshchilov & Hutter 2019) with two groups, in `named_parameters` order: tensors of two or
        more dimensions, which are decayed, then biases and normalisation weights, which are not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        return cls(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT with the weights of a GPT-2 in Hugging Face's format: one of GPT2_SIZES, from the hub or its
        local cache, or a folder with config.json and weights, of any size. override_args: dropout, attn_type,
        pa_norm. Raises ValueError for another architecture, FileNotFoundError for a missing folder."""
        override_args = override_args or {}
        if unknown := set(override_args) - {'dropout', 'attn_type', 'pa_norm'}:
            raise ValueError(f'{", ".join(unknown)} cannot be overridden here')
        args, weights = load_transformers_gpt2(model_type)
        model = cls(GPTConfig(**args | override_args))
        model.load_state_dict(weights)
        return model


def attention_types():
    """support/attention.py, the one file of ours that this one may look up."""
    try:
        return importlib.import_module(f'{__package__ or ""}.support.attention'.lstrip('.'))
    except ImportError:
        raise ValueError('an attn_type other than SM needs support/attention.py') from None


# ---------------------------------------------------------------------------- GPT-2's weights

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # 124M, 350M, 774M, 1558M parameters
HF_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu2': 'relu2'}


def load_transformers_gpt2(model_type):
    """Arguments of GPTConfig and a state dict of GPT, see GPT.from_pretrained."""
    if model_type not in GPT2_SIZES and not os.path.isfile(os.path.join(model_type, 'config.json')):
        raise FileNotFoundError(f'{model_type} is neither one of {", ".join(GPT2_SIZES)} nor a folder with '
                                'a Hugging Face config.json')
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.set_verbosity_error()
    if (kind := GPT2Config.get_config_dict(model_type)[0].get('model_type', 'gpt2')) != 'gpt2':
        raise ValueError(f'{model_type} holds a model of type {kind}, not a GPT-2')
    theirs, report = GPT2LMHeadModel.from_pretrained(  # which fills gaps with random numbers
        model_type, output_loading_info=True, ignore_mismatched_sizes=True)
    c, state = theirs.config, theirs.state_dict()
    report['not finite'] = [name for name, t in state.items() if not t.isfinite().all()]
    if bad := [f'{k.removesuffix("_keys")}: {name}' for k in report for name in sorted(report[k])
               if not str(name).endswith('.masked_bias')]:  # of older versions
        raise ValueError(f'{model_type} doesn\'t have the weights of its GPT-2 ({", ".join(bad[:9])})')
    allowed = {'layer_norm_epsilon': (1e-5,), 'scale_attn_weights': (True,), 'n_inner': (None, 4 * c.n_embd),
               'scale_attn_by_inverse_layer_idx': (False,), 'activation_function': HF_ACTIVATIONS}
    if wrong := [f'{k}={getattr(c, k)}' for k, known in allowed.items() if getattr(c, k) not in known]:
        raise ValueError(f'{model_type} is not a GPT-2 that model.py computes: {", ".join(wrong)}')
    has_bias = getattr(c, 'bias', True)  # export.py writes it: transformers has zeros where there is none
    has_bias = has_bias or any(t.any() for name, t in state.items() if name.endswith('bias'))
    weights = {name: t.T if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else t
               for name, t in state.items()  # weights of linear layers are (in, out) there
               if has_bias or not name.endswith('bias')}
    args = {'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'block_size': c.n_positions,
            'vocab_size': c.vocab_size, 'bias': has_bias, 'dropout': c.resid_pdrop,
            'activation': HF_ACTIVATIONS[c.activation_function], 'tie_weights': c.tie_word_embeddings}
    return args, weights
