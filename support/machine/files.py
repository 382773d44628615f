"""Files: replaced in one step, locked, read as text, downloaded whole, explained in a line if unreadable."""

import contextlib
import errno
import glob
import hashlib
import http.client
import os
import pickle
import shutil
import socket
import struct
import time
import urllib.parse
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

from support.errors import MissingFile, UserError, kind_of

# what json, pickle, zipfile, struct, NumPy, torch and datasets raise for a truncated, damaged or hostile file
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OSError,
              ImportError, RuntimeError, OverflowError, MemoryError, StopIteration, struct.error,
              pickle.UnpicklingError, zipfile.BadZipFile)


@contextmanager
def explain_failure(message, *more_errors, passing=()):
    """Turn what an unreadable file raises in this block into a one-line ValueError: message (reason).

    more_errors: types to catch besides UNREADABLE. passing: types that aren't the file's fault here.
    """
    try:
        yield
    except passing:
        raise
    except (*UNREADABLE, *more_errors) as error:
        raise UserError(f'{message} ({reason_of(error)})') from None


def reason_of(error):
    """An error's type and the first line of its message, or those of its cause."""
    error = error.__cause__ or error
    lines = str(error).strip().splitlines()
    return f'{kind_of(error)}: {lines[0][:300]}' if lines else kind_of(error)


@contextmanager
def replacing(path, keep=None):
    """Yield a temporary path beside `path`, which at the end replaces `path` in one step.

    The new content is on the disk before the old file goes, which gets the name `keep` if that is given.
    `path` exists all the time. If anything fails, the temporary file is deleted and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = own_name(path)
    remove_leftovers(path)
    try:
        yield temporary
        flush_to_disk(temporary, os.O_RDWR)
        if keep and path.exists():
            link(path, Path(keep))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix':  # the renaming is in the folder's own data; Windows can't open a folder
        flush_to_disk(path.parent, os.O_RDONLY)


def own_name(path):
    """A name beside `path` that no other process writes to, so what is signed is what was written."""
    return path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.part')


def link(path, name):
    """Give a file a second name, in place of the file that has it; a copy where there are no hard links."""
    temporary = own_name(name)
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:
        name.unlink(missing_ok=True)  # makes room for the copy
        shutil.copyfile(path, temporary)
        flush_to_disk(temporary, os.O_RDWR)
    os.replace(temporary, name)


def remove_leftovers(path):
    """Remove the temporary files that killed processes of this machine left beside `path`."""
    host = socket.gethostname()
    for left in path.parent.glob(f'{glob.escape(path.name)}.{glob.escape(host)}-*.part'):
        pid = left.name.removesuffix('.part').rpartition('-')[2]
        if pid.isdigit() and int(pid) != os.getpid() and not is_running(int(pid)):
            left.unlink(missing_ok=True)


def is_running(pid):
    """Whether a process of this machine is running; True if unknown."""
    if os.name != 'posix':
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def flush_to_disk(path, mode):
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LOCKS = {}  # {path: file}, open as long as the process lives or until `unlock`


def lock(path):
    """Hold a file alone until `unlock` or the process's end, however it ends. None if this process holds it
    now, else the process that does, in words. Raises OSError if the file can't be written.

    Record locks of POSIX hold on network file systems too, as far as these have locks at all; where there are
    none, every process gets the lock. Children don't inherit them.
    """
    path = os.path.realpath(path)
    while path not in LOCKS:
        file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115, it must stay open
        if not try_lock(file):
            time.sleep(0.1)  # it may be about to write its name
            file.seek(0)
            holder = file.read() or 'another process'
            file.close()
            return holder
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()
            LOCKS[path] = file
        else:
            file.close()  # its last holder has removed it
    return None


def is_held(path):
    """Whether the file of this name is still the one that this process has locked; True if the disk can't
    say, or nothing was locked."""
    file = LOCKS.get(os.path.realpath(path))
    if file is None:
        return True
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return True
    except FileNotFoundError:
        pass
    except OSError:
        return True
    LOCKS.pop(os.path.realpath(path)).close()
    return False


def try_lock(file):
    """Whether this process has got a lock on an open file, or locks don't exist there."""
    try:
        if os.name == 'nt':
            import msvcrt
            file.seek(1 << 30)  # beyond the text: other processes can't read a locked byte
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def unlock(path):
    """Release a lock and remove its file; nothing if this process doesn't hold it."""
    path = os.path.realpath(path)
    if path in LOCKS:
        with contextlib.suppress(OSError):
            os.remove(path)
        LOCKS.pop(path).close()


def read_text(path):
    """A UTF-8 file as a string, without a byte-order mark and with Unix's line ends.

    Raises FileNotFoundError, or ValueError if it is not text.
    """
    if not Path(path).is_file():
        raise MissingFile(f'{path} is missing')
    data = Path(path).read_bytes()
    try:
        text = data.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text ({error.reason} at byte {error.start:,}): save it as '
                         'UTF-8') from None
    if '\0' in text:
        raise UserError(f'{path} is not text: it has zero bytes')
    return text


def free_disk(folder):
    """Free bytes on the disk of `folder`, which need not exist yet."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def download(url, sha256, path, timeout=30):
    """Download a file unless `path` exists. timeout: seconds without a byte.

    Raises FileNotFoundError, which says how to do without, if the file doesn't arrive whole; leaves no part
    of it behind.
    """
    path = Path(path)
    if path.exists():
        return
    from tqdm import tqdm
    try:
        with replacing(path) as temporary, urllib.request.urlopen(url, timeout=timeout) as reply, \
                open(temporary, 'wb') as file, \
                tqdm(total=reply.length, unit='B', unit_scale=True, desc=path.name) as bar:
            digest = hashlib.sha256()
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise OSError('its checksum is wrong')
    except (OSError, http.client.HTTPException) as error:
        reason = ' '.join(str(error).split())
        raise MissingFile(f'{url} can\'t be downloaded ({reason}); put the file at {path} yourself, '
                                'or name one with --input=FILE') from None


def go_offline_if_cut_off():
    """Tell Hugging Face's libraries to use their caches at once if the hub can't be reached: by themselves
    they retry for half a minute. Call it before they are imported."""
    host = urllib.parse.urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')).hostname
    if 'HF_HUB_OFFLINE' in os.environ or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'
