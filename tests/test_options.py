"""model.py with each of its options: against naive.py, through a cache, by hand, with hooks."""

import math

import naive
import pytest
import torch
from conftest import TINY, scrambled, tiny, tokens
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache
from support.machine.runtime import Runtime
from support.training.models import config_from_args, model_args

OPTIONS = {
    'GPT-2': {},
    'biases of q, k, v': {'bias': False, 'qkv_bias': True},
    'sizes': {'head_size': 6, 'n_inner': 40, 'norm_eps': 0.1},
    'gelu_tanh': {'activation': 'gelu_tanh'},
    'relu2': {'activation': 'relu2'},
    'swiglu': {'activation': 'swiglu'},
    'rope, stretched': {'pos_emb': 'rope', 'rope_theta': 50.0, 'rope_scaling': (4.0, 1.0, 4.0, 32)},
    'alibi, six heads': {'pos_emb': 'alibi', 'n_head': 6, 'head_size': 8},
    'no positions': {'pos_emb': 'none'},
    'rmsnorm': {'norm': 'rmsnorm', 'norm_eps': 0.1},
    'qk_norm': {'qk_norm': True},
    'qk_norm with weights': {'qk_norm_weights': True, 'norm_eps': 0.1},
    'untied': {'tie_weights': False},
    'value residuals': {'value_residual': True, 'n_layer': 3},
    'softcap': {'logit_softcap': 3.0},
    'norm of the embedding': {'embd_norm': True, 'ngram': 2, 'ngram_rows': 512},
    'embedding added to each block': {'x0_residual': True},
    'scale of attention': {'attn_scale': 0.12, 'n_head': 4, 'n_kv_head': 2},
    'grouped queries': {'n_head': 4, 'n_kv_head': 2},
    'n-grams': {'ngram': 4, 'ngram_rows': 512},
    'Gaussian kernel': {'attn_type': 'GK', 'n_head': 4, 'n_kv_head': 2},
    'its polynomial': {'attn_type': 'GKpoly-4'},
    'pointwise': {'attn_type': 'PA_silu', 'pa_norm': 'block_size', 'pos_emb': 'rope', 'qk_norm': True},
    'all': {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True,
            'n_layer': 3, 'tie_weights': False, 'value_residual': True, 'logit_softcap': 3.0,
            'n_head': 4, 'n_kv_head': 1, 'ngram': 3, 'ngram_rows': 512, 'bias': False,
            'embd_norm': True, 'x0_residual': True, 'attn_scale': 0.12, 'document_end': 3},
}
each_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())


def bound(options):
    """How near to naive.py a model in float64 is; angles are float32's."""
    return 2e-6 if options.get('pos_emb') == 'rope' else 1e-12


def assert_near(ours, expected, atol):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------------- what is computed

@each_option
def test_logits_loss_and_gradients_are_those_of_the_formulas(options):
    model, idx, targets = scrambled(tiny(**options)).double(), tokens(2, 24), tokens(2, 24)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    assert_near(logits, naive.logits(model, idx), bound(options))
    assert_near(model(idx)[0], logits[:, -1:], bound(options))
    params = dict(model.named_parameters())
    expected = torch.autograd.grad(naive.loss(model, idx, targets), params.values())
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        found = torch.autograd.grad(model(idx, targets)[1], params.values())
        for name, ours, theirs in zip(params, found, expected):
            assert theirs.abs().max() > 1e-4, name  # every parameter learns
            assert_near(ours, theirs, bound(options))


@each_option
def test_positions_may_come_in_any_pieces(options):
    model, idx = scrambled(tiny(**options)).double().eval(), tokens(2, 32)
    expected = naive.logits(model, idx)
    for sizes in ((32,), (1,) * 32, (5, 1, 2, 9, 1, 1, 13)):
        cache, parts = KVCache(32), []
        for piece in idx.split(sizes, dim=1):
            parts.append(model(piece, piece, cache)[0])
        assert_near(torch.cat(parts, dim=1), expected, bound(options))
    with pytest.raises(AssertionError, match='33 positions, but block_size is 32'):
        model(tokens(2, 1), cache=cache)


@pytest.mark.parametrize('options', [{}, {'pos_emb': 'rope', 'n_head': 4, 'n_kv_head': 2}], ids=str)
def test_attention_stops_where_a_document_ends(options):
    model, idx = scrambled(tiny(document_end=3, **options)).double().eval(), tokens(3, 32)
    idx[idx == 3] = 4
    idx[0, 9] = idx[1, 0] = idx[1, 20] = idx[1, 21] = 3
    expected, parts, cache = naive.logits(model, idx), [], KVCache(32)
    assert_near(model(idx, idx)[0], expected, bound(options))
    for piece in idx.split((5, 1, 6, 1, 8, 11), dim=1):
        parts.append(model(piece, piece, cache)[0])
    assert_near(torch.cat(parts, dim=1), expected, bound(options))
    changed = idx.clone()
    changed[:, :9] = 7
    differs = (model(changed, changed)[0] - expected).abs().amax(dim=2) > 1e-6
    assert not differs[0, 9:].any() and differs[2, 9:].all() and not differs[1, 20:].any()


@each_option
def test_generation_is_a_loop_over_whole_windows_also_past_block_size(options):
    model = scrambled(tiny(**options | {'block_size': 12}), 0.4).double().eval()
    for T in (1, 5, 12, 15):
        expected = idx = tokens(2, T)
        for _ in range(14):
            expected = torch.cat((expected, model(expected[:, -12:])[0].argmax(dim=-1)), dim=1)
        assert torch.equal(model.generate(idx, 14, temperature=0), expected)
    assert not torch.allclose(*(model(expected[:, -n:])[0] for n in (11, 12)))  # all of it matters


@each_option
def test_parts_called_by_hand_give_tensors_and_hooks_on_any_of_them_act(options):
    model, idx = scrambled(tiny(**options)), tokens(2, 9)
    x = torch.randn(2, 9, 32)
    for block in model.transformer.h:
        for part in (block, block.attn, block.mlp, block.ln_1):
            assert part(x).shape == x.shape
        block(x).sum().backward()
    before = all_results(model, idx)
    for name, module in model.named_modules():
        if isinstance(module, (GPT, nn.ModuleDict, nn.ModuleList)):
            continue
        hook = module.register_forward_hook(lambda module, args, y: 1.5 * y.roll(1, dims=-1))
        for a, b in zip(before, all_results(model, idx)):
            assert not torch.allclose(a, b, rtol=1e-5), name
        hook.remove()
    assert all(map(torch.equal, before, all_results(model, idx)))


def all_results(model, idx):
    """Logits in training, in evaluation, and of a second piece through a cache."""
    cache = KVCache(len(idx[0]))
    found = [model.train()(idx, idx)[0]]
    with torch.no_grad():
        found += [model.eval()(idx, idx)[0], model(idx[:, :5], cache=cache)[0],
                  model(idx[:, 5:], cache=cache)[0]]
    return found


def test_parts_of_gpt2_by_hand_make_the_model_and_a_replaced_forward_acts():
    model, idx = scrambled(tiny()).eval(), tokens(2, 9)
    t = model.transformer
    for is_replaced in (False, True):
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(9)))
        for block in t.h:
            attn, mlp = block.attn, block.mlp
            if is_replaced:
                attn.forward = torch.zeros_like
            x = x + attn(block.ln_1(x))
            x = x + mlp.c_proj(mlp.gelu(mlp.c_fc(block.ln_2(x))))
            assert (attn.n_head, attn.n_embd, attn.dropout, attn.flash) == (2, 32, 0.0, True)
        torch.testing.assert_close(model.lm_head(t.ln_f(x)), model(idx, idx)[0])


def test_rows_of_ngrams_are_those_that_checkpoints_were_trained_with():
    model = tiny(ngram=4, ngram_rows=16384, vocab_size=50304)
    table = model.transformer.wne
    with torch.no_grad():
        table.weight.zero_()
        table.weight[:, 0] = torch.arange(16384.0)
    ids = [0, 1, 50303, 464, 3290]
    rows = [sum(of_n[t] for of_n in naive.ngram_rows(model.config, ids)) for t in range(5)]
    assert rows == [0, 21297, 29743, 29766, 21176]
    assert table(torch.tensor([ids]))[0, :, 0].tolist() == rows


@pytest.mark.parametrize('seed, rank, iteration, initial, kept', [
    (1337, 0, 1, 5041976786429857533, '001000101001011000110100'),
    (1337, 1, 1, 12319777448205733320, '011110011100100001100000'),
    (-5, 0, 600000, 6303793931323254906, '101010000101111110111010')])
def test_dropout_of_an_iteration_is_what_it_was_when_runs_began(seed, rank, iteration, initial, kept):
    Runtime('cpu', 'float32', False, 'gloo', rank, 2).seed(seed, iteration)
    assert torch.initial_seed() == initial  # of which a CPU uses half
    mask = F.dropout(torch.ones(24), 0.5) > 0
    assert ''.join('01'[bit] for bit in mask.int().tolist()) == kept


# ---------------------------------------------------------------------- initial weights, dropout

@pytest.mark.parametrize('options, spread', [
    ({}, {'c_proj': 0.02 / math.sqrt(8), 'c_attn': 0.02, 'c_fc': 0.02, 'wte': 0.02, 'wpe': 0.02}),
    ({'tie_weights': False, 'ngram': 2}, {
        'lm_head': 0.02, 'wte': 0.02, 'wne': 0.02, 'c_proj': 0.02 / math.sqrt(8)}),
    ({'init': 'zero_proj', 'tie_weights': False, 'ngram': 2}, {
        'lm_head': 128 ** -0.5, 'c_proj': 0.0, 'c_fc': 128 ** -0.5, 'wte': 0.02, 'wne': 0.02}),
    ({'init': 'zero_proj', 'init_gain': 0.5, 'embd_norm': True}, {
        'c_proj': 0.0, 'c_attn': 0.5 * 128 ** -0.5, 'wte': 0.02, 'wpe': 0.02}),
    ({'init': 'zero_proj', 'zero_head': True, 'embd_norm': True, 'tie_weights': False}, {
        'lm_head': 0.0, 'c_proj': 0.0, 'c_fc': 128 ** -0.5, 'wte': 1.0, 'wpe': 1.0}),
    ({'zero_head': True, 'tie_weights': False}, {'lm_head': 0.0, 'c_fc': 0.02, 'wte': 0.02}),
])
def test_initial_weights_have_the_spread_of_the_table(options, spread):
    model = tiny(**{'n_layer': 4, 'n_embd': 128, 'n_head': 4, 'block_size': 128, 'value_residual': True}
                 | options)
    seen = set()
    for name, p in model.named_parameters():
        layer, kind = name.split('.')[-2:]
        if p.dim() == 2 and layer in spread:
            assert abs(p.std().item() - spread[layer]) <= 0.05 * spread[layer], name
            assert abs(p.mean().item()) <= 0.05 * spread[layer], name
            seen.add(layer)
        elif p.dim() == 1:
            assert (p == {'bias': 0.0, 'weight': 1.0}.get(kind, 0.5)).all(), name
    assert seen == set(spread)


def test_dropout_acts_at_each_of_its_places_and_in_training_only():
    model, idx = scrambled(tiny(dropout=0.5)), tokens(4, 32)
    places = {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(places) == 1 + 2 * 2  # after the embeddings; after attention and MLP of two layers
    seen = {}
    for name, m in places.items():
        m.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))
    model(idx, idx)
    assert seen.keys() == places.keys()
    for x, y in seen.values():
        assert 0.4 < (y == 0).float().mean() < 0.6
        torch.testing.assert_close(y[y != 0], 2 * x[y != 0])
    ones = torch.ones(4, 2, 64, 16)
    weights = model.transformer.h[0].attn.attend(ones, ones, ones)
    assert abs(weights.mean() - 1) < 0.1 and weights.std() > 0.1
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


# ---------------------------------------------------------------------------- configurations

@each_option
def test_a_checkpoint_s_arguments_hold_what_differs_and_give_the_model_back(options):
    config = tiny(**options).config
    args = model_args(config)
    seven = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert set(args) == seven | set(options)
    assert config_from_args(args) == config


def test_sizes_that_are_not_given_follow_from_the_others():
    found = [(c.n_kv_head, c.head_size, c.n_inner) for c in (
        GPTConfig(), GPTConfig(n_embd=100, n_head=5, activation='swiglu'))]
    assert found == [(12, 64, 3072), (5, 20, 320)]


@pytest.mark.parametrize('changes, reason', [
    ({'n_embd': 30, 'n_head': 4}, 'n_embd=30 must be a multiple of n_head=4'),
    ({'activation': 'swish'}, 'activation=swish is not one of gelu, gelu_tanh, relu2, swiglu'),
    ({'n_head': 4, 'n_kv_head': 3}, 'n_kv_head=3 must be a divisor of n_head=4'),
    ({'zero_head': True}, 'zero_head=True needs an output layer of its own: tie_weights=False'),
    ({'attn_scale': 0.1, 'attn_type': 'GK'}, 'attn_scale=0.1 is of a softmax'),
    ({'document_end': 65, 'vocab_size': 65}, 'document_end=65 must be -1 or a token'),
    ({'document_end': 0, 'pos_emb': 'alibi'}, 'document_end=0 masks a softmax'),
    ({'attn_type': 'GK', 'pos_emb': 'alibi'}, 'alibi biases a softmax'),
])
def test_what_makes_no_sense_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        GPTConfig(**TINY | changes)
