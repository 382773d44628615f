"""Checkpoints as other repositories' scripts save them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from test_checkpoint import CPU, Evil, assert_equal_trees

from model import GPT, GPTConfig
from support.training import checkpoint
from support.training.state import config_from_args, load_model

ARGS = TINY | {'bias': True, 'dropout': 0.0}


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint as nanoGPT does, but for what is given; gives its folder and model."""
    def save(model_args=None, prefix='', zip_archive=True, **more):
        model = GPT(GPTConfig(**ARGS))
        state = {'model': {prefix + k: v for k, v in model.state_dict().items()},
                 'optimizer': model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').state_dict(),
                 'model_args': ARGS | (model_args or {}), 'iter_num': 3, 'best_val_loss': torch.tensor(1.5),
                 'config': {'dataset': 'tiny'}}
        torch.save(state | more, tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=zip_archive)
        return tmp_path, model
    return save


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', '_orig_mod.module.', 'module._orig_mod.'])
def test_prefixes_before_names_are_dropped(prefix, saved):
    folder, model = saved(prefix=prefix)
    loaded, _, _ = load_model('resume', folder, CPU)
    assert_equal_trees(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize('zip_archive', [True, False])
@pytest.mark.parametrize('core', ['numpy._core', 'numpy.core'])  # NumPy 2 and 1
def test_numpy_s_numbers_and_paths_are_read_as_plain_values(zip_archive, core, saved):
    config = {'learning_rate': np.float64(0.5), 'big': np.array([1, 2], '>i4'), 'flag': np.bool_(True),
              'data_dir': Path('/data/tiny'), 'count': np.int32(-7), 'name': np.str_('é'), 'bytes': b'\xff'}
    if core == 'numpy.core' and zip_archive:
        pytest.skip('an archive has checksums of its parts: the other case shows it')
    folder, _ = saved({'vocab_size': np.int64(64)}, config=config, zip_archive=zip_archive,
                      best_val_loss=np.float32(1.5), iter_num=np.int64(4))
    data = (folder / 'ckpt.pt').read_bytes()
    assert b'numpy._core' in data
    if not zip_archive:
        (folder / 'ckpt.pt').write_bytes(data.replace(b'numpy._core', core.encode()))
    state = checkpoint.load(folder / 'ckpt.pt')
    expected = {'learning_rate': 0.5, 'big': [1, 2], 'flag': True, 'data_dir': str(Path('/data/tiny')),
                'count': -7, 'name': 'é', 'bytes': b'\xff'}
    assert state['config'] == expected
    assert [type(v) for v in state['config'].values()][:1] + [type(state['config']['count'])] == [float, int]
    assert (type(state['iter_num']), state['iter_num'], state['best_val_loss']) == (int, 4, 1.5)
    assert config_from_args(state['model_args']).vocab_size == 64


def test_vocabulary_that_is_not_stated_is_that_of_the_weights(saved):
    folder, model = saved({'vocab_size': None})
    assert load_model('resume', folder, CPU)[0].config.vocab_size == 64


def test_model_settings_that_are_off_are_dropped_with_one_line(saved, capsys):
    folder, _ = saved({'add_lora': False, 'lora_r': None, 'n_experts': 0, 'rope_kind': '', 'qk_norms': False})
    load_model('resume', folder, CPU)
    assert capsys.readouterr().out == ('ignoring model settings of the checkpoint that are off: add_lora, '
                                       'lora_r, n_experts, rope_kind, qk_norms\n')


@pytest.mark.parametrize('model_args, names', [
    ({'add_lora': True, 'n_experts': 8, 'off': False}, 'add_lora, n_experts'),
    ({'use_rope': True}, 'use_rope'), ({'weight_tying': False}, 'weight_tying'),
    ({'rates': [1]}, 'rates'), ({'empty': []}, 'empty')])
def test_other_model_settings_are_refused_by_name_all_at_once(model_args, names, saved):
    folder, _ = saved(model_args)
    with pytest.raises(ValueError, match=f"model settings that don't exist here: {names}$"):
        load_model('resume', folder, CPU)


def test_an_output_layer_of_its_own_is_kept_though_model_args_don_t_tell(saved, capsys):
    folder, model = saved()
    state = torch.load(folder / 'ckpt.pt')
    state['model'] |= {'lm_head.weight': state['model']['lm_head.weight'].clone()}
    torch.save(state, folder / 'ckpt.pt')
    assert load_model('resume', folder, CPU)[0].config.tie_weights and 'tie' not in capsys.readouterr().out
    state['model']['lm_head.weight'] += 1
    torch.save(state, folder / 'ckpt.pt')
    loaded, _, _ = load_model('resume', folder, CPU)
    assert 'lm_head.weight differs from its wte.weight: read with tie' in capsys.readouterr().out
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight + 1)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_a_run_resumes_from_such_a_checkpoint(saved, train):
    folder, _ = saved({'vocab_size': None, 'add_lora': False, 'n_head': np.int64(2)}, '_orig_mod.module.',
                      iter_num=np.int64(3), best_val_loss=np.float64(9.0), config={'data_dir': Path('/x')})
    run = train('--init_from=resume', '--max_iters=4', '--block_size=16', out_dir=folder)
    assert sorted(losses(run['log'])) == [3, 4]


@pytest.mark.parametrize('value', [np.array([{}], dtype=object), np.datetime64('2020-01-01'),
                                   np.zeros(3, 'i4,f8')])
def test_other_numpy_values_are_refused(value, saved):
    folder, _ = saved(config={'value': value})
    with pytest.raises(ValueError, match='not a checkpoint, or a damaged one') as error:
        checkpoint.load(folder / 'ckpt.pt')
    assert '\n' not in str(error.value)


def test_what_stands_in_for_numpy_runs_no_code(saved, tmp_path):
    class Scalar:
        def __reduce__(self):
            return np.int64(1).__reduce__()[0], (np.dtype('O'), pickle.dumps(Evil(tmp_path / 'marker')))
    folder, _ = saved(config={'value': Scalar()})
    with pytest.raises(ValueError, match='not a checkpoint'):
        checkpoint.load(folder / 'ckpt.pt')
    assert not (tmp_path / 'marker').exists()
