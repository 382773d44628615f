"""
Where are we: device, number type, compilation, processes, seeds, and how fast the hardware can go.

    run = start(device='auto', dtype='auto', compile='auto', backend='auto', seed=1337)
    with run.autocast():
        ...
    run.stop()

A setting of 'auto' becomes what this machine does best; anything else is taken as it is or refused.
"""

import atexit
import ctypes
import functools
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense bfloat16 and float16 tensor-core FLOP/s from the vendors' data sheets, by words of the device's
# name; the first match counts, so the more special names come first.
PEAK_FLOPS = {
    'B200': 2250e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'GH200': 989e12,
    'A100': 312e12,
    'A40': 150e12,
    'A10': 125e12,
    'A30': 165e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'V100': 125e12,
    'T4': 65e12,
    'RTX 5090': 210e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
    'MI300X': 1307e12,
    'MI250X': 191.5e12,  # one of its two dies, which is what PyTorch sees as a device
}


@dataclass(frozen=True)
class Runtime:
    """What `start` found out. `device` is a torch device string, `dtype` a key of DTYPES."""
    device: str
    dtype: str
    compile: bool
    backend: str
    rank: int = 0
    world_size: int = 1

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

    def grad_scaler(self):
        """For float16 on CUDA, whose small gradients would vanish; elsewhere it does nothing."""
        needed = self.dtype == 'float16' and self.device_type == 'cuda'
        return torch.amp.GradScaler(self.device_type, enabled=needed)

    def synchronize(self):
        """Wait until the device has done all it was given."""
        synchronize(self.device_type)

    def seed(self, seed, iteration):
        """Make the random numbers of an iteration, dropout's, follow from (seed, process, iteration) alone:
        a resumed run then has no state of a generator to restore."""
        source = np.random.SeedSequence((seed % 2**64, self.rank, iteration))
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))

    def to_device(self, array):
        """A NumPy array on the device; CUDA's through pinned memory, which PyTorch keeps, without waiting."""
        x = torch.from_numpy(array)
        if self.device_type == 'cuda':
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def mean(self, x):
        """A tensor averaged over all processes, in place, on the device."""
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def broadcast(self, value):
        """The first process's value, on all."""
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
        """The number of each process, in order."""
        if self.world_size == 1:
            return [value]
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.world_size)))

    def moment(self):
        """A point in the device's work, for ms_between."""
        if self.device_type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, first, second):
        """Milliseconds of the device's work from one moment to another; waits for it."""
        if self.device_type != 'cuda':
            return (second - first) * 1000
        second.synchronize()
        return first.elapsed_time(second)

    def stop(self):
        if dist.is_initialized():
            dist.destroy_process_group()
            atexit.register(end_at_once)  # a thread of Gloo's that needs Python while it ends would abort


def start(device='auto', dtype='auto', compile='auto', backend='auto', seed=1337, timeout=600.0):
    """Resolve the settings, join the other processes (torchrun's environment) and seed torch.

    timeout: seconds that a process waits for the others before it gives up.
    Returns a Runtime. Raises ValueError where a setting can't be had on this machine.
    """
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = best_device() if device == 'auto' else device
    device_type = check_device(device)
    if device == 'cuda' and world_size > 1:
        device = f'cuda:{local_rank}'
        check_device(device)
    dtype = best_dtype(device_type) if dtype == 'auto' else dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype} is not one of auto, {", ".join(DTYPES)}')
    compile = can_compile(device_type) if compile == 'auto' else compile
    if not isinstance(compile, bool):
        raise ValueError(f'compile={compile} is not one of True, False, auto')
    backend = ('nccl' if device_type == 'cuda' and dist.is_nccl_available() else 'gloo') \
        if backend == 'auto' else backend
    if backend not in dist.Backend.backend_list:
        raise ValueError(f'backend={backend} is not one of auto, {", ".join(dist.Backend.backend_list)}')
    if world_size > 1:
        if backend == 'nccl' and device_type != 'cuda':
            raise ValueError(f'backend=nccl needs CUDA devices, this run is on {device}: use --backend=gloo')
        if device_type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **own_store(rank, world_size))
        sys.excepthook = end_with_error(sys.excepthook, rank, timeout)
    if device_type == 'cuda':
        # TF32 on tensor cores for what autocast leaves in float32: 10-bit mantissas, several times the rate
        torch.set_float32_matmul_precision('high')
    if device_type == 'cpu':
        keep_freed_memory()
    torch.manual_seed(seed)  # all processes make the same model; Runtime.seed makes their dropout differ
    run = Runtime(device, dtype, compile, backend, rank, world_size)
    print0(f'device: {device} ({device_name(device)}), dtype: {dtype}, compile: {compile}, '
           f'backend: {backend}, processes: {world_size}')
    return run


def keep_freed_memory():
    """Have glibc keep the memory of tensors that are freed, up to 1 GiB, for the next ones. It would return
    larger blocks to the kernel, which clears every page anew: with large tensors that is up to 15 % of an
    iteration. The price is up to 8 % more memory at the peak. Other C libraries have nothing of the sort."""
    if sys.platform == 'linux':
        with suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
                mallopt(parameter, 1 << 30)


def own_store(rank, world_size):
    """After a restart by torchrun --max-restarts, arguments of init_process_group for keys of this attempt's
    own. The store through which processes find each other is torchrun's and outlives them: without that, a
    process may get the address of one that is dead. Across nodes the counts of restarts may differ: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set for torchrun, does the same."""
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    if attempt == '0' or os.environ.get('GROUP_WORLD_SIZE') != '1' \
            or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
    return {'store': dist.PrefixStore(f'attempt{attempt}', store), 'rank': rank, 'world_size': world_size}


def end_at_once():
    """Leave without Python's clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_with_error(hook, rank, timeout):
    """An excepthook for one of several processes: it says in words what a failed collective means, shows the
    error and ends the process without the usual clean-up, which would wait for the others."""
    def show(kind, error, trace):
        if re.search(r'timed? ?out|connection (closed|reset)|broken pipe|watchdog', str(error), re.I):
            print(f'rank {rank}: another process has died, or has not answered for {timeout:g} s '
                  '(dist_timeout)', file=sys.stderr)
        hook(kind, error, trace)
        sys.stdout.flush()
        os._exit(1)
    return show


class StopRequest:
    """SIGTERM and SIGINT, to any of the processes, as a request that all of them see at the same iteration.

    A second signal ends the process at once; within half a second it counts as the first one, which launchers
    and terminals often deliver twice.
    """

    def __init__(self, run):
        self.received = None  # the first signal
        self.group = dist.new_group(backend='gloo') if run.world_size > 1 else None
        self.votes = self.work = None
        # Python runs handlers in the main thread, which may wait for a hung process: a thread hears them too
        alarm = signal_socket()
        alarm.send(b'\0')
        signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = self.received or number

    def agreed(self):
        """Whether to stop, the same answer on all processes. Call it once an iteration: several processes
        exchange their votes meanwhile, on the CPU, and learn the result at the next call."""
        if self.group is None:
            return self.received is not None
        result = self.close()
        self.votes = torch.tensor([self.received is not None], dtype=torch.int32)
        self.work = dist.all_reduce(self.votes, group=self.group, async_op=True)
        return result

    def close(self):
        """Finish the last exchange of votes; its result."""
        if self.work is None:
            return False
        self.work.wait()
        self.work = None
        return bool(self.votes.item())


@functools.cache
def signal_socket():
    """Where to write numbers of signals to, for a thread of this process that acts on them."""
    numbers, alarm = socket.socketpair()
    alarm.setblocking(False)
    # the thread holds both: a socket that is closed when Python ends would wake it, which aborts the process
    threading.Thread(target=end_at_second, args=(numbers, alarm), daemon=True).start()
    return alarm


def end_at_second(numbers, _):
    """Announce the first signal after a 0, end the process at another, half a second later or more."""
    first = None  # when, by time.monotonic
    while True:
        number = numbers.recv(1)[0]
        if number == 0:
            first = None
        elif first is None:
            first, name = time.monotonic(), signal.Signals(number).name
            os.write(2, f'{name}: stopping at the next iteration, once more to stop at once\n'.encode())
        elif time.monotonic() - first > 0.5:
            os._exit(128 + number)


def print0(*args, **kwargs):
    """print, on the first process only."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(*args, **kwargs, flush=True)


def best_device():
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def check_device(device):
    """The device's type; ValueError if this machine hasn't got it."""
    kind = device.split(':')[0]
    count = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available())}
    index = device.partition(':')[2] if ':' in device else '0'
    if kind not in count or not index.isdigit() or int(index) >= count[kind]:
        here = ', '.join(f'{k} ({n})' if k == 'cuda' else k for k, n in count.items() if n)
        raise ValueError(f'device={device} is not on this machine, which has: {here}')
    return kind


def best_dtype(device_type):
    if device_type == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'float32'


def can_compile(device_type):
    """Whether torch.compile is worth its minute here: on a GPU that Triton supports."""
    return (device_type == 'cuda' and importlib.util.find_spec('triton') is not None
            and torch.cuda.get_device_capability() >= (7, 0))


def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{torch.get_num_threads()} threads' if device.startswith('cpu') else 'Apple GPU'


def peak_flops(device, dtype):
    """FLOP/s that the device can reach: from PEAK_FLOPS on a GPU, measured on a CPU, None if unknown.

    PEAK_FLOPS holds the rates of 16-bit types. TF32, which float32 runs in, has half of them on data
    centre parts, and the table is no guide on the others, so float32 on a GPU is unknown.
    """
    if device.startswith('cpu'):
        return measure_matmul(device, dtype)
    if not device.startswith('cuda') or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf'\b{words}\b', name)), None)


def synchronize(device_type):
    if device_type != 'cpu':
        getattr(torch, device_type).synchronize()


def best_time(function, device, repeats=5):
    """Seconds of the fastest call of a few."""
    times = []
    for _ in range(repeats):
        synchronize(torch.device(device).type)
        begin = time.perf_counter()
        function()
        synchronize(torch.device(device).type)
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_matmul(device, dtype):
    """FLOP/s of a large square matrix product."""
    n = 1024 if device.startswith('cpu') else 8192
    a = torch.ones(n, n, device=device, dtype=DTYPES[dtype])
    return 2 * n**3 / best_time(lambda: a @ a, device)


def measure_bandwidth(device):
    """Bytes/s of memory, from copying an array larger than any cache; a copy reads and writes each byte."""
    a = torch.ones(1 << 26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_time(lambda: b.copy_(a), device)


def total_memory(device):
    """Bytes of the device's memory, of the machine's on a CPU; None if unknown."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError):  # Windows
        return None


def peak_memory(device):
    """The most bytes held so far: on CUDA by PyTorch on the device, on a CPU by this process; else None."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
