"""plan.py, scripts/plan.py, --dry_run: what a run is said to need is what it needs."""

import itertools
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import TINY, losses, tiny

from model import GPT, GPTConfig
from support.errors import USER_ERRORS
from support.machine.runtime import Runtime
from support.text.windows import Split
from support.training import plan
from support.training.loss import lean_loss
from support.training.plan import Setup, Work

V, T, L, C = (TINY[k] for k in ('vocab_size', 'block_size', 'n_layer', 'n_embd'))
N_PARAMS = V * C + T * C + L * (12 * C * C + 2 * C) + C  # embeddings, blocks, the last normalisation
CPU = Runtime('cpu', 'float32', False, 'gloo')


def planned(**sizes):
    with torch.device('meta'):
        return GPT(GPTConfig(bias=False, **sizes))


def test_table_counts_data_parameters_tokens_epochs_and_flops(tmp_path):
    data = {name: Split(name, np.zeros(n, np.uint16)) for name, n in (('train', 100_000), ('val', 5_000))}
    settings = {'batch_size': 4, 'out_dir': str(tmp_path / 'not/yet/there'), 'parallel': 'ddp',
                'activation_checkpointing': False}
    text = plan.describe(tiny(bias=False), CPU, data, Work(0, 100, 24 * 100), settings)
    rows = {line[:8].strip(): line[8:] for line in text.splitlines()}
    assert rows['data'] == '100,000 tokens to train on, 5,000 to validate'
    flops = 100 * 24 * T * (6 * (N_PARAMS - T * C) + 12 * L * C * T)
    assert rows['run'] == f'100 iterations of 768 tokens: 76,800 tokens, 0.77 epochs, {flops:.1e} FLOPs'
    assert rows['memory'].startswith('about 401.1 MB of ')
    assert rows['disk'].startswith(f'{48 * N_PARAMS / 1e6:.1f} MB for checkpoints')


def test_size_of_a_checkpoint_is_that_of_the_file(train, tmp_path):
    script = train('--max_iters=1', '--n_embd=128')
    size = (tmp_path / 'out/latest.pt').stat().st_size
    assert 0 <= size - plan.checkpoint_bytes(script['model']) < 0.03 * size


def memory(model, *args, **more):
    return plan.memory_needed(model, Setup(*args, **{'dtype_size': 4, 'reserved': 0} | more))


def test_state_is_sixteen_bytes_a_parameter_shared_by_all_and_what_is_gathered():
    model = planned(n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=128)
    n, block = model.get_num_params(non_embedding=False), 12 * 64 * 64 + 2 * 64
    state = lambda *args, **how: plan.state_memory(model, Setup(*args, **how))  # noqa: E731
    assert state(1, 8, 1) == state(8, 1, 1) == 16 * n + 2 * 4 * block
    assert state(8, 1, 2) == 20 * n + 2 * 4 * block + 4 * 128 * 64
    assert state(8, 1, 1, sharded=True) == 2 * n + 8 * (n - 4 * block) + 10 * block
    assert state(8, 1, 2, sharded=True) == 6 * n + 8 * (n - 4 * block) + 10 * block
    assert state(8, 1, 1, sharded=True, dtype_size=4) == 2 * n + 8 * (n - 4 * block) + 12 * block


def peak_of_an_iteration(model, batch_size, micro_steps, dtype, trace):
    """Bytes that an iteration allocates and frees again, by torch's profiler."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    idx, lean = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64), lean_loss(model, CPU)

    def iteration():
        for _ in range(micro_steps):
            with torch.autocast('cpu', torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
                _, loss = model(idx, idx, **lean)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    iteration()  # makes the moments
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as found:
        iteration()
    found.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())['traceEvents'] if e['name'] == '[memory]']
    return max(itertools.accumulate(e['args']['Bytes'] for e in sorted(events, key=lambda e: e['ts'])))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('micro_steps, more', [(1, {}), (2, {}), (1, {'activation': 'swiglu'})])
def test_estimated_memory_is_about_the_real_one_and_hardly_below_it(dtype, checkpointing, micro_steps, more,
                                                                    tmp_path):
    sizes = {'block_size': 128, 'vocab_size': 300, 'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'bias': False}
    model = GPT(GPTConfig(**sizes | more))
    model.activation_checkpointing = checkpointing
    real = 12 * model.get_num_params(non_embedding=False) + peak_of_an_iteration(
        model, 4, micro_steps, dtype, tmp_path / 'trace.json')
    needed = memory(model, 1, 4, micro_steps, checkpointing=checkpointing, dtype_size=dtype.itemsize,
                    device_type='cpu')
    assert 0.95 * real < needed < 1.2 * real


def test_dry_run_measures_some_iterations_and_writes_nothing(train, tmp_path):
    log = train('--dry_run', '--max_iters=500', '--eval_interval=100', '--log_interval=7')['log']
    assert list(losses(log)) == [*range(12)] and 'step 0' not in log
    assert not (tmp_path / 'out').exists()
    told = re.search(r'^time    ([\d.]+)ms an iteration, (\d+) (s|min) .*in all', log, re.M)
    ms, whole, unit = told.groups()
    assert 0 < 501 * float(ms) / 1000 < (int(whole) + 1) * (60 if unit == 'min' else 1)


@pytest.mark.parametrize('init_from, todo', [('scratch', 501), ('resume', 496), ('auto', 496)])
def test_dry_run_in_a_run_s_folder_leaves_it_as_it_was(init_from, todo, train, tmp_path):
    train('--max_iters=4', '--checkpoint_interval=2')
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()}
    log = train('--dry_run', '--max_iters=500', f'--init_from={init_from}')['log']
    assert f'{todo} iterations of 64 tokens' in log
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()} == before


def test_plan_needs_neither_data_nor_gpus_and_names_the_largest_micro_batch(run_script):
    log = run_script('scripts/plan.py', 'config/train_gpt2.py', '--gpus=8xA100', '--n_layer=48',
                     '--n_head=25', '--n_embd=1600', '--batch_size=8',
                     '--gradient_accumulation_steps=64').stdout
    *_, head, ddp, less, sharded, least, estimate, fastest = log.splitlines()
    assert 'micro-batch' in head and 'Times are estimates: arithmetic at 40%' in estimate
    rows = {row[:22].strip(): row[22:].split() for row in (ddp, less, sharded, least)}
    assert list(rows) == [*plan.STRATEGIES]
    assert [row[2] for row in rows.values()] == ['8', '64', '16', '64']
    assert fastest.endswith('--parallel=ddp --batch_size=8 --gradient_accumulation_steps=64')


@pytest.mark.parametrize('batch_size, advice', [
    (12, '--batch_size=6 --gradient_accumulation_steps=10'),
    (15, '--batch_size=5 --gradient_accumulation_steps=15'),
    (1, 'a shorter --block_size'), (10**18, f'--batch_size={5 * 10**17} ')])
def test_advice_of_a_smaller_batch_comes_at_once_whatever_its_size(batch_size, advice):
    with pytest.raises(MemoryError, match=advice), plan.out_of_memory_advice(batch_size, 5):
        bytearray(10**16)


@pytest.mark.parametrize('args, message', [
    ('--gpus=8xH9', 'gpus=8xH9: H9 is not one of A100, H100'),
    ('--gpus=7', "= 480 sequences an iteration can't be shared by 7 GPUs"),
    ('--n_head=7', 'must be a multiple of n_head')])
def test_plan_that_cannot_be_made_is_one_line(args, message, run_here):
    with pytest.raises(USER_ERRORS) as error:
        run_here('scripts/plan.py', args)
    assert message in str(error.value) and '\n' not in str(error.value)
