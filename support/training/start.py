"""
How a run of train.py starts: its settings are checked, its state is found, its data must fit.

    state, is_resumed = find_state(config, run)
    model = starting_model(config, state, data.vocab_size)      # models.py
    report_start(config, state, is_resumed, model.config)
    check_start(config, state, is_resumed, data, model.config)
"""

import math
import os

from support.errors import MissingFile, UserError
from support.hub.huggingface import folder_tokenizer, own_tokenizer
from support.machine.console import print0
from support.machine.files import explain_failure
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import GPT2Tokenizer, is_same_tokenizer
from support.text.windows import SAMPLERS
from support.training.fsdp import check_parallel
from support.training.lora import check_adapters
from support.training.state import State, find_trained

CHOICES = {'sampler': SAMPLERS, 'optimizer': ('adamw', 'muon'),
           'lr_schedule': ('cosine', 'linear', 'wsd', 'constant')}
RANGES = {  # (least, first value that is too large): settings
    (0, math.inf): ('learning_rate', 'embedding_lr', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip',
                    'lora_alpha', 'logit_softcap', 'dist_timeout'),
    (0, 1): ('dropout', 'beta1', 'beta2'),
    (0, 2**63): ('eval_iters', 'sample_interval', 'checkpoint_interval', 'keep_interval', 'patience',
                 'batch_ramp_iters', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'lora_rank', 'n_kv_head'),
    (1, 2**63): ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval',
                 'n_layer', 'n_head', 'n_embd', 'ngram', 'ngram_rows'),
    (-2**63, 2**63): ('seed',),
}


def check_settings(config, run):
    """ValueError for a value out of range, and for settings that don't go together."""
    for name, known in CHOICES.items():
        if name in config and config[name] not in known:
            raise UserError(f'{name}={config[name]} is not one of {", ".join(known)}')
    for (least, end), names in RANGES.items():
        for name in names:
            if name in config and not least <= config[name] < end:  # nan isn't
                raise UserError(f'{name}={config[name]} must be {range_in_words(least, end)}')
    if config['learning_rate'] == 0 and (config['optimizer'] == 'muon' or config['embedding_lr']):
        raise UserError('learning_rate=0 with optimizer=muon or embedding_lr, which follow its schedule: it '
                         'must be above 0')
    check_parallel(config['parallel'], run, config['optimizer'])
    if config['gradient_accumulation_steps'] % run.world_size:
        raise UserError(f'gradient_accumulation_steps={config["gradient_accumulation_steps"]} counts over '
                         f'all processes and must be a multiple of their number, {run.world_size}')


def range_in_words(least, end):
    if end == math.inf:
        return f'at least {least} and finite'
    return f'at least {least} and ' + ('fit into 64 bits' if end == 2**63 else f'below {end}')


def open_data(config):
    """The Dataset that the settings name."""
    try:
        data = Dataset(find_dataset(config['data_dir'], config['dataset']))
    except MissingFile as error:
        if config['data_dir'] or config['dataset'] != 'openwebtext':
            raise
        raise MissingFile('to begin small, run: python data/shakespeare_char/prepare.py, then python train.py '
                          f'config/train_shakespeare_char_cpu.py; for OpenWebText, 90 GB: {error}') from None
    if data.vocab_path:
        print0(f'found vocab_size = {data.vocab_size} (inside {data.vocab_path})')
    return data


NAMES = ('out_dir', 'wandb_project', 'wandb_run_name')  # those of the first process count
OWN_TO_A_RANK = ('device', 'data_dir')  # a node may keep its copy of the data where it likes
SAID_IF_CHANGED = ('seed', 'sampler', 'batch_size', 'gradient_accumulation_steps', 'dtype', 'dataset')
RESOLVED = ('n_kv_head', 'n_inner', 'head_size')  # 0 in a setting: follows from other sizes


def share_names(config, run):
    """The first process's names, which may have a time in them, for all; also put into config."""
    names = run.broadcast({k: config[k] for k in NAMES if k in config})
    config.update(names)
    return names


def check_ranks(config, fingerprints, run):
    """UserError, on all processes, if they were started with different settings or data."""
    own = {k: str(v) for k, v in config.items() if k not in OWN_TO_A_RANK} | {
        f'SHA-256 of {split}': digest for split, digest in fingerprints.items()}
    theirs = run.gather_objects(own)
    for rank, other in enumerate(theirs):
        if differing := [f'{k}={other.get(k)} instead of {theirs[0].get(k)}' for k in own | other
                         if other.get(k) != theirs[0].get(k)]:
            raise UserError(f'rank {rank} was started otherwise than rank 0: {", ".join(differing)}')


# ---------------------------------------------------------------------------- the state

def find_state(config, run):
    """The State that init_from names, or None, and whether the run resumes it."""
    init_from, out_dir = config['init_from'], config['out_dir']
    evaluates_best = config['eval_only'] and init_from == 'resume'
    if init_from in ('resume', 'auto') and not evaluates_best:
        state = find_resumable(config, run)
        return state, state is not None
    _, state = find_trained(init_from, out_dir, verify=run.is_master)
    return state, evaluates_best


def find_resumable(config, run):
    """The State to resume from, the same on all processes, or None with init_from=auto where there is none.
    Once it is found, damaged files are renamed, but not in a dry run, so that nothing overwrites them."""
    out_dir = config['out_dir']
    path, state, damaged = State.newest(out_dir) if run.is_master else (None, None, {})
    if run.is_master and path is None:
        check_nothing_lost(out_dir, damaged, must_exist=config['init_from'] == 'resume')
    for bad, error in damaged.items():
        print0(str(error) if config.get('dry_run') else f'{error}; set aside as {set_aside(bad)}')
    path, iteration = run.broadcast((path and str(path), state and state.iter_num))
    if path is None:
        return None
    print0(f'resuming from {path}')
    state = state or State.load(path, verify=False)
    if state.iter_num != iteration:
        raise UserError(f'{path} is of iteration {state.iter_num} here, but of {iteration} on the first '
                        'process')
    return state


def check_nothing_lost(out_dir, damaged, must_exist):
    """Raises an error where a run can't be resumed and must not start again from 0."""
    if damaged:
        raise UserError(f'{next(iter(damaged.values()))}; no other state in {out_dir} is whole: '
                        '--init_from=scratch starts again from 0, and keeps these files')
    if must_exist:
        raise MissingFile(f'nothing to resume: {os.path.join(out_dir, "ckpt.pt")} is missing, or has no '
                          'optimizer state')


def set_aside(path):
    """Rename a damaged file; returns its new path."""
    names = (path.with_name(f'{path.name}.damaged{n}') for n in range(1, 1000))
    return path.rename(next(name for name in names if not name.exists()))


def restore(state, meter, guard, tokens_an_iteration):
    """Give meter and guard what a State has of them."""
    print0(f'resuming at iteration {state.iter_num}')
    meter.seconds = state.seconds
    meter.tokens = state.iter_num * tokens_an_iteration if state.n_tokens is None else state.n_tokens
    with explain_failure('the checkpoint has no progress that a run can resume'):
        guard.load_state_dict(state.guard or guard.state_dict())


# ---------------------------------------------------------------------------- what goes together

def report_start(config, state, is_resumed, model_config):
    """Print which settings the checkpoint overrides, and which a resumed run has changed."""
    kept = {k: v for k, v in vars(model_config).items() if k not in ('block_size', 'dropout', 'init')}
    asked = {k: config[k] for k in kept if config.get(k, 'auto') not in ('auto', '', None)}
    if other := [f'{k}={kept[k]} (not {v})' for k, v in asked.items()
                 if v != kept[k] and not (k in RESOLVED and v == 0)]:
        print0(f'as in the checkpoint: {", ".join(other)}')
    if state is None:
        return
    now, before = getattr(model_config, 'attn_type', 'SM'), state.model_args.get('attn_type', 'SM')
    if now != before:
        print0(f'attn_type: {now}, where the checkpoint has {before}')
    for name in SAID_IF_CHANGED if is_resumed else ():
        if name in state.config and state.config[name] != config[name]:
            print0(f'resuming with {name}={config[name]}, before {state.config[name]}')


def check_start(config, state, is_resumed, data, model_config):
    """UserError for data that the model can't be trained on, and for a run that can't go on as it is set."""
    check_adapters(config, state, is_resumed)
    if config['sample_interval']:
        data.tokenizer.decode([])  # raises an error if the tokens have no text
    if state is not None:
        check_tokenizer_of_run(state, data)
    elif config['init_from'] not in ('scratch', 'auto'):
        check_tokenizer_of_hub(config['init_from'], data, model_config.vocab_size)
    data.check(min(config['block_size'], model_config.block_size), model_config.vocab_size)
    if is_resumed and not config['eval_only']:
        check_resumed(config, state, data)


def check_resumed(config, state, data):
    """UserError for what a run can't change when it is resumed."""
    out_dir = config['out_dir']
    how = f'--init_from={out_dir} with another --out_dir starts a new run from its weights'
    optimizer, block_size = state.config.get('optimizer', 'adamw'), state.model_args.get('block_size', 0)
    if config['optimizer'] != optimizer:
        raise UserError(f'optimizer={config["optimizer"]}, but {out_dir} was trained with {optimizer}: '
                        f'resume with --optimizer={optimizer}; {how}')
    if config['block_size'] < block_size:
        raise UserError(f'block_size={config["block_size"]} would cut the model of {out_dir}, which has '
                        f'{block_size}, for good: resume with --block_size={block_size}; {how}')
    if state.data is not None and state.data != data.fingerprints():
        raise UserError(f'{data.folder} is not the data that {out_dir} was trained on: {how}')


def check_tokenizer_of_run(state, data):
    """UserError if the data isn't of the tokenizer that the run's model was trained with."""
    own = data.tokenizer.to_dict()
    if not is_same_tokenizer(state.tokenizer or own, own):
        raise UserError(f'the checkpoint was trained with another tokenizer than that of {data.folder}')


def check_tokenizer_of_hub(init_from, data, model_vocab_size):
    """UserError if the data isn't of the tokenizer of a model from transformers."""
    own, kind = own_tokenizer(init_from), data.tokenizer.to_dict()['kind']
    theirs = own or folder_tokenizer(init_from)
    if own or kind != 'none' != theirs.to_dict()['kind']:
        fits = is_same_tokenizer(theirs.to_dict(), data.tokenizer.to_dict())
    else:
        fits = kind == 'gpt2' or data.vocab_size == model_vocab_size
    if not fits:
        how = 'gpt2' if isinstance(theirs, GPT2Tokenizer) else init_from
        raise UserError(f'{init_from} has another tokenizer than {data.folder}: prepare the text with '
                        f'--tokenizer={how}')


def check_offers(model, name):
    """UserError if this model.py lacks what a setting needs of it."""
    if not hasattr(model, name):
        raise UserError(f'{name}=True needs a model with the attribute {name}, which this model.py lacks')
