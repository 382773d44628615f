"""plan.py: what a run is told to need is what it needs."""

import itertools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_ARGS, losses
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, GPTConfig
from support.machine.files import free_disk
from support.machine.hardware import GPUS
from support.machine.runtime import Runtime
from support.training.lora import add_adapters
from support.training.loss import LinearCrossEntropy, checkpoint_activations, use_lean_loss
from support.training import plan
from support.training.plan import Setup

V, T, L, C = (TINY[k] for k in ('vocab_size', 'block_size', 'n_layer', 'n_embd'))
N_PARAMS = V * C + T * C + L * (12 * C * C + 2 * C) + C  # embeddings, blocks, the last normalisation
CPU = Runtime('cpu', 'float32', False, 'gloo')


@pytest.fixture
def model():
    return GPT(GPTConfig(**TINY, bias=False))


def table(model, run=CPU, tokens=None, iterations=100, batch_size=4, accumulation=6, out_dir='.', **more):
    """{row: text} of what a run needs."""
    tokens = tokens or {'train': 100_000, 'val': 5_000}
    sequences = iterations * batch_size * accumulation
    text = plan.describe(model, run, tokens, iterations, sequences, batch_size, out_dir, **more)
    return {line[:8].strip(): line[8:] for line in text.splitlines()}


# ---------------------------------------------------------------------------- the table

def test_table_counts_data_parameters_tokens_epochs_and_flops(model):
    rows = table(model)
    assert list(rows) == ['data', 'model', 'run', 'memory', 'disk']
    assert rows['data'] == '100,000 tokens to train on, 5,000 to validate'
    assert rows['model'] == '2 layers of 32, 2 heads, block_size 32, vocabulary 64'
    per_iter = 4 * 6 * T  # 768
    flops = 100 * per_iter * (6 * (N_PARAMS - T * C) + 12 * L * C * T)
    assert rows['run'] == (f'100 iterations of {per_iter} tokens: 76,800 tokens, 0.77 epochs, '
                           f'{flops:.1e} FLOPs')


@pytest.mark.parametrize('changes, counted, without', [
    ({}, N_PARAMS - T * C, ', without the 1,024 of positions'),
    ({'pos_emb': 'rope', 'tie_weights': False, 'ngram': 2, 'ngram_rows': 64}, N_PARAMS - T * C,
     ', without the 2,048 of n-grams and the 2,048 of tokens'),
    ({'pos_emb': 'none'}, N_PARAMS - T * C, ''),
])
def test_number_of_parameters_says_what_it_leaves_out(changes, counted, without):
    told = plan.parameters_in_words(GPT(GPTConfig(**TINY | changes, bias=False)))
    assert told == f'number of parameters: {counted / 1e6:.2f}M{without}'


def test_table_of_a_run_that_is_done_has_nothing_to_do(model):
    row = table(model, iterations=0)['run']
    assert row == '0 iterations of 0 tokens: 0 tokens, 0.00 epochs, 0.0e+00 FLOPs'


def test_disk_is_told_for_three_states_and_one_being_written(model, monkeypatch, tmp_path):
    for free, warning in ((4 * 12 * N_PARAMS, ''), (4 * 12 * N_PARAMS - 1, '  <- TOO LITTLE')):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path, free=free: SimpleNamespace(free=free))
        row = table(model, out_dir=tmp_path)['disk']
        assert row == f'{48 * N_PARAMS / 1e6:.1f} MB for checkpoints, {free / 1e6:.1f} MB free{warning}'


def test_size_of_a_checkpoint_is_that_of_the_file(train, tmp_path):
    script = train('--max_iters=1', '--n_embd=128')
    size = (tmp_path / 'out/latest.pt').stat().st_size
    assert 0 <= size - plan.checkpoint_bytes(script['model']) < 0.03 * size


@pytest.mark.parametrize('there, warning', [(1 << 40, False), (1 << 19, True), (None, False)])
def test_memory_that_is_not_there_is_warned_of(there, warning, model, monkeypatch):
    monkeypatch.setattr(plan, 'total_memory', lambda device: there)
    memory = table(model)['memory']
    assert memory.startswith('about 1.1 MB') and ('TOO LITTLE' in memory) == warning
    assert (' of ' in memory) == (there is not None)


def memory(model, *args, **more):
    return plan.memory_needed(model, Setup(*args, **{'dtype_size': 4, 'reserved': 0} | more))


def test_memory_is_the_state_the_blocks_and_the_head(model):
    tokens = 4 * T
    blocks, head = L * (8 + 14 * 4) * tokens * C, 12 * tokens * C + 12 * tokens * V
    assert memory(model, 2, 4, 1) == 16 * N_PARAMS + blocks + head  # DDP's buckets keep the gradients
    assert memory(model, 1, 4, 2) == 16 * N_PARAMS + blocks + head + 4 * V * C  # the head's second gradient
    checkpointed = blocks // L + L * tokens * C * 4 + head
    assert memory(model, 1, 4, 2, checkpointing=True) == 16 * N_PARAMS + checkpointed + 4 * V * C
    copies = 2 * L * (12 * C * C + 2 * C)
    assert memory(model, 1, 4, 2, dtype_size=2, reserved=5) == \
        16 * N_PARAMS + copies + L * (8 + 14 * 2) * tokens * C + head + 4 * V * C + 5


def test_gradients_of_a_single_micro_step_come_as_activations_go(model):
    tokens, late = 4 * T, 4 * (N_PARAMS - V * C)
    blocks, head = L * (8 + 14 * 4) * tokens * C, 12 * tokens * C + 12 * tokens * V
    assert memory(model, 1, 4, 1) == 16 * N_PARAMS - late + blocks + head  # the loss makes the head's
    assert memory(model, 1, 1, 1, checkpointing=True) == 16 * N_PARAMS + blocks // L // 4  # at the end


def test_memory_of_frozen_weights_is_without_gradient_and_moments(model):
    before = memory(model, 1, 4, 2)
    add_adapters(model, rank=2, alpha=4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < N_PARAMS / 4
    assert before - memory(model, 1, 4, 2) == 12 * N_PARAMS - 16 * trained + 4 * V * C


def test_memory_of_a_large_head_is_that_of_one_chunk():
    model = GPT(GPTConfig(block_size=8, vocab_size=3000, n_layer=1, n_head=1, n_embd=8))
    grown = [memory(model, 1, b, 1, device_type='cpu') for b in (1000, 2000)]
    assert grown[1] - grown[0] == 1000 * 8 * 8 * ((8 + 14 * 4) + 12)  # no logits


@pytest.mark.parametrize('settings, setup', [
    ({}, Setup(8, 4, 3)),
    ({'parallel': 'fsdp'}, Setup(8, 4, 3, sharded=True)),
    ({'parallel': 'fsdp', 'activation_checkpointing': True, 'cpu_offload': True},
     Setup(8, 4, 3, sharded=True, checkpointing=True, offload=True)),
])
def test_table_knows_how_the_run_uses_its_gpus(settings, setup, model, monkeypatch):
    monkeypatch.setattr(plan, 'total_memory', lambda device: 80e9)
    run = Runtime('cuda:0', 'bfloat16', True, 'nccl', 0, 8)
    row = table(model, run, accumulation=24, **settings)['memory']
    assert row == f'about {plan.size(plan.memory_needed(model, setup))} of 80.0 GB on cuda:0'
    assert row.startswith('about 2.0 GB')  # CUDA's own
    assert table(model)['memory'].startswith(f'about {plan.size(memory(model, 1, 4, 6))}')  # a CPU has none


def test_model_that_fits_in_parts_alone_is_warned_of_where_it_is_whole(monkeypatch):
    monkeypatch.setattr(plan, 'total_memory', lambda device: 80e9)
    run = Runtime('cuda:0', 'bfloat16', True, 'nccl', 0, 64)
    model = planned(n_layer=32, n_head=32, n_embd=4096, block_size=2048)
    rows = [table(model, run, batch_size=1, accumulation=64, parallel=parallel)['memory']
            for parallel in ('ddp', 'fsdp')]
    assert rows[0].startswith('about 132.0 GB of 80.0 GB') and 'TOO LITTLE' in rows[0]
    assert rows[1] == 'about 18.0 GB of 80.0 GB on cuda:0'  # the figures of docs/SCALING.md


def test_free_space_is_asked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: asked.append(path) or SimpleNamespace(free=7))
    assert free_disk(tmp_path / 'not/yet/there') == 7 and asked == [str(tmp_path)]


# ---------------------------------------------------------------------------- out of memory

def throw(error):
    raise error


@given(st.integers(1, 500), st.integers(1, 50))
def test_smaller_batch_keeps_the_product(batch_size, accumulation):
    smaller = plan.smaller_batch(batch_size, accumulation)
    if batch_size == 1:
        assert smaller is None
    else:
        assert smaller[0] * smaller[1] == batch_size * accumulation and 1 <= smaller[0] < batch_size
        assert not any(batch_size % b == 0 for b in range(smaller[0] + 1, batch_size))


@pytest.mark.parametrize('fail', [
    lambda: torch.empty(1 << 60, dtype=torch.uint8),  # as a CPU says it
    lambda: throw(torch.OutOfMemoryError('CUDA out of memory.')),
    lambda: bytearray(1 << 60),
    lambda: throw(RuntimeError('MPS backend out of memory (MPS allocated: 1 GB)')),
], ids=['cpu', 'cuda', 'python', 'mps'])
def test_allocation_that_fails_says_which_batch_to_take(fail):
    with pytest.raises(MemoryError) as error, plan.out_of_memory_advice(12, 40):
        fail()
    assert str(error.value) == (
        'out of memory at batch_size=12: --batch_size=6 --gradient_accumulation_steps=80 trains on the same '
        'tokens an iteration; --activation_checkpointing=True needs less too, and is slower')
    with pytest.raises(MemoryError, match='a shorter --block_size or a smaller model'), \
            plan.out_of_memory_advice(1, 40):
        fail()


def test_other_errors_pass_the_advice_by():
    for error in (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ValueError('out of memory'),
                  NotImplementedError(), RecursionError(), torch.distributed.DistBackendError('NCCL error')):
        with pytest.raises(type(error)) as raised, plan.out_of_memory_advice(12, 40):
            raise error
        assert raised.value is error


@pytest.mark.skipif(sys.platform != 'linux', reason='it limits the memory of a process')
def test_a_batch_that_does_not_fit_is_one_line_for_the_user(run_script, char_data, tmp_path):
    limited = ('import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2); '
               'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
    done = run_script('train.py', *TINY_ARGS, '--n_embd=256', '--block_size=64', '--batch_size=131072',
                      '--dry_run', f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}', ok=False,
                      launcher=('-c', limited), env={'OMP_NUM_THREADS': '1'})
    *before, told = done.stderr.splitlines()
    assert told.startswith('MemoryError: out of memory at batch_size=131072: --batch_size=65536 ')
    assert (not before or torch.cuda.is_available()) and not (tmp_path / 'out').exists()  # CUDA warns


# ---------------------------------------------------------------------------- time

@pytest.mark.parametrize('seconds, text', [
    (0, '0 s'), (0.4, '0 s'), (59, '59 s'), (60, '1 min 0 s'), (61, '1 min 1 s'), (3599, '59 min 59 s'),
    (3600, '1 h 0 min'), (3725, '1 h 2 min'), (86399, '23 h 59 min'), (86400, '1 d 0 h'),
    (400000, '4 d 15 h'),
])
def test_duration_has_two_units(seconds, text):
    assert plan.duration(seconds) == text


def test_durations_are_never_sixty_of_a_unit():
    for seconds in range(0, 200_000, 7):
        assert not re.search(r'\b(60 s|60 min|24 h)', plan.duration(seconds + 0.7)), seconds + 0.7


@pytest.mark.parametrize('n_bytes, text', [(0, '0.0 MB'), (1_550_000, '1.6 MB'), (999_900_000, '999.9 MB'),
                                           (1_000_000_000, '1.0 GB'), (1_234_567_000_000, '1,234.6 GB')])
def test_size_is_in_mega_or_gigabytes(n_bytes, text):
    assert plan.size(n_bytes) == text


def test_time_is_that_of_the_iterations_and_of_the_evaluations():
    # 1000 iterations of 0.3 s in 4 micro-steps; 4 evaluations of 64 batches of 0.3 / 4 / 3 s
    assert plan.time_needed([9.0, 5.0, 0.2, 0.3, 0.4], range(1, 1001), 250, 64, 4) == \
        '300.00ms an iteration, 5 min 6 s in all, of which evaluations 6 s'


# ---------------------------------------------------------------------------- the dry run

def test_dry_run_measures_some_iterations_and_writes_nothing(train, tmp_path):
    script = train('--dry_run', '--max_iters=500', '--eval_interval=100', '--log_interval=7')
    assert len(re.findall(r'^iter \d+: ', script['log'], re.M)) == 12 and 'step 0' not in script['log']
    step, last = re.search(r'^time    ([\d.]+)ms an iteration, (.*) in all', script['log'], re.M).groups()
    assert float(step) > 0 and last and not (tmp_path / 'out').exists()


def test_dry_run_in_a_run_s_folder_leaves_it_as_it_was(train, tmp_path):
    train('--max_iters=4')
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').rglob('*')}
    for init_from in ('scratch', 'resume', 'auto'):
        log = train('--dry_run', '--max_iters=500', '--eval_interval=3', f'--init_from={init_from}')['log']
        todo = 501 if init_from == 'scratch' else 496
        assert f'{todo} iterations of 64 tokens' in log
        assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').rglob('*')} == before


def test_dry_run_counts_the_evaluations_that_the_run_would_make(train, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, 'time_needed', lambda *numbers: asked.append(numbers) or '')
    train('--dry_run', '--max_iters=21', '--eval_interval=5', '--eval_iters=3',
          '--gradient_accumulation_steps=2')
    (times, *others), = asked
    assert min(times) > 0 and others == [range(22), 5, 6, 2]


def test_dry_run_leaves_a_damaged_state_where_it_is(train, tmp_path):
    train('--max_iters=4')
    path = tmp_path / 'out/latest.pt'
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    train('--dry_run', '--init_from=resume', '--max_iters=500')
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_dry_run_of_a_finished_run_has_nothing_to_measure(train, tmp_path):
    train('--max_iters=4')
    log = train('--dry_run', '--init_from=resume', '--max_iters=4')['log']
    assert '0 iterations' in log and not losses(log)


# ---------------------------------------------------------------------------- other machines

def planned(**sizes):
    with torch.device('meta'):
        return GPT(GPTConfig(bias=False, **sizes))


@pytest.mark.parametrize('dtype, size', [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('more', [{}, {'activation': 'swiglu'}])
def test_activations_are_what_autograd_keeps(dtype, size, checkpointing, more):
    """Within 10 %: of two models, so that the head, which both have, falls out."""
    kept = []
    for n_layer in (2, 6):
        model = GPT(GPTConfig(96, 256, n_layer, 4, 128, bias=False, **more))
        use_lean_loss(model)
        if checkpointing:
            checkpoint_activations(model)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found, idx = {}, torch.zeros(2, 96, dtype=torch.int64)

        def pack(t, found=found, own=own):
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t  # held, so that its memory isn't used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
                torch.autocast('cpu', torch.bfloat16, enabled=size == 2):
            model(idx, idx)
        # autocast's copies of weights are the model's state
        weights = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
        kept.append(sum(t.untyped_storage().nbytes() for t in found.values()
                        if t.shape not in weights))
    setup = Setup(1, 2, 1, checkpointing=checkpointing, dtype_size=size)
    six = plan.activation_memory(model, setup)
    model.config.n_layer = 2
    expected = six - plan.activation_memory(model, setup)
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.1)


def peak_of_an_iteration(model, batch_size, micro_steps, dtype, trace):
    """Bytes that an iteration allocates and frees again, by torch's profiler."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64)

    def iteration():
        for _ in range(micro_steps):
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                _, loss = model(idx, idx)
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
@pytest.mark.parametrize('micro_steps', [1, 2])
def test_estimated_memory_is_about_the_real_one_and_hardly_below_it(
        dtype, checkpointing, micro_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', 1 << 18)
    model = GPT(GPTConfig(128, 2000, 4, 4, 128, bias=False))
    use_lean_loss(model)
    if checkpointing:
        checkpoint_activations(model)
    real = 12 * model.get_num_params(non_embedding=False) + peak_of_an_iteration(
        model, 4, micro_steps, dtype, tmp_path / 'trace.json')
    needed = memory(model, 1, 4, micro_steps, checkpointing=checkpointing, dtype_size=dtype.itemsize,
                    device_type='cpu')
    assert 0.98 * real < needed < 1.15 * real


def test_state_is_sixteen_bytes_a_parameter_shared_by_all_and_what_is_gathered():
    model = planned(n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=128)
    n, block = model.get_num_params(non_embedding=False), 12 * 64 * 64 + 2 * 64
    state = lambda *args, **how: plan.state_memory(model, Setup(*args, **how))  # noqa: E731
    assert state(1, 8, 1) == 16 * n + 2 * 4 * block
    assert state(8, 1, 1) == 16 * n + 2 * 4 * block
    assert state(8, 1, 2) == 20 * n + 2 * 4 * block + 4 * 128 * 64
    assert state(8, 1, 1, sharded=True) == 2 * n + 8 * (n - 4 * block) + 10 * block
    assert state(8, 1, 2, sharded=True) == 6 * n + 8 * (n - 4 * block) + 10 * block
    assert state(8, 1, 1, sharded=True, dtype_size=4) == 2 * n + 8 * (n - 4 * block) + 12 * block
    assert state(8, 1, 2, sharded=True, offload=True) == 8 * (n - 4 * block) + 10 * block


def test_best_tokens_make_the_lowest_loss_of_the_same_arithmetic():
    for A, alpha, B, beta in plan.FITS.values():
        tokens = plan.best_tokens(1e9, A, alpha, B, beta)

        def loss(n, c=1e9 * tokens, A=A, alpha=alpha, B=B, beta=beta):
            return A / n ** alpha + B / (c / n) ** beta
        assert loss(1e9) < min(loss(0.98e9), loss(1.02e9)) and 5e9 < tokens < 1e11


def test_plan_needs_neither_data_nor_gpus_and_names_the_largest_micro_batch(run_script, tmp_path):
    done = run_script('train.py', *TINY_ARGS, '--dry_run', '--plan_gpus=8xA100', '--n_layer=48',
                      '--n_head=25', '--n_embd=1600', '--block_size=1024', '--batch_size=8',
                      '--gradient_accumulation_steps=64', '--data_dir=nowhere',
                      f'--out_dir={tmp_path / "out"}')
    rows = done.stdout.splitlines()[-6:]
    assert not (tmp_path / 'out').exists()
    assert 'micro-batch' in rows[0] and [row[:32].strip() for row in rows[1:]] == [*plan.STRATEGIES]
    found = [int(re.match(r'[\d.,]+ [GM]B +(\d+) ', row[32:].strip())[1]) for row in rows[1:]]
    assert found == [8, 64, 16, 64, 64]


@pytest.mark.parametrize('name', ['RTX 4090', 'rtx4090', 'RTX4090', ' rtx 4090'])
def test_gpu_is_known_without_case_and_blanks(name):
    model = planned(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)
    assert ' parameters on 4 RTX 4090, ' in plan.scale(model, 4, name, 8, 10)


@pytest.mark.parametrize('gpu', GPUS)
def test_every_gpu_of_the_table_can_be_planned_for(gpu):
    model = planned(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)
    rows = plan.scale(model, 16, gpu.lower(), 16, 10).splitlines()
    assert f'on 16 {gpu}, ' in rows[0] and len(rows) == 8 and 'does not fit' not in rows[3]


@pytest.mark.parametrize('args, message', [
    (('--plan_gpus=8xH9',), 'plan_gpus: H9 is not one of A100, H100'),
    (('--plan_gpus=H100',), 'plan_gpus=H100 is no number and kind of GPUs, such as 8xH100'),
    (('--plan_gpus=0',), 'plan_gpus=0 is no number'),
    (('--plan_gpus=7',), "= 4 sequences an iteration can't be shared by 7 GPUs"),
])
def test_plan_that_cannot_be_made_is_one_line(args, message, train):
    with pytest.raises(ValueError, match=message) as error:
        train('--dry_run', *args)
    assert '\n' not in str(error.value)
