"""
Low-rank adapters (Hu et al. 2021, "LoRA"): fine-tuning in little memory, since few weights are trained.

    add_adapters(model, rank=8, alpha=16)     # before the optimizer is made; print(model) shows LoRALinear
    shrink_frozen(model, torch.bfloat16)      # after a state was loaded
    weights = merged_state_dict(model)        # of a plain model that computes the same

A linear layer W x + b of a block becomes W x + b + (alpha / rank) B A x. Only A, (rank, inputs), and B,
(outputs, rank), are trained. B is 0 at first, so the model starts out unchanged.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from support.errors import UserError
from support.machine.linear import product, replace_linears


class LoRALinear(nn.Linear):
    """A linear layer with an adapter."""

    def forward(self, x):
        """x: (..., inputs) -> (..., outputs)"""
        y = product(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A) * self.lora_scale, self.lora_B)

    def adapt(self, rank, alpha, like):
        """Make the adapter, or take that of another layer, `like`, which has the same weight."""
        self.lora_scale = alpha / rank
        if like is self:
            self.lora_A = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features ** -0.5)
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        else:
            self.lora_A, self.lora_B = like.lora_A, like.lora_B


def add_adapters(model, rank, alpha):
    """Freeze a GPT and put a layer with an adapter in the place of each linear layer of its blocks; rank 0
    changes nothing. UserError for a model without such layers."""
    if not rank:
        return
    blocks = getattr(getattr(model, 'transformer', None), 'h', None)
    if blocks is None or replace_linears(blocks, LoRALinear) == 0:
        raise UserError(f'lora_rank={rank} adapts the linear layers in transformer.h, which this model.py '
                        'lacks: use --lora_rank=0')
    model.requires_grad_(False)
    first = {}
    for layer in dict.fromkeys(adapted_layers(model).values()):
        layer.adapt(rank, alpha, like=first.setdefault(layer.weight, layer))


@torch.no_grad()
def shrink_frozen(model, dtype):
    """Keep a frozen weight in the type of the products, to which autocast would convert it, if no
    digit is lost: those of a file in bfloat16."""
    for layer in adapted_layers(model).values():
        small = layer.weight.to(dtype)
        if torch.equal(small.float(), layer.weight):
            layer.weight.data = small


def adapted_layers(model):
    """{name: layer} of the layers with an adapter, under each of their names."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)}


@torch.no_grad()
def merged_state_dict(model):
    """The state dict with (alpha / rank) B A added to each W, under a plain GPT's names. The sums are in the
    machine's memory; all other tensors are the model's own."""
    weights = model.state_dict()
    for name, layer in adapted_layers(model).items():
        update = layer.lora_scale * layer.lora_B @ layer.lora_A
        weights[f'{name}.weight'] = (layer.weight.float() + update).cpu()
        del weights[f'{name}.lora_A'], weights[f'{name}.lora_B']
    return weights


def check_adapters(config, state, is_resumed):
    """UserError for settings that don't go with adapters. state: the one that a run starts from, or None.
    is_resumed: whether it is the run's own."""
    rank = config['lora_rank']
    before = state.config if is_resumed else {}
    if config['eval_only']:  # a state's model has its adapters merged in
        return
    for name in ('lora_rank', 'lora_alpha') if rank or before.get('lora_rank') else ():
        if is_resumed and config[name] != before.get(name, 0):
            raise UserError(f'{name}={config[name]}, but the run to resume has {before.get(name, 0)}: use '
                            f'that, or start a new run from its model with --init_from={config["out_dir"]}')
    if rank and state is None and config['init_from'] in ('scratch', 'auto'):
        raise UserError(f'lora_rank={rank} adapts a trained model: --init_from=gpt2, or a folder')
    if rank and (config['optimizer'] != 'adamw' or config['parallel'] != 'ddp'):
        raise UserError(f'lora_rank={rank} goes with optimizer=adamw and parallel=ddp only')
