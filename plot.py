"""
Draw runs from the log.jsonl in their folders, as a picture, and as a sketch in the terminal.

    python plot.py out-a out-b                    # out-a/loss.png: both, on the same axes
    python plot.py out-a --health=True --output=a.png
    python plot.py out-a --terminal=True          # the sketch needs no matplotlib

Nothing is smoothed: thin lines go through every logged value.
"""

import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from configurator import configure
from dataset import replacing

# ---------------------------------------------------------------------------- settings

output = ''  # the PNG file; empty: loss.png in the first folder
health = False  # what train.py measured inside the network, too
terminal = False  # a sketch of the loss on standard output, too
low_priority = False  # leave the processor to whoever else wants it

configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
folders = [a for a in sys.argv[1:] if not a.startswith('-')]
if not folders:
    raise ValueError('name at least one folder of a run: python plot.py out')
output = output or os.path.join(folders[0], 'loss.png')
if low_priority and hasattr(os, 'nice'):
    os.nice(19)

COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')  # Okabe & Ito 2008
LINE_STYLES = ('-', '--', ':', '-.')
UNITS = {  # the largest that gives numbers above 2
    'iter': ((1, 'iterations'),),
    'tokens': ((1e9, 'billions of tokens'), (1e6, 'millions of tokens'), (1, 'tokens')),
    'seconds': tuple((s, f'training time ({u}), without evaluations') for s, u in
                     ((86400, 'days'), (3600, 'hours'), (60, 'minutes'), (1, 'seconds'))),
}

# ---------------------------------------------------------------------------- reading

def read_run(folder):
    """{'name', 'lines': {key: values}, 'evaluations': the same, 'health': {name: (n, n_layer)}}, in the order of
    iterations, NaN where an entry lacks a number."""
    path = Path(folder, 'log.jsonl')
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: name folders in which train.py has kept a log')
    kinds = {'loss': {}, 'val_loss': {}, 'health': {}}  # {iteration: entry}, so that the last one counts
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            for kind in kinds:
                if kind in entry:
                    kinds[kind][int(entry['iter'])] = entry
        except (ValueError, TypeError, KeyError):  # the last line of a process that was killed
            continue
    lines, evaluations, vitals = ([found[i] for i in sorted(found)] for found in kinds.values())
    if not lines and not evaluations:
        raise ValueError(f'{path} has no losses to draw')
    keys = ('iter', 'loss', 'lr', 'grad_norm', 'tokens_per_s', 'ms', 'seconds', 'tokens', 'clipped')
    run = {'name': os.path.normpath(folder), 'lines': columns(lines, keys),
           'evaluations': columns(evaluations, ('iter', 'train_loss', 'val_loss', 'seconds', 'tokens')),
           'health': {'iter': [e['iter'] for e in vitals]}}
    a = run['lines']
    with np.errstate(invalid='ignore'):  # older logs don't count the tokens
        counted = np.cumsum(a['tokens_per_s'] * a['ms'] / 1000 * np.diff(a['iter'], prepend=-1))
    a['tokens'] = np.where(np.isnan(a['tokens']), counted, a['tokens'])
    for name in ('activation_rms', 'attention_logit', 'update_ratio'):
        rows = [e['health'].get(name) or [math.nan] for e in vitals]
        width = max(map(len, rows), default=0)
        run['health'][name] = np.array([row + [math.nan] * (width - len(row)) for row in rows], dtype=float)
    return run


def columns(entries, keys):
    return {k: np.array([number(e.get(k)) for e in entries]) for k in keys}


def number(value):
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def progress(run, key, iterations):
    """How many `key` ('tokens' or 'seconds') the updates before each of `iterations` took, NaN if unknown."""
    if key == 'iter':
        return iterations
    a, e = run['lines'], run['evaluations']
    at = np.concatenate(([0], a['iter'] + 1, e['iter']))  # a line is written after its update
    values = np.concatenate(([0], a[key], e[key]))
    known = np.isfinite(values)
    at, first = np.unique(at[known], return_index=True)
    if len(at) < 2:
        return np.full(len(iterations), math.nan)
    return np.interp(iterations, at, values[known][first], right=math.nan)

# ---------------------------------------------------------------------------- the picture

def draw(runs, with_health):
    """A matplotlib figure: loss three times, learning rate, gradient norm, throughput, and what health has."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    rows = ['AAAABBBBCCCC', 'DDDDEEEEFFFF'] + ['GGGHHHIIIJJJ'] * with_health
    figure = Figure(figsize=(15, 4 * len(rows) + 0.6), layout='constrained')
    panels = figure.subplot_mosaic('\n'.join(rows))
    for panel, key in zip('ABC', ('iter', 'tokens', 'seconds')):
        draw_loss(panels[panel], runs, key)
    of_lines = {'D': ('lr', 'learning rate', 'linear'),
                'E': ('grad_norm', 'gradient norm, before clipping', 'log'),
                'F': ('tokens_per_s', 'throughput (tokens/s)', 'linear'),
                'G': ('clipped', 'share of updates that were clipped', 'linear')}
    of_layers = {'H': ('activation_rms', 'residual stream (root mean square)'),
                 'I': ('attention_logit', 'largest attention logit'),
                 'J': ('update_ratio', 'update / weights (root mean squares)')}
    for panel, (key, title, scale) in of_lines.items():
        if panel in panels:
            for run, colour in zip(runs, itertools.cycle(COLOURS)):
                panels[panel].plot(run['lines']['iter'], run['lines'][key], color=colour, linewidth=0.8)
            finish(panels[panel], title, 'iterations', scale)
    for panel, (key, title) in of_layers.items():
        if panel in panels:
            draw_layers(panels[panel], runs, key)
            finish(panels[panel], title, 'iterations', 'log')
    add_legend(figure, runs)
    return figure


def draw_loss(axis, runs, key):
    """Each run's losses against 'iter', 'tokens' or 'seconds'."""
    places = [[progress(run, key, run[part]['iter']) for part in ('lines', 'evaluations')] for run in runs]
    known = [x for x in np.concatenate([*itertools.chain(*places), [0]]) if math.isfinite(x)]
    size, unit = next(((s, u) for s, u in UNITS[key] if max(known) >= 2 * s), UNITS[key][-1])
    for run, (at, at_evaluations), colour in zip(runs, places, itertools.cycle(COLOURS)):
        evaluations = run['evaluations']
        axis.plot(at / size, run['lines']['loss'], color=colour, linewidth=0.5, alpha=0.35)
        axis.plot(at_evaluations / size, evaluations['train_loss'], '--', color=colour, linewidth=1.2)
        axis.plot(at_evaluations / size, evaluations['val_loss'], 'o-', color=colour, linewidth=1.5, markersize=3)
    finish(axis, 'loss (nats/token)', unit, 'log')


def draw_layers(axis, runs, key):
    """A line for each layer, dark for the first, light for the last; runs differ by their style."""
    from matplotlib import colormaps
    for run, style in zip(runs, itertools.cycle(LINE_STYLES)):
        n_layer = run['health'][key].shape[-1]
        for layer, values in enumerate(run['health'][key].T):
            label = f'layer {layer} of {run["name"]}' if layer in (0, n_layer - 1) else None
            axis.plot(run['health']['iter'], values, style, marker='.', label=label,
                      color=colormaps['viridis'](0.9 * layer / max(1, n_layer - 1)))


def finish(axis, title, unit, scale):
    """Title, unit of x, grid and readable ticks; a log scale where the values differ by more than a half."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    values = np.concatenate([line.get_ydata() for line in axis.lines] or [[]])
    values = values[np.isfinite(values)]
    axis.set(title=title, xlabel=unit)
    axis.grid(alpha=0.3)
    if len(values) == 0:
        axis.text(0.5, 0.5, 'not in the log', ha='center', transform=axis.transAxes)
    elif scale == 'linear':
        axis.set_ylim(0, max(values.max() * 1.05, 1e-9))
    elif values.min() > 0 and values.max() / values.min() > 1.5:
        steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if values.max() / values.min() < 10 else (1, 3)
        axis.set_yscale('log')
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=99))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))


def add_legend(figure, runs):
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=colour, linewidth=4, label=run['name'])
               for run, colour in zip(runs, itertools.cycle(COLOURS))]
    handles += [Line2D([], [], color='grey', marker='o', markersize=3, label='validation, at evaluations'),
                Line2D([], [], color='grey', linestyle='--', label='training, at evaluations'),
                Line2D([], [], color='grey', linewidth=0.5, label='training, each logged batch')]
    figure.legend(handles=handles, loc='outside upper center', ncols=5, frameon=False)
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize='x-small')


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
    return '\n'.join(['loss (nats/token)', *rows, '        +' + '-' * (width - 9),
                      f'{0:>9}{f"{last:g} iterations":>{width - 9}}', *legend])


runs = [read_run(folder) for folder in folders]
if terminal:
    print(sketch(runs, shutil.get_terminal_size().columns))
if importlib.util.find_spec('matplotlib'):
    with replacing(output) as temporary:
        draw(runs, health).savefig(temporary, format='png', dpi=100)
    print(f'drawn to {output}')
elif not terminal:
    raise ValueError('matplotlib is missing: pip install matplotlib, or --terminal=True for a sketch')
