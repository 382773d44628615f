"""Checkpoints: what is saved comes back, and nothing that happens on the way does harm."""

import contextlib
import errno
import io
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, losses
from runs import equal, hold, logged

from model import GPT, GPTConfig
from scripts.soak import read_errors
from support.machine.runtime import Runtime
from support.training.folder import check_folder, claim, is_claimed, move_earlier_run, release
from support.training.models import (config_from_args, config_from_settings, load_model,
                                     load_optimizer, model_args)
from support.training.start import find_state
from support.training.state import State

CPU = Runtime('cpu', 'float32', False, 'gloo')
STATE = State(
    model={'transformer.wte.weight': torch.arange(6.0).view(2, 3), 'lm_head.weight': torch.ones(2, 3)},
    optimizer={'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
    model_args={'n_layer': 2, 'bias': False, 'dropout': 0.0}, iter_num=7, best_val_loss=1.5,
    config={'out_dir': 'out', 'top_k': None}, tokenizer={'kind': 'char', 'itos': {0: 'é'}},
    seconds=2.5, n_tokens=700, n_worse=3, wandb_id='a1')
quiet = pytest.mark.filterwarnings('ignore::UserWarning')  # torch's, of odd pickle protocols


def assert_equal_trees(one, other):
    assert equal(one, other)


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


def test_loaded_state_is_the_saved_one_and_any_torch_reads_it(tmp_path):
    weight, path = torch.ones(300, 300), tmp_path / 'new' / 'folder' / 'ckpt.pt'
    state = replace(STATE, model={'a': weight, 'b': weight})
    state.save(path)
    loaded = State.load(path)
    assert_equal_trees(loaded.values(), state.values())
    assert loaded.model['a'].data_ptr() == loaded.model['b'].data_ptr()  # tied
    assert [p.name for p in path.parent.iterdir()] == ['ckpt.pt']
    assert 300 * 300 * 4 < path.stat().st_size <= state.size() < 1.1 * path.stat().st_size
    for options in ({}, {'mmap': True}, {'weights_only': False}):
        plain = torch.load(path, map_location='cpu', **options)
        assert plain['iter_num'] == 7 and torch.equal(plain['model']['a'], weight)
    replace(state, model={'a': weight + 1}).save(path)
    assert_equal_trees([loaded.model, loaded.remapped()], [state.model] * 2)  # of the file it opened
    torch.save(STATE.values(), path, _use_new_zipfile_serialization=False)
    assert_equal_trees(State.load(path).values(), STATE.values())


def test_small_state_has_no_optimizer_and_missing_keys_have_defaults(tmp_path):
    path, plain = tmp_path / 'ckpt.pt', {'model': STATE.model, 'model_args': {}}
    replace(STATE, trained={'a': torch.ones(2)}).without_optimizer().save(path)
    state = State.load(path)
    assert (state.optimizer, state.trained, state.is_resumable, state.iter_num) == (None, None, False, 7)
    for more in ({}, {'best_val_loss': float('nan')}):  # after nan no later one would be better
        torch.save(plain | more, path)
        assert_equal_trees(State.load(path).values(), State(STATE.model, {}).values())


def compressed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    return file.getvalue()


@pytest.mark.parametrize('content', [
    b'', b'To be, or not to be\n', b'\x80', pickle.dumps([1, 2]), pickle.dumps({'itos': {0: 'a'}}),
    pickle.dumps({'model': 1, 'model_args': 2})[:-9], compressed(), b'PK', bytes(1000),
    {'model': STATE.model}, {'model_args': {}}, [1], torch.ones(3), None,
    *(STATE.values() | wrong for wrong in (
        {'model': [torch.ones(2)]}, {'model': {0: torch.ones(2)}}, {'model_args': {1: 2}},
        {'optimizer': 1}, {'iter_num': -1}, {'iter_num': 2**64}, {'best_val_loss': 'low'},
        {'seconds': np.datetime64('now')})),
], ids=lambda content: repr(content)[:20])
@quiet
def test_what_is_no_checkpoint_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
    assert_refused(path)


def malicious(marker):
    """{name: an object whose unpickling makes the folder or file `marker`}"""
    name = str(marker)
    mkdir = Call(os.mkdir, name)
    return {'os.system': Call(os.system, f'mkdir {name}'), 'open': Call(open, name, 'w'),
            'eval': Call(eval, f'__import__("os").mkdir({name!r})'), 'in a list': [[mkdir]],
            'torch.save': Call(torch.save, 1, name), 'as a key': {mkdir: 1},
            'in an argument': Call(str, mkdir), 'a tensor\'s state': Call(torch.Tensor, state={'x': mkdir})}


@pytest.mark.parametrize('name', malicious('x'))
@quiet
def test_no_malicious_file_runs_anything(name, tmp_path):
    path, marker = tmp_path / 'latest.pt', tmp_path / 'marker'
    evil = malicious(marker)[name]
    for content in (evil, STATE.values() | {'config': {'a': evil}},
                    STATE.values() | {'model': STATE.model | {'transformer.wpe.weight': evil}}):
        torch.save(content, path)
        assert_refused(path)
    path.write_bytes(pickle.dumps(evil))
    assert_refused(path)
    assert State.newest(tmp_path)[:2] == (None, None) and not marker.exists()
    with contextlib.suppress(ValueError):  # of what isn't a tensor's state
        pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # so it was no blank shot


def is_refused(path):
    """Whether a damaged file is refused. What is read of another must be what was saved: bytes between
    the records, such as a date, are never read."""
    try:
        state = State.load(path)
    except ValueError as error:
        assert str(error).startswith(f'{path} is not a checkpoint') and '\n' not in str(error)
        return True
    assert_equal_trees(state.values(), STATE.values())
    return False


@quiet
def test_damage_anywhere_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / 'ckpt.pt'
    STATE.save(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {content.index(archive.read(r), r.header_offset): archive.read(r)
                   for r in archive.infolist()}
    inside = {at for begin, record in records.items() for at in range(begin, begin + len(record))}
    for at in [*range(0, len(content), 4), *range(len(content) - 150, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
        assert is_refused(path) or at not in inside
        if at % 3 == 0:
            path.write_bytes(content[:at])
            assert is_refused(path)
    for begin, record in records.items():
        path.write_bytes(content[:begin] + bytes(len(record)) + content[begin + len(record):])
        assert record.strip(b'\0') == b'' or is_refused(path)
    signed = content[:-2] + (71).to_bytes(2, 'little') + b'sha256:' + b'0' * 64  # of an earlier version
    path.write_bytes(signed)
    assert_equal_trees(State.load(path).values(), STATE.values())
    at = signed.index(b'\0\0\x80?\0\0\x80?')  # within lm_head's ones
    path.write_bytes(signed[:at] + b'@' + signed[at + 1:])
    assert is_refused(path)
    assert State.load(path, verify=False).iter_num == 7  # checked by the first of several processes


def states_in(folder):
    """{name: iteration} of a folder's checkpoints; nothing else may be left there."""
    return {p.name: State.load(p).iter_num for p in Path(folder).iterdir()}


def test_save_that_is_interrupted_or_fills_the_disk_leaves_the_old_files(tmp_path):
    resource = pytest.importorskip('resource')  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    latest, previous = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    for i in (1, 2, 3):
        replace(STATE, iter_num=i).save(latest, previous)
        assert states_in(tmp_path) == {'latest.pt': i} | ({'previous.pt': i - 1} if i > 1 else {})

    def interrupt(_):
        raise KeyboardInterrupt
    broken = type('Broken', (), {'__reduce__': interrupt})
    with pytest.raises(KeyboardInterrupt):
        replace(STATE, iter_num=4, config={'x': broken()}).save(latest, previous)
    size = latest.stat().st_size
    for limit in [*range(0, size, size // 20), size - 71, size - 22, size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=r'latest.pt could not be written: it needs [\d.]+ MB, '
                                              r'[\d.,]+ MB are free \(.') as error:
                replace(STATE, iter_num=9).save(latest, previous)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert '\n' not in str(error.value)
        assert states_in(tmp_path) == {'latest.pt': 3, 'previous.pt': 2}


def fails(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))
    return fail


def replaced_twice(*args, real=os.replace):
    """A network disk that has lost its first answer is asked once more."""
    real(*args)
    real(*args)


DISKS = [  # what network disks, FUSE or WSL may answer: {call: what it does}
    {'os.fsync': fails(errno.EINVAL)}, {'os.fsync': fails(errno.ENOSYS)}, {'os.link': fails(errno.EPERM)},
    {'os.link': fails(errno.ENOTSUP), 'os.fsync': fails(errno.ENOTSUP)}, {'os.scandir': fails(errno.EIO)},
    {'shutil.disk_usage': fails(errno.ENOSYS)}, {'os.replace': replaced_twice}]


@pytest.mark.parametrize('disk', DISKS, ids=' '.join)
def test_save_that_is_whole_succeeds_on_a_disk_that_lacks_an_operation(disk, tmp_path, monkeypatch):
    for name, call in disk.items():
        monkeypatch.setattr(name, call)
    for i in (1, 2, 3):
        replace(STATE, iter_num=i).save(tmp_path / 'latest.pt', tmp_path / 'previous.pt')
    monkeypatch.setattr('os.fsync', fails(errno.EIO))  # but one that has lost it is reported
    with pytest.raises(OSError, match='could not be written: .*Input/output error'):
        replace(STATE, iter_num=4).save(tmp_path / 'latest.pt')
    monkeypatch.undo()
    assert states_in(tmp_path) == {'latest.pt': 3, 'previous.pt': 2}


def save_states(folder, **iterations):
    """latest=9, previous=8, ckpt=3: files that hold these iterations; None: a file that is cut."""
    for name, iteration in iterations.items():
        replace(STATE, iter_num=iteration or 99).save(folder / f'{name}.pt')
        if iteration is None:
            os.truncate(folder / f'{name}.pt', 1000)


ALL_CUT = {'latest': None, 'previous': None, 'ckpt': None}


@pytest.mark.parametrize('files, name, damaged', [
    ({}, None, []),
    ({'latest': 9, 'previous': 8, 'ckpt': 9}, 'latest', []),
    ({'previous': 8, 'ckpt': 8}, 'previous', []),  # killed between two renamings
    ({'ckpt': 8}, 'ckpt', []),
    ({'latest': 1000, 'previous': 999, 'ckpt': 1250}, 'ckpt', []),  # evaluated more often than kept
    ({'latest': None, 'previous': 8, 'ckpt': 5}, 'previous', ['latest']),
    ({'latest': None, 'previous': 8, 'ckpt': 9}, 'ckpt', ['latest']),
    (ALL_CUT, None, [*ALL_CUT]),
    (ALL_CUT | {'ckpt_5': 5, 'ckpt_10': 10, 'ckpt_15': None}, 'ckpt_10', [*ALL_CUT, 'ckpt_15']),
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
    for missing in ('optimizer', 'iter_num'):  # which resuming needs
        replace(STATE, iter_num=9999).save(tmp_path / 'previous.pt')
        replace(STATE, **{'iter_num': 10000, missing: None}).save(tmp_path / 'latest.pt')
        assert State.newest(tmp_path)[0].name == 'previous.pt'


def found_from(out_dir, init_from='auto'):
    """The iteration that a run would start from, None for a new run."""
    config = {'init_from': init_from, 'eval_only': False, 'out_dir': str(out_dir)}
    state, is_resumed = find_state(config, CPU)
    assert is_resumed == (state is not None)
    return state and state.iter_num


def test_damaged_files_are_set_aside_once_a_whole_one_is_found(tmp_path, capsys):
    save_states(tmp_path, latest=None, ckpt=5)
    (tmp_path / 'latest.pt.damaged1').write_text('earlier')
    assert found_from(tmp_path) == 5
    assert re.search(r'latest.pt is not a checkpoint.*; set aside as .*latest.pt.damaged2',
                     capsys.readouterr().out)
    left = {'ckpt.pt', 'latest.pt.damaged1', 'latest.pt.damaged2'}
    assert {p.name for p in tmp_path.iterdir()} == left
    os.truncate(tmp_path / 'ckpt.pt', 1000)
    for init_from in ('auto', 'resume'):
        with pytest.raises(ValueError, match='no other state .* is whole: --init_from=scratch'):
            found_from(tmp_path, init_from)
    assert {p.name for p in tmp_path.iterdir()} == left
    assert found_from(tmp_path / 'none') is None
    with pytest.raises(FileNotFoundError, match='nothing to resume'):
        found_from(tmp_path / 'none', 'resume')


@pytest.mark.parametrize('number', [errno.EIO, errno.EMFILE])
def test_errors_of_the_disk_that_pass_are_waited_for_and_others_stop_the_start(number, tmp_path):
    save_states(tmp_path, latest=9, previous=8, ckpt=5)
    good, refused, lost = read_errors(tmp_path, number, every=9)
    assert lost == [] and good > 20 and refused > 20


def test_earlier_runs_are_all_kept_and_the_line_says_how_to_go_back(tmp_path, capsys):
    (tmp_path / 'log.jsonl').write_text('of a run that saved nothing')
    assert move_earlier_run(tmp_path / 'nowhere') is move_earlier_run(tmp_path) is None
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
        assert {p.name: p.read_text() for p in (tmp_path / name).iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ['earlier', *kept, 'notes.txt']
    with pytest.raises(FileNotFoundError, match=re.escape(f'--out_dir={tmp_path / "earlier-3"}') + '$'):
        load_model('resume', tmp_path, CPU)


def test_run_whose_folder_is_removed_goes_on_and_no_second_run_is_let_in(tmp_path, capsys):
    out = tmp_path / 'out'
    claim({'out_dir': str(out), 'eval_only': False}, CPU)
    assert is_claimed(out) and not check_folder(out)
    shutil.rmtree(out)
    assert check_folder(out) and not check_folder(out)
    assert 'was removed under this run: it is made again' in capsys.readouterr().out
    process, answer = hold(out / 'run.lock')
    process.communicate('')
    assert answer.startswith(f'process {os.getpid()} on')
    shutil.rmtree(out)
    out.mkdir()
    process, answer = hold(out / 'run.lock')
    assert answer == 'None'
    with pytest.raises(ValueError, match=f'another run, process {process.pid} on .*, writes there now'):
        check_folder(out)
    assert not is_claimed(out)
    release(out)
    assert hold(out / 'run.lock')[1].startswith(f'process {process.pid} on')
    process.communicate('')


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
        assert load_model(init_from, out_dir, CPU, 'int8')[2].iter_num == states[name].iter_num
        model, tokenizer, state = load_model(init_from, out_dir, CPU)
        assert_equal_trees(dict(model.state_dict()), dict(states[name].model))
        assert state.iter_num == states[name].iter_num
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


def test_model_args_are_gpt2_s_seven_and_what_differs(tmp_path):
    plain = GPTConfig(**TINY)
    assert set(model_args(plain)) == {*TINY, 'bias', 'dropout'}
    for option, value in (('activation', 'swiglu'), ('tie_weights', False), ('n_kv_head', 1), ('ngram', 2)):
        config = GPTConfig(**TINY, **{option: value})
        assert set(model_args(config)) - set(model_args(plain)) == {option}
        assert config_from_args(model_args(config)) == config
    assert config_from_args(model_args(plain) | {'n_kv_head': 0}) == plain
    with pytest.raises(ValueError, match='n_head=3'):
        config_from_settings(TINY | {'n_head': 3}, 64)


@pytest.mark.parametrize('args, reason', [
    ({'n_layer': 10**9}, 'it has only 29 tensors'), ({'n_embd': 64}, 'ask for transformer.wte.weight of'),
    ({'n_head': 3}, 'n_head'), ({'n_head': 'x'}, 'model_args')])
def test_checkpoint_whose_model_args_ask_for_another_model_is_refused(args, reason, tmp_path):
    state = tiny_state()
    replace(state, model_args=state.model_args | args).save(tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match=reason) as error:
        load_model('resume', tmp_path, CPU)
    assert '\n' not in str(error.value)


def stepped(n_steps, names=('matrices', 'biases'), **settings):
    """AdamW over a matrix and a bias, after some updates."""
    torch.manual_seed(0)
    weights = {'matrices': [torch.nn.Parameter(torch.randn(3, 2))],
               'biases': [torch.nn.Parameter(torch.randn(2))]}
    opt = torch.optim.AdamW([{'params': weights[name], 'name': name} for name in names],
                            **{'lr': 0.1, 'weight_decay': 0.1} | settings)
    run_steps(opt, range(n_steps))
    return opt, [*weights['matrices'], *weights['biases']]


def run_steps(opt, steps):
    for i in steps:
        for p in (p for group in opt.param_groups for p in group['params']):
            p.grad = (torch.arange(p.numel()).view(p.shape) + i).sin()
        opt.step()


@pytest.mark.parametrize('order', [('matrices', 'biases'), ('biases', 'matrices')])
def test_optimizer_goes_on_bit_for_bit_with_its_groups_matched_by_name_and_its_own_settings(order):
    (whole, expected), (old, before), (new, found) = stepped(5), stepped(2), stepped(0, order)
    with torch.no_grad():
        for p, q in zip(found, before):
            p.copy_(q)
    load_optimizer(new, old.state_dict())
    run_steps(new, range(2, 5))
    for p, q in zip(expected, found):
        assert torch.equal(p, q)
        assert_equal_trees(dict(whole.state[p]), dict(new.state[q]))
    new, saved = stepped(0, weight_decay=0.3, betas=(0.8, 0.99))[0], stepped(2)[0].state_dict()
    for group in saved['param_groups']:
        del group['name']  # of a run before groups had names: by their order
        group['step'] = 5
    load_optimizer(new, saved)
    assert all((g['weight_decay'], g['betas'], g['step']) == (0.3, (0.8, 0.99), 5) for g in new.param_groups)
    assert_equal_trees(new.state_dict()['state'], saved['state'])


@pytest.mark.parametrize('change, reason', [
    (lambda s: s['param_groups'].pop(), r'groups of \[1\] parameters.*optimizer of \[1, 1\]: optimizer and'),
    (lambda s: s['param_groups'].append({'params': []}), r'groups of \[1, 1, 0\] parameters'),
    (lambda s: s['param_groups'][1]['params'].append(2), r'groups of \[1, 2\] parameters'),
    (lambda s: s['state'][0].update(exp_avg=torch.ones(1, 2)), 'exp_avg of parameter 0 is .1, 2., torch'),
    (lambda s: s['state'][0].update(exp_avg=torch.ones(3, 2).double()), 'float64, where .3, 2., torch'),
    (lambda s: s['state'][0].update(exp_avg=None), 'exp_avg of parameter 0 is None'),
    (lambda s: s.pop('state'), 'KeyError')])
def test_optimizer_state_that_does_not_fit_is_refused_before_use(change, reason):
    new, saved = stepped(2)[0], stepped(2)[0].state_dict()
    before = {p: dict(new.state[p]) for p in new.state}
    change(saved)
    with pytest.raises(ValueError, match=f'optimizer state .* doesn.t fit .*{reason}') as error:
        load_optimizer(new, saved)
    assert '\n' not in str(error.value)
    assert all(new.state[p][k] is t for p, buffers in before.items() for k, t in buffers.items())


def test_what_a_resumed_run_changes_is_printed_or_refused(train, char_data, tmp_path):
    train('--max_iters=2', '--seed=3')
    log = train('--max_iters=3', '--seed=4', '--batch_size=5', '--init_from=resume', '--sampler=epoch')['log']
    assert re.findall('^resuming with (.*)$', log, re.M) == [
        'seed=4, before 3', 'sampler=epoch, before random', 'batch_size=5, before 4']
    data = shutil.copytree(char_data, tmp_path / 'data')
    (data / 'dataset.json').unlink()
    np.roll(np.fromfile(data / 'val.bin', np.uint16), 1).tofile(data / 'val.bin')
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
    sizes = [State.load(tmp_path / name / 'latest.pt').model_args['block_size'] for name in ('copy', 'out')]
    assert sizes == [8, 16]
    with pytest.raises(ValueError, match='is a file: name a'):
        train('--max_iters=2', f'--out_dir={tmp_path / "out/latest.pt"}')


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
    found = logged(tmp_path / 'out')
    assert [*found] == [*range(20, 31)]
    assert [*found.values()] == pytest.approx(OLD_LOSSES[name], abs=1e-5)
