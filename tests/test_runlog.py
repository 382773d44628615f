"""runlog.py, console.py: each step is told once, whatever happens to the process or the disk."""

import contextlib
import importlib.util
import io
import json
import os
import re
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_ARGS, losses
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from support.machine import console
from support.machine.console import keep_line, print0
from support.machine.runtime import Runtime
from support.training import checkpoint, log as runlog
from support.training.log import Drawing, Meter, Progress, RunLog, Wandb
from support.text.tokenizer import read_tokenizer


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, iterations, first_iter=0):
    log = RunLog(path, first_iter)
    for i in iterations:
        log.write({'iter': i, 'loss': i / 3})
    log.close()


class FullDisk:
    """In the place of a log's file: takes `room` bytes, then none until it is given more."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data):
        n = min(self.room, len(data))
        if n == 0:
            raise OSError(28, 'No space left on device')
        self.room -= n
        return self.file.write(data[:n])

    def close(self):
        self.file.close()


# ---------------------------------------------------------------------------- the file

def test_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path / 'new folder' / 'log.jsonl')
    log.write({'iter': 0, 'loss': 1 / 3})
    assert entries(tmp_path / 'new folder' / 'log.jsonl') == [{'iter': 0, 'loss': 1 / 3}]
    log.close()


def test_resumed_run_has_each_step_once(tmp_path):
    path = tmp_path / 'log.jsonl'
    write(path, [0, 1, 2, 2, 3, 4])  # an evaluation and an iteration at 2
    write(path, [3, 4, 5], first_iter=3)
    assert [e['iter'] for e in entries(path)] == [0, 1, 2, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == [path]


def test_new_run_begins_an_empty_log(tmp_path):
    write(tmp_path / 'log.jsonl', [0, 1, 2])
    write(tmp_path / 'log.jsonl', [0])
    assert [e['iter'] for e in entries(tmp_path / 'log.jsonl')] == [0]


def test_resuming_without_a_log_begins_one(tmp_path):
    write(tmp_path / 'log.jsonl', [7, 8], first_iter=7)
    assert [e['iter'] for e in entries(tmp_path / 'log.jsonl')] == [7, 8]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.binary(max_size=30))
def test_what_a_killed_process_left_of_a_line_is_dropped(tmp_path_factory, cut, garbage):
    path = tmp_path_factory.mktemp('log') / 'log.jsonl'
    write(path, range(5))
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole + b'{' + garbage.replace(b'\n', b''))
    write(path, [5, 6], first_iter=5)
    assert [e['iter'] for e in entries(path)] == [*range(whole.count(b'\n')), 5, 6]


@pytest.mark.parametrize('line', ['{"iter": 1, "lo', '', '[1]', '3', 'null', '{"step": 1}', '{"iter": "1"}',
                                  '{"iter": null}', '\0\0\0', '\xff'])
def test_line_that_is_no_entry_is_dropped(line, tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_bytes(b'{"iter": 0}\n' + line.encode('latin-1') + b'\n{"iter": 1}\n')
    write(path, [2], first_iter=2)
    assert [e['iter'] for e in entries(path)] == [0, 1, 2]


def test_log_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(None, [0, 1])
    assert list(tmp_path.iterdir()) == []


def test_log_holds_what_pandas_and_json_readers_take(tmp_path):
    log = RunLog(tmp_path / 'log.jsonl')
    entry = {'iter': 3, 'loss': 2.718281828459045, 'lr': 6e-4, 'skipped': 0}
    log.write(entry)
    log.close()
    assert json.loads((tmp_path / 'log.jsonl').read_text()) == entry  # floats survive whole


def test_number_that_json_has_not_is_left_out(tmp_path):
    log = RunLog(tmp_path / 'log.jsonl')
    log.write({'iter': 1, 'mfu': float('nan'), 'grad_norm': float('inf'), 'loss': 2.0})
    log.close()
    assert entries(tmp_path / 'log.jsonl') == [{'iter': 1, 'loss': 2.0}]


# ---------------------------------------------------------------------------- a full disk

@pytest.mark.parametrize('room', [0, 1, 17, 26, 40])
def test_lines_wait_for_a_full_disk_and_are_complete_afterwards(room, tmp_path, capsys):
    log = RunLog(tmp_path / 'log.jsonl')
    log.file = disk = FullDisk(log.file, room)
    for i in range(5):
        log.write({'iter': i, 'loss': 0.5})
    assert capsys.readouterr().out.count('could not be written (No space left on device)') == 1
    disk.room = 10**6
    log.write({'iter': 5, 'loss': 0.5})
    assert [e['iter'] for e in entries(tmp_path / 'log.jsonl')] == [*range(6)]
    disk.room = 0
    log.write({'iter': 6, 'loss': 0.5})
    assert 'could not be written' in capsys.readouterr().out  # it is told again the next time
    disk.room = 10**6
    log.close()  # the last chance
    assert [e['iter'] for e in entries(tmp_path / 'log.jsonl')] == [*range(7)]


def test_closing_on_a_full_disk_is_no_error(tmp_path):
    log = RunLog(tmp_path / 'log.jsonl')
    log.file = FullDisk(log.file, 5)
    log.write({'iter': 0})
    log.close()
    assert (tmp_path / 'log.jsonl').read_bytes() == b'{"ite'
    write(tmp_path / 'log.jsonl', [1], first_iter=1)
    assert entries(tmp_path / 'log.jsonl') == [{'iter': 1, 'loss': 1 / 3}]


# ---------------------------------------------------------------------------- wandb

def test_wandb_gets_its_settings_and_calls(monkeypatch):
    calls = []
    service = SimpleNamespace(init=lambda **k: calls.append(k), log=lambda values: calls.append(values))
    monkeypatch.setitem(sys.modules, 'wandb', service)
    wandb = Wandb({'project': 'p', 'id': 'abc', 'resume': 'allow'})
    wandb.call('log', {'iter': 1})
    assert calls == [{'project': 'p', 'id': 'abc', 'resume': 'allow'}, {'iter': 1}]


def test_no_service_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it would fail
    wandb = Wandb(None)
    wandb.call('log', {'iter': 1})
    assert not wandb.is_on


def test_service_that_fails_once_is_left_alone(monkeypatch, capsys):
    calls = []
    service = SimpleNamespace(init=lambda **k: None, log=lambda values: calls.append(values) or 1 / 0)
    monkeypatch.setitem(sys.modules, 'wandb', service)
    wandb = Wandb({})
    for i in range(3):
        wandb.call('log', {'iter': i})
    assert calls == [{'iter': 0}]
    assert capsys.readouterr().out == 'wandb is off from here on: ZeroDivisionError: division by zero\n'


def test_wandb_gets_every_line_and_a_number_for_each_layer(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **k: None, log=calls.append))
    log = RunLog(tmp_path / 'log.jsonl', wandb=Wandb({}))
    log.write({'iter': 5, 'train_loss': 2.0, 'val_loss': 3.0, 'lr': 0.1, 'mfu': 12.5})
    health = {'update_ratio': torch.tensor([0.25, 0.5])}
    log.write_later(5, health)
    health['attention_logit'] = torch.tensor([3.0, 4.0])
    log.write({'iter': 5, 'loss': 2.5})
    log.close()
    assert calls == [
        {'iter': 5, 'train/loss': 2.0, 'val/loss': 3.0, 'lr': 0.1, 'mfu': 12.5},
        {'iter': 5, 'health/update_ratio/0': 0.25, 'health/update_ratio/1': 0.5,
         'health/attention_logit/0': 3.0, 'health/attention_logit/1': 4.0},
        {'iter': 5, 'loss': 2.5}]
    assert entries(tmp_path / 'log.jsonl')[1:] == [
        {'iter': 5, 'health': {'update_ratio': [0.25, 0.5], 'attention_logit': [3.0, 4.0]}}, calls[-1]]


def wandb_history(path):
    """The dicts that were logged, from wandb's file: records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2
    data, at, record = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        length, kind = struct.unpack('<HB', data[at + 4:at + 7])
        record = record * (kind in (3, 4)) + data[at + 7:at + 7 + length]  # 1: whole, 2: first, 3, 4: last
        at += 7 + length
        at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            if found.WhichOneof('record_type') == 'history':
                yield {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in found.history.item}


@pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='wandb is not installed')
def test_offline_wandb_holds_the_whole_run(run_script, char_data, tmp_path):
    run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}',
               '--max_iters=4', '--eval_interval=2', '--sample_interval=4', '--wandb_log',
               env={'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true'})
    path, = tmp_path.glob('wandb/offline-run-*/*.wandb')
    history = list(wandb_history(path))
    assert [e['iter'] for e in history if 'val/loss' in e] == [0, 2, 4]
    assert all({'train/loss', 'lr', 'mfu'} <= set(e) for e in history if 'val/loss' in e)
    assert [e['iter'] for e in history if 'health/update_ratio/1' in e] == [0, 2, 4]
    lines = [e for e in entries(tmp_path / 'out/log.jsonl') if 'loss' in e]
    assert [{k: e[k] for k in lines[0]} for e in history if 'loss' in e] == lines and len(lines) == 5
    tables = [json.loads(p.read_text()) for p in path.parent.glob('files/media/table/samples_*.table.json')]
    tables.sort(key=lambda table: len(table['data']))
    assert [t['columns'] for t in tables] == [['iter', 'text']] * 2
    assert [iteration for iteration, _ in tables[-1]['data']] == [0, 4]


# ---------------------------------------------------------------------------- standard output

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
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setenv('WT_SESSION', '1')
    monkeypatch.setattr(console, 'line_is_live', False)
    return contextlib.redirect_stdout(Terminal())


LINE = {'iter': 10, 'loss': 1.23456, 'ms': 12.345, 'mfu': 34.567, 'lr': 6e-4, 'grad_norm': 0.987,
        'tokens_per_s': 1234.5}
CONTRACT = (r'^iter 1\d: loss 1\.2346, time 12\.35ms, mfu 34\.57%, lr 6\.00e-04, norm 0\.99, '
            r'123[45] tokens/s')


def test_meter_leaves_out_pauses_and_counts_since_the_last_lap(monkeypatch):
    clock = iter([0.0,  # the lap begins
                  1.0, 2.0,  # an iteration begins, and has done what it can by itself
                  4.0, 10.0,  # a pause
                  12.0, 13.5, 16.0, 16.0,  # an iteration; the lap ends, the next begins
                  17.0, 18.0, 20.0, 20.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    meter = Meter(Runtime('cpu', 'float32', False, 'gloo'), seconds=100.0, tokens=1000)
    meter.begin_iteration()
    meter.begin_waiting()
    meter.end_iteration(300)
    with meter.pause() as seconds:
        assert seconds == 104
    meter.begin_iteration()
    meter.begin_waiting()
    meter.end_iteration(200)
    assert meter.lap() == {'seconds': 110, 'tokens': 1500, 'ms': 5000, 'tokens_per_s': 50}
    meter.begin_iteration()
    meter.begin_waiting()
    meter.end_iteration(100)
    assert meter.lap() == {'seconds': 114, 'tokens': 1600, 'ms': 4000, 'tokens_per_s': 25}
    assert meter.times == [5, 4]


def test_process_that_holds_up_the_others_is_named(monkeypatch, capsys):
    meter = Meter(Runtime('cpu', 'float32', False, 'gloo'))
    monkeypatch.setattr(Runtime, 'gather', lambda self, value: [10.0, 11.0, 25.0, 9.0])
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


def test_redirected_lines_are_plain_and_end_with_the_time_left(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    progress = Progress(last_iter=1010)
    progress.show(LINE)
    progress.show(LINE | {'iter': 12})
    progress.show(LINE | {'iter': 15})
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(CONTRACT, line) for line in lines)
    assert [re.sub(CONTRACT, '', line) for line in lines] == ['', ', 33 min 16 s left', ', 33 min 10 s left']
    # 2 s an iteration, evaluations and all, 998 and 995 of them to do


def test_live_line_gives_way_and_what_is_no_live_line_stays(terminal):
    progress = Progress(last_iter=100)
    with terminal as screen:
        print0('step 0', style='bold')
        for i in (1, 2, 3):
            progress.show(LINE | {'iter': i})
        assert screen.shows()[0] == 'step 0' and screen.shows()[1].startswith('iter 3: loss 1.2346, ')
        print0('step 4')
        print0('saved')
        progress.show(LINE | {'iter': 5})
        keep_line()
        print0('the end')
    shown = screen.shows()
    assert shown[:3] == ['step 0', 'step 4', 'saved'] and shown[4:] == ['the end', '']
    assert shown[3].startswith('iter 5: loss 1.2346, time 12.35ms, mfu 34.57%, lr ') and len(shown[3]) < 80


def test_live_line_never_wraps(terminal, monkeypatch):
    monkeypatch.setenv('COLUMNS', '30')
    with terminal as screen:
        Progress(last_iter=100).show(LINE)
    assert screen.shows() == ['iter 10: loss 1.2346, time 12.35ms'[:29]]


@pytest.mark.parametrize('variable, value, live, coloured', [
    ('COLUMNS', '80', True, True), ('NO_COLOR', '1', True, False), ('NO_COLOR', '', True, True),
    ('TERM', 'dumb', False, False)])
def test_colour_is_for_terminals_and_can_be_refused(terminal, monkeypatch, variable, value, live, coloured):
    monkeypatch.setenv(variable, value)
    with terminal as screen:
        print0('step 0', style='bold')
        print0('iter 1', live=True)
        print0('iter 2', live=True)
    assert ('\x1b[1m' in screen.getvalue()) == coloured
    assert ('\r' in screen.getvalue()) == live and (screen.shows()[1] == 'iter 2') == live


def test_only_the_first_process_prints_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with terminal as screen:
        print0('step 0')
        print0('iter 1', live=True)
        keep_line()
    assert screen.getvalue() == ''


def test_redirected_run_has_no_control_sequences(train):
    log = train('--max_iters=3', '--sample_interval=2')['log']
    assert '\x1b' not in log and '\r' not in log and list(losses(log)) == [0, 1, 2, 3]
    assert len(re.findall(r'^iter [123]: .*, \d+ s left$', log, re.M)) == 3


def test_run_on_a_terminal_keeps_its_evaluations_and_its_last_line(train, terminal):
    with terminal as screen:
        train('--max_iters=6', '--eval_interval=3')
    shown = [line[:6] for line in screen.shows()]
    assert shown[shown.index('step 0'):] == ['step 0', 'step 3', 'saving', 'step 6', 'saving', 'iter 6', '']


# ---------------------------------------------------------------------------- samples

def test_samples_leave_the_run_as_it_was(train, tmp_path):
    args = ('--max_iters=6', '--eval_interval=3', '--dropout=0.2')
    train(*args, out_dir=tmp_path / 'without')
    log = train(*args, '--sample_interval=2', out_dir=tmp_path / 'with')['log']
    assert log.count('\nsample at iteration ') == 4 and log.count('\n---------------\n') == 4
    timeless = [[{k: v for k, v in e.items() if k not in ('ms', 'seconds', 'tokens_per_s', 'mfu')}
                 for e in entries(tmp_path / name / 'log.jsonl')] for name in ('with', 'without')]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 13
    a, b = (checkpoint.load(tmp_path / name / 'latest.pt') for name in ('with', 'without'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])


def test_sample_is_drawn_from_its_own_generator_and_without_dropout(char_data):
    tokenizer, run = read_tokenizer(char_data), Runtime('cpu', 'float32', False, 'gloo')
    model = GPT(GPTConfig(**TINY))
    without = runlog.show_sample(model, tokenizer, [1, 2], run, 5, seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    state = torch.random.get_rng_state()
    three, four = (runlog.show_sample(model, tokenizer, [1, 2], run, 5, seed) for seed in (3, 4))
    assert three == without != four and len(three) == TINY['block_size']
    assert three.startswith(tokenizer.decode([1, 2]))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_samples_are_the_same_in_a_run_that_was_resumed(train, tmp_path):
    args = ('--sample_interval=2', '--eval_interval=100', '--learning_rate=1e-2')
    whole = samples(train('--max_iters=6', *args, out_dir=tmp_path / 'whole')['log'])
    train('--max_iters=3', *args, out_dir=tmp_path / 'parts')
    resumed = samples(train('--max_iters=6', *args, '--init_from=resume', out_dir=tmp_path / 'parts')['log'])
    assert list(whole) == ['0', '2', '4', '6'] and len(set(whole.values())) == 4
    assert resumed == {i: whole[i] for i in ('4', '6')}


def samples(log):
    return dict(re.findall(r'^sample at iteration (\d+):\n(.*?)\n-{15}$', log, re.M | re.S))


# ---------------------------------------------------------------------------- drawings

def wait(drawing):
    assert not drawing.is_busy(60)


def test_run_draws_its_log_beside_itself(train, tmp_path):
    pytest.importorskip('matplotlib')
    script = train('--max_iters=4', '--eval_interval=2', '--plot')
    assert not script['drawing'].is_busy(300)  # its priority is low
    assert (tmp_path / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    assert 'no pictures' not in script['log']


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in the place of plot.py, which appends what it is given to a file, or fails."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
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
time.sleep(600 * is_first)
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


def test_drawing_that_cannot_be_started_costs_a_line_and_not_the_run(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'executable', 'no/such/python')
    drawing = Drawing([program[0], '0', program[1]])
    for _ in range(2):
        drawing.start()
    drawing.close(patience=60)
    assert capsys.readouterr().out.count('no pictures from here on: ') == 1


def test_drawing_that_fails_is_told_once(program, capsys):
    path, drawn = program
    drawing = Drawing([path, 'no number', drawn])
    for _ in range(3):
        drawing.start()
        wait(drawing)
    assert capsys.readouterr().out.count('no pictures from here on: ValueError: could not convert') == 1


def test_nothing_is_drawn_without_matplotlib(program, monkeypatch, capsys):
    path, drawn = program
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    drawing = Drawing([path, '0', drawn])
    drawing.start()
    drawing.close(patience=60)
    assert drawing.process is None and not drawn.exists() and capsys.readouterr().out == ''


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('stream', [Broken(), None, 'closed'], ids=['full', 'none', 'closed'])
def test_output_that_cannot_be_written_costs_its_lines_only(stream, monkeypatch, capsys):
    if stream == 'closed':
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(console, 'has_failed', False)
    monkeypatch.setattr(sys, 'stdout', stream)
    for _ in range(3):
        print0('a line')
    keep_line()
    console.flush()
    assert capsys.readouterr().err.count('standard output can\'t be written') == (stream is not None)
