"""huggingface.py: our functions as theirs and back."""

import json
import random
import re

import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig
from support.hub.huggingface import (beyond, folder_tokenizer, load_pretrained, to_transformers,
                                     write_tokenizer)
from support.training.state import model_args
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'bias': False}


def random_model(**changes):
    """A GPT whose every parameter, biases and norms included, is random."""
    model = GPT(GPTConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def converted(model):
    """The transformers model that computes the same."""
    from transformers import AutoModelForCausalLM
    config, weights = to_transformers(model_args(model.config), model.state_dict())
    theirs = AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize('changes', [
    {'bias': True}, {'bias': False}, {'activation': 'gelu_tanh'},
    {'tie_weights': False}, {'n_kv_head': 2},
    LLAMA, LLAMA | {'n_head': 4, 'n_kv_head': 2}, LLAMA | {'n_head': 4, 'n_kv_head': 1, 'tie_weights': False},
    LLAMA | {'bias': True, 'n_embd': 36, 'init': 'zero_proj'},
], ids=str)
def test_logits_equal_those_of_the_converted_model(changes):
    model = random_model(**changes)
    theirs = converted(model)
    idx = torch.randint(TINY['vocab_size'], (3, 32))
    with torch.no_grad():
        ours, others = model(idx, idx)[0], theirs(idx).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-5)


@pytest.mark.parametrize('changes, named', [
    ({'qk_norm': True}, ['qk_norm=True']),
    ({'value_residual': True, 'ngram': 2}, ['value_residual=True', 'ngram=2']),
    ({'logit_softcap': 15.0}, ['logit_softcap=15.0']),
    ({'activation': 'relu2'}, ['activation=relu2']),
    ({'n_head': 4, 'n_kv_head': 2}, ['n_kv_head=2']),
    ({'pos_emb': 'alibi'}, ['pos_emb=alibi']),
    (LLAMA | {'value_residual': True}, ['value_residual=True']),
    ({'attn_type': 'GK'}, ['attn_type=GK']), ({'pos_emb': 'learned'}, []), (LLAMA, []),
], ids=str)
def test_options_that_transformers_lacks_are_named_and_take_our_own_code(changes, named):
    model = random_model(**changes)
    args = model_args(model.config)
    assert min(beyond('gpt2', args), beyond('llama', args), key=len) == named
    config, weights = to_transformers(args, model.state_dict())
    assert (config.model_type == 'own_gpt') == bool(named)
    if named:
        assert config.model_args == args and all(name.startswith('gpt.') for name in weights)


def test_weights_of_another_architecture_are_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "mistral"}')
    with pytest.raises(ValueError, match='holds a model of type mistral, not of gpt2, llama or own_gpt'):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize('changes, named', [
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'), ({'n_inner': 48}, 'n_inner=48'),
    ({'activation_function': 'silu'}, 'activation_function=silu'),
])
def test_a_gpt2_that_computes_something_else_is_refused_by_name(tmp_path, changes, named):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, **changes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'is not a GPT-2 that model.py computes: {named}'):
        load_pretrained(str(tmp_path))


def test_missing_weights_are_one_line_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='gone is neither one of gpt2, .* nor a folder') as caught:
        load_pretrained('gone')
    assert '\n' not in str(caught.value)
    for config, kind in (('{"model_type": "gpt2"}', FileNotFoundError), ('no JSON', ValueError)):
        (tmp_path / 'config.json').write_text(config)
        with pytest.raises(kind, match='no GPT-2 weights in .*--init_from=PATH') as caught:
            load_pretrained(str(tmp_path))
        assert '\n' not in str(caught.value)


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    model = random_model(bias=False)
    theirs = converted(model)
    theirs.save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path)).config.bias is False
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias[3] = 1.0
    theirs.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.config.bias is True and loaded.transformer.h[1].mlp.c_fc.bias[3] == 1


def texts():
    """Some that tokenizers stumble over, and random ones."""
    yield from ('Hello world', "  we'll\n\n\n don't\t123  45\u00a0 <|endoftext|> x", 'ä€😀 \u2028é', ' ',
                '\n', '\0')
    generator = random.Random(0)
    for alphabet in (range(1, 127), range(1, 0x3000), (32, 10, 9, 39, 115, 0x20ac, 0x1f600)):
        yield ''.join(chr(generator.choice(alphabet)) for _ in range(2000))


def test_their_bpe_equals_tiktoken(tmp_path, bpe):
    from transformers import AutoTokenizer
    ours = GPT2Tokenizer()
    write_tokenizer(tmp_path, ours, 1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text
    merges = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))['model']['merges']
    assert len(merges) == 50_000 and merges[:3] == [['\u0120', 't'], ['\u0120', 'a'], ['h', 'e']]
    assert len(theirs) == 50257 and theirs.eos_token_id == theirs.bos_token_id == 50256
    assert isinstance(folder_tokenizer(tmp_path), GPT2Tokenizer)


def test_their_characters_equal_ours(tmp_path):
    from transformers import AutoTokenizer
    ours = CharTokenizer.of_text(''.join(texts()))
    write_tokenizer(tmp_path, ours, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text
    assert len(theirs) == ours.n_vocab + 1 and theirs.pad_token_id == ours.n_vocab
    assert folder_tokenizer(tmp_path).itos == ours.itos
    with pytest.raises(Exception, match='Missing'):
        theirs('\u4e00')


# ---------------------------------------------------------------------------- folders that aren't whole

def spoil(folder, change):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


C_FC = 'transformer.h.1.mlp.c_fc.weight'


@pytest.mark.parametrize('change, told', [
    (lambda w: w.pop(C_FC), f'missing: {C_FC}'),
    (lambda w: w.update(extra=torch.ones(3)), 'unexpected: extra'),
    (lambda w: w.update({C_FC: w[C_FC][:16].clone()}), f'mismatched: .*{C_FC}'),
    (lambda w: w[C_FC].view(-1)[7].fill_(float('nan')), f'not finite: {C_FC}'),
], ids=['missing', 'unexpected', 'shape', 'nan'])
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(gpt2_folder, change, told):
    spoil(gpt2_folder, change)
    with pytest.raises(ValueError, match=told) as caught:
        GPT.from_pretrained(str(gpt2_folder))
    assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=told):
        load_pretrained(str(gpt2_folder))


def test_masks_that_older_versions_stored_are_no_weights(gpt2_folder):
    before = GPT.from_pretrained(str(gpt2_folder)).state_dict()
    spoil(gpt2_folder, lambda w: w.update({'transformer.h.0.attn.bias': torch.ones(1, 1, 64, 64),
                                           'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)}))
    after = GPT.from_pretrained(str(gpt2_folder)).state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize('size', ['n_embd', 'n_layer', 'vocab_size', 'n_positions'])
def test_a_config_that_asks_for_more_than_the_weights_have_is_refused_before_memory_is_taken(gpt2_folder,
                                                                                            size):
    config = json.loads((gpt2_folder / 'config.json').read_text())
    (gpt2_folder / 'config.json').write_text(json.dumps(config | {size: 10**7}))
    with pytest.raises(ValueError, match='config.json asks for'):
        load_pretrained(str(gpt2_folder))


@pytest.mark.parametrize('name, content', [
    ('tokenizer.json', {'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1}, 'merges': []}}),
    ('tokenizer.json', {'model': {'type': 'WordLevel', 'vocab': {'word': 0}}}), ('tokenizer.json', []),
    ('vocab.json', {'a': 0, 'b': 1}), ('tokenizer.model', 'no JSON'),
], ids=str)
def test_a_tokenizer_of_the_folder_s_own_is_refused_not_replaced(name, content, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f'{name} is neither GPT-2\'s tokenizer nor one of characters'):
        folder_tokenizer(tmp_path)


@pytest.mark.parametrize('left', [0, 7, 500, -1])
@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_truncated_file_is_one_line(left, kind, gpt2_folder, tmp_path):
    folder = gpt2_folder if kind == 'gpt2' else llama_folder(tmp_path / 'llama')
    content = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(content[:left])
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)) as caught:
        load_pretrained(str(folder))
    assert re.search('SafetensorError: .*header|config.json asks for', str(caught.value))
    assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------- Llama

def llama_folder(folder, **changes):
    """A small Llama as transformers saves it, its weights and norms random."""
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 128, 'max_position_embeddings': 32,
             'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes | {'rms_norm_eps': 1e-5} | changes))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('changes', [
    {}, {'tie_word_embeddings': True}, {'num_key_value_heads': 4}, {'num_key_value_heads': 1, 'head_dim': 12},
    {'attention_bias': True, 'mlp_bias': True}, {'attention_bias': True}, {'mlp_bias': True},
    {'attention_dropout': 0.25}, {'dtype': torch.bfloat16},
], ids=str)
def test_a_llama_of_transformers_gives_the_same_logits_and_comes_back_bit_for_bit(changes, tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM
    folder = llama_folder(tmp_path, **changes)
    ours = load_pretrained(str(folder)).eval()
    theirs = LlamaForCausalLM.from_pretrained(folder).float().eval()
    idx = torch.randint(64, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        assert theirs(idx).logits.std() > 0.1
    assert ours.config.n_kv_head == changes.get('num_key_value_heads', 2) % 4  # 0 stands for n_head
    assert ours.config.dropout == changes.get('attention_dropout', 0.0)
    config, weights = to_transformers(model_args(ours.config), ours.state_dict())
    before = load_file(folder / 'model.safetensors')
    assert config.model_type == 'llama' and all(torch.equal(weights[k], v.float()) for k, v in before.items())
    assert not any(weights[k].any() for k in set(weights) - set(before))  # biases that it didn't have


@pytest.mark.parametrize('changes, named', [
    ({'rms_norm_eps': 1e-6}, 'rms_norm_eps=1e-06'), ({'intermediate_size': 192}, 'intermediate_size=192'),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, 'rope_theta=500000.0'),
    ({'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}}, 'rope_type=linear'),
    ({'hidden_act': 'gelu'}, 'hidden_act=gelu'), ({'head_dim': 16}, 'head_dim=16'),
], ids=str)
def test_a_llama_that_computes_something_else_is_refused_by_name(changes, named, tmp_path):
    with pytest.raises(ValueError, match=f'model.py doesn\'t compute this Llama: {named} ') as caught:
        load_pretrained(str(llama_folder(tmp_path, **changes)))
    assert '\n' not in str(caught.value)


def test_a_llama_of_transformers_4_is_read(tmp_path):
    folder = llama_folder(tmp_path)
    before = load_pretrained(str(folder)).state_dict()
    config = json.loads((folder / 'config.json').read_text())
    del config['rope_parameters']
    (folder / 'config.json').write_text(json.dumps(config | {'rope_theta': 10000.0, 'rope_scaling': None}))
    spoil(folder, lambda w: w.update({'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(6)}))
    after = load_pretrained(str(folder)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (folder / 'config.json').write_text(json.dumps(config | {'rope_theta': 5e5, 'rope_scaling': None}))
    with pytest.raises(ValueError, match='rope_theta=500000.0'):
        load_pretrained(str(folder))


UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize('change, told', [
    (lambda w: w.pop(UP), f'missing: {UP}'), (lambda w: w.update(extra=torch.ones(3)), 'unexpected: extra'),
    (lambda w: w.update({UP: w[UP][:64].clone()}), r'mismatched: .*c_fc.weight, \(192, 48\)'),
    (lambda w: w[UP].view(-1)[7].fill_(float('nan')), 'not finite: transformer.h.1.mlp.c_fc.weight'),
], ids=['missing', 'unexpected', 'shape', 'nan'])
def test_weights_that_are_not_those_of_the_llama_are_refused_by_name(change, told, tmp_path):
    folder = llama_folder(tmp_path)
    spoil(folder, change)
    with pytest.raises(ValueError, match=told) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('changes, told', [
    ({'num_hidden_layers': 10**7}, 'asks for 10,000,000 layers'), ({'vocab_size': 10**9}, 'mismatched'),
    ({'tie_word_embeddings': True}, 'ties lm_head.weight to model.embed_tokens.weight, which differs'),
    ({'num_attention_heads': 'four'}, 'holds no model of type llama'),
], ids=str)
def test_a_config_that_is_not_of_the_llama_s_weights_is_refused(changes, told, tmp_path):
    folder = llama_folder(tmp_path)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=told) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)


def test_a_llama_in_several_files_is_read_and_one_without_weights_refused(tmp_path):
    from transformers import LlamaForCausalLM
    whole = llama_folder(tmp_path / 'whole')
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / 'parts', max_shard_size='20KB')
    assert len([*(tmp_path / 'parts').glob('model-*.safetensors')]) > 1
    one, many = (load_pretrained(str(tmp_path / name)).state_dict() for name in ('whole', 'parts'))
    assert all(torch.equal(one[name], many[name]) for name in one)
    (whole / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='type llama, but no model.safetensors'):
        load_pretrained(str(whole))
