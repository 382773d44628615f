"""log.py: each step is logged once, whatever happens to the process, the disk, wandb or the picture."""

import json
import shutil
import sys
import time

import pytest
import torch
from conftest import TINY, losses, tiny
from runs import at_line, logged

from support.machine.runtime import Runtime
from support.text.dataset import Dataset
from support.training.log import Drawing, Meter, RunLog, sample_text

CPU = Runtime('cpu', 'float32', False, 'gloo')
SETTINGS = {'wandb_project': 'p', 'wandb_run_name': 'n', 'wandb_log': False, 'plot': False, 'max_iters': 100}


def entries(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def new_log(folder, first_iter=0):
    return RunLog(SETTINGS | {'out_dir': str(folder)}, CPU, first_iter, 'abcd')


def write(folder, iterations, first_iter=0):
    log = new_log(folder, first_iter)
    for i in iterations:
        log.write({'iter': i, 'loss': i / 3})
    log.close(patience=0)


def test_line_is_in_the_file_as_soon_as_it_is_written_with_all_digits(tmp_path):
    log, entry = new_log(tmp_path / 'new folder'), {'iter': 3, 'loss': 2.718281828459045, 'lr': 6e-4}
    log.write(entry | {'mfu': float('nan'), 'grad_norm': float('inf')})  # which JSON lacks
    assert entries(tmp_path / 'new folder') == [entry]
    health = {'update_ratio': torch.tensor([0.25, 0.5])}
    log.write_later(3, health)  # what the device has by the next line
    health['attention_logit'] = torch.tensor([3.0, 4.0])
    log.write({'iter': 4})
    assert entries(tmp_path / 'new folder')[1:] == [
        {'iter': 3, 'health': {'update_ratio': [0.25, 0.5], 'attention_logit': [3.0, 4.0]}}, {'iter': 4}]


@pytest.mark.parametrize('before, after, first_iter, expected', [
    ([0, 1, 2, 2, 3, 4], [3, 4, 5], 3, [0, 1, 2, 2, 3, 4, 5]),  # an evaluation and an iteration at 2
    ([0, 1, 2], [0], 0, [0]), ([], [7, 8], 7, [7, 8])])
def test_resumed_run_has_each_step_once_and_a_new_one_an_empty_log(before, after, first_iter, expected,
                                                                   tmp_path):
    write(tmp_path, before)
    write(tmp_path, after, first_iter)
    assert [e['iter'] for e in entries(tmp_path)] == expected


@pytest.mark.parametrize('garbage', [
    b'1]', b'"iter": "1"}', b'"iter": 1e400}', b'\xff', b''])
def test_what_a_killed_process_left_of_a_line_is_dropped(garbage, tmp_path):
    for cut in (0, 1, 50, 73, 74, 75, 200):
        write(tmp_path, range(5))
        whole = (tmp_path / 'log.jsonl').read_bytes()[:cut]
        (tmp_path / 'log.jsonl').write_bytes(whole + b'{' + garbage + b'\n[1]\nnull\n3\n')
        write(tmp_path, [5, 6], first_iter=5)
        assert [e['iter'] for e in entries(tmp_path)] == [*range(whole.count(b'\n')), 5, 6]


@pytest.mark.parametrize('room', [0, 17, 40])
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


def test_log_of_a_run_whose_folder_is_emptied_is_written_again(train, tmp_path):
    with at_line('^iter 1:', lambda: shutil.rmtree(tmp_path / 'out')):
        log = train('--max_iters=6', '--eval_interval=3')['log']
    assert list(losses(log)) == list(logged(tmp_path / 'out')) == [*range(7)] and 'best_iter: ' in log


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
    (tmp_path / 'log.jsonl').write_text('{"iter": "1", "val_loss": 2}\n')
    assert resumed.summary({'tokens': 5}) == 'best_val_loss: 2\ntokens: 5'
    (tmp_path / 'log.jsonl').unlink()
    (tmp_path / 'log.jsonl').mkdir()  # nothing that can be read
    assert resumed.summary({'tokens': 5}) == 'tokens: 5'


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


PROGRAM = """
import os, sys, time
is_first = not os.path.exists(sys.argv[1])
open(sys.argv[1], 'a').write('' if is_first else 'x')
time.sleep(600 if is_first else 0)
"""


@pytest.fixture
def program(tmp_path):
    """A program to draw with, which takes ten minutes for its first picture, and the file where it leaves
    a letter for each other one."""
    pytest.importorskip('matplotlib', reason='nothing is drawn without it')
    (tmp_path / 'program.py').write_text(PROGRAM)
    return tmp_path / 'program.py', tmp_path / 'drawn'


def test_run_draws_its_log_beside_itself(train, tmp_path):
    pytest.importorskip('matplotlib')
    train('--max_iters=4', '--eval_interval=2', '--plot')
    deadline = time.monotonic() + 60  # its priority is low
    while not (tmp_path / 'out/loss.png').exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / 'out/loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.skipif(sys.platform == 'win32', reason='process groups')
def test_drawing_is_not_waited_for_one_at_a_time_and_the_last_is_made_after_all(program):
    path, drawn = program
    drawing, begin = Drawing([path, drawn]), time.monotonic()
    for _ in range(5):
        drawing.start()
    assert time.monotonic() - begin < 0.8 and drawing.is_busy()
    while not drawn.exists():
        time.sleep(0.01)
    drawing.close(patience=60)
    assert not drawing.is_busy() and drawn.read_text() == 'x'
