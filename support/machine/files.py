"""Files: replaced in one step, read through passing errors, locked, read as text, downloaded."""

import errno
import glob
import hashlib
import http.client
import os
import pickle
import shutil
import socket
import stat
import struct
import time
import urllib.parse
import urllib.request
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

from support.errors import MissingFile, UserError, kind_of
from support.machine.console import print0

# what json, pickle, zipfile, struct, NumPy, torch and datasets raise for a damaged or hostile file
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OSError,
              ImportError, RuntimeError, OverflowError, MemoryError, StopIteration, struct.error,
              pickle.UnpicklingError, zipfile.BadZipFile)
LACKING = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # no such operation there
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
           errno.ELOOP, errno.ENOMEM, errno.EINVAL)  # no use to try again
WAITS = (0.2, 1.0, 3.0)  # seconds before a file is read again that the disk could not read


@contextmanager
def explain_failure(message, *more_errors, passing=()):
    """Turn what an unreadable file raises in this block into a UserError: message (reason).

    more_errors: types to catch besides UNREADABLE. passing: types that aren't the file's fault.
    """
    try:
        yield
    except passing:
        raise
    except MissingFile:  # names its file already
        raise
    except (*UNREADABLE, *more_errors) as error:
        raise UserError(f'{message} ({reason_of(error)})') from None


def reason_of(error):
    """An error's type and the first line of its message, or those of its cause."""
    error = error.__cause__ or error
    lines = str(error).strip().splitlines()
    return f'{kind_of(error)}: {lines[0][:300]}' if lines else kind_of(error)


# ---------------------------------------------------------------------------- writing

@contextmanager
def replacing(path, keep=None):
    """Yield a temporary path beside `path`, which at the end replaces `path` in one step.

    The new content is on the disk before the old file goes, which gets the name `keep` if that is
    given. If anything fails, the temporary file is deleted, and the old file stays. What only makes
    it safer (flushing, keeping) may be missing on a disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = own_name(path)
    remove_leftovers(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        try:
            if keep and path.exists():
                link(path, Path(keep))
        except OSError as error:  # the new file is whole all the same
            print0(f'{path} could not be kept as {keep} ({reason_of(error)})')
        rename(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # the renaming, in the folder's own data; Windows can't open a folder
        flush_to_disk(path.parent)


def own_name(path):
    """A name beside `path` that no other process writes to."""
    return path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.part')


def rename(path, name):
    """os.replace. A network disk that lost its first answer may fail after it was done."""
    before = os.stat(path)
    try:
        os.replace(path, name)
    except OSError:
        if not os.path.exists(name) or not os.path.samestat(before, os.stat(name)):
            raise


def link(path, name):
    """Give a file a second name, in place of the file that has it; a copy without hard links."""
    temporary = own_name(name)
    try:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(path, temporary)
        if not temporary.exists():
            name.unlink(missing_ok=True)  # makes room for the copy
            shutil.copyfile(path, temporary)
            flush_to_disk(temporary)
        rename(temporary, name)
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(path):
    """Remove the temporary files that killed processes of this machine left beside `path`."""
    host = socket.gethostname()
    with suppress(OSError):
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


def flush_to_disk(path):
    """fsync, where the disk has it."""
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------- reading what is there

MAPPED = 1 << 26  # bytes to read before a file is mapped anew: what was read counts as memory


class HeldFile:
    """A file that is opened once, for programs that read it in several ways. It remembers an error
    of the disk, which zipfile and torch.load may take for damage."""

    def __init__(self, path):
        self.file, self.path, self.error = open(path, 'rb'), path, None  # noqa: SIM115, kept open
        self.is_archive = self.read(2) == b'PK'  # a zip file
        self.seek(0)

    def call(self, method, *args):
        try:
            return getattr(self.file, method)(*args)
        except OSError as error:
            if error.errno != errno.EINVAL:  # to seek before the beginning of a short file
                self.error = error
            raise

    def read(self, size=-1):
        return self.call('read', size)

    def readline(self):
        return self.call('readline')

    def readinto(self, buffer):
        return self.call('readinto', buffer)

    def seek(self, offset, whence=0):
        return self.call('seek', offset, whence)

    def tell(self):
        return self.call('tell')

    def seekable(self):
        return True

    def size(self):
        return os.fstat(self.file.fileno()).st_size

    def name(self):
        """A path of the open file, whatever its own path names by now; on Linux only."""
        opened = f'/proc/self/fd/{self.file.fileno()}'
        return opened if os.path.exists(opened) else self.path

    def is_the_same(self):
        """Whether `name` was a path of the open file all the time, as far as the disk can say."""
        return self.name() != self.path or is_same_file(self.file, self.path)


def patiently(function, *args):
    """function(*args), again after each of WAITS if the disk gives an error that may pass."""
    for seconds in WAITS:
        try:
            return function(*args)
        except OSError as error:
            if error.errno in LASTING:
                raise
            time.sleep(seconds)
    return function(*args)


def read_bytes(path):
    """What a file holds. MissingFile if the disk can't give it, which says nothing about its
    content."""
    try:
        return patiently(Path(path).read_bytes)
    except OSError as error:
        raise unread(path, error) from None


def unread(path, error):
    """The MissingFile of a file that is there, and can't be read."""
    if error.errno in LASTING:
        return MissingFile(f'{path} can\'t be read ({reason_of(error)})')
    return MissingFile(f'{path} can\'t be read now ({reason_of(error)}): nothing was changed, try '
                       'again when the disk answers')


def regular_file(path):
    """Whether there is a file. Unlike Path.is_file, raises an OSError if the disk can't say."""
    try:
        return stat.S_ISREG(patiently(os.stat, path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise


# ---------------------------------------------------------------------------- locks

LOCKS = {}  # {path: file}, open as long as the process lives or until `unlock`
UNNUMBERED = set()  # those on a disk where a file has another inode number at each look
MOST_LOCKS = 9  # attempts, each at a file that its holder has removed


def lock(path):
    """Hold a file alone until `unlock` or the process's end, however it ends. None if this process
    holds it now, else the process that does, in words. Raises OSError if the file can't be written.

    Record locks of POSIX hold on network file systems too, as far as these have locks at all; where
    there are none, every process gets the lock. Children don't inherit them.
    """
    path = os.path.realpath(path)
    for attempt in range(MOST_LOCKS):
        if path in LOCKS:
            break
        file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115, it must stay open
        if not try_lock(file):
            time.sleep(0.1)  # it may be about to write its name
            file.seek(0)
            holder = file.read() or 'another process'
            file.close()
            return holder
        is_same = is_same_file(file, path)  # or else its last holder has just removed it
        if is_same or attempt == MOST_LOCKS - 1:
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()
            LOCKS[path] = file
            if not is_same:
                UNNUMBERED.add(path)
        else:
            file.close()
    return None


def is_same_file(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def is_held(path):
    """Whether the file that this process has locked still has its name; True if the disk can't say,
    or nothing was locked."""
    path = os.path.realpath(path)
    if path not in LOCKS:
        return True
    try:
        # opening it here and closing it again would release the lock
        return path in UNNUMBERED and os.path.exists(path) or is_same_file(LOCKS[path], path)
    except OSError:
        return True


def lock_again(path):
    """`lock`, for a file that this process holds no longer, see is_held."""
    name = os.path.realpath(path)
    file = LOCKS.pop(name)
    try:
        holder = lock(path)
    except OSError:
        LOCKS[name] = file
        raise
    file.close()
    return holder


def holds(path):
    """Whether this process has locked a file."""
    return os.path.realpath(path) in LOCKS


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
        if is_held(path):  # or else another process may have that name by now
            with suppress(OSError):
                os.remove(path)
        LOCKS.pop(path).close()


def read_text(path):
    """A UTF-8 file as a string, without a byte-order mark and with Unix's line ends.

    Raises MissingFile, or UserError if it is not text.
    """
    if not regular_file(path):
        raise MissingFile(f'{path} is missing')
    data = read_bytes(path)
    try:
        text = data.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text ({error.reason} at byte {error.start:,}): save '
                        'it as UTF-8') from None
    if '\0' in text:
        raise UserError(f'{path} is not text: it has zero bytes')
    return text


def free_disk(folder):
    """Free bytes on the disk of `folder`, which need not exist yet; 0 if the disk doesn't say."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def download(url, sha256, path, timeout=30):
    """Download a file unless `path` exists. timeout: seconds without a byte.

    Raises MissingFile, which says how to do without, if the file doesn't arrive whole; leaves no
    part of it behind.
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
        raise MissingFile(f'{url} can\'t be downloaded ({reason}); put the file at {path} '
                          'yourself, or name one with --input=FILE') from None


def go_offline_if_cut_off():
    """Make Hugging Face's libraries use their caches at once if the hub can't be reached. By
    themselves they retry for half a minute. Call it before they are imported."""
    host = urllib.parse.urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')).hostname
    if 'HF_HUB_OFFLINE' in os.environ or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'
