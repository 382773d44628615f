"""Checkpoints: what is saved comes back, and nothing that happens on the way does harm."""

import builtins
import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soak
import torch
from conftest import ROOT, TINY, losses
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.training.folder import check_folder, claim, is_claimed, move_earlier_run, release
from support.training.models import (config_from_args, config_from_settings, load_model,
                                     load_optimizer, model_args)
from support.training.start import find_state
from support.training.state import State, kept_name

CPU = Runtime('cpu', 'float32', False, 'gloo')
STATE = State(
    model={'transformer.wte.weight': torch.arange(6.0).view(2, 3), 'lm_head.weight': torch.ones(2, 3)},
    optimizer={'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
    model_args={'n_layer': 2, 'bias': False, 'dropout': 0.0}, iter_num=7, best_val_loss=1.5,
    config={'out_dir': 'out', 'top_k': None}, tokenizer={'kind': 'char', 'itos': {0: 'é'}}, seconds=2.5,
    n_tokens=700, wandb_id='a1')
quiet = pytest.mark.filterwarnings('ignore::UserWarning')  # torch's, of odd pickle protocols


def assert_equal_trees(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal_trees(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def assert_same(one, other):
    assert_equal_trees(one.values(), other.values())


def assert_refused(path):
    with pytest.raises(ValueError) as error:
        State.load(path)
    message = str(error.value)
    assert message.startswith(f'{path} is not a checkpoint')
    assert '\n' not in message and '\x1b' not in message


def tiny_state(**more):
    model = GPT(GPTConfig(**TINY))
    return replace(STATE, model=model.state_dict(), model_args=model_args(model.config), **more)


class Call:
    """What a malicious file unpickles to: the result of any call."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------------------- saved and read

def test_loaded_state_is_the_saved_one_and_any_torch_reads_it(tmp_path):
    weight = torch.ones(300, 300)
    state, path = replace(STATE, model={'a': weight, 'b': weight}), tmp_path / 'new' / 'folder' / 'ckpt.pt'
    state.save(path)
    loaded = State.load(path)
    assert_same(loaded, state)
    assert loaded.model['a'].data_ptr() == loaded.model['b'].data_ptr()  # tied
    assert [p.name for p in path.parent.iterdir()] == ['ckpt.pt']
    size = path.stat().st_size
    assert 300 * 300 * 4 < size <= state.size() < 1.1 * size
    for options in ({}, {'mmap': True}, {'weights_only': True}, {'weights_only': False}):
        plain = torch.load(path, map_location='cpu', **options)
        assert plain['iter_num'] == 7 and torch.equal(plain['model']['a'], weight)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(plain)


def test_small_state_has_no_optimizer_and_missing_keys_have_defaults(tmp_path):
    replace(STATE, trained={'a': torch.ones(2)}).without_optimizer().save(tmp_path / 'ckpt.pt')
    state = State.load(tmp_path / 'ckpt.pt')
    assert (state.optimizer, state.trained, state.is_resumable, state.iter_num) == (None, None, False, 7)
    torch.save({'model': STATE.model, 'model_args': {}}, tmp_path / 'ckpt.pt')
    assert_same(State.load(tmp_path / 'ckpt.pt'), State(STATE.model, {}))
    torch.save({'model': STATE.model, 'model_args': {}, 'best_val_loss': float('nan')}, tmp_path / 'ckpt.pt')
    assert State.load(tmp_path / 'ckpt.pt').best_val_loss == float('inf')  # so a later one can be better


def test_file_in_torch_s_older_format_is_read(tmp_path):
    torch.save(STATE.values(), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    assert_same(State.load(tmp_path / 'ckpt.pt'), STATE)


def test_state_that_is_replaced_while_it_is_read_stays_one_state(tmp_path):
    path = tmp_path / 'ckpt.pt'
    STATE.save(path)
    state = State.load(path)
    replace(STATE, model={name: t + 1 for name, t in STATE.model.items()}).save(path)
    assert_equal_trees(state.model, STATE.model)
    assert_equal_trees(state.remapped(), STATE.model)


# ---------------------------------------------------------------------------- what is no checkpoint

def compressed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    return file.getvalue()


@pytest.mark.parametrize('content', [
    b'', b'To be, or not to be\n', b'\n', b'\x80', pickle.dumps([1, 2]), pickle.dumps({'itos': {0: 'a'}}),
    compressed(),
    pickle.dumps({'model': 1, 'model_args': 2})[:-9], b'PK\x03\x04 is how a zip file begins', bytes(1000),
    b'PK', {'weight': torch.ones(2)}, {'model': STATE.model}, {'model_args': {}}, [1], torch.ones(3), 'text',
    None, STATE.values() | {'model': [torch.ones(2)]}, STATE.values() | {'model': {0: torch.ones(2)}},
    *(STATE.values() | wrong for wrong in (
        {'model_args': {1: 2}}, {'optimizer': 1}, {'iter_num': -1}, {'iter_num': 2**64},
        {'best_val_loss': 'low'}, {'seconds': np.datetime64('now')})),
], ids=lambda content: repr(content)[:20])
@quiet
def test_what_is_no_checkpoint_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
    assert_refused(path)


def malicious(marker):
    """{name: an object whose unpickling makes the folder or file `marker`}"""
    make, name = f'__import__("os").mkdir({str(marker)!r})', str(marker)
    mkdir = Call(os.mkdir, name)
    return {'os.system': Call(os.system, f'mkdir {name}'), 'os.mkdir': mkdir,
            'eval': Call(builtins.eval, make), 'exec': Call(builtins.exec, make),
            'open': Call(builtins.open, name, 'w'), 'torch.save': Call(torch.save, 1, name),
            'in a list': [[mkdir]], 'as a key': {mkdir: 1}, 'in an argument': Call(str, mkdir),
            'in a tensor\'s state': Call(torch.Tensor, state={'x': mkdir})}


@pytest.mark.parametrize('name', malicious('x'))
@quiet
def test_no_malicious_file_runs_anything(name, tmp_path):
    path, marker = tmp_path / 'latest.pt', tmp_path / 'marker'
    evil = malicious(marker)[name]
    for content in (evil, STATE.values() | {'config': {'a': evil}},
                    STATE.values() | {'model': STATE.model | {'transformer.wpe.weight': evil}}, None):
        torch.save(content, path) if content is not None else path.write_bytes(pickle.dumps(evil))
        assert_refused(path)
    assert State.newest(tmp_path)[:2] == (None, None) and not marker.exists()
    with contextlib.suppress(ValueError):  # of what isn't a tensor's state
        pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # so it was no blank shot


# ---------------------------------------------------------------------------- damage

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The content of a state's file, and a path for damaged ones."""
    path = tmp_path_factory.mktemp('whole') / 'ckpt.pt'
    STATE.save(path)
    return path.read_bytes(), path.with_name('damaged.pt')


def is_refused(path):
    """Whether a damaged file is refused. What is read of another must be what was saved: bytes between the
    records, such as a date, are never read."""
    try:
        state = State.load(path)
    except ValueError as error:
        assert str(error).startswith(f'{path} is not a checkpoint') and '\n' not in str(error)
        return True
    assert_same(state, STATE)
    return False


@settings(deadline=None, max_examples=300)
@given(st.data())
@quiet
def test_no_damage_changes_what_is_read(whole, data):
    content, path = whole
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(1, 150).map(lambda n: len(content) - n))
    piece = data.draw(st.binary(max_size=9) | st.just(None) | st.integers(1, 2000).map(bytes))
    path.write_bytes(content[:at] if piece is None else content[:at] + piece + content[at + len(piece):])
    assert is_refused(path) or piece is not None


@quiet
def test_flipped_bits_and_zeros_are_seen_in_each_record(whole):
    content, path = whole
    with zipfile.ZipFile(path.with_name('ckpt.pt')) as archive:
        records = archive.infolist()
        places = [(content.index(archive.read(r), r.header_offset), r.file_size) for r in records]
    for begin, size in places:
        for at in range(begin, begin + size, 3):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
            assert is_refused(path)
        zeros = content[:begin] + bytes(size) + content[begin + size:]
        path.write_bytes(zeros)
        assert zeros == content or is_refused(path)
    for at in [*range(0, len(content), 5), *range(len(content) - 200, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
        is_refused(path)  # or read as it was saved


def test_file_with_a_sha256_of_earlier_versions_is_read_and_its_damage_is_seen(whole):
    content, path = whole
    signed = content[:-2] + (71).to_bytes(2, 'little') + b'sha256:' + b'0' * 64
    path.write_bytes(signed)
    assert_same(State.load(path), STATE)
    at = content.index(b'\0\0\x80?\0\0\x80?')  # within lm_head's ones
    path.write_bytes(signed[:at] + b'@' + signed[at + 1:])
    assert_refused(path)
    assert State.load(path, verify=False).iter_num == 7  # checked by the first of several processes


# ---------------------------------------------------------------------------- saving that fails

def states_in(folder):
    """{name: iteration} of a folder's checkpoints; nothing else may be left there."""
    return {p.name: State.load(p).iter_num for p in Path(folder).iterdir()}


def test_interrupted_save_leaves_the_old_files(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    latest, previous = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    for i in (1, 2, 3):
        replace(STATE, iter_num=i).save(latest, previous)
        assert states_in(tmp_path) == {'latest.pt': i} | ({'previous.pt': i - 1} if i > 1 else {})
    broken = type('Broken', (), {'__reduce__': lambda self: interrupt()})
    with pytest.raises(KeyboardInterrupt):
        replace(STATE, iter_num=4, config={'x': broken()}).save(latest, previous)
    assert states_in(tmp_path) == {'latest.pt': 3, 'previous.pt': 2}


def test_disk_that_fills_up_at_any_byte_of_a_save_leaves_the_old_files(tmp_path):
    resource = pytest.importorskip('resource')  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, keep = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    for i in (7, 8):
        replace(STATE, iter_num=i).save(path, keep)
    size = path.stat().st_size
    for limit in [*range(0, size, size // 20), size - 71, size - 22, size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=r'latest.pt could not be written: it needs [\d.]+ MB, '
                                              r'[\d.,]+ MB are free \(.') as error:
                replace(STATE, iter_num=9).save(path, keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert '\n' not in str(error.value)
        assert states_in(tmp_path) == {'latest.pt': 8, 'previous.pt': 7}


def fails(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))
    return fail


def twice(function):
    """A network disk that has lost its first answer is asked once more."""
    return lambda *args: (function(*args), function(*args))


DISKS = {  # what network disks, FUSE or WSL may answer: {call: what it does}
    'no fsync': {'os.fsync': fails(errno.EINVAL)}, 'no such call': {'os.fsync': fails(errno.ENOSYS)},
    'no hard links': {'os.link': fails(errno.EPERM)}, 'no listing': {'os.scandir': fails(errno.EIO)},
    'neither': {'os.link': fails(errno.ENOTSUP), 'os.fsync': fails(errno.ENOTSUP)},
    'no free space': {'shutil.disk_usage': lambda path: SimpleNamespace(total=0, used=0, free=0)},
    'no answer': {'shutil.disk_usage': fails(errno.ENOSYS)},
    'renamed twice': {'os.replace': twice(os.replace)},
}


@pytest.mark.parametrize('disk', DISKS)
def test_save_that_is_whole_succeeds_on_a_disk_that_lacks_an_operation(disk, tmp_path, monkeypatch):
    for name, call in DISKS[disk].items():
        monkeypatch.setattr(name, call)
    for i in (1, 2, 3):
        replace(STATE, iter_num=i).save(tmp_path / 'latest.pt', tmp_path / 'previous.pt')
    monkeypatch.setattr('os.fsync', fails(errno.EIO))  # but one that has lost it is reported
    with pytest.raises(OSError, match='could not be written: .*Input/output error'):
        replace(STATE, iter_num=4).save(tmp_path / 'latest.pt')
    monkeypatch.undo()
    assert states_in(tmp_path) == {'latest.pt': 3, 'previous.pt': 2}


# ---------------------------------------------------------------------------- which state is taken

def save_states(folder, **iterations):
    """latest=9, previous=8, ckpt=3: files that hold these iterations; None: a file that is cut."""
    for name, iteration in iterations.items():
        replace(STATE, iter_num=iteration or 99).save(folder / f'{name}.pt')
        if iteration is None:
            os.truncate(folder / f'{name}.pt', 1000)


@pytest.mark.parametrize('files, name, damaged', [
    ({}, None, []),
    ({'latest': 9, 'previous': 8, 'ckpt': 8}, 'latest', []),
    ({'previous': 8, 'ckpt': 8}, 'previous', []),  # killed between two renamings
    ({'ckpt': 8}, 'ckpt', []),
    ({'latest': 9, 'ckpt': 9}, 'latest', []),
    ({'latest': 1000, 'previous': 999, 'ckpt': 1250}, 'ckpt', []),  # evaluated more often than kept
    ({'latest': None, 'previous': 8, 'ckpt': 5}, 'previous', ['latest']),
    ({'latest': None, 'previous': 8, 'ckpt': 9}, 'ckpt', ['latest']),
    ({'latest': None, 'previous': None, 'ckpt': None}, None, ['latest', 'previous', 'ckpt']),
    ({'latest': None, 'previous': None, 'ckpt': None, 'ckpt_5': 5, 'ckpt_10': 10, 'ckpt_15': None}, 'ckpt_10',
     ['latest', 'previous', 'ckpt', 'ckpt_15']),
    ({'latest': 9, 'previous': None}, 'latest', ['previous']),
])
def test_newest_whole_state_is_taken_and_damaged_ones_are_named(files, name, damaged, tmp_path):
    save_states(tmp_path, **files)
    path, state, errors = State.newest(tmp_path)
    assert path == (name and tmp_path / f'{name}.pt')
    assert (state and state.iter_num) == files.get(name)
    assert [p.stem for p in errors] == damaged
    for bad, error in errors.items():
        assert str(error).startswith(f'{bad} is not a checkpoint, or a damaged one (')


def test_state_without_what_resuming_needs_is_passed_by(tmp_path):
    save_states(tmp_path, previous=8)
    for missing in ('optimizer', 'iter_num'):
        replace(STATE, **{missing: None}).save(tmp_path / 'latest.pt')
        assert State.newest(tmp_path)[0].name == 'previous.pt'


SETTINGS = {'init_from': 'auto', 'eval_only': False}


def found_from(out_dir, init_from='auto'):
    """The iteration that a run would start from, None for a new run."""
    state, is_resumed = find_state(SETTINGS | {'out_dir': str(out_dir), 'init_from': init_from}, CPU)
    assert is_resumed == (state is not None)
    return state and state.iter_num


def test_damaged_files_are_set_aside_once_a_whole_one_is_found(tmp_path, capsys):
    save_states(tmp_path, latest=None, ckpt=5)
    (tmp_path / 'latest.pt.damaged1').write_text('earlier')
    assert found_from(tmp_path) == 5
    assert re.search(r'latest.pt is not a checkpoint.*; set aside as .*latest.pt.damaged2',
                     capsys.readouterr().out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'ckpt.pt', 'latest.pt.damaged1', 'latest.pt.damaged2']
    os.truncate(tmp_path / 'ckpt.pt', 1000)
    before = sorted(p.name for p in tmp_path.iterdir())
    for init_from in ('auto', 'resume'):
        with pytest.raises(ValueError, match='no other state .* is whole: --init_from=scratch starts again'):
            found_from(tmp_path, init_from)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert found_from(tmp_path / 'none') is None
    with pytest.raises(FileNotFoundError, match='nothing to resume'):
        found_from(tmp_path / 'none', 'resume')


@pytest.mark.parametrize('number', [errno.EIO, errno.EMFILE])
def test_errors_of_the_disk_that_pass_are_waited_for_and_others_stop_the_start(number, tmp_path):
    save_states(tmp_path, latest=9, previous=8, ckpt=5)
    good, refused, lost = soak.read_errors(tmp_path, number, every=9)
    assert lost == [] and good > 20 and refused > 20


def test_descriptors_that_run_out_are_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    resource = pytest.importorskip('resource')
    save_states(tmp_path, latest=9)
    before, told = resource.getrlimit(resource.RLIMIT_NOFILE), set()
    used = sorted(map(int, os.listdir('/dev/fd')))
    first_free = next(n for n in range(len(used) + 1) if n not in used)
    for limit in range(first_free, first_free + 8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            told.add(State.newest(tmp_path)[1].iter_num)
        except FileNotFoundError as error:
            told.add(re.sub(r'.*can\'t be read now \(OSError: \[Errno 24].*', 'can\'t be read', str(error)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert told == {9, 'can\'t be read'} and states_in(tmp_path) == {'latest.pt': 9}


# ---------------------------------------------------------------------------- a run's folder

def test_earlier_runs_are_all_kept_and_the_line_says_how_to_go_back(tmp_path, capsys):
    assert move_earlier_run(tmp_path / 'nowhere') is None
    (tmp_path / 'log.jsonl').write_text('of a run that saved nothing')
    assert move_earlier_run(tmp_path) is None
    (tmp_path / 'earlier').mkdir()  # of an older version
    kept = {}
    for run, names in (('a', ['latest.pt', 'previous.pt', 'ckpt.pt', 'log.jsonl', 'loss.png']),
                       ('b', ['ckpt_50.pt', 'log.jsonl']), ('c', ['ckpt.pt'])):
        for name in [*names, 'notes.txt']:
            (tmp_path / name).write_text(run)
        folder = move_earlier_run(tmp_path)
        kept[folder.name] = dict.fromkeys(names, run)
        assert f'--init_from=resume --out_dir={folder}\n' in capsys.readouterr().out
    assert [*kept] == ['earlier-1', 'earlier-2', 'earlier-3']
    for name, files in kept.items():
        found = {p.name: p.read_text() for p in (tmp_path / name).iterdir()}
        assert {k: v for k, v in found.items() if k in files} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ['earlier', *kept, 'notes.txt']
    with pytest.raises(FileNotFoundError, match=re.escape(f'--out_dir={tmp_path / "earlier-3"}') + '$'):
        load_model('resume', tmp_path, CPU)


def other_process(path):
    """A process that tries to hold a run's lock, and its answer: None, or who holds it."""
    program = ('import sys; from support.machine.files import lock\n'
               'print(lock(sys.argv[1]), flush=True); input()')
    process = subprocess.Popen([sys.executable, '-c', program, str(path)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, process.stdout.readline().strip()


def test_run_whose_folder_is_removed_goes_on_and_no_second_run_is_let_in(tmp_path, capsys):
    out, config = tmp_path / 'out', {'out_dir': str(tmp_path / 'out'), 'eval_only': False}
    claim(config, CPU)
    assert is_claimed(out) and not check_folder(out)
    shutil.rmtree(out)
    assert check_folder(out) and not check_folder(out)
    assert 'was removed under this run: it is made again' in capsys.readouterr().out
    process, answer = other_process(out / 'run.lock')
    process.communicate('')
    assert answer.startswith(f'process {os.getpid()} on')
    shutil.rmtree(out)
    out.mkdir()
    process, answer = other_process(out / 'run.lock')
    assert answer == 'None'
    with pytest.raises(ValueError, match=f'another run, process {process.pid} on .*, writes there now'):
        check_folder(out)
    assert not is_claimed(out)
    release(out)
    assert other_process(out / 'run.lock')[1].startswith(f'process {process.pid} on')
    process.communicate('')


# ---------------------------------------------------------------------------- a model to sample from

def test_model_is_read_by_every_name_of_a_run_or_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = {name: tiny_state(iter_num=i) for i, name in
              enumerate(('ckpt_5.pt', 'previous.pt', 'latest.pt', 'ckpt.pt'))}
    for name, state in states.items():
        state.save(tmp_path / 'run' / name)
    shutil.copy('run/ckpt_5.pt', 'weights.ckpt')
    for init_from, out_dir, name in (
            ('resume', 'run', 'ckpt.pt'), ('auto', 'run', 'ckpt.pt'), ('finetune', 'run', 'ckpt.pt'),
            ('resume', 'run/ckpt_5.pt', 'ckpt_5.pt'), ('run', 'none', 'ckpt.pt'),
            ('run/latest.pt', 'none', 'latest.pt'), ('weights.ckpt', 'none', 'ckpt_5.pt')):
        for how in ('full', 'int8'):
            model, tokenizer, state = load_model(init_from, out_dir, CPU, how)
            assert state.iter_num == states[name].iter_num
        model, tokenizer, state = load_model(init_from, out_dir, CPU)
        assert_equal_trees(dict(model.state_dict()), dict(states[name].model))
        assert not model.training and tokenizer.to_dict() == STATE.tokenizer
    assert 'taking' not in capsys.readouterr().out
    Path('run/ckpt.pt').unlink()
    for name in ('latest.pt', 'previous.pt'):
        assert load_model('resume', 'run', CPU)[2].iter_num == states[name].iter_num
        assert f'taking {Path("run", name)}, the state' in capsys.readouterr().out
        Path('run', name).write_bytes(b'damaged')
    for init_from, out_dir, reason in (('resume', 'none', 'ckpt.pt is missing: train a model there first'),
                                       ('none.pt', 'run', 'none.pt is missing'),
                                       ('scratch', 'run', 'scratch is a model that was never trained')):
        with pytest.raises((FileNotFoundError, ValueError), match=reason):
            load_model(init_from, out_dir, CPU)


def test_model_of_a_folder_has_no_iteration_and_gpt2_s_tokenizer(gpt2_folder):
    model, tokenizer, state = load_model(str(gpt2_folder), 'nowhere', CPU)
    assert not model.training and model.config.dropout == 0
    assert (state.iter_num, state.chat, state.config) == (None, None, {})
    assert tokenizer.to_dict() == {'kind': 'gpt2'} and model.config.vocab_size == 50257


def test_model_args_are_gpt2_s_seven_and_what_differs(tmp_path):
    plain = GPTConfig(**TINY)
    assert set(model_args(plain)) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size',
                                      'dropout'}
    for option, value in (('activation', 'swiglu'), ('tie_weights', False), ('n_kv_head', 1), ('ngram', 2)):
        config = GPTConfig(**TINY, **{option: value})
        assert set(model_args(config)) - set(model_args(plain)) == {option}
        assert config_from_args(model_args(config)) == config
    assert config_from_args(model_args(plain) | {'n_kv_head': 0}) == plain
    with pytest.raises(ValueError, match='n_head=3'):
        config_from_settings(TINY | {'n_head': 3}, 64)


@pytest.mark.parametrize('args, reason', [
    ({'flux': 1}, "settings that don't exist here: flux$"), ({'n_layer': 10**9}, 'it has only 29 tensors'),
    ({'n_embd': 64}, 'ask for transformer.wte.weight of'), ({'n_head': 3}, 'n_head'),
    ({'n_head': 'x'}, 'model_args')])
def test_checkpoint_whose_model_args_ask_for_another_model_is_refused(args, reason, tmp_path):
    state = tiny_state()
    replace(state, model_args=state.model_args | args).save(tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match=reason) as error:
        load_model('resume', tmp_path, CPU)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------- the optimizer

class Lookahead(torch.optim.Optimizer):
    """An optimizer whose buffers have shapes and types of their own."""

    def __init__(self, groups):
        super().__init__(groups, {'lr': 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                s = self.state[p]
                if not s:
                    s |= {'row': torch.zeros(p.shape[0]), 'age': torch.zeros(2, dtype=torch.int64), 'n': 0,
                          'sign': torch.zeros(p.shape, dtype=torch.int8),
                          'low': torch.zeros(p.shape, dtype=torch.bfloat16)}
                s['row'] += p.grad.flatten(1).mean(1) if p.dim() > 1 else p.grad
                s['age'] += 1
                s['n'] += 1
                s['sign'] = p.grad.sign().to(torch.int8) - s['sign']
                s['low'].lerp_(p.grad.bfloat16(), 0.1)
                p -= group['lr'] * (s['sign'] + s['low'] + s['row'].sum() / s['age'][0])


def stepped(make, names=('matrices', 'biases'), n_biases=1, n_steps=2, start=0):
    """An optimizer over a matrix and some biases, after some updates."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2))]
    biases = [torch.nn.Parameter(torch.randn(2)) for _ in range(n_biases)]
    groups = {'matrices': weights, 'biases': biases}
    optimizer = make([{'params': groups[name], 'name': name} for name in names])
    run_steps(optimizer, start, n_steps)
    return optimizer


def run_steps(optimizer, start, n):
    for i in range(start, start + n):
        for p in (p for group in optimizer.param_groups for p in group['params']):
            p.grad = (torch.arange(p.numel()).view(p.shape) + i).sin()
        optimizer.step()


def adamw(weight_decay=0.1, betas=(0.9, 0.95)):
    return lambda groups: torch.optim.AdamW(groups, lr=weight_decay, betas=betas, weight_decay=weight_decay)


@pytest.mark.parametrize('make', [adamw(), Lookahead, lambda groups: torch.optim.Adafactor(groups),
                                  lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize('order', [('matrices', 'biases'), ('biases', 'matrices')])
def test_any_optimizer_goes_on_bit_for_bit_with_its_groups_matched_by_name(make, order, tmp_path):
    whole = stepped(make, n_steps=5)
    old = stepped(make)
    replace(STATE, optimizer=old.state_dict()).save(tmp_path / 'ckpt.pt')
    new = stepped(make, order, n_steps=0)
    values = {group['name']: [p.detach() for p in group['params']] for group in old.param_groups}
    for group in new.param_groups:
        for p, value in zip(group['params'], values[group['name']], strict=True):
            p.data.copy_(value)
    load_optimizer(new, State.load(tmp_path / 'ckpt.pt').optimizer)
    run_steps(new, 2, 3)
    found = {group['name']: group['params'] for group in new.param_groups}
    for group in whole.param_groups:
        for p, q in zip(group['params'], found[group['name']], strict=True):
            assert torch.equal(p, q)
            assert_equal_trees(dict(whole.state[p]), dict(new.state[q]))


def test_resumed_optimizer_keeps_its_own_settings(tmp_path):
    new = stepped(adamw(0.3, (0.8, 0.99)), n_steps=0)
    old = stepped(adamw()).state_dict()
    for group in old['param_groups']:
        del group['name']  # of a run before groups had names: by their order
        group['step'] = 5
    load_optimizer(new, old)
    assert all((g['weight_decay'], g['betas'], g['step']) == (0.3, (0.8, 0.99), 5) for g in new.param_groups)
    assert_equal_trees(new.state_dict()['state'], old['state'])


@pytest.mark.parametrize('change, reason', [
    (lambda s: s['param_groups'].pop(), r'groups of \[1\] parameters.*optimizer of \[1, 1\]: optimizer and'),
    (lambda s: s['param_groups'].append({'params': []}), r'groups of \[1, 1, 0\] parameters'),
    (lambda s: s['param_groups'][1]['params'].append(2), r'groups of \[1, 2\] parameters'),
    (lambda s: s['state'][0].update(exp_avg=torch.ones(1, 2)), 'exp_avg of parameter 0 is .1, 2., torch'),
    (lambda s: s['state'][0].update(exp_avg=torch.ones(3, 2).double()), 'float64, where .3, 2., torch'),
    (lambda s: s['state'][0].update(exp_avg=None), 'exp_avg of parameter 0 is None'),
    (lambda s: s.pop('state'), 'KeyError')])
def test_optimizer_state_that_does_not_fit_is_refused_before_use(change, reason):
    new, saved = stepped(adamw()), stepped(adamw()).state_dict()
    before = {p: dict(new.state[p]) for p in new.state}
    change(saved)
    with pytest.raises(ValueError, match=f'optimizer state .* doesn.t fit .*{reason}') as error:
        load_optimizer(new, saved)
    assert '\n' not in str(error.value)
    assert all(new.state[p][k] is t for p, buffers in before.items() for k, t in buffers.items())


# ---------------------------------------------------------------------------- train.py

def test_what_a_resumed_run_changes_is_printed_or_refused(train, char_data, tmp_path):
    train('--max_iters=2', '--seed=3')
    log = train('--max_iters=3', '--seed=4', '--batch_size=5', '--init_from=resume', '--sampler=epoch')['log']
    assert re.findall('^resuming with (.*)$', log, re.M) == [
        'seed=4, before 3', 'sampler=epoch, before random', 'batch_size=5, before 4']
    data = shutil.copytree(char_data, tmp_path / 'data')
    (data / 'dataset.json').unlink()
    tokens = np.fromfile(data / 'val.bin', np.uint16)
    np.roll(tokens, 1).tofile(data / 'val.bin')
    advice = f'--init_from={tmp_path / "out"} with another --out_dir starts a new run from its weights'
    for arg, reason in (('--block_size=8', 'block_size=8 would cut the model .* has 16, for good'),
                        ('--optimizer=muon', 'optimizer=muon, but .* was trained with adamw'),
                        (f'--data_dir={data}', 'is not the data that .*out was trained on')):
        with pytest.raises(ValueError, match=f'{reason}.*{re.escape(advice)}'):
            train('--max_iters=9', '--init_from=resume', arg)
    train('--eval_only', '--init_from=resume', '--block_size=8', data_dir=data)
    for source in (tmp_path / 'out', tmp_path / 'out/latest.pt'):
        log = train('--max_iters=2', f'--init_from={source}', '--block_size=8', data_dir=data,
                    out_dir=tmp_path / 'copy')['log']
        assert list(losses(log)) == [0, 1, 2] and 'resuming' not in log
    assert State.load(tmp_path / 'copy/latest.pt').model_args['block_size'] == 8
    assert State.load(tmp_path / 'out/latest.pt').model_args['block_size'] == 16
    for name, reason in (('', 'out_dir is empty'), (tmp_path / 'out/latest.pt', 'is a file: name a')):
        with pytest.raises(ValueError, match=reason):
            train('--max_iters=2', f'--out_dir={name}')


def test_kept_states_are_numbered(train, tmp_path):
    train('--max_iters=7', '--keep_interval=3')
    assert {p.name for p in (tmp_path / 'out').glob('ckpt_*')} == {kept_name(3), kept_name(6)} == {
        'ckpt_3.pt', 'ckpt_6.pt'}


# Runs of an earlier version, stopped at iteration 20, and the losses that followed there. Its command:
# train.py OLD_ARGS [OLD_MUON] --data_dir=data --max_iters=19, then --max_iters=30 --init_from=resume
OLD_ARGS = ('--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=8', '--batch_size=4', '--device=cpu',
            '--dtype=float32', '--gradient_accumulation_steps=2', '--warmup_iters=2', '--lr_decay_iters=30',
            '--learning_rate=1e-2', '--min_lr=1e-3', '--eval_interval=100', '--dropout=0.1',
            '--weight_decay=0.2', '--grad_clip=0.5')
OLD_MUON = ('--optimizer=muon', '--qk_norm=True', '--pos_emb=rope', '--n_kv_head=1', '--norm=rmsnorm',
            '--activation=swiglu', '--value_residual=True', '--tie_weights=False', '--embedding_lr=0.02',
            '--ngram=2', '--ngram_rows=32', '--logit_softcap=15.0', '--sampler=epoch', '--lr_schedule=wsd',
            '--batch_ramp_iters=30', '--init=zero_proj')
OLD_LOSSES = {
    'adamw': [2.0370154, 2.0271716, 2.0271769, 2.1001327, 2.0333233, 2.0622377, 2.0418386, 1.9978549,
              2.0364504, 2.0244236, 2.0238099],
    'muon': [1.2930663, 1.1440225, 1.0231676, 1.0731565, 1.0208366, 1.0755510, 1.0218580, 1.0525761,
             1.0222957, 0.9586643, 0.9198639],
}


@pytest.mark.parametrize('name', OLD_LOSSES)
def test_run_of_an_earlier_version_goes_on_with_the_same_losses(name, train, tmp_path, monkeypatch):
    # on processors that multiply bfloat16 Muon would round to it
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False, raising=False)
    (tmp_path / 'data').mkdir()
    rng, letters = np.random.default_rng(0), '\nabcdefghijklmno'
    for split, n in (('train', 4000), ('val', 800)):
        tokens = np.cumsum(5 + rng.integers(0, 2, n)) % 16
        tokens.astype(np.uint16).tofile(tmp_path / f'data/{split}.bin')
    meta = {'vocab_size': 16, 'itos': dict(enumerate(letters)), 'stoi': {c: i for i, c in enumerate(letters)}}
    (tmp_path / 'data/meta.pkl').write_bytes(pickle.dumps(meta))
    (tmp_path / 'out').mkdir()
    shutil.copy(ROOT / f'tests/fixtures/{name}.pt', tmp_path / 'out/latest.pt')
    train(*OLD_ARGS, *(OLD_MUON if name == 'muon' else ()), '--init_from=resume', '--max_iters=30',
          data_dir=tmp_path / 'data')
    logged = map(json.loads, (tmp_path / 'out/log.jsonl').read_text().splitlines())
    found = {entry['iter']: entry['loss'] for entry in logged if 'loss' in entry}
    assert [*found] == [*range(20, 31)]
    assert [*found.values()] == pytest.approx(OLD_LOSSES[name], abs=1e-5)
