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
from support.errors import OutOfMemory, UserError, amount_asked
from support.hub.huggingface import chat_template, folder_tokenizer, load_pretrained, read_pretrained
from support.machine.console import print0
from support.machine.files import MAPPED, explain_failure
from support.machine.hardware import DTYPES
from support.machine.linear import has_cpu_linears, use_cpu_linears
from support.sampling.quantize import build_quantized
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import GPT2_VOCAB, NoTokenizer, tokenizer_from
from support.training.state import State, find_trained

GPT2_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))  # what may be off
LIKE_PARAMETERS = ('exp_avg', 'exp_avg_sq', 'momentum_buffer')  # AdamW's and Muon's buffers


# ---------------------------------------------------------------------------- GPTConfig

def config_from_settings(settings, vocab_size):
    """The GPTConfig that train.py's settings describe."""
    names = [f.name for f in fields(GPTConfig)]
    given = {k: settings[k] for k in names if k in settings}
    return make_config(given | {'vocab_size': vocab_size})


def make_config(args):
    """GPTConfig(**args), with its complaints as UserErrors."""
    try:
        return GPTConfig(**args)
    except (ValueError, AssertionError) as error:
        raise UserError(str(error) or f'model.py refuses the sizes {args}') from None


def model_args(config):
    """A GPTConfig as checkpoints keep it: GPT-2's seven settings, and the options without which it
    would be another model."""
    args = {f.name: getattr(config, f.name) for f in fields(config)}
    return {k: v for k, v in args.items() if k in GPT2_ARGS or is_needed(config, k)}


def is_needed(config, name):
    """Whether an option would have another value if it weren't given."""
    field = next(f for f in fields(config) if f.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING:
        return True
    try:
        return getattr(replace(config, **{name: default}), name) != getattr(config, name)
    except ValueError:  # the other sizes don't fit together without it
        return True


def config_from_args(args):
    """The inverse of `model_args`. Options that this GPTConfig lacks are ignored if they are off,
    and refused by name otherwise."""
    known = {f.name for f in fields(GPTConfig)}
    unknown = {k: v for k, v in args.items() if k not in known}
    off = [k for k, v in unknown.items() if isinstance(v, PLAIN) and not v]
    if refused := [str(k) for k in unknown if k not in off]:
        raise UserError('the checkpoint has model settings that don\'t exist here: '
                        f'{", ".join(refused)}')
    if off:
        print0(f'ignoring model settings of the checkpoint that are off: {", ".join(off)}')
    with explain_failure('the checkpoint\'s model_args are of no model'):
        return GPTConfig(**{k: v for k, v in args.items() if k in known})


# ---------------------------------------------------------------------------- models

def make_model(config):
    """GPT(config), with its complaints as UserErrors. OutOfMemory if it doesn't fit."""
    try:
        return GPT(config)
    except (ValueError, AssertionError) as error:
        raise UserError(str(error) or f'model.py makes no model of {config}') from None
    except (RuntimeError, TypeError, MemoryError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or 'allocate memory' in text or 'overflow' in text:
            raise OutOfMemory(f'out of memory{amount_asked(error)}: this model does not fit, use a '
                              'smaller n_embd, n_layer or vocabulary') from None
        raise


def build_model(state, changes):
    """The GPT of a State. changes: of its model_args. Raises UserError, before memory is taken,
    unless the tensors are those that model_args ask for."""
    model = make_model(checked_config(state, changes))
    with explain_failure('the checkpoint\'s tensors don\'t fit the GPT of model.py'):
        model.load_state_dict(state.model)
    return model


def checked_config(state, changes):
    """The GPTConfig of a State, see build_model."""
    config, weights = config_from_args(state.model_args | changes), state.model
    if getattr(config, 'n_layer', 0) > len(weights):
        raise UserError(f'the checkpoint\'s model_args ask for {config.n_layer:,} layers, but it '
                        f'has only {len(weights):,} tensors')
    parameters = outline(config)
    asked = {name: tuple(t.shape) for name, t in parameters.items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wrong := [name for name in asked | found if asked.get(name) != found.get(name)]:
        first = wrong[0]
        raise UserError(f'the checkpoint\'s model_args ask for {first} of {asked.get(first, "no")} '
                        f'numbers, it has {found.get(first, "none")}; {len(wrong)} tensors differ')
    return untied_if_needed(config, parameters, weights)


def outline(config):
    """{name: parameter} of a GPT, without memory if it can be made so."""
    message = f'the checkpoint\'s model_args are of no model: {config}'
    try:
        with torch.device('meta'), explain_failure(message, passing=(RuntimeError,)):
            return GPT(config).state_dict(keep_vars=True)
    except RuntimeError:  # its constructor reads numbers
        return make_model(config).state_dict(keep_vars=True)


def untied_if_needed(config, parameters, weights):
    """The config, with tie_weights=False if the checkpoint has two tensors for what the model has
    as one parameter under two names. UserError if model.py has no such option."""
    first = {}
    for name, p in parameters.items():
        twin = first.setdefault(id(p), name)
        one, other = weights[twin], weights[name]
        if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
            continue
        message = f'the checkpoint\'s {name} differs from its {twin}'
        if not getattr(config, 'tie_weights', False):
            raise UserError(f'{message}, but model.py has one parameter for both')
        print0(f'{message}: read with tie_weights=False')
        return replace(config, tie_weights=False)
    return config


def starting_model(config, state, vocab_size):
    """The model that a run starts with: that of its State, that of a GPT-2 by its name or folder,
    or a new one. dropout is the run's own, and attn_type and pa_norm where they were given."""
    changes = {k: config[k] for k in ('attn_type', 'pa_norm') if k in config.given}
    changes['dropout'] = config['dropout']
    if state is not None:
        return build_model(state, changes)
    if config['init_from'] in ('scratch', 'auto'):
        return make_model(config_from_settings(config, vocab_size))
    return load_pretrained(config['init_from'], changes)


def load_model(init_from, out_dir, run, weights='full'):
    """model, tokenizer, state: of the run in out_dir if init_from is 'resume', of the run's folder
    or the checkpoint that init_from names, or of a GPT-2 by its name or folder, whose State has no
    iteration. The model is on the run's device, in evaluation mode. weights: 'full', or 'int8' or
    'int4', which read tensors one after the other."""
    if init_from == 'scratch':
        raise UserError('init_from=scratch is a model that was never trained: name a run with '
                        '--out_dir, a checkpoint, or gpt2')
    _, state = find_trained(init_from, out_dir)
    if state is None:
        template = chat_template(init_from)  # a bad one is refused before the weights are read
        dtype = None if has_cpu_linears(run) else DTYPES[run.dtype]
        model, tokenizer = load_from_hub(init_from, weights, dtype)
        state = State({}, model_args(model.config), chat=template)
    elif weights != 'full':
        config = checked_config(state, {'dropout': 0.0})
        model = build_quantized(config, tensors_in_turn(state), weights)
        tokenizer = tokenizer_of(state)
    else:
        model, tokenizer = build_model(state, {'dropout': 0.0}), tokenizer_of(state)
    use_cpu_linears(model, run)
    return model.eval().to(run.device), tokenizer, state


def load_from_hub(init_from, weights, dtype):
    """model, tokenizer of a name of the hub or a folder. dtype: of linear layers' weights, None: the
    files', if it has 16 bits."""
    tokenizer = folder_tokenizer(init_from)
    if weights == 'full':
        return load_pretrained(init_from, {'dropout': 0.0}, dtype), tokenizer
    args, named = read_pretrained(init_from)
    config = make_config(args | {'dropout': 0.0})
    return build_quantized(config, named.items(), weights), tokenizer


def tensors_in_turn(state):
    """(name, tensor) of a loaded state's model, whose file is mapped anew now and then: pages that
    were read count as memory of this process for as long as their mapping lasts."""
    mapped, n_read = state.model, 0
    for name in [*mapped]:
        if n_read > MAPPED:
            del mapped
            mapped, n_read = state.remapped(), 0
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
        return NoTokenizer(size, 'the data folder that the checkpoint names is missing, or has no '
                                 f'vocabulary of {size}')
    return tokenizer


# ---------------------------------------------------------------------------- to resume a run

def load_weights(model, saved):
    """Copy a saved state dict into a model, whose parameters may be sharded. UserError if it
    doesn't fit."""
    own = model.state_dict()
    with explain_failure('the trained weights of the checkpoint don\'t fit its model'):
        for name, tensor in saved.items():
            if tensor.shape != own[name].shape:
                raise UserError(f'{name} is {tuple(tensor.shape)}, where {tuple(own[name].shape)} '
                                'is needed')
        model.load_state_dict({name: part_of(t, own[name]) for name, t in saved.items()})


def load_optimizer(optimizer, saved):
    """Give an optimizer the buffers of a saved state dict, by the names of its groups, else in
    their order. It keeps its own settings: a resumed run takes weight decay and betas from its
    config. Raises UserError, before a buffer is used, if the state doesn't fit the parameters."""
    message = 'the optimizer state of the checkpoint doesn\'t fit this run\'s parameters'
    with explain_failure(message):
        groups, state = optimizer.state_dict()['param_groups'], {}
        pairs = match_groups(groups, saved['param_groups'])
        for group, (own, theirs) in zip(optimizer.param_groups, pairs, strict=True):
            own |= {'step': theirs['step']} if 'step' in theirs else {}
            for p, to, number in zip(group['params'], own['params'], theirs['params'], strict=True):
                buffers = saved['state'].get(number, {})
                check_buffers(number, buffers, p)
                state[to] = {name: own_copy(value, p) for name, value in buffers.items()}
        state = {number: buffers for number, buffers in state.items() if buffers}
        optimizer.load_state_dict({'state': state, 'param_groups': groups})
        numbers = [number for group in groups for number in group['params']]
        params = [p for group in optimizer.param_groups for p in group['params']]
        param_of = dict(zip(numbers, params, strict=True))
        for number, buffers in state.items():
            restore_types(optimizer.state[param_of[number]], buffers)


def match_groups(own, saved):
    """[(own group, saved group)]. UserError if these are groups of another optimizer."""
    names = [[group.get('name') for group in groups] for groups in (own, saved)]
    pairs = [*zip(own, saved)]
    if None not in names[0] and sorted(names[0]) == sorted(map(str, names[1])):
        pairs = [(group, saved[names[1].index(group['name'])]) for group in own]
    if len(own) != len(saved) or any(len(a['params']) != len(b['params']) for a, b in pairs):
        sizes = [[len(group['params']) for group in groups] for groups in (own, saved)]
        raise UserError(f'it has groups of {sizes[1]} parameters, this run\'s optimizer of '
                        f'{sizes[0]}: optimizer and embedding_lr must be those of the run')
    return pairs


def check_buffers(number, buffers, param):
    """UserError unless those of AdamW and Muon are like their parameter. Another optimizer's have
    the shapes and types that it gives them."""
    for name in LIKE_PARAMETERS:
        if name in buffers and not is_like(buffers[name], param):
            found, wanted = describe(buffers[name]), describe(param)
            raise UserError(f'{name} of parameter {number} is {found}, where {wanted} is needed')


def is_like(value, param):
    """Whether a buffer has the shape of its parameter, and no wider numbers."""
    return (isinstance(value, torch.Tensor) and value.shape == param.shape
            and value.is_floating_point() and value.itemsize <= param.itemsize)


def describe(value):
    if isinstance(value, torch.Tensor):
        return f'{tuple(value.shape)}, {value.dtype}'
    return repr(value)[:80]


def own_copy(value, param):
    """A copy of a saved buffer, in parts if its parameter is; numbers as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return part_of(value, param) if value.shape == param.shape else value.clone()


def restore_types(loaded, buffers):
    """Give a parameter's buffers their own types again: PyTorch's load_state_dict turns all of them
    into the parameter's."""
    for name, value in buffers.items():
        if isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
            loaded[name] = value.to(loaded[name].device)


def part_of(saved, like):
    """A copy of a saved tensor; if the model's is sharded, of the part that this process holds."""
    if hasattr(like, 'device_mesh'):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved.clone()  # the mapped file may be replaced
