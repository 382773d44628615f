"""
Do to runs what months of training do to them, and count what is lost.

    python scripts/soak.py                     # every fault, half an hour on one core
    python scripts/soak.py kill flip           # these two
    python scripts/soak.py kill --count=10     # fewer times than FAULTS says

Prints a line for each fault, such as `kill: 100 SIGKILLs, 61 inside a save, 0 runs lost`, and exits with
status 1 if anything was lost. Linux only: it looks into /proc, and `disk` mounts a tmpfs of its own.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from conftest import TINY_ARGS  # noqa: E402, before torch
from runs import Processes, differences, equal, free_port, read_log  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configurator import configure  # noqa: E402
from support.machine.runtime import Runtime  # noqa: E402
from support.text.prepare import write_text_dataset  # noqa: E402
from support.training import start as starting  # noqa: E402
from support.training.state import State  # noqa: E402

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
ONE_THREAD = os.environ | {'OMP_NUM_THREADS': '1'}


# ---------------------------------------------------------------------------- runs

def make_data(folder):
    words = ['king', 'queen', 'crown', 'sword', 'night', 'day', 'love', 'war']
    text = ' '.join(np.random.default_rng(0).choice(words, 4000)) + '\n'
    with contextlib.redirect_stdout(io.StringIO()):
        write_text_dataset(folder, text, 'char', 'made by soak.py')
    return folder


def numbers_of(state):
    """The tensors of a tree."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = [*state.values()]
    if not isinstance(state, (list, tuple)):
        return []
    return [tensor for item in state for tensor in numbers_of(item)]


def train(processes, *args, **fault):
    """Of all processes, what train.py printed and its error."""
    return processes.train(*TINY_ARGS, *args, **fault)


def ranks_under(torchrun):
    """{rank: process id} of a torchrun's workers."""
    found = {}
    for pid in Path(f'/proc/{torchrun}/task/{torchrun}/children').read_text().split():
        with contextlib.suppress(OSError):
            rank = re.search(rb'\0RANK=(\d+)\0', Path(f'/proc/{pid}/environ').read_bytes())
            if rank:
                found[int(rank[1])] = int(pid)
    return found


def start(script_args, launcher=()):
    """train.py as a user starts it, its output piped."""
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / 'train.py'), *TINY_ARGS, *script_args],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                            env=ONE_THREAD)


def wait_for(process, start_of_line):
    """What a process prints up to a line, '' if it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start_of_line):
            return ''.join(lines)
    return ''


def uninterrupted(folder, args, launcher=()):
    process = start([*args, f'--out_dir={folder}'], launcher)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return folder


# ---------------------------------------------------------------------------- faults

def exact(folder, data, count):
    """A run stopped at any step and gone on with equals the one that wasn't, bit for bit."""
    args = [f'--data_dir={data}', '--max_iters=20', '--eval_interval=6', '--lr_decay_iters=20',
            '--learning_rate=1e-2', '--always_save_checkpoint=False']
    stops, lost = 0, []
    for n in (1, 2):
        processes = Processes(n)
        cases = [*itertools.product((0.0, 0.2), (n, 4), (False,)), *[(0.2, 1, True)] * (n == 1)]
        for dropout, accumulation, compiled in cases:
            case = [*args, f'--dropout={dropout}', f'--gradient_accumulation_steps={accumulation}',
                    f'--compile={compiled}']
            whole = folder / f'{n}-{dropout}-{accumulation}-{compiled}'
            steps = (1, 7, 20) if compiled else range(1, count + 1)
            lost += stopped_at_each(processes, n, case, whole, steps)
            stops += len(steps)
        processes.close()
    return f'{stops} stops, {len(lost)} runs that differ from the uninterrupted one', lost


def stopped_at_each(processes, n, case, whole, steps):
    """What is wrong with a run of n processes that is stopped at each of these steps, and resumed."""
    out_dir, lost = whole.with_name(f'{whole.name}-stopped'), []
    assert not any(r.error for r in train(processes, *case, f'--out_dir={whole}'))
    for step in steps:
        replies = train(processes, *case, f'--out_dir={out_dir}', kind='stop', rank=step % n,
                        line=f'^iter {step - 1}:')
        stopped_at = State.load(out_dir / 'latest.pt').iter_num
        replies += train(processes, *case, f'--out_dir={out_dir}', '--init_from=resume')
        wrong = [r.error for r in replies if r.error] or differences(whole, out_dir)
        if wrong or not step <= stopped_at <= step + 2:  # the signal needs its time
            lost.append(f'{whole.name} stopped at {step}: {stopped_at}, {wrong}')
        shutil.rmtree(out_dir)
    return lost


def parts_in(folder):
    """Names of the checkpoints that are being written, or were when their process was killed."""
    return [p.name for p in Path(folder).glob('*.pt.*.part')]


def kill_at_random(process, out_dir):
    """SIGKILL, most often inside a save: the n-th since the start."""
    if random.random() < 0.8:
        wait_for(process, 'iter ')
        for writing in [True, False] * random.randint(0, 3) + [True]:
            while process.poll() is None and writing != bool(parts_in(out_dir)):
                pass
        time.sleep(random.uniform(0, 0.02))
    else:
        time.sleep(random.uniform(0, 4))
    process.kill()


def kill(folder, data, count, interval=1):
    """SIGKILL at random moments, most of them inside a save."""
    args = [f'--data_dir={data}', '--n_embd=256', f'--max_iters={4 * count * interval}', '--eval_interval=9',
            '--eval_iters=1', f'--checkpoint_interval={interval}', '--init_from=auto']
    whole, out_dir = uninterrupted(folder / 'whole', args), folder / 'out0'
    kills, inside, finished, lost = 0, 0, 0, []
    while True:
        process = start([*args, f'--out_dir={out_dir}'])
        if kills < count:
            kill_at_random(process, out_dir)
        output = process.communicate()[0]
        if process.returncode == -signal.SIGKILL:
            kills += 1
            inside += bool(parts_in(out_dir))
        elif process.returncode:
            lost.append(output[-500:])
        if process.returncode != -signal.SIGKILL:  # the run is done, or lost
            finished += 1
            lost += [] if process.returncode else differences(whole, out_dir)
            if kills >= count:
                break
            out_dir = folder / f'out{finished}'
    return f'{kills} SIGKILLs, {inside} inside a save, {len(lost)} runs lost', lost


def signals(folder, data, count):
    """SIGTERM or SIGINT to a random rank of two: it ends well, and no step is lost."""
    args = [f'--data_dir={data}', '--gradient_accumulation_steps=2', f'--max_iters={20 * count}',
            '--eval_interval=50', '--init_from=auto']
    whole, out_dir = uninterrupted(folder / 'whole', args, TORCHRUN), folder / 'out0'
    sent, good, finished, lost = 0, 0, 0, []
    while True:
        process = start([*args, f'--out_dir={out_dir}'], TORCHRUN)
        seen = sent < count and wait_for(process, 'iter ')
        if seen:
            time.sleep(random.uniform(0, 0.15))
            with contextlib.suppress(KeyError, OSError):  # it may have ended
                os.kill(ranks_under(process.pid)[random.randrange(2)],
                        random.choice([signal.SIGTERM, signal.SIGINT]))
        output = (seen or '') + process.communicate()[0]
        stopped = 'stopped at iteration' in output
        sent += stopped
        good += stopped and process.returncode == 0
        state, last = State.load(out_dir / 'latest.pt').iter_num, read_log(out_dir)[-1]['iter']
        if process.returncode or state != last + 1:
            lost.append(f'status {process.returncode}, state {state}, last line {last}: {output[-6000:]}')
            break
        if not stopped:
            finished += 1
            lost += differences(whole, out_dir)
            if sent >= count:
                break
            out_dir = folder / f'out{finished}'
    return f'{sent} signals, {good} exits with status 0, {len(lost)} times a step lost', lost


def restart(folder, data, count, parallel='ddp'):
    """A rank killed under torchrun --max-restarts, every other time inside a save: the job goes on."""
    args = [f'--data_dir={data}', '--gradient_accumulation_steps=2', '--max_iters=200', '--eval_interval=50',
            '--checkpoint_interval=5', '--init_from=auto', f'--parallel={parallel}', '--n_embd=128']
    launcher = [*TORCHRUN, '--max-restarts=2']
    whole, kills, inside, good, lost = uninterrupted(folder / 'whole', args, launcher), 0, 0, 0, []
    for i in itertools.count():
        if kills == count:
            break
        out_dir = folder / f'out{i}'
        process = start([*args, f'--out_dir={out_dir}'], launcher)
        output = wait_for(process, 'iter ')
        time.sleep(random.uniform(0, 0.4))
        ranks = ranks_under(process.pid)
        while i % 2 == 0 and process.poll() is None and not parts_in(out_dir):
            pass
        with contextlib.suppress(KeyError, OSError):
            os.kill(ranks[random.randrange(2)], signal.SIGKILL)
        saving = bool(parts_in(out_dir))
        output += process.communicate()[0]
        restarted = output.count('\ndevice: ') > 1
        wrong = differences(whole, out_dir) if process.returncode == 0 else [output[-1500:]]
        kills, inside = kills + restarted, inside + (saving and restarted)
        good += restarted and not wrong
        lost += wrong
    return (f'{kills} ranks killed, {inside} inside a save, {good} finished runs with the same log and '
            'weights'), lost


def agents(n, args, *options):
    """A torchrun with a process for each of n nodes, which this machine plays on addresses of its own. The
    first one holds the store through which they meet."""
    port = free_port()
    return [start(args, ['-m', 'torch.distributed.run', '--nproc_per_node=1', '--rdzv_id=1',
                         '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}',
                         f'--local-addr=127.0.0.{node + 1}',
                         f'--rdzv-conf=is_host={node == 0},last_call_timeout=5', *options])
            for node in range(n)]


def node(folder, data, count):
    """One of two nodes lost under --nnodes=1:2: the other goes on alone, with the same global batch."""
    args = [f'--data_dir={data}', '--gradient_accumulation_steps=2', '--max_iters=600', '--eval_interval=50',
            '--checkpoint_interval=5', '--init_from=auto']
    whole, good, lost = uninterrupted(folder / 'whole', args, TORCHRUN), 0, []
    for i in range(count):
        out_dir = folder / f'out{i}'
        with mock.patch.dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'):
            stays, goes = agents(2, [*args, f'--out_dir={out_dir}'], '--nnodes=1:2', '--max-restarts=3')
        log = out_dir / 'log.jsonl'
        while goes.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) > 20):
            time.sleep(0.01)
        for pid in [goes.pid, *ranks_under(goes.pid).values()]:
            os.kill(pid, signal.SIGKILL)
        goes.communicate()
        output = stays.communicate()[0]
        one, other = ([entry for entry in read_log(run) if 'health' not in entry] for run in (whole, out_dir))
        same = len(one) == len(other) and all(
            abs(a[k] - b[k]) < 1e-4 for a, b in zip(one, other) for k in a if k.endswith('loss'))
        good += same
        if stays.returncode or 'processes: 1' not in output or not same:
            lost.append(f'status {stays.returncode}, {len(other)} lines of {len(one)}: {output[-3000:]}')
    return f'{count} nodes of two lost, {good} runs that the other finished with the same losses', lost


def flip(folder, data, count):
    """Bytes flipped and files cut: seen each time, and an older state is taken where there is one."""
    processes, source = Processes(1), folder / 'source'
    args = [f'--data_dir={data}', '--checkpoint_interval=2', '--eval_interval=4']
    assert train(processes, *args, '--max_iters=8', f'--out_dir={source}')[0].error is None
    iterations = {p.name: State.load(p).iter_num for p in source.glob('*.pt')}
    assert iterations == {'ckpt.pt': 8, 'previous.pt': 8, 'latest.pt': 9}, iterations
    originals = {p.name: State.load(p) for p in source.glob('*.pt')}
    seen, harmless, taken, runs, lost = 0, 0, 0, 0, []
    for i in range(count):
        out_dir = folder / 'out'
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.copytree(source, out_dir)
        names = random.choice([['latest.pt']] * 3 + [['latest.pt', 'previous.pt'], [*iterations]])
        for name in names:
            damage(out_dir / name)
        same = [name for name in names if reads_as(out_dir / name, originals[name])]
        names = [name for name in names if name not in same]
        harmless += len(same)  # between the records, where nothing is read
        files = {p.name: p.read_bytes() for p in out_dir.iterdir()}
        if i % 20:
            path, state, damaged = State.newest(out_dir)
            aside = [starting.set_aside(bad) for bad in damaged]
            resumed = state and state.iter_num
        else:  # through train.py itself
            runs += 1
            reply = train(processes, *args, '--max_iters=8', f'--out_dir={out_dir}', '--init_from=resume')[0]
            resumed = re.search(r'^resuming at iteration (\d+)', reply.output, re.M)
            resumed = int(resumed[1]) if resumed else None
            aside = [*out_dir.glob('*.damaged*')]
            if len(names) == len(iterations) and 'is not a checkpoint' in str(reply.error):
                aside = [starting.set_aside(out_dir / name) for name in names]  # all were left there
        whole = max((n for name, n in iterations.items() if name not in names), default=None)
        now = {p.name: p.read_bytes() for p in out_dir.iterdir()}
        kept = all(files[p.name.partition('.damaged')[0]] == now[p.name] for p in aside)
        untouched = i % 20 == 0 or all(now[name] == files[name] for name in files if name not in names)
        seen += len(aside)
        taken += resumed is not None
        if len(aside) != len(names) or resumed != whole or not kept or not untouched:
            lost.append(f'{names}: {len(aside)} set aside, resumed at {resumed}, kept {kept}, {untouched}')
    processes.close()
    return (f'{count} damaged folders, {seen} files refused, {harmless} read as they were saved, {taken} '
            f'folders resumed ({runs} of all by train.py), {len(lost)} overwritten, missed or wrong'), lost


def reads_as(path, state):
    """Whether a damaged file is still read as the state that was saved."""
    try:
        return equal(State.load(path).values(), state.values())
    except ValueError:
        return False


class DiskErrors:
    """Errors of the disk that holds a folder: at the `at`-th operation, counted from 0, alone or from then
    on. An operation opens, seeks, reads, maps, lists or asks for the size."""

    def __init__(self, folder, number, at, is_lasting):
        self.places, self.number = (str(folder), '/proc/self/fd/'), number
        self.at, self.is_lasting, self.count = at, is_lasting, 0

    def step(self, path=0):
        if not isinstance(path, int) and not str(path).startswith(self.places):
            return
        self.count += 1
        if self.count == self.at + 1 or self.is_lasting and self.count > self.at:
            raise OSError(self.number, os.strerror(self.number))

    def failing(self, real):
        def call(path, *args, **kwargs):
            self.step(path)
            return real(path, *args, **kwargs)
        return call

    def open(self, path, *args, real=open, **kwargs):
        self.step(path)
        file = real(path, *args, **kwargs)
        return FailingFile(file, self.step) if str(path).startswith(self.places) else file

    def map(self, path, *args, real=torch.UntypedStorage.from_file):
        try:
            self.step(path)
        except OSError as error:  # as PyTorch has it
            raise RuntimeError(f'unable to mmap 9 bytes from file <{path}>: {error.strerror} '
                               f'({error.errno})') from None
        return real(path, *args)

    @contextlib.contextmanager
    def __call__(self):
        with contextlib.ExitStack() as stack:
            for patch in (mock.patch('builtins.open', self.open), mock.patch('time.sleep'),
                          mock.patch.object(torch.UntypedStorage, 'from_file', self.map),
                          *(mock.patch.object(os, name, self.failing(getattr(os, name)))
                            for name in ('stat', 'fstat', 'listdir'))):
                stack.enter_context(patch)
            yield


class FailingFile:
    def __init__(self, file, step):
        self.file, self.step = file, step

    def __getattr__(self, name):
        if name in ('read', 'readinto', 'seek'):
            self.step()
        return getattr(self.file, name)


def start_with(errors, config, run):
    """The state that a run finds under DiskErrors, and the line with which it ends instead, else ''."""
    try:
        with errors(), contextlib.redirect_stdout(io.StringIO()):
            return starting.find_state(config, run)[0], ''
    except FileNotFoundError as error:
        return None, str(error)


def read_errors(out_dir, number, every=1):
    """An error at each (or every 2nd, ...) operation that finds and reads the states in a folder: first at
    that operation alone, then also at all later ones. Returns how many starts took the newest state, how
    many ended with a line, and what was wrong: any other result, or a changed file."""
    config = {'init_from': 'auto', 'eval_only': False, 'out_dir': str(out_dir)}
    run, good, refused, lost = Runtime('cpu', 'float32', False, 'gloo'), 0, 0, []
    files = {p.name: p.read_bytes() for p in Path(out_dir).iterdir()}
    newest = State.newest(out_dir)[1].iter_num
    for is_lasting in (False, True):
        for at in itertools.count(0, every):
            errors, place = DiskErrors(out_dir, number, at, is_lasting), f'{at}, {is_lasting}'
            found, message = start_with(errors, config, run)
            good, refused = good + (not message), refused + bool(message)
            said_so = is_lasting and 'can\'t be read now' in message and '\n' not in message
            if message and not said_so:
                lost.append(f'{place}: {message}')
            if not message and (found is None or found.iter_num != newest):
                lost.append(f'{place}: started from {found and found.iter_num}')
            if {p.name: p.read_bytes() for p in Path(out_dir).iterdir()} != files:
                lost.append(f'{place}: the files have changed')
            if errors.count <= at:  # there are no more operations
                break
    return good, refused, lost


def passing(folder, data, count):
    """Errors of the disk that pass, and some that don't, at every operation that reads a checkpoint."""
    source = uninterrupted(folder / 'run', [f'--data_dir={data}', '--checkpoint_interval=2',
                                            '--eval_interval=4', '--max_iters=8'])
    kinds = ('EIO', 'ESTALE', 'ETIMEDOUT', 'EMFILE', 'EAGAIN', 'ENOLCK', 'EBUSY')[:count]
    good, refused, lost = 0, 0, []
    for kind in kinds:
        results = read_errors(source, getattr(errno, kind), every=97)
        good, refused = good + results[0], refused + results[1]
        lost += [f'{kind}: {wrong}' for wrong in results[2]]
    return (f'{good + refused} errors of {len(kinds)} kinds, {good} starts with the newest state, {refused} '
            f'ended with a line, {len(lost)} files renamed or runs restarted'), lost


def damage(path):
    """Flip a bit or a byte, or cut the file."""
    content, at = bytearray(path.read_bytes()), 0
    at = random.choice([random.randrange(len(content)), random.randrange(min(len(content), 200)),
                        len(content) - 1 - random.randrange(200)])  # its ends are the delicate parts
    if random.random() < 0.3:
        del content[at:]
    else:
        content[at] ^= random.choice([1 << random.randrange(8), random.randrange(1, 256)])
    path.write_bytes(content)


FILLER = """
import os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import support, runner
from runs import at_line
room, export, leave, lies, *args = sys.argv[1:]
filler, latest, seen = Path(room, 'filler'), Path(room, 'out/latest.pt'), []

def fill():
    seen.append(latest.read_bytes())
    stat = os.statvfs(room)
    with open(filler, 'wb') as file:
        os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - int(leave)))

def free():
    seen.append(latest.read_bytes())
    filler.unlink()

if lies == 'True':
    shutil.disk_usage = lambda path: SimpleNamespace(total=10**12, used=0, free=10**12)
with at_line('^iter 4:', fill), at_line('^iter 7:', free):
    runner.execute('train.py', [*args, f'--out_dir={room}/out'])
shutil.copytree(Path(room, 'out'), export)
print('kept' if seen[0] == seen[1] else 'changed')
"""


def disk(folder, data, count):
    """A file system that is full at any place of a save: the old file stays, the run goes on, saves later."""
    room = folder / 'room'
    room.mkdir()
    mount = ('unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=16m t "$0" && exec "$@"', str(room))
    args = [*TINY_ARGS, f'--data_dir={data}', '--max_iters=12', '--checkpoint_interval=3',
            '--eval_interval=1000']
    whole = uninterrupted(folder / 'whole', args)
    size, kept, told, later, lost = (whole / 'latest.pt').stat().st_size, 0, 0, 0, []
    for i in range(count):
        leave, export = (2 * i + 1) * size // (2 * count), folder / f'out{i}'
        done = subprocess.run([*mount, sys.executable, '-c', FILLER, room, export, str(leave), str(i % 4 > 0),
                               *args], cwd=ROOT, capture_output=True, text=True,
                              env=ONE_THREAD | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
        said = re.findall(r'^NOT SAVED: .*it needs [\d.]+ MB, [\d,.]+ MB are free', done.stdout, re.M)
        wrong = [done.stderr[-500:]] if done.returncode else differences(whole, export)
        wrong += [p.name for p in export.glob('*.part')]
        is_kept = done.stdout.endswith('kept\n')
        kept, told, later = kept + is_kept, told + (len(said) == 1), later + (not wrong)
        if wrong or not is_kept or len(said) != 1:
            lost.append(f'{leave} bytes left: {wrong}, {said}, kept {is_kept}')
    return (f'{count} full file systems, {kept} old states intact, {told} messages with the space needed and '
            f'free, {later} runs that saved later with the same log and state'), lost


def nan(folder, data, count):
    """One number that isn't finite, anywhere: all ranks stop, and none gets into a file."""
    cases, stopped, finite, lost = 0, 0, 0, []
    for n in (1, 2):
        processes = Processes(n)
        whole = itertools.product(('gradient', 'loss', 'weight', 'moment'), (0, 2, 8, 12), (1, 10),
                                  ('nan', 'inf', '-inf'))
        for kind, after, interval, value in [*whole][:count]:
            cases += 1
            out_dir = folder / f'{n}-{kind}-{after}-{interval}-{value}'
            replies = train(processes, f'--data_dir={data}', '--max_iters=30', '--checkpoint_interval=3',
                            '--eval_interval=9', f'--gradient_accumulation_steps={n}', '--sample_interval=2',
                            f'--log_interval={interval}', '--dist_timeout=20', f'--out_dir={out_dir}',
                            line=f'^sample at iteration {after}:', kind=kind, value=float(value))
            told = re.match(r'NotFinite: iteration (\d+): .*(No state was saved|'
                            r'last good state is that of iteration (\d+))', str(replies[0].error))
            saved = Path(out_dir, 'latest.pt')
            good = State.load(saved).iter_num if saved.exists() else None
            right = told and good == (told[3] and int(told[3])) and after <= int(told[1]) <= after + 2 and (
                good is None or good <= after)
            in_files = [f'{p.name} has {t.shape}' for p in out_dir.glob('*.pt')
                        for t in numbers_of(State.load(p).values()) if not t.isfinite().all()]
            stopped += all(r.error for r in replies)
            finite += not in_files
            if not right or in_files or not all(r.error for r in replies):
                lost.append(f'{out_dir.name}: {[r.error for r in replies]}, {good}, {in_files}')
        processes.close()
    return (f'{cases} numbers that are not finite, {stopped} stopped on all ranks, {finite} folders without '
            f'such a number, {len(lost)} wrong'), lost


def refusal(script, arg):
    """What configure says of an argument; None if it takes it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            configure(script, args=[arg])
    except ValueError as error:
        return str(error)
    return None


def misspell(folder, data, count):
    """Every name one edit away from a setting, on the command line and in a config file."""
    from test_configurator import misspellings, settings_of
    script, _ = settings_of('train.py')
    names, config = configure(dict(script), args=[]), folder / 'config.py'
    tried, suggested, private, lost = 0, 0, 0, []
    for name in names:
        wrong = sorted(w for w in misspellings(name) - set(names) if w.isidentifier())
        for word in wrong if count >= len(wrong) else random.sample(wrong, count):
            config.write_text(f'{word} = {names[name]!r}\n')
            is_private = word.startswith('_')  # a config's own name
            private += is_private
            messages = {arg: refusal(dict(script), arg)
                        for arg in [f'--{word}={names[name]}'] + [str(config)] * (not is_private)}
            tried += len(messages)
            lost += [arg for arg, message in messages.items() if message is None]
            suggested += sum(bool(re.search(rf'did you mean [^?]*\b{name}\b', message or ''))
                             for message in messages.values())
    return (f'{len(names)} settings, {tried:,} misspellings, {tried - len(lost):,} refused, the right name '
            f'suggested for {suggested / tried:.2%}; {private} more begin with _, as a config may'), lost


def spoil(data, kind):
    """Damage a copy of a data folder."""
    path = data / 'train.bin'
    tokens = np.fromfile(path, np.uint16)
    if kind != 'cut':
        (data / 'dataset.json').unlink()
    if kind in ('missing', 'a folder', 'unreadable'):
        path.unlink()
    content = {'odd size': tokens.tobytes()[:-1], 'cut': tokens[:-100].tobytes(), 'empty': b'',
               'int32': tokens.astype(np.int32).tobytes(), 'id beyond the vocabulary': tokens.tobytes()[:-2]
               + b'\x60\xea', 'unreadable': tokens.tobytes()}.get(kind)
    if content is not None:
        path.write_bytes(content)
    if kind == 'npy':
        np.save(path.with_suffix('.npy'), tokens)
        path.with_suffix('.npy').rename(path)
    if kind == 'a folder':
        path.mkdir()
    if kind == 'unreadable':
        path.chmod(0)
    if kind == 'changed':
        tokens[0] = tokens[1]
        tokens.tofile(path)
    if kind == 'meta.pkl':
        (data / 'meta.pkl').write_bytes(b'cos\nsystem\n.')


def data_faults(folder, data, count):
    """What can be wrong with data: one line, soon."""
    rights = '-dac_override,-dac_read_search'  # by which root may read all files
    no_root = ('setpriv', f'--inh-caps={rights}', f'--bounding-set={rights}') if os.getuid() == 0 else ()
    begin = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import torch'], check=True)
    torch_takes, slowest, lines, lost = time.perf_counter() - begin, 0.0, 0, []
    source, out = shutil.copytree(data, folder / 'source'), f'--out_dir={folder / "out"}'
    uninterrupted(folder / 'out', [f'--data_dir={source}', '--max_iters=4'])
    kinds = ['odd size', 'cut', 'empty', 'int32', 'npy', 'id beyond the vocabulary', 'missing', 'a folder',
             'unreadable', 'meta.pkl', 'changed'][:count]
    for kind in kinds:
        spoiled = shutil.copytree(source, folder / kind)
        spoil(spoiled, kind)
        begin = time.perf_counter()
        args = [*TINY_ARGS, f'--data_dir={spoiled}', out, '--init_from=resume']
        done = subprocess.run([*no_root, sys.executable, str(ROOT / 'train.py'), *args], capture_output=True,
                              text=True)
        slowest = max(slowest, time.perf_counter() - begin)
        if done.returncode and len(done.stderr.splitlines()) == 1:
            lines += 1
        else:
            lost.append(f'{kind}: {done.stderr}')
        print(f'  {kind}: {done.stderr.strip()[-300:]}')
    return (f'{len(kinds)} faults, {lines} refused in one line, the slowest after {slowest:.1f} s, of which '
            f'importing torch takes {torch_takes:.1f} s'), lost


def pairs(folder, data, count):
    """Two runs started in one folder, the second at a random moment: one is refused, nothing is mixed."""
    def args(seed):
        return [f'--data_dir={data}', '--max_iters=200', '--eval_interval=50', '--checkpoint_interval=3',
                f'--seed={seed}', '--dropout=0.2']

    whole = [uninterrupted(folder / f'whole{seed}', args(seed)) for seed in (1, 2)]
    refused, mixed, lost = 0, 0, []
    for i in range(count):
        out_dir = folder / f'out{i}'
        first = start([*args(1), f'--out_dir={out_dir}'])
        time.sleep(random.uniform(0, 2))
        second = start([*args(2), f'--out_dir={out_dir}'])
        outputs = [process.communicate()[0] for process in (first, second)]
        codes = [first.returncode, second.returncode]
        if 1 in codes:
            other = (first, second)[1 - codes.index(1)]
            told = f'is in use by another run, process {other.pid} on {socket.gethostname()}'
            refused += told in outputs[codes.index(1)]
            wrong = [] if told in outputs[codes.index(1)] and sum(codes) == 1 else [str(outputs)[-1500:]]
            wrong += differences(whole[codes.index(0)] if 0 in codes else whole[0], out_dir)
        else:  # one after the other: the first one's files are in earlier-1, whole
            homes = [out_dir / 'earlier-1', out_dir]
            wrong = min((differences(whole[0], a) + differences(whole[1], b)
                         for a, b in (homes, homes[::-1]) if a.exists() and b.exists()),
                        default=['no earlier run'], key=len)
        mixed += bool(wrong)
        lost += [f'{i}: {wrong}'] if wrong else []
        shutil.rmtree(out_dir)
    return (f'{count} pairs, {refused} refusals that name the other process, {count - refused} one after the '
            f'other, {mixed} folders mixed or lost'), lost


def kill_inside(command, ready, count, check, most):
    """Kill a program `count` times within `most` seconds after it says `ready`, and check its files."""
    kills, lost = 0, []
    while kills < count:
        process = subprocess.Popen(command(kills), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, cwd=ROOT, env=os.environ | {'PYTHONUNBUFFERED': '1'})
        wait_for(process, ready)
        time.sleep(random.uniform(0, most))
        process.kill()
        output = process.communicate()[0]
        kills += 1
        lost += [f'{kills}: {wrong} {output[-500:]}' for wrong in check(kills)]
    return kills, lost


WRITER = """
import sys
sys.path.insert(0, '.')
import random
from support.text.prepare import write_text_dataset
text = ' '.join(random.Random(int(sys.argv[2])).choices(['king', 'queen', 'crown'], k=300000))
print('ready', flush=True)
write_text_dataset(sys.argv[1], text, 'char', 'made by soak.py')
"""


def kill_prepare(folder, data, count):
    """SIGKILL inside a preparation: the data is whole, or refused, and never another tokenizer's."""
    from support.text.dataset import Dataset
    from support.text.tokenizer import CharTokenizer
    target, found = folder / 'data', {'whole': 0, 'refused': 0}

    def check(n):
        wrong = []
        try:
            dataset = Dataset(target)
            dataset.fingerprints()
            wrong = [] if isinstance(dataset.tokenizer, CharTokenizer) else ['it opens as GPT-2\'s']
            found['whole'] += 1
        except (ValueError, FileNotFoundError):
            found['refused'] += 1
        if n % 2:  # the next one starts in an empty folder
            shutil.rmtree(target, ignore_errors=True)
        return wrong

    kills, lost = kill_inside(lambda n: [sys.executable, '-c', WRITER, str(target), str(n)], 'ready', count,
                              check, 0.3)
    subprocess.run([sys.executable, '-c', WRITER, str(target), '0'], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)
    left = [p.name for p in target.glob('*.part')]
    return (f'{kills} kills, {found["whole"]} folders whole, {found["refused"]} refused, {len(lost)} that '
            f'open as another tokenizer\'s, {len(left)} files left over'), lost + left


MOVER = """
import os, sys, signal
sys.path.insert(0, '.')
from support.training import folder
left, kinds = int(sys.argv[2]), ('rename', 'replace', 'mkdir', 'rmdir', 'unlink')
def counted(real):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*args, **kwargs)
    return call
for kind in kinds:
    setattr(os, kind, counted(getattr(os, kind)))
folder.undo_half_move(sys.argv[1])
folder.move_earlier_run(sys.argv[1])
"""


def kill_move(folder, data, count):
    """SIGKILL before each of the steps of move_earlier_run: the run and the one before it are whole."""
    from support.training.folder import undo_half_move
    names = ('latest.pt', 'previous.pt', 'ckpt.pt', 'log.jsonl')
    kills, lost, inside = 0, [], 0
    for i in range(count):
        out_dir = folder / f'out{i}'
        for place, text in ((out_dir / 'earlier-1', 'old'), (out_dir, 'new')):
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                (place / name).write_text(text)
        for step in (i % 12, random.randrange(12)):  # and once more, in what the first kill left
            done = subprocess.run([sys.executable, '-c', MOVER, str(out_dir), str(step)], cwd=ROOT,
                                  capture_output=True, text=True)
            kills += done.returncode == -signal.SIGKILL
        undo_half_move(out_dir)
        now = {place: [(place / name).read_text() if (place / name).is_file() else None for name in names]
               for place in (out_dir, *out_dir.glob('earlier-*'))}
        whole = [['new'] * 4 in now.values(), now[out_dir / 'earlier-1'] == ['old'] * 4,
                 set(map(tuple, now.values())) <= {('new',) * 4, ('old',) * 4, (None,) * 4}]
        inside += now[out_dir] == ['new'] * 4
        lost += [] if all(whole) else [f'{i}: {now}']
    return f'{kills} kills, {inside} moves undone, {len(lost)} runs lost', lost


def kill_draw(folder, data, count):
    """SIGKILL inside a drawing: the picture is the one before or the new one, and the run doesn't notice."""
    run = uninterrupted(folder / 'run', [f'--data_dir={data}', '--max_iters=20', '--eval_interval=5'])
    picture = run / 'loss.png'
    command = [sys.executable, str(ROOT / 'plot.py'), str(run)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    size, inside, lost = picture.stat().st_size, 0, []
    for i in range(count):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not [*run.glob('loss.png.*.part')]:
            pass
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        inside += process.wait() == -signal.SIGKILL
        content = picture.read_bytes()
        if not content.startswith(b'\x89PNG') or b'IEND' not in content[-12:] or len(content) != size:
            lost.append(f'{i}: {len(content)} bytes')
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    left = [p.name for p in run.glob('*.part')]
    return (f'{count} drawings, {inside} killed inside, {len(lost)} pictures damaged, {len(left)} files left '
            'over'), lost + left


def output(folder, data, count):
    """Standard output full, closed, or a pipe whose reader dies: no run ends, each has its states."""
    args, ended, lost = [f'--data_dir={data}', '--max_iters=12', '--eval_interval=5'], 0, []
    whole = uninterrupted(folder / 'whole', args)
    for i in range(count):
        out_dir, kind = folder / f'out{i}', ('full', 'closed', 'dead reader', 'both dead')[i % 4]
        command = ' '.join([sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, *args,
                            f'--out_dir={out_dir}'])
        tail = {'full': '> /dev/full', 'closed': '>&-', 'dead reader': f'| head -n {random.randrange(30)} '
                '> /dev/null', 'both dead': f'2>&1 | head -n {random.randrange(30)} > /dev/null'}[kind]
        done = subprocess.run(['bash', '-o', 'pipefail', '-c', f'{command} {tail}'], cwd=ROOT, text=True,
                              stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=ONE_THREAD)
        wrong = [f'status {done.returncode}: {done.stderr[-500:]}'] if done.returncode else \
            differences(whole, out_dir)
        ended += bool(wrong)
        lost += [f'{kind}: {wrong}'] if wrong else []
    return f'{count} runs whose output could not be written, {ended} ended', lost


def hostile_states(state):
    """{name: a checkpoint that asks for more than it has, or isn't one}, from a true one."""
    args, weights = state['model_args'], state['model']
    wte = weights['transformer.wte.weight']
    deep, laughs = [], ['ha']
    for _ in range(100_000):
        deep = [deep]
    for _ in range(60):
        laughs = [laughs, laughs]

    def moments(change):
        buffers = state['optimizer']['state']
        return state | {'optimizer': state['optimizer'] | {
            'state': {i: {k: change(t) if k != 'step' else t for k, t in b.items()}
                      for i, b in buffers.items()}}}

    sizes = {f'{k}={n}': state | {'model_args': args | {k: n}} for k in
             ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size') for n in
             (10**9, 10**18, 0, -1, 'x', None, 2.5)}
    wide = wte[:1, :1].expand(10**6, 10**5)
    return sizes | {
        'expanded': state | {'model': weights | {'transformer.wte.weight': wide, 'lm_head.weight': wide},
                             'model_args': args | {'vocab_size': 10**6, 'n_embd': 10**5}},
        'meta': state | {'model': {k: t.to('meta') for k, t in weights.items()}},
        'sparse': state | {'model': weights | {'lm_head.weight': wte.to_sparse()}},
        'shorter moments': moments(lambda t: t.flatten()[:1].clone()),
        'longer moments': moments(lambda t: torch.zeros(*t.shape, 2)),
        'more rows': moments(lambda t: torch.cat((t, t))), 'bytes': moments(lambda t: t.byte()),
        'no moments': moments(lambda t: None),
        'wide moments': moments(lambda t: t.flatten()[0].clone().expand(t.shape)),
        'no optimizer state': state | {'optimizer': {}}, 'nan': state | {'best_val_loss': float('nan')},
        'text': state | {'best_val_loss': 'low'}, 'iteration': state | {'iter_num': 10**40},
        'negative': state | {'iter_num': -5}, 'guard': state | {'guard': {'n_clipped': 'x'}},
        'seconds': state | {'seconds': [1]}, 'tokenizer': state | {'tokenizer': {'kind': 'char', 'itos': 7}},
        'settings': state | {'config': laughs}, 'deep': state | {'config': {'a': deep}},
        'laughs': state | {'x': laughs}, 'names': state | {'model_args': {7: 8}},
    }


def measured(command):
    """A program's status, standard error, seconds and peak memory in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, errors, time.perf_counter() - begin, usage.ru_maxrss / 1000


def attack(cases, command, plain, count):
    """Give `command(case)` each hostile case: it ends well or in one line, soon, in little memory."""
    slowest, largest, refused, lost = 0.0, 0.0, 0, []
    _, _, seconds, megabytes = measured(plain)
    names = random.sample(sorted(cases), min(count, len(cases)))
    for name in names:
        status, errors, took, memory = measured(command(name))
        if took > seconds + 2:  # other programs may have been at work
            status, errors, took, memory = measured(command(name))
        slowest, largest = max(slowest, took - seconds), max(largest, memory - megabytes)
        is_told = status == 1 and 'Traceback' not in errors and re.search(r'\n?\w+Error: .*\n$', errors)
        refused += bool(is_told)
        if not (status == 0 or is_told) or took > seconds + 2 or memory > megabytes + 1000:
            lost.append(f'{name}: status {status}, {took:.1f} s, {memory:.0f} MB, {errors[-700:]}')
    return (f'{len(names)} tried, {refused} refused in one line, the others used, at most {slowest:.1f} s '
            f'and {max(0, largest):.0f} MB more than a whole one'), lost


def save_deep(state, path):
    """torch.save of what is nested more deeply than the stack of a main thread allows."""
    limit, size = sys.getrecursionlimit(), threading.stack_size(1 << 30)
    sys.setrecursionlimit(10**6)
    try:
        thread = threading.Thread(target=torch.save, args=(state, path))
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)


def checkpoints(folder, data, count):
    """Hostile checkpoints, resumed from and sampled."""
    args = [f'--data_dir={data}', '--max_iters=4', '--eval_interval=4']
    source = uninterrupted(folder / 'source', args)
    state = torch.load(source / 'latest.pt')
    cases = hostile_states(state)

    def command(name):
        out_dir = folder / 'out'
        shutil.rmtree(out_dir, ignore_errors=True)
        out_dir.mkdir()
        save_deep(cases[name], out_dir / 'ckpt.pt')
        resume = [sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, *args, f'--out_dir={out_dir}',
                  '--init_from=resume', '--max_iters=6']
        sample = [sys.executable, str(ROOT / 'sample.py'), f'--out_dir={out_dir}', '--num_samples=1',
                  '--max_new_tokens=5', '--device=cpu', '--start=king']
        return random.choice((resume, resume, sample))

    plain = [sys.executable, str(ROOT / 'train.py'), *TINY_ARGS, *args, f'--out_dir={folder / "plain"}',
             '--max_iters=6']
    return attack(cases, command, plain, count)


def folders(folder, data, count):
    """Hostile Hugging Face folders, sampled from."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel
    source = folder / 'source'
    GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=2,
                               n_head=2)).save_pretrained(source)
    config = json.loads((source / 'config.json').read_text())
    weights = load_file(source / 'model.safetensors')
    name = 'transformer.h.1.mlp.c_fc.weight'
    sizes = ('n_layer', 'n_embd', 'vocab_size', 'n_positions', 'n_head')
    configs = {f'{k}={n}': config | {k: n} for k in sizes for n in (10**9, 10**15, 0, -1, 'x', None, [])}
    others = {
        'list': [], 'type': config | {'model_type': 7}, 'activation': config | {'activation_function': 'x'},
        'code': config | {'auto_map': {'AutoModelForCausalLM': 'evil.Model'}},
    }
    changes = {
        'missing': lambda w: w.pop(name), 'more': lambda w: w.update(extra=torch.ones(2)),
        'shape': lambda w: w.update({name: torch.ones(3, 3)}), 'nan': lambda w: w[name].fill_(float('nan')),
        'none': lambda w: w.clear(),
    }
    contents = {'tokenizer.json': b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
                'vocab.json': b'{"a": 0}', 'model.safetensors': b'\xff' * 64, 'config.json': b'{',
                'spiece.model': b'x'}

    def command(case):
        target = folder / 'out'
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        if case in configs | others:
            (target / 'config.json').write_text(json.dumps((configs | others)[case]))
        elif case in changes:
            changed = {k: t.clone() for k, t in weights.items()}
            changes[case](changed)
            save_file(changed, target / 'model.safetensors', metadata={'format': 'pt'})
        else:
            (target / case).write_bytes(contents[case])
        return sample(target)

    def sample(target):
        return [sys.executable, str(ROOT / 'sample.py'), f'--init_from={target}', '--num_samples=1',
                '--max_new_tokens=5', '--device=cpu', '--start=king']

    return attack({**configs, **others, **changes, **contents}, command, sample(source), count)


FAULTS = {  # how often, where --count doesn't say
    'exact': (exact, 20), 'kill': (kill, 100), 'signal': (signals, 50), 'restart': (restart, 20),
    'fsdp_restart': (functools.partial(restart, parallel='fsdp'), 20), 'node': (node, 5),
    'flip': (flip, 1000), 'disk': (disk, 20), 'nan': (nan, 1000), 'misspell': (misspell, 10**6),
    'data': (data_faults, 100), 'pairs': (pairs, 200), 'kill_5': (functools.partial(kill, interval=5), 60),
    'kill_prepare': (kill_prepare, 20), 'kill_move': (kill_move, 20), 'kill_draw': (kill_draw, 20),
    'output': (output, 20), 'checkpoints': (checkpoints, 50), 'folders': (folders, 50),
    'passing': (passing, 7),
}


def main(args):
    counts = [int(arg.partition('=')[2]) for arg in args if arg.startswith('--count=')]
    names = [arg for arg in args if not arg.startswith('--')] or [*FAULTS]
    unknown = [arg for arg in args if not arg.startswith('--count=') and arg not in FAULTS]
    if unknown:
        raise SystemExit(f'{unknown[0]} is not one of {", ".join(FAULTS)}, --count=N')
    os.environ['OMP_NUM_THREADS'] = '1'
    random.seed(0)
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch, 'data'))
        for name in names:
            fault, count = FAULTS[name]
            Path(scratch, name + '_runs').mkdir()
            begin = time.perf_counter()
            text, lost = fault(Path(scratch, name + '_runs'), data, counts[0] if counts else count)
            print(f'{name}: {text}  ({time.perf_counter() - begin:.0f} s)', flush=True)
            for item in lost[:20]:
                print(f'  LOST {item}', flush=True)
            bad += len(lost)
            shutil.rmtree(Path(scratch, name + '_runs'))
    raise SystemExit(1 if bad else 0)


if __name__ == '__main__':
    main(sys.argv[1:])
