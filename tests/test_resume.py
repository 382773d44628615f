"""train.py under faults: stopped, killed, its data or disk failing, its numbers not finite."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS, losses
from runs import at_line, differences, fault, free_port, logged, read_log

from support.errors import USER_ERRORS
from support.training.state import State

resource = pytest.importorskip('resource', reason='POSIX signals and limits')
RUN = ('--max_iters=8', '--eval_interval=3', '--sample_interval=4', '--checkpoint_interval=2',
       '--learning_rate=1e-2', '--lr_decay_iters=8', '--always_save_checkpoint=False')
OPTIONS = {
    'adamw': '--dropout=0.2 --gradient_accumulation_steps=2',
    'muon': '--optimizer=muon --qk_norm --pos_emb=rope --sampler=epoch --gradient_accumulation_steps=3 '
            '--batch_ramp_iters=6 --tie_weights=False --embedding_lr=0.02 --lr_schedule=wsd',
}
PLACES = {  # where a SIGTERM comes: after a line, at once or later
    'in the first evaluation': ('^step 0', 'stop'),
    'in an iteration': ('^iter 3:', 'stop in training'),
    'in an evaluation': ('^iter 5:', 'stop in evaluation'),
    'after a sample': ('^sample at iteration 4', 'stop'),
    'in the last iteration': ('^iter 7:', 'stop in training'),
}
CASES = [('adamw', place) for place in PLACES] + [('muon', 'in an evaluation'), ('muon', 'in an iteration')]


@pytest.fixture(scope='module')
def finished():
    """{name of an option: the folder of a run that was never stopped}"""
    return {}


@pytest.fixture
def whole(finished, train, tmp_path_factory):
    """A function that gives an option's arguments and the folder of its whole run."""
    def of(name):
        args = (*RUN, *OPTIONS[name].split())
        if name not in finished:
            folder = tmp_path_factory.mktemp(name)
            train(*args, out_dir=folder)
            finished[name] = folder
        return args, finished[name]
    return of


@pytest.mark.parametrize('name, place', CASES)
def test_run_stopped_anywhere_goes_on_bit_for_bit(name, place, train, whole, tmp_path):
    args, folder = whole(name)
    with fault(*PLACES[place]):
        log = train(*args)['log']
    is_last = place == 'in the last iteration'
    assert ('stopped at iteration' in log and 'iter 8:' not in log) or is_last
    train(*args, '--init_from=auto')
    assert differences(folder, tmp_path / 'out') == differences(folder, tmp_path / 'out', 'ckpt.pt') == []


def start(*args, env=None):
    """train.py as a user starts it, its output piped."""
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, *args], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | (env or {}))


def wait_for(process, line):
    """What a process prints up to a line."""
    found = ''
    while not re.search(line, found, re.M):
        found += process.stdout.readline() or pytest.fail(f'no {line} in {found}')
    return found


def test_ctrl_c_ends_a_run_with_status_0_and_its_state_and_a_kill_loses_little(char_data, train, whole,
                                                                               tmp_path):
    args, folder = whole('adamw')
    args = (*args, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}', '--init_from=auto')
    process = start(*args)
    wait_for(process, '^iter 2:')
    for _ in range(2):  # as terminals and launchers send it; at once, they count as one
        process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and 'stopping' in output.lower(), output
    assert State.load(tmp_path / 'out/latest.pt').iter_num == read_log(tmp_path / 'out')[-1]['iter'] + 1
    process = start(*args)
    wait_for(process, '^iter 5:')
    process.kill()
    process.communicate()
    (tmp_path / 'out/latest.pt.left-7.part').write_bytes(b'half')
    log = train(*args)['log']
    assert 'resuming at iteration' in log and not list((tmp_path / 'out').glob('*.part'))
    assert differences(folder, tmp_path / 'out') == []


def test_times_tokens_and_patience_go_on_in_a_resumed_run(train, tmp_path):
    args = ('--max_iters=9', '--eval_interval=2', '--patience=3', '--learning_rate=0', '--min_lr=0')
    with fault('^iter 4:', 'stop'):
        train(*args)
    before = State.load(tmp_path / 'out/latest.pt')
    assert 0 < before.seconds < 60 and before.n_tokens == 5 * 64 and before.best_iter == 0
    before.seconds = 1000.0
    before.save(tmp_path / 'out/latest.pt')
    log = train(*args, '--init_from=auto', '--batch_size=2')['log']
    assert list(losses(log)) == [5] and 'no better validation loss in 3 evaluations' in log
    last = json.loads((tmp_path / 'out/log.jsonl').read_text().splitlines()[-2])
    assert 1000 < last['seconds'] < 1060 and last['tokens'] == 5 * 64 + 32


def overwrite(path, what):
    """Change a token file in one of the ways in which people do."""
    tokens = np.fromfile(path, np.uint16)
    if what == 'cut':
        os.truncate(path, 100)
    elif what == 'removed':
        path.unlink()
    elif what == 'replaced':
        tokens.tofile(path.with_suffix('.new'))
        path.with_suffix('.new').rename(path)
    elif what == 'longer':
        with open(path, 'ab') as file:
            file.write(b'\0\0')
    else:
        with open(path, 'r+b') as file:
            (np.full_like(tokens, 60000) if what == 'other ids' else tokens[::-1]).tofile(file)
        os.utime(path, (1, 1))


@pytest.mark.parametrize('name, what', [(n, w) for n in ('train', 'val') for w in (
    'cut', 'removed', 'replaced', 'longer', 'other ids', 'other text')])
def test_data_that_change_under_a_run_end_it_with_its_state(name, what, train, char_data, whole, tmp_path):
    args, _ = whole('adamw')
    data = shutil.copytree(char_data, tmp_path / 'data')
    with at_line('^iter 3:', lambda: overwrite(data / f'{name}.bin', what)), \
            pytest.raises(USER_ERRORS, match=f'{name}.bin') as error:
        train(*args, data_dir=data)
    assert '\n' not in str(error.value)
    saved = State.load(tmp_path / 'out/latest.pt').iter_num
    assert 4 <= saved <= 6 and list(logged(tmp_path / 'out'))[-1] == saved - 1


def limit_files(n_bytes):
    """Files of this process can't grow beyond this size, as on a full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes or most, most))


@pytest.fixture(autouse=True)
def roomy_again():
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    limit_files(None)
    signal.signal(signal.SIGXFSZ, before)


def test_run_goes_on_where_the_disk_is_full_and_saves_later(train, whole, tmp_path):
    args, folder = whole('adamw')
    with at_line('^iter 3:', lambda: limit_files(20_000)), at_line('^iter 4:', lambda: limit_files(None)):
        log = train(*args)['log']
    told = re.findall(r'^NOT SAVED: .*/(\w+.pt) could not be written: it needs [\d.]+ MB', log, re.M)
    assert told == ['latest.pt'] and differences(folder, tmp_path / 'out') == []
    assert not list((tmp_path / 'out').glob('*.part'))


def test_run_that_cannot_save_its_last_state_does_not_end_well(train, tmp_path):
    with at_line('^iter 4:', lambda: limit_files(20_000)), fault('^iter 4:', 'stop'), \
            pytest.raises(OSError, match='iteration 5 is lost.* good state is that of iteration 4,'):
        train('--max_iters=9', '--checkpoint_interval=2')
    limit_files(None)
    assert State.load(tmp_path / 'out/latest.pt').iter_num == 4


def test_best_model_that_could_not_be_saved_is_not_counted_as_kept(train, tmp_path):
    with at_line('^step 2:', lambda: limit_files(20_000)), at_line('^iter 2:', lambda: limit_files(None)):
        train('--max_iters=2', '--eval_interval=2', '--always_save_checkpoint=False')
    val_loss = logged(tmp_path / 'out', 'val_loss')
    state = State.load(tmp_path / 'out/latest.pt')
    assert state.best_val_loss == val_loss[0] > val_loss[2] and not (tmp_path / 'out/ckpt.pt').exists()


@pytest.mark.parametrize('kind, line, interval, value', [
    ('loss', '^step 0', 1, 'nan'), ('gradient', '^sample at .* 5', 10, 'nan'),
    ('weight', '^sample at .* 5', 10, 'inf'), ('moment', '^sample at .* 5', 10, 'inf'),
])
def test_number_that_is_not_finite_ends_the_run_and_is_never_saved(kind, line, interval, value, train,
                                                                   tmp_path):
    with fault(line, kind, float(value)), pytest.raises(FloatingPointError) as error:
        train('--max_iters=8', '--checkpoint_interval=3', '--eval_interval=8', '--sample_interval=5',
              f'--log_interval={interval}')
    found = re.match(r'iteration (\d+): .*(No state was saved before|The last good state is that of '
                     rf'iteration (\d+), in {tmp_path / "out"})', str(error.value))
    assert found and '\n' not in str(error.value)
    bad = int(line[-1])
    assert bad <= int(found[1]) <= bad + 1
    saved = sorted(tmp_path.glob('out/*.pt'))
    assert (found[3] is not None) == (bad > 3) == bool(saved)
    for path in saved:
        state = torch.load(path)
        tensors = [*state['model'].values(), *(t for s in state['optimizer']['state'].values()
                                               for t in s.values())]
        assert all(t.isfinite().all() for t in tensors) and state['iter_num'] <= bad


def test_broken_wandb_leaves_the_run_whole(train, tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text('def init(**_): pass\ndef log(_): raise OSError("no network")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    log = train('--max_iters=3', '--eval_interval=1', '--wandb_log')['log']
    sys.modules.pop('wandb')
    assert len(losses(log)) == 4 and log.count('wandb is off') == 1


def test_hung_process_ends_the_job(char_data, tmp_path):
    port = free_port()
    processes = [start(f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}', '--dist_timeout=4',
                       '--gradient_accumulation_steps=2', '--max_iters=1000000', '--eval_interval=100000',
                       env={'WORLD_SIZE': '2', 'RANK': str(rank), 'LOCAL_RANK': str(rank),
                            'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}) for rank in range(2)]
    try:
        wait_for(processes[0], '^iter 3:')
        processes[1].send_signal(signal.SIGSTOP)
        output = processes[0].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert 'rank 0: another process has died, or has not answered for 4 s (dist_timeout)' in output
