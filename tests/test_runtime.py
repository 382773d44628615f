"""runtime.py: what is asked for is had or refused; what is left open becomes what the machine does best."""

import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

from support.machine import runtime

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)


# ---------------------------------------------------------------------------- settings

@pytest.mark.parametrize('given, expected', [
    ({}, '3000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'passive'}, None)], ids=str)
def test_waiting_threads_spin_briefly_unless_the_environment_says_otherwise(given, expected):
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    code = ('import sys, os, configurator; print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env | given, capture_output=True,
                          text=True, check=True)
    assert done.stdout == f'{expected} False\n'


def test_python_ends_without_a_search_for_cycles():
    code = ('import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import support')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'True\n'


def test_number_of_threads_can_be_set_and_is_told(capsys):
    before = torch.get_num_threads()
    try:
        runtime.start('cpu', threads=1)
        assert torch.get_num_threads() == 1 and 'device: cpu (1 threads)' in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match='threads=-1 must be at least 0'):
        runtime.start('cpu', threads=-1)


def test_cpu_gets_float32_uncompiled_with_gloo(without_gpu, capsys):
    run = runtime.start()
    assert (run.device, run.dtype, run.compile, run.backend) == ('cpu', 'float32', False, 'gloo')
    assert (run.rank, run.world_size, run.is_master, run.device_type) == (0, 1, True, 'cpu')
    line = capsys.readouterr().out
    assert re.fullmatch(r'device: cpu \(\d+ threads\), dtype: float32, products: (onednn|default), '
                        r'compile: False, backend: gloo, processes: 1\n', line)


@pytest.mark.parametrize('setting, value', [
    ('dtype', 'bfloat16'), ('dtype', 'float16'), ('dtype', 'float32'), ('compile', True), ('compile', False),
    ('backend', 'nccl'), ('backend', 'gloo'), ('device', 'cpu'), ('device', 'cpu:0'),
])
def test_explicit_value_is_taken_as_it_is(setting, value, capsys):
    run = runtime.start(**({'device': 'cpu'} | {setting: value}))
    assert getattr(run, setting) == value
    assert f'{setting}: {value}' in capsys.readouterr().out


@pytest.mark.parametrize('device', ['cpu', 'cpu:0'])
def test_cpu_is_called_a_cpu(device, capsys):
    runtime.start(device=device)
    assert f'device: {device} ({torch.get_num_threads()} threads)' in capsys.readouterr().out


@pytest.mark.parametrize('settings, message', [
    ({'dtype': 'int8'}, 'dtype=int8 is not one of auto, float32, bfloat16, float16'),
    ({'dtype': 'bf16'}, 'dtype=bf16 is not one of'),
    ({'compile': 'maybe'}, 'compile=maybe is not one of True, False, auto'),
    ({'device': 'tpu'}, 'device=tpu is not on this machine'),
    ({'device': 'gpu'}, r'device=gpu is not on this machine, .*; GPUs are called cuda \(NVIDIA, AMD\)'),
    ({'device': 'cpu:7'}, 'device=cpu:7 is not on this machine'),
    ({'device': ''}, 'device= is not on this machine'),
    ({'device': 'cpu:'}, 'device=cpu: is not on this machine'),
    ({'device': 'cpu:one'}, 'device=cpu:one is not on this machine'),
])
def test_value_that_this_machine_has_not_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=f'^{message}') as error:
        runtime.start(**({'device': 'cpu'} | settings))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('device', ['cuda', 'cuda:0', 'cuda:1', 'mps'])
def test_missing_gpu_is_refused_with_what_there_is(device, without_gpu):
    with pytest.raises(ValueError, match=f'^device={device} is not on this machine, which has: cpu$'):
        runtime.start(device=device)


@no_gpu
def test_cuda_without_a_gpu_is_one_line_for_the_user(run_script):
    error = run_script('train.py', '--device=cuda', ok=False).stderr
    assert error.startswith('ValueError: device=cuda is not on this machine') and error.count('\n') == 1


def test_nccl_between_cpu_processes_is_refused(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='backend=nccl needs CUDA devices.*--backend=gloo'):
        runtime.start(device='cpu', backend='nccl')


@pytest.mark.parametrize('given, told', [
    ({'RANK': '1'}, 'RANK=1: RANK must be below WORLD_SIZE, and neither is set without the other'),
    ({'WORLD_SIZE': '2'}, 'WORLD_SIZE=2: RANK must'),
    ({'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK must be below'),
    ({'RANK': 'one', 'WORLD_SIZE': '2'}, 'must be numbers'), ({'LOCAL_RANK': '-1'}, 'must be numbers'),
])
def test_ranks_of_no_job_are_one_line_for_the_user(given, told, monkeypatch, run_script):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        runtime.resolve('cpu')
    if given.get('RANK') == 'one':
        error = run_script('train.py', ok=False).stderr
        assert error.startswith('ValueError: RANK=one') and error.count('\n') == 1


def test_best_device_is_cuda_then_mps_then_cpu(monkeypatch):
    found = []
    for cuda, mps in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda mps=mps: mps)
        found.append(runtime.best_device())
    assert found == ['cuda', 'mps', 'cpu']


@pytest.mark.parametrize('has_bfloat16, dtype', [(True, 'bfloat16'), (False, 'float16')])
def test_best_dtype_of_a_gpu_is_bfloat16_where_its_hardware_has_it(has_bfloat16, dtype, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    assert runtime.best_dtype('cuda') == dtype
    assert runtime.best_dtype('mps') == runtime.best_dtype('cpu') == 'float32'


# ---------------------------------------------------------------------------- seeds, numbers, printing

def test_seed_decides_torch_s_numbers():
    draws = []
    for seed in (1337, 1337, 1338):
        runtime.start(device='cpu', seed=seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_autocast_computes_in_the_dtype_asked_for(dtype):
    run = runtime.start(device='cpu', dtype=dtype)
    with run.autocast():
        result = torch.ones(4, 4) @ torch.ones(4, 4)
    assert result.dtype == runtime.DTYPES[dtype]
    assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.float32


def test_sum_over_one_process_is_the_numbers_themselves():
    run = runtime.start(device='cpu')
    assert run.sum(1.5, 7) == [1.5, 7]
    run.synchronize()
    run.stop()


def test_only_the_first_process_prints(monkeypatch, capsys):
    runtime.print0('one')
    monkeypatch.setenv('RANK', '1')
    runtime.print0('two')
    assert capsys.readouterr().out == 'one\n'


# ---------------------------------------------------------------------------- several processes

def test_random_numbers_follow_from_seed_process_and_iteration():
    def draw(seed, rank, iteration):
        runtime.Runtime('cpu', 'float32', False, 'gloo', rank, 2).seed(seed, iteration)
        return torch.rand(2).tolist()

    first = draw(1337, 0, 5)
    torch.rand(100)
    assert draw(1337, 0, 5) == first
    others = [draw(*at) for at in ((1338, 0, 5), (1337, 1, 5), (1337, 0, 6), (-1, 0, 5))]
    assert all(a != b for i, a in enumerate([first, *others]) for b in others[i:])


def test_one_process_agrees_with_itself():
    run = runtime.start(device='cpu')
    x = torch.tensor([3.0])
    assert run.mean(x) is x and x.item() == 3 and run.broadcast({'a': 1}) == {'a': 1}


@pytest.mark.parametrize('message, is_told', [
    ('[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer', True),
    ('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3', True),
    ('Timed out waiting 3000ms for recv operation to complete', True),
    ('Watchdog caught collective operation timeout', True),
    ('writev [127.0.0.1]:1: Broken pipe', True),
    ('mat1 and mat2 shapes cannot be multiplied', False),
])
def test_death_of_another_process_is_told_in_words(message, is_told, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(os, '_exit', lambda status: done.append(f'exit {status}'))
    show = runtime.end_with_error(lambda kind, error, trace: done.append(error), rank=3, timeout=600.0)
    error = RuntimeError(message)
    show(RuntimeError, error, None)
    assert done == [error, 'exit 1']
    words = 'rank 3: another process has died, or has not answered for 600 s (dist_timeout)\n'
    assert capsys.readouterr().err == (words if is_told else '')


def test_process_of_several_ends_without_python_s_clean_up(monkeypatch):
    done = []
    monkeypatch.setattr(runtime.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(runtime.dist, 'destroy_process_group', lambda: done.append('destroyed'))
    monkeypatch.setattr(runtime.atexit, 'register', done.append)
    monkeypatch.setattr(sys.modules['__main__'], '__file__', str(ROOT / 'train.py'))
    runtime.Runtime('cpu', 'float32', False, 'gloo', 1, 2).stop()
    assert done == ['destroyed', runtime.end_at_once]
    monkeypatch.setattr(os, '_exit', lambda status: done.append(f'exit {status}'))
    runtime.end_at_once()
    assert done[2:] == ['exit 0']


def test_restarted_processes_find_each_other_by_keys_of_their_own(monkeypatch):
    assert runtime.restart_store(0, 2) == {}
    server = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    for name, value in {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': server.port, 'GROUP_WORLD_SIZE': 1,
                        'TORCHELASTIC_USE_AGENT_STORE': True, 'TORCHELASTIC_RESTART_COUNT': 0}.items():
        monkeypatch.setenv(name, str(value))
    assert runtime.restart_store(0, 2) == {}
    for attempt in ('1', '2'):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', attempt)
        arguments = runtime.restart_store(1, 2)
        assert (arguments['rank'], arguments['world_size']) == (1, 2)
        assert not arguments['store'].check(['address'])  # of the attempt before
        arguments['store'].set('address', attempt)
    monkeypatch.setenv('GROUP_WORLD_SIZE', '2')  # whose counts may differ
    assert runtime.restart_store(0, 2) == {}


def test_run_that_ends_in_another_program_keeps_that_program_s_exit_status(tmp_path):
    (tmp_path / 'test_theirs.py').write_text('''
import torch.distributed as dist
from support.machine.runtime import Runtime

def test_that_trains():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    Runtime('cpu', 'float32', False, 'gloo').stop()

def test_that_fails():
    assert False
''')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', tmp_path],
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and '1 failed, 1 passed' in done.stdout
