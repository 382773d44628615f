"""Standard output: lines of the first process only; on a terminal some are live or have a style."""

import contextlib
import os
import shutil
import sys

STYLES = {'bold': 1, 'cyan': 36}  # codes of ECMA-48, "select graphic rendition"
has_failed = False  # whether standard output could not be written
line_is_live = False  # whether the next line replaces the terminal's last one


def is_terminal():
    """Whether standard output is a terminal that understands ECMA-48's control sequences."""
    try:
        return (sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
                and (os.name != 'nt' or 'WT_SESSION' in os.environ))
    except (AttributeError, ValueError):  # None, closed
        return False


def print0(text, live=False, style=None):
    """Print a line on the first process. On a terminal, a live line is cut to the width and replaced by the
    next line, and `style` is one of STYLES, which NO_COLOR turns off. Where nothing can be written, on a full
    disk or where the reader of a pipe has died, the line is lost."""
    global line_is_live
    if (os.environ.get('RANK') or '0') != '0':
        return
    if not is_terminal():
        write(text + '\n')
        return
    if live:
        text = text[:shutil.get_terminal_size().columns - 1]
    if style and not os.environ.get('NO_COLOR'):
        text = f'\x1b[{STYLES[style]}m{text}\x1b[0m'
    write('\r\x1b[K' * line_is_live + text + ('' if live else '\n'))
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
