"""
From a state to a model and back, for any model.py that has GPT and GPTConfig.

    model, tokenizer, state = load_model('resume', 'out', run)    # to sample from
    model = build_model(state, changes={'dropout': 0.1})          # to train on
    load_optimizer(optimizer, state.optimizer)
    State(model=model.state_dict(), model_args=model_args(model.config), ...)
"""

from dataclasses import MISSING, fields, replace

import torch

from model import GPT, GPTConfig
from support.errors import OutOfMemory, UserError
from support.hub.huggingface import folder_tokenizer, load_pretrained, read_pretrained
from support.machine.console import print0
from support.machine.files import explain_failure, reason_of
from support.machine.linear import use_cpu_linears
from support.sampling.quantize import build_int8
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import GPT2_VOCAB, NoTokenizer, tokenizer_from
from support.training.state import State, find_trained, map_state

GPT2_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
OFF = {  # settings of train.py that a model.py may lack, with the value that makes a GPT-2
    'activation': 'gelu', 'pos_emb': 'learned', 'norm': 'layernorm', 'qk_norm': False, 'tie_weights': True,
    'value_residual': False, 'logit_softcap': 0.0, 'n_kv_head': 0, 'n_inner': 0, 'head_size': 0, 'ngram': 1,
    'ngram_rows': 16384, 'init': 'gpt2', 'attn_type': 'SM', 'pa_norm': 'length'}
NOT_SET = ('auto', '', None)
MAPPED = 1 << 26  # bytes of a file to read before its mapping is renewed
LIKE_PARAMETERS = ('exp_avg', 'exp_avg_sq', 'momentum_buffer')  # AdamW's and Muon's


# ---------------------------------------------------------------------------- GPTConfig

def config_from_settings(settings, vocab_size):
    """The GPTConfig that train.py's settings describe. UserError for an option that this model.py lacks."""
    known = {f.name for f in fields(GPTConfig)}
    given = {k: v for k, v in settings.items() if v not in NOT_SET}
    if lacking := [f'{k}={given[k]}' for k, off in OFF.items()
                   if k in given and k not in known and given[k] != off]:
        raise UserError(f'model.py has no {", ".join(lacking)}: its GPTConfig has {", ".join(sorted(known))}')
    return make_config({k: v for k, v in given.items() if k in known} | {'vocab_size': vocab_size})


def model_args(config):
    """A GPTConfig as checkpoints keep it: GPT-2's seven settings, and the options without which the others
    would make another model."""
    args = {f.name: getattr(config, f.name) for f in fields(config)}
    return {k: v for k, v in args.items() if k in GPT2_ARGS or is_needed(config, k)}


def is_needed(config, name):
    """Whether a GPTConfig would differ in an option if the option weren't given."""
    default = next(f.default for f in fields(config) if f.name == name)
    if default is MISSING:
        return True
    try:
        return getattr(replace(config, **{name: default}), name) != getattr(config, name)
    except ValueError:  # the other sizes don't fit together without it
        return True


def config_from_args(args):
    """The inverse of `model_args`. Options that this GPTConfig lacks are ignored where they are off, and
    refused by name otherwise."""
    known = {f.name for f in fields(GPTConfig)}
    unknown = {k: v for k, v in args.items() if k not in known}
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    off = [k for k, v in unknown.items() if isinstance(v, plain) and not v]
    if refused := [str(k) for k in unknown if k not in off]:
        raise UserError(f'the checkpoint has model settings that don\'t exist here: {", ".join(refused)}')
    if off:
        print0(f'ignoring model settings of the checkpoint that are off: {", ".join(map(str, off))}')
    with explain_failure('the checkpoint\'s model_args are of no model'):
        return GPTConfig(**{k: v for k, v in args.items() if k in known})


def make_config(args):
    """GPTConfig(**args), with its complaints as UserErrors."""
    try:
        return GPTConfig(**args)
    except (ValueError, AssertionError) as error:
        raise UserError(str(error) or 'model.py refuses these sizes') from None


# ---------------------------------------------------------------------------- models

def make_model(config):
    """GPT(config), with its complaints as UserErrors."""
    try:
        return GPT(config)
    except (ValueError, AssertionError) as error:
        raise UserError(str(error) or f'model.py makes no model of {config}') from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or 'allocate memory' in str(error):
            raise OutOfMemory(f'out of memory while the model was made ({reason_of(error)}): use a smaller '
                              'n_embd or n_layer') from None
        raise


def build_model(state, changes):
    """The GPT of a State. changes: of its model_args. Raises UserError, before memory is taken, unless the
    tensors are those that model_args ask for."""
    model = make_model(checked_config(state, changes))
    with explain_failure('the checkpoint\'s tensors don\'t fit model.py\'s GPT'):
        model.load_state_dict(state.model)
    return model


def checked_config(state, changes):
    """The GPTConfig of a State, see build_model."""
    known = {f.name for f in fields(GPTConfig)}
    changes = {k: v for k, v in changes.items() if k in known or v != OFF.get(k, 0.0)}
    config, weights = config_from_args(state.model_args | changes), state.model
    if getattr(config, 'n_layer', 0) > len(weights):
        raise UserError(f'the checkpoint\'s model_args ask for {config.n_layer:,} layers, but it has only '
                         f'{len(weights):,} tensors')
    parameters = outline(config)
    if parameters is None:
        return config
    asked = {name: tuple(t.shape) for name, t in parameters.items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wrong := [name for name in asked | found if asked.get(name) != found.get(name)]:
        raise UserError(f'the checkpoint\'s model_args ask for {wrong[0]} of {asked.get(wrong[0], "no")} '
                         f'numbers, it has {found.get(wrong[0], "none")}; {len(wrong)} tensors differ')
    return untied_if_needed(config, parameters, weights)


def outline(config):
    """{name: parameter without memory} of a GPT; None for one that can't be made so."""
    try:
        with torch.device('meta'), explain_failure('the checkpoint\'s model_args are of no model',
                                                   passing=(RuntimeError,)):
            return GPT(config).state_dict(keep_vars=True)
    except RuntimeError:  # its constructor reads numbers
        return None


def untied_if_needed(config, parameters, weights):
    """The config with tie_weights=False if the checkpoint has two tensors where the model has one parameter
    under two names. UserError if model.py knows no other way."""
    first = {}
    for name, p in parameters.items():
        one, other = weights[first.setdefault(id(p), name)], weights[name]
        if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
            continue
        told = f'the checkpoint\'s {name} differs from its {first[id(p)]}'
        if not getattr(config, 'tie_weights', False):
            raise UserError(f'{told}, which are one in model.py')
        print0(f'{told}: read with tie_weights=False')
        return replace(config, tie_weights=False)
    return config


def starting_model(config, state, vocab_size):
    """The model that a run starts with: that of its State, or of a GPT-2 by its name or folder, or a new one.
    dropout is the run's own, and attn_type and pa_norm where they were given."""
    changes = {k: config[k] for k in ('attn_type', 'pa_norm') if k in config.given}
    changes['dropout'] = config['dropout']
    if state is not None:
        return build_model(state, changes)
    if config['init_from'] in ('scratch', 'auto'):
        return make_model(config_from_settings(config, vocab_size))
    return load_pretrained(config['init_from'], changes)


def load_model(init_from, out_dir, run, weights='full'):
    """model, tokenizer, state: of the run in out_dir if init_from is 'resume', of the run's folder or the
    checkpoint that init_from names, or of a GPT-2 by its name or folder, whose State has no iteration. The
    model is on the run's device, in evaluation mode. weights: 'full', or 'int8', which reads a checkpoint's
    tensors one after the other, and a GPT-2 as a whole."""
    if init_from == 'scratch':
        raise UserError('init_from=scratch is a model that was never trained: name a run with --out_dir, a '
                         'checkpoint, or gpt2')
    _, state = find_trained(init_from, out_dir)
    if state is None:
        model, tokenizer = load_from_hub(init_from, weights)
        state = State({}, model_args(model.config))
    elif weights == 'int8':
        model = build_int8(checked_config(state, {'dropout': 0.0}), tensors_in_turn(state))
        tokenizer = tokenizer_of(state)
    else:
        model, tokenizer = build_model(state, {'dropout': 0.0}), tokenizer_of(state)
    use_cpu_linears(model, run)
    return model.eval().to(run.device), tokenizer, state


def load_from_hub(init_from, weights):
    """model, tokenizer of a GPT-2's name or a folder."""
    tokenizer = folder_tokenizer(init_from)
    if weights != 'int8':
        return load_pretrained(init_from, {'dropout': 0.0}), tokenizer
    args, named = read_pretrained(init_from)
    return build_int8(make_config(args | {'dropout': 0.0}),
                      ((name, named.pop(name)) for name in [*named])), tokenizer


def tensors_in_turn(state):
    """(name, tensor) of a loaded state's model, whose file is mapped anew now and then: pages that were read
    count as memory of this process for as long as their mapping lasts."""
    mapped, n_read = state.model, 0
    for name in [*mapped]:
        if n_read > MAPPED:
            del mapped
            mapped, n_read = map_state(state.file, is_archive=True).model, 0
        n_read += mapped[name].nbytes
        yield name, mapped[name]


def tokenizer_of(state):
    """The tokenizer of a State; older files have none, but name their dataset."""
    if state.tokenizer is not None:
        return tokenizer_from(state.tokenizer)
    size = state.model_args.get('vocab_size', GPT2_VOCAB)
    folder = find_dataset(state.config.get('data_dir'), state.config.get('dataset', ''))
    tokenizer = Dataset(folder, splits=()).tokenizer
    if tokenizer.n_vocab > size:
        return NoTokenizer(size, 'the data folder that the checkpoint names is missing, or has no vocabulary '
                                 f'of {size}')
    return tokenizer


# ---------------------------------------------------------------------------- to go on with a run

def load_weights(model, saved):
    """Copy a saved state dict into a model, whose parameters may be sharded. UserError if it doesn't fit."""
    own = model.state_dict()
    with explain_failure('the trained weights of the checkpoint don\'t fit its model'):
        for name, tensor in saved.items():
            if tensor.shape != own[name].shape:
                raise UserError(f'{name} is {tuple(tensor.shape)}, where {tuple(own[name].shape)} is needed')
        model.load_state_dict({name: part_of(t, own[name]) for name, t in saved.items()})


def load_optimizer(optimizer, saved):
    """Give an optimizer the buffers of a saved state dict, by the names of its groups, else by their order.
    It keeps its own settings: a resumed run takes weight decay and betas from its config. Raises UserError,
    before a buffer is used, if the state doesn't fit the parameters."""
    what = 'the optimizer state of the checkpoint doesn\'t fit this run\'s parameters'
    with explain_failure(what):
        own, state = optimizer.state_dict()['param_groups'], {}
        pairs = match_groups(own, saved['param_groups'])
        for group, (mine, theirs) in zip(optimizer.param_groups, pairs, strict=True):
            for p, to, number in zip(group['params'], mine['params'], theirs['params'], strict=True):
                if number in saved['state']:
                    state[to] = {name: fitting_buffer(f'{name} of parameter {number}', name, value, p)
                                 for name, value in saved['state'][number].items()}
        groups = [mine | {k: theirs[k] for k in ('step',) if k in theirs} for mine, theirs in pairs]
        optimizer.load_state_dict({'state': state, 'param_groups': groups})
        keep_types(optimizer, own, state)


def match_groups(own, saved):
    """[(own group, saved group)]. UserError if these are groups of another optimizer."""
    sizes = [[len(group['params']) for group in groups] for groups in (own, saved)]
    names = [[group.get('name') for group in groups] for groups in (own, saved)]
    if None not in names[0] + names[1] and sorted(names[0]) == sorted(names[1]):
        by_name = {group['name']: group for group in saved}
        pairs = [(group, by_name[group['name']]) for group in own]
    else:
        pairs = [*zip(own, saved)]
    if len(own) != len(saved) or any(len(a['params']) != len(b['params']) for a, b in pairs):
        raise UserError(f'it has groups of {sizes[1]} parameters, this run\'s optimizer of {sizes[0]}: '
                         'optimizer and embedding_lr must be those of the run')
    return pairs


def fitting_buffer(title, name, value, param):
    """A copy of a parameter's buffer. UserError if one of AdamW or Muon isn't like its parameter."""
    if name == 'step' and not isinstance(value, torch.Tensor):
        return torch.tensor(float(value))  # of PyTorch before 1.12
    is_full = isinstance(value, torch.Tensor) and value.shape == param.shape
    is_number = is_full and value.is_floating_point() and value.itemsize <= param.itemsize
    if name in LIKE_PARAMETERS and not is_number:
        found = repr(value)[:80]
        if isinstance(value, torch.Tensor):
            found = f'{tuple(value.shape)}, {value.dtype}'
        raise UserError(f'{title} is {found}, where {tuple(param.shape)}, {param.dtype} is needed')
    if not isinstance(value, torch.Tensor):
        return value
    return part_of(value, param) if is_full else value.clone()


def keep_types(optimizer, groups, state):
    """Give buffers back their types: PyTorch's load_state_dict turns all of them into the parameter's."""
    params = [p for group in optimizer.param_groups for p in group['params']]
    numbers = [number for group in groups for number in group['params']]
    for p, number in zip(params, numbers, strict=True):
        for name, value in state.get(number, {}).items():
            loaded = optimizer.state[p].get(name)
            if isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[p][name] = value.to(loaded.device)


def part_of(saved, like):
    """A copy of a saved tensor; where the model's is sharded, of the part that this process holds."""
    if hasattr(like, 'device_mesh'):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved.clone()  # the mapped file may be replaced
