"""
A run's folder: one run at a time writes to it, and earlier runs' files are kept.

    claim(config, run)             # UserError if another run is at work there
    move_earlier_run('out')        # to out/earlier-1, out/earlier-2, ...
    check_folder('out')            # at each evaluation: is it still there?
    release('out')
"""

import atexit
import contextlib
import os
import re
from pathlib import Path

from support.errors import UserError
from support.machine.console import print0
from support.machine.files import is_held, lock, reason_of, unlock
from support.training.state import RESUMABLE, is_file, kept_states

LOCK = 'run.lock'  # names the process that is at work
MOVING = 'earlier.moving'  # exists within move_earlier_run


def files_of(out_dir):
    """Paths of all that a run writes to its folder and a later one would overwrite, states first."""
    states = [*(Path(out_dir, name) for name in RESUMABLE), *kept_states(out_dir)]
    return states, [Path(out_dir, name) for name in ('log.jsonl', 'loss.png')]


def claim(config, run):
    """Let nobody else write to out_dir until `release` or the end of this process, the run's first one;
    nothing for a run that writes nothing. UserError if another run is at work there, or nothing can be
    written."""
    if not run.is_master or config['eval_only'] or config.get('dry_run'):
        return
    out_dir, folder = config['out_dir'], Path(config['out_dir'])
    if not out_dir:
        raise UserError('out_dir is empty: name a folder, such as --out_dir=out')
    if folder.is_file():
        raise UserError(f'out_dir={out_dir} is a file: name a folder; --init_from={out_dir} starts a new run '
                        'from this checkpoint')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = lock(folder / LOCK)
    except OSError as error:
        raise UserError(f'out_dir={out_dir} can\'t be written to ({reason_of(error)})') from None
    if holder:
        raise UserError(f'{out_dir} is in use by another run, {holder}: stop that one, or name another '
                        '--out_dir')
    atexit.register(release, out_dir)
    for path in sum(files_of(out_dir), []):
        if path.is_dir():
            raise UserError(f'{path} is a folder, where a run writes a file: rename it, or name another '
                            '--out_dir')
        for left in folder.glob(f'{path.name}.*part'):  # of killed runs: no other is at work
            left.unlink(missing_ok=True)
    undo_half_move(out_dir)


def check_folder(out_dir):
    """Whether out_dir had to be made and claimed again, because it was removed under this run. UserError if
    another run writes there by now. Nothing if it wasn't claimed."""
    path = Path(out_dir, LOCK)
    if is_held(path):
        return False
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if holder := lock(path):
            raise UserError(f'{out_dir} was removed under this run, and another run, {holder}, writes there '
                            'now: this one ends')
        print0(f'{out_dir} was removed under this run: it is made again')
        return True
    return False  # the disk may answer at the next evaluation


def release(out_dir):
    """Let other runs write to out_dir; removes it if nothing was written. Nothing if it wasn't claimed."""
    unlock(Path(out_dir, LOCK))
    with contextlib.suppress(OSError):
        os.rmdir(out_dir)


def earlier_runs(out_dir):
    """{number: folder} of the runs that were moved aside; `earlier`, of older versions, is number 0."""
    names = [name for name in os.listdir(out_dir) if re.fullmatch(r'earlier(-\d+)?', name)]
    return {int(name.partition('-')[2] or 0): Path(out_dir, name) for name in names}


def move_earlier_run(out_dir):
    """Move an earlier run's files to `out_dir`/earlier-N, the first N that is free. Prints and returns that
    folder, or returns None if there are no states. A kill in between loses nothing: the next run begins with
    `undo_half_move`."""
    states, others = (list(filter(is_file, paths)) for paths in files_of(out_dir))
    if not states:
        return None
    moving = Path(out_dir, MOVING)
    moving.mkdir()
    for path in states + others:
        path.rename(moving / path.name)
    earlier = keep_moved(out_dir)
    print0(f'{out_dir} holds an earlier run: it is in {earlier} now; to go on with that one: '
           f'--init_from=resume --out_dir={earlier}')
    return earlier


def keep_moved(out_dir):
    """Give the files that were moved a folder of their own."""
    return Path(out_dir, MOVING).rename(Path(out_dir, f'earlier-{max(earlier_runs(out_dir), default=0) + 1}'))


def undo_half_move(out_dir):
    """Put back what a `move_earlier_run` that was killed has moved."""
    moving = Path(out_dir, MOVING)
    for path in moving.iterdir() if moving.is_dir() else ():
        if not Path(out_dir, path.name).exists():
            path.rename(Path(out_dir, path.name))
    with contextlib.suppress(FileNotFoundError):
        if any(moving.iterdir()):
            keep_moved(out_dir)
        else:
            moving.rmdir()
