"""
Low-rank adapters (Hu et al. 2021, "LoRA"): fine-tuning in little memory, since few weights are trained.

    add_adapters(model, rank=8, alpha=16)     # before the optimizer is made
    weights = merged_state_dict(model)        # of a plain model that computes the same

A linear layer W x + b of a block becomes W x + b + (alpha / rank) B A x. Only A, (rank, inputs), and B,
(outputs, rank), are trained. B is 0 at first, so the model starts out unchanged.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from support.errors import UserError


def add_adapters(model, rank, alpha):
    """Freeze a GPT and add an adapter to each linear layer of its blocks; rank 0 changes nothing."""
    if not rank:
        return
    model.requires_grad_(False)
    for linear in [m for m in model.transformer.h.modules() if isinstance(m, nn.Linear)]:
        n_out, n_in = linear.weight.shape
        linear.lora_A = nn.Parameter(torch.randn(rank, n_in) * n_in ** -0.5)
        linear.lora_B = nn.Parameter(torch.zeros(n_out, rank))
        linear.lora_scale = alpha / rank
        linear.register_forward_hook(adapt)


def adapt(linear, inputs, output):
    """inputs[0]: (B, T, inputs), output: (B, T, outputs) -> (B, T, outputs)"""
    return output + F.linear(F.linear(inputs[0], linear.lora_A) * linear.lora_scale, linear.lora_B)


@torch.no_grad()
def merged_state_dict(model):
    """The state dict with (alpha / rank) B A added to each W, under a plain GPT's names. The sums are in the
    machine's memory; all other tensors are the model's own."""
    weights = model.state_dict()
    for name, linear in model.named_modules():
        if hasattr(linear, 'lora_A'):
            update = linear.lora_scale * linear.lora_B @ linear.lora_A
            weights[f'{name}.weight'] = (linear.weight + update).cpu()
            del weights[f'{name}.lora_A'], weights[f'{name}.lora_B']
    return weights


def check_adapters(config, state, is_resumed):
    """ValueError for settings that don't go with adapters. state: the one that a run starts from, or None.
    is_resumed: whether it is the run's own."""
    rank = config['lora_rank']
    before = state.get('config', {}) if is_resumed else {}
    if config['eval_only']:  # a state's model has its adapters merged in
        return
    for name in ('lora_rank', 'lora_alpha') if rank or before.get('lora_rank') else ():
        if is_resumed and config[name] != before.get(name, 0):
            raise UserError(f'{name}={config[name]}, but the run to resume has {before.get(name, 0)}: '
                             'use that, or start anew from its ckpt.pt with --init_from=finetune')
    if rank and state is None and config['init_from'] in ('scratch', 'auto'):
        raise UserError(f'lora_rank={rank} adapts a trained model: --init_from=gpt2, a folder or finetune')
    if rank and (config['ema_decay'] or config['optimizer'] != 'adamw' or config['parallel'] != 'ddp'):
        raise UserError(f'lora_rank={rank} goes with optimizer=adamw, ema_decay=0 and parallel=ddp only')
