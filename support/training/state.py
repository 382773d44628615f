"""
The state of a run: what a checkpoint holds, and how it is written, found, read and checked.

    state.save('out/latest.pt', keep='out/previous.pt')
    state = State.load('out/ckpt.pt')
    path, state, damaged = State.newest('out')      # to resume from
    path, state = State.trained_in('out')           # to sample from

A run's folder holds
    ckpt.pt         the model to sample from: the best one, or that of the last evaluation
    latest.pt       the newest state, to resume from
    previous.pt     the one before it, in case latest.pt is damaged
    ckpt_5000.pt    a state that keep_interval keeps
    log.jsonl       a line for each logged iteration and evaluation (log.py)
A checkpoint is a dict, written by torch.save: a zip archive with a CRC-32 of each record.
"""

import errno
import math
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from support.errors import MissingFile, OutOfMemory, UserError
from support.machine.console import print0
from support.machine.files import (UNREADABLE, HeldFile, free_disk, patiently, reason_of,
                                   regular_file, replacing, unread)
from support.machine.pickles import STAND_INS, ForeignConfig

RESUMABLE = ('latest.pt', 'previous.pt', 'ckpt.pt')  # of equal iterations, the first is taken
OF_THE_RUN = ('resume', 'auto', 'finetune')  # values of init_from that mean the run in out_dir


@dataclass
class State:
    """All that an exact resume needs. None: the checkpoint doesn't have it."""
    model: dict  # {name: tensor}, with adapters merged in
    model_args: dict  # of GPTConfig, see model_args in models.py
    optimizer: dict | None = None  # its state_dict()
    iter_num: int | None = None
    best_val_loss: float = math.inf
    config: dict = field(default_factory=dict)  # train.py's settings
    tokenizer: dict | None = None  # its to_dict()
    chat: dict | None = None  # the template, if it was trained on conversations
    scaler: dict | None = None  # state_dict() of the gradient scaler
    guard: dict | None = None  # state_dict() of the guard against losses that are not finite
    data: dict | None = None  # {split: SHA-256 of its tokens}
    seconds: float = 0.0  # of training
    n_tokens: int | None = None  # trained on
    best_iter: int | None = None  # of best_val_loss, for `patience`
    wandb_id: str = ''
    trained: dict | None = None  # {name: tensor}, what is being trained, if not `model`
    file = None  # of a loaded state: the open file that its tensors are mapped from

    @property
    def is_resumable(self):
        return self.optimizer is not None and self.iter_num is not None

    def without_optimizer(self):
        """The same for sampling only, a third of the size."""
        return replace(self, optimizer=None, trained=None)

    def values(self):
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def size(self):
        """Bytes of the file, rounded up: each storage of tensors once, and 1 KB more."""
        storages = [t.untyped_storage() for t in tensors_of(self.values())]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(sizes.values()) + 1024 * (len(sizes) + 16)

    def save(self, path, keep=None):
        """Write the state to `path`, which at any time holds the whole old file or the new one.

        keep: a name for the old file, which replaces what was there. Raises an OSError if the file
        can't be written; the old files stay.
        """
        try:
            with replacing(path, keep) as temporary:
                content = {k: v for k, v in self.values().items() if v is not None}
                torch.save(content, temporary)
                if not zipfile.is_zipfile(temporary):  # its table of contents comes last
                    raise OSError('the disk did not keep all of it')
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise OSError(f'{path} could not be written: it needs {self.size() / 1e6:,.1f} MB, '
                          f'{free_disk(Path(path).parent) / 1e6:,.1f} MB are free ({reason})'
                          ) from None

    @classmethod
    def load(cls, path, verify=True):
        """The state in a checkpoint of ours, nanoGPT's or build-nanogpt's. No code in it is run.

        The file is mapped: tensors take no memory until they are read. verify: compare checksums.
        Raises UserError if the file is damaged or no checkpoint. MissingFile, if it is missing or
        can't be read now, and OutOfMemory say nothing about its content.
        """
        with reading(path):
            return patiently(read, path, verify)

    @classmethod
    def newest(cls, out_dir):
        """path, state, damaged: the newest whole state in out_dir that can be resumed, else None
        and None, and {path: error} of damaged files. States that keep_interval kept are looked at
        if no other is whole. Raises MissingFile if a file can't be read now."""
        found, damaged = (None, None), {}
        for paths in ([Path(out_dir, name) for name in RESUMABLE], kept_states(out_dir)[::-1]):
            for path in filter(is_file, paths):
                try:
                    state = cls.load(path)
                except UserError as error:
                    damaged[path] = error
                    continue
                if state.is_resumable and state.iter_num > (found[1].iter_num if found[1] else -1):
                    found = path, state
            if found[1]:
                break
        return *found, damaged

    @classmethod
    def trained_in(cls, out_dir, verify=True):
        """path, state: the model to sample from. That is ckpt.pt of a run's folder, else its newest
        state, which is printed; or the checkpoint that out_dir names. Raises what `load` does."""
        if names_file(out_dir):
            return Path(out_dir), cls.load(out_dir, verify)
        path = Path(out_dir, 'ckpt.pt')
        if is_file(path):
            return path, cls.load(path, verify)
        found, state, damaged = cls.newest(out_dir)
        if found is None:
            raise next(iter(damaged.values()), None) or missing(path)
        print0(f'{path} is missing: taking {found}, the state of iteration {state.iter_num}')
        return found, state

    def remapped(self):
        """The model of a loaded state, mapped from the same file once more."""
        return map_state(self.file).model if self.file.is_archive else self.model


# ---------------------------------------------------------------------------- names

def kept_name(iteration):
    """The name of a state that keep_interval keeps."""
    return f'ckpt_{iteration}.pt'


def numbered(folder, pattern):
    """{number: path} of what a folder holds under such names; {} without a folder."""
    with reading(folder):
        try:
            names = patiently(os.listdir, folder)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    found = [re.fullmatch(pattern, name) for name in names]
    return {int(match[1] or 0): Path(folder, match[0]) for match in found if match}


def kept_states(out_dir):
    """Paths of the states that keep_interval kept, in order of their iterations."""
    found = numbered(out_dir, r'ckpt_(\d{1,18})\.pt')
    return [found[number] for number in sorted(found)]


def earlier_runs(out_dir):
    """{number: folder} of the runs that were moved aside; `earlier`, of older versions, is 0."""
    return numbered(out_dir, r'earlier(?:-(\d{1,18}))?')


def run_folder(path):
    """The folder of the run that a path names, as such or by one of its states, else None."""
    folder = Path(path).parent if names_file(path) else Path(path)
    states = [Path(folder, name) for name in RESUMABLE] + kept_states(folder)
    return folder if any(map(is_file, states)) else None


def find_trained(init_from, out_dir, verify=True):
    """path, state: of the run in out_dir if init_from says so, else of the run's folder or the
    checkpoint that init_from names. None, None if that is a model of the hub, or scratch."""
    if init_from in OF_THE_RUN:
        return State.trained_in(out_dir, verify)
    if names_file(init_from) or run_folder(init_from):
        return State.trained_in(init_from, verify)
    return None, None


def names_file(path):
    """Whether a path is meant as a checkpoint, not as a folder."""
    return is_file(path) or Path(path).suffix == '.pt' and not os.path.isdir(path)


def is_file(path):
    """Whether there is a file. Raises MissingFile if the disk doesn't answer."""
    with reading(path):
        return regular_file(path)


def missing(path):
    """The MissingFile of a checkpoint."""
    with suppress(MissingFile):
        if earlier := earlier_runs(Path(path).parent):
            return MissingFile(f'{path} is missing; the run before has its own: '
                               f'--out_dir={earlier[max(earlier)]}')
    return MissingFile(f'{path} is missing: train a model there first, or name another --out_dir')


# ---------------------------------------------------------------------------- reading

@contextmanager
def reading(path):
    """Errors that say nothing about the content of the file as errors of one line."""
    try:
        yield
    except (MissingFile, OutOfMemory):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path) from None
    except OSError as error:
        raise unread(path, error) from None
    except MemoryError:
        raise OutOfMemory(f'out of memory while {path} was read') from None


def read(path, verify):
    """State.load with Python's errors: OSError or MemoryError if the file isn't at fault."""
    file = HeldFile(path)
    try:
        if file.is_archive and verify:
            check_archive(file)
        return map_state(file)
    except UNREADABLE as error:
        is_of_content = not isinstance(error, (OSError, MemoryError))
        if file.error:
            raise file.error from None
        if not is_of_content and getattr(error, 'errno', None) != errno.EINVAL:
            raise
        raise UserError(f'{path} is not a checkpoint, or a damaged one ({why_unread(error)})'
                        ) from None


def check_archive(file):
    """UserError unless each record of a zip archive has its CRC-32."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > file.size():
            raise UserError('it is compressed, which torch.save doesn\'t do')
        if bad := archive.testzip():
            raise UserError(f'the checksum of {bad} is wrong')


def map_state(file):
    """The State in an open file; its tensors are mapped."""
    file.seek(0)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(file.name() if file.is_archive else file, map_location='cpu',
                                 weights_only=True, mmap=file.is_archive)
    except (OSError, RuntimeError) as error:
        raise error_of_disk(error) or error from None
    if not file.is_the_same():
        raise OSError(errno.ESTALE, 'it was replaced while it was read')
    state = as_state(content)
    check_state(state, file.size())
    state.file = file
    return state


def error_of_disk(error):
    """The OSError or MemoryError that torch.load has turned into a RuntimeError, else None."""
    text = str(error).split('\n')[0]
    found = re.search(r'^unable to .*\((\d+)\)$', text)  # open, map
    number = int(found[1]) if found else getattr(error, 'errno', None)
    if number == errno.ENOMEM or 'allocate memory' in text:
        return MemoryError()
    return OSError(number, os.strerror(number)) if found else None


def why_unread(error):
    """The reason in a line. torch.load's has escape codes, and advice to run the file's code."""
    found = re.search(r'GLOBAL (\S+) (was not an allowed|whose module)', str(error))
    if found:
        return f'it holds an object of {found[1]}, whose code is not run'
    if found := re.search(r'WeightsUnpickler error:\s*(.+)', str(error)):
        return f'it is no pickle of tensors: {found[1]}'
    return re.sub(r'\x1b\[[\d;]*m', '', reason_of(error))


# ---------------------------------------------------------------------------- content

def as_state(content):
    """The State of a checkpoint's dict, with our names. UserError if it has no model."""
    if not isinstance(content, dict):
        raise UserError('it has no model and model_args')
    if isinstance(content.get('config'), ForeignConfig):
        content = from_build_nanogpt(**content)
    model, args = content.get('model'), content.get('model_args')
    if not isinstance(model, dict) or not isinstance(args, dict):
        raise UserError('it has no model and model_args')
    if not all(isinstance(t, torch.Tensor) for t in model.values()):
        raise UserError('its model is no table of tensors')
    if not all(isinstance(name, str) for name in (*model, *args)):
        raise UserError('its model and model_args have names that are no strings')
    names = {f.name for f in fields(State)}
    content = {k: v for k, v in content.items() if k in names and v is not None}
    for name, kind in (('iter_num', int), ('best_val_loss', float), ('seconds', float),
                       ('n_tokens', int), ('best_iter', int), ('wandb_id', str)):
        if name in content:
            content[name] = kind(content[name])
    content['model'] = model = clean_names(model)
    if args.get('vocab_size', 0) is None and 'transformer.wte.weight' in model:
        args['vocab_size'] = len(model['transformer.wte.weight'])
    return State(**content)


def from_build_nanogpt(model, config, step=None, val_loss=None, model_args=None, **others):
    """nanoGPT's keys for a checkpoint that has its GPTConfig as an object, as build-nanogpt's."""
    theirs = {'bias': True, 'dropout': 0.0, 'activation': 'gelu_tanh'}
    return {'iter_num': step, 'best_val_loss': val_loss} | others | {
        'model': model, 'model_args': model_args or vars(config) | theirs}


def check_state(state, size):
    """UserError if a state, read from `size` bytes, has values of other types or out of range, or
    asks for more memory."""
    if state.iter_num is not None and not 0 <= state.iter_num < 2**63:
        raise UserError(f'iter_num={state.iter_num} is no number of iterations')
    for name in ('optimizer', 'config', 'tokenizer', 'chat', 'scaler', 'guard', 'data', 'trained'):
        if not isinstance(getattr(state, name), dict | None):
            raise UserError(f'its {name} is no dict')
    for t in tensors_of(state.values()):
        if t.device.type != 'cpu' or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise UserError(f'a tensor of {tuple(t.shape)} has fewer numbers in the file')
    if sum(t.nbytes for t in state.model.values()) > 2 * size:  # a tied matrix has two names
        raise UserError('its tensors share their memory')
    if math.isnan(state.best_val_loss):
        state.best_val_loss = math.inf  # nothing is less than nan: no later model would be the best


def tensors_of(content):
    """The tensors in a tree of dicts, lists and tuples, each node once."""
    seen, stack = set(), [content]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)


def clean_names(weights):
    """The model's own tensor names: without the prefixes of torch.compile and
    DistributedDataParallel, nor the causal masks that older scripts saved."""
    names = {name: re.sub(r'^((_orig_mod|module)\.)+', '', name) for name in weights}
    return {clean: weights[name] for name, clean in names.items()
            if not clean.endswith('.attn.bias')}
