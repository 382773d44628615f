"""People's own scripts that execute configurator.py, nanoGPT's way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

WILD = Path(__file__).parent


@pytest.fixture
def folder(tmp_path, char_data):
    """A folder as somebody has it: our files, scripts and a config of their own, data."""
    for path in [ROOT / 'configurator.py', ROOT / 'model.py', *WILD.glob('own_*.py')]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / 'support', tmp_path / 'support')
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config/mine.py').write_text('import math\nn_embd = int(math.sqrt(4096)) // 2\n'
                                             'batch_size = 3\ndef double(x):\n    return 2 * x\n'
                                             'max_iters = double(1)\n')
    shutil.copytree(char_data, tmp_path / 'data/tiny')
    return tmp_path


def run(script, *args, cwd, ok=True, **env):
    done = subprocess.run([sys.executable, script, *args], cwd=cwd, env=os.environ | env, capture_output=True,
                          text=True, encoding='utf-8', timeout=100)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_own_training_script_takes_config_files_and_keys_and_keeps_its_names(folder):
    out = run('own_train.py', 'config/mine.py', '--batch_size=2', '--out_dir=mine', '--learning_rate=1',
              '--re=2', '--parse', '--N_BEST=5', '--betas=(0.8, 0.9)', '--probe=x', cwd=folder).stdout
    assert 'Overriding config with ' in out and 'Overriding: batch_size = 2\n' in out
    assert "new names: ['double', 'sys']\n" in out  # the config's function, and what nanoGPT's leaves too
    config = eval(out.split('config: ')[1].splitlines()[0])
    expected = {'batch_size': 2, 'max_iters': 2, 'n_embd': 32, 'learning_rate': 1.0, 're': 2.0, 'parse': True,
                'N_BEST': 5}
    assert {k: config[k] for k in expected} == expected
    assert 'more: (0.8, 0.9) x own_train.py 3.14' in out and 'iter 1: loss ' in out
    assert (folder / 'mine/ckpt.pt').is_file()


def test_bare_name_of_a_config_and_none_at_all_work_too(folder):
    assert "'n_embd': 32" in run('own_train.py', 'mine', cwd=folder).stdout
    out = run('own_train.py', cwd=folder).stdout
    assert "'batch_size': 4" in out and 'Overriding' not in out and "new names: ['sys']" in out


def test_own_sampling_script_works_from_elsewhere_and_ours_reads_its_checkpoint(folder, run_script):
    run('own_train.py', '--out_dir=mine', cwd=folder)
    out = run(str(folder / 'own_sample.py'), f'--out_dir={folder / "mine"}', '--start=king', '--compile=True',
              '--max_new_tokens=9', '--top_k=1', cwd='/').stdout
    text, line = out.splitlines()[-2:]
    assert eval(text).startswith('king') and len(eval(text)) == 13 and line == '---------------'
    ours = run_script('sample.py', f'--out_dir={folder / "mine"}', '--num_samples=1', '--max_new_tokens=9',
                      '--temperature=0', '--start=king', '--device=cpu', cwd=folder).stdout
    assert eval(text) in ours


def test_settings_may_be_read_in_the_main_block_or_in_a_function(folder):
    out = run('own_bench.py', '--batch_size=2', '--real_data=False', '--profile', cwd=folder).stdout
    assert '\n2 False True: time per iteration: ' in out
    for command in (['own_function.py'], ['-m', 'own_function']):
        out = run(*command, '--batch_size=7', "--words=['b', 'c']", '--types=d', cwd=folder).stdout
        assert out.splitlines()[-1] == "(7, ['b', 'c'], 'd')"


@pytest.mark.parametrize('args, line', [
    (['--bach_size=3'], 'ValueError: Unknown config key: bach_size (did you mean batch_size?)'),
    (['--batch_size=x'], "ValueError: batch_size must be a whole number, not 'x'"),
    (['wrong.py'], 'ValueError: Unknown config key: N, batch_sizes (did you mean batch_size?) '),
    (['idle.py'], 'ValueError: idle.py, line 1: batch_size: 3 assigns nothing; '),
    (['missing.py'], 'FileNotFoundError: no config missing.py'),
])
def test_mistake_is_one_line_there_too(args, line, folder):
    (folder / 'wrong.py').write_text('N = 3\nbatch_sizes = 2\n')
    (folder / 'idle.py').write_text('batch_size: 3\n')
    error = run('own_function.py', *args, cwd=folder, ok=False).stderr
    assert error.startswith(line) and error.count('\n') == 1, error


def test_error_of_the_script_itself_keeps_its_traceback(folder):
    (folder / 'broken.py').write_text('n = 1\nexec(open("configurator.py").read())\nprint(1 / (n - 1))\n')
    assert 'Traceback' in run('broken.py', '--n=1', cwd=folder, ok=False).stderr


def test_help_lists_the_script_s_settings_and_its_docstring(folder):
    out = run('own_sample.py', '--help', cwd=folder).stdout
    assert "Somebody's own sampling script" in out and '  top_k=200' in out and 'FILE:prompt.txt' in out


def test_script_without_a_file_takes_settings(folder):
    code = 'n = 1\nexec(open("configurator.py").read())\nprint(n, "configure" in globals())'
    assert run('-c', code, '--n=5', cwd=folder).stdout.splitlines()[-1] == '5 False'
    assert '  n=1' in run('-c', code, '--help', cwd=folder).stdout


def test_script_in_a_folder_of_its_own_takes_settings(folder):
    (folder / 'tools').mkdir()
    (folder / 'tools/count.py').write_text('n = 1\nexec(open("configurator.py").read())\nprint(n)\n')
    assert run('tools/count.py', '--n=5', cwd=folder).stdout.splitlines()[-1] == '5'


def test_importing_configurator_does_nothing(folder, tmp_path_factory):
    code = 'import sys\nhook = sys.excepthook\nimport configurator\nprint(sys.excepthook is hook)'
    elsewhere = tmp_path_factory.mktemp('elsewhere')  # a script beside ours is told what its Python lacks
    (elsewhere / 'imports.py').write_text(code)
    told = run('imports.py', '--no_such=3', 'none.py', cwd=elsewhere, PYTHONPATH=str(folder)).stdout
    assert told == 'True\n'
