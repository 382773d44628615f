"""What the hardware can do: arithmetic, bandwidth, memory; from data sheets, else measured."""

import functools
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Gpu(NamedTuple):
    flops: float  # FLOP/s, dense, of bfloat16 or float16 on tensor cores
    memory: float  # bytes
    near: float  # bytes/s, one way, to GPUs of the same node: NVLink, Infinity Fabric or PCIe
    far: float  # bytes/s to GPUs of other nodes


# From the vendors' data sheets. `far` is the network that such machines usually have: 200 to 400
# Gbit/s a GPU in training clusters, 100 in servers with PCIe cards, 25 elsewhere.
GPUS = {  # by words of the device's name
    'A100': Gpu(312e12, 80e9, 300e9, 25e9),  # SXM; there is one of 40 GB too
    'H100': Gpu(989e12, 80e9, 450e9, 50e9),  # SXM
    'H100 PCIe': Gpu(756e12, 80e9, 64e9, 25e9),
    'H100 NVL': Gpu(835e12, 94e9, 64e9, 25e9),  # its NVLink joins two GPUs only
    'H200': Gpu(989e12, 141e9, 450e9, 50e9),
    'GH200': Gpu(989e12, 96e9, 450e9, 50e9),  # there is one of 144 GB too
    'B200': Gpu(2250e12, 180e9, 900e9, 50e9),
    'V100': Gpu(125e12, 32e9, 150e9, 12.5e9),  # SXM2; there is one of 16 GB too
    'A30': Gpu(165e12, 24e9, 32e9, 12.5e9),
    'A40': Gpu(150e12, 48e9, 32e9, 12.5e9),
    'A10': Gpu(125e12, 24e9, 32e9, 12.5e9),
    'L40S': Gpu(362e12, 48e9, 32e9, 12.5e9),
    'L40': Gpu(181e12, 48e9, 32e9, 12.5e9),
    'L4': Gpu(121e12, 24e9, 32e9, 12.5e9),
    'T4': Gpu(65e12, 16e9, 16e9, 3e9),
    'RTX 5090': Gpu(210e12, 32e9, 64e9, 3e9),
    'RTX 4090': Gpu(165e12, 24e9, 32e9, 3e9),
    'RTX 3090': Gpu(71e12, 24e9, 32e9, 3e9),
    'MI300X': Gpu(1307e12, 192e9, 448e9, 50e9),
    'MI250X': Gpu(191.5e12, 64e9, 50e9, 25e9),  # of one die; each of its two is a device
}


def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{torch.get_num_threads()} threads' if device.startswith('cpu') else 'Apple GPU'


def gpu_of(name):
    """The Gpu with this device name, such as 'NVIDIA H100 80GB HBM3'; None if unknown."""
    kinds = [kind for kind in GPUS if re.search(rf'\b{kind}\b', name)]
    return GPUS[max(kinds, key=len)] if kinds else None


def data_sheet_flops(device, dtype):
    """FLOP/s of a known GPU by its data sheet, else None.

    The table holds the rates of 16-bit types. In float32, GPUs compute in TF32, at half of that
    rate on data centre GPUs and at other shares of it elsewhere.
    """
    if not device.startswith('cuda') or dtype == 'float32':
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None


def training_flops(model, n_sequences):
    """FLOPs of a forward and a backward pass of n_sequences windows; a model's estimate_mfu, as nanoGPT's,
    gives the share of an A100's 312e12 FLOP/s."""
    return 312e12 * model.estimate_mfu(n_sequences, 1.0)


def has_bfloat16(device_type):
    """Whether the device multiplies bfloat16 numbers itself, not by way of float32."""
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)  # not public
    return device_type == 'cpu' and is_supported()


def peak_flops(device, dtype):
    """FLOP/s that the device can reach: by its data sheet, else measured with a matrix product."""
    return data_sheet_flops(device, dtype) or measure_matmul(device, dtype, 4096)


class Peak:
    """The FLOP/s of which the MFU is a share: looked up, or measured, which is too low on a busy
    machine. What a run reaches is possible, so it raises the peak."""

    def __init__(self, device, dtype):
        self.flops = peak_flops(device, dtype)

    def percent(self, flops):
        """The share that `flops` a second are, in percent."""
        self.flops = max(self.flops, flops)
        return 100 * (flops / self.flops)  # so half of the peak is exactly 50


def attention_kernels(device, window=None):
    """A context in which scaled_dot_product_attention has the kernels of `kernel_order`. window: the
    tokens of each sequence in training; None where lengths differ from call to call. The backward pass
    belongs into it, too, as checkpointing computes attention again there."""
    if not device.startswith('cuda'):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel
    names = kernel_order(torch.cuda.get_device_capability(device)[0], window)
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def kernel_order(generation, window=None):
    """Names of attention kernels, the first that takes the inputs is used.

    cuDNN's is 1.7 to 2.3 times as fast as FlashAttention 2 on Hopper (generation 9) and Blackwell
    (10). But it makes a plan for each new shape, which takes from 23 ms to a second: it is for
    training, with whole tiles of 128 positions, not for texts that grow.
    """
    names = ['FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH']
    if generation in (9, 10) and window and window % 128 == 0:
        return ['CUDNN_ATTENTION', *names]
    return names


def synchronize(device_type):
    """Wait until the device has done its work."""
    if device_type != 'cpu':
        getattr(torch, device_type).synchronize()


def best_time(function, device, repeats=5):
    """Seconds of the fastest of several calls, of fewer if they are slow."""
    times = []
    while len(times) < repeats and sum(times) < 1:
        synchronize(torch.device(device).type)
        begin = time.perf_counter()
        function()
        synchronize(torch.device(device).type)
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def measure_matmul(device, dtype, n=8192):
    """FLOP/s of the product of square matrices, n rows each; on a CPU 1024, by its fastest
    library."""
    n = 1024 if device.startswith('cpu') else n
    a = torch.ones(n, n, device=device, dtype=DTYPES[dtype])
    with fastest_float32(device):
        return 2 * n**3 / best_time(lambda: a @ a, device)


def fastest_float32(device):
    """A context in which the fastest exact library computes float32 products on a CPU."""
    return OneDNN() if device.startswith('cpu') and prefers_onednn() else nullcontext()


class OneDNN:
    """A context in which float32 products on a CPU are oneDNN's. The flag permits bfloat16, which
    only AMX uses: see suits_onednn."""

    def __enter__(self):
        torch.backends.mkldnn.matmul.fp32_precision = 'bf16'

    def __exit__(self, *_):
        torch.backends.mkldnn.matmul.fp32_precision = 'ieee'


@functools.cache
def prefers_onednn():
    """Whether float32 products on this CPU are oneDNN's. False where the processor is unknown."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == 'AVX512'
    if not has_avx512 or not torch.backends.mkldnn.is_available():
        return False
    try:
        return suits_onednn(Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace'))
    except OSError:  # not Linux
        return False


def suits_onednn(cpuinfo):
    """Whether /proc/cpuinfo describes a processor of AMD's with AVX-512, which MKL doesn't use
    there, and without AMX, which would round to bfloat16."""
    flags = re.search(r'^flags\s*:(.*)', cpuinfo, re.M)
    known = flags[1].split() if flags else []
    has_amx = any(flag.startswith('amx') for flag in known)
    return 'AuthenticAMD' in cpuinfo and 'avx512f' in known and not has_amx


def measure_bandwidth(device):
    """Bytes/s of memory, from copies of an array larger than any cache; a copy reads and writes
    each byte."""
    a = torch.ones(1 << 26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_time(lambda: b.copy_(a), device)


def total_memory(device):
    """Bytes of a GPU's memory, else of the machine's; None if unknown."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError):  # Windows
        return None


def peak_memory(device):
    """The most bytes held so far: by PyTorch on a CUDA device, by this process on a CPU; None
    elsewhere."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
