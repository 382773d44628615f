"""A GPT-2 with nanoGPT's interface and nothing more: no cache, no loss as an argument."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, None, self.dropout * self.training, True)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, bias=c.bias), Attention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias),
                                  'c_proj': nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(c.vocab_size, c.n_embd),
            'wpe': nn.Embedding(c.block_size, c.n_embd),
            'drop': nn.Dropout(c.dropout), 'h': nn.ModuleList(Block(c) for _ in range(c.n_layer)),
            'ln_f': nn.LayerNorm(c.n_embd, bias=c.bias)})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None):
        assert idx.shape[1] <= self.config.block_size
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe.weight[:idx.shape[1]])
        for block in t.h:
            x = block(x)
        x = t.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1)

    def crop_block_size(self, block_size):
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    def get_num_params(self, non_embedding=True):
        n = sum(p.numel() for p in self.parameters())
        return n - non_embedding * self.transformer.wpe.weight.numel()

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        c = self.config
        flops = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops * c.block_size * fwdbwd_per_iter / dt / 312e12

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        groups = [{'params': [p for p in self.parameters() if (p.dim() < 2) == small],
                   'weight_decay': weight_decay * (not small)} for small in (False, True)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1] / temperature
            if top_k:
                smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits[logits < smallest] = -torch.inf
            idx = torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
        return idx
