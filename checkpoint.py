"""
What survives a run: its states, written so that no crash can damage the one before and no damage goes unseen.

    save('out/latest.pt', state, keep='out/previous.pt')
    path, state, damaged = newest('out')

A run's folder holds
    ckpt.pt       the model to sample from: the best one, or that of the last evaluation
    latest.pt     the newest state, to resume from
    previous.pt   the one before it, should latest.pt be damaged
    log.jsonl     a line for each logged iteration and evaluation (runlog.py)
A state is a zip archive, as torch.save writes it, with its SHA-256 as the archive's comment, which readers
skip.
"""

import hashlib
import mmap
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import torch

from dataset import read_tokenizer, replacing, tokenizer_from

RESUMABLE = ('latest.pt', 'previous.pt', 'ckpt.pt')  # the first of those that are equally far
MARK = b'sha256:'
MARK_LENGTH = len(MARK) + 64  # and the digest in hex
# what torch.load raises where a file is cut or is no checkpoint
UNREADABLE = (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, LookupError,
              struct.error, TypeError, AttributeError, AssertionError, OSError)


def save(path, state, keep=None):
    """Write `state` to `path` so that the file is at all times the old one or the new one, whole.

    keep: the old one is renamed to this, in place of what was there. Raises OSError, naming the space that is
    needed and free, where the file can't be written; then all is as it was before.
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
    """Bytes of a state's file, near enough: those of its tensors, each storage once, and a little more."""
    if isinstance(state, torch.Tensor):
        return state.untyped_storage().nbytes()
    tensors, stack = {}, [state]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            tensors[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (dict, list, tuple)):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return sum(tensors.values()) + 1024 * (len(tensors) + 16)


def sign(path):
    """Give a zip archive the SHA-256 of all before it as its comment."""
    with open(path, 'rb+') as file:
        file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment, then the comment
        file.write(struct.pack('<H', MARK_LENGTH))
        file.seek(0)
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest.encode())


def is_damaged(path):
    """Whether a file isn't what `save` wrote. Other programs' files have no checksum: an archive that ends
    without a comment, or something that is no archive, is given the benefit of the doubt."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        mark = content[-MARK_LENGTH:]
        if mark.startswith(MARK):
            with memoryview(content) as whole, whole[:-MARK_LENGTH] as signed:
                return hashlib.sha256(signed).hexdigest().encode() != mark[len(MARK):]
        is_plain_archive = content[-22:-18] == b'PK\5\6' and content[-2:] == b'\0\0'
        return content[:2] == b'PK' and not is_plain_archive


def load(path, verify=True):
    """A checkpoint as a dict of CPU tensors and plain values; no code in the file is run.

    Tensors are read from the file when they are used: only what is copied out of them takes memory.
    verify: compare the checksum; for the first reader of several. Raises FileNotFoundError or ValueError, in
    one line, if it isn't there, is damaged or isn't a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is missing: train a model there first, or name another --out_dir')
    try:
        if verify and is_damaged(path):
            raise ValueError('its checksum is wrong')
        with open(path, 'rb') as file:
            is_archive = file.read(2) == b'PK'  # torch's format before 1.6 isn't, and can't be mapped
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=is_archive)
    except UNREADABLE as error:
        state = f'{type(error).__name__}: {error}'.splitlines()[0]
    if not (isinstance(state, dict) and all(isinstance(state.get(k), dict) for k in ('model', 'model_args'))
            and all(isinstance(name, str) for name in state['model'])):
        reason = state if isinstance(state, str) else 'it has no model and model_args'
        raise ValueError(f'{path} is not a checkpoint, or a damaged one ({reason[:200]})')
    state['model'] = clean_names(state['model'])
    return state


def tokenizer_of(state):
    """The tokenizer of a state; older files carry none, but name their dataset."""
    if 'tokenizer' in state:
        return tokenizer_from(state['tokenizer'])
    config = state.get('config', {})
    return read_tokenizer(config.get('data_dir') or os.path.join('data', config.get('dataset', '')))


def newest(out_dir):
    """path, state, damaged: the newest state in `out_dir` that is whole and has an optimizer, or None and
    None; and the errors, by path, of files that are damaged."""
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
    """The state to go on with, the same on all processes; None where there is none, an error if `must_exist`.
    Damaged files are named and, but for a dry run, set aside, so that nothing replaces them."""
    path, state, damaged = newest(out_dir) if run.is_master else (None, None, {})
    if run.is_master and path is None and must_exist:
        raise next(iter(damaged.values()), None) or FileNotFoundError(
            f'nothing to resume: {os.path.join(out_dir, "ckpt.pt")} is missing, or has no optimizer state')
    for bad, error in damaged.items():
        print(error if dry_run else f'{error}; set aside as {set_aside(bad)}', flush=True)
    path = run.broadcast(path and str(path))
    if path is None:
        return None
    if run.is_master:
        print(f'resuming from {path}', flush=True)
    return state or load(path, verify=False)


def set_aside(path):
    """Give a damaged file another name; returns its new path."""
    names = (path.with_name(f'{path.name}.damaged{n}') for n in range(1, 1000))
    return path.rename(next(name for name in names if not name.exists()))


def move_earlier_run(out_dir):
    """Make room for a new run: checkpoints that are there, with their log, go to `out_dir`/earlier, in place
    of those that an even earlier run left there. Returns that folder, or None where there was nothing."""
    found = [Path(out_dir, name) for name in RESUMABLE if Path(out_dir, name).is_file()]
    if not found:
        return None
    earlier = Path(out_dir, 'earlier')
    shutil.rmtree(earlier, ignore_errors=True)
    earlier.mkdir()
    for path in [*found, Path(out_dir, 'log.jsonl')]:
        if path.is_file():
            path.rename(earlier / path.name)
    return earlier


def clean_names(weights):
    """The model's own tensor names, from files that older scripts wrote: torch.compile's prefix and the
    causal masks, which are no parameters, are dropped."""
    names = {name: name.removeprefix('_orig_mod.') for name in weights}
    return {clean: weights[name] for name, clean in names.items() if not clean.endswith('.attn.bias')}


def cut(saved, like):
    """A saved tensor in the shape of the model's: cropped where the model is, and of a sharded one the part
    that this process holds."""
    if saved.dim() == 0:
        return saved.clone()
    saved = saved[tuple(map(slice, like.shape))]
    if hasattr(like, 'device_mesh'):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved.clone()  # the file behind it may go away


def load_weights(model, saved):
    """Copy a saved state dict into a model."""
    own = model.state_dict()
    model.load_state_dict({name: cut(t, own[name]) for name, t in saved.items()})


def load_optimizer(optimizer, saved):
    """Give an optimizer the buffers of a saved state, keeping its own settings: a resumed run takes its
    weight decay and betas from its config. Raises ValueError if the parameters don't match."""
    groups = [own | {k: theirs[k] for k in ('params', 'step') if k in theirs} for own, theirs in
              zip(optimizer.state_dict()['param_groups'], saved['param_groups'], strict=True)]
    params = dict(zip((i for group in groups for i in group['params']),
                      (p for group in optimizer.param_groups for p in group['params']), strict=True))
    state = {i: {name: cut(buffer, params[i]) if isinstance(buffer, torch.Tensor) else buffer
                 for name, buffer in buffers.items()} for i, buffers in saved['state'].items()}
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
