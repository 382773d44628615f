"""Models of Hugging Face's format: each family against transformers, their files, names of the hub."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import tiny
from runs import equal

from model import GPT
from support.hub.exporting import to_transformers
from support.hub.huggingface import folder_tokenizer, load_pretrained, own_tokenizer
from support.text.bpe import train_bpe
from support.text.tokenizer import GPT2Tokenizer, NoTokenizer
from support.training.models import model_args

SMALL = {'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2,
         'num_attention_heads': 6, 'max_position_embeddings': 64, 'num_key_value_heads': 2}
SMOLLM = SMALL | {  # as published, but for its sizes
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'hidden_act': 'silu', 'mlp_bias': False, 'model_type': 'llama', 'rms_norm_eps': 1e-05,
    'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16'}
UNTIED = SMALL | {'hidden_act': 'silu', 'rms_norm_eps': 1e-05, 'tie_word_embeddings': False}
FAMILIES = {  # a key that is missing has transformers' default
    'SmolLM 2': SMOLLM,
    'Llama 2': UNTIED | {'model_type': 'llama', 'num_key_value_heads': 6, 'rope_scaling': None},
    'Llama 3.2': UNTIED | {
        'model_type': 'llama', 'head_dim': 16, 'tie_word_embeddings': True, 'rope_theta': 500000.0,
        'rope_scaling': {'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                         'original_max_position_embeddings': 16, 'rope_type': 'llama3'}},
    'Mistral': UNTIED | {'model_type': 'mistral', 'sliding_window': 24},
    'Qwen 2': UNTIED | {
        'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 16,
        'use_sliding_window': False, 'max_window_layers': 2, 'tie_word_embeddings': True},
    'biases of attention': SMOLLM | {'attention_bias': True, 'attention_dropout': 0.25},
    'biases of the MLP': SMOLLM | {'mlp_bias': True, 'head_dim': 4, 'rms_norm_eps': 1e-3},
}


def folder_of(folder, config, **how):
    """A folder as transformers saves it, of random weights, norms and biases, with the config.json
    of an earlier version, as published."""
    from transformers import AutoConfig, AutoModelForCausalLM
    (folder / 'config.json').write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(mean=float('norm' in name), std=0.2)
    theirs.bfloat16().save_pretrained(folder, **how)
    (folder / 'config.json').write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_a_family_computes_what_transformers_does_and_comes_back_bit_for_bit(family, tmp_path):
    from transformers import AutoModelForCausalLM
    config = FAMILIES[family]
    theirs = folder_of(tmp_path, config, max_shard_size='20KB')
    assert len([*tmp_path.glob('model-*-of-*.safetensors')]) > 2
    ours = load_pretrained(str(tmp_path)).eval()
    window = 24 if family == 'Mistral' else 64  # transformers masks what is further back
    assert ours.config.block_size == window
    assert ours.config.dropout == config.get('attention_dropout', 0.0)
    idx = torch.randint(64, (3, window))
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=1e-4)

    config, weights = to_transformers(model_args(ours.config), ours.state_dict())
    again = AutoModelForCausalLM.from_config(config).eval()
    again.load_state_dict(weights, strict=False)
    assert config.model_type == 'llama'
    assert all(torch.equal(weights[k], v) for k, v in theirs.state_dict().items() if k in weights)
    assert theirs.state_dict().keys() - weights.keys() <= {'lm_head.weight'}
    torch.testing.assert_close(again(idx).logits, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize('changes, named', [
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"), ({'model_type': 'gemma2'}, "of type 'gemma2'"),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, "rope_type='linear'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'num_attention_heads': 5}, "can't be used"), ({'hidden_size': 'wide'}, "hidden_size='wide'"),
], ids=str)
def test_a_model_that_is_not_computed_is_refused_by_name_before_its_weights_are_read(
        changes, named, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(SMOLLM | changes))
    (tmp_path / 'model.safetensors').write_text('nothing that can be read')
    assert named in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)


def refusal(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llama(tmp_path):
    """A folder with a Llama."""
    (tmp_path / 'llama').mkdir()
    folder_of(tmp_path / 'llama', SMOLLM)
    return tmp_path / 'llama'


UP = 'model.layers.1.mlp.up_proj.weight'


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text()) | changes
        (folder / 'config.json').write_text(json.dumps(config))
    return change


def change_weights(edit):
    def change(folder):
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / 'model.safetensors')
        edit(weights)
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    return change


def add_index(text):
    return lambda folder: (folder / 'model.safetensors.index.json').write_text(text)


@pytest.mark.parametrize('change, told', [
    (change_weights(lambda w: w.pop(UP)), f'missing: .*{UP}'),
    (change_weights(lambda w: w.update(extra=torch.ones(3))), 'unexpected: extra'),
    (change_weights(lambda w: w.update({UP: w[UP][:16].clone()})), 'mismatched: .*c_fc.weight'),
    (change_weights(lambda w: w[UP].view(-1)[7].fill_(float('nan'))), 'not finite: .*c_fc.weight'),
    (change_weights(lambda w: w.update({'lm_head.weight': torch.ones(64, 48)})), 'ties lm_head'),
    (lambda folder: os.truncate(folder / 'model.safetensors', 500), "can't be read"),
    (change_config(num_hidden_layers=10**7), 'asks for 10,000,000 layers'),
    (add_index('{"weight_map": {"x": "../x.safetensors"}}'), 'which is no file of its folder'),
    (add_index('nonsense'), 'is no index of weights')])
def test_files_that_do_not_hold_what_the_config_says_are_refused_in_one_line(change, told, llama):
    change(llama)
    assert re.search(told, refusal(llama))


def test_a_gpt2_is_the_same_however_its_files_were_written_and_no_pickle_runs_code(
        gpt2_folder, tmp_path):
    from safetensors.torch import load_file
    expected = GPT.from_pretrained(str(gpt2_folder)).state_dict()

    def found():
        return load_pretrained(str(gpt2_folder)).state_dict()
    change_weights(lambda w: w.update({
        'transformer.h.0.attn.bias': torch.ones(1, 1, 64, 64),
        'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)}))(gpt2_folder)
    assert equal(found(), expected)
    weights = load_file(gpt2_folder / 'model.safetensors')
    (gpt2_folder / 'model.safetensors').unlink()
    torch.save({k.removeprefix('transformer.'): v for k, v in weights.items()},  # as OpenAI's names
               gpt2_folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    assert equal(found(), expected)
    change_config(layer_norm_epsilon=1e-6)(gpt2_folder)
    assert load_pretrained(str(gpt2_folder)).config.norm_eps == 1e-6

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)
    torch.save({'wte.weight': Code()}, gpt2_folder / 'pytorch_model.bin')
    assert "pytorch_model.bin can't be read" in refusal(gpt2_folder) and not (tmp_path / 'ran').exists()


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    from transformers import AutoModelForCausalLM
    model = tiny(bias=False)
    config, weights = to_transformers(model_args(model.config), model.state_dict())
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(weights, strict=False)
    for is_changed in (False, True):
        with torch.no_grad():
            theirs.transformer.h[1].mlp.c_fc.bias[3] = float(is_changed)
        theirs.save_pretrained(tmp_path)
        assert load_pretrained(str(tmp_path)).config.bias is is_changed


# ---------------------------------------------------------------------------- names


def test_a_name_of_the_hub_is_the_cached_model_of_its_owner_or_one_line(tmp_path, gpt2_folder, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache/hub'))
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / 'cache/hub/models--openai-community--gpt2/snapshots/abc'
    (snapshot.parents[1] / 'refs').mkdir(parents=True)
    (snapshot.parents[1] / 'refs/main').write_text('abc')
    shutil.move(gpt2_folder, snapshot)
    (tmp_path / 'gpt2').mkdir()  # the name is the hub's, though a folder of that name lies here
    assert load_pretrained('gpt2').config.n_embd == 32
    assert "can't reach huggingface.co, and gpt2-xl is not in its cache" in refusal('gpt2-xl')
    assert 'gone is neither one of gpt2, ' in refusal('gone')


def test_weights_are_downloaded_without_other_programs_files(tmp_path, llama, monkeypatch):
    def snapshot_download(name, allow_patterns, **_):  # of the hub's library
        for path in llama.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / 'snapshot')
        return tmp_path / 'snapshot'
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    (tmp_path / 'snapshot').mkdir()
    for name in ('pytorch_model.bin', 'model.gguf', 'flax_model.msgpack', 'README.md'):
        (llama / name).write_text('not needed')
    assert load_pretrained('me/model').config.n_embd == 48
    found = {path.name for path in (tmp_path / 'snapshot').iterdir()}
    assert found == {'config.json', 'generation_config.json', 'model.safetensors'}


def test_a_model_s_tokenizer_is_its_own_or_gpt2_s_by_size(llama):
    for size, kind in ((50257, GPT2Tokenizer), (51200, NoTokenizer), (64, NoTokenizer)):
        change_config(vocab_size=size)(llama)
        assert own_tokenizer(str(llama)) is None and isinstance(folder_tokenizer(str(llama)), kind)
    (llama / 'tokenizer.json').write_text(train_bpe(['a b c'], 300).json)
    with pytest.raises(ValueError, match='ids up to 256, its model rows for 64'):
        folder_tokenizer(str(llama))
    change_config(vocab_size=512)(llama)
    (llama / 'generation_config.json').write_text('{"eos_token_id": [5, 9]}')
    assert folder_tokenizer(str(llama)).ends == (5, 9)
