"""
A GPT in one file: configuration, layers, cache, generation, GPT-2's weights. It needs nothing but PyTorch.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    logits, loss = model(idx, targets)
    idx = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=200)

The first part is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned
positions, pre-norm blocks, tied embeddings. The second part, "Beyond GPT-2", has the options, all off by
default, and reads OpenAI's weights. Shapes are written with
    B batch, T positions, C = n_embd channels, nh = n_head heads, hs = C / nh head size, V = vocab_size.
"""

import importlib
import math
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F


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
    qk_norm: bool = False  # scale queries and keys to length sqrt(hs)
    tie_weights: bool = True  # one matrix for the token embedding and the output layer
    value_residual: bool = False  # each layer mixes its values with those of the first layer
    logit_softcap: float = 0.0  # keep logits between -cap and cap; 0: unlimited
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    ngram: int = 1  # add embeddings of the last 2 to `ngram` tokens; 1: none
    ngram_rows: int = 16384  # rows of the table into which n-grams are hashed
    init: str = 'gpt2'  # gpt2, zero_proj
    attn_type: str = 'SM'  # SM (softmax), GK, GKpoly-n, PA_f (support/attention.py)
    pa_norm: str = 'length'  # divisor of PA_f: length (the tokens so far), block_size, none

    def __post_init__(self):
        check_config(self)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels, with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


def softmax_attention(q, k, v, dropout=0.0, bias=None):
    """softmax(q k^T / sqrt(hs) + bias) v over the keys up to each query (Vaswani et al. 2017, eq. 1).
    q: (B, nh, T, hs), k, v: (B, nh, keys, hs), bias: (T, keys) or None -> (B, nh, T, hs)"""
    is_causal = True if bias is None and q.shape[2] > 1 else False  # noqa: SIM210, SDPA rejects a SymBool
    is_grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210, an option; False in GPT-2
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal, enable_gqa=is_grouped)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the position itself and those before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        n_kv_head = config.n_kv_head or config.n_head
        self.layer, self.heads = layer, (config.n_head, n_kv_head, n_kv_head)  # of queries, keys, values
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.n_embd // config.n_head, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.attend = softmax_attention
        self.flash = True  # code written for nanoGPT reads it: attention is a fused kernel

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)  # (B, 3 nh, T, hs)
        q, k, v = qkv.split(self.heads, dim=1)
        k, v, mask = (k, v, None) if cache is None else cache.append(self.layer, k, v)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, mask)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config):
        super().__init__()
        matrices, width = mlp_size(config)  # 1, 4 C in GPT-2
        self.c_fc = nn.Linear(config.n_embd, matrices * width, bias=config.bias)
        self.gelu = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    Attention = CausalSelfAttention

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = self.Attention(config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        h = self.ln_1(x)
        x = x + (self.attn(h) if cache is None else self.attn(h, cache))
        return x + self.mlp(self.ln_2(x))


def run_blocks(blocks, x, positions, n_keys, cache=None):
    """x: (B, T, C), positions: (T,) -> (B, T, C)"""
    for block in blocks:
        x = block(x) if cache is None else block(x, cache)
    return x


class KVCache:
    """Keys and values of the positions that a model has seen, with room for n_positions. The first forward
    pass may bring any number of positions, each later one a single position."""

    def __init__(self, n_positions):
        self.n_positions, self.length = n_positions, 0
        self.kv = {}  # {layer: (k, v)}, (B, nh, n_positions, hs) each
        self.last_ids = None  # (B, ngram - 1), for NgramEmbedding

    def next_positions(self, T, device):
        """Positions of the next T tokens, (T,), and the number of keys that they attend to."""
        return torch.arange(self.length, self.length + T, device=device), self.length + T

    def append(self, layer, k, v):
        """k, v: (B, nh, T, hs) -> all keys and values so far, (B, nh, length + T, hs), and a mask or None."""
        if layer not in self.kv:
            self.kv[layer] = [t.new_zeros(*t.shape[:2], self.n_positions, t.shape[3]) for t in (k, v)]
        (keys, values), end = self.kv[layer], self.length + k.shape[2]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end], None

    def advance(self, T):  # once all layers have appended
        self.length += T


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        make_block, self.run_blocks = blocks_of(config)  # Block, run_blocks in GPT-2
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd) if config.pos_emb == 'learned' else None,
            'wne': NgramEmbedding(config) if config.ngram > 1 else None,
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(make_block(config, layer) for layer in range(config.n_layer)),
            'ln_f': NORMS[config.norm](config),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017
        self.softcap = partial(softcap, cap=config.logit_softcap) if config.logit_softcap else nn.Identity()
        for name, module in (self.transformer if config.tie_weights else self).named_modules():
            self._init_weights(module, init_std(config, name, module))

    @torch.no_grad()
    def _init_weights(self, module, std=0.02):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(std=std)
            if getattr(module, 'bias', None) is not None:
                module.bias.zero_()

    def forward(self, idx, targets=None, cache=None):
        """idx, targets: (B, T) int64; a target of -1 doesn't count. A cache holds what came before idx.
        Returns logits (B, T, V) and the mean cross-entropy in nats; without targets the logits of the last
        position, (B, 1, V), and None."""
        T, most = idx.shape[1], self.config.block_size
        positions, n_keys = (KVCache(T) if cache is None else cache).next_positions(T, idx.device)
        assert n_keys <= most, f'{n_keys} positions, but block_size is {most}'
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(positions)
        if self.transformer.wne is not None:
            x = x + self.transformer.wne(idx, cache)
        x = self.run_blocks(self.transformer.h, self.transformer.drop(x), positions, n_keys, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        return (self.softcap(self.lm_head(x[:, -1:])), None) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """x: (B, T, C), targets: (B, T) -> logits (B, T, V) and the mean cross-entropy in nats."""
        logits = self.softcap(self.lm_head(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue each row of idx, (B, T) int64, to (B, T + max_new_tokens). temperature 0 takes the
        likeliest token, top_k draws from the k likeliest. Past block_size all positions change with each
        token, so the cache is of no use."""
        most = self.config.block_size
        cache, new = KVCache(min(most, idx.shape[1] + max_new_tokens)), idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > most:
                cache, new = None, idx[:, -most:]
            logits = self(new, cache=cache)[0][:, -1]  # (B, V)
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            p = F.softmax(logits / (temperature or 1), dim=-1)
            new = torch.multinomial(p, num_samples=1) if temperature else p.argmax(dim=-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def crop_block_size(self, block_size):
        """Drop the positions from block_size on, to train or run a model on shorter windows."""
        assert block_size <= self.config.block_size, f'{block_size} > {self.config.block_size}'
        self.config.block_size = block_size
        if self.transformer.wpe is not None:
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without tables that are only looked up: positions, n-grams, and
        token embeddings if the output layer has weights of its own."""
        t = self.transformer
        tables = [t.wpe, t.wne, None if self.config.tie_weights else t.wte]
        looked_up = sum(table.weight.numel() for table in tables if table is not None)
        return sum(p.numel() for p in self.parameters()) - looked_up * non_embedding

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Share of `peak_flops` (default: A100, dense bf16 FLOP/s) used by an iteration of `dt` seconds that
        runs `fwdbwd_per_iter` sequences of block_size tokens forward and backward. A token costs
        6 N + 12 L nh hs T FLOPs (Chowdhery et al. 2022, PaLM, appendix B); frozen weights cost 4 N."""
        c, per_weight = self.config, 6 if self.lm_head.weight.requires_grad else 4
        flops_per_token = per_weight * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, cls=torch.optim.AdamW):
        """AdamW (Loshchilov & Hutter 2019) with two groups, in `named_parameters` order: tensors of two or
        more dimensions, which are decayed, then biases and normalisation weights, which are not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return cls(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT with the weights of a GPT-2 in Hugging Face's format: one of GPT2_SIZES, from the hub or its
        local cache, or a folder with config.json and weights, of any size. override_args: dropout, attn_type,
        pa_norm. Raises ValueError for another architecture, FileNotFoundError for a missing folder."""
        args, weights = load_transformers_gpt2(model_type)
        if unknown := set(override_args or {}) - {'dropout', 'attn_type', 'pa_norm'}:
            raise ValueError(f'{", ".join(unknown)} cannot be overridden here')
        model = cls(GPTConfig(**args | (override_args or {})))
        model.load_state_dict(weights)
        return model


# ============================================================================ Beyond GPT-2
#
# The options of GPTConfig, a function or a module each, reached through tables. Models whose attention isn't
# GPT-2's (rope, alibi, qk_norm, value_residual, n_kv_head, attn_type) are made of OptionBlocks.

class ReLU2(nn.Module):  # So et al. 2021, "Primer"
    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """Gated SiLU (Shazeer 2020, "GLU Variants"): (..., 2 n) -> (..., n)"""

    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def softcap(logits, cap):  # Gemma 2, 2024, section 2
    return cap * torch.tanh(logits / cap)


ACTIVATIONS = {'gelu': nn.GELU, 'gelu_tanh': partial(nn.GELU, 'tanh'),  # tanh: GPT-2's own approximation
               'relu2': ReLU2, 'swiglu': SwiGLU}
NORMS = {
    'layernorm': lambda config: LayerNorm(config.n_embd, config.bias),
    'rmsnorm': lambda config: nn.RMSNorm(config.n_embd, eps=1e-5),  # Zhang & Sennrich 2019
}


def init_std(config, name, module):
    """Standard deviation of a module's weights; the projections into the residual stream are special."""
    is_residual = name.endswith('c_proj')  # 2 n_layer of them
    if config.init == 'gpt2':
        return 0.02 / math.sqrt(2 * config.n_layer) if is_residual else 0.02
    if isinstance(module, nn.Linear):  # zero_proj: each block begins as the identity
        return 0.0 if is_residual else module.in_features ** -0.5
    return 0.02


def mlp_size(config):
    """Matrices in c_fc, and their width; swiglu has two, and two thirds of the width."""
    if config.activation == 'swiglu':
        return 2, math.ceil(8 * config.n_embd / 3 / 64) * 64
    return 1, 4 * config.n_embd


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
        keys, key = [], idx
        for n in range(1, self.n_before + 1):
            key = key * (self.vocab_size + 1) + ids[:, self.n_before - n:self.n_before - n + T] + 1
            keys.append((key * 2654435761 >> 15) % self.num_embeddings)
        return super().forward(torch.stack(keys)).sum(dim=0)  # one gradient of the table, not one for each n


# pos_emb: the angles by which queries and keys are turned, and the bias of the scores, for positions (T,)
def no_positions(positions, n_keys, config, dtype):
    return None, None


def rotary(positions, n_keys, config, dtype):  # as_strided: a compiler makes angles once, not in each layer
    """cos and sin of the angles of Su et al. 2021, eq. 15: (T, hs / 2) each"""
    hs = config.n_embd // config.n_head
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, hs, 2, device=positions.device) / hs)
    return [t.as_strided(t.shape, t.stride()) for t in (angle.cos(), angle.sin())], None


def rotate(x, cos, sin):
    """Turn channel i with channel i + hs / 2. x: (B, nh, T, hs) -> (B, nh, T, hs)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def alibi(positions, n_keys, config, dtype):
    """Press et al. 2022: minus the distance to a key, times the head's slope; -inf for later keys."""
    nh = config.n_head
    n = 2 ** math.floor(math.log2(nh))
    head, key = (torch.arange(count, device=positions.device) for count in (nh, n_keys))
    slope = 2 ** -(torch.where(head < n, 8 * head + 8, 8 * (head - n) + 4) / n)  # (nh,), the paper's
    distance = positions[:, None] - key  # (T, n_keys)
    bias = -slope[:, None, None] * distance  # (nh, T, n_keys)
    return None, bias.masked_fill(distance < 0, -math.inf).to(dtype)


POSITIONS = {'learned': no_positions, 'rope': rotary, 'alibi': alibi, 'none': no_positions}


class OptionAttention(CausalSelfAttention):
    """Attention with any of the options: query-key norm (Henry et al. 2020), rotary positions or ALiBi,
    grouped queries (Ainslie et al. 2023), value residuals (Zhou et al. 2024), or no softmax (attn_type)."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        if config.attn_type != 'SM':
            self.attend = attention_types().attention(config)
        self.config, hs = config, config.n_embd // config.n_head
        self.norm = partial(F.rms_norm, normalized_shape=(hs,)) if config.qk_norm else nn.Identity()
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual and layer else None

    def forward(self, x, cache=None, angles=None, bias=None, first_v=None):
        """x: (B, T, C) -> (B, T, C), and the first layer's values, (B, n_kv_head, T, hs)"""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)  # (B, heads, T, hs)
        q, k, v = qkv.split(self.heads, dim=1)
        q, k = self.norm(q), self.norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q, k = q.type_as(v), k.type_as(v)  # CUDA's autocast normalises in float32
        first_v = v if first_v is None else first_v
        if self.value_mix is not None:
            v = self.value_mix[0] * v + self.value_mix[1] * first_v
        k, v, mask = (k, v, None) if cache is None else cache.append(self.layer, k, v)
        bias = mask if bias is None else bias
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, bias)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C))), first_v


class OptionBlock(Block):
    Attention = OptionAttention

    def forward(self, x, cache=None, angles=None, bias=None, first_v=None):
        y, first_v = self.attn(self.ln_1(x), cache, angles, bias, first_v)
        x = x + y
        return x + self.mlp(self.ln_2(x)), first_v


def run_option_blocks(blocks, x, positions, n_keys, cache=None):
    config, first_v = blocks[0].attn.config, None
    angles, bias = POSITIONS[config.pos_emb](positions, n_keys, config, x.dtype)
    for block in blocks:
        x, first_v = block(x, cache, angles, bias, first_v)
    return x


def blocks_of(config):
    """The class of the blocks, and the function that runs them."""
    is_gpt2 = (POSITIONS[config.pos_emb] is no_positions and config.attn_type == 'SM' and not config.qk_norm
               and not config.value_residual and config.n_kv_head in (0, config.n_head))
    return (Block, run_blocks) if is_gpt2 else (OptionBlock, run_option_blocks)


def attention_types():
    """support/attention.py, the one file of ours that this one may look up."""
    try:
        return importlib.import_module(f'{__package__ or ""}.support.attention'.lstrip('.'))
    except ImportError:
        raise ValueError('an attn_type other than SM needs support/attention.py') from None


def check_config(c):
    """ValueError for sizes that don't fit together and options that don't exist."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'ngram', 'ngram_rows'):
        if getattr(c, name) < 1:
            raise ValueError(f'{name}={getattr(c, name)} must be at least 1')
    choices = {'activation': ACTIVATIONS, 'pos_emb': POSITIONS, 'norm': NORMS, 'init': ('gpt2', 'zero_proj'),
               'pa_norm': ('length', 'block_size', 'none')}
    for name, known in choices.items():
        if getattr(c, name) not in known:
            raise ValueError(f'{name}={getattr(c, name)} is not one of {", ".join(known)}')
    c.attn_type = 'SM' if c.attn_type in ('SM', 'sm') else attention_types().canonical_attn_type(c.attn_type)
    for holds, rule in (
            (c.n_embd % c.n_head == 0, f'n_embd={c.n_embd} must be a multiple of n_head={c.n_head}'),
            (0 <= c.dropout < 1, f'dropout={c.dropout} must lie in [0, 1)'),
            (c.logit_softcap >= 0, f'logit_softcap={c.logit_softcap} must not be negative'),
            (c.n_kv_head == 0 or c.n_kv_head > 0 == c.n_head % c.n_kv_head,
             f'n_kv_head={c.n_kv_head} must be a divisor of n_head={c.n_head}'),
            (c.pos_emb != 'rope' or c.n_embd // c.n_head % 2 == 0,
             f'pos_emb=rope turns pairs of channels: n_embd / n_head = {c.n_embd // c.n_head} must be even'),
            (c.pos_emb != 'alibi' or c.attn_type == 'SM',
             f'pos_emb=alibi biases a softmax, which attn_type={c.attn_type} has none of')):
        if not holds:
            raise ValueError(rule)


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
