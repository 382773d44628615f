"""Checkpoints as other repositories' scripts save them."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from runs import equal

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.training.models import load_model
from support.training.state import State

ARGS = TINY | {'bias': True, 'dropout': 0.0}
CPU = Runtime('cpu', 'float32', False, 'gloo')


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


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', '_orig_mod.module.'])
def test_prefixes_before_names_are_dropped_and_the_vocabulary_is_that_of_the_weights(prefix, saved):
    folder, model = saved({'vocab_size': None}, prefix=prefix)
    loaded, _, _ = load_model('resume', folder, CPU)
    assert equal(loaded.state_dict(), model.state_dict()) and loaded.config.vocab_size == 64


@pytest.mark.parametrize('zip_archive, core', [
    (True, 'numpy._core'), (False, 'numpy._core'), (False, 'numpy.core')])  # NumPy 2 and 1
def test_numpy_s_numbers_and_paths_are_read_as_plain_values(zip_archive, core, saved):
    config = {'learning_rate': np.float64(0.5), 'big': np.array([1, 2], '>i4'), 'flag': np.bool_(True),
              'data_dir': Path('/data/tiny'), 'name': np.str_('é')}
    folder, _ = saved({'vocab_size': np.int64(64)}, config=config, zip_archive=zip_archive,
                      best_val_loss=np.float32(1.5), iter_num=np.int64(4))
    data = (folder / 'ckpt.pt').read_bytes()
    assert b'numpy._core' in data
    (folder / 'ckpt.pt').write_bytes(data.replace(b'numpy._core', core.encode()))
    state = State.load(folder / 'ckpt.pt')
    assert equal(state.config, {
        'learning_rate': 0.5, 'big': [1, 2], 'flag': True, 'data_dir': str(Path('/data/tiny')), 'name': 'é'})
    assert (type(state.iter_num), state.iter_num, state.best_val_loss) == (int, 4, 1.5)


def test_an_output_layer_of_its_own_is_kept_though_model_args_don_t_tell(saved):
    folder, model = saved()
    state = torch.load(folder / 'ckpt.pt')
    for change in (0, 1):
        state['model']['lm_head.weight'] = model.lm_head.weight.detach() + change
        torch.save(state, folder / 'ckpt.pt')
        loaded, _, _ = load_model('resume', folder, CPU)
        assert loaded.config.tie_weights == (not change)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight + change)
        assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_a_run_resumes_from_such_a_checkpoint_without_the_settings_that_are_off(saved, train):
    off = {'add_lora': False, 'lora_r': None, 'n_experts': 0, 'rope_kind': ''}
    folder, _ = saved(off | {'vocab_size': None, 'n_head': np.int64(2)}, '_orig_mod.module.',
                      iter_num=np.int64(3), best_val_loss=np.float64(9.0), config={'data_dir': Path('/x')})
    log = train('--init_from=resume', '--max_iters=4', '--block_size=32', out_dir=folder)['log']
    assert sorted(losses(log)) == [3, 4]


class Call:
    """What a malicious file unpickles to: the result of any call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_code_in_a_numpy_number_is_refused_and_not_run(saved, monkeypatch):
    value = Call(np.int64(1).__reduce__()[0], np.dtype('O'), pickle.dumps(Call(os.mkdir, 'ran')))
    folder, _ = saved(config={'value': value})
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match='not a checkpoint, or a damaged one') as error:
        State.load(folder / 'ckpt.pt')
    assert '\n' not in str(error.value) and not (folder / 'ran').exists()


def test_checkpoint_of_build_nanogpt_is_read(monkeypatch, tmp_path):
    """Its train_gpt2.py saves {model, config, step, val_loss}, the config as an object of its own class."""
    Config = type('GPTConfig', (), {'__module__': '__main__'})
    monkeypatch.setattr(sys.modules['__main__'], 'GPTConfig', Config, raising=False)
    config = Config()
    vars(config).update(TINY)
    model = GPT(GPTConfig(**ARGS, activation='gelu_tanh'))
    torch.save({'model': model.state_dict(), 'config': config, 'step': 5, 'val_loss': 3.25},
               tmp_path / 'model.pt')
    loaded, _, state = load_model(str(tmp_path / 'model.pt'), 'none', CPU)
    assert loaded.config == model.config and (state.iter_num, state.best_val_loss) == (5, 3.25)
    assert equal(loaded.state_dict(), model.state_dict())
