"""
Standard output and errors: lines of the first process only, some of them live; an error is one
line.

    print0('saving checkpoint to out', style='bold')
    print0([('iter 5: loss 3.1', 3), ('norm 0.50', 1), ('2 min left', 2)], live=True)
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import support
from support.errors import in_one_line

STYLES = {'bold': '1', 'cyan': '36', 'bold red': '1;31'}  # ECMA-48, "select graphic rendition"
ROOT = Path(support.HERE)  # the repository
has_failed = False  # whether standard output could not be written
line_is_live = False  # whether the next line replaces the terminal's last one


def is_first_process():
    return (os.environ.get('RANK') or '0') == '0'


def is_terminal(stream):
    """Whether a stream is a terminal that understands ECMA-48's control sequences."""
    try:
        is_capable = os.name != 'nt' or 'WT_SESSION' in os.environ
        return stream.isatty() and os.environ.get('TERM') != 'dumb' and is_capable
    except (AttributeError, ValueError):  # None, closed
        return False


def styled(text, style, stream):
    """The text in one of STYLES; as it is where the stream is no terminal or NO_COLOR is set."""
    if not style or os.environ.get('NO_COLOR') or not is_terminal(stream):
        return text
    return f'\x1b[{STYLES[style]}m{text}\x1b[0m'


def print0(text, live=False, style=None):
    """Print a line on the first process. On a terminal, the next line replaces a live one.

    text: a string, or the parts of a line with their importance, [(string, number)]. A live line
    that is too long for the terminal loses its least important parts. style: one of STYLES. A line
    that can't be written, on a full disk or into a closed pipe, is lost.
    """
    global line_is_live
    if not is_first_process():
        return
    parts = text if isinstance(text, list) else [(text, 0)]
    if not is_terminal(sys.stdout):
        write(joined(parts) + '\n')
        return
    line = fit(parts, shutil.get_terminal_size().columns - 1) if live else joined(parts)
    before = '\r\x1b[K' if line_is_live else ''  # back to the line's start, and erase it
    after = '' if live else '\n'
    write(before + styled(line, style, sys.stdout) + after)
    line_is_live = live


def joined(parts):
    return ', '.join(text for text, _ in parts)


def fit(parts, columns):
    """The parts as a line of at most so many columns, without the least important ones."""
    while len(joined(parts)) > columns and len(parts) > 1:
        parts = [*parts]
        parts.remove(min(parts, key=lambda part: part[1]))
    return joined(parts)[:columns]


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
    """Make a script's streams UTF-8, its errors one line, and its end silent after a closed
    pipe."""
    sys.excepthook = show_error
    if signal.getsignal(signal.SIGINT) is support.end_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(flush_or_drop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # redirected on Windows, it can't encode most of Unicode
            stream.reconfigure(encoding='utf-8', errors='backslashreplace')


def flush_or_drop():
    """At exit: drop what can't be written any more, without a message."""
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
    """sys.excepthook: one line, the output's last, for what a user can change, else the
    traceback."""
    if issubclass(kind, BrokenPipeError) and is_broken(sys.stdout):
        return
    keep_line()
    line = in_one_line(error)
    if line:
        print(styled(line, 'bold red', sys.stderr), file=sys.stderr)
    else:
        support.show_import_error(kind, error, trace)
