"""log.py: each step is logged once, whatever happens to the process, the disk, wandb or the picture."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_ARGS, losses, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import at_line, logged

from support.machine import console
from support.machine.console import keep_line, print0
from support.machine.runtime import Runtime
from support.text.dataset import Dataset
from support.training.log import Drawing, Meter, Progress, RunLog, sample_text

CPU = Runtime('cpu', 'float32', False, 'gloo')
SETTINGS = {'wandb_project': 'p', 'wandb_run_name': 'n', 'wandb_log': False, 'plot': False, 'max_iters': 100}
LINE = {'iter': 10, 'loss': 1.23456, 'ms': 12.345, 'mfu': 34.567, 'lr': 6e-4, 'grad_norm': 0.987,
        'tokens_per_s': 1234.5}


def entries(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def new_log(folder, first_iter=0, **changed):
    return RunLog(SETTINGS | {'out_dir': str(folder)} | changed, CPU, first_iter, 'abcd')


def write(folder, iterations, first_iter=0):
    log = new_log(folder, first_iter)
    for i in iterations:
        log.write({'iter': i, 'loss': i / 3})
    log.close(patience=0)


# ---------------------------------------------------------------------------- the file

def test_line_is_in_the_file_as_soon_as_it_is_written_with_all_digits(tmp_path):
    log, entry = new_log(tmp_path / 'new folder'), {'iter': 3, 'loss': 2.718281828459045, 'lr': 6e-4}
    log.iteration(LINE | entry | {'mfu': float('nan'), 'grad_norm': float('inf')})  # which JSON lacks
    assert entries(tmp_path / 'new folder') == [
        {k: v for k, v in (LINE | entry).items() if k not in ('mfu', 'grad_norm')}]


@pytest.mark.parametrize('before, after, first_iter, expected', [
    ([0, 1, 2, 2, 3, 4], [3, 4, 5], 3, [0, 1, 2, 2, 3, 4, 5]),  # an evaluation and an iteration at 2
    ([0, 1, 2], [0], 0, [0]), ([], [7, 8], 7, [7, 8])])
def test_resumed_run_has_each_step_once_and_a_new_one_an_empty_log(before, after, first_iter, expected,
                                                                   tmp_path):
    write(tmp_path, before)
    write(tmp_path, after, first_iter)
    assert [e['iter'] for e in entries(tmp_path)] == expected
    assert [p.name for p in tmp_path.iterdir()] == ['log.jsonl']


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.binary(max_size=30) | st.sampled_from([
    b'1]', b'"step": 1}', b'"iter": "1"}', b'"iter": null}', b'"iter": 1e400}', b'\0\0\0', b'\xff']))
def test_what_a_killed_process_left_of_a_line_is_dropped(tmp_path_factory, cut, garbage):
    folder = tmp_path_factory.mktemp('log')
    write(folder, range(5))
    whole = (folder / 'log.jsonl').read_bytes()[:cut]
    (folder / 'log.jsonl').write_bytes(whole + b'{' + garbage.replace(b'\n', b'') + b'\n[1]\nnull\n3\n')
    write(folder, [5, 6], first_iter=5)
    assert [e['iter'] for e in entries(folder)] == [*range(whole.count(b'\n')), 5, 6]


@pytest.mark.parametrize('room', [0, 1, 17, 26, 40])
def test_lines_wait_for_a_full_disk_and_are_complete_afterwards(room, tmp_path, capsys):
    resource = pytest.importorskip('resource')
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = new_log(tmp_path)
    try:
        for i, limit in enumerate([room, room, room, most, room, most]):  # the file can't grow beyond it
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            log.write({'iter': i, 'loss': 0.5})
            if limit == most:
                assert [e['iter'] for e in entries(tmp_path)] == [*range(i + 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert 1 <= capsys.readouterr().out.count('log.jsonl could not be written (File too large)') <= 2
    log.close(patience=0)


def test_last_block_has_the_best_evaluation_of_the_whole_run(tmp_path):
    log = new_log(tmp_path)
    for i, loss in enumerate((3.0, 2.0, 2.5)):
        log.evaluation({'iter': i, 'train_loss': 1.0, 'val_loss': loss, 'val_bits_per_byte': 2 * loss})
    log.close(patience=0)
    resumed = new_log(tmp_path, first_iter=3)
    resumed.evaluation({'iter': 3, 'train_loss': 1.0, 'val_loss': 2.2})
    resumed.close(patience=0)
    assert resumed.summary({'seconds': 0.12345678, 'tokens': 5, 'memory': None}).splitlines() == [
        'best_val_loss: 2.0', 'best_iter: 1', 'best_val_bits_per_byte: 4.0', 'seconds: 0.123457', 'tokens: 5']
    (tmp_path / 'log.jsonl').write_text('garbage val_loss\n{"iter": 1}\n')
    assert resumed.summary({'tokens': 5}) == 'tokens: 5'


# ---------------------------------------------------------------------------- wandb

def test_wandb_gets_each_line_and_a_number_for_each_layer(monkeypatch, tmp_path):
    calls = []
    service = SimpleNamespace(init=lambda **k: calls.append(k), log=calls.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, 'wandb', service)
    log = new_log(tmp_path, wandb_log=True)
    log.write({'iter': 5, 'train_loss': 2.0, 'val_loss': 3.0, 'lr': 0.1, 'mfu': 12.5})
    health = {'update_ratio': torch.tensor([0.25, 0.5])}
    log.write_later(5, health)
    health['attention_logit'] = torch.tensor([3.0, 4.0])
    log.write({'iter': 5, 'loss': 2.5})
    assert (calls[0]['project'], calls[0]['name'], calls[0]['id']) == ('p', 'n', 'abcd')
    assert calls[1:] == [
        {'iter': 5, 'train/loss': 2.0, 'val/loss': 3.0, 'lr': 0.1, 'mfu': 12.5},
        {'iter': 5, 'health/update_ratio/0': 0.25, 'health/update_ratio/1': 0.5,
         'health/attention_logit/0': 3.0, 'health/attention_logit/1': 4.0},
        {'iter': 5, 'loss': 2.5}]
    assert entries(tmp_path)[1:] == [
        {'iter': 5, 'health': {'update_ratio': [0.25, 0.5], 'attention_logit': [3.0, 4.0]}}, calls[-1]]


def wandb_history(path):
    """The dicts that were logged, from wandb's file: records in LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2
    data, at, record = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        length, kind = struct.unpack('<HB', data[at + 4:at + 7])
        record = (record if kind in (3, 4) else b'') + data[at + 7:at + 7 + length]  # 1: whole, 2: first
        at += 7 + length
        at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            if found.WhichOneof('record_type') == 'history':
                yield {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in found.history.item}


@pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='wandb is not installed')
def test_wandb_s_own_file_holds_the_whole_run(run_script, char_data, tmp_path):
    run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}',
               '--max_iters=4', '--eval_interval=2', '--sample_interval=4', '--wandb_log',
               env={'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true'})
    path, = tmp_path.glob('wandb/offline-run-*/*.wandb')
    history = list(wandb_history(path))
    assert [e['iter'] for e in history if 'val/loss' in e] == [0, 2, 4]
    assert [e['iter'] for e in history if 'health/update_ratio/1' in e] == [0, 2, 4]
    lines = [e for e in entries(tmp_path / 'out') if 'loss' in e]
    assert [{k: e[k] for k in lines[0]} for e in history if 'loss' in e] == lines and len(lines) == 5
    tables = [json.loads(p.read_text())
              for p in path.parent.glob('files/media/table/samples_*.table.json')]
    assert [row[0] for row in max(tables, key=lambda t: len(t['data']))['data']] == [0, 4]


# ---------------------------------------------------------------------------- speed

def test_meter_leaves_out_pauses_and_counts_since_the_last_lap():
    meter = Meter(CPU, seconds=100.0, tokens=1000)
    for _ in range(2):
        meter.begin_iteration()
        time.sleep(0.02)
        meter.begin_waiting()
        meter.end_iteration(250)
        with meter.pause() as seconds:
            time.sleep(0.3)
    assert 100.02 <= seconds < 100.3
    lap = meter.lap()
    assert 100.04 <= lap['seconds'] < 100.34 and 20 <= lap['ms'] < 170 and lap['tokens'] == 1500
    assert lap['tokens_per_s'] == pytest.approx(250_000 / lap['ms'])
    meter.begin_iteration()
    meter.begin_waiting()
    meter.end_iteration(100)
    assert meter.lap()['tokens'] == 1600 and len(meter.times) == 2 and meter.times[1] < meter.times[0]


def test_process_that_holds_up_the_others_is_named(capsys):
    four = SimpleNamespace(moment=lambda: 0, ms_between=lambda a, b: b - a,
                           gather=lambda own: [10.0, 11.0, 25.0, 9.0])
    meter = Meter(four)
    meter.begin_iteration()
    meter.begin_waiting()
    meter.end_iteration(1)
    found = meter.lap() | {'ms': 100.0}
    assert (found['slowest_rank'], found['slowest_ms'], found['median_ms']) == (2, 25.0, 10.5)
    Progress(10).show(LINE | found)
    Progress(10).show(LINE | found | {'slowest_ms': 12.0})
    slow, even = capsys.readouterr().out.splitlines()
    assert slow.endswith(', rank 2 holds up the others: 25.00ms by itself, median 10.50ms')
    assert 'rank' not in even


def test_redirected_lines_are_whole_and_end_with_the_time_left(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    progress = Progress(last_iter=1010)
    for i in (10, 12, 15):
        progress.show(LINE | {'iter': i})
    contract = (r'^iter 1\d: loss 1\.2346, time 12\.35ms, mfu 34\.57%, lr 6\.00e-04, norm 0\.99, '
                r'123[45] tokens/s')
    # 2 s an iteration, evaluations and all, 998 and 995 of them to do
    assert [re.sub(contract, '', line) for line in capsys.readouterr().out.splitlines()] == [
        '', ', 33 min 16 s left', ', 33 min 10 s left']


# ---------------------------------------------------------------------------- a terminal

class Terminal(io.StringIO):
    """Standard output as a terminal, and what it shows."""

    def isatty(self):
        return True

    def shows(self):
        lines = re.sub(r'\x1b\[\d*m', '', self.getvalue()).split('\n')
        return [line.rsplit('\r\x1b[K', 1)[-1] for line in lines]


@pytest.fixture
def terminal(monkeypatch):
    for name in ('NO_COLOR', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in (('TERM', 'xterm'), ('COLUMNS', '80'), ('WT_SESSION', '1')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, 'line_is_live', False)
    return contextlib.redirect_stdout(Terminal())


@pytest.mark.parametrize('columns, shown', [
    (120, 'iter 12: loss 1.2346, time 12.35ms, mfu 34.57%, lr 6.00e-04, norm 0.99, 1234 tokens/s, TIME'),
    (80, 'iter 12: loss 1.2346, time 12.35ms, mfu 34.57%, 1234 tokens/s, TIME'),
    (60, 'iter 12: loss 1.2346, time 12.35ms, TIME'), (45, 'iter 12: loss 1.2346, TIME'),
    (30, 'iter 12: loss 1.2346')])
def test_live_line_keeps_the_time_left_on_a_narrow_terminal(columns, shown, terminal, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    with terminal as screen:
        progress = Progress(last_iter=1010)
        progress.show(LINE)
        progress.show(LINE | {'iter': 12})
    assert screen.shows() == [shown.replace('TIME', '33 min 16 s left')]


def test_run_on_a_terminal_keeps_its_evaluations_and_its_last_line(train, terminal):
    with terminal as screen:
        train('--max_iters=6', '--eval_interval=3')
        print0('iter 9', live=True)
        keep_line()
    shown = [line[:6] for line in screen.shows()]
    assert shown[shown.index('step 0'):][:8] == [
        'step 0', 'step 3', 'saving', 'step 6', 'saving', 'iter 6', 'to rea', 'best_v']
    assert shown[-2:] == ['iter 9', ''] and '\x1b[1m' in screen.getvalue()


# ---------------------------------------------------------------------------- samples

def test_sample_is_drawn_from_its_own_generator_and_without_dropout(char_data):
    tokenizer, model = Dataset(char_data).tokenizer, tiny()
    without = sample_text(model, tokenizer, [1, 2], CPU, seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    state = torch.random.get_rng_state()
    three, four = (sample_text(model, tokenizer, [1, 2], CPU, seed) for seed in (3, 4))
    assert three == without != four and len(three) == TINY['block_size']
    assert three.startswith(tokenizer.decode([1, 2]))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_samples_are_the_same_in_a_run_that_was_resumed(train, tmp_path):
    def samples(log):
        return dict(re.findall(r'^sample at iteration (\d+):\n(.*?)\n-{15}$', log, re.M | re.S))
    args = ('--sample_interval=2', '--eval_interval=100', '--learning_rate=1e-2')
    whole = samples(train('--max_iters=6', *args, out_dir=tmp_path / 'whole')['log'])
    train('--max_iters=3', *args)
    resumed = samples(train('--max_iters=6', *args, '--init_from=resume')['log'])
    assert len(whole) == len(set(whole.values())) == 4
    assert resumed == {i: whole[i] for i in ('4', '6')}


# ---------------------------------------------------------------------------- drawings

def wait(drawing):
    assert not drawing.is_busy(60)


def test_run_draws_its_log_beside_itself(train, tmp_path):
    pytest.importorskip('matplotlib')
    script = train('--max_iters=4', '--eval_interval=2', '--plot')
    deadline = time.monotonic() + 60  # its priority is low
    while not (tmp_path / 'out/loss.png').exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    assert 'no pictures' not in script['log']


@pytest.fixture
def program(tmp_path):
    """A program to draw with, which appends what it is given to a file, or fails."""
    pytest.importorskip('matplotlib', reason='nothing is drawn without it')
    path = tmp_path / 'program.py'
    path.write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nopen(sys.argv[2], 'a').write('x')\n")
    return path, tmp_path / 'drawn'


def test_drawing_is_not_waited_for_and_one_at_a_time(program):
    path, drawn = program
    drawing = Drawing([path, '1', drawn])
    begin = time.monotonic()
    for _ in range(5):
        drawing.start()
    assert time.monotonic() - begin < 0.8 and drawing.is_busy() and not drawn.exists()
    wait(drawing)
    assert drawn.read_text() == 'x'


def test_drawing_of_the_last_evaluation_is_made_after_all(program):
    path, drawn = program
    path.write_text("""
import os, sys, time
is_first = not os.path.exists(sys.argv[1])
open(sys.argv[1], 'a').write('' if is_first else 'x')
time.sleep(600 if is_first else 0)
""")
    drawing = Drawing([path, drawn])
    drawing.start()
    while not drawn.exists():
        time.sleep(0.01)
    drawing.start()  # too early: the first one takes ten minutes
    drawing.close(patience=60)
    assert not drawing.is_busy() and drawn.read_text() == 'x'


@pytest.mark.skipif(sys.platform == 'win32', reason='process groups')
def test_ctrl_c_does_not_reach_a_drawing(program):
    path, drawn = program
    drawing = Drawing([path, '60', drawn])
    drawing.start()
    assert os.getpgid(drawing.process.pid) != os.getpgid(0)
    assert os.getsid(drawing.process.pid) == os.getsid(0)  # else Linux might not heed its priority
    drawing.process.kill()
    drawing.process.communicate()


@pytest.mark.parametrize('arguments, reason', [(['no number'], 'ValueError: could not convert'),
                                               ([], 'IndexError: ')])
def test_drawing_that_fails_costs_a_line_and_not_the_run(arguments, reason, program, capsys):
    drawing = Drawing([program[0], *arguments])
    for _ in range(3):
        drawing.start()
        wait(drawing)
    drawing.close(patience=60)
    assert capsys.readouterr().out.count(f'no pictures from here on: {reason}') == 1


def test_log_of_a_run_whose_folder_is_emptied_is_written_again(train, tmp_path):
    with at_line('^iter 1:', lambda: shutil.rmtree(tmp_path / 'out')):
        log = train('--max_iters=6', '--eval_interval=3')['log']
    assert list(losses(log)) == [*range(7)]
    assert list(logged(tmp_path / 'out')) == [*range(7)] and 'best_iter: ' in log
