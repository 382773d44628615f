"""Checkpoints: what is saved comes back, and nothing that happens on the way does harm."""

import errno
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from runs import equal, hold, logged

from model import GPTConfig
from scripts.soak import read_errors
from support.machine.runtime import Runtime
from support.training.folder import check_folder, claim, move_earlier_run, release
from support.training.models import config_from_args, load_optimizer, model_args
from support.training.start import find_state
from support.training.state import State

CPU = Runtime('cpu', 'float32', False, 'gloo')
STATE = State(
    model={'transformer.wte.weight': torch.arange(6.0).view(2, 3), 'lm_head.weight': torch.ones(2, 3)},
    optimizer={'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
    model_args={'n_layer': 2, 'bias': False, 'dropout': 0.0}, iter_num=7, best_val_loss=1.5,
    config={'out_dir': 'out', 'top_k': None}, tokenizer={'kind': 'char', 'itos': {0: 'é'}},
    seconds=2.5, n_tokens=700, best_iter=3, wandb_id='a1')
quiet = pytest.mark.filterwarnings('ignore::UserWarning')  # torch's, of odd pickle protocols


def assert_equal_trees(one, other):
    assert equal(one, other)


def assert_refused(path):
    with pytest.raises(ValueError) as error:
        State.load(path)
    assert str(error.value).startswith(f'{path} is not a checkpoint') and '\n' not in str(error.value)
    assert 'weights_only' not in str(error.value)  # PyTorch's advice to run the file's code


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
    for options in ({}, {'mmap': True}, {'weights_only': False}):
        plain = torch.load(path, map_location='cpu', **options)
        assert plain['iter_num'] == 7 and torch.equal(plain['model']['a'], weight)


def test_small_state_has_no_optimizer_and_missing_keys_have_defaults(tmp_path):
    path, plain = tmp_path / 'ckpt.pt', {'model': STATE.model, 'model_args': {}}
    replace(STATE, trained={'a': torch.ones(2)}).without_optimizer().save(path)
    state = State.load(path)
    assert (state.optimizer, state.trained, state.is_resumable, state.iter_num) == (None, None, False, 7)
    torch.save(plain | {'best_val_loss': float('nan')}, path)  # after nan no later one would be better
    assert_equal_trees(State.load(path).values(), State(STATE.model, {}).values())


@pytest.mark.parametrize('content', [
    b'', b'To be, or not to be\n', pickle.dumps({'itos': {0: 'a'}}), [1],
    {'model': STATE.model}, *(STATE.values() | wrong for wrong in (
        {'model': [torch.ones(2)]}, {'optimizer': 1}, {'iter_num': -1}, {'best_val_loss': 'low'})),
], ids=lambda content: repr(content)[:20])
@quiet
def test_what_is_no_checkpoint_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
    assert_refused(path)


@quiet
def test_no_malicious_file_runs_anything(tmp_path):
    path, marker = tmp_path / 'latest.pt', tmp_path / 'marker'
    mkdir = Call(os.mkdir, str(marker))
    for evil in ([[mkdir]], Call(torch.Tensor, state={'x': mkdir})):
        for content in (evil, STATE.values() | {'config': {'a': evil}}):
            torch.save(content, path)
            assert_refused(path)
    assert not marker.exists()


def is_refused(path):
    """Whether a damaged file is refused. What is read of another must be what was saved."""
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
    content, seen = path.read_bytes(), 0
    for at in range(0, len(content), 4):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
        seen += is_refused(path)
        if at % 3 == 0:
            path.write_bytes(content[:at])
            assert is_refused(path)
    assert seen > len(content) / 8


def states_in(folder):
    """{name: iteration} of a folder's checkpoints; nothing else may be left there."""
    return {p.name: State.load(p).iter_num for p in Path(folder).iterdir()}


def test_save_that_fills_the_disk_leaves_the_old_files(tmp_path):
    resource = pytest.importorskip('resource')  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    latest, previous = tmp_path / 'latest.pt', tmp_path / 'previous.pt'
    for i in (1, 2, 3):
        replace(STATE, iter_num=i).save(latest, previous)
        assert states_in(tmp_path) == {'latest.pt': i} | ({'previous.pt': i - 1} if i > 1 else {})
    size = latest.stat().st_size
    for limit in [*range(0, size, size // 20), size - 71, size - 22, size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match='latest.pt could not be written: it needs '):
                replace(STATE, iter_num=9).save(latest, previous)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
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
    ({'previous': 8, 'ckpt': 8}, 'previous', []),  # killed between two renamings
    ({'latest': 1000, 'previous': 999, 'ckpt': 1250}, 'ckpt', []),  # evaluated more often than kept
    ({'latest': None, 'previous': 8, 'ckpt': 9}, 'ckpt', ['latest']),
    (ALL_CUT | {'ckpt_5': 5, 'ckpt_10': 10, 'ckpt_15': None}, 'ckpt_10', [*ALL_CUT, 'ckpt_15']),
])
def test_newest_whole_state_is_taken_and_damaged_ones_are_named(files, name, damaged, tmp_path):
    save_states(tmp_path, **files)
    path, state, errors = State.newest(tmp_path)
    assert path == (name and tmp_path / f'{name}.pt')
    assert (state and state.iter_num) == files.get(name)
    assert [p.stem for p in errors] == damaged


def found_from(out_dir, init_from='auto'):
    """The iteration that a run would start from."""
    config = {'init_from': init_from, 'eval_only': False, 'out_dir': str(out_dir)}
    return find_state(config, CPU)[0].iter_num


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


def test_errors_of_the_disk_that_pass_are_waited_for_and_others_stop_the_start(tmp_path):
    save_states(tmp_path, latest=9, previous=8, ckpt=5)
    good, refused, lost = read_errors(tmp_path, errno.EIO, every=9)
    assert lost == [] and good > 20 and refused > 20


def test_earlier_runs_are_all_kept_and_a_line_shows_how_to_go_back(tmp_path, capsys):
    kept = {}
    for run, names in (('a', ['latest.pt', 'previous.pt', 'ckpt.pt', 'log.jsonl', 'loss.png']),
                       ('b', ['ckpt_50.pt', 'log.jsonl'])):
        for name in [*names, 'notes.txt']:
            (tmp_path / name).write_text(run)
        folder = move_earlier_run(tmp_path)
        kept[folder.name] = dict.fromkeys(names, run)
        assert f'--init_from=resume --out_dir={folder}\n' in capsys.readouterr().out
    for name, files in kept.items():
        assert {p.name: p.read_text() for p in (tmp_path / name).iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, 'notes.txt']


def test_no_second_run_writes_into_a_folder_even_if_it_was_removed(tmp_path):
    out = tmp_path / 'out'
    claim({'out_dir': str(out), 'eval_only': False}, CPU)
    shutil.rmtree(out)
    out.mkdir()
    process, _ = hold(out / 'run.lock')
    with pytest.raises(ValueError, match=f'another run, process {process.pid} on .*, writes there now'):
        check_folder(out)
    release(out)
    process.communicate('')


def test_model_args_are_gpt2_s_seven_and_what_differs():
    plain = GPTConfig(**TINY)
    assert set(model_args(plain)) == {*TINY, 'bias', 'dropout'}
    for option, value in (('activation', 'swiglu'), ('tie_weights', False), ('n_kv_head', 1)):
        config = GPTConfig(**TINY, **{option: value})
        assert set(model_args(config)) - set(model_args(plain)) == {option}
        assert config_from_args(model_args(config)) == config


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
    load_optimizer(new, saved)
    assert all((g['weight_decay'], g['betas']) == (0.3, (0.8, 0.99)) for g in new.param_groups)
    assert_equal_trees(new.state_dict()['state'], saved['state'])


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
    assert [*found.values()] == pytest.approx(OLD_LOSSES[name], abs=1e-5)
