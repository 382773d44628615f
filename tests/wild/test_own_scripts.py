"""People's own scripts that execute configurator.py, nanoGPT's way."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TEXTS = {
    'config/mine.py': 'n_embd = int(math.sqrt(4096)) // 2\nbatch_size = 3\n'
                      'def double(x):\n    return 2 * x\nmax_iters = double(1)\n',
    'function.py': 'size = 12\nwords = ["a"]\ntypes = "a setting"\ndef main():\n'
                   '    exec(open("configurator.py").read())\n    return size, words, types\nprint(main())'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, char_data):
    folder = tmp_path_factory.mktemp('own')
    for path in [ROOT / 'configurator.py', ROOT / 'model.py', *Path(__file__).parent.glob('own_*.py')]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / 'support', folder / 'support')
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    shutil.copytree(char_data, folder / 'data/tiny')
    return folder


def run(*command, cwd, ok=True):
    done = subprocess.run([sys.executable, *command], cwd=cwd, timeout=100, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_training_script_takes_config_files_and_keys_and_keeps_its_names(folder):
    out = run('own_train.py', 'mine', '--batch_size=2', '--out_dir=mine', '--learning_rate=1',
              '--re=2', '--N_BEST=5', '--betas=(0.8, 0.9)', '--probe=x', cwd=folder).stdout
    assert "new names: ['double', 'sys']\n" in out  # of the config, and what nanoGPT's leaves too
    config = eval(out.split('config: ')[1].splitlines()[0])
    expected = {'batch_size': 2, 'max_iters': 2, 'n_embd': 32, 'learning_rate': 1.0, 're': 2.0, 'N_BEST': 5}
    assert {k: config[k] for k in expected} == expected
    assert 'more: (0.8, 0.9) x' in out


def test_scripts_work_from_elsewhere_and_ours_reads_their_checkpoint(folder, run_here, monkeypatch):
    assert "new names: ['sys']" in run('own_train.py', cwd=folder).stdout
    sampling = (f'--out_dir={folder / "out"}', '--start=king', '--max_new_tokens=9', '--device=cpu')
    out = run(str(folder / 'own_sample.py'), *sampling, '--top_k=1', cwd='/').stdout
    text = out.splitlines()[-1]
    assert eval(text).startswith('king') and len(eval(text)) == 13
    monkeypatch.chdir(folder)
    assert eval(text) in run_here('sample.py', *sampling, '--num_samples=1', '--temperature=0')['log']


def test_settings_may_be_read_in_a_function_where_a_mistake_is_one_line_too(folder):
    out = run('function.py', '--size=7', "--words=['b']", '--types=d', cwd=folder).stdout
    assert out.splitlines()[-1] == "(7, ['b'], 'd')"
    error = run('function.py', '--sise=3', cwd=folder, ok=False).stderr
    assert error.startswith('ValueError: Unknown config key: sise') and error.count('\n') == 1
