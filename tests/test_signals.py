"""signals.py: all processes stop at the same iteration, and a second signal ends a stuck one."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from support.machine import signals
from support.machine.runtime import Runtime

ONE_PROCESS = Runtime('cpu', 'float32', False, 'gloo')
OPTIONAL = [getattr(signal, name) for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
            if hasattr(signal, name)]


@pytest.fixture
def stop_request():
    for number in OPTIONAL:  # nohup ignores SIGHUP
        signal.signal(number, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in signals.stop_signals()}
    yield signals.StopRequest(ONE_PROCESS)
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, *OPTIONAL])
def test_signal_is_a_request_that_stays_and_is_announced_once(number, stop_request, capfd):
    assert not stop_request.agreed()
    for again in (number, signal.SIGTERM, signal.SIGINT):  # launchers and terminals send several
        signal.raise_signal(again)
    assert stop_request.agreed() and stop_request.agreed() and not stop_request.close()
    time.sleep(0.1)  # for the thread that announces it
    lines = capfd.readouterr().err.splitlines()
    assert 'topping after this iteration and saving' in lines[0]
    assert ('press Ctrl-C again' if number == signal.SIGINT else f'{number.name}: ') in lines[0]
    assert len(lines) == (2 if number in signals.WARNINGS else 1)


@pytest.mark.skipif(sys.platform != 'linux', reason='a mutex of zeros is Linux\'s')
@pytest.mark.parametrize('first, second, ends', [
    ('TERM', 'TERM', True), ('INT', 'INT', True), ('USR1', 'TERM', False)])
def test_second_signal_ends_even_a_stuck_process_unless_one_is_a_warning(first, second, ends):
    child = os.fork()
    if child == 0:
        signals.signal_socket.cache_clear()  # its thread is the parent's
        signals.StopRequest(ONE_PROCESS)
        os.kill(os.getpid(), getattr(signal, f'SIG{first}'))
        subprocess.Popen(['sh', '-c', f'sleep 0.7; kill -{second} {os.getpid()}'])
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 10 if ends else 1.2)
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time it waits for itself, in C: no handler of Python's runs
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (128 + getattr(signal, f'SIG{second}') if ends else -signal.SIGALRM)


def test_ignored_signals_stay_ignored_as_under_nohup(stop_request):
    assert {*OPTIONAL, signal.SIGINT, signal.SIGTERM} <= set(signals.stop_signals())
    for number in OPTIONAL:
        signal.signal(number, signal.SIG_IGN)
    assert not set(OPTIONAL) & set(signals.stop_signals())
