"""
Draw runs from their log.jsonl.

    python plot.py out-a out-b                         # on the same axes: out-a/comparison.png
    python plot.py out-a --health=True --output=a.pdf  # with a number for each layer

Every key with a number on any line of the log gets a panel; KEY, train_KEY and val_KEY share one.
Thin lines go through every logged value, thick lines over them are means of 50 parts of the run.
"""

from configurator import configure, is_option  # import first: reports missing packages

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

output = ''  # .png, .svg or .pdf; empty: in the first folder, loss.png or comparison.png
health = False  # add what train.py measured in each layer, and the share of clipped updates
low_priority = False  # let other processes go first

configure(globals(), args=[a for a in sys.argv[1:] if is_option(a)])
folders = [a for a in sys.argv[1:] if not is_option(a)]
if not folders:
    raise UserError('name at least one folder of a run: python plot.py out')
path = Path(output or Path(folders[0], 'comparison.png' if folders[1:] else 'loss.png'))
if path.suffix.lower() not in ('.png', '.svg', '.pdf'):
    raise UserError(f'output={output} must end in .png, .svg or .pdf')
if low_priority and hasattr(os, 'nice'):
    os.nice(19)

from matplotlib import font_manager, rc_context, rcParams, ticker  # noqa: E402, slow
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
HIDDEN = {'ms', 'mfu', 'slowest_rank', 'slowest_ms', 'median_ms', '' if health else 'clipped'}
UNITS = {  # of horizontal axes; the largest of which a run has at least 2 is taken
    'iter': {1: 'iterations'},
    'tokens': {10**9: 'billions of tokens', 10**6: 'millions of tokens', 1: 'tokens'},
    'seconds': {86400: 'training time (days)', 3600: 'training time (hours)',
                60: 'training time (minutes)', 1: 'training time (seconds)'},
}
STYLES = {
    'val': {'linewidth': 1.5, 'label': 'validation'},
    'train': {'linewidth': 1.2, 'label': 'training (same evaluation)', 'marker': '',
              'linestyle': '--'},
    'batch': {'linewidth': 0.6, 'label': 'training, each logged batch', 'marker': '',
              'alpha': 0.5, 'zorder': 1},
    'mean': {'linewidth': 1.8, 'label': 'means of 50 parts', 'marker': ''},
}
# Okabe & Ito 2008
COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'
LOOKS = [{'color': colour, 'marker': marker, 'markersize': 4}
         for marker, colour in itertools.product('osD^vPX*', COLOURS)]


# ---------------------------------------------------------------------------- reading

def read_run(folder):
    """{metric: {kind: iterations and values (2, n)}}. kind: 'val', 'train', 'batch' or a layer."""
    log = Path(folder, 'log.jsonl')
    if not log.is_file():
        raise MissingFile(f'{log} is missing: name folders in which train.py wrote a log')
    found = defaultdict(dict, {(unit, 'batch'): {0: 0} for unit in UNITS})
    for line in log.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            layers = entry.pop('health', {})
            entry |= layers if health else {}
        except (ValueError, TypeError, AttributeError, RecursionError):  # as after a crash
            continue
        at = entry.get('iter')
        for (key, kind), value in numbers(entry) if is_number(at) else ():
            is_after = key in ('tokens', 'seconds') and 'loss' in entry  # they count the update
            found[key, kind][at + 1 if is_after else at] = value  # the last one counts
    if len(found) == len(UNITS):
        raise UserError(f'{log} has no numbers to draw')
    run = defaultdict(dict)
    for (key, kind), points in found.items():
        split, _, metric = key.partition('_')
        metric, kind = (metric, split) if split in ('train', 'val') else (key, kind)
        points = np.array([[*points], [*points.values()]], dtype=float)
        run[metric][kind] = points[:, points[0].argsort()]
    return run


def numbers(entry):
    """Yield the ((key, kind), number)s of a line of the log that are drawn."""
    for key, values in entry.items():
        kinds = enumerate(values) if isinstance(values, list) else (('batch', values),)
        for kind, value in kinds if key not in HIDDEN else ():
            if is_number(value):
                yield (key, kind), value


def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e30  # NaN isn't


# ---------------------------------------------------------------------------- the picture

def draw(runs, names):
    """A matplotlib figure: the losses in a row, then rows of up to four panels."""
    found = dict.fromkeys(metric for run in runs for metric in run if metric not in UNITS)
    metrics = [*(m for m in PANELS if m in found), *(m for m in found if m not in PANELS)]
    losses = [('loss', unit) for unit in UNITS if 'loss' in found]
    rest = [(m, 'seconds' if m == 'bits_per_byte' else 'iter') for m in metrics if m != 'loss']
    rows = [losses, *np.array_split(np.array(rest), max(1, math.ceil(len(rest) / 4)))]
    rows = [row for row in rows if len(row)]
    figure = Figure(figsize=(12, 3 * len(rows)), layout='constrained')
    for row, cell in zip(rows, figure.add_gridspec(len(rows), 1)):
        for (metric, unit), place in zip(row, cell.subgridspec(1, len(row))):
            draw_panel(figure.add_subplot(place), runs, metric, unit)
    add_legends(figure, names)
    return figure


def draw_panel(axis, runs, metric, unit):
    """All that runs logged of a metric, against 'iter', 'tokens' or 'seconds'."""
    furthest = max(run[unit]['batch'][1].max() for run in runs)
    size = next(size for size in UNITS[unit] if furthest >= 2 * size or size == 1)
    for run, look in zip(runs, itertools.cycle(LOOKS)):
        curves = run.get(metric, {})
        for kind, (at, values) in curves.items():
            x = np.interp(at, *run[unit]['batch'], right=math.nan) / size
            look = look | {'markevery': math.ceil(len(x) / 40)}
            if kind not in STYLES:  # a layer, the first ones paler
                axis.plot(x, values, **look, alpha=np.interp(kind + 1, (0, len(curves)), (0.2, 1)))
            elif kind != 'batch' or len(curves) > 1:
                axis.plot(x, values, **look | STYLES[kind])
            else:
                draw_alone(axis, x, values, look)
    title, scale = PANELS.get(metric, (metric, 'auto'))
    axis.set_title(wrap(title, 32), fontsize=11)
    axis.set_xlabel(UNITS[unit][size])
    axis.grid(alpha=0.3)
    set_scale(axis, scale)


def draw_alone(axis, x, values, look):
    """Values without evaluations beside them, with means over what is noisy."""
    has_markers = len(x) <= 20 or look['marker'] != LOOKS[0]['marker']
    style = look | STYLES['mean'] | {'marker': look['marker'] if has_markers else ''}
    if len(x) > 50 and np.abs(np.diff(values)).sum() > 3 * np.ptp(values):
        if not np.isin(values, (0, 1)).all():  # yes and no are readable as a share only
            axis.plot(x, values, **look | STYLES['batch'])
        x, values = ([part.mean() for part in np.array_split(a, 50)] for a in (x, values))
    axis.plot(x, values, **style)


def set_scale(axis, scale):
    """A log scale where values differ enough, plain numbers at the ticks."""
    axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    low, high = min(values[values > 0], default=math.inf), values.max()
    if scale == 'linear':
        axis.set_ylim(0, high * 1.05 or 1)
    elif high > 1.5 * low and scale == 'log' or high > 100 * low and values.min() > 0:
        axis.set_yscale('log', nonpositive='mask')
        few, many = ticker.MaxNLocator(8, steps=[1, 2, 5, 10]), ticker.LogLocator(subs=(1, 3))
        axis.yaxis.set_major_locator(few if high < 8 * low else many)
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(ticker.StrMethodFormatter('{x:,.10g}'))


def add_legends(figure, names):
    """An entry for each run above the panels, one for each kind of line below them."""
    runs = [look | {'label': wrap(name, 60)} for name, look in zip(names, itertools.cycle(LOOKS))]
    kinds = [*STYLES.values()]
    if health:
        kinds += [{'label': 'first layer', 'alpha': 0.4}, {'label': 'last layer'}]
    kinds = [LOOKS[0] | {'color': 'black'} | kind for kind in kinds]
    for entries, place in ((runs, 'outside upper center'), (kinds, 'outside lower center')):
        handles = [Line2D([], [], **entry) for entry in entries]
        column = figure.legend(handles=handles, loc=place)
        n_columns = max(1, figure.bbox.width // column.get_window_extent().width)
        column.remove()
        legend = figure.legend(handles=handles, loc=place, frameon=False, columnspacing=1,
                               ncols=math.ceil(len(handles) / math.ceil(len(handles) / n_columns)))
        height = legend.get_window_extent().height / figure.dpi
        figure.set_figheight(figure.get_figheight() + height)


def wrap(text, width):
    """Lines of at most `width` characters, in any fonts that have them, else escaped."""
    missing = set(text) - set(map(chr, range(32, 127)))
    for font in font_manager.fontManager.ttflist if missing else ():
        if 'Resort' in font.name or not os.path.isfile(font.fname):  # Last Resort has boxes for all
            continue
        known = missing.intersection(map(chr, font_manager.get_font(font.fname).get_charmap()))
        missing -= known
        rcParams['font.family'] = rcParams['font.family'] + [font.name] * bool(known)
    text = text.translate({ord(c): c.encode('unicode_escape').decode() for c in missing})
    # the blank: matplotlib leaves out a label that begins with an underscore
    return textwrap.fill(text, width, initial_indent=' ', subsequent_indent=' ')


names = [unicodedata.normalize('NFC', os.path.basename(os.path.realpath(folder))) for folder in folders]
if len(set(names)) < len(names):
    names = [os.path.normpath(folder) for folder in folders]
runs = [read_run(folder) for folder in folders]
logging.getLogger('fontTools').setLevel(logging.ERROR)  # warns of tables that a PDF doesn't need
with rc_context({'text.parse_math': False, 'svg.fonttype': 'none', 'pdf.fonttype': 42}):
    figure = draw(runs, names)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=125)
    except OSError as error:
        raise UserError(f'{path} can\'t be written ({error.strerror}): change --output') from None
print(f'drawn to {path}')
