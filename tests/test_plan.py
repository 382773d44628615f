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
from support.machine.hardware import GPUS
from support.machine.runtime import Runtime
from support.text.windows import Split
from support.training import plan
from support.training.lora import add_adapters
from support.training.loss import lean_loss
from support.training.plan import Setup, Work

V, T, L, C = (TINY[k] for k in ('vocab_size', 'block_size', 'n_layer', 'n_embd'))
N_PARAMS = V * C + T * C + L * (12 * C * C + 2 * C) + C  # embeddings, blocks, the last normalisation
CPU = Runtime('cpu', 'float32', False, 'gloo')


def table(model, tmp_path, iterations=100, parallel='ddp'):
    """{row: text} of what a run of 6 micro-steps of 4 sequences needs."""
    data = {name: Split(name, np.zeros(n, np.uint16)) for name, n in (('train', 100_000), ('val', 5_000))}
    settings = {'batch_size': 4, 'out_dir': str(tmp_path / 'not/yet/there'), 'parallel': parallel,
                'activation_checkpointing': False}
    text = plan.describe(model, CPU, data, Work(0, iterations, 24 * iterations), settings)
    return {line[:8].strip(): line[8:] for line in text.splitlines()}


def planned(**sizes):
    with torch.device('meta'):
        return GPT(GPTConfig(bias=False, **sizes))


def test_table_counts_data_parameters_tokens_epochs_and_flops(tmp_path):
    rows = table(tiny(bias=False), tmp_path)
    assert list(rows) == ['data', 'model', 'run', 'memory', 'disk']
    assert rows['data'] == '100,000 tokens to train on, 5,000 to validate'
    assert rows['model'] == '2 layers of 32, 2 heads, block_size 32, vocabulary 64'
    flops = 100 * 24 * T * (6 * (N_PARAMS - T * C) + 12 * L * C * T)
    assert rows['run'] == f'100 iterations of 768 tokens: 76,800 tokens, 0.77 epochs, {flops:.1e} FLOPs'
    assert rows['memory'].startswith('about 1.1 MB of ') and rows['memory'].endswith(' GB on cpu')
    assert re.fullmatch(rf'{48 * N_PARAMS / 1e6:.1f} MB for checkpoints, [\d.,]+ [MG]B free', rows['disk'])
    done = table(tiny(), tmp_path, iterations=0)['run']
    assert done == '0 iterations of 0 tokens: 0 tokens, 0.00 epochs, 0.0e+00 FLOPs'
    rows = table(planned(n_layer=96, n_head=96, n_embd=12288), tmp_path, parallel='fsdp')
    assert 'TOO LITTLE' in rows['memory'] and rows['disk'].endswith(' free  <- TOO LITTLE')


@pytest.mark.parametrize('changes, counted, without', [
    ({}, N_PARAMS - T * C, ', without the 1,024 of positions'),
    ({'pos_emb': 'rope', 'tie_weights': False, 'ngram': 2, 'ngram_rows': 64}, N_PARAMS - T * C,
     ', without the 2,048 of n-grams and the 2,048 of tokens'),
    ({'pos_emb': 'none'}, N_PARAMS - T * C, ''),
])
def test_number_of_parameters_says_what_it_leaves_out(changes, counted, without):
    told = plan.parameters_in_words(tiny(bias=False, **changes))
    assert told == f'number of parameters: {counted / 1e6:.2f}M{without}'


@pytest.mark.parametrize('more', [(), ('--init_from=FOLDER', '--lora_rank=4')])
def test_size_of_a_checkpoint_is_that_of_the_file(more, train, tmp_path):
    train('--max_iters=1', '--n_embd=128', out_dir=tmp_path / 'before')
    more = [arg.replace('FOLDER', str(tmp_path / 'before')) for arg in more]
    script = train('--max_iters=1', '--n_embd=128', *more)
    size = (tmp_path / 'out/latest.pt').stat().st_size
    assert 0 <= size - plan.checkpoint_bytes(script['model']) < 0.03 * size


def memory(model, *args, **more):
    return plan.memory_needed(model, Setup(*args, **{'dtype_size': 4, 'reserved': 0} | more))


def test_memory_is_the_state_the_blocks_and_the_head():
    model, tokens = tiny(bias=False), 4 * T
    blocks, head = L * (8 + 14 * 4) * tokens * C, 12 * tokens * C + 12 * tokens * V
    assert memory(model, 2, 4, 1) == 16 * N_PARAMS + blocks + head  # DDP's buckets keep the gradients
    assert memory(model, 1, 4, 2) == 16 * N_PARAMS + blocks + head + 4 * V * C  # the head's gradient twice
    checkpointed = blocks // L + L * tokens * C * 4 + head
    assert memory(model, 1, 4, 2, checkpointing=True) == 16 * N_PARAMS + checkpointed + 4 * V * C
    late = 4 * (N_PARAMS - V * C)  # gradients come as activations go, but the loss makes the head's
    assert memory(model, 1, 4, 1) == 16 * N_PARAMS - late + blocks + head
    before = memory(model, 1, 4, 2)
    add_adapters(model, rank=2, alpha=4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < N_PARAMS / 4
    assert before - memory(model, 1, 4, 2) == 12 * N_PARAMS - 16 * trained + 4 * V * C


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


@pytest.mark.parametrize('seconds, text', [
    (0.4, '0 s'), (59, '59 s'), (60, '1 min 0 s'), (3599, '59 min 59 s'), (3600, '1 h 0 min'),
    (3725, '1 h 2 min'), (86399, '23 h 59 min'), (86400, '1 d 0 h'), (400000, '4 d 15 h')])
def test_duration_has_two_units_and_never_sixty_of_one(seconds, text):
    assert plan.duration(seconds) == text
    assert not re.search(r'\b(60 s|60 min|24 h)', plan.duration(seconds + 0.7))


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob('*') if p.is_file()}


def test_dry_run_measures_some_iterations_and_writes_nothing(train, tmp_path):
    log = train('--dry_run', '--max_iters=500', '--eval_interval=100', '--log_interval=7')['log']
    assert list(losses(log)) == [*range(12)] and 'step 0' not in log
    assert not (tmp_path / 'out').exists()
    told = re.search(r'^time    ([\d.]+)ms an iteration, (\d+) (s|min) .*in all', log, re.M)
    ms, whole, unit = told.groups()
    assert 0 < 501 * float(ms) / 1000 < (int(whole) + 1) * (60 if unit == 'min' else 1)


def test_dry_run_in_a_run_s_folder_leaves_it_as_it_was(train, tmp_path):
    train('--max_iters=4', '--checkpoint_interval=2')
    for damage in (False, True):
        if damage:
            latest = tmp_path / 'out/latest.pt'
            latest.write_bytes(latest.read_bytes()[:-1])
        before = contents(tmp_path / 'out')
        for init_from, todo in (('scratch', 501), ('resume', 496), ('auto', 496)):
            log = train('--dry_run', '--max_iters=500', f'--init_from={init_from}')['log']
            left = todo + 1 if damage and todo < 501 else todo  # of the state before
            assert f'{left} iterations of 64 tokens' in log
            assert contents(tmp_path / 'out') == before
    finished = train('--dry_run', '--init_from=resume', '--max_iters=2')['log']
    assert '0 iterations' in finished and not losses(finished) and 'the run is finished' in finished


@pytest.mark.parametrize('more', ['--batch_ramp_iters=9e18', '--sampler=epoch'])
def test_dry_run_of_a_run_without_end_answers_at_once(more, train):
    log = train('--dry_run', '--max_iters=9e18', '--gradient_accumulation_steps=3', more)['log']
    assert '9,000,000,000,000,000,001 iterations' in log and re.search(r'^time .* in all', log, re.M)


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


def test_plan_has_the_figures_of_the_document():
    """docs/SCALING.md: 6.7B on 64 GPUs, one sequence each."""
    model = planned(n_layer=32, n_head=32, n_embd=4096, block_size=2048)
    needed = [plan.memory_needed(model, Setup(64, 1, 1, **how)) for how in plan.STRATEGIES.values()]
    assert [*map(plan.size, needed)] == ['132.0 GB', '123.7 GB', '18.0 GB', '9.7 GB']


def test_each_gpu_can_be_planned_for_without_case_and_blanks():
    model = planned(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)
    for gpu in (*GPUS, ' rtx4090'):
        rows = plan.scale(model, f'16x{gpu.lower()}', 16, 10).splitlines()
        assert rows[0].split(', ')[0] == f'{N_PARAMS:,} parameters on 16 {gpu.replace(" rtx", "RTX ")}'
        assert len(rows) == 9 and 'does not fit' not in rows[3]


def test_plan_says_what_does_not_fit_and_ends_soon_for_any_batch():
    model = planned(n_layer=96, n_head=96, n_embd=12288)
    rows = plan.scale(model, '8xT4', 8, 10).splitlines()
    assert all('does not fit: a micro-batch of 1 needs' in row for row in rows[3:7]) and len(rows) == 8
    assert 'RTX 4090' in plan.scale(planned(n_layer=1, n_head=1, n_embd=8), '1xRTX4090', 2**70, 2**62)


@pytest.mark.parametrize('args, message', [
    ('--gpus=8xH9', 'gpus=8xH9: H9 is not one of A100, H100'),
    ('--gpus=H100', 'gpus=H100 is no number and kind of GPUs, such as 8xH100'),
    (f'--gpus={"9" * 5000}xH100', ' is no number'),
    ('--gpus=7', "= 480 sequences an iteration can't be shared by 7 GPUs"),
    ('--batch_size=0', 'batch_size=0 must be at least 1'), ('--n_head=7', 'must be a multiple of n_head')])
def test_plan_that_cannot_be_made_is_one_line(args, message, run_here):
    with pytest.raises(USER_ERRORS) as error:
        run_here('scripts/plan.py', args)
    assert message in str(error.value) and '\n' not in str(error.value)
