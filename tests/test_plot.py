"""plot.py: what is drawn is what was logged, whatever the log has been through."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip('matplotlib')
pytestmark = pytest.mark.filterwarnings('error::UserWarning', 'error::RuntimeWarning')

HUGE = '1' + '0' * 400
GARBAGE = [
    '', 'nonsense', '[1]', '3', '"x"', 'null', '\0', '[' * 10**5, '{"iter": 4, "lo', '{"loss": 2}',
    '{"iter": 1e400}', '{"iter": null, "loss": 1}', '{"iter": {}}', f'{{"iter": {HUGE}, "loss": 1}}',
    f'{{"iter": 9, "loss": {HUGE}}}', '{"iter": 9, "loss": Infinity, "lr": "x"}', '{"iter": 9, "health": 5}']
STALE = '{"iter": 9, "loss": 99}'  # of a run that resumed before it
EXTREMES = [
    {'iter': 0, 'loss': 1e-320, 'lr': -1, 'a' * 200: 1e29}, {'iter': 1, 'loss': 1e29, 'lr': [1, 2]},
    {'iter': 1, 'val_loss': 3, '': 0, 'x\n$': 1e-300, 'deep': [None, None, 1], 'train_': 0}]
ALL, AT = np.arange(21), np.arange(0, 21, 5)  # iterations with a line, with an evaluation


def entries(last=20, log_interval=1):
    """A log as train.py writes it, of 128 tokens and half a second an iteration."""
    for i in range(last + 1):
        if i % 5 == 0:
            yield {'iter': i, 'train_loss': 4 / (1 + i), 'val_loss': 5 / (1 + i), 'lr': 1e-3 * i,
                   'tokens': 128 * i, 'seconds': i / 2}
            layers = {'activation_rms': [0.1 + i, 0.2 + i], 'update_ratio': [i % 20]}
            yield {'iter': i, 'health': layers}
        if i % log_interval == 0:
            yield {'iter': i, 'loss': 6 / (1 + i), 'lr': 1e-3 * i, 'grad_norm': 2.0 + i,
                   'clipped': float(i % 4 == 3), 'tokens': 128 * (i + 1), 'seconds': (i + 1) / 2}


def write(folder, lines):
    folder.mkdir(exist_ok=True, parents=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / 'log.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    return folder


@pytest.fixture
def panels(run_here, tmp_path):
    """Draws a log; gives {title and label of x: [points (2, n) of each line, sorted by label]}."""
    def draw(log, *args):
        found = {}
        for axis in run_here('plot.py', write(tmp_path / 'run', log), *args)['figure'].axes:
            lines = sorted(axis.lines, key=lambda line: line.get_label())
            name = f'{axis.get_title().strip()}, {axis.get_xlabel()}'
            found[name] = [np.array(line.get_data()) for line in lines]
        return found
    return draw


def same(lines, *expected):
    return ([line.shape for line in lines] == [np.shape(points) for points in expected]
            and all(map(np.allclose, lines, expected)))


def test_drawn_values_are_the_logged_ones(panels):
    found = panels(entries(), '--health')
    for unit, step in (('iterations', 1), ('tokens', 128), ('training time (seconds)', 0.5)):
        assert same(found[f'loss (nats/token), {unit}'], (AT * step, 4 / (1 + AT)),
                    (ALL * step, 6 / (1 + ALL)), (AT * step, 5 / (1 + AT)))
    assert same(found['learning rate, iterations'], (ALL, 1e-3 * ALL))
    assert same(found['gradient norm, before clipping, iterations'], (ALL, 2 + ALL))
    assert same(found['share of clipped updates, iterations'], (ALL, ALL % 4 == 3))
    assert same(found['residual stream (RMS), iterations'], (AT, 0.1 + AT), (AT, 0.2 + AT))
    between = panels(entries(log_interval=100))  # evaluations, and one line only
    assert same(between['loss (nats/token), tokens'][:1], (AT * 128, 4 / (1 + AT)))
    assert not [title for title in between if 'clipped' in title or 'RMS' in title]


def test_every_new_number_of_a_log_is_drawn(panels):
    log = [e | ({'train_score': 0.5, 'val_score': 0.6} if 'val_loss' in e else {}) for e in entries()]
    log += [{'iter': 3, 'z': -2.5}, {'iter': 7, 'z': -1, 'entropy': [1, 2], 'note': 'text'}]
    found = panels([*log, {'iter': 5, 'health': {'rank': [7, 8]}}], '--health')
    assert same(found['score, iterations'], (AT, np.full(5, 0.5)), (AT, np.full(5, 0.6)))
    assert same(found['z, iterations'], ([3, 7], [-2.5, -1])) and 'note, iterations' not in found
    assert same(found['entropy, iterations'], ([[7], [1]]), ([[7], [2]]))
    assert same(found['rank, iterations'], ([[5], [7]]), ([[5], [8]]))


def test_noise_gets_means_and_a_schedule_does_not(panels):
    found = panels([e | {'grad_norm': 1.0 + e['iter'] % 2} for e in entries(last=399)], '--health')
    means, logged = found['gradient norm, before clipping, iterations']
    at = np.arange(50) * 8 + 3.5
    assert logged.shape == (2, 400) and same([means], (at, np.full(50, 1.5)))
    assert same(found['share of clipped updates, iterations'], (at, np.full(50, 0.25)))
    assert [line.shape for line in found['learning rate, iterations']] == [(2, 400)]


def test_garbage_is_left_out_extremes_are_drawn_and_zero_has_no_logarithm(panels, run_here, tmp_path):
    clean, found = panels(entries()), panels([*GARBAGE, STALE, *entries(), *GARBAGE])
    assert found.keys() == clean.keys() and all(same(found[name], *clean[name]) for name in clean)
    panels(EXTREMES, '--health')
    panels([{'iter': 0, 'train_loss': 4.0, 'val_loss': 4.0, 'lr': 0}])  # a single evaluation
    figure = run_here('plot.py', write(tmp_path / 'run', entries()), '--health')['figure']
    axis, = [axis for axis in figure.axes if 'update / weights' in axis.get_title()]
    assert axis.get_yscale() == 'log' and axis.get_ylim()[0] > 1
    assert np.isfinite(axis.transData.transform((5, 5))).all()
    assert not np.isfinite(axis.transData.transform((20, 0))).all()


def test_pictures_have_names_of_their_own_or_the_name_and_format_asked_for(run_script, run_here, tmp_path):
    a, b = write(tmp_path / 'a', entries()), write(tmp_path / '셰익스피어', entries())
    assert run_script('plot.py', a, b).stderr == ''
    run_here('plot.py', a)
    assert {p.name for p in a.iterdir()} == {'log.jsonl', 'loss.png', 'comparison.png'}
    for name, start in (('x.png', b'\x89PNG'), ('x.svg', b'<?xml'), ('X.PDF', b'%PDF')):
        path = tmp_path / name / 'new' / name
        assert f'drawn to {path}' in run_here('plot.py', b, f'--output={path}')['log']
        assert path.read_bytes().startswith(start) and [*path.parent.iterdir()] == [path]
    assert {p.name for p in b.iterdir()} == {'log.jsonl'}


@pytest.mark.parametrize('names', [
    ['run', 'x/run'], ['_a', '$b{$', 'a & b'], [f'run{i:02}' for i in range(30)],
    ['many words ' * 20 + x for x in 'ab'], ['셰익스피어'],
], ids=lambda names: f'{len(names)} {names[0]:.4}')
def test_each_run_is_in_the_legend_which_is_inside_the_picture(run_here, tmp_path, names):
    folders = [write(tmp_path / name, entries()) for name in names]
    figure = run_here('plot.py', *folders, '--health', f'--output={tmp_path}/x.svg')['figure']
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    handles = figure.legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == len(names)
    drawn = ElementTree.parse(tmp_path / 'x.svg').iter('{http://www.w3.org/2000/svg}text')
    drawn = re.sub(r'\s', '', ''.join(f'<{text.text}>' for text in drawn)).replace('><', '')
    assert all(re.sub(r'\s', '', name) in drawn or '\\uc170' in drawn for name in names)
    kinds = 'validation', 'training(sameevaluation)', 'training,eachloggedbatch', 'firstlayer'
    assert all(drawn.count(kind) == 1 for kind in kinds)


@pytest.mark.parametrize('args, reason', [
    ([], 'name at least one folder of a run'),
    (['nowhere'], 'log.jsonl is missing'),
    (['EMPTY'], 'has no numbers to draw'),
    (['LOG', '--output=x'], 'output=x must end in .png, .svg or .pdf'),
    (['LOG', '--output=LOG/log.jsonl/x.png'], "x.png can't be written"),
    (['nowhere', '--heath'], 'Unknown config key: heath (did you mean health'),
])
def test_a_mistake_is_one_line(run_here, tmp_path, args, reason):
    places = {'EMPTY': write(tmp_path / 'empty', ['{"iter": 3}']),
              'LOG': write(tmp_path / 'log', entries())}
    args = [re.sub('EMPTY|LOG', lambda match: str(places[match[0]]), arg) for arg in args]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)) as error:
        run_here('plot.py', *args)
    assert '\n' not in str(error.value)
