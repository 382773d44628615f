"""
What a run reports: lines on standard output, in log.jsonl and to wandb; samples; its picture.

    log = RunLog(settings, run, first_iter=0, wandb_id='1234abcd')
    log.iteration({'iter': 0, 'loss': 10.9})     # any further key goes to log.jsonl, wandb and the picture
    log.close(patience=10)
    print0(log.summary({'seconds': 12.5}))       # the run's last lines
    pandas.read_json('out/log.jsonl', lines=True)
"""

import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from support.errors import UserError
from support.machine.console import ROOT, keep_line, print0
from support.machine.files import read_bytes, regular_file, replacing
from support.sampling import decoding
from support.training.plan import duration


class RunLog:
    """All that a run reports. settings: train.py's. first_iter, wandb_id: the run's, where it goes on."""

    def __init__(self, settings, run, first_iter, wandb_id):
        is_writing = run.is_master
        out_dir = settings['out_dir']
        wandb = {'project': settings['wandb_project'], 'name': settings['wandb_run_name'],
                 'config': dict(settings), 'id': wandb_id, 'resume': 'allow'}
        draw = [str(ROOT / 'plot.py'), out_dir, '--low_priority=True']
        board = Path(out_dir, 'tensorboard') if is_writing and settings.get('tensorboard') else None
        self.board = open_tensorboard(board, first_iter)
        self.wandb = Wandb(wandb if is_writing and settings['wandb_log'] else None)
        self.lines = JsonLines(Path(out_dir, 'log.jsonl') if is_writing else None, first_iter)
        self.drawing = Drawing(draw if is_writing and settings['plot'] else None)
        self.progress = Progress(settings['max_iters'])
        self.first_iter, self.vitals = first_iter, []

    def iteration(self, entry):
        """entry: a dict of plain values, with the iteration as 'iter'."""
        self.progress.show(entry)
        self.write(entry)

    def evaluation(self, entry):
        self.lines.keep()
        self.write(entry)
        if entry['iter'] > self.first_iter:
            self.drawing.start()

    def write(self, entry):
        """NaN and infinities, which JSON lacks, are left out."""
        vitals, self.vitals = self.vitals, []
        for iteration, tensors in vitals:
            self.write(health_entry(iteration, tensors))
        self.wandb.log(entry)
        if self.board is not None:
            write_scalars(self.board, entry)
        self.lines.write({k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)})

    def write_later(self, iteration, vitals):
        """vitals: tensors by name; more may be added. They are copied from the device when the next line is
        written, which waits for the device anyway."""
        if vitals:
            self.vitals.append((iteration, vitals))

    def sample(self, iteration, text):
        print0(f'sample at iteration {iteration}:\n{text}\n---------------', style='cyan')
        self.wandb.log_sample(iteration, text)

    def close(self, patience):
        """patience: seconds to wait for the last picture."""
        keep_line()
        for iteration, tensors in self.vitals:
            self.lines.write(health_entry(iteration, tensors))
        self.lines.close()
        self.wandb.call('finish')
        if self.board is not None:
            self.board.close()
        self.drawing.close(patience)

    def summary(self, figures):
        """The best evaluation and some figures, for programs to read: a `name: value` a line."""
        evaluations = [e for e in self.lines.entries('val_loss')
                       if isinstance(e.get('val_loss'), int | float)]
        best = min(evaluations, key=lambda e: e['val_loss'], default={})
        names = {'val_loss': 'best_val_loss', 'iter': 'best_iter',
                 'val_bits_per_byte': 'best_val_bits_per_byte'}
        found = {names[k]: best[k] for k in names if isinstance(best.get(k), int | float)} | figures
        return '\n'.join(f'{name}: {round(value, 6)}' for name, value in found.items()
                         if value is not None)


def health_entry(iteration, tensors):
    """What `measure_vitals` found, as an entry of the log."""
    health = {name: t.tolist() for name, t in tensors.items()}
    if count := sum(health.get('out_of_range', ())):
        print0(f'iteration {iteration}: {count:,} squared distances of the attention lie beyond the range of '
               'its polynomial, which rises again there: use a larger n')
    return {'iter': iteration, 'health': health}


# ---------------------------------------------------------------------------- speed

class Meter:
    """The speed of a run: its seconds, without evaluations and saving, and the tokens of all processes.

    Processes wait for each other in the last backward pass of an iteration. The time that each needs before
    that is its own: the log has it for the slowest process and the median one, which shows who holds up the
    others. (With parallel=fsdp they wait in each layer, so all times are alike.)
    """

    def __init__(self, run, seconds=0.0, tokens=0):
        self.run, self.seconds, self.tokens, self.paused = run, seconds, tokens, None
        self.times = []  # seconds an iteration, a number for each lap
        self.begin_lap()

    def begin_lap(self):
        self.clock, self.n_iters, self.tokens_before = time.perf_counter(), 0, self.tokens

    @contextmanager
    def pause(self):
        """Leave the time within it out. Yields the seconds so far."""
        self.run.synchronize()
        begin = self.paused = time.perf_counter()
        try:
            yield self.total_seconds()
        finally:
            self.clock += time.perf_counter() - begin
            self.paused = None

    def total_seconds(self):
        """Those of all iterations so far; `seconds` are those until the last line of the log."""
        return self.seconds + (self.paused or time.perf_counter()) - self.clock

    def begin_iteration(self):
        self.begin = self.run.moment()

    def begin_waiting(self):
        """From here on this process may wait for others."""
        self.ready = self.run.moment()

    def end_iteration(self, tokens):
        self.n_iters += 1
        self.tokens += tokens

    def lap(self):
        """The log's numbers for the iterations since the last call. All processes call it."""
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
        """entry: the log's. The time left is estimated from the pace since the first call, evaluations
        included. A narrow terminal shows the parts with the largest numbers."""
        i, now = entry['iter'], time.perf_counter()
        parts = [(f'iter {i}: loss {entry["loss"]:.4f}', 9), (f'time {entry["ms"]:.2f}ms', 6),
                 (f'mfu {entry["mfu"]:.2f}%', 4), (f'lr {entry["lr"]:.2e}', 2),
                 (f'norm {entry["grad_norm"]:.2f}', 1), (f'{entry["tokens_per_s"]:.0f} tokens/s', 3)]
        if entry.get('slowest_ms', 0) - entry.get('median_ms', 0) > 0.1 * entry['ms']:
            parts.append((f'rank {entry["slowest_rank"]} holds up the others: '
                          f'{entry["slowest_ms"]:.2f}ms by itself, median {entry["median_ms"]:.2f}ms', 5))
        if self.begin is None:
            self.first_iter, self.begin = i, now
        else:
            pace = (now - self.begin) / (i - self.first_iter)
            parts.append((f'{duration(pace * (self.last_iter - i))} left', 8))
        print0(parts, live=True)


def sample_text(model, tokenizer, prompt, run, seed, watch=iter):
    """The text of the model's continuation of `prompt`, token ids, within one window. It is drawn with `seed`
    and leaves torch's generator, which dropout uses, as it is. watch: wraps the loop over its tokens, and may
    end it by an exception."""
    idx = torch.tensor([prompt], device=run.device)  # (1, T)
    length = min(200, model.config.block_size - len(prompt))
    # compiled for batches of one shape, the model would be compiled again for every length
    eager = torch.compiler.set_stance('force_eager') if run.compile else nullcontext()
    model.eval()
    try:
        sampling = decoding.Sampling(max_new_tokens=length)
        with eager, run.autocast(), contextlib.closing(decoding.stream(
                model, idx, sampling, n_vocab=tokenizer.n_vocab, seeds=[seed])) as made:
            ids = prompt + [token.item() for token in watch(made)]
    finally:
        model.train()
    return tokenizer.decode(ids)


# ---------------------------------------------------------------------------- files and services

class JsonLines:
    """A file of JSON lines, to which a resumed run appends.

    The lines from `first_iter` on are removed, because the resumed run writes them again. While the disk is
    full, lines wait in memory. path: None for no file.
    """

    def __init__(self, path, first_iter=0):
        self.file, self.waiting, self.failed = None, b'', False
        if path is None:
            return
        lines = read_bytes(path).splitlines() if first_iter and regular_file(path) else []
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(b''.join(line + b'\n' for line in lines if is_before(line, first_iter)))
        except OSError as error:
            print0(f'{path} could not be written: {error}')
        self.open(path)

    def open(self, path):
        self.file = open(path, 'a+b', buffering=0)  # noqa: SIM115, till the end; a crash loses no line

    def keep(self):
        """Write the file again if its name is gone, as when the folder was removed under the run."""
        if self.file is None:
            return
        path, held = Path(self.file.name), os.fstat(self.file.fileno())
        with contextlib.suppress(OSError):
            if path.exists() and os.path.samestat(path.stat(), held):
                return
            self.file.seek(0)
            content = self.file.read()
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            self.file.close()
            self.open(path)

    def write(self, entry):
        if self.file is not None:
            self.waiting += json.dumps(entry).encode() + b'\n'
            self.write_waiting()

    def write_waiting(self):
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]
            self.failed = False
        except OSError as error:
            if not self.failed:
                print0(f'{self.file.name} could not be written ({error.strerror}): its lines wait in memory')
            self.failed = True

    def entries(self, word):
        """The entries of the lines that have a word in them."""
        lines = []
        if self.file is not None:
            with contextlib.suppress(OSError):  # gone, or not to be read: the run is whole all the same
                lines = Path(self.file.name).read_bytes().splitlines()
        return [entry_of(line) for line in lines if word.encode() in line]

    def close(self):
        if self.file is not None:
            self.write_waiting()
            self.file.close()


def entry_of(line):
    """A line's entry; {} for what is none, as the last line of a killed process."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def is_before(line, first_iter):
    iteration = entry_of(line).get('iter')
    return isinstance(iteration, int) and iteration < first_iter


def open_tensorboard(folder, first_iter):
    """A writer of event files, None for no folder. A resumed run's replace those from first_iter on."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('tensorboard=True needs the package: pip install tensorboard') from None
    return SummaryWriter(folder, purge_step=first_iter)


def write_scalars(board, entry):
    for name, value in entry.items():
        if isinstance(value, int | float) and name != 'iter':
            board.add_scalar(name, value, entry['iter'])


class Wandb:
    """A service that the run doesn't depend on: if it fails, the run says so and continues without it.

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
        """Log an entry; lists, which have a number for each layer, become health/NAME/LAYER."""
        if self.is_on:
            names = {f'{split}_{what}': f'{split}/{what}' for split in ('train', 'val')
                     for what in ('loss', 'bits_per_byte')}
            lists = entry.get('health', {})
            self.call('log', {names.get(k, k): v for k, v in entry.items() if k != 'health'}
                      | {f'health/{k}/{layer}': v for k in lists for layer, v in enumerate(lists[k])})

    def log_sample(self, iteration, text):
        """Log all samples so far as a table."""
        if self.is_on:
            self.samples.append([iteration, text])
            table = self.call('Table', columns=['iter', 'text'], data=self.samples)
            self.call('log', {'iter': iteration, 'samples': table})


class Drawing:
    """A Python program that draws beside the run, in a process of its own.

    arguments: the program's path and its arguments, or None. Nothing is drawn if matplotlib is missing, nor
    after a failure, which is printed once.
    """

    def __init__(self, arguments):
        self.arguments = arguments if importlib.util.find_spec('matplotlib') else None
        self.process, self.is_late = None, False

    def start(self):
        """Draw, unless the last drawing is still at work."""
        self.is_late = self.is_busy()
        if self.arguments and not self.is_late:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, *self.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True, process_group=0)  # a group that Ctrl-C doesn't reach
            except OSError as error:
                self.give_up(error)

    def is_busy(self, patience=0.0):
        """Whether a drawing is still at work after `patience` seconds."""
        if self.process is None:
            return False
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
        """Draw the last evaluation, if still to do. Wait `patience` seconds, then let it go on alone."""
        if self.is_late:
            if self.is_busy():  # with an earlier one
                self.process.kill()
                self.process.communicate()
                self.process = None
            self.start()
        if self.is_busy(patience):
            print0('the picture of the run follows in a few seconds')
