"""Several processes, and FSDP: together they compute what one does, and each holds its share."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_ARGS, tiny
from runs import differences, equal, logged, read_log, two_processes
from torch.nn.modules.module import register_module_forward_pre_hook

from support.machine.runtime import Runtime
from support.training import fsdp
from support.training.state import State

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
RUN = (*TINY_ARGS, '--max_iters=12', '--eval_interval=4', '--keep_interval=4', '--checkpoint_interval=4',
       '--gradient_accumulation_steps=4', '--learning_rate=1e-2', '--lr_decay_iters=12', '--eval_iters=3',
       '--weight_decay=1')


@pytest.fixture(scope='module')
def in_two(char_data):
    """A function that runs train.py in two processes, and gives what each says."""
    def run(out_dir, *args, error=None, **how):
        replies = two_processes().train(*RUN, f'--data_dir={char_data}', f'--out_dir={out_dir}', *args, **how)
        assert [reply.error and error in reply.error for reply in replies] == [error and True] * 2, replies
        return replies[0].output
    return run


def gap(one, other):
    """The largest difference of two runs' logged numbers."""
    logs = [{(e['iter'], tuple(e)): e for e in read_log(folder)} for folder in (one, other)]
    for entry in [*logs[0].values(), *logs[1].values()]:
        entry.update({(k, i): x for k, v in entry.pop('health', {}).items() for i, x in enumerate(v)})
    assert logs[0].keys() == logs[1].keys()
    return max(abs(entry[k] - logs[1][key][k]) for key, entry in logs[0].items() for k in entry)


def assert_same_states(one, other, name, atol):
    """Of two runs, in all that a state holds: names and numbers."""
    a, b = (torch.load(Path(folder, name)) for folder in (one, other))
    assert a.keys() == b.keys() and [*a['model']] == [*b['model']] and a['iter_num'] == b['iter_num']
    of_groups = [[{k: v for k, v in g.items() if k not in ('lr', 'fused')}
                  for g in s['optimizer']['param_groups']] for s in (a, b)]
    assert equal(*of_groups) and a['optimizer']['state'].keys() == b['optimizer']['state'].keys()
    of_both = [[s['model'], *s['optimizer']['state'].values()] for s in (a, b)]
    for x, y in zip(*of_both, strict=True):
        assert all(torch.allclose(x[k], y[k], atol=atol) for k in x)


OPTIONS = {
    'plain': (),
    'all': ('--value_residual', '--ngram=3', '--ngram_rows=64', '--pos_emb=rope', '--norm=rmsnorm',
            '--activation=swiglu', '--sampler=epoch', '--activation_checkpointing',
            '--sample_interval=4', '--n_kv_head=1', '--qk_norm', '--tie_weights=False', '--bias',
            '--embedding_lr=0.02', '--grad_clip=0.5'),
    'muon': ('--optimizer=muon', '--tie_weights=False'),
    'bfloat16': ('--dtype=bfloat16', '--bias'),
}


@pytest.fixture(scope='module')
def finished():
    """{name: the folder of a run of one process}"""
    return {}


@pytest.fixture
def one(finished, train, tmp_path_factory):
    def of(name):
        if name not in finished:
            folder = tmp_path_factory.mktemp(name)
            train(*RUN, *OPTIONS[name], out_dir=folder)
            finished[name] = folder
        return finished[name]
    return of


@pytest.mark.parametrize('name, n, parallel', [
    ('plain', 2, 'ddp'), ('plain', 2, 'fsdp'), ('all', 1, 'fsdp'), ('all', 2, 'ddp'), ('all', 2, 'fsdp'),
    ('muon', 2, 'ddp'), ('bfloat16', 2, 'fsdp')])
def test_two_processes_compute_what_one_does(name, n, parallel, one, in_two, train, tmp_path):
    """And save it, whether the model is whole or in parts."""
    args = (*OPTIONS[name], f'--parallel={parallel}')
    rounding = 0.05 if name in ('bfloat16', 'muon') else 1e-5
    if n == 1:
        train(*RUN, *args)
    else:
        in_two(tmp_path / 'out', *args)
    assert gap(one(name), tmp_path / 'out') < rounding
    for state in ('latest.pt', 'previous.pt', 'ckpt.pt', 'ckpt_4.pt', 'ckpt_8.pt'):
        assert_same_states(one(name), tmp_path / 'out', state, 20 * rounding)


def test_run_goes_on_under_any_number_of_processes_and_either_way(one, in_two, train, tmp_path):
    for end, n, parallel in ((1, 1, 'ddp'), (3, 2, 'fsdp'), (5, 1, 'fsdp'), (8, 2, 'ddp'), (12, 1, 'ddp')):
        args = (f'--parallel={parallel}', f'--max_iters={end}', '--init_from=auto')
        if n == 1:
            log = train(*RUN, *args)['log']
        else:
            log = in_two(tmp_path / 'out', *args)
        assert end == 1 or 'resuming at iteration' in log
    found, expected = logged(tmp_path / 'out'), logged(one('plain'))
    assert found == pytest.approx(expected, abs=1e-5)
    assert_same_states(one('plain'), tmp_path / 'out', 'latest.pt', 1e-4)


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
@pytest.mark.parametrize('line, kind, rank', [('^iter 5:', 'stop', 1), ('^iter 7:', 'stop in evaluation', 0)])
def test_signal_to_one_process_stops_both_and_they_go_on_bit_for_bit(line, kind, rank, parallel, in_two,
                                                                     finished, tmp_path_factory, tmp_path):
    args = (f'--parallel={parallel}', '--dropout=0.2', '--sample_interval=4')
    if parallel not in finished:
        finished[parallel] = tmp_path_factory.mktemp(parallel)
        in_two(finished[parallel], *args)
    output = in_two(tmp_path / 'out', *args, line=line, kind=kind, rank=rank)
    assert 'stopped at iteration ' in output and 'iter 12' not in output
    in_two(tmp_path / 'out', *args, '--init_from=auto')
    assert differences(finished[parallel], tmp_path / 'out') == []


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_number_of_one_process_that_is_not_finite_ends_both(kind, parallel, in_two, tmp_path):
    in_two(tmp_path / 'out', f'--parallel={parallel}', line='^step 8', kind=kind,
           error='NotFinite: iteration 8: ')
    state = State.load(tmp_path / 'out/latest.pt')
    assert state.iter_num == 8 and all(t.isfinite().all() for t in state.model.values())


def test_mistake_is_said_on_both_processes(in_two, tmp_path):
    other, out = f'--out_dir={tmp_path / "b"}', tmp_path / 'out'
    in_two(out, '--gradient_accumulation_steps=3', error='steps=3 counts over all processes')
    in_two(out, of_others=[other, '--learning_rate=0.25'],
           error='rank 1 was started otherwise than rank 0: learning_rate=0.25 instead of 0.01')


def test_sharded_process_holds_its_share(char_data, tmp_path):
    """Of parameters and moments, in bytes."""
    held = {parallel: [np.array(reply.held) for reply in two_processes().train(
        *RUN, '--max_iters=0', f'--parallel={parallel}', f'--out_dir={tmp_path / parallel}',
        f'--data_dir={char_data}')] for parallel in ('ddp', 'fsdp')}
    whole = held['ddp'][0]
    assert whole[1] == 2 * whole[0] and (held['ddp'][1] == whole).all()
    assert (sum(held['fsdp']) == whole).all() and abs(held['fsdp'][0] / whole - 0.5).max() < 0.01


@pytest.mark.parametrize('ramp', [0, 5])
def test_epochs_leave_no_window_out_while_the_batch_grows(ramp, train, tmp_path):
    """Nor read one twice: in a split whose tokens are their own places."""
    (tmp_path / 'places').mkdir()
    for name in ('train', 'val'):
        np.arange(16 * 41 + 7, dtype=np.uint16).tofile(tmp_path / f'places/{name}.bin')
    (tmp_path / 'places/meta.pkl').write_bytes(pickle.dumps({'vocab_size': 700}))
    args = ('--sampler=epoch', '--gradient_accumulation_steps=3', f'--batch_ramp_iters={ramp}',
            '--batch_size=2', '--eval_iters=1', '--max_iters=16')
    seen = []
    hook = register_module_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0][:, 0].tolist())
                                            if type(module).__name__ == 'GPT' and module.training else None)
    try:
        train(*args, data_dir=tmp_path / 'places')
    finally:
        hook.remove()
    n = 40  # windows an epoch
    assert len(seen) >= 2 * n
    for epoch in (seen[:n], seen[n:2 * n]):
        assert np.diff(sorted(epoch)).tolist() == [16] * (n - 1) and epoch != sorted(epoch)
    assert seen[:n] != seen[n:2 * n]


def test_state_of_a_sharded_model_is_a_copy_which_training_does_not_change():
    model = fsdp.shard(tiny(), Runtime('cpu', 'float32', False, 'gloo'))
    state = fsdp.full_model_state(model)
    before = {name: t.clone() for name, t in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.distributed.destroy_process_group()
    assert equal(dict(state), before)
