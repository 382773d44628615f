"""model.py's options beyond GPT-2: against independent implementations, and against themselves."""

import math

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from model import GPT, GPTConfig, alibi
from support.sampling.decoding import generate
from support.training.loss import checkpoint_activations, linear_cross_entropy, use_lean_loss
from support.training.state import config_from_args, model_args

OPTIONS = {
    'rope': {'pos_emb': 'rope'},
    'alibi': {'pos_emb': 'alibi'},
    'no positions': {'pos_emb': 'none'},
    'rmsnorm': {'norm': 'rmsnorm'},
    'relu2': {'activation': 'relu2'},
    'swiglu': {'activation': 'swiglu'},
    'qk_norm': {'qk_norm': True},
    'untied': {'tie_weights': False},
    'value_residual': {'value_residual': True},
    'softcap': {'logit_softcap': 3.0},
    'grouped queries': {'n_head': 4, 'n_kv_head': 2},
    'ngram': {'ngram': 4, 'ngram_rows': 512},
    'zero_proj': {'init': 'zero_proj'},
    'Gaussian kernel': {'attn_type': 'GK'},
    'its polynomial': {'attn_type': 'GKpoly-4'},
    'pointwise': {'attn_type': 'PA_gelu'},
    'Gaussian kernel, rope, grouped queries': {'attn_type': 'GK', 'pos_emb': 'rope', 'qk_norm': True,
                                               'n_head': 4, 'n_kv_head': 2},
    'all': {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True,
            'tie_weights': False, 'value_residual': True, 'logit_softcap': 3.0,
            'n_head': 4, 'n_kv_head': 1, 'ngram': 3, 'ngram_rows': 512},
}
each_option = pytest.mark.parametrize('changes', OPTIONS.values(), ids=OPTIONS.keys())


def option_model(changes, scramble=True):
    """A tiny model; scrambled: no parameter is at its initial value, which may hide it."""
    model = GPT(GPTConfig(**(TINY | {'bias': False} | changes)))
    if scramble:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens(*shape):
    return torch.randint(TINY['vocab_size'], shape)


def test_rotary_rmsnorm_swiglu_grouped_queries_equal_transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    hidden = 128  # two thirds of 4 * 32, rounded up to a multiple of 64
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=False)).eval()
    ours = option_model({'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'n_head': 4,
                         'n_kv_head': 2, 'tie_weights': False}).eval()
    w, t = ours.state_dict(), theirs.state_dict()
    with torch.no_grad():
        t['model.embed_tokens.weight'].copy_(w['transformer.wte.weight'])
        t['model.norm.weight'].copy_(w['transformer.ln_f.weight'])
        t['lm_head.weight'].copy_(w['lm_head.weight'])
        for i in range(2):
            a, b = f'transformer.h.{i}', f'model.layers.{i}'
            for name, part in zip('qkv', w[f'{a}.attn.c_attn.weight'].split((32, 16, 16)), strict=True):
                t[f'{b}.self_attn.{name}_proj.weight'].copy_(part)
            for name, part in zip(('gate', 'up'), w[f'{a}.mlp.c_fc.weight'].chunk(2), strict=True):
                t[f'{b}.mlp.{name}_proj.weight'].copy_(part)
            t[f'{b}.self_attn.o_proj.weight'].copy_(w[f'{a}.attn.c_proj.weight'])
            t[f'{b}.mlp.down_proj.weight'].copy_(w[f'{a}.mlp.c_proj.weight'])
            t[f'{b}.input_layernorm.weight'].copy_(w[f'{a}.ln_1.weight'])
            t[f'{b}.post_attention_layernorm.weight'].copy_(w[f'{a}.ln_2.weight'])
    idx = tokens(3, 32)
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize('n_head', [1, 2, 4, 6, 8, 12, 16])
def test_alibi_equals_transformers_bloom(n_head):
    """Up to a constant for each query, which the softmax takes away."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    theirs = build_alibi_tensor(torch.ones(1, 20), n_head, torch.float32).view(n_head, 1, 20)
    config = GPTConfig(n_head=n_head, n_embd=8 * n_head, pos_emb='alibi')
    _, ours = alibi(torch.arange(20), 20, config, torch.float32)
    for t in (0, 7, 19):
        torch.testing.assert_close(ours[:, t, :t + 1], (theirs - theirs[:, :, t:t + 1])[:, 0, :t + 1])
        assert torch.all(ours[:, t, t + 1:] == -math.inf)


@each_option
def test_cached_generation_equals_uncached(changes):
    """Also past block_size, and for prompts of different lengths."""
    model = option_model(changes).eval()
    for T, lengths in ((1, None), (5, None), (6, torch.tensor([2, 6, 3]))):
        idx = tokens(3, T)
        cached = generate(model, idx, 40, temperature=0, lengths=lengths)
        for b in range(3):
            text = idx[b:b + 1, :T if lengths is None else lengths[b]]
            while text.shape[1] < cached.shape[1]:
                logits, _ = model(text[:, -TINY['block_size']:])
                text = torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), 1)
            assert torch.equal(cached[b], text[0])
    several = generate(model, idx[:1], 8, temperature=0, n_samples=3)
    assert torch.equal(several, several[:1].expand(3, -1))


@each_option
def test_no_position_sees_a_later_one(changes):
    model, idx = option_model(changes).eval(), tokens(2, 20)
    other = idx.clone()
    other[:, 11:] = (other[:, 11:] + 1) % 64
    a, b = model(idx, idx)[0], model(other, other)[0]
    torch.testing.assert_close(a[:, :11], b[:, :11], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, 11:], b[:, 11:])


@each_option
def test_the_loss_without_logits_equals_that_with_them(changes):
    losses, grads = [], []
    for lean in (False, True):
        torch.manual_seed(1)
        model, idx = option_model(changes), tokens(3, 20)
        if lean:
            use_lean_loss(model)
        targets = idx.roll(-1, 1)
        targets[0, :5] = -1
        loss = model(idx, targets)[1]
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*losses)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@each_option
def test_every_parameter_learns(changes):
    model = option_model(changes)
    for _ in range(2):
        model(tokens(4, 32), tokens(4, 32))[1].backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@each_option
def test_activation_checkpointing_changes_no_gradient(changes):
    grads = []
    for on in (False, True):
        torch.manual_seed(1)
        model = option_model(changes)
        if on:
            checkpoint_activations(model)
        idx = tokens(2, 32)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@each_option
def test_model_args_hold_what_differs_and_give_the_model_back(changes):
    config = option_model(changes).config
    args = model_args(config)
    gpt2 = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert set(args) == gpt2 | set(changes)
    assert config_from_args(args) == config


@pytest.mark.parametrize('changes, reason', [
    ({'pos_emb': 'sinus'}, 'pos_emb=sinus is not one of learned, rope, alibi, none'),
    ({'norm': 'batch'}, 'norm=batch is not one of'),
    ({'init': 'ones'}, 'init=ones is not one of'),
    ({'activation': 'swish'}, 'activation=swish is not one of'),
    ({'n_head': 4, 'n_kv_head': 3}, 'must be a divisor of n_head=4'),
    ({'n_head': 32, 'pos_emb': 'rope'}, 'must be even'),
    ({'logit_softcap': -1.0}, 'must not be negative'),
    ({'ngram': 0}, 'ngram=0 must be at least 1'),
    ({'ngram': 2, 'ngram_rows': 0}, 'ngram_rows=0 must be at least 1'),
])
def test_what_makes_no_sense_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        GPTConfig(**(TINY | changes))


def test_softcap_is_a_tanh_in_the_loss_without_logits():
    x, w = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 9))
    targets = torch.arange(7)
    expected = F.cross_entropy(2.0 * torch.tanh(x @ w.T / 2.0), targets)
    want = torch.autograd.grad(expected, (x, w))
    loss = linear_cross_entropy(x, w, targets, 2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), want)


def test_a_wider_vocabulary_of_ngrams_tells_them_apart():
    """Two texts that end in the same token, but not in the same three, get different embeddings."""
    model = option_model({'ngram': 3, 'ngram_rows': 4096})
    a, b = (model.transformer.wne(torch.tensor([ids]))[0, -1] for ids in ([5, 7, 9], [6, 7, 9]))
    c, d = (model.transformer.wne(torch.tensor([ids]))[0, -1] for ids in ([1, 5, 7, 9], [2, 5, 7, 9]))
    assert not torch.equal(a, b) and torch.equal(c, d)


def test_values_of_the_first_layer_reach_the_second():
    model, idx = option_model({'value_residual': True}), tokens(2, 8)
    before = model(idx, idx)[0]
    with torch.no_grad():
        model.transformer.h[1].attn.value_mix.copy_(torch.tensor([1.0, 0.0]))
    assert not torch.allclose(before, model(idx, idx)[0])
    assert model.transformer.h[0].attn.value_mix is None
