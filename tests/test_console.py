"""console.py, errors.py: what a user sees of a script's lines, and of its end."""

import sys

import pytest
import torch
from test_configurator import config_file, run_small_script

from support import errors

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
    ('--batch_size=1', 'open(".")', 'Overriding: batch_size = 1\nIsADirectoryError: . can\'t be used: '
     'Is a directory'),
    ('--batch_size=1', 'print("a"); open("none")', 'Overriding: batch_size = 1\na\nTraceback '),
], ids=lambda value: value[:30])
def test_error_is_the_last_line_of_the_output_and_one_that_nobody_foresaw_a_traceback(
        argument, body, shown, tmp_path):
    config_file(tmp_path, 'N = 3', 'wrong.py')
    done = run_small_script(tmp_path, argument, body=body)
    assert done.returncode and done.stdout.startswith(shown), done.stdout
    if 'Traceback' not in shown:
        assert done.stdout.count('\n') == shown.count('\n') + 1


@pytest.mark.parametrize('work, asked', [
    (lambda: torch.empty(10**15), ' (3,725,290.3 GiB asked for)'), (lambda: bytearray(10**16), ''),
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
