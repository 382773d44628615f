"""
What the scripts share. Imports go down: a wing uses itself and those below it.

    training/    the loss, optimizers, adapters, sharding, checks, the log, state and checkpoints
    evaluating/  the losses of a split, texts, tasks
    sampling/    decoding, int8 weights, the prompt, conversations
    hub/         models and tokenizers of other programs
    text/        reading, tokenizers, token files, their preparation
    machine/     the device, processes, signals, files, the console
    settings.py, attention.py, errors.py
"""

import atexit
import gc
import os
import signal
import sys

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # the repository
INSTALL = 'see "Install" in README.md'

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(f'Python {sys.version.split()[0]} is too old: use 3.11 or newer, {INSTALL}')


def runs_own_script():
    """Whether the program is one of this repository's scripts, and not another that imports
    them."""
    file = getattr(sys.modules['__main__'], '__file__', None) or os.sep
    folder = os.path.dirname(os.path.realpath(file))
    inner = tuple(os.path.join(HERE, name, '') for name in ('data', 'scripts'))
    return folder == HERE or os.path.join(folder, '').startswith(inner)


def show_import_error(kind, error, trace):
    """sys.excepthook while a script imports: a missing package and Ctrl-C are one line each."""
    if issubclass(kind, ModuleNotFoundError):
        print(f'{kind.__name__}: {error} for {sys.executable}: activate the environment or install '
              f'the package, {INSTALL}', file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


def say_interrupted():
    if (os.environ.get('RANK') or '0') == '0':
        # a terminal has echoed ^C on the current line
        print('\ninterrupted' if sys.stderr.isatty() else 'interrupted', file=sys.stderr)


def end_import(number, frame):
    """SIGINT's handler until the settings are read: an import of PyTorch's may catch a
    KeyboardInterrupt and go on."""
    say_interrupted()
    os._exit(130)


atexit.register(gc.freeze)  # Python ends 0.4 s sooner without a search for cycles in all of PyTorch
if 'OMP_WAIT_POLICY' not in os.environ:  # read when torch is loaded
    # libgomp's 300,000 spins of a waiting thread would take time from other programs
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')
if runs_own_script():
    sys.excepthook = show_import_error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_import)
