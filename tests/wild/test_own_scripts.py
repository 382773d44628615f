"""People's own scripts that execute configurator.py, nanoGPT's way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BEGINNING = 'n = 1\nexec(open("configurator.py").read())\n'
TEXTS = {
    'config/mine.py': 'n_embd = int(math.sqrt(4096)) // 2\nbatch_size = 3\n'
                      'def double(x):\n    return 2 * x\nmax_iters = double(1)\n',
    'wrong.py': 'N = 3\nsizes = 2\n', 'idle.py': 'size: 3\n', 'three.py': 'size = 3',
    'broken.py': BEGINNING + 'print(1 / (n - 1))', 'tools/count.py': BEGINNING + 'print(n)',
    'function.py': 'size = 12\nwords = ["a"]\ntypes = "a setting"\ndef main():\n'
                   '    exec(open("configurator.py").read())\n    return size, words, types\nprint(main())',
    'block.py': 'size = 12\nif __name__ == "__main__":\n    exec(open("configurator.py").read())\n'
                '    print(size)\n',
    'imports.py': 'import sys\nhook = sys.excepthook\nimport configurator\nprint(sys.excepthook is hook)'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, char_data):
    """A folder as somebody has it: our files, scripts and a config of their own, data."""
    folder = tmp_path_factory.mktemp('own')
    for path in [ROOT / 'configurator.py', ROOT / 'model.py', *Path(__file__).parent.glob('own_*.py')]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / 'support', folder / 'support')
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    shutil.copytree(char_data, folder / 'data/tiny')
    return folder


def run(*command, cwd, ok=True, **env):
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=os.environ | env, timeout=100,
                          capture_output=True, text=True, encoding='utf-8')
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_training_script_takes_config_files_and_keys_and_keeps_its_names(folder):
    out = run('own_train.py', 'mine', '--batch_size=2', '--out_dir=mine', '--learning_rate=1',
              '--re=2', '--parse', '--N_BEST=5', '--betas=(0.8, 0.9)', '--probe=x',
              cwd=folder).stdout
    assert 'Overriding config with ' in out and 'Overriding: batch_size = 2\n' in out
    assert "new names: ['double', 'sys']\n" in out  # of the config, and what nanoGPT's leaves too
    config = eval(out.split('config: ')[1].splitlines()[0])
    expected = {'batch_size': 2, 'max_iters': 2, 'n_embd': 32, 'learning_rate': 1.0, 're': 2.0,
                'parse': True, 'N_BEST': 5}
    assert {k: config[k] for k in expected} == expected
    assert 'more: (0.8, 0.9) x own_train.py 3.14' in out and 'iter 1: loss ' in out
    assert (folder / 'mine/ckpt.pt').is_file()


def test_scripts_work_without_arguments_and_from_elsewhere_and_ours_reads_their_checkpoint(
        folder, run_here, monkeypatch):
    out = run('own_train.py', cwd=folder).stdout
    assert "'batch_size': 4" in out and 'Overriding' not in out and "new names: ['sys']" in out
    sampling = (f'--out_dir={folder / "out"}', '--start=king', '--max_new_tokens=9', '--device=cpu')
    out = run(str(folder / 'own_sample.py'), *sampling, '--compile=True', '--top_k=1', cwd='/').stdout
    text, line = out.splitlines()[-2:]
    assert eval(text).startswith('king') and len(eval(text)) == 13 and line == '---------------'
    monkeypatch.chdir(folder)
    assert eval(text) in run_here('sample.py', *sampling, '--num_samples=1', '--temperature=0')['log']


@pytest.mark.parametrize('command, last_line', [
    (['function.py', '--size=7', "--words=['b']", '--types=d'], "(7, ['b'], 'd')"),
    (['-m', 'function', '--size=7', 'three.py'], "(3, ['a'], 'a setting')"),
    (['block.py', '--size=2'], '2'),
    (['-c', BEGINNING + 'print(n, "configure" in globals())', '--n=5'], '5 False'),
    (['tools/count.py', '--n=5'], '5'), (['-c', BEGINNING, '--n=2', '--help'], '  n=2')])
def test_settings_may_be_read_in_a_function_a_block_a_module_or_a_text(command, last_line, folder):
    assert run(*command, cwd=folder).stdout.splitlines()[-1].startswith(last_line)


@pytest.mark.parametrize('command, line', [
    (['function.py', '--sise=3'], 'ValueError: Unknown config key: sise (did you mean size?)'),
    (['function.py', '--size=x'], "ValueError: size must be a whole number, not 'x'"),
    (['function.py', 'wrong.py'], 'ValueError: Unknown config key: N, sizes (did you mean size?) '),
    (['function.py', 'idle.py'], 'ValueError: idle.py, line 1: size: 3 assigns nothing; '),
    (['function.py', 'missing.py'], 'FileNotFoundError: no config missing.py'),
    (['broken.py', '--n=1'], 'Traceback')])
def test_mistake_is_one_line_there_too_and_an_error_of_the_script_a_traceback(command, line, folder):
    error = run(*command, cwd=folder, ok=False).stderr
    assert error.startswith(line), error
    assert (error.count('\n') > 1) == (line == 'Traceback')


def test_help_lists_the_script_s_settings_and_importing_configurator_does_nothing(folder, tmp_path):
    out = run('own_sample.py', '--help', cwd=folder).stdout
    assert "Somebody's own sampling script" in out
    assert '  top_k=200' in out and 'FILE:prompt.txt' in out
    shutil.copy(folder / 'imports.py', tmp_path)  # a script beside ours gets another excepthook
    arguments = ('--no_such=3', 'none.py')
    assert run('imports.py', *arguments, cwd=tmp_path, PYTHONPATH=str(folder)).stdout == 'True\n'
