"""What the tests of runs share: faults at a place of a run, runs of two processes, what folders share."""

import atexit
import contextlib
import functools
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import runner
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]
TIMES = ('seconds', 'ms', 'tokens_per_s', 'mfu', 'slowest_rank', 'slowest_ms', 'median_ms')
UNLIKE = ('config', 'seconds', 'wandb_id')  # of a state: what differs from run to run


@contextlib.contextmanager
def at_line(line, function):
    """Call a function once, when a line that matches is printed. Prints as before."""
    stream, left = sys.stdout, [function]

    class Watched:
        def write(self, text):
            stream.write(text)
            if left and re.search(line, text, re.M):
                left.pop()()

        def __getattr__(self, name):
            return getattr(stream, name)
    with contextlib.redirect_stdout(Watched()):
        yield
    assert not left, f'no line like {line}'


@contextlib.contextmanager
def fault(line, kind, value=math.nan, pid=None):
    """What goes wrong once after a line that matches is printed.

    stop: a SIGTERM at once, to process `pid` or this one; stop in training, stop in evaluation: in the
    model's next forward pass there. loss, gradient, weight, moment: one number becomes `value`.
    """
    armed = []

    def spoil(module, args, output):
        mode = 'training' if module.training else 'evaluation'
        if not armed or not type(module).__name__.endswith('GPT') or kind == 'moment':
            return None
        if kind != f'stop in {mode}' and (kind.startswith('stop') or mode == 'evaluation'):
            return None
        armed.clear()
        if kind.startswith('stop'):
            return signal.raise_signal(signal.SIGTERM)
        weight = next(module.parameters())
        if kind == 'gradient':
            handle = weight.register_hook(lambda g: (handle.remove(), g.index_fill(
                0, torch.tensor([1]), value))[1])
        if kind == 'weight':
            weight.data[1] = value
        return (output[0], output[1] * value) if kind == 'loss' else None

    def spoil_moment(optimizer, *_):
        if armed and kind == 'moment' and optimizer.state:
            armed.clear()
            next(iter(optimizer.state.values()))['exp_avg'][1] = value

    def act():
        if kind == 'stop':
            os.kill(pid or os.getpid(), signal.SIGTERM)
        else:
            armed.append(kind)

    with register_module_forward_hook(spoil), register_optimizer_step_post_hook(spoil_moment), \
            at_line(line, act):
        yield
    assert not armed, f'nothing went wrong after {line}'


def read_log(folder):
    """log.jsonl without the times."""
    lines = Path(folder, 'log.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def logged(folder, name='loss'):
    """{iteration: the number of that name} of log.jsonl."""
    return {e['iter']: e[name] for e in read_log(folder) if name in e}


def equal(one, other):
    """Whether two trees of dicts, lists and tensors are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def differences(one, other, name='latest.pt'):
    """What two runs' folders don't share, [] if nothing: of log.jsonl and of a state."""
    found = [] if read_log(one) == read_log(other) else ['log.jsonl']
    a, b = (torch.load(Path(folder, name), weights_only=True) for folder in (one, other))
    assert a['config'].keys() == b['config'].keys() and a.keys() == b.keys()
    return found + [k for k in a if k not in UNLIKE and not equal(a[k], b[k])]


def hold(path):
    """A process that tries to lock a file until its input ends, and its answer: 'None', or who holds it."""
    program = ('import sys; from support.machine.files import lock\n'
               'print(lock(sys.argv[1]), flush=True); input()')
    process = subprocess.Popen([sys.executable, '-c', program, str(path)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, process.stdout.readline().strip()


class Processes:
    """Processes that run train.py again and again, which spares the import of torch each time."""

    def __init__(self, n):
        self.processes = [subprocess.Popen(
            [sys.executable, __file__, str(rank), str(n)], stdin=subprocess.PIPE, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS': '1'}) for rank in range(n)]
        atexit.register(self.close)

    def train(self, *args, line=None, kind=None, value=math.nan, rank=0, of_others=()):
        """Run train.py on all, with a fault on one. of_others: more arguments for all but the first.
        Returns for each: output, error, and the bytes that it held of parameters and of moments."""
        request = {'args': [*map(str, args)], 'of_others': [*map(str, of_others)], 'port': free_port()}
        request['fault'] = line and {'line': line, 'kind': kind, 'value': value,
                                     'pid': self.processes[rank].pid}
        for process in self.processes:
            print(json.dumps(request), file=process.stdin, flush=True)
        return [SimpleNamespace(**json.loads(p.stdout.readline())) for p in self.processes]

    def close(self):
        for process in self.processes:
            process.communicate()


@functools.cache
def two_processes():
    return Processes(2)


def work(rank, n):
    """A process's life: a request a line, a reply a line."""
    replies = sys.stdout
    for line in sys.stdin:
        request, error, held, sys.stdout = json.loads(line), None, None, io.StringIO()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(request['port']))
        is_watched = request['fault'] and rank == 0  # which prints
        try:
            with fault(**request['fault']) if is_watched else contextlib.nullcontext():
                script = runner.execute(ROOT / 'train.py', [
                    *request['args'], *(request['of_others'] if rank else [])])
            moments = [t for s in script['opt'].state.values() for t in s.values() if t.dim()]
            held = [sum((t.to_local() if hasattr(t, 'to_local') else t).nbytes for t in ts)  # this process's
                    for ts in (script['model'].parameters(), moments)]
            del script
        except (Exception, SystemExit) as e:
            error = f'{type(e).__name__}: {e}'
            traceback.clear_frames(e.__traceback__)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        reply = {'output': sys.stdout.getvalue(), 'error': error, 'held': held}
        print(json.dumps(reply), file=replies, flush=True)


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    work(int(sys.argv[1]), int(sys.argv[2]))
