"""train.py: each setting reaches what it changes; what a run logs, saves, starts from and refuses."""

import functools
import math
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS
from runs import logged

from configurator import configure
from model import GPT, GPTConfig
from support.text.dataset import Dataset

LOOP = ('--max_iters=5', '--learning_rate=1e-2', '--min_lr=1e-3', '--lr_decay_iters=4', '--eval_interval=100',
        '--gradient_accumulation_steps=2', '--weight_decay=1.0', '--checkpoint_interval=0')


def settings_of(*args):
    """train.py's settings with these arguments."""
    variables = {}
    exec((ROOT / 'train.py').read_text().partition('\nconfig = configure(')[0], variables)
    return configure(variables, GPTConfig, [*TINY_ARGS, *args])


def rate(s, it):
    """Learning rate of an iteration, by the contract's formula."""
    if not s.decay_lr:
        return s.learning_rate
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == 'constant':
        return s.learning_rate
    done = min(1, (it - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters))
    share = {'cosine': (1 + math.cos(math.pi * done)) / 2, 'linear': 1 - done,
             'wsd': min(1, 5 * (1 - done))}[s.lr_schedule]
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def plain_loop(folder, settings):
    """The losses of a training loop as nanoGPT has it, and its model."""
    s, data = SimpleNamespace(**settings), Dataset(folder)['train']
    options = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
    torch.manual_seed(s.seed)
    model, T = GPT(GPTConfig(**options, vocab_size=Dataset(folder).vocab_size)), s.block_size
    apart = [model.transformer.wte.weight] if s.embedding_lr else []
    params = [p for p in model.parameters() if not any(p is q for q in apart)]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': s.weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
              {'params': apart, 'weight_decay': s.weight_decay}]
    opt = torch.optim.AdamW([g for g in groups if g['params']], betas=(s.beta1, s.beta2), foreach=False)
    seen, losses = 0, {}
    autocast = torch.autocast('cpu', torch.bfloat16) if s.dtype == 'bfloat16' else nullcontext()
    for it in range(s.max_iters + 1):
        n = math.ceil(s.gradient_accumulation_steps * min(1, (it + 1) / (s.batch_ramp_iters + 1)))
        starts = data.train_windows(s.sampler, s.seed, seen if s.sampler == 'epoch' else it,
                                    n * s.batch_size, T)
        seen += len(starts)
        dropout = np.random.SeedSequence((s.seed, 0, it)).generate_state(1, np.uint64)
        torch.manual_seed(int(dropout[0]))
        losses[it] = 0.0
        for part in starts.reshape(n, -1):
            ids = torch.from_numpy(data.tokens[part[:, None] + np.arange(T + 1)].astype(np.int64))
            with autocast:
                loss = model(ids[:, :-1], ids[:, 1:])[1] / n
            loss.backward()
            losses[it] += loss.item()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for p in model.parameters():
            p.grad *= s.grad_clip / max(s.grad_clip, norm) if s.grad_clip else 1
        for group in opt.param_groups:
            share = s.embedding_lr / s.learning_rate if apart and group['params'][0] is apart[0] else 1
            group['lr'] = rate(s, it) * share
        opt.step()
        opt.zero_grad()
    return losses, model


@functools.cache
def losses_of_plain_loop(folder, *args):
    return plain_loop(folder, settings_of(*args))[0]


OF_THE_LOOP = [
    (), ('--learning_rate=3e-3',), ('--min_lr=5e-3',), ('--warmup_iters=0',), ('--warmup_iters=4', '--lr_decay_iters=5'),
    ('--lr_decay_iters=8',), ('--decay_lr=False',), ('--lr_schedule=linear',), ('--lr_schedule=wsd',),
    ('--lr_schedule=constant',), ('--weight_decay=0',), ('--beta1=0.5',), ('--beta2=0.5',), ('--grad_clip=0.3',),
    ('--grad_clip=0',), ('--gradient_accumulation_steps=3',), ('--batch_size=3',), ('--block_size=8',),
    ('--max_iters=7',), ('--seed=7',), ('--dropout=0.3',), ('--sampler=epoch',), ('--bias=True',),
    ('--batch_ramp_iters=3', '--gradient_accumulation_steps=3'),
    ('--batch_ramp_iters=3', '--gradient_accumulation_steps=3', '--sampler=epoch'),
    ('--tie_weights=False',), ('--tie_weights=False', '--embedding_lr=0.1'), ('--dtype=bfloat16',),
    ('--n_layer=1',), ('--n_head=4',), ('--n_embd=16',),
    # of GPTConfig
    ('--activation=gelu_tanh',), ('--activation=relu2',), ('--activation=swiglu',), ('--pos_emb=rope',),
    ('--pos_emb=alibi',), ('--pos_emb=none',), ('--norm=rmsnorm',), ('--norm_eps=0.1',), ('--qk_norm=True',),
    ('--qkv_bias=True',), ('--value_residual=True',), ('--logit_softcap=0.5',), ('--n_kv_head=1',),
    ('--head_size=8',), ('--n_inner=48',), ('--pos_emb=rope', '--rope_theta=4'),
    ('--pos_emb=rope', '--rope_scaling=(8,1,4,16)'), ('--ngram=3', '--ngram_rows=64'), ('--ngram=3', '--ngram_rows=9'),
    ('--init=zero_proj',), ('--attn_type=GK',), ('--attn_type=PA_relu', '--pa_norm=block_size'),
]


@pytest.mark.parametrize('changed', OF_THE_LOOP, ids=' '.join)
def test_run_computes_what_a_plain_loop_does(changed, train, char_data, tmp_path):
    train(*LOOP, *changed)
    found = logged(tmp_path / 'out')
    expected = losses_of_plain_loop(char_data, *LOOP, *changed)
    print(changed, [found[i] - expected[i] for i in found])
    print(changed, [expected[i] - losses_of_plain_loop(char_data, *LOOP)[i] for i in found if i < 6])
    assert found == pytest.approx(expected, abs=2e-4)
    if changed:
        assert found != pytest.approx(losses_of_plain_loop(char_data, *LOOP), abs=1e-3)
