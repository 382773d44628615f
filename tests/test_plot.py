"""plot.py: what is drawn is what was logged, whatever the log has been through."""

import json
import math
import re
import runpy
import struct
import sys

import numpy as np
import pytest
from conftest import ROOT

Figure = pytest.importorskip('matplotlib.figure').Figure

PER_ITER = 128  # tokens


def entries(last=20, log_interval=1, eval_interval=5, new=True):
    """A log as train.py writes it; without what older versions didn't write, if not `new`."""
    for i in range(last + 1):
        tokens, seconds = i * PER_ITER, i * 0.5
        more = {'tokens': tokens, 'seconds': seconds, 'mfu': None} if new else {}
        if i % eval_interval == 0:
            yield {'iter': i, 'train_loss': 4 / (1 + i), 'val_loss': 5 / (1 + i), 'lr': 1e-3} | more
            if new:
                yield {'iter': i, 'health': {'activation_rms': [0.1 + i, 0.2 + i],
                                             'attention_logit': [1.0, 2.0], 'update_ratio': [1e-3, 2e-3]}}
        more = {'tokens': tokens + PER_ITER, 'clipped': float(i < 10), 'mfu': 12.0} if new else {}
        if i % log_interval == 0:
            yield {'iter': i, 'loss': 4.5 / (1 + i), 'lr': 1e-3 * i, 'grad_norm': 2.0 + i, 'skipped': 0,
                   'seconds': seconds + 0.5, 'ms': 500.0, 'tokens_per_s': PER_ITER / 0.5} | more


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / 'log.jsonl').write_text('\n'.join(text) + '\n')
    return folder


@pytest.fixture
def plot(monkeypatch, capsys, tmp_path):
    """Runs plot.py in this process; gives its globals, what it printed, and the axes. Pixels on request."""
    def run(*args, pixels=False):
        if not pixels:
            monkeypatch.setattr(Figure, 'savefig', lambda self, path, **more: path.write_bytes(b'no pixels'))
        monkeypatch.setattr(sys, 'argv', ['plot.py', *map(str, args)])
        hook = sys.excepthook
        try:
            script = runpy.run_path(str(ROOT / 'plot.py'), run_name='__main__')
        finally:
            sys.excepthook = hook
        axes = script['figure'].axes if 'figure' in script else None
        return script | {'said': capsys.readouterr().out, 'axes': axes}
    return run


def line(axis, label):
    """x and y of the line whose label ends so."""
    found, = (a for a in axis.lines if a.get_label().endswith(label))
    return found.get_xdata(), found.get_ydata()


def same(a, b):
    return np.allclose(a, b, equal_nan=True)


# ---------------------------------------------------------------------------- the picture

@pytest.mark.filterwarnings('error')
def test_picture_is_in_the_first_folder(plot, tmp_path):
    a, b = write(tmp_path / 'a', entries()), write(tmp_path / ('a name of many words ' * 5), entries(last=10))
    assert f'drawn to {a / "loss.png"}' in plot(a, pixels=True)['said']
    own = (a / 'loss.png').read_bytes()
    said = plot(a, b, '--health', pixels=True)['said']
    data = (a / 'comparison.png').read_bytes()
    width, height = struct.unpack('>II', data[16:24])
    assert data.startswith(b'\x89PNG') and width == 1500 and height > 1000
    assert (a / 'loss.png').read_bytes() == own  # a comparison doesn't replace the run's own
    assert f'drawn to {a / "comparison.png"}' in said and not list(b.glob('*.png'))


def test_drawn_values_are_the_logged_ones(plot, tmp_path):
    axes = plot(write(tmp_path / 'a', entries()), write(tmp_path / 'b', entries(last=10)), '--health')['axes']
    i, evaluated = np.arange(21), np.arange(0, 21, 5)
    for axis, per_iter in zip(axes, (1, PER_ITER / 1000, 0.5)):  # iterations, thousands of tokens, seconds
        assert same(line(axis, 'a: training, each logged batch'), (i * per_iter, 4.5 / (1 + i)))
        assert same(line(axis, 'a: validation'), (evaluated * per_iter, 5 / (1 + evaluated)))
        assert same(line(axis, 'a: training, evaluated as validation is')[1], 4 / (1 + evaluated))
        assert len(line(axis, 'b: training, each logged batch')[0]) == 11
    rate, norm, throughput, clipped, stream, logit, update = (axis.lines[0].get_ydata() for axis in axes[3:])
    assert same(rate, 1e-3 * i) and same(norm, 2 + i) and same(throughput, PER_ITER / 0.5)
    assert same(clipped, i < 10) and same(stream, 0.1 + evaluated) and same(logit, 1.0) and same(update, 1e-3)


def test_bits_per_byte_have_a_panel_where_a_run_logged_them(plot, tmp_path):
    logged = [e | {'train_bits_per_byte': e['train_loss'] / 2, 'val_bits_per_byte': e['val_loss'] / 3}
              if 'val_loss' in e else e for e in entries()]
    without = plot(write(tmp_path / 'a', entries()))['axes']
    axes = plot(write(tmp_path / 'a', entries()), write(tmp_path / 'b', logged))['axes']
    panel, = [a for a in axes if a.get_title() == 'bits per byte of text']
    assert len(axes) == len(without) + 1 and 'training time' in panel.get_xlabel()
    for name, label, divisor in (('train', 'training', 2), ('val', 'validation', 3)):
        drawn, = [x for x in panel.lines if x.get_label().startswith(f'b: {label}')]
        expected = [e[f'{name}_loss'] / divisor for e in logged if 'val_loss' in e]
        assert same(drawn.get_ydata(), expected)


def test_axes_are_labelled_with_units(plot, tmp_path):
    axes = plot(write(tmp_path / 'a', entries()), '--health')['axes']
    assert len(axes) == 10 and all(a.get_title() and a.get_xlabel() for a in axes)
    assert [a.get_xlabel() for a in axes[:3]] == [
        'iterations', 'thousands of tokens', 'training time (seconds)']
    assert axes[0].get_yscale() == 'log' and len(axes[0].get_yticks()) > 3


def test_log_without_counted_tokens_gives_the_same_places(plot, tmp_path):
    new = plot(write(tmp_path / 'a', entries()))['axes']
    old = plot(write(tmp_path / 'b', entries(new=False)))['axes']
    for a, b in zip(new[:3], old[:3]):
        for label in ('training, each logged batch', 'validation'):
            assert same(line(a, label), line(b, label))


def test_long_noisy_runs_get_medians_over_the_logged_values(plot, tmp_path):
    log = [e | ({'tokens_per_s': 10.0 if e['iter'] % 7 == 3 else 256.0} if 'loss' in e else {})
           for e in entries(last=399)]
    axes = plot(write(tmp_path / 'a', log))['axes']
    logged, medians = axes[5].lines
    assert set(logged.get_ydata()) == {10.0, 256.0} and len(logged.get_xdata()) == 400
    assert same(medians.get_xdata(), np.arange(50) * 8 + 3.5) and same(medians.get_ydata(), 256.0)
    assert len(axes[3].lines) == 1 and 'medians' in axes[5].get_xlabel()


def test_evaluations_between_lines_are_where_they_were(plot, tmp_path):
    axes = plot(write(tmp_path / 'a', entries(log_interval=100)))['axes']  # one line only, at 0
    assert same(line(axes[1], 'validation')[0], np.arange(0, 21, 5) * PER_ITER / 1000)
    old = plot(write(tmp_path / 'b', entries(log_interval=6, new=False)))['axes']  # the last line is of 18
    assert same(line(old[2], 'validation')[0], [0, 2.5, 5, 7.5, math.nan])  # seconds: not made up


def test_steps_that_a_resumed_run_took_again_count_once(plot, tmp_path):
    stale = [{'iter': i, 'loss': 99.0} for i in (18, 19, 30)]
    whole = [e for e in entries() if e['iter'] <= 19 or 'loss' not in e]
    again = plot(write(tmp_path / 'a', [*stale[:2], *whole, stale[2]]))['axes']
    at, loss = line(again[0], 'each logged batch')
    assert same(at, [*range(20), 30]) and same(loss[:20], 4.5 / (1 + np.arange(20)))


def test_runs_of_one_name_are_told_apart(plot, tmp_path):
    (tmp_path / 'x').mkdir()
    folders = write(tmp_path / 'a', entries(last=3)), write(tmp_path / 'x/a', entries(last=3))
    assert [run['name'] for run in plot(*folders, '--terminal')['runs']] == list(map(str, folders))


def test_gaps_and_broken_lines_are_left_out(plot, tmp_path):
    lines = [{'iter': 0, 'loss': 3.0}, 'nonsense', '[1]', '3', '{"loss": 2}', '{"iter": null, "loss": 1}',
             '{"iter": 1, "loss": Infinity, "lr": null, "grad_norm": NaN}', '{"iter": 2, "loss": 2}',
             {'iter': 3, 'health': {'activation_rms': [1.0, 2.0]}}, '{"iter": 4, "lo']
    axes = plot(write(tmp_path / 'a', lines), '--health', '--terminal')['axes']
    assert same(line(axes[0], 'each logged batch'), ([0, 1, 2], [3.0, math.nan, 2.0]))
    assert [bool(a.texts) for a in axes] == [False, True, True, True, True, True, True, False, True, True]


def test_run_of_one_evaluation_is_drawn(plot, tmp_path):
    plot(write(tmp_path / 'a', [{'iter': 0, 'train_loss': 4.0, 'val_loss': 4.0, 'lr': 0}]), '--terminal')
    assert (tmp_path / 'a/loss.png').exists()


# ---------------------------------------------------------------------------- the sketch

def test_sketch_needs_no_matplotlib(plot, tmp_path, monkeypatch):
    folder = write(tmp_path / 'a', entries())
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    said = plot(folder, '--terminal')['said']
    assert 'loss (nats/token)' in said and '20 iterations' in said and not (folder / 'loss.png').exists()
    with pytest.raises(ValueError, match='pip install matplotlib'):
        plot(folder)


def test_sketch_has_each_loss_at_its_height(plot, tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    said = plot(write(tmp_path / 'a', entries()), write(tmp_path / 'b', entries()), '--terminal')['said']
    rows = re.findall(r'^ *([\d.]+) \|(.*)$', said, re.M)
    assert len(rows) == 16 and all(len(r) <= 51 for _, r in rows)
    heights = [float(h) for h, _ in rows]
    assert heights == sorted(heights, reverse=True) and heights[0] == 5.0
    assert rows[0][1].startswith('B') and rows[-1][1].endswith('b')  # 5 at iteration 0, 4.5 / 21 at 20
    last_val = 5 / 21
    nearest = min(range(16), key=lambda r: abs(math.log(heights[r] / last_val)))
    assert rows[nearest][1].endswith('B')


def test_validation_is_on_top_in_the_sketch(plot, tmp_path):
    lines = [{'iter': i, key: 4.0 - i} for i in (0, 2) for key in ('val_loss', 'loss')]
    said = plot(write(tmp_path / 'a', lines), '--terminal')['said']
    assert re.findall(r'\|(.*)$', said, re.M)[0] == 'A' and '| a' not in said


# ---------------------------------------------------------------------------- as a user runs it

@pytest.mark.parametrize('args, reason', [
    ([], 'name at least one folder of a run'),
    (['nowhere'], 'log.jsonl is missing'),
    (['EMPTY'], 'has no losses to draw'),
    (['nowhere', '--heath'], 'Unknown config key: heath (did you mean health'),
])
def test_a_mistake_is_one_line(plot, tmp_path, args, reason):
    empty = write(tmp_path / 'empty', ['{}'])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)) as error:
        plot(*(empty if a == 'EMPTY' else a for a in args))
    assert '\n' not in str(error.value)


def test_script_runs_as_in_the_readme(run_script, tmp_path):
    a, b = write(tmp_path / 'a', entries()), write(tmp_path / 'b', entries())
    done = run_script('plot.py', a, b, '--terminal=True', f'--output={tmp_path / "c.png"}')
    assert 'A validation, a each logged batch' in done.stdout and (tmp_path / 'c.png').exists()
    assert not list(tmp_path.glob('**/*.part'))


