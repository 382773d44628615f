"""
What a run tells: a line of JSON for each logged iteration and evaluation, and the same to wandb where wanted.

    log = RunLog('out/log.jsonl', first_iter=0)
    log.write({'iter': 0, 'loss': 10.9})
    pandas.read_json('out/log.jsonl', lines=True)
"""

import json
from pathlib import Path

from dataset import replacing
from runtime import print0


class RunLog:
    """A file of JSON lines that a resumed run goes on with, each iteration in it once.

    The lines from `first_iter` on, which the resumed run will write again, are removed. Where the disk is
    full, lines wait in memory for the next one. path: None writes nothing.
    """

    def __init__(self, path, first_iter=0):
        self.file, self.waiting, self.failed = None, b'', False
        if path is None:
            return
        path = Path(path)
        lines = path.read_bytes().splitlines() if first_iter and path.is_file() else []
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(b''.join(line + b'\n' for line in lines if is_before(line, first_iter)))
        except OSError as error:
            print0(f'{path} could not be written: {error}')
        self.file = open(path, 'ab', buffering=0)  # noqa: SIM115, it stays open; unbuffered: a crash loses none

    def write(self, entry):
        """entry: a dict of plain values, with the iteration as 'iter'."""
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

    def close(self):
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
        if self.is_on:
            self.call('init', **settings)

    def call(self, function, *args, **kwargs):
        if self.is_on:
            try:
                import wandb
                getattr(wandb, function)(*args, **kwargs)
            except Exception as error:
                self.is_on = False
                print0(f'wandb is off from here on: {type(error).__name__}: {error}')
