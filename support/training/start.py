"""How a run of train.py starts: its settings are checked, its state is found, its data must fit."""

import math
import os

from support.errors import MissingFile, UserError
from support.hub.huggingface import folder_tokenizer, own_tokenizer
from support.machine.console import print0
from support.machine.files import explain_failure
from support.training.fsdp import check_parallel
from support.machine.hardware import keep_products, products
from support.training.lora import check_adapters
from support.training import checkpoint
from support.text.dataset import find_dataset
from support.text.tokenizer import GPT2Tokenizer, is_same_tokenizer, read_vocabulary
from support.text.tokens import SAMPLERS, check_split, open_split

CHOICES = {'sampler': SAMPLERS, 'optimizer': ('adamw', 'muon'),
           'lr_schedule': ('cosine', 'linear', 'wsd', 'constant')}
RANGES = {  # (least, first value that is too large): settings
    (0, math.inf): ('learning_rate', 'embedding_lr', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip',
                    'lora_alpha', 'logit_softcap', 'dist_timeout'),
    (0, 1): ('dropout', 'beta1', 'beta2', 'ema_decay'),
    (0, 2**63): ('eval_iters', 'sample_interval', 'checkpoint_interval', 'batch_ramp_iters',
                 'max_iters', 'warmup_iters', 'lr_decay_iters', 'lora_rank', 'n_kv_head'),
    (1, 2**63): ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval',
                 'n_layer', 'n_head', 'n_embd', 'ngram', 'ngram_rows'),
    (-2**63, 2**63): ('seed',),
}


def check_settings(config, run):
    """ValueError for a value out of range, and for settings that don't go together."""
    for name, known in CHOICES.items():
        if config[name] not in known:
            raise UserError(f'{name}={config[name]} is not one of {", ".join(known)}')
    for (least, end), names in RANGES.items():
        for name in names:
            if not least <= config[name] < end:  # nan isn't
                raise UserError(f'{name}={config[name]} must be {range_in_words(least, end)}')
    if config['learning_rate'] == 0 and (config['optimizer'] == 'muon' or config['embedding_lr']):
        raise UserError('learning_rate=0 with optimizer=muon or embedding_lr, which follow its schedule: it '
                         'must be above 0')
    check_parallel(config['parallel'], run, config['optimizer'], config['cpu_offload'])
    if config['gradient_accumulation_steps'] % run.world_size:
        raise UserError(f'gradient_accumulation_steps={config["gradient_accumulation_steps"]} counts over '
                         f'all processes and must be a multiple of their number, {run.world_size}')


def range_in_words(least, end):
    if end == math.inf:
        return f'at least {least} and finite'
    return f'at least {least} and ' + ('fit into 64 bits' if end == 2**63 else f'below {end}')


OWN_TO_A_RANK = ('device', 'data_dir')  # a node may keep its copy of the data where it likes


def check_ranks(config, fingerprints, run):
    """ValueError, on all processes, if they were started with different settings or data."""
    own = {k: str(v) for k, v in config.items() if k not in OWN_TO_A_RANK} | {
        f'SHA-256 of {split}': digest for split, digest in fingerprints.items()}
    theirs = run.gather_objects(own)
    for rank, other in enumerate(theirs):
        if differing := [f'{k}={other.get(k)} instead of {theirs[0].get(k)}' for k in own | other
                         if other.get(k) != theirs[0].get(k)]:
            raise UserError(f'rank {rank} was started otherwise than rank 0: {", ".join(differing)}')


def open_data(config):
    """A dataset's folder, its splits as {'train': tokens, 'val': tokens}, its tokenizer and vocab_size.
    Raises as `open_split` does; a run without settings, which asks for OpenWebText, is told of small data.
    """
    folder = find_dataset(config['data_dir'], config['dataset'])
    try:
        data = {split: open_split(folder, split) for split in ('train', 'val')}
    except FileNotFoundError as error:
        if config['data_dir'] or config['dataset'] != 'openwebtext':
            raise
        raise MissingFile(
            'to begin small, run: python data/shakespeare_char/prepare.py, then python train.py '
            f'config/train_shakespeare_char_cpu.py; for OpenWebText, 90 GB: {error}') from None
    tokenizer, vocab_size, path = read_vocabulary(folder)
    if path:
        print0(f'found vocab_size = {vocab_size} (inside {path})')
    return folder, data, tokenizer, vocab_size


def find_state(config, run):
    """The state that init_from names, or None, and whether the run resumes it."""
    state, init_from, out_dir = None, config['init_from'], config['out_dir']
    if init_from == 'finetune':
        _, state = checkpoint.load_trained(config['finetune_from'] or out_dir)
    elif config['eval_only'] and init_from == 'resume':
        _, state = checkpoint.load_trained(out_dir)
    elif init_from in ('resume', 'auto'):
        state = checkpoint.load_newest(out_dir, run, init_from == 'resume', config['dry_run'])
    elif folder := checkpoint.run_folder(init_from):
        raise UserError(f'init_from={init_from} is a run, no GPT-2: --init_from=finetune '
                         f'--finetune_from={folder} starts from its model, --init_from=resume '
                         f'--out_dir={folder} goes on with it')
    is_resumed = state is not None and init_from != 'finetune'
    check_adapters(config, state, is_resumed)
    if run.device_type == 'cpu':
        if is_resumed and (earlier := state.get('config', {}).get('products', products())) != products():
            keep_products(earlier)
            print0(f'float32 products: {products()}, as before the stop')
        config['products'] = products()
    return state, is_resumed


def check_data(config, folder, data, window, model_config, vocab_size, tokenizer, fingerprints, state,
               is_resumed):
    """ValueError for data that the model or the run can't continue on; tells which settings the checkpoint
    overrules, and a change of attention."""
    tell_overruled(config, model_config)
    if config['sample_interval']:
        tokenizer.decode([])  # raises an error if the tokens have no text
    if state:
        if not is_same_tokenizer(state.get('tokenizer', tokenizer.to_dict()), tokenizer.to_dict()):
            raise UserError(f'the checkpoint was trained with another tokenizer than that of {folder}')
        if (stored := state['model_args'].get('attn_type', 'SM')) != model_config.attn_type:
            print0(f'attn_type: {model_config.attn_type}, where the checkpoint has {stored}')
    elif config['init_from'] not in ('scratch', 'auto'):
        check_tokenizer(config['init_from'], folder, tokenizer, vocab_size, model_config.vocab_size)
    for split, tokens in data.items():
        check_split(tokens, os.path.join(folder, f'{split}.bin'), window, model_config.vocab_size)
    may_change = config['eval_only'] or config['allow_changed_data']
    if is_resumed and not may_change and state.get('data', fingerprints) != fingerprints:
        raise UserError(f'{folder} is not the data that {config["out_dir"]} was trained on: to resume on '
                         'other data, add --allow_changed_data=True')


def tell_overruled(config, model_config):
    """Print the settings of the architecture in whose place the model has a checkpoint's. block_size and
    dropout may be changed, and `init` has done its work."""
    kept = {k: v for k, v in vars(model_config).items() if k not in ('block_size', 'dropout', 'init')}
    asked = {k: config[k] for k in kept if config.get(k, 'auto') != 'auto'}
    for settings in (kept, asked):
        settings['n_kv_head'] = settings['n_kv_head'] or settings['n_head']
    if other := [f'{k}={kept[k]} (not {v})' for k, v in asked.items() if v != kept[k]]:
        print0(f'as in the checkpoint: {", ".join(other)}')


def check_tokenizer(init_from, folder, tokenizer, vocab_size, model_vocab_size):
    """ValueError if the data in `folder` isn't of the tokenizer of a model from transformers."""
    own, kind = own_tokenizer(init_from), tokenizer.to_dict()['kind']
    theirs = own or folder_tokenizer(init_from)
    if own or kind != 'none' != theirs.to_dict()['kind']:
        fits = is_same_tokenizer(theirs.to_dict(), tokenizer.to_dict())
    else:
        fits = kind == 'gpt2' or vocab_size == model_vocab_size
    if not fits:
        how = 'gpt2' if isinstance(theirs, GPT2Tokenizer) else init_from
        raise UserError(f'{init_from} has another tokenizer than {folder}: prepare the text with '
                         f'--tokenizer={how}')


def restore(state, meter, guard, tokens_an_iteration, wandb_id):
    """Give meter and guard what a state has of them; returns its iteration, best loss and wandb run."""
    print0(f'resuming at iteration {state["iter_num"]}')
    with explain_failure('the checkpoint has no progress that a run can resume'):
        best = float(state['best_val_loss'])
        meter.seconds = float(state.get('seconds', 0.0))
        meter.tokens = int(state.get('n_tokens', state['iter_num'] * tokens_an_iteration))
        guard.load_state_dict(state.get('guard') or guard.state_dict())
    # nothing is less than nan, so no later model would be the best
    return state['iter_num'], math.inf if math.isnan(best) else best, state.get('wandb_id', wandb_id)
