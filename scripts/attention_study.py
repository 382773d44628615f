"""
Compare types of attention on one text: the same model, windows, seeds and settings for all.

    python scripts/attention_study.py                                 # a quarter of an hour on two CPU cores
    python scripts/attention_study.py --types=SM,GK --seeds=1 --max_iters=100
    python scripts/attention_study.py --data=out-attention-study/attention_study.json    # draw it again

Trains every type under config/attention_study.py, prints a table, and draws by how much the validation losses
differ from the first type's with the same seed. Runs that a stopped study has completed are kept.
"""

import sys
sys.path.insert(0, __file__.rpartition('attention_study.py')[0] + '..')

import json
import os
import statistics
import subprocess
from pathlib import Path

from configurator import ROOT, configure

types = 'SM,GK,GKpoly-2,GKpoly-4,GKpoly-8,PA_gelu,PA_relu,PA_sigmoid,PA_square,PA_relu-square,PA_silu'
seeds = 3
max_iters = 150
out_dir = 'out-attention-study'  # with a folder for each run
picture = 'attention_study.png'  # in out_dir, beside attention_study.json; needs matplotlib
data = ''  # the attention_study.json of a finished study: print and draw it, train nothing

configure(globals())


def train(attn_type, seed):
    """The log of a run, a list of dicts, and its peak memory in bytes; a completed run isn't repeated."""
    folder = ROOT / out_dir / f'{attn_type}-{max_iters}-{seed}'
    done = folder / 'done.json'
    if not done.is_file():
        command = [sys.executable, 'train.py', 'config/attention_study.py', f'--attn_type={attn_type}',
                   f'--seed={1337 + seed}', f'--max_iters={max_iters}', f'--lr_decay_iters={max_iters}',
                   f'--out_dir={folder}', '--plot=False']
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # POSIX: the memory of this process alone
        if status:
            raise SystemExit(f'failed: {" ".join(command)}')
        done.write_text(json.dumps(usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)))
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return lines, json.loads(done.read_text())


def summary(runs):
    """runs: what `train` returns, for each seed -> a type's figures, as attention_study.json holds them"""
    losses = {}
    for lines, _ in runs:
        for x in lines:
            if 'val_loss' in x:
                losses.setdefault(str(x['iter']), []).append(round(x['val_loss'], 5))
    return {'val_loss': losses,  # {iteration: the loss of each seed}
            'ms': round(statistics.median(x['ms'] for lines, _ in runs for x in lines if 'ms' in x), 1),
            'MiB': round(statistics.median(memory for _, memory in runs) / 2**20)}


def train_all():
    """{attn_type: its summary}"""
    runs = {}
    for seed in range(seeds):  # types in turn, so that a busy machine slows them alike
        for attn_type in types.split(','):
            runs.setdefault(attn_type, []).append(train(attn_type, seed))
            last = [x['val_loss'] for x in runs[attn_type][-1][0] if 'val_loss' in x][-1]
            print(f'{attn_type}, seed {seed}: {last:.4f}', flush=True)
    return {attn_type: summary(found) for attn_type, found in runs.items()}


def differences(study, attn_type, iteration):
    """Losses minus the first type's, seed by seed; the first type's own are minus their mean."""
    first, *_ = study
    losses, base = (study[name]['val_loss'][iteration] for name in (attn_type, first))
    return [loss - (statistics.mean(base) if attn_type == first else b) for loss, b in zip(losses, base)]


def print_table(study):
    first, *_ = study
    last = [*study[first]['val_loss']][-1]
    print(f'\n| attention | validation loss, mean | minus {first}\'s, mean | from - to | ms an iteration '
          '| peak memory |\n|---|---|---|---|---|---|')
    for attn_type, found in study.items():
        change = differences(study, attn_type, last)
        print(f'| {attn_type} | {statistics.mean(found["val_loss"][last]):.3f} '
              f'| {statistics.mean(change):+.3f} | {min(change):+.3f} to {max(change):+.3f} '
              f'| {found["ms"]:.0f} | {found["MiB"]} MiB |')


def draw(study):
    """A matplotlib figure: the differences at the last three evaluations, a row for each type, the best at
    the top. A small dot is a seed, a large one the mean."""
    from matplotlib.figure import Figure  # pyplot would look for a screen
    first, *_ = study
    iterations = [*study[first]['val_loss']][-3:]
    last, n_seeds = iterations[-1], len(study[first]['val_loss'][iterations[-1]])
    ranking = sorted(study, key=lambda t: (t != first, statistics.mean(differences(study, t, last))))
    figure = Figure(figsize=(9, 0.5 * len(study) + 1.8), layout='constrained')
    axes = figure.subplots()
    for k, iteration in enumerate(iterations, 1 - len(iterations)):  # darker and lower as the run goes on
        colour = {0: '#08306b', -1: '#4292c6', -2: '#9ecae1'}[k]
        for row, attn_type in enumerate(ranking):
            change, y = differences(study, attn_type, iteration), row + 0.24 * (k + 1)
            axes.plot([min(change), max(change)], [y, y], color=colour, linewidth=1.5)
            axes.plot(change, [y] * len(change), 'o', color=colour, markersize=3)
            axes.plot(statistics.mean(change), y, 'o', color=colour, markersize=7,
                      label=None if row else f'after {iteration} iterations')
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_yticks(range(len(ranking)), ranking)
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    axes.set(xlabel='nats a character', title=f'Validation loss minus that of {first} with the same seed\n'
             f'(mean and range of {n_seeds} seeds; {first} minus its own mean)')
    figure.legend(loc='outside lower center', ncols=len(iterations), frameon=False)
    return figure


if data:
    study = json.loads(Path(data).read_text())
else:
    study = train_all()
    (ROOT / out_dir / 'attention_study.json').write_text(json.dumps(study, indent=1))
print_table(study)
try:
    figure = draw(study)
    figure.savefig(ROOT / out_dir / picture, dpi=90)
except ImportError:
    print('no picture: it needs matplotlib')
