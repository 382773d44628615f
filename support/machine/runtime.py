"""
What a program runs on: device, number type, compilation, processes, seeds.

    run = start('auto', 'auto', 'auto', seed=1337)   # scripts of one process
    run = resolve('auto', 'auto', 'auto', 'auto')    # train.py, which then connects its processes
    run.begin(seed)

'auto' becomes what this machine does best; any other value is taken as it is or refused.
"""

import atexit
import ctypes
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import support
from support.errors import UserError
from support.machine.console import flush, print0
from support.machine.hardware import DTYPES, device_name, has_bfloat16, prefers_onednn, synchronize

MOST_THREADS = 1024  # with some ten thousand, OpenMP ends the process
LAUNCHERS = {'SLURM_STEP_NUM_TASKS': 'srun', 'OMPI_COMM_WORLD_SIZE': 'mpirun',
             'PMI_SIZE': 'mpirun'}  # {variable with the number of processes: who sets it}
PYTORCH_SITE = 'pytorch.org/get-started/locally'


@dataclass(frozen=True)
class Runtime:
    """What `resolve` found out. `device` is a torch device string, `dtype` a key of DTYPES."""
    device: str
    dtype: str
    compile: bool
    backend: str
    rank: int = 0
    world_size: int = 1
    timeout: float = 600.0  # seconds that a process waits for the others
    notes: str = ''  # what this machine has, but PyTorch can't use

    @property
    def device_type(self):
        return torch.device(self.device).type

    @property
    def is_master(self):
        return self.rank == 0

    def autocast(self):
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.dtype])

    def synchronize(self):
        """Wait until the device is idle."""
        synchronize(self.device_type)

    def seed(self, seed, iteration):
        """Make an iteration's random numbers, which are dropout's, a function of (seed, process,
        iteration) alone, so that a resumed run has no generator to restore."""
        source = np.random.SeedSequence((seed % 2**64, self.rank, iteration))
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))

    def to_device(self, array):
        """A NumPy array on the device; on CUDA through pinned memory, without waiting."""
        x = torch.from_numpy(array)
        if self.device_type == 'cuda':  # a view would be copied through memory that isn't pinned
            return x.contiguous().pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def new_group(self, backend):
        """A group of all processes with a backend of its own."""
        return dist.new_group(backend=backend, timeout=timedelta(seconds=self.timeout))

    def mean(self, x):
        """Average a tensor over all processes, in place, on the device."""
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def broadcast(self, value):
        """The first process's value, on all of them."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def sum(self, *values):
        """Each number summed over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Each process's number, in order of rank."""
        if self.world_size == 1:
            return [value]
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.world_size)))

    def gather_objects(self, value):
        """Each process's value of any kind, in order of rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def moment(self):
        """A point in time on the device, for ms_between."""
        if self.device_type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, first, second):
        """Milliseconds on the device from one moment to another; waits for the second."""
        if self.device_type != 'cuda':
            return (second - first) * 1000
        second.synchronize()
        return first.elapsed_time(second)

    def begin(self, seed):
        """Set up PyTorch for this run, once its processes are connected; print what `resolve`
        chose."""
        if not -2**63 <= seed < 2**63:
            raise UserError(f'seed={seed} must fit into 64 bits')
        if self.world_size > 1:
            sys.excepthook = end_with_error(sys.excepthook, self.rank, self.timeout)
        if self.device_type == 'cuda':
            # TF32 for what autocast leaves in float32: 10-bit mantissas, several times as fast
            torch.set_float32_matmul_precision('high')
        if self.device_type == 'cpu':
            keep_freed_memory()
        torch.manual_seed(seed)  # all processes make the same model
        library = ''
        if self.device_type == 'cpu' and self.dtype == 'float32':
            library = f'products: {"onednn" if prefers_onednn() else "default"}, '
        notes = f'; {self.notes}' if self.notes else ''
        print0(f'device: {self.device} ({device_name(self.device)}), dtype: {self.dtype}, {library}'
               f'compile: {self.compile}, backend: {self.backend}, '
               f'processes: {self.world_size}{notes}')

    def stop(self):
        """Leave the other processes. One of our scripts then ends with status 0."""
        if dist.is_initialized():
            dist.destroy_process_group()
            if support.runs_own_script():
                atexit.register(end_at_once)  # Gloo's threads may need Python at the end, and abort


def start(device='auto', dtype='auto', compile='auto', backend='auto', seed=1337, threads=0):
    """The Runtime of a script of one process, ready. Raises ValueError as `resolve` does."""
    run = resolve(device, dtype, compile, backend, threads=threads)
    run.begin(seed)
    return run


def resolve(device='auto', dtype='auto', compile='auto', backend='auto', timeout=600.0, threads=0):
    """What to run on, as a Runtime; torchrun's environment says which process this is. Makes the
    device the current one and, unless threads is 0, sets a CPU's threads. Raises ValueError if this
    machine doesn't have what was asked for."""
    rank, local_rank, world_size = read_ranks()
    notes = []
    if device == 'auto':
        device = best_device()
        if device == 'cpu' and has_unused_gpu():
            notes.append(f'a GPU is not used: {why_no_cuda()}')
    device_type = check_device(device)
    if device == 'cuda' and world_size > 1:
        device = f'cuda:{local_rank}'
        check_device(device)
    if device_type == 'cuda':
        torch.cuda.set_device(torch.device(device).index or 0)  # before anything asks for it
    if not 0 <= threads <= MOST_THREADS:
        raise UserError(f'threads={threads} must be at least 0 and at most {MOST_THREADS}')
    if threads:
        torch.set_num_threads(threads)
    dtype = best_dtype(device_type) if dtype == 'auto' else dtype
    if compile == 'auto':
        compile = can_compile(device_type)
        if device_type == 'cuda' and missing_for_triton():
            notes.append(f'not compiled: {missing_for_triton()}')
    if backend == 'auto':
        backend = 'nccl' if device_type == 'cuda' and dist.is_nccl_available() else 'gloo'
    check_choices(dtype, compile, backend)
    if world_size > 1 and backend == 'nccl' and device_type != 'cuda':
        raise UserError(f'backend=nccl needs CUDA devices, this run is on {device}: '
                        'use --backend=gloo')
    return Runtime(device, dtype, compile, backend, rank, world_size, timeout, '; '.join(notes))


def check_choices(dtype, compile, backend):
    """ValueError for a value that isn't among the choices."""
    if dtype not in DTYPES:
        raise UserError(f'dtype={dtype} is not one of auto, {", ".join(DTYPES)}')
    if not isinstance(compile, bool):
        raise UserError(f'compile={compile} is not one of True, False, auto')
    if backend not in dist.Backend.backend_list:
        known = ', '.join(dist.Backend.backend_list)
        raise UserError(f'backend={backend} is not one of auto, {known}')


def read_ranks():
    """RANK, LOCAL_RANK and WORLD_SIZE of the environment; 0, 0 and 1 without them."""
    given = {k: os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE') if os.environ.get(k)}
    shown = ' '.join(f'{k}={v}' for k, v in given.items())
    if not all(v.isascii() and v.isdigit() for v in given.values()):
        raise UserError(f'{shown}: these environment variables must be numbers; torchrun sets them')
    rank, local_rank = int(given.get('RANK', 0)), int(given.get('LOCAL_RANK', 0))
    world_size = int(given.get('WORLD_SIZE', 1))
    if ('RANK' in given) != ('WORLD_SIZE' in given) or rank >= world_size:
        raise UserError(f'{shown}: RANK must be below WORLD_SIZE, and neither is set without the '
                        'other; start several processes by torchrun, or unset both for a single one')
    launcher, n_tasks = next(((launcher, os.environ[name]) for name, launcher in LAUNCHERS.items()
                              if os.environ.get(name)), ('', '1'))
    if 'RANK' not in given and n_tasks != '1':
        raise UserError(f'{launcher} started {n_tasks} processes that don\'t know of each other: start '
                        'one torchrun a node, as scripts/slurm.sh does, or set RANK=0 WORLD_SIZE=1 '
                        'if each is a run of its own')
    return rank, local_rank, world_size


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors, up to 1 GiB, for new ones. By default it returns
    large blocks to the kernel, which clears every page again: up to 15 % of an iteration. Costs up
    to 8 % more memory at the peak."""
    if sys.platform == 'linux':
        with suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
                mallopt(parameter, 1 << 30)


def return_freed_memory():
    """Have glibc give the kernel the memory of freed tensors once, after weights became smaller copies."""
    if sys.platform == 'linux':
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def restart_store(rank, world_size):
    """After a restart by torchrun --max-restarts: arguments of init_process_group that give this
    attempt its own keys. torchrun's store outlives the processes, which find each other through it,
    so a process might get the address of a dead one. Nodes may differ in their number of restarts:
    for several nodes set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun instead."""
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    if attempt == '0' or os.environ.get('GROUP_WORLD_SIZE') != '1' \
            or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}
    address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    store = dist.PrefixStore(f'attempt{attempt}', dist.TCPStore(*address, is_master=False))
    return {'store': store, 'rank': rank, 'world_size': world_size}


def end_at_once():
    """Exit without Python's clean-up."""
    flush()
    os._exit(0)


def end_with_error(hook, rank, timeout):
    """An excepthook for one of several processes. It shows a failed collective as one line: the
    process that failed first shows why. It exits without Python's clean-up, which would wait for
    the others."""
    def show(kind, error, trace):
        with suppress(OSError, ValueError):  # standard error may be gone too
            others_failed = r'timed? ?out|connection (closed|reset)|broken pipe|watchdog'
            if isinstance(error, RuntimeError) and re.search(others_failed, str(error), re.I):
                reason = str(error).strip().partition('\n')[0][:200]
                print(f'rank {rank}: another process has died, or has not answered for '
                      f'{timeout:g} s (dist_timeout): {reason}', file=sys.stderr)
            else:
                hook(kind, error, trace)
        flush()
        os._exit(1)
    return show


def best_device():
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def check_device(device):
    """The device's type; ValueError if this machine doesn't have it."""
    kind, colon, index = device.partition(':')
    has_mps = torch.backends.mps.is_available()
    count = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': 1 if has_mps else 0}
    number = index if colon else '0'
    if kind in count and number.isdigit() and int(number) < count[kind]:
        return kind
    here = ', '.join(f'{k} ({n})' if k == 'cuda' else k for k, n in count.items() if n)
    hint = ''
    if kind not in count:
        hint = '; GPUs are called cuda (NVIDIA, AMD) or mps (Apple)'
    elif kind == 'cuda' and not count['cuda']:
        hint = f'; {why_no_cuda()}'
    raise UserError(f'device={device} is not on this machine, which has: {here}{hint}')


def has_unused_gpu():
    """Whether there is an NVIDIA or AMD GPU, and it isn't hidden from this process on purpose."""
    is_hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
    return not is_hidden and (shutil.which('nvidia-smi') is not None or os.path.exists('/dev/kfd'))


def why_no_cuda():
    """Why PyTorch finds no CUDA device, and what to do about it."""
    name, built = f'PyTorch {torch.__version__}', torch.version.cuda or torch.version.hip
    if not built:
        return (f'{name} was built without CUDA; for an NVIDIA or AMD GPU, install the build that '
                f'{PYTORCH_SITE} shows')
    try:
        torch.cuda.init()
        reason = 'it finds no GPU'
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition('. ')[0]
    too_old = re.search(r'too old \(found version (\d+)\)', reason)
    if too_old:
        major, minor = divmod(int(too_old[1]) // 10, 100)  # 12040 is 12.4
        reason = (f'the driver supports CUDA {major}.{minor}; update it, or install the build '
                  f'for that version that {PYTORCH_SITE} shows')
    return f'{name} was built for CUDA {built}: {reason}'


def best_dtype(device_type):
    if device_type == 'cuda':
        return 'bfloat16' if has_bfloat16('cuda') else 'float16'
    return 'float32'


def can_compile(device_type):
    """Whether torch.compile is worth its minute: on a GPU that Triton supports."""
    return (device_type == 'cuda' and not missing_for_triton()
            and torch.cuda.get_device_capability() >= (7, 0))


def missing_for_triton():
    """What torch.compile lacks on a CUDA device, '' if nothing. Triton compiles its launchers as
    C."""
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    if os.name == 'nt':  # Triton brings a compiler there
        return ''
    if not any(shutil.which(name) for name in (os.environ.get('CC') or 'gcc', 'clang')):
        return 'there is no C compiler (gcc or clang)'
    header = os.path.join(sysconfig.get_path('include'), 'Python.h')
    return '' if os.path.isfile(header) else f'{header} is missing (package python3-dev)'
