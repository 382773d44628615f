"""
Runs scripts one after the other in one process, which spares each the import of torch. Where the folder is
another than before, its modules are imported anew.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace


def execute(path, args):
    """Run a script in this process, and put back what it may leave behind. Returns its globals."""
    from support.machine.signals import stop_signals
    from support.training.folder import release
    handlers = {s: signal.getsignal(s) for s in stop_signals()}
    script = {'__name__': '__main__', '__file__': str(path)}
    sys.argv = [str(path), *map(str, args)]
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), str(path), 'exec'), script)
    except SystemExit as stop:
        if stop.code:  # None with eval_only and dry_run
            raise
    finally:
        if Path(path).name == 'train.py' and 'out_dir' in script:
            release(script['out_dir'])  # as the end of a process does
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return script


class Runner:
    """A process that runs what it is asked to."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            encoding='utf-8', env=os.environ | {'OMP_NUM_THREADS': '1'})

    def __call__(self, folder, *command, code=''):
        """Run a script, given by its name and arguments, in a copy of the repository. code:
        statements to execute before it, or alone. Returns output, error ('' if there was none) and
        result, the value of that variable of the code."""
        request = {'folder': str(folder), 'command': [*map(str, command)], 'code': code}
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.communicate()


def forget():
    """Forget our modules, so that they are imported anew."""
    for name in [*sys.modules]:
        if name.partition('.')[0] in ('configurator', 'model', 'support'):
            del sys.modules[name]
    importlib.invalidate_caches()


def answer(folder, command, code):
    """What Runner's call gives, as a dict."""
    if folder != sys.path[0]:
        forget()
    os.chdir(folder)
    sys.path[0], sys.excepthook, known = folder, sys.__excepthook__, {}
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            exec(code, known)
            if command:
                execute(os.path.join(folder, command[0]), command[1:])
        except BaseException:  # noqa: B036, a script's end
            sys.excepthook(*sys.exc_info())
        else:
            error = io.StringIO()
    import torch
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {'output': output.getvalue(), 'error': error.getvalue(), 'result': known.get('result')}


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
