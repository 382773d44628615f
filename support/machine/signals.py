"""SIGTERM, SIGINT and SIGHUP as a request to stop, on which all processes agree."""

import contextlib
import functools
import os
import signal
import socket
import threading
import time

import torch
import torch.distributed as dist


class Stopped(Exception):
    """Raised in work that a request to stop breaks off."""


class StopRequest:
    """A signal to any process makes all of them stop at the same place.

    A second signal ends the process at once. Within half a second it counts as the first, because launchers
    and terminals often deliver a signal twice.
    """

    def __init__(self, run):
        self.received = None  # the first signal
        self.group = run.new_group('gloo') if run.world_size > 1 else None
        self.votes = self.work = None
        # Python calls handlers in the main thread, which may be stuck in C: another thread gets signals too
        alarm = signal_socket()
        alarm.send(b'\0')
        signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
        for number in stop_signals():
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = self.received or number

    def agreed(self):
        """Whether to stop, the same answer on all processes, which must call it equally often. The votes of
        several processes are exchanged on the CPU meanwhile, and the next call returns their result."""
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
        """Within a with statement that only this process enters, it asks no other, and Stopped ends no more
        than the statement if there are others."""
        group, self.group = self.group, None if is_alone else self.group
        try:
            yield
        except Stopped:
            if self.group is group:
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
    """SIGINT, SIGTERM and, unless it is ignored, as under nohup, the SIGHUP of a closed terminal."""
    hang_up = getattr(signal, 'SIGHUP', None)  # Windows has none
    ignored = hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if ignored else (signal.SIGINT, signal.SIGTERM, hang_up)


@functools.cache
def signal_socket():
    """A socket for the numbers of signals, which a thread of this process reads and acts on."""
    numbers, alarm = socket.socketpair()
    alarm.setblocking(False)
    # the thread holds both ends: one closed at exit would wake it, which aborts the process
    threading.Thread(target=end_at_second, args=(numbers, alarm), daemon=True).start()
    return alarm


def end_at_second(numbers, _):
    """Announce the first signal; end the process at one that follows half a second later or more. A 0 starts
    afresh."""
    first = None  # time of the first signal
    while True:
        number = numbers.recv(1)[0]
        if number == 0:
            first = None
        elif first is None:
            first, name = time.monotonic(), signal.Signals(number).name
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, f'{name}: stopping at the next iteration, once more to stop at once\n'.encode())
        elif time.monotonic() - first > 0.5:
            os._exit(128 + number)
