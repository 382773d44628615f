"""hardware.py: rates are looked up for known GPUs and measured elsewhere."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.machine import hardware

# ---------------------------------------------------------------------------- peak FLOP/s

@pytest.mark.parametrize('name, flops', [
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('NVIDIA A100 80GB PCIe', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA GH200 480GB', 989e12),
    ('NVIDIA B200', 2250e12),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40', 181e12),
    ('NVIDIA L40S', 362e12),
    ('NVIDIA A40', 150e12),
    ('NVIDIA A10', 125e12),
    ('Tesla T4', 65e12),
    ('Tesla V100-SXM2-16GB', 125e12),
    ('NVIDIA GeForce RTX 3090', 71e12),
    ('NVIDIA GeForce RTX 4090', 165e12),
    ('NVIDIA RTX A4000', None),
    ('NVIDIA A10G', None),
    ('NVIDIA A1000', None),
    ('NVIDIA GeForce GTX 1080', None),
    ('Quadro T400', None),
])
def test_peak_of_a_gpu_is_its_data_sheet_s_and_measured_if_there_is_none(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    monkeypatch.setattr(hardware, 'measure_matmul', lambda *args: args)
    for device, dtype in (('cuda', 'bfloat16'), ('cuda:1', 'float16')):
        assert hardware.peak_flops(device, dtype) == (flops or (device, dtype, 4096))
    assert hardware.peak_flops('cuda', 'float32') == ('cuda', 'float32', 4096)


def test_peak_of_an_apple_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, 'measure_matmul', lambda *args: args)
    assert hardware.peak_flops('mps', 'float16') == ('mps', 'float16', 4096)


def test_peak_of_a_cpu_is_measured_and_leaves_no_trace():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert 0 < hardware.peak_flops('cpu', 'float32') < float('inf')
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_share_of_a_measured_peak_is_never_above_100_percent(monkeypatch):
    monkeypatch.setattr(hardware, 'measure_matmul', lambda *args: 1e9)  # on a busy machine
    peak = hardware.Peak('cpu', 'float32')
    assert peak.percent(0.5e9) == 50
    assert peak.percent(4e9) == 100 and peak.percent(1e9) == 25  # what was reached is possible


def test_measured_time_is_that_of_the_fastest_call(monkeypatch):
    clock, calls = iter([0.0, 0.5, 1.0, 1.25, 2.0, 2.4, 3.0, 5.0]), []
    monkeypatch.setattr(hardware, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    assert hardware.best_time(lambda: calls.append(1), 'cpu', repeats=5) == 0.25
    assert len(calls) == 3  # which took a second
    assert hardware.best_time(lambda: calls.append(1), 'cpu', repeats=1) == 2.0


def test_measured_rate_is_operations_over_time(monkeypatch):
    sizes = []

    def half_a_second(function, device):
        sizes.append(len(function()))
        return 0.5

    monkeypatch.setattr(hardware, 'best_time', half_a_second)
    assert hardware.measure_matmul('cpu', 'float32') == 2 * sizes[0]**3 / 0.5


@pytest.mark.skipif(sys.platform == 'win32', reason='sysconf')
def test_memory_of_the_machine_is_known(monkeypatch):
    assert 1 << 28 < hardware.total_memory('cpu') < 1 << 50
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=7))
    assert hardware.total_memory('cuda:1') == 7
    monkeypatch.delattr(os, 'sysconf')
    assert hardware.total_memory('cpu') is None
