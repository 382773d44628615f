"""fsdp.py and train.py on several processes: together they compute what one does, each holds its share."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import soak
import torch
from conftest import ROOT

from support.training import fsdp
from support.training import checkpoint, start

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
BATCH = ('--gradient_accumulation_steps=4', '--learning_rate=1e-2', '--lr_decay_iters=50', '--eval_iters=3',
         '--eval_interval=20')


@pytest.fixture(scope='module')
def ranks():
    """A function that gives n processes, which live as long as the module's tests."""
    found = {}

    def of(n):
        found[n] = found.get(n) or soak.Ranks(n)
        return found[n]
    yield of
    for some in found.values():
        some.close()


def run(ranks, n, mode, folder, *args):
    replies = ranks(n).train(*BATCH, f'--parallel={mode}', f'--out_dir={folder}', *args)
    assert [r.error for r in replies] == [None] * n
    return replies[0].output


def gap(one, other):
    """The largest difference of two runs' logged numbers, each iteration's last line counting."""
    logs = [{(e['iter'], tuple(e)): e for e in soak.read_log(folder)} for folder in (one, other)]
    for log in logs:
        for entry in log.values():
            entry.update({(k, i): x for k, v in entry.pop('health', {}).items() for i, x in enumerate(v)})
    assert len(logs[0]) > 0
    return max(abs(entry[k] - logs[1][key][k]) for key, entry in logs[0].items() for k in entry)


@pytest.fixture(scope='module')
def whole(ranks, char_data, tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp('whole')
    run(ranks, 1, 'ddp', folder, f'--data_dir={char_data}', '--max_iters=50')
    return folder


@pytest.mark.parametrize('n, mode', [(1, 'fsdp'), (2, 'ddp'), (2, 'fsdp'), (4, 'ddp'), (4, 'fsdp')])
def test_any_number_of_processes_computes_what_one_does(n, mode, ranks, whole, char_data, tmp_path):
    run(ranks, n, mode, tmp_path, f'--data_dir={char_data}', '--max_iters=50')
    assert gap(whole, tmp_path) < 1e-4
    one, other = (checkpoint.load(folder / 'latest.pt') for folder in (whole, tmp_path))
    assert [*one] == [*other] and [*one['model']] == [*other['model']]
    for a, b in zip(soak.numbers_of(one['optimizer']), soak.numbers_of(other['optimizer']), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def test_run_goes_on_under_any_number_of_processes_and_either_way(ranks, whole, char_data, tmp_path):
    for end, (n, mode) in zip((7, 13, 19, 26, 33, 40, 50), [(1, 'ddp'), (4, 'fsdp'), (2, 'ddp'), (1, 'fsdp'),
                                                            (2, 'fsdp'), (4, 'ddp'), (4, 'fsdp')]):
        output = run(ranks, n, mode, tmp_path, f'--data_dir={char_data}', f'--max_iters={end}',
                     '--init_from=auto')
        assert end == 7 or 'resuming at iteration' in output
    assert gap(whole, tmp_path) < 1e-4


ODD = ('--value_residual', '--ngram=3', '--ngram_rows=64', '--pos_emb=rope',
       '--ema_decay=0.9', '--norm=rmsnorm', '--activation=swiglu', '--sampler=epoch',
       '--activation_checkpointing', '--sample_interval=5', '--max_iters=8')


@pytest.mark.parametrize('options', [ODD, (
    '--tie_weights=False', '--bias', '--dtype=bfloat16', '--grad_clip=0.3', '--max_iters=8')])
def test_options_work_on_sharded_models(options, ranks, char_data, tmp_path):
    said = [run(ranks, n, mode, tmp_path / mode, f'--data_dir={char_data}', *options)
            for n, mode in ((1, 'ddp'), (4, 'fsdp'))]
    assert gap(tmp_path / 'ddp', tmp_path / 'fsdp') < (1e-2 if '--bias' in options else 1e-4)
    samples = [re.findall(r'^sample at iteration (?:.|\n)*?^-----', output, re.M) for output in said]
    assert samples[0] == samples[1] and len(samples[0]) == (2 if options == ODD else 0)
    one, other = (checkpoint.load(tmp_path / mode / 'latest.pt') for mode in ('ddp', 'fsdp'))
    tied = '--bias' not in options
    for state in (one, other):
        weights = [state['model'][name].data_ptr() for name in ('lm_head.weight', 'transformer.wte.weight')]
        assert (weights[0] == weights[1]) == tied
    assert ('trained' in other) == (options == ODD) and [*one] == [*other]


def test_number_that_is_not_finite_is_never_saved(ranks, char_data, tmp_path):
    replies = ranks(2).train(
        f'--data_dir={char_data}', '--parallel=fsdp', '--gradient_accumulation_steps=2', '--max_iters=9',
        '--checkpoint_interval=2', f'--out_dir={tmp_path}', '--dist_timeout=20', kind='loss', at=5,
        value='nan', rank_of=1)
    assert all(r.error.startswith('FloatingPointError: iteration 4: ') for r in replies)
    saved = checkpoint.load(tmp_path / 'latest.pt')
    assert saved['iter_num'] == 4 and all(t.isfinite().all() for t in soak.numbers_of(saved))


@pytest.mark.parametrize('mode', ['ddp', 'fsdp'])
def test_two_nodes_equal_one(mode, char_data, tmp_path):
    """Of two processes; the nodes are played by this machine, on addresses of their own."""
    args = [f'--data_dir={char_data}', f'--parallel={mode}', '--gradient_accumulation_steps=2',
            '--max_iters=20', '--eval_interval=10']
    one = soak.uninterrupted(tmp_path / 'one', args, soak.TORCHRUN)
    for node in soak.agents(2, [*args, f'--out_dir={tmp_path / "two"}'], '--nnodes=2'):
        assert node.communicate(timeout=100) and node.returncode == 0
    assert soak.differences(one, tmp_path / 'two') == []


def test_nodes_that_are_numbered_by_hand_equal_one(char_data, tmp_path):
    args = [f'--data_dir={char_data}', '--gradient_accumulation_steps=2', '--max_iters=20']
    one = soak.uninterrupted(tmp_path / 'one', args, soak.TORCHRUN)
    nodes = [soak.start([*args, f'--out_dir={tmp_path / "two"}'], [
        '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', f'--node_rank={rank}',
        '--master_addr=127.0.0.1', f'--master_port={port}'])
        for port in [soak.free_port()] for rank in range(2)]
    for node in nodes:
        assert node.communicate(timeout=100) and node.returncode == 0
    assert soak.differences(one, tmp_path / 'two') == []


MEASURE = '''
import sys; sys.path.insert(0, sys.argv[1])
import torch
from model import GPT, GPTConfig
from support.training import fsdp
from support.machine import runtime
from support.training.loss import use_lean_loss
run = runtime.resolve('cpu')
torch.distributed.init_process_group('gloo')
model = GPT(GPTConfig(32, 64, 2, 2, 64, bias=False))
use_lean_loss(model)
model = called = fsdp.shard(model, run) if sys.argv[2] == 'fsdp' else model
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
if sys.argv[2] == 'ddp':
    called = torch.nn.parallel.DistributedDataParallel(model)
idx = torch.zeros(2, 32, dtype=torch.int64)
called(idx, idx)[1].backward()
optimizer.step()
part = lambda t: (t.to_local() if hasattr(t, 'to_local') else t).nbytes
params = [*model.parameters()]
found = [sum(map(part, tensors)) for tensors in (params, [p.grad for p in params], [
    t for buffers in optimizer.state.values() for t in buffers.values() if t.dim()])]
with open(f'{sys.argv[3]}{run.rank}', 'w') as file:  # the processes' lines may mix on one pipe
    print(*found, file=file)
run.stop()
'''


def test_memory_of_a_process_is_its_share(tmp_path):
    """Of parameters, gradients and moments, in bytes; rows that four don't divide are none here."""
    (tmp_path / 'measure.py').write_text(MEASURE)
    held = {}
    for mode in ('ddp', 'fsdp'):
        subprocess.run([sys.executable, *soak.TORCHRUN[:-1], '--nproc_per_node=4', tmp_path / 'measure.py',
                        str(ROOT), mode, tmp_path / mode], check=True, capture_output=True)
        held[mode] = [(tmp_path / f'{mode}{rank}').read_text().split() for rank in range(4)]
    for whole, part in zip(held['ddp'], held['fsdp'], strict=True):
        assert [4 * int(n) for n in part] == [int(n) for n in whole]
        assert int(whole[2]) == 2 * int(whole[0]) == 2 * int(whole[1])


@pytest.mark.parametrize('settings, message', [
    (('zero', 'adamw', False), 'parallel=zero is not one of ddp, fsdp'),
    (('fsdp', 'muon', False), 'optimizer=muon needs them whole'),
    (('fsdp', 'adamw', True), 'needs parallel=fsdp and CUDA, this run has parallel=fsdp on cpu'),
    (('ddp', 'adamw', True), 'needs parallel=fsdp and CUDA, this run has parallel=ddp on cpu'),
])
def test_what_does_not_go_together_is_one_line(settings, message, train, tmp_path):
    mode, optimizer, offload = settings
    with pytest.raises(ValueError, match=message) as error:
        train(f'--parallel={mode}', f'--optimizer={optimizer}', f'--cpu_offload={offload}')
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('device, dtype, message', [
    ('mps', 'float32', 'is for CUDA and CPUs, this run is on mps'),
    ('cuda', 'float16', 'dtype=float16 needs a gradient scaler'),
])
def test_sharding_is_refused_where_it_cannot_be_had(device, dtype, message):
    run = SimpleNamespace(device=device, device_type=device, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        fsdp.check_parallel('fsdp', run, 'adamw', False)


@pytest.mark.parametrize('offload', [False, True])
def test_gradients_are_exchanged_in_the_last_micro_step_only_unless_offloaded(offload, train, monkeypatch):
    calls, shard = [], fsdp.shard

    def recording_shard(model, run, cpu_offload):
        model = shard(model, run)  # a CPU has nothing to offload to
        exchange = model.set_requires_gradient_sync
        model.set_requires_gradient_sync = lambda on: (calls.append(on), exchange(on))
        model.register_forward_pre_hook(
            lambda *_: calls.append('forward') if torch.is_grad_enabled() else None)
        return model

    monkeypatch.setattr(fsdp, 'shard', recording_shard)
    monkeypatch.setattr(start, 'check_parallel', lambda *_: None)
    train('--parallel=fsdp', f'--cpu_offload={offload}', '--gradient_accumulation_steps=3', '--max_iters=1')
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
    held = [False, 'forward', True]
    assert calls == 2 * (['forward'] * 3 if offload else [*held, *held, 'forward'])


def test_killed_sharded_run_is_restarted_and_finishes_with_the_same_log(char_data, tmp_path):
    text, lost = soak.fsdp_restart(tmp_path, char_data, 1)
    assert lost == [] and text.startswith('1 ranks killed')
