"""support/machine/files.py: replacing files, reading text, downloads, locks, errors of unreadable files."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from runs import hold

from support.machine.files import (download, is_held, lock, read_text, replacing,
                                   unlock)


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


@contextmanager
def one_line(match, kind=ValueError):
    with pytest.raises(kind, match=match) as error:
        yield error
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('missing', ['', 'link', 'fsync'])
def test_file_is_whole_and_there_at_every_moment(missing, tmp_path, monkeypatch):
    """Also on disks that have no links, or can't say when a file is on them."""
    path, keep, seen = tmp_path / 'file', tmp_path / 'kept', []
    path.write_text('a')

    def watched(real):
        def call(*args, **kwargs):
            seen.append(path.exists())
            return real(*args, **kwargs)
        return call
    for name in ('replace', 'link', 'unlink'):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    if missing:
        monkeypatch.setattr(os, missing, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, 'none')))
    for text, kept in (('b', 'a'), ('c', 'b')):
        with replacing(path, keep) as temporary:
            temporary.write_text(text)
            assert path.read_text() == kept
        assert contents(tmp_path) == {'file': text, 'kept': kept}
    with suppress(RuntimeError), replacing(path, keep) as temporary:
        temporary.write_text('d')
        raise RuntimeError
    assert contents(tmp_path) == {'file': 'c', 'kept': 'b'} and len(seen) > 5 and all(seen)


def test_content_is_on_the_disk_before_it_takes_the_old_one_s_place(monkeypatch, tmp_path):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda handle: (done.append('flushed'), fsync(handle)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(b.name), replace(a, b)))
    with replacing(tmp_path / 'file') as temporary:
        temporary.write_text('new')
    assert done.index('flushed') < done.index('file')


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    host = socket.gethostname()
    left = [tmp_path / f'file.{host}-{dead.pid}.part', tmp_path / f'file.{host}-{os.getppid()}.part',
            tmp_path / f'file.elsewhere-{dead.pid}.part']
    for path in left:
        path.write_text('half')
    with replacing(tmp_path / 'file') as temporary:
        temporary.write_text('new')
    assert [path.exists() for path in left] == [False, True, True]


def test_text_is_read_as_utf8_and_anything_else_is_refused(tmp_path):
    path = tmp_path / 'a.txt'
    for text in ('é\nb\n', 'é\r\nb\n', '\ufeffé\nb\r\n'):  # what Windows adds
        path.write_bytes(text.encode())
        assert read_text(path) == 'é\nb\n'
    for data, message in ((b'caf\xe9', 'not UTF-8 text.* at byte 3'), (b'a\0b', 'zero bytes')):
        path.write_bytes(data)
        with one_line(message):
            read_text(path)


BODY = b'To be, or not to be'
SHA256 = hashlib.sha256(BODY).hexdigest()
WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(BODY) + BODY


@contextmanager
def server(reply):
    """A server on this machine that answers one request with `reply`; yields its address and the requests."""
    requests = []

    def serve():
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(1 << 16))
                connection.sendall(reply)

    with socket.create_server(('127.0.0.1', 0)) as listener:
        listener.settimeout(30)
        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}/input.txt', requests


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')


def test_download_keeps_the_right_content_and_a_file_that_is_there(tmp_path):
    path = tmp_path / 'data' / 'input.txt'
    with server(WHOLE) as (url, requests):
        download(url, SHA256, path)
    assert contents(path.parent) == {'input.txt': BODY.decode()} and len(requests) == 1
    path.write_text('mine')
    download(url, SHA256, path)
    assert path.read_text() == 'mine'


@pytest.mark.parametrize('reply, reason', [
    (WHOLE.replace(b'not', b'now'), 'checksum'),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n' + BODY[:9], ''),  # cut in the middle
    (b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n', '404')])
def test_failing_download_names_the_way_round_and_leaves_nothing(reply, reason, tmp_path):
    with server(reply) as (url, _), \
            one_line(f'{reason}.*put the file at {tmp_path / "input.txt"}.*--input=', FileNotFoundError):
        download(url, SHA256, tmp_path / 'input.txt')
    assert list(tmp_path.iterdir()) == []


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / 'lock'
    first, answer = hold(path)
    assert answer == 'None'
    second, refusal = hold(path)
    assert refusal == f'process {first.pid} on {socket.gethostname()}' == lock(path)
    first.kill()
    for process in (first, second):
        process.communicate('')
    assert path.exists() and lock(path) is None and lock(path) is None
    assert is_held(path) and hold(path)[1].startswith(f'process {os.getpid()} ')  # looking didn't release it
    unlock(path)
    assert not path.exists()
