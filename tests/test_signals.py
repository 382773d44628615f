"""signals.py: all processes stop at the same iteration, and a second signal ends a stuck one."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from support.machine import signals
from support.machine.runtime import Runtime

HANGUP = [signal.SIGHUP] if hasattr(signal, 'SIGHUP') else []


@pytest.fixture
def stop_request():
    before = {n: signal.getsignal(n) for n in (*signals.stop_signals(), *HANGUP)}
    for number in HANGUP:  # which nohup ignores
        signal.signal(number, signal.SIG_DFL)
    yield signals.StopRequest(Runtime('cpu', 'float32', False, 'gloo'))
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_is_a_request_that_stays(number, stop_request, capfd):
    assert not stop_request.agreed()
    signal.raise_signal(number)
    assert stop_request.agreed() and stop_request.agreed()
    assert stop_request.close() is False  # there is no exchange to finish
    time.sleep(0.1)  # for the thread that tells it
    message = f'{number.name}: stopping at the next iteration, once more to stop at once\n'
    assert capfd.readouterr().err == message


def test_second_signal_within_half_a_second_counts_as_the_first(stop_request, capfd):
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # as torchrun and a terminal send them
        signal.raise_signal(number)
    time.sleep(0.1)
    assert stop_request.agreed() and capfd.readouterr().err.count('\n') == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='a mutex of zeros is Linux\'s')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_process_at_once_even_where_its_main_thread_is_stuck(number):
    child = os.fork()
    if child == 0:
        signals.signal_socket.cache_clear()  # its thread is the parent's
        signals.StopRequest(Runtime('cpu', 'float32', False, 'gloo'))
        signal.raise_signal(signal.SIGTERM)
        subprocess.Popen(['sh', '-c', f'sleep 0.7; kill -{number} {os.getpid()}'])
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time it waits for itself, in C, where no handler of Python's runs
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number


def test_signal_is_seen_by_all_processes_one_call_later(monkeypatch):
    """With the exchange of votes of two processes, the other of which never has a signal, in its place."""
    exchanged = []

    def all_reduce(votes, group, async_op):
        assert group == 'gloo' and async_op
        return SimpleNamespace(wait=lambda: exchanged.append(votes.item()))

    limits = []
    monkeypatch.setattr(signals.dist, 'new_group', lambda backend, timeout: limits.append(timeout) or backend)
    monkeypatch.setattr(signals.dist, 'all_reduce', all_reduce)
    monkeypatch.setattr(signal, 'signal', lambda number, handler: None)
    monkeypatch.setattr(signal, 'set_wakeup_fd', lambda *_, **__: None)
    request = signals.StopRequest(Runtime('cpu', 'float32', False, 'gloo', 0, 2, timeout=7))
    assert [limit.total_seconds() for limit in limits] == [7]
    answers = [request.agreed(), request.agreed()]
    request.received = signal.SIGTERM
    answers += [request.agreed(), request.agreed()]
    assert answers == [False, False, False, True] and exchanged == [0, 0, 1]
    assert request.close() is True and len(exchanged) == 4 and request.close() is False


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='Windows has no SIGHUP')
def test_closed_terminal_is_a_request_to_stop_but_not_under_nohup(stop_request):
    signal.raise_signal(signal.SIGHUP)
    assert stop_request.agreed()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signals.stop_signals() == (signal.SIGINT, signal.SIGTERM)


def test_work_is_broken_off_at_the_next_batch(stop_request):
    done = []
    with pytest.raises(signals.Stopped):
        for batch in stop_request.watch(range(9)):
            done.append(batch)
            if batch == 3:
                signal.raise_signal(signal.SIGTERM)
    assert done == [0, 1, 2, 3]


def test_work_of_one_process_asks_no_other_and_ends_alone(stop_request, monkeypatch):
    monkeypatch.setattr(signals.dist, 'all_reduce', None)  # nothing to call
    stop_request.received, stop_request.group = signal.SIGTERM, 'others'
    with stop_request.alone():
        stop_request.check()
        raise AssertionError
    assert stop_request.group == 'others'
    stop_request.group = None
    with pytest.raises(signals.Stopped), stop_request.alone():
        stop_request.check()
