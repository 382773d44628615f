"""
Draw runs from their log.jsonl, as a picture and as a sketch in the terminal.

    python plot.py out-a out-b                         # out-a/comparison.png: both, on the same axes
    python plot.py out-a --health=True --output=a.png
    python plot.py out-a --terminal=True               # the sketch needs no matplotlib

Nothing is smoothed: thin lines go through every logged value. The share of clipped updates is a mean, the
thick lines over noisy ones are medians, both of 50 parts of the run.
"""

from configurator import configure  # first, as it says what this Python lacks

import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import replacing

# ---------------------------------------------------------------------------- settings

output = ''  # the PNG file; empty: in the first folder loss.png, or of several runs comparison.png
health = False  # add what train.py measured inside the network
terminal = False  # print a sketch of the loss
low_priority = False  # let other processes go first

configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
folders = [a for a in sys.argv[1:] if not a.startswith('-')]
if not folders:
    raise UserError('name at least one folder of a run: python plot.py out')
if low_priority and hasattr(os, 'nice'):
    os.nice(19)

COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')  # Okabe & Ito 2008
UNITS = {  # of horizontal axes; the largest unit of which a run has at least 2 is taken
    'iter': ((1, 'iterations'),),
    'tokens': tuple((10**n, f'{word} of tokens') for n, word in
                    ((9, 'billions'), (6, 'millions'), (3, 'thousands'), (0, 'ones'))),
    'seconds': tuple((size, f'training time ({unit})') for size, unit in
                     ((86400, 'days'), (3600, 'hours'), (60, 'minutes'), (1, 'seconds'))),
}
TITLES = {'loss': 'loss (nats/token)', 'bits_per_byte': 'bits per byte of text'}
LINE_PANELS = {
    'lr': ('learning rate', 'linear'),
    'grad_norm': ('gradient norm, before clipping', 'log'),
    'tokens_per_s': ('throughput (tokens/s)', 'linear'),
    'clipped': ('share of clipped updates, means of 50 parts', 'linear'),
}
LAYER_PANELS = {
    'activation_rms': 'residual stream (RMS)',
    'attention_logit': 'largest attention logit',
    'update_ratio': 'update / weights (RMS)',
}


# ---------------------------------------------------------------------------- reading

def read_run(folder):
    """A run's name, lines, evaluations and health, as columns: {key: values in order of iterations}."""
    path = Path(folder, 'log.jsonl')
    if not path.is_file():
        raise MissingFile(f'{path} is missing: name folders in which train.py wrote a log')
    kinds = {'loss': {}, 'val_loss': {}, 'health': {}}  # {iteration: entry}: the last one counts
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            for kind in kinds:
                if kind in entry:
                    kinds[kind][int(entry['iter'])] = entry
        except (ValueError, TypeError, KeyError):  # a killed process may leave half a line
            continue
    lines, evaluations, measured = ([found[i] for i in sorted(found)] for found in kinds.values())
    if not lines and not evaluations:
        raise UserError(f'{path} has no losses to draw')
    a = {k: column(lines, k) for k in ('iter', 'loss', 'ms', 'seconds', 'tokens', *LINE_PANELS)}
    counted = np.cumsum(a['tokens_per_s'] * a['ms'] / 1000 * np.diff(a['iter'], prepend=-1))
    a['tokens'] = np.where(np.isnan(a['tokens']), counted, a['tokens'])  # older logs don't count them
    evaluations = {k: column(evaluations, k) for k in ('iter', 'seconds', 'tokens', *(
        f'{split}_{what}' for split in ('train', 'val') for what in TITLES))}
    layers = {k: [numbers(e['health'].get(k, ())) for e in measured] for k in LAYER_PANELS}
    return {'name': path.parent.resolve().name, 'lines': a, 'evaluations': evaluations,
            'health': {'iter': column(measured, 'iter')} | layers}


def column(entries, key):
    return numbers([e.get(key) for e in entries])


def numbers(values):
    """An array, with NaN in place of what is no finite number."""
    return np.array([v if isinstance(v, (int, float)) and math.isfinite(v) else math.nan for v in values])


def progress(run, key, iterations):
    """The tokens or seconds (`key`) of all updates before each of `iterations`, NaN if unknown."""
    if key == 'iter':
        return iterations
    parts = (run['lines'], 1), (run['evaluations'], 0)  # a line is written after its update
    at = np.concatenate([[0], *(part['iter'] + after for part, after in parts)])
    values = np.concatenate([[0], *(part[key] for part, _ in parts)])
    at, first = np.unique(at[np.isfinite(values)], return_index=True)
    if len(at) < 2:
        return np.full(len(iterations), math.nan)
    return np.interp(iterations, at, values[np.isfinite(values)][first], right=math.nan)


# ---------------------------------------------------------------------------- the picture

def draw(runs, with_health):
    """A matplotlib figure: the loss against iterations, tokens and seconds, then LINE_PANELS, and bits a byte
    if a run has them; with health one more row."""
    from matplotlib.figure import Figure  # pyplot would look for a screen
    with_bits = any(np.isfinite(run['evaluations']['val_bits_per_byte']).any() for run in runs)
    rows = ['AAAABBBBCCCC', 'DDDEEEFFFKKK' if with_bits else 'DDDDEEEEFFFF'] + ['GGGHHHIIIJJJ'] * with_health
    figure = Figure(figsize=(12, 3.2 * len(rows) + 0.8), layout='constrained')
    panels = figure.subplot_mosaic('\n'.join(rows))
    for panel, key in zip('ABC', UNITS):
        draw_evaluations(panels[panel], runs, key, 'loss')
    if with_bits:
        draw_evaluations(panels['K'], runs, 'seconds', 'bits_per_byte')
    figure.legend(*panels['A'].get_legend_handles_labels(), loc='outside upper center',
                  ncols=len(runs), frameon=False)
    for panel, (key, (title, scale)) in zip('DEFG' if with_health else 'DEF', LINE_PANELS.items()):
        unit = draw_line_panel(panels[panel], runs, key)
        finish(panels[panel], title, unit, scale)
    for panel, (key, title) in zip('HIJ' if with_health else '', LAYER_PANELS.items()):
        draw_layers(panels[panel], runs, key)
        finish(panels[panel], title, 'iterations', 'log')
        panels['H'].legend(fontsize='x-small').set_in_layout(False)
    return figure


def draw_evaluations(axis, runs, key, what):
    """What runs evaluated, 'loss' or 'bits_per_byte', against 'iter', 'tokens' or 'seconds'; losses with
    those of each logged batch."""
    places = [[progress(run, key, run[part]['iter']) for part in ('lines', 'evaluations')] for run in runs]
    furthest = np.nanmax(np.concatenate([[0], *itertools.chain(*places)]))
    size, unit = next(((s, u) for s, u in UNITS[key] if furthest >= 2 * s), UNITS[key][-1])
    for run, (at, evaluated_at), colour in zip(runs, places, itertools.cycle(COLOURS)):
        name, lines, evaluations = run['name'], run['lines'], run['evaluations']
        axis.plot(evaluated_at / size, evaluations[f'val_{what}'], 'o-', color=colour, linewidth=1.5,
                  markersize=3, label=f'{name}: validation')
        axis.plot(evaluated_at / size, evaluations[f'train_{what}'], '--', color=colour, linewidth=1.2,
                  label=f'{name}: training, evaluated as validation is')
        if what == 'loss':
            axis.plot(at / size, lines['loss'], color=colour, linewidth=0.5, alpha=0.5, zorder=0,
                      label=f'{name}: training, each logged batch')
    finish(axis, TITLES[what], unit, 'log')


def draw_line_panel(axis, runs, key):
    """A number that every line of the log has, against iterations; returns the label of that axis."""
    unit = 'iterations'
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        at, values = run['lines']['iter'], run['lines'][key]
        parts = [np.array_split(a, min(50, len(a)) or 1) for a in (at, values)]
        if key == 'clipped':  # 0 or 1 where every update has a line
            at, values = ([part.mean() for part in a] for a in parts)
        is_noisy = key in ('grad_norm', 'tokens_per_s') and len(at) >= 200
        axis.plot(at, values, color=colour, linewidth=0.8, alpha=0.4 if is_noisy else 1)
        if is_noisy:
            axis.plot(*([np.median(part) for part in a] for a in parts), color=colour, linewidth=1.8)
            unit = 'iterations (thick: medians of 50 parts)'
    return unit


def draw_layers(axis, runs, key):
    """A line for each layer, from dark (the first) to light (the last), with a line style for each run."""
    from matplotlib import colormaps
    for run, style in zip(runs, itertools.cycle(('-', '--', ':', '-.'))):
        layers = list(itertools.zip_longest(*run['health'][key], fillvalue=math.nan))
        for layer, values in enumerate(layers):
            label = f'{run["name"]}: layer {layer}' if layer in (0, len(layers) - 1) else None
            axis.plot(run['health']['iter'], values, style, marker='.', label=label,
                      color=colormaps['viridis'](0.9 * layer / max(1, len(layers) - 1)))


def finish(axis, title, unit, scale):
    """Add title, unit of x, grid and readable ticks. Values that are close get a linear scale."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    axis.set(title=title, xlabel=unit)
    axis.xaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    axis.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    axis.grid(alpha=0.3)
    points = np.concatenate([np.empty((0, 2)), *(line.get_xydata() for line in axis.lines)])
    values = points[np.isfinite(points).all(axis=1), 1]
    ratio = values.max() / values[values > 0].min() if (values > 0).any() else 1
    if len(values) == 0:
        axis.text(0.5, 0.5, 'not in the log', ha='center', transform=axis.transAxes)
    elif scale == 'linear':
        axis.set_ylim(0, values.max() * 1.05 or 1)
    elif ratio > 1.5:
        axis.set_yscale('log')
        subs = ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9) if ratio < 6 else
                (1, 1.5, 2, 3, 4, 6, 8) if ratio < 20 else (1, 3))
        axis.yaxis.set(major_locator=LogLocator(subs=subs, numticks=99), minor_locator=NullLocator(),
                       major_formatter=StrMethodFormatter('{x:,g}'))


# ---------------------------------------------------------------------------- the sketch

def sketch(runs, width, height=16):
    """The losses against iterations as text, on a log scale."""
    points, legend = [], []
    for run, letter in zip(runs, itertools.cycle('abcdefghijklmnopqrstuvwxyz')):
        for part, key, mark in (('lines', 'loss', letter), ('evaluations', 'val_loss', letter.upper())):
            points += [(x, math.log(y), mark) for x, y in zip(run[part]['iter'], run[part][key]) if y > 0]
        legend.append(f'{letter.upper()} validation, {letter} each logged batch of {run["name"]}')
    last = max(x for x, _, _ in points) or 1
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    step = (high - low) / (height - 1) or 1
    grid = [[' '] * (width - 9) for _ in range(height)]
    for x, y, mark in sorted(points, key=lambda p: p[2].isupper()):  # validation on top
        grid[round((high - y) / step)][round(x / last * (width - 10))] = mark
    rows = [f'{math.exp(high - i * step):7.3f} |{"".join(row).rstrip()}' for i, row in enumerate(grid)]
    return '\n'.join([TITLES['loss'], *rows, '        +' + '-' * (width - 9),
                      f'{0:>9}{f"{last:g} iterations":>{width - 9}}', *legend])


runs = [read_run(folder) for folder in folders]
if len({run['name'] for run in runs}) < len(runs):
    runs = [run | {'name': os.path.normpath(folder)} for run, folder in zip(runs, folders)]
output = output or os.path.join(folders[0], 'comparison.png' if folders[1:] else 'loss.png')
if terminal:
    print(sketch(runs, shutil.get_terminal_size().columns))
if importlib.util.find_spec('matplotlib'):
    figure = draw(runs, health)
    with replacing(output) as temporary:
        figure.savefig(temporary, format='png', dpi=125)
    print(f'drawn to {output}')
elif not terminal:
    raise UserError('matplotlib is missing: pip install matplotlib, or --terminal=True for a sketch')
