"""runlog.py: each step is told once, whatever happens to the process or the disk."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runlog import RunLog, Wandb


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
