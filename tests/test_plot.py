"""plot.py: what is drawn is what was logged, whatever the log has been through."""

import json
import re

import numpy as np
import pytest

pytest.importorskip('matplotlib')
pytestmark = pytest.mark.filterwarnings('error::UserWarning', 'error::RuntimeWarning')

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


@pytest.mark.parametrize('args, reason', [
    (['nowhere'], 'log.jsonl is missing'), (['LOOP'], 'log.jsonl is missing'),
    (['EMPTY'], 'has no numbers to draw'),
    (['LOG', '--output=x'], 'output=x must end in .png, .svg or .pdf'),
])
def test_a_mistake_is_one_line(run_here, tmp_path, args, reason):
    places = {'EMPTY': write(tmp_path / 'empty', ['{"iter": 3}']),
              'LOG': write(tmp_path / 'log', entries())}
    places['LOOP'] = tmp_path / 'loop'
    places['LOOP'].symlink_to('loop')
    args = [re.sub('EMPTY|LOG$|LOOP', lambda match: str(places[match[0]]), arg) for arg in args]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)) as error:
        run_here('plot.py', *args)
    assert '\n' not in str(error.value)
