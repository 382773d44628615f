"""
A run's folder: one run at a time writes to it, and an earlier one's files are kept.

    claim(config, run)             # ValueError if another run is at work there
    move_earlier_run('out')        # to out/earlier
    release('out')
"""

import atexit
import contextlib
import os
import shutil
from pathlib import Path

from support.errors import UserError
from support.machine.console import print0
from support.machine.files import lock, reason_of, unlock
from support.training.checkpoint import RESUMABLE

FILES = (*RESUMABLE, 'log.jsonl')
LOCK = 'run.lock'  # names the process that is at work
MOVING, REPLACED = 'earlier.moving', 'earlier.replaced'  # exist within move_earlier_run


def claim(config, run):
    """Let nobody else write to out_dir until `release` or the end of this process, the run's first one;
    nothing for a run that writes nothing. ValueError if another run is at work there, or nothing can be
    written."""
    if not run.is_master or config['eval_only'] or config['dry_run']:
        return
    out_dir, folder = config['out_dir'], Path(config['out_dir'])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = lock(folder / LOCK)
    except OSError as error:
        raise UserError(f'out_dir={out_dir} can\'t be written to ({reason_of(error)})') from None
    if holder:
        raise UserError(f'{out_dir} is in use by another run, {holder}: stop that one, or name another '
                         '--out_dir')
    atexit.register(release, out_dir)
    for name in FILES:
        if Path(folder, name).exists() and not Path(folder, name).is_file():
            raise UserError(f'{folder / name} is a folder, where a run writes a file: rename it, or name '
                             'another --out_dir')
        for left in folder.glob(f'{name}.*part'):  # of killed runs: no other is at work
            left.unlink(missing_ok=True)
    undo_half_move(out_dir)


def release(out_dir):
    """Let other runs write to out_dir; removes it if nothing was written. Nothing if it wasn't claimed."""
    unlock(Path(out_dir, LOCK))
    with contextlib.suppress(OSError):
        os.rmdir(out_dir)


def move_earlier_run(out_dir):
    """Move an earlier run's checkpoints and log to `out_dir`/earlier, in place of the run that is there.
    Tells and returns that folder, or returns None if there are no checkpoints. A kill in between loses
    nothing: the next run begins with `undo_half_move`."""
    found = [Path(out_dir, name) for name in FILES if Path(out_dir, name).is_file()]
    if not any(path.name in RESUMABLE for path in found):
        return None
    earlier, moving, replaced = (Path(out_dir, name) for name in ('earlier', MOVING, REPLACED))
    moving.mkdir()
    for path in found:
        path.rename(moving / path.name)
    if earlier.exists():
        earlier.rename(replaced)
    moving.rename(earlier)  # from here on the move is done
    shutil.rmtree(replaced, ignore_errors=True)
    print0(f'{out_dir} holds an earlier run: its checkpoints are in {earlier} now')
    return earlier


def undo_half_move(out_dir):
    """Put back what a `move_earlier_run` that was killed has moved."""
    earlier, moving, replaced = (Path(out_dir, name) for name in ('earlier', MOVING, REPLACED))
    if replaced.exists() and not earlier.exists():
        replaced.rename(earlier)
    shutil.rmtree(replaced, ignore_errors=True)
    if moving.exists():
        for path in moving.iterdir():
            path.rename(Path(out_dir, path.name))
        moving.rmdir()
