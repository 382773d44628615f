"""SIGINT, SIGTERM, SIGHUP and schedulers' warnings as a request to stop, on which all processes
agree."""

import contextlib
import functools
import os
import signal
import socket
import threading
import time

import torch
import torch.distributed as dist

from support.machine.console import is_first_process

# schedulers send one of these some time before SIGTERM; SIGXCPU says that the CPU time is used up
WARNINGS = [getattr(signal, name) for name in ('SIGUSR1', 'SIGUSR2', 'SIGXCPU')
            if hasattr(signal, name)]  # Windows has none


class Stopped(Exception):
    """Raised in work that is interrupted by a request to stop."""


class StopRequest:
    """A signal to any process makes all of them stop at the same place.

    A second signal ends the process at once. Within half a second it counts as the first, because
    launchers and terminals often deliver a signal twice.
    """

    def __init__(self, run):
        self.received = None  # the first signal
        self.group = run.new_group('gloo') if run.world_size > 1 else None
        self.votes = self.work = None
        # Python calls handlers in the main thread, which may be stuck in C: a thread gets them too
        alarm = signal_socket()
        alarm.send(b'\0')
        signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
        for number in stop_signals():
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = self.received or number

    def agreed(self):
        """Whether to stop, the same answer on all processes, which must call it equally often.
        Several processes exchange their votes on the CPU meanwhile; the next call returns the
        result."""
        if self.group is None:
            return self.received is not None
        result = self.close()
        self.votes = torch.tensor([self.received is not None], dtype=torch.int32)
        self.work = dist.all_reduce(self.votes, group=self.group, async_op=True)
        return result

    def check(self, *_):
        """Raise Stopped if it is agreed to stop."""
        if self.agreed():
            raise Stopped

    def watch(self, batches):
        """The batches; raises Stopped before the next one if it is agreed to stop."""
        for batch in batches:
            self.check()
            yield batch

    @contextlib.contextmanager
    def alone(self, is_alone=True):
        """For work of this process alone: polls only this process. If there are others, they keep
        running, and Stopped ends the with statement only."""
        group = self.group
        if is_alone:
            self.group = None
        try:
            yield
        except Stopped:
            if group is None or not is_alone:
                raise
        finally:
            self.group = group

    def close(self):
        """Finish the last exchange of votes and return its result."""
        if self.work is None:
            return False
        self.work.wait()
        self.work = None
        return bool(self.votes.item())


def stop_signals():
    """SIGINT, SIGTERM, and unless they are ignored, as under nohup, the SIGHUP of a closed terminal
    and WARNINGS."""
    optional = [*WARNINGS, *([signal.SIGHUP] if hasattr(signal, 'SIGHUP') else [])]
    not_ignored = [n for n in optional if signal.getsignal(n) != signal.SIG_IGN]
    return (signal.SIGINT, signal.SIGTERM, *not_ignored)


@functools.cache
def signal_socket():
    """A socket for the numbers of signals, which a thread of this process reads and acts on."""
    numbers, alarm = socket.socketpair()
    alarm.setblocking(False)
    # the thread holds both ends: one closed at exit would wake it, which aborts the process
    threading.Thread(target=end_at_second, args=(numbers, alarm), daemon=True).start()
    return alarm


def end_at_second(numbers, _):
    """Announce the first signal; end the process at one that follows half a second later or more.
    WARNINGS don't count, so that the SIGTERM after them leaves time to save. A 0 starts afresh."""
    first = None  # time of the first signal
    while True:
        number = numbers.recv(1)[0]
        if number == 0:
            first = None
        elif number in WARNINGS:
            announce(number)
        elif first is None:
            first = time.monotonic()
            announce(number)
        elif time.monotonic() - first > 0.5:
            os._exit(128 + number)


def announce(number):
    """Say on the first process what a signal does."""
    line = f'{signal.Signals(number).name}: stopping after this iteration and saving.\n'
    if number == signal.SIGINT:
        line = ('Stopping after this iteration and saving; '
                'press Ctrl-C again to quit immediately.\n')
    if is_first_process():
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, line.encode())
