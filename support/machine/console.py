"""Standard output and errors: lines of the first process only, some of them live; an error is one line."""

import atexit
import contextlib
import os
import shutil
import sys
from pathlib import Path

import support
from support.errors import USER_ERRORS, kind_of

STYLES = {'bold': '1', 'cyan': '36', 'bold red': '1;31'}  # codes of ECMA-48, "select graphic rendition"
ROOT = Path(support.HERE)  # the repository
has_failed = False  # whether standard output could not be written
line_is_live = False  # whether the next line replaces the terminal's last one


def is_terminal(stream):
    """Whether a stream is a terminal that understands ECMA-48's control sequences."""
    try:
        return (stream.isatty() and os.environ.get('TERM') != 'dumb'
                and (os.name != 'nt' or 'WT_SESSION' in os.environ))
    except (AttributeError, ValueError):  # None, closed
        return False


def styled(text, style, stream):
    """The text in one of STYLES, or as it is: no terminal, or NO_COLOR is set."""
    if not style or os.environ.get('NO_COLOR') or not is_terminal(stream):
        return text
    return f'\x1b[{STYLES[style]}m{text}\x1b[0m'


def print0(text, live=False, style=None):
    """Print a line on the first process. On a terminal, a live line is cut to the width and replaced by the
    next line, and `style` is one of STYLES, which NO_COLOR turns off. Where nothing can be written, on a full
    disk or where the reader of a pipe has died, the line is lost."""
    global line_is_live
    if (os.environ.get('RANK') or '0') != '0':
        return
    if not is_terminal(sys.stdout):
        write(text + '\n')
        return
    if live:
        text = text[:shutil.get_terminal_size().columns - 1]
    write('\r\x1b[K' * line_is_live + styled(text, style, sys.stdout) + ('' if live else '\n'))
    line_is_live = live


def keep_line():
    """End a live line, so that the next one doesn't replace it."""
    global line_is_live
    if line_is_live:
        write('\n')
    line_is_live = False


def write(text):
    """Write to standard output; the first time that fails, say so on standard error."""
    global has_failed
    try:
        print(end=text, flush=True)
    except (OSError, ValueError) as error:  # ValueError: closed
        if not has_failed:
            with contextlib.suppress(OSError, ValueError):
                print(f'standard output can\'t be written ({error}), its lines are lost',
                      file=sys.stderr, flush=True)
        has_failed = True


def flush():
    """Flush both streams, as far as they can be."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def prepare_streams():
    """Make a script's streams UTF-8, its errors one line, and its end silent where nobody reads any more."""
    sys.excepthook = show_error
    atexit.register(flush_or_drop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # redirected output on Windows can't encode most of Unicode
            stream.reconfigure(encoding='utf-8', errors='backslashreplace')


def flush_or_drop():
    """At exit: what can't be written any more is dropped without a word."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # broken, closed, None
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def is_broken(stream):
    """Whether nobody reads a stream any more, as where `| head` has ended."""
    try:
        print(file=stream, flush=True)  # what could not be written is no longer in the buffer
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):
        return False
    return False


def show_error(kind, error, trace):
    """sys.excepthook: a user's mistake is one line, the output's last; all else keeps its traceback."""
    if issubclass(kind, BrokenPipeError) and is_broken(sys.stdout):
        return
    keep_line()
    if isinstance(error, USER_ERRORS):
        print(styled(f'{kind_of(error)}: {error}', 'bold red', sys.stderr), file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError):
        support.show_import_error(kind, error, trace)
    else:
        sys.__excepthook__(kind, error, trace)
