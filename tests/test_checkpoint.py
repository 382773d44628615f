"""checkpoint.py: what is saved comes back, and nothing that happens on the way does harm."""

import builtins
import contextlib
import errno
import hashlib
import os
import re
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.training import checkpoint, folder
from support.training.state import config_from_args, load_model, load_optimizer, model_args

STATE = {
    'model': {'transformer.wte.weight': torch.arange(6.0).view(2, 3), 'lm_head.weight': torch.ones(2, 3)},
    'optimizer': {'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
    'model_args': {'n_layer': 2, 'bias': False, 'dropout': 0.0}, 'iter_num': 7, 'best_val_loss': 1.5,
    'config': {'out_dir': 'out', 'top_k': None}, 'tokenizer': {'kind': 'char', 'itos': {0: 'é'}},
}
loading_warns = pytest.mark.filterwarnings('ignore::UserWarning')  # torch, of odd pickle protocols


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


def assert_refused(path):
    with pytest.raises(ValueError) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert message.startswith(f'{path} is not a checkpoint') and '\n' not in message


class Evil:
    """What a malicious file unpickles to: the result of any call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---------------------------------------------------------------------------- what is saved comes back

def test_loaded_state_equals_the_saved_one(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'ckpt.pt'
    checkpoint.save(path, STATE)
    assert_equal_trees(checkpoint.load(path), STATE)
    assert [p.name for p in path.parent.iterdir()] == ['ckpt.pt']


def test_tied_weights_stay_one_tensor(tmp_path):
    weight = torch.ones(4, 4)
    checkpoint.save(tmp_path / 'ckpt.pt', STATE | {'model': {'a': weight, 'b': weight}})
    model = checkpoint.load(tmp_path / 'ckpt.pt')['model']
    assert model['a'].data_ptr() == model['b'].data_ptr()


def test_compile_prefix_and_causal_masks_of_older_files_are_dropped(tmp_path):
    masks = {f'_orig_mod.transformer.h.{i}.attn.bias': torch.ones(1, 1, 4, 4) for i in range(2)}
    biases = {'transformer.h.0.attn.c_attn.bias': torch.ones(9), 'transformer.ln_f.bias': torch.ones(3)}
    theirs = {'_orig_mod.' + name: weight for name, weight in (STATE['model'] | biases).items()} | masks
    torch.save(STATE | {'model': theirs}, tmp_path / 'ckpt.pt')
    assert_equal_trees(checkpoint.load(tmp_path / 'ckpt.pt')['model'], STATE['model'] | biases)


def test_file_in_torch_s_older_format_is_read(tmp_path):
    torch.save(STATE, tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    assert_equal_trees(checkpoint.load(tmp_path / 'ckpt.pt'), STATE)


# ---------------------------------------------------------------------------- what is no checkpoint

def test_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'ckpt.pt is missing: .*--out_dir') as error:
        checkpoint.load(tmp_path / 'ckpt.pt')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('data', [
    b'', b'To be, or not to be\n', b'\n', b'\x80', pickle.dumps([1, 2]), pickle.dumps({'itos': {0: 'a'}}),
    pickle.dumps({'model': 1, 'model_args': 2})[:-9], b'PK\x03\x04 is how a zip file begins', bytes(1000),
], ids=['empty', 'text', 'newline', 'one byte', 'list', 'meta', 'cut pickle', 'zip', 'zeros'])
@loading_warns
def test_file_of_another_kind_is_refused_in_one_line(data, tmp_path):
    (tmp_path / 'ckpt.pt').write_bytes(data)
    assert_refused(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('state', [
    {'weight': torch.ones(2)}, {'model': STATE['model']}, {'model_args': {}}, [1], torch.ones(3), 'text',
    None, STATE | {'model': None}, STATE | {'model': [torch.ones(2)]},
    STATE | {'model': {0: torch.ones(2)}},
], ids=['weights', 'no args', 'no model', 'list', 'tensor', 'string', 'None',
        'model is None', 'model is a list', 'names are numbers'])
def test_torch_file_without_a_model_is_refused_in_one_line(state, tmp_path):
    torch.save(state, tmp_path / 'ckpt.pt')
    assert_refused(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('zipped', [True, False])
@loading_warns
def test_truncated_checkpoint_is_refused_wherever_it_ends(zipped, tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in [*range(0, len(data), 53), *range(40), len(data) - 1]:
        path.write_bytes(data[:size])
        assert_refused(path)


@pytest.mark.parametrize('write', [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))],
                         ids=['torch', 'pickle'])
@loading_warns
def test_file_that_would_run_code_is_refused_and_runs_none(write, tmp_path):
    path, marker = tmp_path / 'ckpt.pt', tmp_path / 'marker'
    write(STATE | {'config': Evil(marker)}, path)
    assert_refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert marker.exists()  # so it was no blank shot


# ---------------------------------------------------------------------------- saving that fails

@pytest.mark.parametrize('interruption', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_failing_save_leaves_the_old_checkpoint(interruption, monkeypatch, tmp_path):
    def fail_halfway(state, path):
        path.write_bytes(b'PK\x03\x04')
        raise interruption

    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    monkeypatch.setattr(torch, 'save', fail_halfway)
    with pytest.raises(type(interruption)):
        checkpoint.save(path, STATE | {'iter_num': 8})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_old_checkpoint_is_whole_while_the_new_one_is_written(monkeypatch, tmp_path):
    path, real_save, seen = tmp_path / 'ckpt.pt', torch.save, []
    checkpoint.save(path, STATE)
    monkeypatch.setattr(torch, 'save', lambda state, to: (
        real_save(state, to), seen.append(checkpoint.load(path)['iter_num'])))
    checkpoint.save(path, STATE | {'iter_num': 8})
    assert seen == [7] and checkpoint.load(path)['iter_num'] == 8


@pytest.fixture
def file_size_limit():
    """Sets the size, in bytes, beyond which no file of this process grows: its disk is full there."""
    resource = pytest.importorskip('resource')  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_fills_up_at_any_byte_of_a_save_leaves_the_old_files(file_size_limit, tmp_path):
    path, keep = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    for i in (7, 8):
        checkpoint.save(path, STATE | {'iter_num': i}, keep)
    before, size = [path.read_bytes(), keep.read_bytes()], path.stat().st_size
    for limit in [*range(0, size, size // 20), size - 71, size - 70, size - 1]:
        file_size_limit(limit)
        with pytest.raises(OSError, match=r'latest.pt could not be written: it needs [\d.]+ MB, '
                                          r'[\d.,]+ MB are free \(.') as error:
            checkpoint.save(path, STATE | {'iter_num': 9}, keep)
        file_size_limit(-1)
        assert '\n' not in str(error.value)
        assert [path.read_bytes(), keep.read_bytes()] == before and len(list(tmp_path.iterdir())) == 2
    checkpoint.save(path, STATE | {'iter_num': 9}, keep)
    assert [checkpoint.load(p)['iter_num'] for p in (path, keep)] == [9, 8]


def test_disk_without_the_space_is_not_written_to(monkeypatch, tmp_path):
    needed = checkpoint.size_of(STATE)
    monkeypatch.setattr(torch, 'save', lambda *_: pytest.fail('it was written to'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match='it needs 0.0 MB, 0.0 MB are free .no space left'):
        checkpoint.save(tmp_path / 'latest.pt', STATE)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=needed))
    checkpoint.save(tmp_path / 'latest.pt', STATE)


def test_size_is_foretold(tmp_path):
    weight = torch.ones(300, 300)
    half = torch.ones(600, 300)[::2]  # saved with all of its storage
    state = STATE | {'model': {'a': weight, 'b': weight, 'c': [weight.T, (half,)]}}
    checkpoint.save(tmp_path / 'ckpt.pt', state)
    size = (tmp_path / 'ckpt.pt').stat().st_size
    assert 3 * 300 * 300 * 4 < size <= checkpoint.size_of(state) < 1.05 * size


def test_kept_file_is_the_one_before(tmp_path):
    latest, previous = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    found = []
    for i in (1, 2, 3):
        checkpoint.save(latest, STATE | {'iter_num': i}, previous)
        found.append([checkpoint.load(p)['iter_num'] for p in (latest, previous) if p.exists()])
    assert found == [[1], [2, 1], [3, 2]] and len(list(tmp_path.iterdir())) == 2


def test_state_is_on_the_disk_before_it_takes_the_old_one_s_place(monkeypatch, tmp_path):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda handle: (done.append('flushed'), fsync(handle)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(f'{a.suffix} to {b.name}'), replace(a, b)))
    for _ in range(2):
        done.clear()
        checkpoint.save(tmp_path / 'latest.pt', STATE, tmp_path / 'previous.pt')
    assert done[:3] == ['flushed', '.part to previous.pt', '.part to latest.pt']
    assert done[3:] == ['flushed'] * (os.name == 'posix')  # the folder


# ---------------------------------------------------------------------------- the checksum

@pytest.mark.parametrize('options', [{}, {'mmap': True}, {'weights_only': True}, {'weights_only': False}])
def test_signed_file_is_plain_torch(options, tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, STATE)
    assert_equal_trees(torch.load(path, map_location='cpu', **options), STATE)


def test_signed_file_is_a_zip_archive_with_its_sha256_as_comment(tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        kind, digest = archive.comment.decode().split(':')
    assert kind == 'sha256' and digest == hashlib.sha256(path.read_bytes()[:-71]).hexdigest()


def test_file_without_a_checksum_is_taken_as_it_is(tmp_path):
    torch.save(STATE, tmp_path / 'ckpt.pt')
    assert not checkpoint.is_damaged(tmp_path / 'ckpt.pt')
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 7


@pytest.fixture(scope='session')
def signed(tmp_path_factory):
    """The content of a signed file, with a place to write damaged ones to."""
    path = tmp_path_factory.mktemp('signed') / 'ckpt.pt'
    checkpoint.save(path, STATE)
    return path.read_bytes(), path.with_name('damaged.pt')


@settings(deadline=None, max_examples=300)
@given(st.data())
@loading_warns
def test_any_damage_is_seen(signed, data):
    whole, path = signed
    at = data.draw(st.integers(0, len(whole) - 1) | st.integers(1, 150).map(lambda n: len(whole) - n)
                   | st.integers(0, 100))
    piece = data.draw(st.binary(max_size=9) | st.just(None))
    damaged = whole[:at] if piece is None else whole[:at] + piece + whole[at + len(piece):]
    if damaged != whole:
        path.write_bytes(damaged)
        assert_refused(path)


@loading_warns
def test_flipped_bit_is_seen_at_every_byte(signed):
    whole, path = signed
    for at in [*range(0, len(whole) - 200, 11), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        assert_refused(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)['iter_num'] == 7


def test_checksum_can_be_left_to_the_first_reader(signed):
    whole, path = signed
    at = whole.index(b'\0\0\x80?\0\0\x80?') + 3  # within lm_head's ones
    path.write_bytes(whole[:at] + b'@' + whole[at + 1:])
    assert not torch.equal(checkpoint.load(path, verify=False)['model']['lm_head.weight'], torch.ones(2, 3))
    assert_refused(path)


# ---------------------------------------------------------------------------- which state is taken

def save_states(folder, **iterations):
    """latest=9, previous=8, ckpt=3: files that hold these iterations; None: a file that is cut."""
    for name, iteration in iterations.items():
        checkpoint.save(folder / f'{name}.pt', STATE | {'iter_num': iteration or 99})
        if iteration is None:
            (folder / f'{name}.pt').write_bytes((folder / f'{name}.pt').read_bytes()[:-1])


@pytest.mark.parametrize('files, name, damaged', [
    ({}, None, []),
    ({'latest': 9, 'previous': 8, 'ckpt': 8}, 'latest', []),
    ({'previous': 8, 'ckpt': 8}, 'previous', []),  # killed between two renamings
    ({'ckpt': 8}, 'ckpt', []),
    ({'latest': 9, 'ckpt': 9}, 'latest', []),
    ({'latest': 1000, 'previous': 999, 'ckpt': 1250}, 'ckpt', []),  # evaluated more often than kept
    ({'latest': None, 'previous': 8, 'ckpt': 5}, 'previous', ['latest']),
    ({'latest': None, 'previous': 8, 'ckpt': 9}, 'ckpt', ['latest']),
    ({'latest': None, 'previous': None, 'ckpt': 5}, 'ckpt', ['latest', 'previous']),
    ({'latest': None, 'previous': None, 'ckpt': None}, None, ['latest', 'previous', 'ckpt']),
    ({'latest': 9, 'previous': None}, 'latest', ['previous']),
])
def test_newest_whole_state_is_taken_and_damaged_ones_are_told(files, name, damaged, tmp_path):
    save_states(tmp_path, **files)
    path, state, errors = checkpoint.newest(tmp_path)
    assert path == (name and tmp_path / f'{name}.pt')
    assert (state and state['iter_num']) == files.get(name)
    assert [p.stem for p in errors] == damaged
    for bad, error in errors.items():
        assert str(error).startswith(f'{bad} is not a checkpoint, or a damaged one (')
        assert '\n' not in str(error)


@pytest.mark.parametrize('missing', ['optimizer', 'iter_num'])
def test_state_without_what_resuming_needs_is_passed_by(missing, tmp_path):
    save_states(tmp_path, previous=8)
    checkpoint.save(tmp_path / 'latest.pt', {k: v for k, v in STATE.items() if k != missing})
    path, state, damaged = checkpoint.newest(tmp_path)
    assert (path.name, state['iter_num'], damaged) == ('previous.pt', 8, {})
    path.unlink()
    assert checkpoint.newest(tmp_path) == (None, None, {})


def test_damaged_file_is_set_aside_under_a_name_of_its_own(tmp_path):
    for i in range(3):
        (tmp_path / 'latest.pt').write_text(f'damaged {i}')
        checkpoint.set_aside(tmp_path / 'latest.pt')
    files = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert files == {f'latest.pt.damaged{i + 1}': f'damaged {i}' for i in range(3)}


def test_earlier_run_is_moved_as_a_whole_in_place_of_an_even_earlier_one(tmp_path):
    assert folder.move_earlier_run(tmp_path / 'nowhere') is None
    (tmp_path / 'log.jsonl').write_text('of a run that saved nothing')
    assert folder.move_earlier_run(tmp_path) is None and not (tmp_path / 'earlier').exists()
    for run, names in (('a', ['latest.pt', 'previous.pt', 'ckpt.pt', 'log.jsonl']),
                       ('b', ['ckpt.pt', 'log.jsonl'])):
        for name in [*names, 'notes.txt']:
            (tmp_path / name).write_text(run)
        assert folder.move_earlier_run(tmp_path) == tmp_path / 'earlier'
        assert sorted(p.name for p in tmp_path.iterdir()) == ['earlier', 'notes.txt']
        assert {p.name: p.read_text() for p in (tmp_path / 'earlier').iterdir()} == dict.fromkeys(names, run)


# ---------------------------------------------------------------------------- files that would run code

class Call:
    """What a malicious file unpickles to: the result of any call, and more that pickle lets it do."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def malicious(marker):
    """{name: an object whose unpickling makes the folder or file `marker`}"""
    make = f'__import__("os").mkdir({str(marker)!r})'
    plain = {'os.system': Call(os.system, f'mkdir {marker}'), 'os.mkdir': Call(os.mkdir, str(marker)),
             'eval': Call(builtins.eval, make), 'exec': Call(builtins.exec, make),
             'open': Call(builtins.open, str(marker), 'w'), 'torch.save': Call(torch.save, 1, str(marker))}
    nested = {'in a list': [[Call(os.mkdir, str(marker))]], 'as a key': {Call(os.mkdir, str(marker)): 1},
              'in an argument': Call(str, Call(os.mkdir, str(marker))),
              'in a tensor\'s state': Call(torch.Tensor, state={'x': Call(os.mkdir, str(marker))})}
    return plain | nested


@pytest.mark.parametrize('name', malicious('x'))
@pytest.mark.parametrize('place', ['config', 'model', 'all', 'by hand'])
@loading_warns
def test_no_malicious_file_runs_anything(name, place, tmp_path):
    path, marker = tmp_path / 'latest.pt', tmp_path / 'marker'
    evil = malicious(marker)[name]
    if place == 'by hand':
        path.write_bytes(pickle.dumps(evil))
    else:
        state = {'config': STATE | {'config': {'a': evil}}, 'all': evil,
                 'model': STATE | {'model': STATE['model'] | {'transformer.wpe.weight': evil}}}[place]
        checkpoint.save(path, state)  # with a checksum that is right
    assert_refused(path)
    assert checkpoint.newest(tmp_path)[:2] == (None, None)
    assert not marker.exists()
    with contextlib.suppress(ValueError):  # of what isn't a tensor's state
        pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # so it was no blank shot


# ---------------------------------------------------------------------------- a model to evaluate

CPU = Runtime('cpu', 'float32', False, 'gloo')


def test_model_of_a_checkpoint_is_the_saved_one_without_dropout(tmp_path):
    saved = GPT(GPTConfig(**TINY, dropout=0.3))
    checkpoint.save(tmp_path / 'ckpt.pt', STATE | {'model': saved.state_dict(), 'iter_num': 7,
                                                   'model_args': model_args(saved.config)})
    model, tokenizer, state = load_model('resume', tmp_path, CPU)
    assert_equal_trees(dict(model.state_dict()), dict(saved.state_dict()))
    assert not model.training and model.config.dropout == 0 and state['iter_num'] == 7
    assert tokenizer.to_dict() == STATE['tokenizer']


def test_model_of_a_folder_has_no_state_and_gpt2_s_tokenizer(gpt2_folder):
    model, tokenizer, state = load_model(str(gpt2_folder), 'nowhere', CPU)
    assert not model.training and model.config.dropout == 0 and state == {}
    assert tokenizer.to_dict() == {'kind': 'gpt2'} and model.config.vocab_size == 50257


def test_model_of_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match='ckpt.pt is missing: train a model there first'):
        load_model('resume', tmp_path, CPU)


def test_newest_state_stands_in_for_a_missing_ckpt_pt_and_is_named(tmp_path, capsys):
    weights = {name: GPT(GPTConfig(**TINY)).state_dict() for name in ('ckpt.pt', 'latest.pt', 'previous.pt')}
    for i, name in enumerate(('previous.pt', 'latest.pt')):
        checkpoint.save(tmp_path / name, STATE | {'model': weights[name], 'iter_num': 10 + i, 'optimizer': {},
                                                  'model_args': model_args(GPTConfig(**TINY))})
    for n_bytes, name, iteration in ((0, 'latest.pt', 11), (100, 'previous.pt', 10)):  # then latest.pt is cut
        path = tmp_path / 'latest.pt'
        path.write_bytes(path.read_bytes()[n_bytes:])
        for how in ('full', 'int8'):
            capsys.readouterr()
            model, _, state = load_model('resume', tmp_path, CPU, how)
            assert state['iter_num'] == iteration
            assert f'taking {tmp_path / name}, ' in capsys.readouterr().out
        weight = load_model('resume', tmp_path, CPU)[0].lm_head.weight
        assert torch.equal(weight, weights[name]['lm_head.weight'])
    checkpoint.save(tmp_path / 'ckpt.pt', STATE | {'model': weights['ckpt.pt'], 'iter_num': 5,
                                                   'model_args': model_args(GPTConfig(**TINY))})
    capsys.readouterr()
    assert load_model('resume', tmp_path, CPU)[2]['iter_num'] == 5 and 'taking' not in capsys.readouterr().out


def test_folder_without_a_whole_state_says_what_is_wrong_with_the_newest(tmp_path):
    (tmp_path / 'latest.pt').write_bytes(b'no state')
    with pytest.raises(ValueError, match='latest.pt is not a checkpoint'):
        load_model('resume', tmp_path, CPU)


def test_folder_of_a_run_that_has_just_begun_names_the_one_before(tmp_path):
    (tmp_path / 'earlier').mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f'--out_dir={tmp_path / "earlier"}') + '$'):
        load_model('resume', tmp_path, CPU)


@pytest.mark.parametrize('named', ['', 'latest.pt'])
def test_run_named_as_a_gpt2_is_refused_with_the_setting_for_runs(named, tmp_path):
    (tmp_path / 'latest.pt').write_bytes(b'a state')
    with pytest.raises(ValueError, match=re.escape(f'is a run, no GPT-2: --out_dir={tmp_path} reads')):
        load_model(str(tmp_path / named), 'out', CPU)


@pytest.mark.parametrize('more, reason', [({'flux': 1}, "settings that don't exist here: flux"),
                                          ({'residual_scale': True}, 'here: residual_scale')])
def test_model_settings_that_this_version_does_not_know_are_refused(more, reason, tmp_path):
    args = model_args(GPTConfig(**TINY))
    assert config_from_args(args) == GPTConfig(**TINY)
    checkpoint.save(tmp_path / 'ckpt.pt', STATE | {'model_args': args | more})
    with pytest.raises(ValueError, match=reason):
        load_model('resume', tmp_path, CPU)


# ---------------------------------------------------------------------------- the optimizer

def adamw(weight_decay, betas, n_biases=1):
    """An optimizer as configure_optimizers makes them, after two updates."""
    weights = [torch.nn.Parameter(torch.ones(3, 2))]
    biases = [torch.nn.Parameter(torch.ones(2)) for _ in range(n_biases)]
    optimizer = torch.optim.AdamW([{'params': weights, 'weight_decay': weight_decay},
                                   {'params': biases, 'weight_decay': 0.0}], lr=weight_decay, betas=betas)
    for i in range(2):
        for p in weights + biases:
            p.grad = torch.full_like(p, weight_decay + i)
        optimizer.step()
    return optimizer


def test_resumed_optimizer_keeps_its_settings_and_takes_the_saved_buffers(tmp_path):
    old, new = adamw(0.1, (0.9, 0.95)), adamw(0.3, (0.8, 0.99))
    checkpoint.save(tmp_path / 'ckpt.pt', STATE | {'optimizer': old.state_dict()})
    saved = checkpoint.load(tmp_path / 'ckpt.pt')['optimizer']
    load_optimizer(new, saved)
    own = new.state[new.param_groups[0]['params'][0]]['exp_avg']
    assert own.data_ptr() != saved['state'][0]['exp_avg'].data_ptr()  # nothing of the file stays mapped
    assert [g['weight_decay'] for g in new.param_groups] == [0.3, 0.0]
    assert all(g['betas'] == (0.8, 0.99) and g['lr'] == 0.3 for g in new.param_groups)
    assert_equal_trees(new.state_dict()['state'], old.state_dict()['state'])


@pytest.mark.parametrize('n_groups, n_biases', [(1, 1), (3, 1), (2, 2)])
def test_optimizer_of_another_model_is_refused(n_groups, n_biases):
    saved = adamw(0.1, (0.9, 0.95), n_biases).state_dict()
    saved['param_groups'] = (saved['param_groups'] + [{'params': []}])[:n_groups]
    with pytest.raises(ValueError):
        load_optimizer(adamw(0.1, (0.9, 0.95)), saved)


@pytest.mark.parametrize('change, told', [
    (lambda t: t[:1].clone(), 'exp_avg of parameter 0 is'), (lambda t: torch.cat((t, t)), 'is needed'),
    (lambda t: t.double(), 'float64'), (lambda t: t.byte(), 'uint8'), (lambda t: None, 'doesn.t fit'),
    (lambda t: t.unsqueeze(-1), 'is needed'),
])
def test_buffers_of_another_shape_or_type_are_refused_before_use(change, told):
    new, saved = adamw(0.1, (0.9, 0.95)), adamw(0.1, (0.9, 0.95)).state_dict()
    before = {p: dict(new.state[p]) for p in new.state}
    saved['state'][0]['exp_avg'] = change(saved['state'][0]['exp_avg'])
    with pytest.raises(ValueError, match=told):
        load_optimizer(new, saved)
    assert all(new.state[p][k] is t for p, buffers in before.items() for k, t in buffers.items())


def test_buffers_of_a_cropped_parameter_are_cropped_and_no_others():
    new, saved = adamw(0.1, (0.9, 0.95)), adamw(0.1, (0.9, 0.95)).state_dict()
    for name in ('exp_avg', 'exp_avg_sq'):
        saved['state'][0][name] = torch.arange(8.0).view(4, 2)
    weight, bias = (group['params'][0] for group in new.param_groups)
    for cropped in (None, bias):
        with pytest.raises(ValueError, match='is needed'):
            load_optimizer(new, saved, cropped)
    load_optimizer(new, saved, weight)
    assert torch.equal(new.state[weight]['exp_avg'], torch.arange(6.0).view(3, 2))


@pytest.mark.parametrize('error', [MemoryError(), OSError(errno.ENOMEM, 'mmap'),
                                   RuntimeError('DefaultCPUAllocator: can\'t allocate memory'),
                                   PermissionError(13, 'no')], ids=repr)
def test_a_machine_without_memory_or_rights_does_not_make_a_state_damaged(error, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / 'latest.pt', STATE)

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises((MemoryError, FileNotFoundError), match='latest.pt'):
        checkpoint.load_newest(tmp_path, CPU, must_exist=True)
    assert [p.name for p in tmp_path.iterdir()] == ['latest.pt']


def test_compressed_archives_are_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    with pytest.raises(ValueError, match='compressed'):
        checkpoint.load(path)
