"""plan.py: what a run is told to need is what it needs."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_ARGS
from hypothesis import given
from hypothesis import strategies as st

import plan
import runtime
from model import GPT, GPTConfig

V, T, L, C = (TINY[k] for k in ('vocab_size', 'block_size', 'n_layer', 'n_embd'))
N_PARAMS = V * C + T * C + L * (12 * C * C + 2 * C) + C  # embeddings, blocks, the last normalisation
CPU = SimpleNamespace(device='cpu', dtype='float32')


@pytest.fixture
def model():
    return GPT(GPTConfig(**TINY, bias=False))


def table(model, run=CPU, tokens=None, iterations=100, batch_size=4, accumulation=6, out_dir='.'):
    """{row: text} of what a run needs."""
    tokens = tokens or {'train': 100_000, 'val': 5_000}
    sequences = iterations * batch_size * accumulation
    text = plan.describe(model, run, tokens, iterations, sequences, batch_size, out_dir)
    return {line[:8].strip(): line[8:] for line in text.splitlines()}


# ---------------------------------------------------------------------------- the table

def test_table_counts_data_parameters_tokens_epochs_and_flops(model):
    rows = table(model)
    assert list(rows) == ['data', 'model', 'run', 'memory', 'disk']
    assert rows['data'] == '100,000 tokens to train on, 5,000 to validate'
    assert rows['model'] == (f'{N_PARAMS:,} parameters: 2 layers of 32, 2 heads, block_size 32, '
                             'vocabulary 64')
    per_iter = 4 * 6 * T  # 768
    flops = 100 * per_iter * (6 * (N_PARAMS - T * C) + 12 * L * C * T)
    assert rows['run'] == (f'100 iterations of {per_iter} tokens: 76,800 tokens, 0.77 epochs, '
                           f'{flops:.1e} FLOPs')


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
    monkeypatch.setattr(runtime, 'total_memory', lambda device: there)
    memory = table(model)['memory']
    assert memory.startswith('about 1.0 MB') and ('TOO LITTLE' in memory) == warning
    assert (' of ' in memory) == (there is not None)


def test_memory_is_the_parameters_the_blocks_and_the_head(model):
    tokens = 4 * T
    blocks, head = L * 16 * tokens * C * 4, 2 * 4 * tokens * V + 4 * V * C
    assert plan.memory_needed(model, 4, 'float32') == 16 * N_PARAMS + blocks + head
    assert plan.memory_needed(model, 4, 'bfloat16') == 16 * N_PARAMS + blocks // 2 + head
    model.activation_checkpointing = True
    assert plan.memory_needed(model, 4, 'float32') == 16 * N_PARAMS + blocks // L + L * tokens * C * 4 + head


def test_memory_of_a_large_head_is_that_of_one_chunk():
    model = GPT(GPTConfig(block_size=8, vocab_size=3000, n_layer=1, n_head=1, n_embd=8))
    grown = [plan.memory_needed(model, b, 'float32') for b in (1000, 2000)]
    assert grown[1] - grown[0] == 1000 * 8 * 8 * 16 * 4  # the blocks' share alone


def test_free_space_is_asked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: asked.append(path) or SimpleNamespace(free=7))
    assert plan.free_disk(tmp_path / 'not/yet/there') == 7 and asked == [str(tmp_path)]


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
    assert done.stderr.startswith('MemoryError: out of memory at batch_size=131072: --batch_size=65536 ')
    assert done.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()


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
    assert '0 iterations' in train('--dry_run', '--init_from=resume', '--max_iters=4')['log']


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
        model.activation_checkpointing = checkpointing
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found, idx = {}, torch.zeros(2, 96, dtype=torch.int64)

        def pack(t, found=found, own=own):
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t  # held, so that its memory isn't used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
                torch.autocast('cpu', torch.bfloat16, enabled=size == 2):
            model(idx, idx, return_logits=False)
        # autocast's copies of weights are the model's state
        weights = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
        kept.append(sum(t.untyped_storage().nbytes() for t in found.values()
                        if t.shape not in weights))
    block = plan.activation_memory(model, 2, checkpointing, size)
    model.config.n_layer = 2
    expected = block - plan.activation_memory(model, 2, checkpointing, size)
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.1)


def test_state_is_sixteen_bytes_a_parameter_shared_by_all_and_what_is_gathered():
    model = planned(n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=128)
    n, block = model.get_num_params(non_embedding=False), 12 * 64 * 64 + 2 * 64
    assert plan.state_memory(model, 1, 8, 8, False, False, False) == 16 * n + 2 * 4 * block
    assert plan.state_memory(model, 8, 8, 1, False, False, False) == 20 * n + 2 * 4 * block
    gathered = 8 * (n - 4 * block) + 10 * block
    assert plan.state_memory(model, 8, 8, 1, True, False, False) == 2 * n + gathered
    assert plan.state_memory(model, 8, 16, 1, True, False, False) == 6 * n + gathered
    assert plan.state_memory(model, 8, 8, 1, True, False, True) == gathered


def test_best_tokens_make_the_lowest_loss_of_the_same_arithmetic():
    for A, alpha, B, beta in plan.FITS.values():
        tokens = plan.best_tokens(1e9, A, alpha, B, beta)

        def loss(n, c=1e9 * tokens, A=A, alpha=alpha, B=B, beta=beta):
            return A / n ** alpha + B / (c / n) ** beta
        assert loss(1e9) < min(loss(0.98e9), loss(1.02e9)) and 5e9 < tokens < 1e11


def test_plan_needs_neither_data_nor_gpus_and_names_the_largest_micro_batch(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train('--dry_run', '--plan_gpus=8', '--plan_gpu=A100', '--n_layer=48', '--n_head=25', '--n_embd=1600',
              '--block_size=1024', '--batch_size=8', '--gradient_accumulation_steps=64', data_dir='nowhere')
    rows = capsys.readouterr().out.splitlines()[-6:]
    assert end.value.code is None and not (tmp_path / 'out').exists()
    assert 'micro-batch' in rows[0] and [row[:32].strip() for row in rows[1:]] == [*plan.STRATEGIES]
    found = [int(re.match(r'[\d.,]+ [GM]B +(\d+) ', row[32:].strip())[1]) for row in rows[1:]]
    assert found == [8, 64, 16, 64, 64]


@pytest.mark.parametrize('args, message', [
    (('--plan_gpus=8', '--plan_gpu=H9'), 'plan_gpu=H9 is not one of A100, H100'),
    (('--plan_gpus=7',), "= 4 sequences an iteration can't be shared by 7 GPUs"),
])
def test_plan_that_cannot_be_made_is_one_line(args, message, train):
    with pytest.raises(ValueError, match=message) as error:
        train('--dry_run', *args)
    assert '\n' not in str(error.value)
