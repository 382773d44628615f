"""What the tests share: small data, small models, and the scripts run as a user runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # one of several processes; before torch reads it
import support  # noqa: F401, before torch, whose threads wait as it says
import numpy as np
import pytest
import runner
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = {'block_size': 32, 'vocab_size': 64, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}  # of GPTConfig
TINY_ARGS = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4',
             '--device=cpu', '--compile=False', '--gradient_accumulation_steps=1',
             '--warmup_iters=2', '--learning_rate=1e-3', '--eval_iters=2', '--plot=False')


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)


def tiny(**options):
    return GPT(GPTConfig(**TINY | options))


@torch.no_grad()
def scrambled(model, size=0.2):
    """The model with random numbers added to all weights, whose initial values would hide much."""
    for p in model.parameters():
        p.add_(torch.randn_like(p) * size)
    return model


def tokens(*shape):
    return torch.randint(TINY['vocab_size'], shape)


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('needs a CUDA GPU')


@pytest.fixture
def run_script():
    def run(script, *args, env=None, ok=True, launcher=(), cwd=ROOT):
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True,
                              text=True, encoding='utf-8', timeout=300, stdin=subprocess.DEVNULL)
        assert (done.returncode == 0) == ok, f'{command}\n{done.stdout}\n{done.stderr}'
        return done
    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process; gives its globals, with what it printed as `log`."""
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', sys.argv)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        capsys.readouterr()
        return runner.execute(ROOT / script, args) | {'log': capsys.readouterr().out}
    return run


@pytest.fixture
def train(tmp_path, char_data, run_here):
    """Runs train.py in this process on the small data; gives its globals, its output as `log`."""
    def run(*args, data_dir=char_data, out_dir=tmp_path / 'out'):
        return run_here('train.py', *TINY_ARGS, f'--data_dir={data_dir}', f'--out_dir={out_dir}',
                        *args)
    return run


@pytest.fixture(scope='session')
def elsewhere():
    """A function that runs scripts of a copy of the repository, see runner.Runner."""
    process = runner.Runner()
    yield process
    process.close()


@pytest.fixture(scope='session')
def copy_repository(tmp_path_factory):
    def copy(source):
        folder = tmp_path_factory.mktemp('copy')
        shutil.copytree(ROOT / 'support', folder / 'support')
        for path in ROOT.glob('*.py'):
            shutil.copy2(path, folder)
        (folder / 'model.py').write_text(source, encoding='utf-8')
        return folder
    return copy


@pytest.fixture
def bpe():
    """Skips where there are no GPT-2 BPE files in TIKTOKEN_CACHE_DIR."""
    folder = Path(os.environ.get('TIKTOKEN_CACHE_DIR', ''))
    if not (folder / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists():
        pytest.skip('the GPT-2 BPE files are not in TIKTOKEN_CACHE_DIR')


@pytest.fixture(scope='session')
def char_data(tmp_path_factory):
    """A folder with character data that a tiny model learns something from in a few iterations."""
    from support.text.prepare import write_text_dataset
    folder = tmp_path_factory.mktemp('char_data')
    words = ['king', 'queen', 'crown', 'sword', 'night', 'day', 'love', 'war']
    text = ' '.join(np.random.default_rng(0).choice(words, 4000)) + '\n'
    write_text_dataset(folder, text, 'char', 'made by conftest.py')
    return folder


def save_model(folder, model, data_dir):
    """Write a model that was trained on the data as a run does. Returns the folder."""
    from support.text.dataset import Dataset
    from support.training.models import model_args
    from support.training.state import State
    State(model.state_dict(), model_args(model.config), config={'data_dir': str(data_dir)},
          tokenizer=Dataset(data_dir, splits=()).tokenizer.to_dict()).save(Path(folder, 'ckpt.pt'))
    return folder


@pytest.fixture
def gpt2_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    return tmp_path / 'gpt2'


def losses(log):
    """{iteration: the training loss} of a log."""
    return {int(i): float(x) for i, x in re.findall(r'^iter (\d+): loss ([\d.]+),', log, re.M)}


def evaluations(log):
    """{iteration: (training loss, validation loss)} of a log."""
    found = re.findall(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+)', log, re.M)
    return {int(i): (float(a), float(b)) for i, a, b in found}
