"""runtime.py: what is asked for is had or refused; the rest becomes what the machine does best."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from support.machine import runtime

no_gpu = pytest.mark.skipif(runtime.best_device() != 'cpu', reason='there is a GPU')
cpu_build = pytest.mark.skipif(torch.version.cuda is not None, reason='PyTorch is built for CUDA')
RANKS = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'SLURM_STEP_NUM_TASKS')


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


def python(code, folder=ROOT, **env):
    """What a program prints; its __main__ is no script of ours."""
    kept = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=kept | env, check=True,
                          capture_output=True, text=True).stdout


@pytest.mark.parametrize('given, expected', [
    ({}, '3000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'passive'}, None)], ids=str)
def test_import_makes_waiting_threads_spin_briefly_and_python_end_fast(given, expected):
    code = ('import atexit, gc, os, sys\n'
            'atexit.register(lambda: print(gc.get_freeze_count() > 0))\n'
            'import configurator; print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)')
    assert python(code, **given) == f'{expected} False\nTrue\n'


@no_gpu
def test_cpu_gets_float32_uncompiled_with_gloo(capsys):
    run = runtime.start()
    assert (run.device, run.dtype, run.compile, run.backend) == ('cpu', 'float32', False, 'gloo')
    assert (run.rank, run.world_size, run.is_master, run.device_type) == (0, 1, True, 'cpu')
    assert re.fullmatch(r'device: cpu \(\d+ threads\), dtype: float32, products: (onednn|default), '
                        r'compile: False, backend: gloo, processes: 1(; a GPU is not used: .*)?\n',
                        capsys.readouterr().out)


@pytest.mark.cuda
def test_cuda_gets_the_best_type_and_is_compiled_with_nccl(monkeypatch, capsys):
    run = runtime.start()
    has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    assert (run.device, run.backend) == ('cuda', 'nccl')
    assert run.dtype == ('bfloat16' if has_bfloat16 else 'float16')
    assert run.compile == (runtime.missing_for_triton() == '')
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CC', raising=False)
    capsys.readouterr()
    assert runtime.start().compile is False
    line = capsys.readouterr().out
    assert line.endswith('; not compiled: there is no C compiler (gcc or clang)\n')
    with pytest.raises(ValueError,
                       match=r'device=cuda:99 is not on this machine, which has: cpu, cuda'):
        runtime.start('cuda:99')


@pytest.mark.parametrize('setting, value', [
    ('dtype', 'bfloat16'), ('dtype', 'float16'), ('compile', True), ('compile', False),
    ('backend', 'nccl'), ('backend', 'gloo'), ('device', 'cpu:0'), ('threads', 1)])
def test_explicit_value_is_taken_as_it_is(setting, value, capsys):
    before = torch.get_num_threads()
    run = runtime.start(**{'device': 'cpu'} | {setting: value})
    found, line = torch.get_num_threads(), capsys.readouterr().out
    torch.set_num_threads(before)
    assert f'({found} threads)' in line and found == (1 if setting == 'threads' else before)
    assert setting == 'threads' or (getattr(run, setting) == value and f'{setting}: {value}' in line)


@pytest.mark.parametrize('settings, env, message', [
    ({'dtype': 'int8'}, {}, 'dtype=int8 is not one of auto, float32, bfloat16, float16'),
    ({'compile': 'maybe'}, {}, 'compile=maybe is not one of True, False, auto'),
    ({'backend': 'smoke'}, {}, 'backend=smoke is not one of auto, '),
    *(({'device': device}, {}, f'device={device} is not on this machine')
      for device in ('tpu', '', 'cpu:', 'cpu:7', 'cpu:one')),
    ({'device': 'gpu'}, {}, r'device=gpu is not on this .*; GPUs are called cuda \(NVIDIA, AMD\)'),
    ({'threads': -1}, {}, 'threads=-1 must be at least 0'),
    ({'seed': 10**22}, {}, 'seed=1.* must fit into 64 bits'),
    ({'backend': 'nccl'}, {'RANK': '0', 'WORLD_SIZE': '2'}, 'backend=nccl needs CUDA .*--backend=gloo'),
    ({}, {'RANK': '1'}, 'RANK=1: RANK must be below WORLD_SIZE, and neither is set without the other'),
    ({}, {'WORLD_SIZE': '2'}, 'WORLD_SIZE=2: RANK must'),
    ({}, {'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK=2 WORLD_SIZE=2: RANK must be below'),
    ({}, {'RANK': 'one', 'WORLD_SIZE': '2'}, 'RANK=one WORLD_SIZE=2: these .* must be numbers'),
    ({}, {'LOCAL_RANK': '-1'}, 'LOCAL_RANK=-1: these environment variables must be numbers'),
    ({}, {'SLURM_STEP_NUM_TASKS': '8'}, 'srun started 8 processes .*: start one torchrun a node'),
])
def test_what_cannot_be_had_is_refused_in_one_line(settings, env, message, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f'^{message}') as error:
        runtime.start(**({'device': 'cpu'} | settings))
    assert '\n' not in str(error.value)


@no_gpu
def test_missing_gpu_is_refused_with_what_this_pytorch_was_built_for():
    for device in ('cuda', 'cuda:1', 'mps'):
        with pytest.raises(ValueError, match=f'^device={device} is not on this machine, which has') as error:
            runtime.start(device)
        assert (f'PyTorch {torch.__version__} was built' in str(error.value)) == (device != 'mps')


@no_gpu
@cpu_build
@pytest.mark.skipif(os.name == 'nt', reason='a script in place of a program')
def test_first_line_says_that_a_gpu_is_not_used_unless_it_is_hidden(monkeypatch, tmp_path, capsys):
    shutil.copy('/bin/true', tmp_path / 'nvidia-smi')
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    runtime.start()
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert '; a GPU is not used: PyTorch' in capsys.readouterr().out
    runtime.start()
    assert 'not used' not in capsys.readouterr().out


def test_random_numbers_follow_from_seed_process_and_iteration():
    def draw(seed, rank, iteration):
        runtime.Runtime('cpu', 'float32', False, 'gloo', rank, 2).seed(seed, iteration)
        return torch.rand(2).tolist()

    first = draw(1337, 0, 5)
    torch.rand(100)
    assert draw(1337, 0, 5) == first
    runtime.start('cpu', seed=1337)
    initial = torch.rand(2).tolist()
    runtime.start('cpu', seed=1337)
    assert torch.rand(2).tolist() == initial
    others = [initial, *(draw(*at) for at in (
        (1338, 0, 5), (1337, 1, 5), (1337, 0, 6), (-1, 0, 5)))]
    assert all(a != b for i, a in enumerate([first, *others]) for b in others[i:])


def test_one_process_agrees_with_itself_also_as_a_task_of_srun(monkeypatch):
    run = runtime.start('cpu')
    x = torch.tensor([3.0])
    assert run.mean(x) is x and x.item() == 3 and run.broadcast({'a': 1}) == {'a': 1}
    assert run.sum(1.5, 7) == [1.5, 7] and run.gather(2) == [2] and run.gather_objects('a') == ['a']
    run.synchronize()
    run.stop()
    for env in ({'SLURM_STEP_NUM_TASKS': '1'}, {'SLURM_STEP_NUM_TASKS': '8', 'RANK': '0', 'WORLD_SIZE': '1'}):
        for name, value in env.items():  # one task of srun, or one of many runs
            monkeypatch.setenv(name, value)
        assert runtime.start('cpu').world_size == 1


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('message, is_explained', [
    ('[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer', True),
    ('Timed out waiting 3000ms for recv operation to complete', True),
    ('Watchdog caught collective operation timeout', True), ('writev [127.0.0.1]:1: Broken pipe', True),
    ('mat1 and mat2 shapes cannot be multiplied', False),
])
def test_death_of_another_process_is_explained_and_ends_this_one(message, is_explained, capfd):
    child = os.fork()
    if child == 0:
        show = runtime.end_with_error(lambda kind, error, trace: print(error), rank=3,
                                      timeout=600.0)
        show(RuntimeError, RuntimeError(message), None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    words = 'rank 3: another process has died, or has not answered for 600 s (dist_timeout)\n'
    assert capfd.readouterr() == (f'{message}\n', words if is_explained else '')


PROGRAM = '''
import atexit, sys
atexit.register(print, 'cleaned up')
import torch.distributed as dist
from support.machine.runtime import Runtime
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
Runtime('cpu', 'float32', False, 'gloo').stop()
sys.exit(3)
'''


def test_end_of_a_run_skips_the_clean_up_of_our_scripts_and_leaves_other_programs_alone(tmp_path):
    shutil.copytree(ROOT / 'support', tmp_path / 'support')
    (tmp_path / 'tools').mkdir()
    done = []
    for name in ('train.py', 'tools/theirs.py'):
        (tmp_path / name).write_text(PROGRAM)
        ran = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True,
                             env=os.environ | {'PYTHONPATH': str(tmp_path)})
        done.append((ran.returncode, 'cleaned up' in ran.stdout))
    assert done == [(0, False), (3, True)]


def test_restarted_processes_find_each_other_by_keys_of_their_own(monkeypatch):
    assert runtime.restart_store(0, 2) == {}
    server = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    for name, value in {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': server.port,
                        'GROUP_WORLD_SIZE': 1,
                        'TORCHELASTIC_USE_AGENT_STORE': True,
                        'TORCHELASTIC_RESTART_COUNT': 0}.items():
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
