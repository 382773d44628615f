"""The attention laboratory: its types against naive.py, and what they promise. test_options.py has
whole models of them, with and without a cache."""

import naive
import pytest
import torch
from conftest import TINY, tokens

from model import GPT, GPTConfig
from support.attention import attention

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
        naive.weights(config, h, q_h, k_b[h // shared], seen=None) @ v_b[h // shared]
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


@pytest.mark.parametrize('attn_type, pa_norm', [
    *((attn_type, 'length') for attn_type in TYPES), ('PA_gelu', 'block_size'), ('PA_gelu', 'none')])
def test_each_type_equals_its_formula_forward_and_backward(attn_type, pa_norm):
    """Also with more queries than are worked on at a time, and for the last of them only."""
    settings = {'pa_norm': pa_norm, 'block_size': 320}
    for shape, n_kv_head, scale in (((1, 2, 300, 8), None, 1.0), ((2, 4, 12, 5), 2, 3.0),
                                    ((3, 1, 1, 16), 1, 0.02)):
        ours = qkv(*shape, n_kv_head, scale)
        y, expected = attend(attn_type, **settings)(*ours), by_formula(attn_type, *ours, **settings)
        assert_close(y, expected)
        direction = torch.randn(shape)
        grads = [torch.autograd.grad((out * direction).sum(), ours) for out in (y, expected)]
        for a, b in zip(*grads):
            assert_close(a, b)
        last = attend(attn_type, **settings)(ours[0][:, :, -135:], *ours[1:])
        assert_close(last, expected[:, :, -135:])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_large_vectors_that_are_near_to_each_other_keep_their_small_distance(dtype):
    """|q|^2 and |k|^2 are 10,000 times what their difference is."""
    q = (torch.randn(1, 1, 64, 32) * 3 + 40).to(dtype)
    k, ones = (q + torch.randn(1, 1, 64, 32).to(dtype) / 4), torch.ones(1, 1, 64, 32, dtype=dtype)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        y = attend('GK')(q, k, ones)
    assert y.dtype == dtype
    assert_close(y, by_formula('GK', q, k, ones), {torch.float32: 2e-3}.get(dtype, 1e-2))


@each_type
def test_dropout_leaves_the_mean_and_drops_weights(attn_type):
    q, k, v = (x.detach() for x in qkv(1, 1, 3, 4))
    several = [x.expand(4000, -1, -1, -1) for x in (q, k, v)]
    y, draws = attend(attn_type)(q, k, v), attend(attn_type)(*several, 0.5)
    assert_close(draws.mean(dim=0, keepdim=True), y.double(), 0.1)
    first = draws[:, 0, 0]  # of one key: twice as much, or nothing
    assert ((first == 0) | torch.isclose(first, 2 * y[0, 0, 0])).all()


def test_names_are_accepted_in_any_case_and_others_are_answered_with_the_choices():
    for stored in ('SM', 'GK', 'GKpoly-8', 'GKpoly-20', 'PA_relu', 'PA_relu-square'):
        for name in (stored, stored.lower(), stored.upper()):
            assert GPTConfig(attn_type=name).attn_type == stored
    for name in ('softmax', 'GKpoly-', 'GKpoly-21', 'PA_dropout'):
        with pytest.raises(ValueError, match='one of SM, GK, GKpoly-n .*PA_gelu, .*PA_relu-square'):
            GPTConfig(attn_type=name)


def test_a_shorter_block_size_divides_by_the_shorter_one():
    model = GPT(GPTConfig(**TINY | {'attn_type': 'PA_relu', 'pa_norm': 'block_size'}))
    model.crop_block_size(8)
    idx = tokens(1, 8)
    torch.testing.assert_close(model.double()(idx, idx)[0], naive.logits(model, idx))
