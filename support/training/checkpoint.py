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
from pathlib import Path

import torch

from support.errors import MissingFile, OutOfMemory, UserError
from support.machine.console import print0
from support.machine.files import explain_failure, reason_of, replacing
from support.machine.pickles import STAND_INS

RESUMABLE = ('latest.pt', 'previous.pt', 'ckpt.pt')  # of equal iterations, the first is taken
MARK = b'sha256:'
MARK_LENGTH = len(MARK) + 64  # with the digest in hex


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
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(state)}
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
        raise MissingFile(f'{path} is missing: train a model there first, or name another --out_dir')
    try:
        with explain_failure(f'{path} is not a checkpoint, or a damaged one', passing=(
                MemoryError, PermissionError)):
            if verify and is_damaged(path):
                raise UserError('its checksum is wrong')
            state = read_archive(path)
            check_state(state, os.path.getsize(path))
    except MemoryError:
        raise OutOfMemory(f'out of memory while {path} was read') from None
    except PermissionError as error:
        raise MissingFile(f'{path} can\'t be read ({reason_of(error)})') from None
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
                raise UserError('it is compressed, which torch.save doesn\'t do')
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
        raise UserError('it has no model and model_args')
    if not isinstance(state.get('iter_num', 0), int) or not 0 <= state.get('iter_num', 0) < 2**63:
        raise UserError(f'iter_num={state["iter_num"]} is no number of iterations')
    for t in tensors_of(state):
        if t.device.type != 'cpu' or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise UserError(f'a tensor of {tuple(t.shape)} has fewer numbers in the file')
    if sum(t.nbytes for t in state['model'].values()) > 2 * size:  # a tied matrix has two names
        raise UserError('its tensors share their memory')


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


def load_trained(out_dir):
    """path, state: ckpt.pt, the model to sample from; where that is missing, the newest state to resume from,
    which is told. Raises what `load` does."""
    path = Path(out_dir, 'ckpt.pt')
    if not path.is_file():
        found, state, damaged = newest(out_dir)
        if found:
            print0(f'{path} is missing: taking {found}, the state of iteration {state["iter_num"]}')
            return found, state
        if damaged:
            raise next(iter(damaged.values()))
        if (earlier := Path(out_dir, 'earlier')).is_dir():
            raise MissingFile(f'{path} is missing; the run before has its own: --out_dir={earlier}')
    return path, load(path)


def run_folder(path):
    """The folder of the run that a path names, as such or by one of its states; None if it isn't one."""
    folder = Path(path).parent if Path(path).name in RESUMABLE else Path(path)
    return folder if any(Path(folder, name).is_file() for name in RESUMABLE) else None


def load_newest(out_dir, run, must_exist, dry_run=False):
    """The state to resume from, the same on all processes; if there is none, None or, with `must_exist`, an
    error. Damaged files are reported and, except in a dry run, renamed, so that nothing overwrites them."""
    path, state, damaged = newest(out_dir) if run.is_master else (None, None, {})
    if run.is_master and path is None and must_exist:
        raise next(iter(damaged.values()), None) or MissingFile(
            f'nothing to resume: {os.path.join(out_dir, "ckpt.pt")} is missing, or has no optimizer state')
    for bad, error in damaged.items():
        print0(str(error) if dry_run else f'{error}; set aside as {set_aside(bad)}')
    path = run.broadcast(path and str(path))
    if path is None:
        return None
    print0(f'resuming from {path}')
    return state or load(path, verify=False)


def set_aside(path):
    """Rename a damaged file; returns its new path."""
    names = (path.with_name(f'{path.name}.damaged{n}') for n in range(1, 1000))
    return path.rename(next(name for name in names if not name.exists()))
