"""An architecture of somebody's own: fading memories of the past instead of attention, a mixture of
two MLPs, settings and a parameter that nobody else has, other names, and an optimizer with buffers
of its own."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 64
    vocab_size: int = 100
    n_layer: int = 2
    n_head: int = 1
    n_embd: int = 32
    dropout: float = 0.0
    bias: bool = True
    n_wide: int = 48  # width of the wider MLP
    slowest: float = 0.98  # share of the memory that stays from one token to the next


class SignMomentum(torch.optim.Optimizer):
    """Moves each weight by a sign of its momentum; keeps that, 8-bit signs, a number of steps."""

    def __init__(self, params, lr):
        super().__init__(params, {'lr': lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                s = self.state[p]
                if not s:
                    s |= {'slow': torch.zeros_like(p), 'n': 0,
                          'signs': torch.zeros_like(p, dtype=torch.int8)}
                s['slow'].mul_(0.9).add_(p.grad)
                s['signs'].add_(s['slow'].sign().to(torch.int8)).clamp_(-9, 9)
                s['n'] += 1
                p -= group['lr'] / s['n'] * s['signs'].float()


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        slowest = torch.logit(torch.tensor(c.slowest)).item()
        self.fade = nn.Parameter(torch.linspace(-2, slowest, c.n_embd))
        self.read = nn.Linear(2 * c.n_embd, c.n_embd, bias=c.bias)
        self.gate = nn.Linear(c.n_embd, 1)
        self.small, self.wide = (nn.Sequential(
            nn.Linear(c.n_embd, width), nn.Tanh(), nn.Linear(width, c.n_embd))
            for width in (8, c.n_wide))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        keep, past, seen = self.fade.sigmoid(), torch.zeros_like(x[:, 0]), []
        for now in x.unbind(dim=1):
            past = keep * past + (1 - keep) * now
            seen.append(past)
        x = x + self.dropout(self.read(torch.cat((x, torch.stack(seen, dim=1)), dim=-1)).relu())
        share = self.gate(x).sigmoid()
        return x + share * self.small(x) + (1 - share) * self.wide(x)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.Sequential(*(Layer(config) for _ in range(config.n_layer)))
        self.temper = nn.Parameter(torch.tensor(0.3))

    def forward(self, idx, targets=None):
        x = self.layers(self.embed(idx))
        logits = self.temper * x @ self.embed.weight.T
        if targets is None:
            return logits[:, -1:], None
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction='none')
        return logits, losses.sum() / (targets != -1).sum()

    def crop_block_size(self, block_size):
        self.config.block_size = block_size

    def get_num_params(self, non_embedding=True):
        return sum(p.numel() for p in self.parameters())

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        return 6 * self.get_num_params() * self.config.block_size * fwdbwd_per_iter / dt / 312e12

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        slow = [p for name, p in self.named_parameters() if 'fade' in name or 'temper' in name]
        others = [p for name, p in self.named_parameters()
                  if not ('fade' in name or 'temper' in name)]
        return SignMomentum([{'params': others}, {'params': slow, 'lr': learning_rate / 10}],
                            learning_rate)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            p = (self(idx)[0][:, -1] / temperature).softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(p, 1)), dim=1)
        return idx
