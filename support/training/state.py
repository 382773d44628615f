"""
The state of a run: what a checkpoint holds, and how it is written, found, read and checked.

    state.save('out/latest.pt', keep='out/previous.pt')
    state = State.load('out/ckpt.pt')
    path, state, damaged = State.newest('out')      # to resume from
    path, state = State.trained_in('out')           # to sample from

A run's folder holds
    ckpt.pt         the model to sample from: the best one, or that of the last evaluation
    latest.pt       the newest state, to resume from
    previous.pt     the one before it, should latest.pt be damaged
    ckpt_5000.pt    a state that keep_interval keeps
    log.jsonl       a line for each logged iteration and evaluation (log.py)
A checkpoint is a dict, written by torch.save: a zip archive with a CRC-32 of each of its records.
"""

import errno
import math
import os
import re
import stat
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from support.errors import MissingFile, OutOfMemory, UserError
from support.machine.console import print0
from support.machine.files import UNREADABLE, reason_of, replacing
from support.machine.pickles import STAND_INS, Settings

RESUMABLE = ('latest.pt', 'previous.pt', 'ckpt.pt')  # of equal iterations, the first is taken
OF_THE_RUN = ('resume', 'auto', 'finetune')  # values of init_from that mean the run in out_dir
WAITS = (0.2, 1.0, 3.0)  # seconds before a file is read again that the disk could not read


@dataclass
class State:
    """All that an exact resume needs. None: the checkpoint doesn't have it."""
    model: dict  # {name: tensor}, with adapters merged in
    model_args: dict  # of GPTConfig, see models.model_args
    optimizer: dict | None = None  # its state_dict()
    iter_num: int | None = None
    best_val_loss: float = math.inf
    config: dict = field(default_factory=dict)  # train.py's settings
    tokenizer: dict | None = None  # its to_dict()
    chat: dict | None = None  # the template of the conversations that it was trained on
    scaler: dict | None = None  # state_dict() of the gradient scaler
    guard: dict | None = None  # state_dict() of the guard against losses that are not finite
    data: dict | None = None  # {split: SHA-256 of its tokens}
    seconds: float = 0.0  # of training
    n_tokens: int | None = None  # trained on
    n_worse: int = 0  # evaluations since the best one, for `patience`
    wandb_id: str = ''
    trained: dict | None = None  # {name: tensor}, the weights being trained, where `model` has others
    file = None  # of a loaded state: the open file that its tensors are mapped from

    @property
    def is_resumable(self):
        return self.optimizer is not None and self.iter_num is not None

    def without_optimizer(self):
        """The same for sampling only: a third of the size."""
        return replace(self, optimizer=None, trained=None)

    def save(self, path, keep=None):
        """Write the state to `path`, which holds the whole old file or the whole new one at any time.

        keep: a name for the old file, which replaces what was there. Raises an OSError, and leaves all as it
        was, if the file can't be written.
        """
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            with replacing(path, keep) as temporary:
                torch.save({k: v for k, v in content.items() if v is not None}, temporary)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            reason = str(error).splitlines()[0][:120]
            raise OSError(f'{path} could not be written: it needs {self.size() / 1e6:,.1f} MB ({reason})'
                          ) from None

    def size(self):
        """Bytes of the state's file, rounded up: each storage of tensors once, and 1 KB more."""
        content = [getattr(self, f.name) for f in fields(self)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(content)}
        return sum(storages.values()) + 1024 * (len(storages) + 16)

    @classmethod
    def load(cls, path, verify=True):
        """The state in a checkpoint of ours, of nanoGPT or of build-nanogpt. No code in the file is run.

        The file is mapped: tensors take no memory until they are read. verify: compare the checksums.
        Raises MissingFile if it is missing or can't be read now, UserError if it is damaged or no checkpoint,
        OutOfMemory. Only the second says anything about the file's content.
        """
        with reading(path):
            return patiently(read, path, verify)

    @classmethod
    def newest(cls, out_dir):
        """path, state, damaged: the newest whole state in `out_dir` that can be resumed, else None and None;
        and the errors of damaged files, by path. Raises MissingFile if a file can't be read now."""
        found, damaged = None, {}
        latest, numbered = [Path(out_dir, name) for name in RESUMABLE], kept_states(out_dir)
        for path in (*latest, *reversed(numbered)):
            if path in numbered and found or not is_file(path):
                continue
            try:
                state = cls.load(path)
            except UserError as error:
                damaged[path] = error
                continue
            if state.is_resumable and (found is None or state.iter_num > found[1].iter_num):
                found = path, state
        return *(found or (None, None)), damaged

    @classmethod
    def trained_in(cls, out_dir, verify=True):
        """path, state: the model to sample from: ckpt.pt of a run's folder, else its newest state, with a
        line; or the checkpoint that `out_dir` names. Raises what `load` does."""
        if is_file(out_dir) or Path(out_dir).suffix == '.pt':
            return Path(out_dir), cls.load(out_dir, verify)
        path = Path(out_dir, 'ckpt.pt')
        if is_file(path):
            return path, cls.load(path, verify)
        found, state, damaged = cls.newest(out_dir)
        if found is None:
            raise next(iter(damaged.values()), None) or missing(path, out_dir)
        print0(f'{path} is missing: taking {found}, the state of iteration {state.iter_num}')
        return found, state


# ---------------------------------------------------------------------------- names

def kept_name(iteration):
    """The name of a state that keep_interval keeps."""
    return f'ckpt_{iteration}.pt'


def kept_states(out_dir):
    """Paths of the states that keep_interval kept, in order of their iterations."""
    with reading(out_dir):
        names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r'ckpt_(\d+)\.pt', name)))
    return [Path(out_dir, kept_name(number)) for number in numbers]


def run_folder(path):
    """The folder of the run that a path names, as such or by one of its states; None if it isn't one."""
    folder = Path(path).parent if Path(path).suffix == '.pt' else Path(path)
    has_state = any(is_file(Path(folder, name)) for name in RESUMABLE) or kept_states(folder)
    return folder if has_state else None


def find_trained(init_from, out_dir, verify=True):
    """path, state: of the run in out_dir if init_from says so, else of the run's folder or the checkpoint
    that init_from names; None, None if that is a model of the hub, or none at all (scratch)."""
    if init_from in OF_THE_RUN:
        return State.trained_in(out_dir, verify)
    if is_file(init_from) or Path(init_from).suffix == '.pt' or run_folder(init_from):
        return State.trained_in(init_from, verify)
    return None, None


def missing(path, out_dir):
    earlier = [name for name in (os.listdir(out_dir) if os.path.isdir(out_dir) else ())
               if re.fullmatch(r'earlier(-\d+)?', name)]
    if earlier:
        newest = max(earlier, key=lambda name: int(name.partition('-')[2] or 0))
        return MissingFile(f'{path} is missing; the run before has its own: '
                           f'--out_dir={Path(out_dir, newest)}')
    return MissingFile(f'{path} is missing: train a model there first, or name another --out_dir')


def is_file(path):
    """Whether there is a file. Raises MissingFile if the disk can't say."""
    with reading(path):
        try:
            return stat.S_ISREG(patiently(os.stat, path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except ValueError:  # a zero byte
            return False


# ---------------------------------------------------------------------------- errors of the disk

def patiently(function, *args):
    """function(*args), again after each of WAITS where the disk gives an error that may pass."""
    for seconds in WAITS:
        try:
            return function(*args)
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(seconds)
    return function(*args)


@contextmanager
def reading(path):
    """Give errors that say nothing about a file's content as one line."""
    try:
        yield
    except (MissingFile, OutOfMemory):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path, Path(path).parent) from None
    except OSError as error:
        raise MissingFile(f'{path} can\'t be read now ({reason_of(error)}): nothing was changed, try again '
                          'when the disk answers') from None
    except MemoryError:
        raise OutOfMemory(f'out of memory while {path} was read') from None


class HeldFile:
    """A file that is opened once. It keeps an error of the disk, which zipfile takes for damage."""

    def __init__(self, path):
        self.file, self.path, self.error = open(path, 'rb'), path, None  # noqa: SIM115, its State holds it

    def call(self, method, *args):
        try:
            return getattr(self.file, method)(*args)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before the beginning of a short file
                self.error = error
            raise

    def read(self, size=-1):
        return self.call('read', size)

    def readline(self):
        return self.call('readline')

    def readinto(self, buffer):
        return self.call('readinto', buffer)

    def seek(self, offset, whence=0):
        return self.call('seek', offset, whence)

    def tell(self):
        return self.call('tell')

    def seekable(self):
        return True

    def size(self):
        return os.fstat(self.file.fileno()).st_size

    def name(self):
        """A name of the open file, whatever its path names by now; the path where systems have none."""
        opened = f'/dev/fd/{self.file.fileno()}'
        return opened if os.path.exists(opened) else self.path


# ---------------------------------------------------------------------------- reading

def read(path, verify):
    """State.load, with an OSError for what the disk can't read, a MemoryError, a UserError for the rest."""
    held = HeldFile(path)
    try:
        is_archive = held.read(2) == b'PK'  # the format before torch 1.6 is none, and has no checksums
        if is_archive and verify:
            check_archive(held)
        state = map_state(held, is_archive)
    except (OSError, MemoryError):
        raise
    except UNREADABLE as error:
        if held.error:
            raise held.error from None
        raise UserError(f'{path} is not a checkpoint, or a damaged one ({why_unread(error)})') from None
    return state


def check_archive(held):
    """UserError unless each record of a zip archive has its CRC-32."""
    with zipfile.ZipFile(held) as archive:
        if sum(member.file_size for member in archive.infolist()) > held.size():
            raise UserError('it is compressed, which torch.save doesn\'t do')
        if bad := archive.testzip():
            raise UserError(f'the checksum of {bad} is wrong')


def map_state(held, is_archive):
    """The State in an open file, with tensors that are mapped."""
    held.seek(0)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(held.name() if is_archive else held, map_location='cpu', weights_only=True,
                                 mmap=is_archive)
    except (OSError, RuntimeError) as error:
        number = re.search(r'^unable to .*\((\d+)\)$', str(error).split('\n')[0])  # torch's way of mapping
        if errno.ENOMEM in (getattr(error, 'errno', None), number and int(number[1])) \
                or 'allocate memory' in str(error):
            raise MemoryError from None
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise
    state = as_state(content)
    check_state(state, held.size())
    state.file = held
    return state


def as_state(content):
    """The State of a checkpoint's dict, with names as they are here. UserError if it has no model."""
    if not isinstance(content, dict) or not isinstance(content.get('model'), dict):
        raise UserError('it has no model and model_args')
    if isinstance(content.get('config'), Settings):
        content = from_build_nanogpt(content) | {k: v for k, v in content.items() if k != 'config'}
    known = {f.name for f in fields(State)}
    content = {k: v for k, v in content.items() if k in known and v is not None}
    if not isinstance(content.get('model_args'), dict):
        raise UserError('it has no model and model_args')
    for name, kind in (('iter_num', int), ('best_val_loss', float), ('seconds', float), ('n_tokens', int)):
        if name in content:
            content[name] = kind(content[name])
    if not all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in content['model'].items()):
        raise UserError('its model is no table of tensors')
    content['model'] = clean_names(content['model'])
    args = content['model_args']
    if args.get('vocab_size', 0) is None and 'transformer.wte.weight' in content['model']:
        args['vocab_size'] = len(content['model']['transformer.wte.weight'])
    return State(**content)


def from_build_nanogpt(content):
    """The checkpoint of build-nanogpt's train_gpt2.py, which pickles its GPTConfig, in nanoGPT's terms."""
    args = vars(content['config']) | {'bias': 'transformer.ln_f.bias' in content['model'], 'dropout': 0.0,
                                      'activation': 'gelu_tanh'}
    return {'model': content['model'], 'model_args': args, 'iter_num': content.get('step'),
            'best_val_loss': content.get('val_loss')}


def check_state(state, size):
    """UserError if a state, read from `size` bytes, has values out of range, or asks for more memory."""
    if not all(isinstance(name, str) for name in state.model_args):
        raise UserError('its model_args have names that are no strings')
    if state.iter_num is not None and not 0 <= state.iter_num < 2**63:
        raise UserError(f'iter_num={state.iter_num} is no number of iterations')
    for name in ('optimizer', 'config', 'tokenizer', 'chat', 'scaler', 'guard', 'data', 'trained'):
        if not isinstance(getattr(state, name), dict | None):
            raise UserError(f'its {name} is no dict')
    for t in tensors_of([getattr(state, f.name) for f in fields(state)]):
        if t.device.type != 'cpu' or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise UserError(f'a tensor of {tuple(t.shape)} has fewer numbers in the file')
    if sum(t.nbytes for t in state.model.values()) > 2 * size:  # a tied matrix has two names
        raise UserError('its tensors share their memory')


def tensors_of(content):
    """The tensors in a tree of dicts, lists and tuples, each node once, however often it is referred to."""
    seen, stack = set(), [content]
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


def why_unread(error):
    """The reason in a few words; those of torch.load have control sequences and advice to run the file."""
    found = re.search(r'GLOBAL (\S+) was not an allowed', str(error))
    if found:
        return f'it holds an object of {found[1]}, whose code is not run'
    return re.sub(r'\x1b\[\d*m', '', reason_of(error))
