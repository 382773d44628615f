"""hardware.py: rates are looked up for known GPUs and measured elsewhere."""


import numpy as np
import pytest
import torch

from support.machine import hardware


@pytest.mark.parametrize('name, flops', [
    ('NVIDIA A100-SXM4-40GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA L40', 181e12), ('NVIDIA L40S', 362e12), ('NVIDIA GeForce RTX 4090', 165e12),
    ('NVIDIA RTX A4000', None), ('NVIDIA A10G', None),
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


def test_products_of_the_library_chosen_here_are_exact():
    x, w = torch.randn(192, 256), torch.randn(512, 256)
    exact = x.double() @ w.double().T
    errors = {'default': (x @ w.T - exact).abs().max()}
    with hardware.fastest_float32('cpu'):
        errors['chosen'] = (x @ w.T - exact).abs().max()
    assert errors['chosen'] <= 8 * errors['default'], errors
    assert torch.backends.mkldnn.matmul.fp32_precision == 'ieee' or not hardware.prefers_onednn()
