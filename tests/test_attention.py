"""The attention laboratory: its types against naive.py, and what they promise. test_options.py has
whole models of them, with and without a cache."""

import naive
import pytest
import torch
from conftest import TINY, scrambled, tiny, tokens

from model import GPT, GPTConfig
from support.attention import attention, gaussian_attention

TYPES = ['GK', 'GKpoly-2', 'GKpoly-8', 'PA_gelu', 'PA_relu', 'PA_sigmoid', 'PA_square',
         'PA_relu-square', 'PA_silu', 'PA_tanh']
each_type = pytest.mark.parametrize('attn_type', TYPES)


def attend(attn_type, **settings):
    return attention(GPTConfig(attn_type=attn_type, **settings))


def by_formula(attn_type, q, k, v, **settings):
    """One head of one text at a time, in float64."""
    config, shared = GPTConfig(attn_type=attn_type, **settings), q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    return torch.stack([torch.stack([
        naive.weights(config, h, q_h, k_b[h // shared]) @ v_b[h // shared]
        for h, q_h in enumerate(q_b)]) for q_b, k_b, v_b in zip(q, k, v)])


def qkv(B, nh, T, hs, n_kv_head=None, scale=1.0):
    """Queries, keys and values with gradients: (B, nh, T, hs), (B, n_kv_head, T, hs) twice"""
    heads = (nh, n_kv_head or nh, n_kv_head or nh)
    return [(torch.randn(B, n, T, hs) * scale).requires_grad_() for n in heads]


def assert_close(ours, theirs, bound=1e-5):
    """Within the bound, of the largest value where that is above 1."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs).abs().max().item()
    assert error <= bound * max(1.0, theirs.abs().max().item()), error


SHAPES = [  # (B, nh, T, hs), n_kv_head, size of the vectors
    ((1, 2, 300, 8), None, 1.0), ((2, 4, 12, 5), 2, 3.0), ((3, 1, 1, 16), 1, 0.02)]


@pytest.mark.parametrize('attn_type, pa_norm', [
    *((attn_type, 'length') for attn_type in TYPES), ('PA_gelu', 'block_size'),
    ('PA_gelu', 'none')])
def test_each_type_equals_its_formula_forward_and_backward(attn_type, pa_norm):
    """Also with more queries than are worked on at a time, and for the last of them only."""
    settings = {'pa_norm': pa_norm, 'block_size': 320}
    for shape, n_kv_head, scale in SHAPES:
        ours = qkv(*shape, n_kv_head, scale)
        y, expected = attend(attn_type, **settings)(*ours), by_formula(attn_type, *ours, **settings)
        assert_close(y, expected)
        direction = torch.randn(shape)
        grads = [torch.autograd.grad((out * direction).sum(), ours) for out in (y, expected)]
        for a, b in zip(*grads):
            assert_close(a, b)
        last = attend(attn_type, **settings)(ours[0][:, :, -135:], *ours[1:])
        assert_close(last, expected[:, :, -135:])


@each_type
def test_no_output_depends_on_later_tokens_nor_on_their_number(attn_type):
    q, k, v = (x.detach() for x in qkv(1, 2, 200, 8))
    before = attend(attn_type)(q, k, v)[:, :, :150]
    assert_close(attend(attn_type)(*(x[:, :, :150] for x in (q, k, v))), before.double(), 1e-6)
    for x in (q, k, v):
        x[:, :, 150:] = 7.0
    assert torch.equal(attend(attn_type)(q, k, v)[:, :, :150], before)


@pytest.mark.parametrize('n, error', [(4, 1.7e-2), (8, 1.06e-3), (10, 2.6e-4)])
def test_polynomial_is_as_near_to_the_exponential_as_is_known(n, error):
    x = torch.linspace(-20, 0, 20001)
    k = (-2 * x).sqrt().view(-1, 1, 1, 1)  # of one key each, of one channel
    weights = attend(f'GKpoly-{n}')(torch.zeros_like(k), k, torch.ones_like(k)).flatten()
    assert 0.95 * error < (weights - x.exp()).abs().max().item() < 1.05 * error


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_large_vectors_that_are_near_to_each_other_keep_their_small_distance(dtype):
    """|q|^2 and |k|^2 are 10,000 times what their difference is."""
    q = (torch.randn(1, 1, 64, 32) * 3 + 40).to(dtype)
    k, ones = (q + torch.randn(1, 1, 64, 32).to(dtype) / 4), torch.ones(1, 1, 64, 32, dtype=dtype)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        y = gaussian_attention(q, k, ones)
    assert y.dtype == dtype
    assert_close(y, by_formula('GK', q, k, ones), {torch.float32: 2e-3}.get(dtype, 1e-2))


@each_type
def test_large_and_small_scores_give_no_nan_or_infinity(attn_type):
    q, k, v = qkv(1, 2, 150, 16, scale=100.0)
    y = attend(attn_type, pa_norm='none')(q, k, v)
    if not attn_type.startswith('GKpoly'):  # which grows with 2^n-th powers outside its range
        assert all(x.isfinite().all() for x in (y, *torch.autograd.grad(y.sum(), (q, k, v))))
    with torch.autocast('cpu', torch.bfloat16):
        small = attend(attn_type)(*(x.bfloat16() / 100 for x in (q, k, v)))
    assert small.dtype == torch.bfloat16
    assert_close(small, by_formula(attn_type, *(x.bfloat16() / 100 for x in (q, k, v))), 0.05)


@each_type
def test_dropout_leaves_the_mean_and_drops_weights(attn_type):
    q, k, v = (x.detach() for x in qkv(1, 1, 3, 4))
    several = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    y, draws = attend(attn_type)(q, k, v), attend(attn_type)(*several, 0.5)
    assert_close(draws.mean(dim=0, keepdim=True), y.double(), 0.1)
    first = draws[:, 0, 0]  # of one key: twice as much, or nothing
    assert ((first == 0) | torch.isclose(first, 2 * y[0, 0, 0])).all()
    assert 0.45 < (first == 0).float().mean() < 0.55


@each_type
def test_a_model_of_softmax_is_evaluated_with_each_type_in_both_precisions(attn_type):
    model = scrambled(tiny())
    other = tiny(attn_type=attn_type, qk_norm=True)
    other.load_state_dict(model.state_dict())
    idx = tokens(2, 32)
    exact = other(idx, idx)[1]
    with torch.autocast('cpu', torch.bfloat16):
        assert abs(other(idx, idx)[1] - exact) < 0.03
    assert abs(model(idx, idx)[1] - exact) > 0.003


def test_names_are_accepted_in_any_case_and_others_are_answered_with_the_choices():
    for stored in ('SM', 'GK', 'GKpoly-8', 'GKpoly-20', 'PA_relu', 'PA_relu-square'):
        for name in (stored, stored.lower(), stored.upper()):
            assert GPTConfig(attn_type=name).attn_type == stored
    for name in ('', 'softmax', 'GKpoly', 'GKpoly-', 'GKpoly-21', 'GKpoly--1', 'PA_', 'PA_dropout',
                 'GK-2'):
        with pytest.raises(ValueError, match='one of SM, GK, GKpoly-n .*PA_gelu, .*PA_relu-square'):
            GPTConfig(attn_type=name)


def test_a_shorter_block_size_divides_by_the_shorter_one():
    model = GPT(GPTConfig(**TINY | {'attn_type': 'PA_relu', 'pa_norm': 'block_size'}))
    model.crop_block_size(8)
    idx = tokens(1, 8)
    torch.testing.assert_close(model.double()(idx, idx)[0], naive.logits(model, idx))
