"""
A run's folder: one run at a time writes to it, and earlier runs' files are kept.

    claim(config, run)             # UserError if another run is at work there
    move_earlier_run('out')        # to out/earlier-1, out/earlier-2, ...
    check_folder('out')            # at each evaluation: is it still there?
    release('out')
"""

import atexit
import os
from contextlib import suppress
from pathlib import Path

from support.errors import UserError
from support.machine.console import print0
from support.machine.files import holds, is_held, lock, lock_again, reason_of, unlock
from support.training.state import RESUMABLE, earlier_runs, is_file, kept_states, names_file

LOCK = 'run.lock'  # names the process that is at work
MOVING = 'earlier.moving'  # exists within move_earlier_run


def states_of(out_dir):
    return [Path(out_dir, name) for name in RESUMABLE] + kept_states(out_dir)


def files_of(out_dir):
    """Paths of all that a run writes and a later one in the same folder would overwrite."""
    return states_of(out_dir) + [Path(out_dir, name) for name in ('log.jsonl', 'loss.png')]


def claim(config, run):
    """Let no other run write to out_dir until `release` or the end of this process, which is the
    run's first one; nothing for a run that writes nothing. UserError if another run is at work
    there, or nothing can be written."""
    out_dir = config['out_dir']
    if not run.is_master or config['eval_only'] or config.get('dry_run'):
        return
    if not out_dir:
        raise UserError('out_dir is empty: name a folder, such as --out_dir=out')
    try:
        if names_file(out_dir):
            raise UserError(f'out_dir={out_dir} is a file: name a folder; --init_from={out_dir} '
                            'starts a new run from a checkpoint')
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        holder = lock(Path(out_dir, LOCK))
        if holder:
            raise UserError(f'{out_dir} is in use by another run, {holder}: stop that one, or name '
                            'another --out_dir')
        atexit.register(release, out_dir)
        clean(out_dir)
    except OSError as error:
        raise UserError(f'out_dir={out_dir} can\'t be written to ({reason_of(error)})') from None


def clean(out_dir):
    """Remove or put back what killed runs left half-done. UserError for a folder in the way."""
    for path in files_of(out_dir):
        if path.is_dir():
            raise UserError(f'{path} is a folder, where a run writes a file: rename it, or name '
                            'another --out_dir')
        for left in path.parent.glob(f'{path.name}.*part'):  # no other run is at work
            left.unlink(missing_ok=True)
    undo_half_move(out_dir)


def is_claimed(out_dir):
    """Whether this process is the one that may write to out_dir."""
    return holds(Path(out_dir, LOCK))


def check_folder(out_dir):
    """Whether out_dir had to be made and claimed again, because it was removed under this run.
    UserError if another run writes there by now. Nothing if it wasn't claimed."""
    path = Path(out_dir, LOCK)
    if is_held(path):
        return False
    with suppress(OSError):  # the disk may answer at the next evaluation
        path.parent.mkdir(parents=True, exist_ok=True)
        if holder := lock_again(path):
            raise UserError(f'{out_dir} was removed under this run, and another run, {holder}, '
                            'writes there now: this one ends')
        print0(f'{out_dir} was removed under this run: it is made again')
        return True
    return False


def release(out_dir):
    """Let other runs write to out_dir; removes it if nothing was written. Nothing if it wasn't
    claimed."""
    unlock(Path(out_dir, LOCK))
    with suppress(OSError):
        os.rmdir(out_dir)


def move_earlier_run(out_dir):
    """Move an earlier run's files to out_dir/earlier-N, the first N that is free. Prints and
    returns that folder; None if there are no states. A kill in between loses nothing: the next run
    begins with `undo_half_move`."""
    if not any(map(is_file, states_of(out_dir))):
        return None
    moving = Path(out_dir, MOVING)
    moving.mkdir()
    for path in filter(is_file, files_of(out_dir)):
        path.rename(moving / path.name)
    earlier = keep_moved(out_dir)
    print0(f'{out_dir} holds an earlier run: it is in {earlier} now; to go on with that one: '
           f'--init_from=resume --out_dir={earlier}')
    return earlier


def keep_moved(out_dir):
    """Give the files that were moved a folder of their own."""
    number = max(earlier_runs(out_dir), default=0) + 1
    return Path(out_dir, MOVING).rename(Path(out_dir, f'earlier-{number}'))


def undo_half_move(out_dir):
    """Put back what a `move_earlier_run` that was killed has moved."""
    moving = Path(out_dir, MOVING)
    if not moving.is_dir():
        return
    for path in moving.iterdir():
        if not Path(out_dir, path.name).exists():
            path.rename(Path(out_dir, path.name))
    if any(moving.iterdir()):
        keep_moved(out_dir)
    else:
        moving.rmdir()
