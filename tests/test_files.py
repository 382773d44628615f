"""support/machine/files.py: replacing files, reading text, downloads, and errors of unreadable files."""

import errno
import hashlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from conftest import ROOT

from support.machine.files import download, explain_failure, lock, read_text, replacing, unlock


def assert_one_line(error):
    assert str(error.value) and '\n' not in str(error.value)


# ---------------------------------------------------------------------------- replacing

def test_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with replacing(path) as temporary:
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_old_file_is_kept_under_another_name_where_there_is_one(tmp_path):
    path, keep = tmp_path / 'file', tmp_path / 'kept'
    for text, kept in (('a', None), ('b', 'a'), ('c', 'b')):
        with replacing(path, keep) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text and (keep.read_text() if keep.exists() else None) == kept
    with suppress(RuntimeError), replacing(path, keep) as temporary:
        temporary.write_text('d')
        raise RuntimeError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {'file': 'c', 'kept': 'b'}


# ---------------------------------------------------------------------------- text

@pytest.mark.parametrize('data', ['é\nb\n', 'é\r\nb\n', '\ufeffé\nb\r\n'])
def test_text_is_read_as_utf8_without_what_windows_adds(data, tmp_path):
    (tmp_path / 'a.txt').write_bytes(data.encode())
    assert read_text(tmp_path / 'a.txt') == 'é\nb\n'


@pytest.mark.parametrize('data, message', [
    (b'caf\xe9', 'not UTF-8 text.* at byte 3'), (b'a\0b', 'zero bytes'),
])
def test_file_that_is_no_text_is_refused(data, message, tmp_path):
    (tmp_path / 'a.txt').write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_text(tmp_path / 'a.txt')
    assert_one_line(error)


# ---------------------------------------------------------------------------- unreadable files

def damaged_files():
    """Functions that read damaged data, with every library that reads our files."""
    archive = io.BytesIO()
    torch.save({'weights': torch.zeros(9)}, archive)
    return {
        'json': lambda: json.loads('{"a": '), 'deep json': lambda: json.loads('[' * 100_000),
        'text': lambda: b'\xff'.decode(), 'pickle': lambda: pickle.loads(b'x'),
        'cut pickle': lambda: pickle.loads(pickle.dumps(['abc'])[:-3]),
        'empty pickle': lambda: pickle.loads(b''), 'unknown module': lambda: pickle.loads(b'cnowhere\nf\n.'),
        'long pickle': lambda: pickle.loads(b'\x80\x04\x8e' + b'\xff' * 8 + b'.'),
        'no state': lambda: torch.load(io.BytesIO(b'abc'), weights_only=True),
        'cut state': lambda: torch.load(io.BytesIO(archive.getvalue()[:-9]), weights_only=True),
        'zip': lambda: zipfile.ZipFile(io.BytesIO(b'PK')), 'struct': lambda: struct.unpack('<H', b'a'),
        'NumPy': lambda: np.load(io.BytesIO(b'\x93NUMPY')), 'no rows': lambda: next(iter([])),
        'missing': lambda: open('no such file'), 'number': lambda: len(3), 'list': lambda: [].get('key'),
        'no key': lambda: {}['key'],
    }


@pytest.mark.parametrize('kind', damaged_files())
def test_any_damage_is_one_line_that_starts_with_the_message(kind):
    with pytest.raises(ValueError, match=r'^file.bin is damaged \(\w+.*\)$') as error, \
            explain_failure('file.bin is damaged'):
        damaged_files()[kind]()
    assert_one_line(error)
    assert error.value.__suppress_context__


def test_reason_is_the_first_line_of_an_error_or_of_its_cause():
    with pytest.raises(ValueError, match=r'^no \(KeyError: \'id\'\)$'), explain_failure('no'):
        raise RuntimeError('two\nlines') from KeyError('id')
    with pytest.raises(ValueError, match=r'^no \(OSError: x{300}\)$'), explain_failure('no'):
        raise OSError('x' * 999)
    with pytest.raises(ValueError, match=r'^no \(OSError: two\)$'), explain_failure('no'):
        raise OSError('\ntwo\nlines')
    with pytest.raises(ValueError, match=r'^no \(EOFError\)$'), explain_failure('no'):
        raise EOFError


def test_programming_errors_and_interruptions_pass():
    class TheirError(Exception):
        pass

    for error in (KeyboardInterrupt, NameError, TheirError):
        with pytest.raises(error), explain_failure('no'):
            raise error
    with pytest.raises(ValueError, match=r'^no \(TheirError\)$'), explain_failure('no', TheirError):
        raise TheirError
    with explain_failure('no'):
        pass


# ---------------------------------------------------------------------------- downloading

BODY = b'To be, or not to be'
SHA256 = hashlib.sha256(BODY).hexdigest()
WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(BODY) + BODY


@contextmanager
def server(reply, stall=False):
    """A server on this machine that answers one request with `reply`; yields its address and the requests."""
    requests, done = [], threading.Event()

    def serve():
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(1 << 16))
                connection.sendall(reply)
                if stall:
                    done.wait(10)  # then the file ends, with a wrong checksum

    with socket.create_server(('127.0.0.1', 0)) as listener:
        listener.settimeout(30)
        threading.Thread(target=serve, daemon=True).start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}/input.txt', requests
        done.set()


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')


def test_download_keeps_the_right_content(direct, tmp_path):
    with server(WHOLE) as (url, requests):
        download(url, SHA256, tmp_path / 'data' / 'input.txt')
    assert (tmp_path / 'data' / 'input.txt').read_bytes() == BODY and len(requests) == 1
    assert [p.name for p in (tmp_path / 'data').iterdir()] == ['input.txt']


def test_file_that_is_there_is_kept_without_a_request(direct, tmp_path):
    (tmp_path / 'input.txt').write_text('mine')
    with server(WHOLE) as (url, requests):
        download(url, SHA256, tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_text() == 'mine' and requests == []


@pytest.mark.parametrize('reply, reason', [
    (WHOLE.replace(b'not', b'now'), 'checksum'),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n' + BODY[:9], ''),  # cut in the middle
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n' + BODY, ''),  # the same, in chunks
    (b'HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n', ''),
    (b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n', '404'),
    (b'SSH-2.0-OpenSSH_9.6\r\n', ''),
    (b'', ''),
], ids=['checksum', 'cut', 'cut chunk', 'no length', '404', 'no HTTP', 'nothing'])
def test_failing_download_names_the_way_round_and_leaves_nothing(reply, reason, direct, tmp_path):
    with server(reply) as (url, _), pytest.raises(FileNotFoundError, match=f'{reason}.*--input=') as error:
        download(url, SHA256, tmp_path / 'input.txt')
    assert_one_line(error)
    assert str(tmp_path / 'input.txt') in str(error.value) and list(tmp_path.iterdir()) == []


def test_server_that_stalls_is_given_up(direct, tmp_path):
    with server(WHOLE[:-5], stall=True) as (url, _), pytest.raises(FileNotFoundError, match='timed out'):
        download(url, SHA256, tmp_path / 'input.txt', timeout=0.5)
    assert list(tmp_path.iterdir()) == []


def test_server_that_is_not_there_is_told(direct, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FileNotFoundError, match='--input=FILE'):
        download(f'http://127.0.0.1:{port}/input.txt', SHA256, tmp_path / 'input.txt')
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- one writer

def test_file_is_never_absent_while_it_is_replaced(tmp_path, monkeypatch):
    path, keep, seen = tmp_path / 'file', tmp_path / 'kept', []
    path.write_text('old')
    for name in ('replace', 'link', 'unlink'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **k: (seen.append(path.exists()), real(*a, **k)))
    for linkable in (True, False):
        if not linkable:
            monkeypatch.setattr(os, 'link', lambda *a: (_ for _ in ()).throw(OSError(95, 'no hard links')))
        with replacing(path, keep) as temporary:
            temporary.write_text('new')
        assert keep.read_text() == ('old' if linkable else 'new') and path.read_text() == 'new'
    assert len(seen) > 3 and all(seen)


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


HOLD = 'import sys; from support.machine.files import lock; print(lock(sys.argv[1]), flush=True); input()'


def hold(path):
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(path)], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, cwd=ROOT)
    return process, process.stdout.readline().strip()


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
    unlock(path)
    assert not path.exists()


def test_a_lock_is_had_where_the_file_system_has_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    monkeypatch.setattr(fcntl, 'lockf', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'no locks')))
    assert lock(tmp_path / 'lock') is None
    unlock(tmp_path / 'lock')
