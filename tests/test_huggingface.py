"""huggingface.py: our functions as theirs and back."""

import json
import random

import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig
from support.hub.huggingface import folder_tokenizer, load_pretrained, to_transformers, write_tokenizer
from support.run.state import model_args
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
    {'bias': True}, {'bias': False}, {'activation': 'gelu_tanh'}, {'activation': 'relu2', 'bias': False},
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
    ({'qk_norm': True}, 'GPT-2, differs in qk_norm=True'),
    ({'value_residual': True, 'ngram': 2}, 'value_residual=True, ngram=2'),
    ({'logit_softcap': 15.0}, 'logit_softcap=15.0'),
    ({'n_head': 4, 'n_kv_head': 2}, 'GPT-2, differs in n_kv_head=2'),
    ({'pos_emb': 'alibi'}, 'GPT-2, differs in pos_emb=alibi'),
    ({'pos_emb': 'rope'}, 'Llama, differs in activation=gelu, norm=layernorm'),
    (LLAMA | {'value_residual': True}, 'Llama, differs in value_residual=True'),
])
def test_options_that_transformers_lacks_are_refused_by_name(changes, named):
    model = random_model(**changes)
    with pytest.raises(ValueError, match=named):
        to_transformers(model_args(model.config), model.state_dict())


def test_settings_unknown_here_are_refused_by_name():
    model = random_model()
    with pytest.raises(ValueError, match='attn_type=GK'):
        to_transformers(model_args(model.config) | {'attn_type': 'GK'}, model.state_dict())


def test_weights_that_are_no_gpt2_are_refused(tmp_path):
    converted(random_model(**LLAMA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='of type llama, not a GPT-2'):
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
    assert len(theirs) == ours.n_vocab
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
