"""
What a run tells: lines on standard output, the same as JSON and to wandb where wanted, samples, pictures.

    log = RunLog('out/log.jsonl', first_iter=0)
    log.write({'iter': 0, 'loss': 10.9})
    pandas.read_json('out/log.jsonl', lines=True)
"""

import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import runtime
from dataset import replacing
from plan import duration

STYLES = {'bold': 1, 'cyan': 36}  # by their numbers in ECMA-48
line_is_live = False  # whether the terminal's last line waits to be replaced


# ---------------------------------------------------------------------------- standard output

def is_terminal():
    """Whether standard output goes to a terminal that knows ECMA-48's control sequences."""
    return (sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
            and (os.name != 'nt' or 'WT_SESSION' in os.environ))


def print0(text, live=False, style=None):
    """A line of the first process. On a terminal it may have a style (unless NO_COLOR is set), and a live one
    is cut to the terminal's width and gives way to the next."""
    global line_is_live
    if not is_terminal():
        runtime.print0(text)
        return
    if live:
        text = text[:shutil.get_terminal_size().columns - 1]
    if style and not os.environ.get('NO_COLOR'):
        text = f'\x1b[{STYLES[style]}m{text}\x1b[0m'
    runtime.print0('\r\x1b[K' * line_is_live + text, end='' if live else '\n')
    line_is_live = live


def keep_line():
    """Make the live line, if there is one, an ordinary one."""
    global line_is_live
    if line_is_live:
        runtime.print0()
    line_is_live = False


class Meter:
    """How fast a run is: its seconds, those of evaluations and saving aside, and the tokens of all processes.

    Processes wait for each other in the last backward pass of an iteration. What each needs until then is its
    own doing: the log has it of the slowest process and of the median one, to find out who holds up the rest.
    (With parallel=fsdp they wait in each layer, and all times are alike.)
    """

    def __init__(self, run, seconds=0.0, tokens=0):
        self.run, self.seconds, self.tokens = run, seconds, tokens
        self.times = []  # seconds an iteration, a number for each lap
        self.begin_lap()

    def begin_lap(self):
        self.clock, self.n_iters, self.tokens_before = time.perf_counter(), 0, self.tokens

    @contextmanager
    def pause(self):
        """What is done within it doesn't count. Gives the seconds until then."""
        self.run.synchronize()
        begin = time.perf_counter()
        yield self.seconds + begin - self.clock
        self.clock += time.perf_counter() - begin

    def begin_iteration(self):
        self.begin = self.run.moment()

    def begin_waiting(self):
        """From here on this process may have to wait for others."""
        self.ready = self.run.moment()

    def end_iteration(self, tokens):
        self.n_iters += 1
        self.tokens += tokens

    def lap(self):
        """What the log says of the iterations since the last call. All processes call it."""
        own = self.run.gather(self.run.ms_between(self.begin, self.ready))
        dt = (time.perf_counter() - self.clock) / self.n_iters
        rate = (self.tokens - self.tokens_before) / self.n_iters / dt
        self.times.append(dt)
        self.seconds += dt * self.n_iters
        self.begin_lap()
        entry = {'seconds': self.seconds, 'tokens': self.tokens, 'ms': dt * 1000, 'tokens_per_s': rate}
        return entry if len(own) == 1 else entry | {
            'slowest_rank': own.index(max(own)), 'slowest_ms': max(own), 'median_ms': statistics.median(own)}


class Progress:
    """The line that a run prints for a logged iteration."""

    def __init__(self, last_iter):
        self.last_iter, self.first_iter, self.begin = last_iter, None, None

    def show(self, entry):
        """entry: what the log gets. The time left: at the pace since the first call, evaluations and all."""
        i, now = entry['iter'], time.perf_counter()
        mfu = 'n/a' if math.isnan(entry['mfu']) else f'{entry["mfu"]:.2f}%'
        parts = [f'time {entry["ms"]:.2f}ms', f'mfu {mfu}', f'lr {entry["lr"]:.2e}',
                 f'norm {entry["grad_norm"]:.2f}', f'{entry["tokens_per_s"]:.0f} tokens/s']
        if entry.get('slowest_ms', 0) - entry.get('median_ms', 0) > 0.1 * entry['ms']:
            parts.append(f'rank {entry["slowest_rank"]} holds up the others: {entry["slowest_ms"]:.2f}ms by '
                         f'itself, median {entry["median_ms"]:.2f}ms')
        if self.begin is None:
            self.first_iter, self.begin = i, now
        else:
            pace = (now - self.begin) / (i - self.first_iter)
            parts.append(f'{duration(pace * (self.last_iter - i))} left')
        if is_terminal():
            parts.reverse()  # a narrow one cuts off what matters least
        print0(f'iter {i}: loss {entry["loss"]:.4f}, {", ".join(parts)}', live=True)


def show_sample(model, tokenizer, prompt, run, iteration, seed):
    """Print and return what the model writes after `prompt`, token ids, in one window. The draws follow from
    `seed`, not from torch's generator, which is the training's."""
    idx = torch.tensor([prompt], device=run.device)  # (1, T)
    length = min(200, model.config.block_size - len(prompt))
    # compiled for whole batches, the model would be compiled anew for every length
    eager = torch.compiler.set_stance('force_eager') if run.compile else nullcontext()
    model.eval()
    with eager, run.autocast():
        ids = model.generate(idx, length, 0.8, top_k=200, n_vocab=tokenizer.n_vocab, seeds=[seed])
    model.train()
    text = tokenizer.decode(ids[0].tolist())
    print0(f'sample at iteration {iteration}:\n{text}\n---------------', style='cyan')
    return text


# ---------------------------------------------------------------------------- files and services

class RunLog:
    """A file of JSON lines that a resumed run goes on with, each iteration in it once.

    The lines from `first_iter` on, which the resumed run will write again, are removed. Where the disk is
    full, lines wait in memory for the next one. path: None writes nothing. wandb: gets each entry too.
    """

    def __init__(self, path, first_iter=0, wandb=None):
        self.file, self.waiting, self.failed = None, b'', False
        self.measured, self.wandb = [], wandb
        if path is None:
            return
        path = Path(path)
        lines = path.read_bytes().splitlines() if first_iter and path.is_file() else []
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(b''.join(line + b'\n' for line in lines if is_before(line, first_iter)))
        except OSError as error:
            print0(f'{path} could not be written: {error}')
        self.file = open(path, 'ab', buffering=0)  # noqa: SIM115, open till the end; a crash loses none

    def write(self, entry):
        """entry: a dict of plain values, with the iteration as 'iter'. JSON has no nan: such are left out."""
        self.write_measured()
        if self.wandb is not None:
            self.wandb.log(entry)
        if self.file is not None:
            known = {k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)}
            self.waiting += json.dumps(known).encode() + b'\n'
            self.write_waiting()

    def write_later(self, iteration, health):
        """Tensors by name, which may still be added to. They are fetched from the device before the next line
        is written, when it is waited for anyway."""
        self.measured.append((iteration, health))

    def write_measured(self):
        measured, self.measured = self.measured, []
        for iteration, health in measured:
            health = {name: t.tolist() for name, t in health.items()}
            if count := sum(health.get('out_of_range', ())):
                print0(f'iteration {iteration}: {count:,} squared distances of the attention lie beyond the '
                       'range of its polynomial, which rises again there: take a larger n')
            self.write({'iter': iteration, 'health': health})

    def write_waiting(self):
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]
            self.failed = False
        except OSError as error:
            if not self.failed:
                print0(f'{self.file.name} could not be written ({error.strerror}): its lines wait in memory')
            self.failed = True

    def close(self):
        keep_line()
        self.write_measured()
        if self.file is not None:
            self.write_waiting()
            self.file.close()


def is_before(line, first_iter):
    try:
        return json.loads(line)['iter'] < first_iter
    except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
        return False


class Wandb:
    """A service that the run doesn't depend on: where it fails, the run says so and goes on without.

    settings: arguments of wandb.init, or None for no service.
    """

    def __init__(self, settings):
        self.is_on = settings is not None
        self.samples = []
        if self.is_on:
            self.call('init', **settings)

    def call(self, function, *args, **kwargs):
        if self.is_on:
            try:
                import wandb
                return getattr(wandb, function)(*args, **kwargs)
            except Exception as error:
                self.is_on = False
                print0(f'wandb is off from here on: {type(error).__name__}: {error}')
        return None

    def log(self, entry):
        """A line of the log; lists, one number a layer, as health/NAME/LAYER."""
        if self.is_on:
            names = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}
            lists = entry.get('health', {})
            self.call('log', {names.get(k, k): v for k, v in entry.items() if k != 'health'}
                      | {f'health/{k}/{layer}': v for k in lists for layer, v in enumerate(lists[k])})

    def log_sample(self, iteration, text):
        """All samples so far, as a table."""
        if self.is_on:
            self.samples.append([iteration, text])
            table = self.call('Table', columns=['iter', 'text'], data=self.samples)
            self.call('log', {'iter': iteration, 'samples': table})


class Drawing:
    """A Python program that draws beside the run, which doesn't wait for it, one at a time.

    arguments: the program's path and what follows, or None. Where matplotlib is missing nothing is drawn;
    where the program fails the run says so, and draws no more.
    """

    def __init__(self, arguments):
        self.arguments = arguments if importlib.util.find_spec('matplotlib') else None
        self.process, self.is_late = None, False

    def start(self):
        """Draw, unless the last drawing is still under way."""
        self.is_late = self.is_busy()
        if self.arguments and not self.is_late:
            try:
                # out of reach of Ctrl-C, but in the same session, in which alone Linux may heed its priority
                self.process = subprocess.Popen(
                    [sys.executable, *self.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True, process_group=0)
            except OSError as error:
                self.give_up(error)

    def is_busy(self, patience=0.0):
        """Whether a drawing is still under way after `patience` seconds."""
        if self.process is not None:
            try:
                _, message = self.process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                return True
            if self.process.returncode:
                self.give_up((message.strip().splitlines() or ['no reason given'])[-1])
            self.process = None
        return False

    def give_up(self, reason):
        self.arguments = None
        print0(f'no pictures from here on: {reason}')

    def close(self, patience):
        """Draw the last evaluation too, if it came too early; wait `patience` seconds, then let it go on."""
        if self.is_late:
            if self.is_busy():
                self.process.kill()
                self.process.communicate()
                self.process = None
            self.start()
        self.is_busy(patience)
