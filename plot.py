"""
Draw runs from their log.jsonl.

    python plot.py out-a out-b                         # out-a/comparison.png: both, on the same axes
    python plot.py out-a --health=True --output=a.pdf  # with a number for each layer

A key with a number on any line of the log gets a panel; KEY, train_KEY and val_KEY share one. Thin lines go
through every logged value. Thick lines over them are means of 50 parts of the run.
"""

from configurator import configure  # import first: reports missing packages

import itertools
import json
import logging
import math
import os
import sys
import textwrap
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import replacing

# ---------------------------------------------------------------------------- settings

output = ''  # a .png, .svg or .pdf file; empty: loss.png in the run's folder, comparison.png for several runs
health = False  # add what train.py measured in each layer, and the share of clipped updates
low_priority = False  # let other processes go first

configure(globals(), args=[a for a in sys.argv[1:] if a.startswith('-')])
folders = [a for a in sys.argv[1:] if not a.startswith('-')]
if not folders:
    raise UserError('name at least one folder of a run: python plot.py out')
path = Path(output or Path(folders[0], 'comparison.png' if folders[1:] else 'loss.png'))
if path.suffix.lower() not in ('.png', '.svg', '.pdf'):
    raise UserError(f'output={output} must end in .png, .svg or .pdf')
if low_priority and hasattr(os, 'nice'):
    os.nice(19)

import matplotlib  # noqa: E402, takes half a second, so after os.nice
from matplotlib import colors, font_manager, ticker  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402, pyplot would look for a screen
from matplotlib.lines import Line2D  # noqa: E402

PANELS = {  # title and scale ('linear' starts at 0); a key that isn't here is its own title
    'loss': ('loss (nats/token)', 'log'),
    'bits_per_byte': ('bits per byte of text', 'log'),
    'lr': ('learning rate', 'linear'),
    'grad_norm': ('gradient norm, before clipping', 'log'),
    'tokens_per_s': ('throughput (tokens/s)', 'linear'),
    'clipped': ('share of clipped updates', 'linear'),
    'activation_rms': ('residual stream (RMS)', 'log'),
    'attention_logit': ('largest attention logit', 'log'),
    'update_ratio': ('update / weights (RMS)', 'log'),
}
HIDDEN = {'ms', 'mfu', 'slowest_rank', 'slowest_ms', 'median_ms'} | (set() if health else {'clipped'})
UNITS = {  # of horizontal axes; the largest of which a run has at least 2 is taken
    'iter': {1: 'iterations'},
    'tokens': {1e9: 'billions of tokens', 1e6: 'millions of tokens', 1e3: 'thousands of tokens', 1: 'tokens'},
    'seconds': {86400: 'training time (days)', 3600: 'training time (hours)', 60: 'training time (minutes)',
                1: 'training time (seconds)'},
}
STYLES = {
    'val': {'linewidth': 1.5, 'label': 'validation'},
    'train': {'linewidth': 1.2, 'linestyle': '--', 'label': 'training (same evaluation)'},
    'batch': {'linewidth': 0.6, 'alpha': 0.5, 'zorder': 0, 'label': 'training, each logged batch'},
    'mean': {'linewidth': 1.8, 'label': 'means of 50 parts'},
}
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')  # Okabe & Ito 2008
LOOKS = [*itertools.product('osD^vPX*', COLOURS)]  # markers and colours of runs


# ---------------------------------------------------------------------------- reading

def read_run(folder):
    """{(key, part): array of iterations and values (2, n)}. part: '', or the number of a layer."""
    log = Path(folder, 'log.jsonl')
    if not log.is_file():
        raise MissingFile(f'{log} is missing: name folders in which train.py wrote a log')
    found = defaultdict(dict, {(unit, ''): {0: 0} for unit in UNITS})
    for line in log.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            layers = entry.pop('health', {})
            entry |= layers if health else {}
        except (ValueError, TypeError, AttributeError, RecursionError):  # a crash may leave half a line
            continue
        at = entry.get('iter')
        for (key, part), value in numbers(entry) if is_number(at) else ():
            is_after = 'loss' in entry and key in ('tokens', 'seconds')  # they count the line's own update
            found[key, part][at + 1 if is_after else at] = value  # the last one counts
    if len(found) == len(UNITS):
        raise UserError(f'{log} has no numbers to draw')
    run = {name: np.array([[*points], [*points.values()]], dtype=float) for name, points in found.items()}
    return {name: points[:, points[0].argsort()] for name, points in run.items()}


def numbers(entry):
    """Yield the ((key, part), number)s of a line of the log that are drawn."""
    for key, values in entry.items():
        parts = enumerate(values) if isinstance(values, list) else (('', values),)
        for part, value in parts if key not in HIDDEN else ():
            if is_number(value):
                yield (key, part), value


def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e30  # NaN isn't


# ---------------------------------------------------------------------------- the picture

def draw(runs, names):
    """A matplotlib figure: the losses in a row, then rows of up to four panels."""
    found = dict.fromkeys(metric_of(key) for run in runs for key, _ in run if key not in UNITS)
    metrics = [*(m for m in PANELS if m in found), *(m for m in found if m not in PANELS)]
    first = [('loss', unit) for unit in UNITS if 'loss' in metrics]
    rest = [(m, 'seconds' if m == 'bits_per_byte' else 'iter') for m in metrics if m != 'loss']
    rows = [first, *np.array_split(np.array(rest), max(1, math.ceil(len(rest) / 4)))]
    rows = [row for row in rows if len(row)]
    figure = Figure(figsize=(12, 3 * len(rows)), layout='constrained')
    grid = figure.add_gridspec(len(rows), 12)
    for y, row in enumerate(rows):
        width = 12 // len(row)
        for x, (metric, unit) in enumerate(row):
            axis = figure.add_subplot(grid[y, width * x:width * (x + 1)])
            draw_panel(axis, runs, metric, unit)
    add_legends(figure, names)
    return figure


def metric_of(key):
    return key.removeprefix('train_').removeprefix('val_')


def draw_panel(axis, runs, metric, unit):
    """All that runs logged of a metric, against 'iter', 'tokens' or 'seconds'."""
    furthest = max(run[unit, ''][1].max() for run in runs)
    size = next(size for size in UNITS[unit] if furthest >= 2 * size or size == 1)
    for run, (marker, colour) in zip(runs, itertools.cycle(LOOKS)):
        curves = {name: points for name, points in run.items() if metric_of(name[0]) == metric}
        for (key, part), (at, values) in curves.items():
            x = np.interp(at, *run[unit, ''], right=math.nan) / size
            look = {'color': colour, 'marker': marker, 'markersize': 4, 'markevery': math.ceil(len(x) / 40)}
            if part != '':
                axis.plot(x, values, **look | {'color': shade(colour, (part + 1) / len(curves))})
            elif key.startswith('val_'):
                axis.plot(x, values, **look, **STYLES['val'])
            elif key.startswith('train_'):
                axis.plot(x, values, color=colour, **STYLES['train'])
            elif len(curves) > 1:
                axis.plot(x, values, color=colour, **STYLES['batch'])
            else:
                draw_alone(axis, x, values, look)
    title, scale = PANELS.get(metric, (metric, 'auto'))
    axis.set_title(wrap(title, 32), fontsize=11)
    axis.set_xlabel(UNITS[unit][size])
    axis.grid(alpha=0.3)
    set_scale(axis, scale)


def shade(colour, depth):
    """A paler colour. depth: above 0 for the first layer to 1 for the last."""
    return 1 - (1 - np.array(colors.to_rgb(colour))) * np.interp(depth, (0, 1), (0.25, 1))


def draw_alone(axis, x, values, look):
    """Values without evaluations beside them: means over what is noisy."""
    is_noisy = np.abs(np.diff(values)).sum() > 3 * np.ptp(values)
    has_markers = len(x) <= 20 or look['marker'] != LOOKS[0][0]
    look = look | STYLES['mean'] | ({} if has_markers else {'marker': ''})
    if len(x) <= 50 or not is_noisy:
        axis.plot(x, values, **look)
        return
    if not np.isin(values, (0, 1)).all():  # yes and no are readable as a share only
        axis.plot(x, values, color=look['color'], **STYLES['batch'])
    axis.plot(*([part.mean() for part in np.array_split(a, 50)] for a in (x, values)), **look)


def set_scale(axis, scale):
    """A log scale where values differ enough, plain numbers at the ticks."""
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    least = 1.5 if scale == 'log' else 100
    is_log = scale == 'log' or values.min() > 0
    axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    if scale == 'linear':
        axis.set_ylim(0, values.max() * 1.05 or 1)
    elif is_log and values.max() > least * min(values[values > 0], default=math.inf):
        axis.set_yscale('log', nonpositive='mask')
        low, high = axis.get_ylim()
        few = ticker.MaxNLocator(8, steps=[1, 2, 5, 10])
        axis.yaxis.set_major_locator(few if high < 10 * low else ticker.LogLocator(subs=(1, 3)))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(ticker.StrMethodFormatter('{x:,.10g}'))


def add_legends(figure, names):
    """An entry for each run above the panels, one for each kind of line below them."""
    runs = [Line2D([], [], color=colour, marker=marker, label=wrap(name, 60))
            for name, (marker, colour) in zip(names, itertools.cycle(LOOKS))]
    kinds = [Line2D([], [], color='black', marker='o' if kind == 'val' else '', **style)
             for kind, style in STYLES.items()]
    if health:
        kinds += [Line2D([], [], color=shade('black', depth), label=label)
                  for depth, label in ((0.2, 'first layer'), (1, 'last layer'))]
    for handles, place in ((runs, 'outside upper center'), (kinds, 'outside lower center')):
        column = figure.legend(handles=handles, loc=place)
        fitting = max(1, int(figure.bbox.width // column.get_window_extent().width))
        column.remove()
        n_rows = math.ceil(len(handles) / fitting)
        legend = figure.legend(handles=handles, loc=place, frameon=False, columnspacing=1,
                               ncols=math.ceil(len(handles) / n_rows))
        figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def wrap(text, width):
    """Lines of at most `width` characters, in fonts that have them; those that no font has are escaped."""
    missing = set(text) - set(map(chr, range(32, 127)))
    for font in font_manager.fontManager.ttflist if missing else ():
        if os.path.isfile(font.fname) and 'resort' not in font.name.lower():  # it has boxes for all characters
            known = missing & set(map(chr, font_manager.get_font(font.fname).get_charmap()))
            missing -= known
            matplotlib.rcParams['font.family'] += [font.name] if known else []
    text = text.translate({ord(c): c.encode('unicode_escape').decode() for c in missing})
    # the blank: matplotlib leaves out a label that begins with an underscore
    return textwrap.fill(text, width, initial_indent=' ', subsequent_indent=' ')


names = [unicodedata.normalize('NFC', Path(folder).resolve().name) for folder in folders]
if len(set(names)) < len(names):
    names = [os.path.normpath(folder) for folder in folders]
runs = [read_run(folder) for folder in folders]
logging.getLogger('fontTools').setLevel(logging.ERROR)  # it warns of tables that a PDF doesn't need
with matplotlib.rc_context({'text.parse_math': False, 'svg.fonttype': 'none', 'pdf.fonttype': 42}):
    figure = draw(runs, names)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=125)
    except OSError as error:
        raise UserError(f'{path} can\'t be written ({error.strerror}): name another file, '
                        'such as --output=loss.png') from None
print(f'drawn to {path}')
