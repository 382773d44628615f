"""train.py under faults: stopped, killed, its disk full, its numbers not finite. soak.py does more of it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from conftest import ROOT, TINY_ARGS, evaluations, losses
from test_masks import ANSWERS, write_conversations

from support.machine.signals import stop_signals
from support.training import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
EXACT = ('--max_iters=20', '--eval_interval=6', '--lr_decay_iters=20', '--learning_rate=1e-2',
         '--always_save_checkpoint=False', '--dropout=0.2', '--gradient_accumulation_steps=4')

RECIPE = ('--optimizer=muon', '--qk_norm', '--pos_emb=rope', '--sampler=epoch', '--batch_ramp_iters=12',
          '--ema_decay=0.9')


@pytest.fixture(autouse=True)
def own_signals():
    before = {n: signal.getsignal(n) for n in stop_signals()}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def one_rank():
    ranks = soak.Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope='module')
def two_ranks():
    ranks = soak.Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def at_iteration(monkeypatch):
    """Calls a function in an iteration, counted from 0, once: the gradient is there, the update is not."""
    def arrange(iteration, function):
        real, calls = torch.nn.utils.clip_grad_norm_, []

        def clip(parameters, limit):
            calls.append(1)
            if len(calls) == iteration + 1:
                function()
            return real(parameters, limit)
        monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    return arrange


def stop():
    signal.raise_signal(signal.SIGTERM)


# ---------------------------------------------------------------------------- stopped and gone on with

@pytest.mark.parametrize('n, recipe', [(1, ()), (2, ()), (1, RECIPE), (2, RECIPE)])
def test_run_stopped_at_any_step_equals_the_uninterrupted_one_bit_for_bit(n, recipe, request, char_data,
                                                                          tmp_path):
    ranks = request.getfixturevalue('one_rank' if n == 1 else 'two_ranks')
    args = [*EXACT, *recipe, f'--data_dir={char_data}']
    assert [r.error for r in ranks.train(*args, f'--out_dir={tmp_path / "whole"}')] == [None] * n
    for step in (1, 6, 20):
        out_dir = tmp_path / str(step)
        replies = ranks.train(*args, f'--out_dir={out_dir}', kind='stop', at=step, rank_of=step % n)
        state = checkpoint.load(out_dir / 'latest.pt')
        # several processes agree one iteration later, but within an evaluation, which ends then
        stopped_at = step if step % 6 == 0 or step == 20 else step + n - 1
        assert state['iter_num'] == stopped_at
        assert f'stopped at iteration {stopped_at}' in replies[0].output
        replies += ranks.train(*args, f'--out_dir={out_dir}', '--init_from=resume')
        assert not any(r.error for r in replies) and soak.differences(tmp_path / 'whole', out_dir) == []


def test_run_stopped_again_and_again_equals_the_uninterrupted_one(one_rank, char_data, tmp_path):
    args = [*EXACT, f'--data_dir={char_data}', '--init_from=auto']
    one_rank.train(*args, f'--out_dir={tmp_path / "whole"}')
    for step in (2, 1, 5, 1, 1, 0):
        reply, = one_rank.train(*args, f'--out_dir={tmp_path / "out"}', kind='stop', at=step)
        assert reply.error is None
    assert soak.differences(tmp_path / 'whole', tmp_path / 'out') == []


def test_two_signals_at_once_are_one_and_the_run_is_saved(train, tmp_path, at_iteration):
    at_iteration(3, lambda: (stop(), stop()))
    log = train('--max_iters=9')['log']
    assert 'stopped at iteration 4; to go on: the same command with --init_from=auto' in log
    assert list(losses(log)) == [0, 1, 2, 3]
    assert checkpoint.load(tmp_path / 'out/latest.pt')['iter_num'] == 4


def test_signalled_run_exits_with_status_0_and_its_state(char_data, tmp_path):
    process = soak.start([f'--data_dir={char_data}', f'--out_dir={tmp_path}', '--max_iters=100000',
                          '--eval_interval=100000'])
    soak.wait_for(process, 'iter 5:')
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    state, log = checkpoint.load(tmp_path / 'latest.pt'), soak.read_log(tmp_path)
    assert state['iter_num'] == log[-1]['iter'] + 1 and 'SIGINT: stopping' in output


def test_run_told_to_stop_is_saved_though_states_are_not_kept(train, tmp_path, at_iteration):
    train('--max_iters=3', '--checkpoint_interval=0', '--eval_interval=1000')
    assert not (tmp_path / 'out/latest.pt').exists()
    at_iteration(2, stop)
    train('--max_iters=9', '--checkpoint_interval=0', '--eval_interval=1000')
    assert checkpoint.load(tmp_path / 'out/latest.pt')['iter_num'] == 3


# ---------------------------------------------------------------------------- killed

def test_killed_run_loses_nothing(char_data, tmp_path):
    text, lost = soak.kill(tmp_path, char_data, 1)
    assert lost == [] and text.startswith('1 SIGKILLs')


def test_run_killed_between_two_renamings_is_resumed_from_the_state_before(train, tmp_path):
    train('--max_iters=8', '--checkpoint_interval=2')
    (tmp_path / 'out/latest.pt').rename(tmp_path / 'out/latest.pt.elsewhere-7.part')
    (tmp_path / 'out/ckpt.pt').unlink()
    log = train('--max_iters=8', '--init_from=auto')['log']
    assert 'previous.pt' in log and list(losses(log)) == [8]
    assert not list((tmp_path / 'out').glob('*.part'))


def test_hung_process_ends_the_job(char_data, tmp_path):
    timeout, processes = 5, []
    env = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(soak.free_port()),
                        'OMP_NUM_THREADS': '1'}
    for rank in range(2):
        processes.append(subprocess.Popen(
            [sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, '--gradient_accumulation_steps=2',
             f'--data_dir={char_data}', f'--out_dir={tmp_path}', f'--dist_timeout={timeout}',
             '--max_iters=1000000', '--eval_interval=100000'], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, cwd=ROOT, env=env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}))
    try:
        soak.wait_for(processes[0], 'iter 3:')
        processes[1].send_signal(signal.SIGSTOP)
        output = processes[0].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert 'rank 0: another process has died, or has not answered for 5 s (dist_timeout)' in output


# ---------------------------------------------------------------------------- damaged and earlier states

def test_damaged_states_are_set_aside_and_older_ones_taken(char_data, tmp_path):
    text, lost = soak.flip(tmp_path, char_data, 40)
    assert lost == [] and text.startswith('40 damaged folders, 40 seen')


def test_damaged_state_is_told_and_kept_and_the_one_before_is_taken(train, tmp_path):
    train('--max_iters=8', '--checkpoint_interval=2')
    path = tmp_path / 'out/latest.pt'
    damaged = path.read_bytes()[:-1000]
    path.write_bytes(damaged)
    log = train('--max_iters=8', '--init_from=resume', '--checkpoint_interval=2')['log']
    assert re.search(r'latest.pt is not a checkpoint, .*; set aside as .*latest.pt.damaged1\n', log)
    assert re.search(r'resuming from .*previous.pt\n(.*\n)+resuming at iteration 8\n', log)
    assert (tmp_path / 'out/latest.pt.damaged1').read_bytes() == damaged
    told = [e['iter'] for e in soak.read_log(tmp_path / 'out') if 'health' not in e]
    assert told == [0, *range(9), 8]  # 0, 8: evaluations


def test_nothing_but_damaged_states_is_an_error_for_resume_and_a_new_run_for_auto(train, tmp_path):
    train('--max_iters=2')
    files = [tmp_path / 'out' / name for name in ('latest.pt', 'ckpt.pt')]
    for path in files:
        path.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='latest.pt is not a checkpoint'):
        train('--init_from=resume')
    assert all(path.read_bytes() == b'damaged' for path in files)
    log = train('--init_from=auto', '--max_iters=2')['log']
    assert log.count('set aside as') == 2 and list(losses(log)) == [0, 1, 2]
    assert all(path.with_name(f'{path.name}.damaged1').read_bytes() == b'damaged' for path in files)


def test_auto_is_a_new_run_where_there_is_nothing(train, tmp_path):
    log = train('--init_from=auto', '--max_iters=2')['log']
    assert list(losses(log)) == [0, 1, 2] and 'resuming' not in log
    assert 'resuming at iteration 3' in train('--init_from=auto', '--max_iters=4')['log']


def test_new_run_moves_the_earlier_one_aside(train, tmp_path):
    train('--max_iters=2')
    old = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    log = train('--max_iters=3', '--seed=1')['log']
    assert f'out holds an earlier run: its checkpoints are in {tmp_path / "out/earlier"} now' in log
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out/earlier').iterdir()} == old
    assert checkpoint.load(tmp_path / 'out/latest.pt')['iter_num'] == 4
    log = train('--max_iters=5', '--init_from=resume')['log']
    assert 'holds an earlier run' not in log
    assert {p.name for p in (tmp_path / 'out/earlier').iterdir()} == set(old)


def test_state_further_than_latest_is_resumed(train, tmp_path, at_iteration):
    """Evaluated more often than states are kept, then killed."""
    def killed():
        raise KeyboardInterrupt

    at_iteration(7, killed)
    with pytest.raises(KeyboardInterrupt):
        train('--max_iters=9', '--eval_interval=3', '--checkpoint_interval=4')
    log = train('--max_iters=9', '--eval_interval=3', '--checkpoint_interval=4', '--init_from=resume')['log']
    assert 'resuming at iteration 6' in log


def test_small_ckpt_is_a_third_and_the_run_still_resumed(train, tmp_path):
    args = ('--eval_interval=2', '--checkpoint_interval=2', '--n_embd=128')
    train('--max_iters=4', *args, '--ckpt_with_optimizer=False')
    sizes = {p.name: p.stat().st_size for p in (tmp_path / 'out').glob('*.pt')}
    assert 0.32 < sizes['ckpt.pt'] / sizes['latest.pt'] < 0.36
    small = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert 'optimizer' not in small and small['iter_num'] == 4
    assert list(losses(train('--max_iters=6', *args, '--init_from=resume')['log'])) == [5, 6]
    train('--max_iters=4', *args, '--ckpt_with_optimizer=False')
    for name in ('latest.pt', 'previous.pt'):
        (tmp_path / 'out' / name).unlink()
    with pytest.raises(FileNotFoundError, match='nothing to resume: .*no optimizer state'):
        train('--init_from=resume')


# ---------------------------------------------------------------------------- other data

def test_changed_data_is_refused_unless_allowed(train, char_data, tmp_path):
    data = shutil.copytree(char_data, tmp_path / 'data')
    (data / 'dataset.json').unlink()
    train('--max_iters=2', data_dir=data)
    for split in ('train', 'val'):
        tokens = np.fromfile(data / f'{split}.bin', np.uint16)
        tokens[-1] = (tokens[-1] + 1) % 2
        tokens.tofile(data / f'{split}.bin')
        with pytest.raises(ValueError, match='is not the data .* add --allow_changed_data=True'):
            train('--max_iters=4', '--init_from=resume', data_dir=data)
        assert evaluations(train('--eval_only', '--init_from=resume', data_dir=data)['log'])
        log = train('--max_iters=4', '--init_from=resume', '--allow_changed_data=True', data_dir=data)['log']
        assert 'resuming at iteration' in log
        train('--max_iters=2', data_dir=data)  # the next split's turn


def test_same_data_elsewhere_is_the_same_data(train, char_data, tmp_path):
    train('--max_iters=2')
    data = shutil.copytree(char_data, tmp_path / 'moved')
    assert list(losses(train('--max_iters=3', '--init_from=resume', data_dir=data)['log'])) == [3]


# ---------------------------------------------------------------------------- a full disk

@pytest.fixture
def full_disk(monkeypatch):
    """Lets some saves fail halfway, by the file's name and the iteration."""
    def arrange(*failing):
        real = torch.save

        def save(state, path):
            real(state, path)
            if (''.join(re.match(r'(\w+)(\.pt)', Path(path).name).groups()), state['iter_num']) in failing:
                os.truncate(path, 1000)
                raise OSError(28, 'No space left on device')
        monkeypatch.setattr(torch, 'save', save)
    return arrange


def test_run_goes_on_where_the_disk_is_full_and_saves_later(train, tmp_path, full_disk):
    full_disk(('latest.pt', 4), ('latest.pt', 6), ('ckpt.pt', 6))
    args = ('--max_iters=8', '--checkpoint_interval=2', '--eval_interval=3')
    script = train(*args)
    told = re.findall(r'^NOT SAVED: .*?(\w+.pt) could not be written: it needs [\d.]+ MB, [\d,.]+ MB are '
                      r'free \(\[Errno 28\] No space left on device\)\. The run goes on', script['log'], re.M)
    assert told == ['latest.pt', 'ckpt.pt', 'latest.pt'] and list(losses(script['log'])) == [*range(9)]
    states = {p.name: checkpoint.load(p)['iter_num'] for p in (tmp_path / 'out').glob('*.pt*')}
    assert states == {'latest.pt': 9, 'previous.pt': 8, 'ckpt.pt': 8}


def test_run_told_to_stop_on_a_full_disk_does_not_end_well(train, tmp_path, full_disk, at_iteration):
    full_disk(('latest.pt', 5))
    at_iteration(4, stop)
    with pytest.raises(SystemExit, match='iteration 5 is lost.* good state is that of iteration 4,'):
        train('--max_iters=9', '--checkpoint_interval=2')
    assert checkpoint.load(tmp_path / 'out/latest.pt')['iter_num'] == 4


def test_message_of_the_last_good_state_counts_no_failed_save(train, tmp_path, full_disk, at_iteration,
                                                              monkeypatch):
    import model
    full_disk(('latest.pt', 4))
    forward = model.GPT.forward

    def spoil():
        monkeypatch.setattr(model.GPT, 'forward', lambda *args, **kwargs: (
            None, forward(*args, **kwargs)[1] * float('nan')))

    at_iteration(4, spoil)
    with pytest.raises(FloatingPointError, match=r'^iteration 5: .*good state is that of iteration 2,'):
        train('--max_iters=8', '--checkpoint_interval=2')
    assert checkpoint.load(tmp_path / 'out/latest.pt')['iter_num'] == 2


@pytest.mark.parametrize('fails', [True, False])
def test_best_model_is_never_replaced_by_a_worse_one(fails, train, tmp_path, monkeypatch, full_disk):
    """Validation losses by iteration; the save of 2, the best, may fail: then 4, the next best, is kept."""
    by_iteration, asked = {0: 9.0, 1: 5.0, 2: 1.0, 3: 6.0, 4: 4.0, 5: 4.5, 6: 4.0}, []
    if fails:
        full_disk(('ckpt.pt', 2))

    def sum_of(run, loss_sum, n_targets):
        if isinstance(loss_sum, int):  # no sum of losses, but counts for bits per byte
            return [loss_sum, n_targets]
        asked.append(1)
        iteration, is_val = divmod(len(asked) - 1, 2)
        return [by_iteration[iteration] if is_val else 7.0, 1]

    from support.machine import runtime
    monkeypatch.setattr(runtime.Runtime, 'sum', sum_of)
    train('--max_iters=6', '--eval_interval=1', '--always_save_checkpoint=False')
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert (state['iter_num'], state['best_val_loss']) == ((4, 4.0) if fails else (2, 1.0))


# ---------------------------------------------------------------------------- numbers that aren't finite

@pytest.mark.parametrize('kind, at, interval, value', [
    ('loss', 1, 1, 'nan'), ('loss', 4, 10, 'inf'), ('gradient', 4, 1, '-inf'), ('gradient', 13, 10, 'nan'),
    ('sum', 4, 10, 'nan'), ('weight', 3, 1, 'nan'), ('weight', 9, 10, 'inf'), ('moment', 3, 1, 'nan'),
    ('moment', 9, 10, 'inf'),
    ('gradient', 31, 7, 'nan'),  # in the last iteration, which is not logged
])
@pytest.mark.parametrize('n', [1, 2])
def test_number_that_is_not_finite_stops_the_run_before_an_update(n, kind, at, interval, value, request,
                                                                  char_data, tmp_path):
    ranks = request.getfixturevalue('one_rank' if n == 1 else 'two_ranks')
    rank = n - 1 if kind in ('loss', 'sum') else None  # else on all
    replies = ranks.train(
        f'--data_dir={char_data}', '--max_iters=30', '--checkpoint_interval=3', '--eval_interval=9',
        f'--gradient_accumulation_steps={n}', f'--log_interval={interval}', '--dist_timeout=20',
        f'--out_dir={tmp_path}', kind=kind, at=at, value=value, rank_of=rank)
    assert all(r.error for r in replies)
    error, latest = replies[0].error, tmp_path / 'latest.pt'
    assert error.startswith('FloatingPointError: iteration ') and '\n' not in error
    bad = at if kind in ('weight', 'moment') else at - 1
    if kind != 'moment':  # which shows only in the weights, one iteration later
        assert error.startswith(f'FloatingPointError: iteration {bad}: ')
    if bad < at:
        assert all(r.finite for r in replies)
    saved = checkpoint.load(latest)['iter_num'] if latest.exists() else None
    assert saved is None or saved <= bad
    assert (f'The last good state is that of iteration {saved}, in {tmp_path}' if saved else
            'No state was saved before') in error
    assert all(math.isfinite(x) for entry in soak.read_log(tmp_path) if 'health' not in entry
               for x in entry.values())
    for path in tmp_path.glob('*.pt'):
        assert all(x.isfinite().all() for x in soak.numbers_of(checkpoint.load(path)))


def test_not_finite_is_one_line_for_the_user(run_script, char_data, tmp_path):
    done = run_script('train.py', *TINY_ARGS, '--learning_rate=1e38', '--decay_lr=False', '--warmup_iters=0',
                      f'--data_dir={char_data}', f'--out_dir={tmp_path}', '--max_iters=50', '--grad_clip=0',
                      ok=False)
    assert re.match(r'FloatingPointError: iteration \d+: the loss or the gradient is not finite; no update '
                    r'was made with it. No state was saved before. A lower learning_rate', done.stderr)
    assert done.stderr.count('\n') == 1


# ---------------------------------------------------------------------------- log, wandb

def test_log_of_a_resumed_run_has_each_step_once(train, tmp_path):
    args = ('--checkpoint_interval=4', '--eval_interval=1000')
    train('--max_iters=6', *args)
    last = (tmp_path / 'out/log.jsonl').read_bytes().splitlines()[-1]
    with open(tmp_path / 'out/log.jsonl', 'ab') as file:
        file.write(last[:30])  # as a killed process leaves it
    (tmp_path / 'out/latest.pt').unlink()
    (tmp_path / 'out/ckpt.pt').unlink()
    train('--max_iters=9', *args, '--init_from=resume')
    entries = soak.read_log(tmp_path / 'out')
    assert [e['iter'] for e in entries if 'loss' in e] == [*range(10)]
    assert [e['iter'] for e in entries if 'val_loss' in e] == [0, 9]
    assert set(json.loads(last)) == {'iter', 'loss', 'lr', 'grad_norm', 'clipped', 'seconds',
                                     'tokens', 'ms', 'tokens_per_s', 'mfu'}


def test_training_time_goes_on_in_a_resumed_run(train, tmp_path):
    train('--max_iters=3')
    path = tmp_path / 'out/latest.pt'
    state = checkpoint.load(path)
    assert 0 < state['seconds'] < 60
    checkpoint.save(path, state | {'seconds': 1000.0})
    train('--max_iters=5', '--init_from=resume')
    last = (tmp_path / 'out/log.jsonl').read_text().splitlines()[-1]
    assert 1000 < json.loads(last)['seconds'] < 1060


WANDB = """
import json, os
def init(**settings): record(settings)
def log(values): record(values)
def finish(): record('finish')
def record(what): print(json.dumps(what), file=open(os.environ['RECORD'], 'a'))
"""


def test_resumed_run_continues_its_own_wandb_run(train, tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
    for args in (['--max_iters=2'], ['--max_iters=4', '--init_from=resume'],
                 ['--max_iters=6', '--init_from=auto'], ['--max_iters=2'], ['--max_iters=3', '--eval_only'],
                 ['--max_iters=3', '--dry_run']):
        train(*args, '--wandb_log', '--eval_interval=2')
    sys.modules.pop('wandb')
    records = [json.loads(line) for line in (tmp_path / 'record').read_text().splitlines()]
    inits = [r for r in records if 'project' in r]
    ids = [r['id'] for r in inits]
    assert len(ids) == 4 and ids[0] == ids[1] == ids[2] != ids[3] and records.count('finish') == 4
    assert all(r['resume'] == 'allow' and r['project'] == 'owt' and r['name'] == 'gpt2' for r in inits)
    assert [r['iter'] for r in records if 'val/loss' in r] == [0, 2, 4, 6, 0, 2]
    assert [r['iter'] for r in records if 'loss' in r] == [*range(7), *range(3)]


def test_processes_that_start_at_different_times_find_the_same_state(two_ranks, char_data, tmp_path):
    """The first one decides, before it moves or sets aside anything."""
    args = (f'--data_dir={char_data}', f'--out_dir={tmp_path}', '--gradient_accumulation_steps=2',
            '--checkpoint_interval=2')
    two_ranks.train(*args, '--max_iters=4')
    (tmp_path / 'latest.pt').write_bytes(b'damaged')
    (tmp_path / 'ckpt.pt').unlink()
    replies = two_ranks.train(*args, '--max_iters=6', '--init_from=auto')
    assert [r.error for r in replies] == [None, None] and 'resuming at iteration 4' in replies[0].output
    assert checkpoint.load(tmp_path / 'latest.pt')['iter_num'] == 7
    assert (tmp_path / 'latest.pt.damaged1').read_bytes() == b'damaged'


def test_two_processes_of_two_micro_steps_on_conversations_equal_one_of_one(one_rank, two_ranks, tmp_path):
    """Where micro-batches have different numbers of targets."""
    args = (*ANSWERS, '--dropout=0.0', f'--data_dir={write_conversations(tmp_path / "data")}')
    whole = ('--gradient_accumulation_steps=1', '--batch_size=8')
    replies = one_rank.train(*args, *whole, f'--out_dir={tmp_path / "one"}')
    replies += two_ranks.train(*args, f'--out_dir={tmp_path / "two"}')
    assert [r.error for r in replies] == [None] * 3
    one, two = (checkpoint.load(tmp_path / name / 'latest.pt') for name in ('one', 'two'))
    assert one['best_val_loss'] == pytest.approx(two['best_val_loss'], abs=1e-6)
    for name, tensor in one['model'].items():
        torch.testing.assert_close(tensor, two['model'][name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- a second run, odd folders

def test_two_runs_in_one_folder_are_never_mixed(char_data, tmp_path):
    text, lost = soak.pairs(tmp_path, char_data, 1)
    assert lost == [], text


def test_second_run_is_refused_and_the_first_one_s_files_stay(char_data, tmp_path):
    out_dir = tmp_path / 'out'
    args = [f'--data_dir={char_data}', '--max_iters=100000', '--eval_interval=10000']
    first = soak.start([*args, f'--out_dir={out_dir}'])
    try:
        soak.wait_for(first, 'iter 3:')
        for more in ((), ('--init_from=auto',), ('--init_from=resume',)):
            second = soak.start([*args, f'--out_dir={out_dir}', *more])
            assert f'is in use by another run, process {first.pid} on ' in second.communicate()[0]
            assert second.returncode == 1 and first.poll() is None
        free = soak.start([*args, f'--out_dir={out_dir}', '--eval_only', '--eval_iters=1'])
        assert free.communicate()[0] and free.returncode == 0
    finally:
        first.kill()
        first.communicate()
    assert (out_dir / 'run.lock').exists() and not (out_dir / 'earlier').exists()
    process = soak.start([f'--data_dir={char_data}', '--max_iters=2', f'--out_dir={out_dir}'])
    assert 'iter 2' in process.communicate()[0] and not (out_dir / 'run.lock').exists()


@pytest.mark.parametrize('place', ['file', 'file/below', 'x' * 300, '/proc/nowhere', 'folder'])
def test_folder_that_cannot_be_written_to_is_one_line(place, train, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'folder/log.jsonl').mkdir(parents=True)
    with pytest.raises(ValueError, match='can.t be written to|is a folder, where') as error:
        train('--max_iters=2', out_dir=tmp_path / place)
    assert '\n' not in str(error.value)


def test_killed_move_of_an_earlier_run_loses_nothing(tmp_path):
    assert soak.kill_move(tmp_path, None, 2)[1] == []


def test_output_that_cannot_be_written_ends_no_run(char_data, tmp_path):
    assert soak.output(tmp_path, char_data, 4)[1] == []


def test_hostile_checkpoints_are_refused_in_one_line_soon(char_data, tmp_path):
    text, lost = soak.checkpoints(tmp_path, char_data, 4)
    assert lost == [], text


def test_hostile_folders_are_refused_in_one_line_soon(bpe, tmp_path):
    text, lost = soak.folders(tmp_path, None, 2)
    assert lost == [], text


# ---------------------------------------------------------------------------- told to stop in an evaluation

@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_evaluation_is_broken_off_on_all_processes_and_the_run_stays_exact(n, parallel, request, char_data,
                                                                           tmp_path):
    ranks = request.getfixturevalue('one_rank' if n == 1 else 'two_ranks')
    args = [f'--data_dir={char_data}', '--max_iters=8', '--eval_interval=4', '--eval_iters=40',
            '--sample_interval=4', f'--gradient_accumulation_steps={n}', f'--parallel={parallel}']
    assert [r.error for r in ranks.train(*args, f'--out_dir={tmp_path / "whole"}')] == [None] * n
    in_each = 80 // n + (n == 1 or parallel == 'fsdp')  # forward passes of an evaluation, and the measurement
    replies = ranks.train(*args, f'--out_dir={tmp_path / "out"}', kind='evaluation', rank_of=n - 1,
                          at=in_each + 30)
    assert [r.error for r in replies] == [None] * n
    assert 'stopped at iteration ' in replies[0].output and 'step 8' not in replies[0].output
    replies = ranks.train(*args, f'--out_dir={tmp_path / "out"}', '--init_from=auto')
    assert [r.error for r in replies] == [None] * n
    assert soak.differences(tmp_path / 'whole', tmp_path / 'out') == []


def test_sample_and_measurement_are_broken_off(train, tmp_path, monkeypatch):
    from support.sampling import decoding
    from support.training import diagnostics
    from support.training import log as runlog
    real, tokens = decoding.stream, []

    def stream(*args, **kwargs):
        for token in real(*args, **kwargs):
            tokens.append(token)
            if len(tokens) == 3:
                stop()
            yield token

    monkeypatch.setattr(runlog.decoding, 'stream', stream)
    log = train('--max_iters=9', '--sample_interval=4', '--eval_interval=1000', '--block_size=32')['log']
    assert len(tokens) == 3 and 'stopped at iteration 0' in log
    monkeypatch.setattr(runlog.decoding, 'stream', real)
    mean_square, blocks = diagnostics.mean_square, []

    def look(y):
        blocks.append(1)
        if len(blocks) == 3:  # the first block of the second measurement
            stop()
        return mean_square(y)

    monkeypatch.setattr(diagnostics, 'mean_square', look)
    log = train('--max_iters=9', '--eval_interval=4', out_dir=tmp_path / 'b')['log']
    assert len(blocks) == 3 and 'stopped at iteration 4' in log
    assert checkpoint.load(tmp_path / 'b/latest.pt')['iter_num'] == 4


# ---------------------------------------------------------------------------- processes that differ

def test_processes_with_other_settings_or_data_are_refused(char_data, tmp_path):
    other = shutil.copytree(char_data, tmp_path / 'data')
    (other / 'dataset.json').unlink()
    tokens = np.fromfile(other / 'train.bin', np.uint16)
    tokens[7] = (tokens[7] + 1) % 2
    tokens.tofile(other / 'train.bin')
    for more, told in (('--learning_rate=0.5', 'learning_rate=0.5 instead of 0.001'),
                       (f'--data_dir={other}', 'SHA-256 of train=')):
        env = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'OMP_NUM_THREADS': '1',
                            'MASTER_PORT': str(soak.free_port())}
        processes = [subprocess.Popen(
            [sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, '--gradient_accumulation_steps=2',
             f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}', *([more] if rank else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(2)]
        for process in processes:
            error = process.communicate(timeout=60)[1]
            assert f'rank 1 was started otherwise than rank 0: {told}' in error
            assert process.returncode == 1
    assert not (tmp_path / 'out').exists()


def test_no_best_loss_in_a_checkpoint_is_none(train, tmp_path):
    train('--max_iters=2')
    path = tmp_path / 'out/latest.pt'
    checkpoint.save(path, checkpoint.load(path) | {'best_val_loss': float('nan')})
    train('--max_iters=4', '--init_from=resume', '--always_save_checkpoint=False', '--eval_interval=4')
    assert math.isfinite(checkpoint.load(tmp_path / 'out/ckpt.pt')['best_val_loss'])
