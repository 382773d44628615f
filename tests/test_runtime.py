"""runtime.py: what is asked for is had or refused; the rest becomes what the machine does best."""

import os
import re

import pytest
import torch

from support.machine import runtime

no_gpu = pytest.mark.skipif(runtime.best_device() != 'cpu', reason='there is a GPU')
RANKS = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE',
         'PMI_SIZE')


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@no_gpu
def test_cpu_gets_float32_uncompiled_with_gloo(capsys):
    run = runtime.start()
    assert (run.device, run.dtype, run.compile, run.backend) == ('cpu', 'float32', False, 'gloo')
    assert (run.rank, run.world_size, run.is_master, run.device_type) == (0, 1, True, 'cpu')
    assert re.fullmatch(r'device: cpu \(\d+ threads\), dtype: float32, products: (onednn|default), '
                        r'compile: False, backend: gloo, processes: 1(; a GPU is not used: .*)?\n',
                        capsys.readouterr().out)


@pytest.mark.cuda
def test_cuda_gets_the_best_type_and_is_compiled_with_nccl():
    run = runtime.start()
    has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    assert (run.device, run.backend) == ('cuda', 'nccl')
    assert run.dtype == ('bfloat16' if has_bfloat16 else 'float16')
    assert run.compile == (runtime.missing_for_triton() == '')


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
    ({'device': 'tpu'}, {}, 'device=tpu is not on this machine'),
    ({'device': 'cpu:7'}, {}, 'device=cpu:7 is not on this machine'),
    ({'backend': 'nccl'}, {'RANK': '0', 'WORLD_SIZE': '2'}, 'backend=nccl needs CUDA .*--backend=gloo'),
    ({}, {'RANK': '1'}, 'RANK=1: RANK must be below WORLD_SIZE, and neither is set without the other'),
    ({}, {'RANK': 'one', 'WORLD_SIZE': '2'}, 'RANK=one WORLD_SIZE=2: these .* must be numbers'),
    ({}, {'SLURM_STEP_NUM_TASKS': '8'}, 'srun started 8 processes .*: start one torchrun a node'),
    ({}, {'SLURM_STEP_NUM_TASKS': '', 'OMPI_COMM_WORLD_SIZE': '2'}, 'mpirun started 2 processes .* torchrun'),
    ({'threads': 10**5}, {}, 'threads=100000 must be at least 0 and at most 1024'),
])
def test_what_cannot_be_had_is_refused_in_one_line(settings, env, message, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f'^{message}') as error:
        runtime.start(**({'device': 'cpu'} | settings))
    assert '\n' not in str(error.value)


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


def test_one_process_agrees_with_itself():
    run = runtime.start('cpu')
    x = torch.tensor([3.0])
    assert run.mean(x) is x and x.item() == 3 and run.broadcast({'a': 1}) == {'a': 1}
    assert run.sum(1.5, 7) == [1.5, 7] and run.gather(2) == [2] and run.gather_objects('a') == ['a']
    run.synchronize()
    run.stop()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('message, is_explained', [
    ('[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer', True),
    ('Timed out waiting 3000ms for recv operation to complete\nand more', True),
    ('mat1 and mat2 shapes cannot be multiplied', False),
])
def test_death_of_another_process_is_explained_and_ends_this_one(message, is_explained, capfd):
    child = os.fork()
    if child == 0:
        show = runtime.end_with_error(lambda kind, error, trace: print(error), rank=3, timeout=600.0)
        show(RuntimeError, RuntimeError(message), None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    line, reason = 'rank 3: another process has died, or has not answered for 600 s', message.split('\n')[0]
    explained = ('', f'{line} (dist_timeout): {reason}\n')
    assert capfd.readouterr() == (explained if is_explained else (f'{message}\n', ''))


def test_restarted_processes_find_each_other_by_keys_of_their_own(monkeypatch):
    assert runtime.restart_store(0, 2) == {}
    server = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    for name, value in {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': server.port, 'GROUP_WORLD_SIZE': 1,
                        'TORCHELASTIC_USE_AGENT_STORE': True}.items():
        monkeypatch.setenv(name, str(value))
    for attempt in ('1', '2'):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', attempt)
        arguments = runtime.restart_store(1, 2)
        assert (arguments['rank'], arguments['world_size']) == (1, 2)
        assert not arguments['store'].check(['address'])  # of the attempt before
        arguments['store'].set('address', attempt)
    monkeypatch.setenv('GROUP_WORLD_SIZE', '2')  # whose counts may differ
    assert runtime.restart_store(0, 2) == {}
