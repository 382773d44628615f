"""
How a run of train.py starts: its settings are checked, its state is found, its data must fit.

    state, is_resumed = find_state(config, run)
    model = starting_model(config, state, data.vocab_size)      # models.py
    report_start(config, state, is_resumed, model.config)
    check_start(config, state, is_resumed, data, model.config)
"""

import itertools
import math
import os

from support.errors import MissingFile, OutOfMemory, UserError
from support.hub.huggingface import folder_tokenizer, own_tokenizer
from support.machine.console import print0
from support.machine.files import explain_failure
from support.machine.hardware import total_memory
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import GPT2Tokenizer, is_same_tokenizer
from support.text.windows import SAMPLERS
from support.training.fsdp import check_parallel
from support.training.lora import check_adapters
from support.training.state import State, find_trained

CHOICES = {'sampler': SAMPLERS, 'optimizer': ('adamw', 'muon'),
           'newton_schulz': ('steep', 'exact'), 'lr_schedule': ('cosine', 'linear', 'wsd', 'constant')}
RANGES = {  # (least, first value that is too large): settings
    (0, math.inf): ('learning_rate', 'embedding_lr', 'scalar_lr', 'muon_lr', 'min_lr',
                    'weight_decay', 'adam_weight_decay', 'adam_eps', 'grad_clip', 'lora_alpha',
                    'logit_softcap', 'init_gain', 'attn_scale', 'dist_timeout'),
    (0, 1): ('dropout', 'beta1', 'beta2'),
    (0, 2**63): ('eval_iters', 'sample_interval', 'checkpoint_interval', 'keep_interval',
                 'patience', 'batch_ramp_iters', 'max_iters', 'warmup_iters', 'lr_decay_iters',
                 'lora_rank', 'n_kv_head'),
    (1, 2**63): ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval',
                 'log_interval', 'n_head', 'n_embd', 'ngram', 'ngram_rows'),
    (1, 2**16): ('n_layer',),
    (-2**63, 2**63): ('seed',),
}


def check_settings(config, run):
    """UserError for a value out of range, and for settings that don't go together."""
    for name, known in CHOICES.items():
        if name in config and config[name] not in known:
            raise UserError(f'{name}={config[name]} is not one of {", ".join(known)}')
    for (least, end), names in RANGES.items():
        for name in names:
            value = config.get(name)
            if value is not None and not least <= value < end:  # nan isn't
                raise UserError(f'{name}={value} must be {range_in_words(least, end)}')
    if not 0 < config['wsd_decay'] <= 1:
        raise UserError(f'wsd_decay={config["wsd_decay"]} must be above 0 and at most 1')
    if config['learning_rate'] == 0 and (config['optimizer'] == 'muon' or config['embedding_lr']):
        raise UserError('learning_rate=0 with optimizer=muon or embedding_lr, which follow its '
                        'schedule: it must be above 0')
    if config['optimizer'] != 'muon' and (config['normuon'] or config['cautious_decay']):
        raise UserError('normuon and cautious_decay are of optimizer=muon: add --optimizer=muon')
    check_parallel(config['parallel'], run, config['optimizer'])
    if config['gradient_accumulation_steps'] % run.world_size:
        raise UserError(f'gradient_accumulation_steps={config["gradient_accumulation_steps"]} '
                        'counts over all processes and must be a multiple of their number, '
                        f'{run.world_size}')
    warn_of_rates(config)


def warn_of_rates(config):
    """Print a line for a learning rate that will not do what its settings seem to say."""
    decays = config['decay_lr'] and config['lr_schedule'] != 'constant'
    if decays and config['learning_rate'] < config['min_lr']:
        print0(f'warning: learning_rate={config["learning_rate"]} is below min_lr={config["min_lr"]}: the '
               'rate rises after the warm-up')
    if config['decay_lr'] and 0 < config['max_iters'] < config['warmup_iters']:
        print0(f'warning: warmup_iters={config["warmup_iters"]} is longer than the run, '
               f'max_iters={config["max_iters"]}: learning_rate is never reached')


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
        raise MissingFile('to begin small, run: python data/shakespeare_char/prepare.py, then '
                          'python train.py config/train_shakespeare_char_cpu.py; '
                          f'for OpenWebText, 90 GB: {error}') from None
    if data.vocab_path:
        print0(f'found vocab_size = {data.vocab_size} (inside {data.vocab_path})')
    return data


# ---------------------------------------------------------------------------- several processes

NAMES = ('out_dir', 'wandb_project', 'wandb_run_name')  # those of the first process count
OWN_TO_A_RANK = ('device', 'data_dir')  # a node may keep its copy of the data where it likes


def share_names(config, run):
    """Put the first process's names into config: they may have a time in them."""
    config.update(run.broadcast({k: config[k] for k in NAMES if k in config}))


def check_ranks(config, fingerprints, run):
    """UserError, on all processes, if they were started with different settings or data."""
    own = {k: str(v) for k, v in config.items() if k not in OWN_TO_A_RANK} | {
        f'SHA-256 of {split}': digest for split, digest in fingerprints.items()}
    first, *others = run.gather_objects(own)
    for rank, other in enumerate(others, 1):
        differing = [f'{k}={other.get(k)} instead of {first.get(k)}' for k in first | other
                     if other.get(k) != first.get(k)]
        if differing:
            raise UserError(f'rank {rank} was started otherwise than rank 0: '
                            f'{", ".join(differing)}')


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
    """The State to resume from, the same on all processes, or None if init_from=auto starts a new
    run. Once it is found, damaged files are renamed, so that nothing overwrites them."""
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
        raise UserError(f'{path} is of iteration {state.iter_num} on this process, of {iteration} '
                        'on the first')
    return state


def check_nothing_lost(out_dir, damaged, must_exist):
    """An error if there is no state to resume, but one was wanted, or was damaged."""
    if damaged:
        raise UserError(f'{next(iter(damaged.values()))}; no other state in {out_dir} is whole: '
                        '--init_from=scratch starts again from 0, and keeps these files')
    if must_exist:
        raise MissingFile(f'nothing to resume: {os.path.join(out_dir, "ckpt.pt")} is missing, or '
                          'has no optimizer state')


def set_aside(path):
    """Rename a damaged file; returns its new path."""
    names = (path.with_name(f'{path.name}.damaged{n}') for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def restore(state, meter, guard, tokens_an_iteration):
    """Give meter and guard what a State has of them."""
    print0(f'resuming at iteration {state.iter_num}')
    meter.seconds, meter.tokens = state.seconds, state.n_tokens
    if state.n_tokens is None:
        meter.tokens = state.iter_num * tokens_an_iteration
    with explain_failure('the checkpoint has no progress that a run can resume'):
        guard.load_state_dict(state.guard or guard.state_dict())


# ---------------------------------------------------------------------------- what goes together

REPORTED = ('n_layer', 'n_head', 'n_embd', 'bias')  # if the checkpoint overrides them
RESOLVED = ('n_kv_head', 'n_inner', 'head_size')  # 0: they follow from other settings
CHANGES = ('seed', 'sampler', 'batch_size', 'gradient_accumulation_steps', 'dtype', 'dataset')


def report_start(config, state, is_resumed, model_config):
    """Print which settings the checkpoint overrides, and which a resumed run has changed."""
    asked = {*REPORTED, *config.given} - {'block_size', 'dropout', 'init', 'init_gain', 'zero_head'}
    kept = {k: v for k, v in vars(model_config).items() if k in asked and k in config}
    overridden = [f'{k}={v} (not {config[k]})' for k, v in kept.items()
                  if v != config[k] and not (k in RESOLVED and config[k] == 0)]
    if overridden:
        print0(f'as in the checkpoint: {", ".join(overridden)}')
    if state is None:
        return
    now, before = getattr(model_config, 'attn_type', 'SM'), state.model_args.get('attn_type', 'SM')
    if now != before:
        print0(f'attn_type: {now}, where the checkpoint has {before}')
    for name in CHANGES if is_resumed else ():
        if name in state.config and state.config[name] != config[name]:
            print0(f'resuming with {name}={config[name]}, before {state.config[name]}')


def check_start(config, state, is_resumed, data, model_config):
    """UserError for data that the model can't be trained on, and for a run that can't be resumed
    with these settings."""
    check_adapters(config, state, is_resumed)
    if config['sample_interval']:
        data.tokenizer.decode([])  # raises an error if the tokens have no text
    if state is not None:
        check_tokenizer_of_run(state, data)
    elif config['init_from'] not in ('scratch', 'auto'):
        check_tokenizer_of_hub(config['init_from'], data, model_config.vocab_size)
    window = min(config['block_size'], model_config.block_size)
    data.check(window, model_config.vocab_size)
    check_batch(config, window)
    if is_resumed and not config['eval_only']:
        check_resumed(config, state, data)


def check_batch(config, window):
    """OutOfMemory if not even the token ids of a batch fit into the machine: a kernel that runs out
    of memory kills the run without a word."""
    n_sequences, there = config['batch_size'], total_memory('cpu') or math.inf
    starts = 3 * n_sequences * config['gradient_accumulation_steps']
    needed = 8 * (3 * n_sequences * (window + 1) + starts)  # as int64, with what is made on the way
    if needed > there:
        raise OutOfMemory(f'out of memory: the token ids alone of batch_size={n_sequences} and '
                          f'gradient_accumulation_steps={config["gradient_accumulation_steps"]} take '
                          f'{needed / 1e9:,.1f} GB, where this machine has {there / 1e9:,.1f} GB: '
                          'make them smaller')


def check_resumed(config, state, data):
    """UserError for what can't change when a run is resumed."""
    out_dir = config['out_dir']
    copy = f'--init_from={out_dir} with another --out_dir starts a new run from its weights'
    optimizer = state.config.get('optimizer', 'adamw')
    if config['optimizer'] != optimizer:
        raise UserError(f'optimizer={config["optimizer"]}, but {out_dir} was trained with '
                        f'{optimizer}: resume with --optimizer={optimizer}; {copy}')
    block_size = state.model_args.get('block_size', 0)
    has_table = state.model_args.get('pos_emb', 'learned') == 'learned'
    if has_table and config['block_size'] < block_size:
        raise UserError(f'block_size={config["block_size"]} would cut the model of {out_dir}, '
                        f'which has {block_size}, for good: resume with --block_size={block_size}; '
                        f'{copy}')
    if state.data is not None and state.data != data.fingerprints():
        raise UserError(f'{data.folder} is not the data that {out_dir} was trained on: {copy}')


def check_tokenizer_of_run(state, data):
    """UserError if the data isn't of the tokenizer that the run's model was trained with."""
    own = data.tokenizer.to_dict()
    if not is_same_tokenizer(state.tokenizer or own, own):
        raise UserError('the checkpoint was trained with another tokenizer than that of '
                        f'{data.folder}')


def check_tokenizer_of_hub(init_from, data, model_vocab_size):
    """UserError if the data isn't of the tokenizer of a model from transformers."""
    own, ours = own_tokenizer(init_from), data.tokenizer.to_dict()
    tokenizer = own or folder_tokenizer(init_from)
    theirs = tokenizer.to_dict()
    if own or 'none' not in (ours['kind'], theirs['kind']):
        fits = is_same_tokenizer(theirs, ours)
    else:
        fits = ours['kind'] == 'gpt2' or data.vocab_size == model_vocab_size
    if not fits:
        name = 'gpt2' if isinstance(tokenizer, GPT2Tokenizer) else init_from
        raise UserError(f'{init_from} has another tokenizer than {data.folder}: prepare the text '
                        f'with --tokenizer={name}')


def check_offers(model, name):
    """UserError if this model.py lacks what a setting needs of it."""
    if not hasattr(model, name):
        raise UserError(f'{name}=True needs a model with the attribute {name}, which this model.py '
                        'lacks')
