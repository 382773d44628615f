"""
Compare types of attention on one text: the same model, windows, seeds and settings for all.

    python scripts/attention_study.py                                 # a quarter of an hour on two CPU cores
    python scripts/attention_study.py --types=SM,GK --seeds=1 --max_iters=100

Trains every type under config/attention_study.py, prints a table and draws the validation losses. Runs that
a stopped study has completed are kept.
"""

import sys
sys.path.insert(0, __file__.rpartition('attention_study.py')[0] + '..')

import json
import os
import statistics
import subprocess

from configurator import ROOT, configure

types = 'SM,GK,GKpoly-2,GKpoly-4,GKpoly-8,PA_gelu,PA_relu,PA_sigmoid,PA_square,PA_relu-square,PA_silu'
seeds = 3
max_iters = 150
out_dir = 'out-attention-study'  # with a folder for each run
picture = 'attention_study.png'  # in out_dir; needs matplotlib

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


def train_all():
    """{attn_type: what `train` returns, for each seed}"""
    runs = {}
    for seed in range(seeds):  # types in turn, so that a busy machine slows them alike
        for attn_type in types.split(','):
            runs.setdefault(attn_type, []).append(train(attn_type, seed))
            last = [x['val_loss'] for x in runs[attn_type][-1][0] if 'val_loss' in x][-1]
            print(f'{attn_type}, seed {seed}: {last:.4f}', flush=True)
    return runs


def curve(logs):
    """{iteration: the validation loss of each seed}"""
    found = {}
    for lines in logs:
        for x in lines:
            if 'val_loss' in x:
                found.setdefault(x['iter'], []).append(x['val_loss'])
    return found


def print_table(runs):
    print(f'\n| attention | validation loss, mean of {seeds} | from - to | ms an iteration | peak memory |')
    print('|---|---|---|---|---|')
    for attn_type, found in runs.items():
        last = curve(lines for lines, _ in found)[max_iters]
        ms = statistics.median(x['ms'] for lines, _ in found for x in lines if 'ms' in x)
        memory = statistics.median(m for _, m in found) / 2**20
        print(f'| {attn_type} | {statistics.mean(last):.4f} | {min(last):.4f} - {max(last):.4f} | {ms:.0f} '
              f'| {memory:.0f} MiB |')


def draw(curves, path):
    """Mean validation losses over iterations, the best type first in the legend."""
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout='constrained')
    ranking = sorted(curves.items(), key=lambda item: statistics.mean(item[1][max_iters]))
    for i, (attn_type, losses) in enumerate(ranking):
        at = sorted(set(losses) - {0})
        axes.plot(at, [statistics.mean(losses[n]) for n in at], label=attn_type, marker='osD^v<>PX*h'[i % 11],
                  color=pyplot.get_cmap('tab20')(i))
    axes.set(xlabel='iterations', ylabel=f'validation loss (nats a character), mean of {seeds} seeds',
             title='Types of attention at equal tokens')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


runs = train_all()
print_table(runs)
try:
    draw({attn_type: curve(lines for lines, _ in found) for attn_type, found in runs.items()},
         ROOT / out_dir / picture)
except ImportError:
    print('no picture: it needs matplotlib')
