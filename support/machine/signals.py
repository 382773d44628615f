"""SIGTERM and SIGINT as a request to stop, on which all processes agree."""

import functools
import os
import signal
import socket
import threading
import time

import torch
import torch.distributed as dist


class StopRequest:
    """A signal to any process makes all of them stop at the same iteration.

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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = self.received or number

    def agreed(self):
        """Whether to stop, the same answer on all processes. Call it once an iteration: the votes of several
        processes are exchanged on the CPU meanwhile, and the next call returns their result."""
        if self.group is None:
            return self.received is not None
        result = self.close()
        self.votes = torch.tensor([self.received is not None], dtype=torch.int32)
        self.work = dist.all_reduce(self.votes, group=self.group, async_op=True)
        return result

    def close(self):
        """Finish the last exchange of votes and return its result."""
        if self.work is None:
            return False
        self.work.wait()
        self.work = None
        return bool(self.votes.item())


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
            os.write(2, f'{name}: stopping at the next iteration, once more to stop at once\n'.encode())
        elif time.monotonic() - first > 0.5:
            os._exit(128 + number)
