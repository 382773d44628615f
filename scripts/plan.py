"""
What a run of train.py would need on other GPUs: memory, time and GPU-hours under each strategy.

    python scripts/plan.py config/train_gpt2.py --gpus=8xH100
    python scripts/plan.py --gpus=64xA100 --n_layer=48 --n_head=25 --n_embd=1600

It needs no data and no GPU; docs/SCALING.md has the formulas. Its settings are `gpus` and those of train.py,
which `python train.py --help` explains.
"""

import sys
sys.path.insert(0, __file__.rpartition('plan.py')[0] + '..')
from configurator import ROOT, configure  # import first: reports missing packages

import torch

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.text.tokenizer import PADDED_GPT2_VOCAB
from support.training import models, optim, plan, start

exec(compile((ROOT / 'train.py').read_text(encoding='utf-8').partition('\nconfig = configure(')[0],
             'train.py', 'exec'))
gpus = '8xH100'  # their number and kind: a key of GPUS in support/machine/hardware.py

config = configure(globals(), GPTConfig, more=[optim.OptimizerOptions])

start.check_settings(config, Runtime('cuda', 'bfloat16', True, 'nccl'))
with torch.device('meta'):  # no memory for its weights
    model = GPT(models.config_from_settings(config, PADDED_GPT2_VOCAB))
sequences = config['gradient_accumulation_steps'] * config['batch_size']
print(plan.scale(model, gpus, sequences, config['max_iters'] + 1))
