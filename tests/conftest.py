"""What the tests share: small data, small models, and the scripts run as a user runs them."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # one of several processes; before torch reads it
import support  # noqa: E402, F401, before torch, whose threads wait as it says
import numpy as np
import pytest
import torch
from support.machine import hardware

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('FLOAT32_PRODUCTS', hardware.products())  # of all processes: they round alike
TINY = {'block_size': 32, 'vocab_size': 64, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}  # GPTConfig arguments
TINY_ARGS = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4', '--device=cpu',
             '--compile=False', '--gradient_accumulation_steps=1', '--warmup_iters=2', '--learning_rate=1e-3',
             '--eval_iters=2', '--plot=False')


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('needs a CUDA GPU')


@pytest.fixture
def run_script():
    def run(script, *args, env=None, ok=True, launcher=(), cwd=ROOT):
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True,
                              encoding='utf-8', timeout=300, stdin=subprocess.DEVNULL)
        assert (done.returncode == 0) == ok, f'{command}\n{done.stdout}\n{done.stderr}'
        return done
    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process; gives its globals, with what it printed as `log`."""
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        hook = sys.excepthook
        capsys.readouterr()
        try:
            found = runpy.run_path(str(ROOT / script), run_name='__main__')
        finally:
            sys.excepthook = hook
        return found | {'log': capsys.readouterr().out}
    return run


@pytest.fixture
def bpe(monkeypatch):
    """Makes the GPT-2 BPE files available, or skips."""
    known = os.environ.get('TIKTOKEN_CACHE_DIR') or str(ROOT.parent / 'shared/data/tiktoken')
    if not Path(known, '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists():
        pytest.skip('the GPT-2 BPE files are not in TIKTOKEN_CACHE_DIR')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', known)


@pytest.fixture(scope='session')
def char_data(tmp_path_factory):
    """A folder with character data that a tiny model learns something from in a few iterations."""
    from support.text.prepare import write_text_dataset
    folder = tmp_path_factory.mktemp('char_data')
    generator = np.random.default_rng(0)
    words = ['king', 'queen', 'crown', 'sword', 'night', 'day', 'love', 'war']
    text = ' '.join(generator.choice(words, 4000)) + '\n'
    write_text_dataset(folder, text, 'char', 'made by conftest.py')
    return folder


@pytest.fixture
def gpt2_folder(tmp_path):
    """A small GPT-2 as transformers saves it, its weights random."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    return tmp_path / 'gpt2'


@pytest.fixture
def train(tmp_path, char_data, monkeypatch, capsys):
    """Runs train.py in this process on the small data; gives its globals, with what it printed as `log`."""
    from support.machine.signals import stop_signals
    from support.training.folder import release

    def run(*args, data_dir=char_data, out_dir=tmp_path / 'out'):
        argv = ['train.py', *TINY_ARGS, f'--data_dir={data_dir}', f'--out_dir={out_dir}', *map(str, args)]
        monkeypatch.setattr(sys, 'argv', argv)
        hook, handlers = sys.excepthook, {s: signal.getsignal(s) for s in stop_signals()}
        capsys.readouterr()
        script = {'__name__': '__main__', '__file__': str(ROOT / 'train.py')}
        try:
            exec(compile((ROOT / 'train.py').read_text(), script['__file__'], 'exec'), script)
        except SystemExit as stop:
            if stop.code:  # None with eval_only and dry_run
                raise
        finally:
            release(out_dir)  # as the end of a process does
            sys.excepthook = hook
            signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return script | {'log': capsys.readouterr().out}
    return run


def losses(log):
    """{iteration: the training loss} of a log."""
    return {int(i): float(x) for i, x in re.findall(r'^iter (\d+): loss ([\d.]+),', log, re.M)}


def evaluations(log):
    """{iteration: (training loss, validation loss)} of a log."""
    found = re.findall(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+)', log, re.M)
    return {int(i): (float(a), float(b)) for i, a, b in found}
