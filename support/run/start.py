"""How a run of train.py starts: its settings are checked, its state is found, its data must fit."""

import os

from support.machine.console import print0
from support.machine.fsdp import check_parallel
from support.network.lora import check_adapters
from support.run import checkpoint
from support.text.tokens import SAMPLERS, check_split

CHOICES = {'sampler': SAMPLERS, 'optimizer': ('adamw', 'muon'),
           'lr_schedule': ('cosine', 'linear', 'wsd', 'constant')}
AT_LEAST = {
    0: ('eval_iters', 'sample_interval', 'checkpoint_interval', 'plan_gpus', 'batch_ramp_iters', 'dropout',
        'learning_rate', 'muon_lr', 'min_lr', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'weight_decay',
        'grad_clip', 'beta1', 'beta2', 'ema_decay', 'lora_rank', 'dist_timeout', 'peak_flops'),
    1: ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval'),
}
BELOW_1 = ('dropout', 'beta1', 'beta2', 'ema_decay')


def check_settings(config, run):
    """ValueError for a value out of range, and for settings that don't go together."""
    for name, known in CHOICES.items():
        if config[name] not in known:
            raise ValueError(f'{name}={config[name]} is not one of {", ".join(known)}')
    for least, names in AT_LEAST.items():
        for name in names:
            if not config[name] >= least:  # nan isn't
                raise ValueError(f'{name}={config[name]} must be at least {least}')
            if name in BELOW_1 and config[name] >= 1:
                raise ValueError(f'{name}={config[name]} must be below 1')
    if not -2**63 <= config['seed'] < 2**63:
        raise ValueError(f'seed={config["seed"]} must fit into 64 bits')
    check_parallel(config['parallel'], run, config['optimizer'], config['cpu_offload'])
    if config['gradient_accumulation_steps'] % run.world_size:
        raise ValueError(f'gradient_accumulation_steps={config["gradient_accumulation_steps"]} counts over '
                         f'all processes and must be a multiple of their number, {run.world_size}')


def find_state(config, run):
    """The state that init_from names, or None, and whether the run resumes it."""
    state, init_from, out_dir = None, config['init_from'], config['out_dir']
    if init_from == 'finetune':
        state = checkpoint.load(os.path.join(config['finetune_from'] or out_dir, 'ckpt.pt'))
    elif config['eval_only'] and init_from == 'resume':
        state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
    elif init_from in ('resume', 'auto'):
        state = checkpoint.find(out_dir, run, must_exist=init_from == 'resume', dry_run=config['dry_run'])
    is_resumed = state is not None and init_from != 'finetune'
    check_adapters(config, state, is_resumed)
    return state, is_resumed


def check_data(config, folder, data, window, model_config, meta, tokenizer, fingerprints, state, is_resumed):
    """ValueError for data that the model or the run can't continue on; tells a change of attention."""
    if config['sample_interval']:
        tokenizer.decode([])  # raises an error if the tokens have no text
    if state:
        if state.get('tokenizer', tokenizer.to_dict()) != tokenizer.to_dict():
            raise ValueError(f'the checkpoint was trained with another tokenizer than that of {folder}')
        if (stored := state['model_args'].get('attn_type', 'SM')) != model_config.attn_type:
            print0(f'attn_type: {model_config.attn_type}, where the checkpoint has {stored}')
    elif meta and meta['vocab_size'] != model_config.vocab_size:
        raise ValueError(f'{folder} holds characters, but {config["init_from"]} has a vocabulary of '
                         f'{model_config.vocab_size}: prepare the text as GPT-2 BPE (data/shakespeare does)')
    for split, tokens in data.items():
        check_split(tokens, os.path.join(folder, f'{split}.bin'), window, model_config.vocab_size)
    may_change = config['eval_only'] or config['allow_changed_data']
    if is_resumed and not may_change and state.get('data', fingerprints) != fingerprints:
        raise ValueError(f'{folder} is not the data that {config["out_dir"]} was trained on: to resume on '
                         'other data, add --allow_changed_data=True')
