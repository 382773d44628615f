"""checkpoint.py: what is saved comes back, and nothing that happens on the way does harm."""

import os
import pickle

import pytest
import torch

import checkpoint

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
        checkpoint.load(path,)
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
    assert_equal_trees(checkpoint.load(path,), STATE)
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
    checkpoint.load_optimizer(new, checkpoint.load(tmp_path / 'ckpt.pt')['optimizer'])
    assert [g['weight_decay'] for g in new.param_groups] == [0.3, 0.0]
    assert all(g['betas'] == (0.8, 0.99) and g['lr'] == 0.3 for g in new.param_groups)
    assert_equal_trees(new.state_dict()['state'], old.state_dict()['state'])


@pytest.mark.parametrize('n_groups, n_biases', [(1, 1), (3, 1), (2, 2)])
def test_optimizer_of_another_model_is_refused(n_groups, n_biases):
    saved = adamw(0.1, (0.9, 0.95), n_biases).state_dict()
    saved['param_groups'] = (saved['param_groups'] + [{'params': []}])[:n_groups]
    with pytest.raises(ValueError):
        checkpoint.load_optimizer(adamw(0.1, (0.9, 0.95)), saved)
