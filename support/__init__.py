"""
What the scripts share, one job a file. Imports go down: run, hub, network, text, machine.

    run/       how a run starts, what it keeps and what it prints; the prompt of sample.py
    hub/       Hugging Face's transformers, EleutherAI's lm-eval
    network/   what attaches to a model: attention types, sampling, loss, optimizers, adapters, probes, scores
    text/      token files, tokenizers, and the preparation of both
    machine/   what a program runs on: console, files, hardware, processes, signals, sharding
"""

import atexit
import gc
import os
import sys

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def way_out():
    """How to start a script with what it needs. This file, like the scripts, parses under Python 3.6."""
    venv, bin = os.path.join(HERE, '.venv'), 'Scripts' if os.name == 'nt' else 'bin'
    if os.path.isdir(venv) and os.path.realpath(sys.prefix) != os.path.realpath(venv):
        activate = os.path.relpath(os.path.join(venv, bin, 'activate'))
        return 'activate the environment: ' + ('' if os.name == 'nt' else 'source ') + activate
    return 'install it as README.md shows: pip install -r requirements.txt'


def show_missing(kind, error, trace):
    """sys.excepthook while a script of ours imports: a package that isn't there is one line."""
    if issubclass(kind, ModuleNotFoundError):
        print(f'{kind.__name__}: {error} for {sys.executable}; {way_out()}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(f'Python {sys.version.split()[0]} is too old, 3.11 or newer is needed; {way_out()}')
atexit.register(gc.freeze)  # Python's end takes 0.4 s less if it doesn't look for cycles in all of PyTorch
if 'OMP_WAIT_POLICY' not in os.environ:  # read when torch is loaded
    # spins of a waiting thread: libgomp's 300,000 take the time of those waited for where other programs run
    os.environ.setdefault('GOMP_SPINCOUNT', '3000')
if os.path.realpath(getattr(sys.modules['__main__'], '__file__', '')).startswith(HERE + os.sep):
    sys.excepthook = show_missing
