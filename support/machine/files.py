"""Files: replaced in one step, read as text, downloaded whole, and explained in one line if unreadable."""

import hashlib
import http.client
import os
import pickle
import shutil
import socket
import struct
import urllib.parse
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

# what json, pickle, zipfile, struct, NumPy, torch and datasets raise for a truncated, damaged or hostile file
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OSError,
              ImportError, RuntimeError, OverflowError, MemoryError, StopIteration, struct.error,
              pickle.UnpicklingError, zipfile.BadZipFile)


@contextmanager
def explain_failure(message, *more_errors):
    """Turn what an unreadable file raises in this block into a one-line ValueError: message (reason).

    more_errors: types to catch besides UNREADABLE.
    """
    try:
        yield
    except (*UNREADABLE, *more_errors) as error:
        raise ValueError(f'{message} ({reason_of(error)})') from None


def reason_of(error):
    """An error's type and the first line of its message, or those of its cause."""
    error = error.__cause__ or error
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__


@contextmanager
def replacing(path, keep=None):
    """Yield a temporary path beside `path`, which at the end replaces `path` in one step.

    The new content is on the disk before the old file goes, which is renamed to `keep` if that is given. If
    anything fails, the temporary file is deleted and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.part')  # a killed process may leave one; the next overwrites it
    try:
        yield temporary
        flush_to_disk(temporary, os.O_RDWR)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix':  # the renaming is in the folder's own data; Windows can't open a folder
        flush_to_disk(path.parent, os.O_RDONLY)


def flush_to_disk(path, mode):
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path):
    """A UTF-8 file as a string with its line ends unchanged.

    Raises FileNotFoundError, or ValueError if it is not text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is missing')
    data = Path(path).read_bytes()
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error.reason} at byte {error.start:,})') from None
    if '\0' in text:
        raise ValueError(f'{path} is not text: it has zero bytes')
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
        raise FileNotFoundError(f'{url} can\'t be downloaded ({reason}); put the file at {path} yourself, '
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
