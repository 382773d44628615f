"""
Checkpoints: a crash while one is written leaves the one before it whole, and damage is detected.

    save('out/latest.pt', state, keep='out/previous.pt')
    path, state, damaged = newest('out')
    model, tokenizer, state = load_model('resume', 'out', run)

A run's folder holds
    ckpt.pt       the model to sample from: the best one, or that of the last evaluation
    latest.pt     the newest state, to resume from
    previous.pt   the one before it, should latest.pt be damaged
    log.jsonl     a line for each logged iteration and evaluation (runlog.py)
A state is a zip archive, as torch.save writes it, with its SHA-256 as the archive's comment, which other
readers ignore.
"""

import errno
import hashlib
import os
import re
import shutil
import struct
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from configurator import KINDS, ON_BY_DEFAULT
from model import GPT, GPTConfig
from support.hub.huggingface import folder_tokenizer, load_pretrained, read_pretrained
from support.machine.console import print0
from support.machine.files import explain_failure, reason_of, replacing
from support.machine.pickles import STAND_INS
from support.network.matmul import use_fast_products
from support.network.quantize import build_int8
from support.text.tokenizer import read_tokenizer, tokenizer_from

RESUMABLE = ('latest.pt', 'previous.pt', 'ckpt.pt')  # of equal iterations, the first is taken
MARK = b'sha256:'
MARK_LENGTH = len(MARK) + 64  # with the digest in hex
MAPPED = 1 << 26  # bytes of a file to read before its mapping is renewed


# ---------------------------------------------------------------------------- writing

def save(path, state, keep=None):
    """Write `state` to `path`, which holds the whole old file or the whole new one at any time.

    keep: a name for the old file, which replaces what was there. If the file can't be written, raises an
    OSError that names the space needed and free, and leaves all as it was.
    """
    needed, folder = size_of(state), Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if shutil.disk_usage(folder).free < needed:
            raise OSError('no space left')
        with replacing(path, keep) as temporary:
            torch.save(state, temporary)
            sign(temporary)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = str(error).splitlines()[0][:120]
        raise OSError(f'{path} could not be written: it needs {needed / 1e6:,.1f} MB, '
                      f'{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free ({reason})') from None


def size_of(state):
    """Bytes of a state's file, rounded up: each storage of tensors, counted once, and 1 KB more."""
    storages, stack = {}, [state]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (dict, list, tuple)):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return sum(storages.values()) + 1024 * (len(storages) + 16)


def sign(path):
    """Set a zip archive's comment to the SHA-256 of everything before the comment."""
    with open(path, 'rb+') as file:
        file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment and the comment
        file.write(struct.pack('<H', MARK_LENGTH))
        file.seek(0)
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest.encode())


# ---------------------------------------------------------------------------- reading

def is_damaged(path):
    """Whether a file differs from what `save` wrote. Other programs' files have no checksum: an archive with
    no comment, or a file of another kind, counts as whole."""
    n_signed = os.path.getsize(path) - MARK_LENGTH
    with open(path, 'rb') as file:
        beginning = file.read(2)
        file.seek(max(0, n_signed))
        end = file.read()
        if end.startswith(MARK):
            digest = hashlib.sha256()
            file.seek(0)
            for at in range(0, n_signed, 1 << 20):  # mapped pages would count as memory of this process
                digest.update(file.read(min(1 << 20, n_signed - at)))
            return digest.hexdigest().encode() != end[len(MARK):]
    is_plain_archive = end[-22:-18] == b'PK\5\6' and end[-2:] == b'\0\0'
    return beginning == b'PK' and not is_plain_archive


def load(path, verify=True):
    """A checkpoint as a dict of CPU tensors and plain values; no code in the file is run.

    The file is mapped: tensors take no memory until they are read. verify: compare the checksum, for the
    first of several readers. Raises FileNotFoundError if it is missing or may not be read, ValueError if it
    is damaged or no checkpoint, MemoryError, which says nothing about the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is missing: train a model there first, or name another --out_dir')
    try:
        with explain_failure(f'{path} is not a checkpoint, or a damaged one', passing=(
                MemoryError, PermissionError)):
            if verify and is_damaged(path):
                raise ValueError('its checksum is wrong')
            state = read_archive(path)
            check_state(state, os.path.getsize(path))
    except MemoryError:
        raise MemoryError(f'out of memory while {path} was read') from None
    except PermissionError as error:
        raise FileNotFoundError(f'{path} can\'t be read ({reason_of(error)})') from None
    state['model'] = clean_names(state['model'])
    if state['model_args'].get('vocab_size', 0) is None and 'transformer.wte.weight' in state['model']:
        state['model_args']['vocab_size'] = len(state['model']['transformer.wte.weight'])
    return state


def read_archive(path):
    """What torch.save wrote, with tensors that are mapped. Raises MemoryError where there is too little."""
    with open(path, 'rb') as file:
        is_archive = file.read(2) == b'PK'  # the format before torch 1.6 is none and can't be mapped
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError('it is compressed, which torch.save doesn\'t do')
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_archive)
    except (OSError, RuntimeError) as error:
        if getattr(error, 'errno', None) == errno.ENOMEM or 'allocate memory' in str(error):
            raise MemoryError from None
        raise


def check_state(state, size):
    """ValueError if a file's content, read from `size` bytes, is no state, or asks for more memory."""
    if not (isinstance(state, dict)
            and all(isinstance(state.get(name), dict) for name in ('model', 'model_args'))
            and all(isinstance(name, str) and isinstance(t, torch.Tensor)
                    for name, t in state['model'].items())
            and all(isinstance(name, str) for name in state['model_args'])):
        raise ValueError('it has no model and model_args')
    if not isinstance(state.get('iter_num', 0), int) or not 0 <= state.get('iter_num', 0) < 2**63:
        raise ValueError(f'iter_num={state["iter_num"]} is no number of iterations')
    for t in tensors_of(state):
        if t.device.type != 'cpu' or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f'a tensor of {tuple(t.shape)} has fewer numbers in the file')
    if sum(t.nbytes for t in state['model'].values()) > 2 * size:  # a tied matrix has two names
        raise ValueError('its tensors share their memory')


def tensors_of(state):
    """The tensors in a tree of dicts, lists and tuples, each node once, however often it is referred to."""
    seen, stack = set(), [state]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)


def clean_names(weights):
    """The model's own tensor names: without the prefixes of torch.compile and DistributedDataParallel, nor
    the causal masks that older scripts saved."""
    names = {name: re.sub(r'^((_orig_mod|module)\.)+', '', name) for name in weights}
    return {clean: weights[name] for name, clean in names.items() if not clean.endswith('.attn.bias')}


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
    if refused := [str(k) for k in unknown if k not in off]:
        raise ValueError(f'the checkpoint has model settings that don\'t exist here: {", ".join(refused)}')
    if off:
        print0(f'ignoring model settings of the checkpoint that are off: {", ".join(map(str, off))}')
    with explain_failure('the checkpoint\'s model_args are of no model'):
        return GPTConfig(**{k: v for k, v in args.items() if k in known})


def build_model(state, changes):
    """The GPT of a state. changes: of its model_args. Raises ValueError as `checked_config` does."""
    model = GPT(checked_config(state, changes))
    model.load_state_dict(state['model'])
    return model


def checked_config(state, changes):
    """The GPTConfig of a state. Raises ValueError, before memory is taken, unless the tensors are those that
    model_args ask for."""
    config, weights = config_from_args(state['model_args'] | changes), state['model']
    if config.n_layer > len(weights):
        raise ValueError(f'the checkpoint\'s model_args ask for {config.n_layer:,} layers, but it has only '
                         f'{len(weights):,} tensors')
    with torch.device('meta'), explain_failure('the checkpoint\'s model_args are of no model'):
        asked = {name: tuple(t.shape) for name, t in GPT(config).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wrong := [name for name in asked | found if asked.get(name) != found.get(name)]:
        raise ValueError(f'the checkpoint\'s model_args ask for {wrong[0]} of {asked.get(wrong[0], "no")} '
                         f'numbers, it has {found.get(wrong[0], "none")}; {len(wrong)} tensors differ')
    return config


def tokenizer_of(state):
    """The tokenizer of a state; older files have none, but name their dataset."""
    if 'tokenizer' in state:
        return tokenizer_from(state['tokenizer'])
    config = state.get('config', {})
    return read_tokenizer(config.get('data_dir') or os.path.join('data', config.get('dataset', '')))


def load_model(init_from, out_dir, run, weights='full'):
    """model, tokenizer, state: of out_dir/ckpt.pt if init_from is 'resume', else of a GPT-2 by its name or
    folder, whose state is {}. The model is on the run's device, in evaluation mode. weights: 'full', or
    'int8', which reads a checkpoint's tensors one after the other, and a GPT-2 as a whole."""
    if init_from == 'resume':
        path = Path(out_dir, 'ckpt.pt')
        state = load(path)
        if weights == 'int8':
            model = build_int8(checked_config(state, {'dropout': 0.0}), tensors_in_turn(path))
        else:
            model = build_model(state, {'dropout': 0.0})
        tokenizer = tokenizer_of(state)
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


# ---------------------------------------------------------------------------- a run's folder

def newest(out_dir):
    """path, state, damaged: the newest whole state in `out_dir` that has an optimizer, else None and None;
    and the errors of damaged files, by path."""
    states, damaged = {}, {}
    for path in (Path(out_dir, name) for name in RESUMABLE):
        if path.is_file():
            try:
                state = load(path)
            except ValueError as error:
                damaged[path] = error
            else:
                if 'optimizer' in state and 'iter_num' in state:
                    states[path] = state
    path = max(states, key=lambda path: states[path]['iter_num'], default=None)
    return path, states.get(path), damaged


def find(out_dir, run, must_exist, dry_run=False):
    """The state to resume from, the same on all processes; if there is none, None or, with `must_exist`, an
    error. Damaged files are reported and, except in a dry run, renamed, so that nothing overwrites them."""
    path, state, damaged = newest(out_dir) if run.is_master else (None, None, {})
    if run.is_master and path is None and must_exist:
        raise next(iter(damaged.values()), None) or FileNotFoundError(
            f'nothing to resume: {os.path.join(out_dir, "ckpt.pt")} is missing, or has no optimizer state')
    for bad, error in damaged.items():
        print0(error if dry_run else f'{error}; set aside as {set_aside(bad)}')
    path = run.broadcast(path and str(path))
    if path is None:
        return None
    print0(f'resuming from {path}')
    return state or load(path, verify=False)


def set_aside(path):
    """Rename a damaged file; returns its new path."""
    names = (path.with_name(f'{path.name}.damaged{n}') for n in range(1, 1000))
    return path.rename(next(name for name in names if not name.exists()))


# ---------------------------------------------------------------------------- into model and optimizer

def cut(name, saved, like, crop=False):
    """A copy of a saved tensor in the shape of the model's; if that is sharded, the part that this process
    holds. crop: the model's may have fewer rows. ValueError for another shape or type."""
    fits = saved.dtype == like.dtype and saved.dim() == like.dim() and saved.shape[1:] == like.shape[1:]
    if not fits or saved.shape[:1] != like.shape[:1] and not (crop and len(saved) > len(like)):
        raise ValueError(f'{name} is {tuple(saved.shape)}, {saved.dtype}, where {tuple(like.shape)}, '
                         f'{like.dtype} is needed')
    saved = saved[:len(like)] if saved.dim() else saved
    if hasattr(like, 'device_mesh'):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved.clone()  # the mapped file may be replaced


def load_weights(model, saved):
    """Copy a saved state dict into a model, which may have been cropped. ValueError if it doesn't fit."""
    own = model.state_dict()
    with explain_failure('the trained weights of the checkpoint don\'t fit its model'):
        model.load_state_dict({name: cut(name, t, own[name], crop=name == 'transformer.wpe.weight')
                               for name, t in saved.items()})


BUFFERS = ({'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'}, set())  # AdamW's, Muon's, before the first


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
        raise ValueError(f'parameter {number} has the buffers {", ".join(map(str, buffers))}')
    found = {}
    for name, buffer in buffers.items():
        is_step = name == 'step'
        value = torch.as_tensor(buffer, dtype=torch.float32) if is_step else buffer
        found[name] = cut(f'{name} of parameter {number}', value, torch.zeros(()) if is_step else param, crop)
    return found
