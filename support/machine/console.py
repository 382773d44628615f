"""Standard output: lines of the first process only; on a terminal some are live or have a style."""

import os
import shutil
import sys

STYLES = {'bold': 1, 'cyan': 36}  # codes of ECMA-48, "select graphic rendition"
line_is_live = False  # whether the next line replaces the terminal's last one


def is_terminal():
    """Whether standard output is a terminal that understands ECMA-48's control sequences."""
    return (sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
            and (os.name != 'nt' or 'WT_SESSION' in os.environ))


def print0(text, live=False, style=None):
    """Print a line on the first process. On a terminal, a live line is cut to the width and replaced by the
    next line, and `style` is one of STYLES, which NO_COLOR turns off."""
    global line_is_live
    if int(os.environ.get('RANK', 0)) != 0:
        return
    if not is_terminal():
        print(text, flush=True)
        return
    if live:
        text = text[:shutil.get_terminal_size().columns - 1]
    if style and not os.environ.get('NO_COLOR'):
        text = f'\x1b[{STYLES[style]}m{text}\x1b[0m'
    print('\r\x1b[K' * line_is_live + text, end='' if live else '\n', flush=True)
    line_is_live = live


def keep_line():
    """End a live line, so that the next one doesn't replace it."""
    global line_is_live
    if line_is_live:
        print(flush=True)
    line_is_live = False
