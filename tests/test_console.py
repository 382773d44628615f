"""console.py, errors.py: what a user sees of a script's lines, and of its end."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_configurator import config_file, run_small_script

from support import errors
from support.machine import console

MISSING = 'from support.machine.files import read_text\nprint("reading")\nread_text("nothing.txt")'


@pytest.mark.parametrize('argument, body, shown', [
    ('--batch_size=x', '', "ValueError: batch_size must be a whole number, not 'x'"),
    ('wrong.py', '', 'Overriding config with wrong.py:\nN = 3\nValueError: Unknown config key: N '),
    ('--batch_size=1', MISSING,
     'Overriding: batch_size = 1\nreading\nFileNotFoundError: nothing.txt is missing'),
    ('--batch_size=1', 'raise KeyboardInterrupt', 'Overriding: batch_size = 1\ninterrupted'),
    ('--batch_size=1', 'import no_such',
     "Overriding: batch_size = 1\nModuleNotFoundError: No module named "
     f"'no_such' for {sys.executable}: activate the environment or install the package, see"),
    ('--batch_size=1', 'print("a"); open("none")', 'Overriding: batch_size = 1\na\nTraceback '),
], ids=lambda value: value[:30])
def test_error_is_the_last_line_of_the_output_and_one_that_nobody_foresaw_a_traceback(
        argument, body, shown, tmp_path):
    config_file(tmp_path, 'N = 3', 'wrong.py')
    done = run_small_script(tmp_path, argument, body=body)
    assert done.returncode and done.stdout.startswith(shown), done.stdout
    if 'Traceback' not in shown:
        assert done.stdout.count('\n') == shown.count('\n') + 1


@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('script', ['train.py', 'plot.py', 'data/text/prepare.py'])
def test_ctrl_c_while_a_script_imports_is_one_line(script, run_script, tmp_path):
    for name in ('torch', 'numpy', 'tqdm'):
        (tmp_path / f'{name}.py').write_text('raise KeyboardInterrupt')
    done = run_script(script, env={'PYTHONPATH': str(tmp_path)}, ok=False)
    assert (done.stderr, done.returncode) == ('interrupted\n', -signal.SIGINT)
    (tmp_path / 'link').symlink_to(ROOT)  # a mistake is one line there, too
    done = run_script(tmp_path / 'link' / script, '--no_such=1', ok=False)
    assert done.stderr.startswith('ValueError: Unknown config key: no_such')


@pytest.mark.parametrize('work, asked', [
    (lambda: torch.empty(10**15), ' (3,725,290.3 GiB asked for)'), (lambda: torch.empty(2**62), ''),
    (lambda: torch.zeros(1).numpy().repeat(10**16), ' (35.5 PiB asked for)'),
    (lambda: bytearray(10**16), ''),
])
def test_lack_of_memory_is_one_line_of_advice(work, asked):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        work()
    assert errors.in_one_line(error.value) == (
        f'MemoryError: out of memory{asked}: a smaller batch, fewer tokens or a smaller model '
        'need less')


def test_failure_of_a_compiler_is_one_line_and_an_error_of_the_compiled_code_is_not():
    from torch._inductor import config
    x = torch.zeros(9)
    with config.patch({'cpp.cxx': (None, '/no/such/compiler'), 'force_disable_caches': True}):
        with pytest.raises(RuntimeError) as error:
            torch.compile(lambda x: x.relu() + 1)(x)
        line = errors.in_one_line(error.value)
        assert 'torch.compile failed, --compile=False runs without it (' in line
        assert '\n' not in line
    with pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x @ torch.zeros(5, 5))(x)
    assert errors.in_one_line(error.value) is None


@pytest.mark.parametrize('term, no_color, coloured', [('xterm', '', True), ('xterm', '1', False),
                                                      ('dumb', '', False), (None, '', False)])
def test_error_stands_out_on_a_terminal(term, no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv('TERM', term or 'xterm')
    monkeypatch.setenv('NO_COLOR', no_color)
    monkeypatch.setattr(console, 'line_is_live', True)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: term is not None, raising=False)
    console.show_error(errors.MissingFile, errors.MissingFile('no x'), None)
    line = 'FileNotFoundError: no x'
    assert capsys.readouterr() == ('\n', f'\x1b[1;31m{line}\x1b[0m\n' if coloured else f'{line}\n')


WHOLE = 'iter 5: loss 3.1, time 9ms, mfu 1%, norm 0.5, 2 min left'


@pytest.mark.parametrize('columns, line', [
    (57, WHOLE), (56, 'iter 5: loss 3.1, time 9ms, mfu 1%, 2 min left'),
    (40, 'iter 5: loss 3.1, time 9ms, 2 min left'), (20, 'iter 5: loss 3.1'), (10, 'iter 5: l'),
])
def test_live_line_gives_up_its_least_important_parts_first(columns, line, monkeypatch, capsys):
    parts = [('iter 5: loss 3.1', 9), ('time 9ms', 7), ('mfu 1%', 3), ('norm 0.5', 1),
             ('2 min left', 8)]
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(console, 'line_is_live', False)
    console.print0(parts, live=True)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    console.print0(parts, live=True)
    assert capsys.readouterr().out == f'{WHOLE}\n{line}'
    monkeypatch.setattr(console, 'line_is_live', False)


@pytest.mark.parametrize('version, shown', [
    ('(3, 10, 13)', 'Python 3.10.13 is too old: use 3.11 or newer, see "Install" in README.md\n'),
    ('(3, 11, 0)', '')])
def test_old_python_is_one_line(version, shown, tmp_path):
    shutil.copytree(ROOT / 'support', tmp_path / 'support')
    code = (f'import sys; sys.version_info = {version}; '
            f'sys.version = ".".join(map(str, {version})) + " (x)"; import support')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.stderr, done.returncode) == (shown, 1 if shown else 0)
