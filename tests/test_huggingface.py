"""Models of Hugging Face's format: each family as published, their files, names of the hub, and
back."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, TINY

from model import GPT, GPTConfig, KVCache
from support.hub.exporting import architecture, beyond, to_transformers
from support.hub.huggingface import folder_tokenizer, load_pretrained, own_tokenizer, read_pretrained
from support.hub.weights import TensorFiles
from support.text.bpe import train_bpe
from support.text.tokenizer import GPT2Tokenizer, NoTokenizer
from support.training.models import model_args

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'bias': False}
SMALL = {'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2,
         'num_attention_heads': 6, 'max_position_embeddings': 64}
SMOLLM = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu', 'hidden_size': 576,
    'initializer_range': 0.02, 'intermediate_size': 1536, 'max_position_embeddings': 2048,
    'mlp_bias': False, 'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30,
    'num_key_value_heads': 3, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': None,
    'rope_theta': 10000.0, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
    'transformers_version': '4.42.3', 'use_cache': True, 'vocab_size': 49152}
LLAMA2 = {
    'architectures': ['LlamaForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu',
    'hidden_size': 4096, 'initializer_range': 0.02, 'intermediate_size': 11008,
    'max_position_embeddings': 4096, 'model_type': 'llama', 'num_attention_heads': 32,
    'num_hidden_layers': 32, 'num_key_value_heads': 32, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
    'rope_scaling': None, 'tie_word_embeddings': False, 'torch_dtype': 'float16',
    'transformers_version': '4.31.0.dev0', 'use_cache': True, 'vocab_size': 32000}
MISTRAL = {
    'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu',
    'hidden_size': 4096, 'initializer_range': 0.02, 'intermediate_size': 14336,
    'max_position_embeddings': 32768, 'model_type': 'mistral', 'num_attention_heads': 32,
    'num_hidden_layers': 32, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05, 'rope_theta': 10000.0,
    'sliding_window': 4096, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
    'transformers_version': '4.34.0.dev0', 'use_cache': True, 'vocab_size': 32000}
QWEN2 = {
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151643, 'hidden_act': 'silu', 'hidden_size': 896, 'initializer_range': 0.02,
    'intermediate_size': 4864, 'max_position_embeddings': 131072, 'max_window_layers': 24,
    'model_type': 'qwen2', 'num_attention_heads': 14, 'num_hidden_layers': 24, 'num_key_value_heads': 2,
    'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 131072,
    'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1',
    'use_cache': True, 'use_sliding_window': False, 'vocab_size': 151936}
QWEN3 = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 151643, 'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu',
    'hidden_size': 1024, 'initializer_range': 0.02, 'intermediate_size': 3072,
    'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
    'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-06,
    'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0', 'use_cache': True,
    'use_sliding_window': False, 'vocab_size': 151936}
# (config.json as published, its sizes here)
FAMILIES = {
    'SmolLM': (SMOLLM, {'num_key_value_heads': 2}),
    'SmolLM2': (SMOLLM | {
        'initializer_range': 0.041666666666666664, 'is_llama_config': True, 'rope_interleaved': False,
        'max_position_embeddings': 8192, 'rope_theta': 100000, 'transformers_version': '4.40.1'},
        {'num_key_value_heads': 2}),
    'TinyLlama': (LLAMA2 | {
        'attention_bias': False, 'hidden_size': 2048, 'intermediate_size': 5632,
        'max_position_embeddings': 2048, 'num_hidden_layers': 22, 'num_key_value_heads': 4,
        'rope_theta': 10000.0, 'torch_dtype': 'bfloat16', 'transformers_version': '4.35.0'},
        {'num_key_value_heads': 1}),
    'Llama 2': (LLAMA2, {'num_key_value_heads': 6}),
    'Llama 3.2': (LLAMA2 | {
        'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 128000, 'eos_token_id': 128001,
        'head_dim': 64, 'hidden_size': 2048, 'intermediate_size': 8192, 'max_position_embeddings': 131072,
        'mlp_bias': False, 'num_hidden_layers': 16, 'num_key_value_heads': 8, 'rope_scaling': {
            'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
            'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
        'rope_theta': 500000.0, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.45.0.dev0', 'vocab_size': 128256},
        {'num_key_value_heads': 2, 'head_dim': 16, 'rope_scaling': {
            'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
            'original_max_position_embeddings': 16, 'rope_type': 'llama3'}}),
    'Mistral': (MISTRAL, {'num_key_value_heads': 2, 'sliding_window': 24}),
    'Mistral 0.3': (MISTRAL | {
        'rope_theta': 1000000.0, 'sliding_window': None, 'transformers_version': '4.42.0.dev0',
        'vocab_size': 32768}, {'num_key_value_heads': 2}),
    'Qwen 2': (QWEN2, {'num_key_value_heads': 2, 'max_window_layers': 2, 'sliding_window': 64}),
    'Qwen 2.5': (QWEN2 | {
        'max_position_embeddings': 32768, 'sliding_window': 32768, 'use_mrope': False,
        'transformers_version': '4.40.1'},
        {'num_key_value_heads': 2, 'max_window_layers': 2, 'sliding_window': 64}),
    'Qwen 3': (QWEN3, {'num_key_value_heads': 2, 'head_dim': 16, 'max_window_layers': 2}),
}


def folder_of(folder, config, dtype=torch.float32, **how):
    """A folder as transformers saves it, of random weights, norms and biases, with a config.json of
    an earlier version, as published."""
    from transformers import AutoConfig, AutoModelForCausalLM
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(mean=float('norm' in name), std=0.2)
    theirs.to(dtype).save_pretrained(folder, **how)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def llama_folder(folder, **changes):
    return folder_of(folder, SMOLLM | SMALL | {'num_key_value_heads': 2} | changes)[0]


def config_of(folder, **changes):
    config = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_s_logits_and_their_cached_ones_are_those_of_transformers(family, tmp_path, capsys):
    published, sizes = FAMILIES[family]
    folder, theirs = folder_of(tmp_path, published | SMALL | sizes, dtype=torch.bfloat16,
                               max_shard_size='20KB')
    assert len([*folder.glob('model-*-of-*.safetensors')]) > 2
    ours = load_pretrained(str(folder)).eval()
    window = 24 if family == 'Mistral' else 64  # transformers masks what is further back
    assert ours.config.block_size == window
    assert ('looks back sliding_window=24' in capsys.readouterr().out) == (window == 24)
    idx = torch.randint(64, (3, window))
    with torch.no_grad():
        expected, cache = theirs(idx).logits, KVCache(window)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=1e-4)
        for start, end in [(0, 10), (10, 11), *((i, i + 1) for i in range(11, window))]:
            logits = ours(idx[:, start:end], cache=cache)[0][:, -1]
            torch.testing.assert_close(logits, expected[:, end - 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize('family', ['SmolLM2', 'Llama 3.2', 'Qwen 2', 'Mistral 0.3'])
def test_an_export_of_a_family_comes_back_bit_for_bit(family, tmp_path):
    published, sizes = FAMILIES[family]
    folder, theirs = folder_of(tmp_path, published | SMALL | sizes)
    ours = load_pretrained(str(folder)).eval()
    config, weights = to_transformers(model_args(ours.config), ours.state_dict())
    before = theirs.state_dict()
    assert config.model_type == 'llama' and all(torch.equal(weights[k], v) for k, v in before.items()
                                                if k in weights or k != 'lm_head.weight')
    from transformers import AutoModelForCausalLM
    again = AutoModelForCausalLM.from_config(config).eval()
    again.load_state_dict(weights, strict=False)
    idx = torch.randint(64, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize('changes', [
    {'attention_bias': True, 'mlp_bias': True}, {'attention_bias': True}, {'mlp_bias': True},
    {'attention_dropout': 0.25}, {'rms_norm_eps': 1e-3}, {'head_dim': 4, 'rope_theta': 500.0},
    {'num_key_value_heads': None},
], ids=str)
def test_other_settings_of_a_llama_are_computed_too(changes, tmp_path):
    config = SMOLLM | SMALL | {'num_key_value_heads': 2} | changes
    folder, theirs = folder_of(tmp_path, {k: v for k, v in config.items() if v is not None})
    ours, idx = load_pretrained(str(folder)).eval(), torch.randint(64, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
    assert ours.config.dropout == changes.get('attention_dropout', 0.0)


# ---------------------------------------------------------------------------- what isn't computed

@pytest.mark.parametrize('changes, named', [
    ({'hidden_act': 'gelu'}, 'hidden_act=\'gelu\''), ({'model_type': 'gemma2'}, 'of type \'gemma2\''),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, 'rope_type=\'linear\''),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 'rope_type=\'dynamic\''),
    ({'rope_scaling': {'rope_type': 'mine'}}, 'rope_type=\'mine\''),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0'), ({'hidden_size': 'wide'}, 'hidden_size=\'wide\''),
    ({'num_attention_heads': 5}, 'can\'t be used'), ({'vocab_size': -3}, 'vocab_size=-3'),
], ids=str)
def test_a_model_that_model_py_does_not_compute_is_refused_by_name_before_its_weights_are_read(
        changes, named, tmp_path):
    config = SMOLLM | SMALL | {'num_key_value_heads': 2} | changes
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_text('nothing that can be read')
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        load_pretrained(str(tmp_path))
    assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize('changes, named', [
    ({'activation_function': 'silu'}, 'activation_function=\'silu\''),
    ({'scale_attn_weights': False}, 'scale_attn_weights=False'), ({'n_head': 0}, 'n_head=0')])
def test_a_gpt2_that_computes_something_else_is_refused_by_name(changes, named, gpt2_folder):
    config_of(gpt2_folder, **changes)
    with pytest.raises(ValueError, match=named):
        load_pretrained(str(gpt2_folder))


UP, HEAD = 'model.layers.1.mlp.up_proj.weight', 'model.embed_tokens.weight'
C_FC = 'transformer.h.1.mlp.c_fc.weight'


def spoil(folder, change):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
@pytest.mark.parametrize('change, told', [
    (lambda w, name: w.pop(name), 'missing: {short}'),
    (lambda w, name: w.update(extra=torch.ones(3)), 'unexpected: extra'),
    (lambda w, name: w.update({name: w[name][:16].clone()}), 'mismatched: .*c_fc.weight'),
    (lambda w, name: w[name].view(-1)[7].fill_(float('nan')), 'not finite: .*c_fc.weight'),
    (lambda w, name: w.update({'lm_head.weight': torch.ones(64, 48)}), 'mismatched|ties lm_head'),
], ids=['missing', 'unexpected', 'shape', 'nan', 'head'])
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(kind, change, told, gpt2_folder,
                                                                     tmp_path):
    folder, name = (gpt2_folder, C_FC) if kind == 'gpt2' else (llama_folder(tmp_path / 'llama'), UP)
    spoil(folder, lambda weights: change(weights, name))
    with pytest.raises(ValueError, match=told.format(short=name.removeprefix('transformer.'))) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('changes, told', [
    ({'num_hidden_layers': 10**7}, 'asks for 10,000,000 layers'), ({'vocab_size': 10**9}, 'mismatched'),
    ({'intermediate_size': 10**6}, 'mismatched'), ({'tie_word_embeddings': False}, 'missing: lm_head.weight'),
], ids=str)
def test_a_config_that_asks_for_other_weights_is_refused_before_memory_is_taken(changes, told, tmp_path):
    config_of(llama_folder(tmp_path), **changes)
    with pytest.raises(ValueError, match=told):
        load_pretrained(str(tmp_path))


def index_of(names):
    return json.dumps({'weight_map': {f'tensor {i}': name for i, name in enumerate(names)}})


@pytest.mark.parametrize('index, told', [
    (index_of(['../secret.safetensors']), 'names ../secret.safetensors, which is no file of its folder'),
    (index_of(['/etc/passwd']), 'names /etc/passwd'), (index_of(['..']), 'which is no file'),
    (index_of(['model-00001-of-00002.safetensors']), 'model-00001-of-00002.safetensors is missing'),
    ('{"weight_map": 5}', 'is no index of weights'), ('nonsense', 'is no index of weights'),
    (None, 'no model.safetensors'),
])
def test_an_index_of_files_that_are_not_in_the_folder_is_refused(index, told, tmp_path):
    folder = llama_folder(tmp_path / 'model')
    (folder / 'model.safetensors').rename(tmp_path / 'secret.safetensors')
    if index:
        (folder / 'model.safetensors.index.json').write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('left', [0, 7, 500, -1])
def test_a_truncated_file_is_one_line(left, tmp_path):
    folder = llama_folder(tmp_path / 'llama')
    content = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(content[:left])
    with pytest.raises(ValueError, match='model.safetensors can\'t be read .*SafetensorError: ') as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------- GPT-2 and its files

def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_gpt2_is_the_same_however_its_files_were_written(gpt2_folder, tmp_path):
    from safetensors.torch import load_file
    expected = GPT.from_pretrained(str(gpt2_folder)).state_dict()
    assert same(load_pretrained(str(gpt2_folder)).state_dict(), expected)
    spoil(gpt2_folder, lambda w: w.update({'transformer.h.0.attn.bias': torch.ones(1, 1, 64, 64),
                                           'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)}))
    assert same(load_pretrained(str(gpt2_folder)).state_dict(), expected)
    weights = load_file(gpt2_folder / 'model.safetensors')
    (gpt2_folder / 'model.safetensors').unlink()
    for is_archive in (True, False):  # as transformers wrote them, OpenAI's names have no prefix
        torch.save({k.removeprefix('transformer.'): v for k, v in weights.items()},
                   gpt2_folder / 'pytorch_model.bin', _use_new_zipfile_serialization=is_archive)
        assert same(load_pretrained(str(gpt2_folder)).state_dict(), expected)
    config_of(gpt2_folder, layer_norm_epsilon=1e-6)
    assert load_pretrained(str(gpt2_folder)).config.norm_eps == 1e-6


def test_code_in_a_pickle_is_not_run(gpt2_folder, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)
    (gpt2_folder / 'model.safetensors').unlink()
    torch.save({'wte.weight': Code()}, gpt2_folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pytorch_model.bin can\'t be read') as caught:
        load_pretrained(str(gpt2_folder))
    assert '\n' not in str(caught.value) and not (tmp_path / 'ran').exists()


def test_weights_keep_the_number_type_of_the_files_until_they_are_used(tmp_path):
    folder, _ = folder_of(tmp_path, SMOLLM | SMALL | {'num_key_value_heads': 2}, dtype=torch.bfloat16)
    args, weights = read_pretrained(str(folder))
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    small = load_pretrained(str(folder), dtype=torch.bfloat16)
    assert small.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert small.transformer.ln_f.weight.dtype == small.lm_head.weight.dtype == torch.float32
    assert small.lm_head.weight is small.transformer.wte.weight
    assert {p.dtype for p in load_pretrained(str(folder)).parameters()} == {torch.float32}


# ---------------------------------------------------------------------------- to transformers

def random_model(**changes):
    """A GPT whose every parameter, biases and norms included, is random."""
    model = GPT(GPTConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.mark.parametrize('changes, kind', [
    ({'bias': True}, 'gpt2'), ({'bias': False}, 'gpt2'), ({'activation': 'gelu_tanh'}, 'gpt2'),
    ({'tie_weights': False, 'norm_eps': 1e-3, 'n_inner': 48}, 'gpt2'),
    (LLAMA, 'llama'), (LLAMA | {'n_head': 4, 'n_kv_head': 1, 'tie_weights': False}, 'llama'),
    (LLAMA | {'bias': True, 'n_embd': 36, 'init': 'zero_proj'}, 'llama'),
    (LLAMA | {'head_size': 6, 'n_inner': 40, 'norm_eps': 1e-6, 'rope_theta': 500.0}, 'llama'),
    (LLAMA | {'rope_scaling': (8.0, 1.0, 4.0, 8)}, 'llama'), (LLAMA | {'qkv_bias': True}, 'llama'),
], ids=str)
def test_logits_equal_those_of_the_converted_model(changes, kind):
    from transformers import AutoModelForCausalLM
    model = random_model(**changes)
    config, weights = to_transformers(model_args(model.config), model.state_dict())
    theirs = AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert config.model_type == kind and not unexpected and set(missing) <= {'lm_head.weight'}
    theirs.tie_weights()
    idx = torch.randint(TINY['vocab_size'], (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize('changes, named', [
    ({'qk_norm': True}, ['qk_norm=True']),
    ({'value_residual': True, 'ngram': 2}, ['value_residual=True', 'ngram=2']),
    ({'logit_softcap': 15.0}, ['logit_softcap=15.0']), ({'activation': 'relu2'}, ['activation=relu2']),
    ({'n_head': 4, 'n_kv_head': 2}, ['n_kv_head=2']), ({'head_size': 8}, ['head_size=8']),
    ({'pos_emb': 'alibi'}, ['pos_emb=alibi']), ({'attn_type': 'GK'}, ['attn_type=GK']),
    (LLAMA | {'value_residual': True}, ['value_residual=True']), (LLAMA, []), ({}, []),
], ids=str)
def test_options_that_transformers_lacks_are_named_and_take_our_own_code(changes, named):
    model = random_model(**changes)
    args = model_args(model.config)
    assert min(beyond('gpt2', args), beyond('llama', args), key=len) == named
    assert (architecture(args) == 'own_gpt') == bool(named)
    if named:
        config, weights = to_transformers(args, model.state_dict())
        assert config.model_args == args and all(name.startswith('gpt.') for name in weights)


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    from transformers import AutoModelForCausalLM
    model = random_model(bias=False)
    config, weights = to_transformers(model_args(model.config), model.state_dict())
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(weights, strict=False)
    for is_changed in (False, True):
        with torch.no_grad():
            theirs.transformer.h[1].mlp.c_fc.bias[3] = float(is_changed)
        theirs.save_pretrained(tmp_path)
        assert load_pretrained(str(tmp_path)).config.bias is is_changed


# ---------------------------------------------------------------------------- names

def hub(tmp_path, *args, code, **env):
    """What a Python program prints in an empty folder, with a cache of its own; stderr's last line
    if it fails."""
    program = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' \
              f'from support.hub.huggingface import *\nfrom support.hub.names import model_folder\n{code}'
    done = subprocess.run([sys.executable, '-c', program, *args], cwd=tmp_path, text=True, encoding='utf-8',
                          capture_output=True, env=os.environ | {'HF_HOME': str(tmp_path / 'cache')} | env)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize('name, told', [
    ('gpt2', "MissingFile: can't reach huggingface.co, and gpt2 is not in its cache"),
    ('me/model', "MissingFile: can't reach huggingface.co, and me/model is not in its cache"),
    ('gone', 'MissingFile: gone is neither one of gpt2, .* nor a folder .* nor a name of the hub'),
    ('../model', 'MissingFile: ../model is neither one of'), ('a/b/c', 'MissingFile: a/b/c is neither'),
])
def test_a_name_without_a_network_is_one_line(name, told, tmp_path):
    (tmp_path / 'gpt2').mkdir()  # a folder of that name that is no model
    assert re.match(f'support.errors.{told}', hub(
        tmp_path, name, code='load_pretrained(sys.argv[1])', HF_HUB_OFFLINE='1'))


def test_the_cache_is_used_without_a_network_under_either_name(tmp_path, gpt2_folder):
    snapshot = tmp_path / 'cache/hub/models--openai-community--gpt2/snapshots/abc'
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / 'refs').mkdir()
    (snapshot.parents[1] / 'refs/main').write_text('abc')
    for path in gpt2_folder.iterdir():
        path.rename(snapshot / path.name)
    gpt2_folder.rmdir()
    gpt2_folder.mkdir()  # the name is the hub's, though a folder of that name lies here
    found = hub(tmp_path, code='print(load_pretrained("gpt2").config.n_embd, model_folder("gpt2").name)',
                HF_HUB_OFFLINE='1')
    assert found == '32 abc'


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does, from the server's folder, and counts what is asked for."""

    def do_GET(self):
        path, folder = self.path.split('?')[0], self.server.folder
        if found := re.fullmatch(r'/api/models/([\w-]+/[\w-]+)/(revision|tree)/\w+', path):
            if not (folder / found[1]).is_dir():
                return self.answer(404, b'{}', X_Error_Code='RepoNotFound')
            files = [*(folder / found[1]).iterdir()]
            tree = [{'type': 'file', 'path': p.name, 'size': p.stat().st_size, 'oid': p.name} for p in files]
            info = {'id': found[1], 'sha': 'a' * 40, 'siblings': [{'rfilename': p.name} for p in files]}
            return self.answer(200, json.dumps(tree if found[2] == 'tree' else info).encode())
        if found := re.fullmatch(r'/([\w-]+/[\w-]+)/resolve/\w+/(.+)', path):
            if found[1].startswith('gated/'):
                return self.answer(403, b'{}', X_Error_Code='GatedRepo')
            if self.command == 'GET':
                self.server.asked.append(found[2])
            return self.answer(200, (folder / found[1] / found[2]).read_bytes(), ETag=f'"{found[2]}"',
                               X_Repo_Commit='a' * 40)
        return self.answer(404, b'')

    do_HEAD = do_GET

    def answer(self, code, body, **headers):
        self.send_response(code)
        for name, value in (headers | {'Content_Length': len(body), 'Content_Type': 'x'}).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_only_what_is_needed_is_downloaded_and_what_may_not_be_is_one_line(tmp_path):
    folder = llama_folder(tmp_path / 'hub/me/model')
    for name in ('pytorch_model.bin', 'model.gguf', 'flax_model.msgpack', 'README.md'):
        (folder / name).write_text('not needed')
    for name in ('gated/model', 'me/none'):
        (tmp_path / 'hub' / name).mkdir(parents=True)
    (tmp_path / 'hub/gated/model/config.json').write_text('{}')
    (tmp_path / 'hub/me/none/README.md').write_text('')
    llama_folder(tmp_path / 'hub/me/other', hidden_act='gelu')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    server.folder, server.asked = tmp_path / 'hub', []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_address[1]}'}
    code = '''
import os
for name in ('me/model', 'me/other', 'gated/model', 'private/model', 'me/none'):
    try:
        print(load_pretrained(name).config.n_embd, sorted(os.listdir(model_folder(name))))
    except (ValueError, OSError) as error:
        print(type(error).__name__, str(error))
'''
    found = hub(tmp_path, code=code, **env).splitlines()
    server.shutdown()
    assert found[0] == "48 ['config.json', 'generation_config.json', 'model.safetensors']"
    assert sorted(server.asked) == ['config.json', 'config.json', 'generation_config.json',
                                    'generation_config.json', 'model.safetensors']
    for line, told in zip(
        found[1:],
        [
            'UserError me/other .*hidden_act=',
            'UserError gated/model is gated: .*login',
            'MissingFile private/model is no folder .* hf auth login',
            'MissingFile me/none has no config.json',
        ],
        strict=True,
    ):
        assert re.match(told, line), line


# ---------------------------------------------------------------------------- tokenizers of folders

def test_a_model_s_tokenizer_is_its_own_or_gpt2_s_by_size(tmp_path):
    folder = llama_folder(tmp_path)
    for size, kind in ((50257, GPT2Tokenizer), (51200, NoTokenizer), (64, NoTokenizer)):
        config_of(folder, vocab_size=size)
        assert own_tokenizer(str(folder)) is None and isinstance(folder_tokenizer(str(folder)), kind)
    own = train_bpe(['a b c'], 300)
    (folder / 'tokenizer.json').write_text(own.json)
    with pytest.raises(ValueError, match='ids up to 256, its model rows for 64'):
        folder_tokenizer(str(folder))
    config_of(folder, vocab_size=512, eos_token_id=[7, 9])
    (folder / 'generation_config.json').unlink()
    assert folder_tokenizer(str(folder)).ends == (7, 9) and folder_tokenizer(str(folder)).end == 0
    (folder / 'generation_config.json').write_text('{"eos_token_id": 5}')
    assert folder_tokenizer(str(folder)).ends == (5,)


@pytest.mark.skipif(sys.platform != 'linux', reason='a file is held by its name in /proc')
def test_weights_are_those_of_the_file_that_was_opened_though_it_is_replaced(tmp_path):
    from safetensors.torch import load_file, save_file
    path = llama_folder(tmp_path / 'llama') / 'model.safetensors'
    before, files = load_file(path), TensorFiles(path.parent)
    save_file({name: t + 1 for name, t in before.items()}, path.with_suffix('.new'))
    path.with_suffix('.new').replace(path)
    files.n_read = 1 << 40  # so that the next read maps its file anew
    assert all(torch.equal(files.read(name), t) for name, t in before.items())
