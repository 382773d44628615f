"""hardware.py: rates are looked up for known GPUs and measured elsewhere."""

import time

import numpy as np
import pytest
import torch

from support.machine import hardware


@pytest.mark.parametrize('name, flops', [
    ('NVIDIA A100-SXM4-40GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H100 NVL', 835e12), ('NVIDIA H200', 989e12), ('NVIDIA GH200 480GB', 989e12),
    ('NVIDIA B200', 2250e12), ('NVIDIA L4', 121e12), ('NVIDIA L40', 181e12), ('NVIDIA L40S', 362e12),
    ('NVIDIA A40', 150e12), ('NVIDIA A10', 125e12), ('Tesla T4', 65e12), ('Tesla V100-SXM2-16GB', 125e12),
    ('NVIDIA GeForce RTX 3090', 71e12), ('NVIDIA GeForce RTX 4090', 165e12),
    *((name, None) for name in ('NVIDIA RTX A4000', 'NVIDIA A10G', 'NVIDIA A1000', 'Quadro T400')),
])
def test_peak_of_a_gpu_is_that_of_its_data_sheet(name, flops):
    gpu = hardware.gpu_of(name)
    assert (gpu and gpu.flops) == flops


def test_peak_of_a_cpu_is_measured_as_the_fastest_call_and_leaves_no_trace():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    peak = hardware.Peak('cpu', 'float32')
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert 1e8 < peak.flops < 1e14 and peak.percent(peak.flops / 2) == 50
    reached = 4 * peak.flops  # possible, as it was reached: the peak was measured on a busy machine
    assert peak.percent(reached) == 100 and peak.percent(reached / 4) == 25
    naps = iter([0.1, 0.02, 0.1])
    assert 0.02 <= hardware.best_time(lambda: time.sleep(next(naps)), 'cpu', repeats=3) < 0.1


CPUINFO = 'vendor_id\t: {}\nmodel name\t: a processor\nflags\t\t: fpu sse2 {}\nbugs\t\t: amx\n'


@pytest.mark.parametrize('vendor, flags, suits', [
    ('AuthenticAMD', 'avx2 avx512f avx512_bf16', True), ('AuthenticAMD', 'avx2', False),
    ('AuthenticAMD', 'avx2 avx512f amx_bf16 amx_tile', False),
    ('GenuineIntel', 'avx2 avx512f', False), ('GenuineIntel', 'avx512f amx_tile', False),
])
def test_onednn_multiplies_where_it_is_exact_and_mkl_does_not_use_avx512(vendor, flags, suits):
    assert hardware.suits_onednn(CPUINFO.format(vendor, flags)) == suits
    assert not hardware.suits_onednn('processor\t: 0\nCPU implementer\t: 0x41\n')


def test_products_of_the_library_chosen_here_are_exact():
    x, w = torch.randn(192, 256), torch.randn(512, 256)
    exact = x.double() @ w.double().T
    errors = {'default': (x @ w.T - exact).abs().max()}
    with hardware.fastest_float32('cpu'):
        errors['chosen'] = (x @ w.T - exact).abs().max()
    assert errors['chosen'] <= 8 * errors['default'], errors
    assert torch.backends.mkldnn.matmul.fp32_precision == 'ieee' or not hardware.prefers_onednn()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_memory_of_the_machine_is_known(device):
    assert 1 << 20 < hardware.peak_memory(device) < hardware.total_memory(device)
