"""
What a checkpoint's state holds, as a model, a tokenizer and an optimizer.

    model, tokenizer, state = load_model('resume', 'out', run)    # to sample from
    model = build_model(state, changes={'dropout': 0.1})          # to train on
    load_optimizer(optimizer, state['optimizer'])
"""

from dataclasses import asdict, fields

import torch

from model import GPT, GPTConfig
from support.errors import UserError
from support.hub.huggingface import folder_tokenizer, load_pretrained, read_pretrained
from support.machine.console import print0
from support.machine.files import explain_failure
from support.settings import KINDS, ON_BY_DEFAULT, OTHER_NAMES, REMOVED
from support.machine.linear import use_fast_products
from support.sampling.quantize import build_int8
from support.training.checkpoint import load, load_trained, run_folder
from support.text.dataset import find_dataset
from support.text.tokenizer import GPT2_VOCAB, NoTokenizer, read_tokenizer, tokenizer_from

MAPPED = 1 << 26  # bytes of a file to read before its mapping is renewed
BUFFERS = ({'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'}, set())  # AdamW's, Muon's, before the first


def config_from_settings(settings, vocab_size):
    """The GPTConfig that train.py's settings describe."""
    names = [f.name for f in fields(GPTConfig) if settings.get(f.name, 'auto') != 'auto']
    return GPTConfig(**{k: settings[k] for k in names}, vocab_size=vocab_size)


def model_args(config):
    """A GPTConfig as checkpoints keep it: GPT-2's seven settings, and the options that aren't at their
    defaults."""
    gpt2 = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    default = {f.name: f.default for f in fields(config)}
    return {k: v for k, v in asdict(config).items() if k in gpt2 or v != default[k]}


def config_from_args(args):
    """The inverse of `model_args`. Unknown settings are ignored where they are off, and refused otherwise."""
    known = {f.name for f in fields(GPTConfig)}
    unknown = {k: v for k, v in args.items() if k not in known}
    off = [k for k, v in unknown.items() if isinstance(v, KINDS) and not v and k not in ON_BY_DEFAULT]
    if refused := [f'{k} ({REMOVED})' if OTHER_NAMES.get(k) == REMOVED else str(k)
                   for k in unknown if k not in off]:
        raise UserError(f'the checkpoint has model settings that don\'t exist here: {", ".join(refused)}')
    if off:
        print0(f'ignoring model settings of the checkpoint that are off: {", ".join(map(str, off))}')
    with explain_failure('the checkpoint\'s model_args are of no model'):
        return GPTConfig(**{k: v for k, v in args.items() if k in known})


def checked_config(state, changes):
    """The GPTConfig of a state. Raises ValueError, before memory is taken, unless the tensors are those that
    model_args ask for."""
    config, weights = config_from_args(state['model_args'] | changes), state['model']
    if config.n_layer > len(weights):
        raise UserError(f'the checkpoint\'s model_args ask for {config.n_layer:,} layers, but it has only '
                         f'{len(weights):,} tensors')
    with torch.device('meta'), explain_failure('the checkpoint\'s model_args are of no model'):
        asked = {name: tuple(t.shape) for name, t in GPT(config).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wrong := [name for name in asked | found if asked.get(name) != found.get(name)]:
        raise UserError(f'the checkpoint\'s model_args ask for {wrong[0]} of {asked.get(wrong[0], "no")} '
                         f'numbers, it has {found.get(wrong[0], "none")}; {len(wrong)} tensors differ')
    head, wte = weights['lm_head.weight'], weights['transformer.wte.weight']
    if config.tie_weights and head.data_ptr() != wte.data_ptr() and not torch.equal(head, wte):
        print0('the checkpoint\'s lm_head.weight differs from its wte.weight: read with tie_weights=False')
        config.tie_weights = False
    return config


def build_model(state, changes):
    """The GPT of a state. changes: of its model_args. Raises ValueError as `checked_config` does."""
    model = GPT(checked_config(state, changes))
    model.load_state_dict(state['model'])
    return model


def tokenizer_of(state):
    """The tokenizer of a state; older files have none, but name their dataset."""
    if 'tokenizer' in state:
        return tokenizer_from(state['tokenizer'])
    config, size = state.get('config', {}), state['model_args'].get('vocab_size', GPT2_VOCAB)
    tokenizer = read_tokenizer(find_dataset(config.get('data_dir'), config.get('dataset', '')))
    if tokenizer.n_vocab > size:
        return NoTokenizer(size, 'the data folder that the checkpoint names is missing, or has no vocabulary '
                                 f'of {size}')
    return tokenizer


def load_model(init_from, out_dir, run, weights='full'):
    """model, tokenizer, state: of the run in out_dir if init_from is 'resume', else of a GPT-2 by its name or
    folder, whose state is {}. The model is on the run's device, in evaluation mode. weights: 'full', or
    'int8', which reads a checkpoint's tensors one after the other, and a GPT-2 as a whole."""
    if init_from == 'resume':
        path, state = load_trained(out_dir)
        if weights == 'int8':
            model = build_int8(checked_config(state, {'dropout': 0.0}), tensors_in_turn(path))
        else:
            model = build_model(state, {'dropout': 0.0})
        tokenizer = tokenizer_of(state)
    elif folder := run_folder(init_from):
        raise UserError(f'init_from={init_from} is a run, no GPT-2: --out_dir={folder} reads its model')
    else:
        state, tokenizer = {}, folder_tokenizer(init_from)
        if weights == 'int8':
            args, named = read_pretrained(init_from)
            model = build_int8(GPTConfig(**args | {'dropout': 0.0}),
                               ((name, named.pop(name)) for name in [*named]))
        else:
            model = load_pretrained(init_from, {'dropout': 0.0})
    use_fast_products(model, run)
    return model.eval().to(run.device), tokenizer, state


def tensors_in_turn(path):
    """(name, tensor) of the model in a checked file, which is mapped anew now and then: pages that were read
    count as memory of this process for as long as their mapping lasts."""
    mapped = load(path, verify=False)['model']
    n_read = 0
    for name in [*mapped]:
        if n_read > MAPPED:
            del mapped
            mapped, n_read = load(path, verify=False)['model'], 0
        n_read += mapped[name].nbytes
        yield name, mapped[name]


def load_weights(model, saved):
    """Copy a saved state dict into a model, which may have been cropped. ValueError if it doesn't fit."""
    own = model.state_dict()
    with explain_failure('the trained weights of the checkpoint don\'t fit its model'):
        model.load_state_dict({name: cut(name, t, own[name], crop=name == 'transformer.wpe.weight')
                               for name, t in saved.items()})


def load_optimizer(optimizer, saved, cropped=None):
    """Give an optimizer the buffers of a saved state. It keeps its own settings: a resumed run takes weight
    decay and betas from its config. cropped: the parameter that may have had more rows. Raises ValueError,
    before a buffer is used, if the state doesn't fit the parameters."""
    with explain_failure('the optimizer state of the checkpoint doesn\'t fit this run\'s parameters'):
        groups = [own | {k: theirs[k] for k in ('params', 'step') if k in theirs} for own, theirs in
                  zip(optimizer.state_dict()['param_groups'], saved['param_groups'], strict=True)]
        params = {i: p for own, theirs in zip(optimizer.param_groups, groups, strict=True)
                  for i, p in zip(theirs['params'], own['params'], strict=True)}
        state = {i: fitting_buffers(i, buffers, params[i], params[i] is cropped)
                 for i, buffers in saved['state'].items()}
        optimizer.load_state_dict({'state': state, 'param_groups': groups})


def fitting_buffers(number, buffers, param, crop):
    """Copies of a parameter's buffers. ValueError if they aren't of its shape and type."""
    if set(buffers) not in BUFFERS:
        raise UserError(f'parameter {number} has the buffers {", ".join(map(str, buffers))}')
    found = {}
    for name, buffer in buffers.items():
        is_step = name == 'step'
        value = torch.as_tensor(buffer, dtype=torch.float32) if is_step else buffer
        found[name] = cut(f'{name} of parameter {number}', value, torch.zeros(()) if is_step else param, crop)
    return found


def cut(name, saved, like, crop=False):
    """A copy of a saved tensor in the shape of the model's; if that is sharded, the part that this process
    holds. crop: the model's may have fewer rows. ValueError for another shape or type."""
    fits = saved.dtype == like.dtype and saved.dim() == like.dim() and saved.shape[1:] == like.shape[1:]
    if not fits or saved.shape[:1] != like.shape[:1] and not (crop and len(saved) > len(like)):
        raise UserError(f'{name} is {tuple(saved.shape)}, {saved.dtype}, where {tuple(like.shape)}, '
                         f'{like.dtype} is needed')
    saved = saved[:len(like)] if saved.dim() else saved
    if hasattr(like, 'device_mesh'):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved.clone()  # the mapped file may be replaced
