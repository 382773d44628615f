"""model.py's types of attention: against loops in float64, and against what they promise."""

import itertools
import math

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, softmax_attention
from support.attention import attention, gaussian_attention, gaussian_exponent, weighted_attention
from support.training.state import config_from_args, model_args

TYPES = ['SM', 'GK', 'GKpoly-2', 'GKpoly-8', 'PA_gelu', 'PA_relu', 'PA_sigmoid', 'PA_square',
         'PA_relu-square', 'PA_silu']
each_type = pytest.mark.parametrize('attn_type', TYPES)


def attend(attn_type, **settings):
    config = GPTConfig(attn_type=attn_type, **settings)
    return softmax_attention if attn_type == 'SM' else attention(config)


def score(attn_type, q, k):
    """One weight, before the division that PA and SM end with; q, k: (hs,)"""
    dot, d = q @ k / math.sqrt(len(q)), len(q)
    x = -((q - k) ** 2).sum() / (2 * math.sqrt(d))
    kind, _, n = attn_type.partition('-')
    if attn_type.startswith('PA_'):
        return {'gelu': 0.5 * dot * (1 + torch.erf(dot / math.sqrt(2))), 'relu': dot.clamp(min=0),
                'sigmoid': 1 / (1 + torch.exp(-dot)), 'square': dot ** 2, 'silu': dot / (1 + torch.exp(-dot)),
                'relu-square': dot.clamp(min=0) ** 2}[attn_type[3:]]
    if kind == 'GKpoly':
        return (1 + x / 2 ** int(n)) ** (2 ** int(n))
    return torch.exp(dot if kind == 'SM' else x)


def reference(attn_type, q, k, v):
    """Attention written as loops over batch, heads, queries and keys."""
    y = torch.zeros_like(q)
    n_shared, rows = q.shape[1] // k.shape[1], []
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        weights = [score(attn_type, q[b, h, t], k[b, h // n_shared, j]) for j in range(t + 1)]
        total = sum(weights) if attn_type == 'SM' else t + 1 if attn_type.startswith('PA_') else 1
        rows.append(sum(w * v[b, h // n_shared, j] for j, w in enumerate(weights)) / total)
    return torch.stack(rows).view_as(y)


def qkv(*shape, n_kv_head=None, dtype=torch.float32, scale=1.0):
    """Queries, keys and values with gradients: (B, nh, T, hs), (B, n_kv_head, T, hs) twice"""
    B, nh, T, hs = shape
    return [(torch.randn(B, n, T, hs) * scale).to(dtype).requires_grad_()
            for n in (nh, n_kv_head or nh, n_kv_head or nh)]


def assert_close(ours, theirs, bound=1e-5):
    """Within the bound, of the largest value where that is above 1."""
    error = (ours.double() - theirs).abs().max().item()
    assert error <= bound * max(1.0, theirs.abs().max().item()), error


@pytest.mark.parametrize('shape, n_kv_head', [((2, 2, 7, 16), None), ((1, 4, 12, 8), 2), ((3, 1, 1, 5), None),
                                              ((1, 1, 33, 64), None)])
@each_type
def test_each_type_equals_loops_in_float64_forward_and_backward(attn_type, shape, n_kv_head):
    ours = qkv(*shape, n_kv_head=n_kv_head)
    exact = [x.detach().double().requires_grad_() for x in ours]
    y, y_exact = attend(attn_type)(*ours), reference(attn_type, *exact)
    assert_close(y, y_exact)
    direction = torch.randn(shape)
    y.backward(direction)
    y_exact.backward(direction.double())
    for x, x_exact in zip(ours, exact):
        assert_close(x.grad, x_exact.grad)


@each_type
def test_more_queries_than_are_worked_on_at_a_time_equal_them_all_at_once(attn_type):
    q, k, v = qkv(1, 2, 300, 16, dtype=torch.float64)
    whole = attend(attn_type)
    if attn_type in ('SM', 'GK'):
        pytest.skip('not computed in parts')
    y = whole(q, k, v)
    grads = torch.autograd.grad(y.square().sum(), (q, k, v))
    y_whole = weighted_attention(q, k, v, weigh=whole.keywords['weigh'], rows=300)
    for a, b in zip((y, *grads), (y_whole, *torch.autograd.grad(y_whole.square().sum(), (q, k, v)))):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize('scale', [0.02, 1.0, 5.0])
def test_the_gaussian_kernel_by_a_softmax_equals_that_by_its_weights(scale):
    q, k, v = qkv(2, 2, 150, 32, scale=scale)
    by_weights = attend('GKpoly-2').func(q.double(), k.double(), v.double(), weigh=lambda q, k, t:
                                         gaussian_exponent(q, k).exp())
    assert_close(gaussian_attention(q, k, v), by_weights)


@each_type
def test_the_cache_gives_what_the_whole_window_gives(attn_type):
    q, k, v = (x.detach() for x in qkv(2, 2, 140, 8))
    f, cache, parts = attend(attn_type), KVCache(140), []
    for new in (slice(0, 135), *(slice(t, t + 1) for t in range(135, 140))):
        keys, values, mask = cache.append(0, k[:, :, new], v[:, :, new])
        parts.append(f(q[:, :, new], keys, values, 0.0, mask))
        cache.advance(new.stop - new.start)
    assert_close(torch.cat(parts, dim=2), f(q.double(), k.double(), v.double()))


@pytest.mark.parametrize('pa_norm', ['length', 'none'])
@each_type
def test_no_output_depends_on_later_tokens(attn_type, pa_norm):
    f = attend(attn_type, pa_norm=pa_norm)
    q, k, v = (x.detach() for x in qkv(1, 2, 200, 8))
    before = f(q, k, v)
    for x in (q, k, v):
        x[:, :, 150:] = 7.0
    assert torch.equal(f(q, k, v)[:, :, :150], before[:, :, :150])
    shorter = f(*(x[:, :, :150] for x in (q, k, v)))  # the length of the window doesn't matter either
    assert_close(shorter, before[:, :, :150].double(), 1e-6)


@pytest.mark.parametrize('pa_norm, lengths', [('length', [1, 2, 3, 4]), ('block_size', [32] * 4),
                                              ('none', [1] * 4)])
def test_pointwise_weights_are_divided_by_what_pa_norm_says(pa_norm, lengths):
    q, k, v = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 1)
    y = attend('PA_relu', pa_norm=pa_norm, block_size=32)(q, k, v)
    expected = [2.0 * (t + 1) / length for t, length in enumerate(lengths)]  # each weight is 4 / sqrt(4)
    assert torch.allclose(y.flatten(), torch.tensor(expected))


@pytest.mark.parametrize('n, error', [(4, 1.7e-2), (8, 1.06e-3), (10, 2.6e-4)])
def test_polynomial_is_as_near_to_the_exponential_as_is_known(n, error):
    x = torch.linspace(-20, 0, 20001, dtype=torch.float64)
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    weights = attend(f'GKpoly-{n}').keywords['weigh'](q, (-2 * x).sqrt().view(1, 1, -1, 1), None)
    worst = (weights.flatten() - x.exp()).abs().max().item()
    assert 0.95 * error < worst < 1.05 * error


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_squared_distances_are_exact_and_not_negative_under_autocast(dtype):
    q = (torch.randn(1, 1, 64, 32) * 30 + 100).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        x = gaussian_exponent(q, q)
        y = gaussian_attention(q[:, :, :1].repeat(1, 1, 2, 1), q[:, :, :1].repeat(1, 1, 2, 1),
                               torch.ones(1, 1, 2, 32, dtype=dtype))
    assert x.dtype == torch.float32 and x.max() <= 0
    exact = -(q.double()[:, :, :, None] - q.double()[:, :, None]).square().sum(dim=-1) / (2 * 32 ** 0.5)
    scale = q.double().square().sum(-1).max()  # float32's rounding of the squares is all that is lost
    assert (x - exact).abs().max() < 1e-6 * scale
    assert (y[:, :, 0] - 1).abs().max() < 0.02 and (y[:, :, 1] - 2).abs().max() < 0.04


@each_type
def test_large_scores_give_no_nan_or_infinity(attn_type):
    q, k, v = qkv(1, 2, 150, 16, scale=100.0)
    y = attend(attn_type, pa_norm='none')(q, k, v)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    if not attn_type.startswith('GKpoly'):  # which grows with 2^n-th powers outside its range
        assert all(x.isfinite().all() for x in (y, *grads))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        small = attend(attn_type)(*(x.bfloat16() / 100 for x in (q, k, v)))
    assert small.isfinite().all() and small.dtype == torch.bfloat16


@pytest.mark.parametrize('options', [{}, {'qk_norm': True, 'pos_emb': 'rope'}])
@each_type
def test_bfloat16_changes_a_loss_by_rounding_only(attn_type, options):
    model = GPT(GPTConfig(**TINY | {'attn_type': attn_type} | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    idx = torch.randint(64, (2, 32))
    exact = model(idx, idx)[1]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(idx, idx)[1]
    assert abs(loss - exact) < 0.03


@each_type
def test_dropout_leaves_the_mean_and_drops_weights(attn_type):
    q, k, v = (x.detach() for x in qkv(1, 1, 3, 4))
    f = attend(attn_type)
    draws = torch.stack([f(q, k, v, 0.5) for _ in range(2000)])
    spread = f(q, k, v.abs()).abs().max()
    assert (draws.mean(dim=0) - f(q, k, v)).abs().max() < 0.15 * spread.clamp(min=1)
    assert draws.std(dim=0).max() > 0


@each_type
def test_a_compiled_model_equals_it(attn_type):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**TINY | {'n_layer': 1, 'attn_type': attn_type}))
    idx = torch.randint(64, (2, 16))
    loss = model(idx, idx)[1]
    compiled = torch.compile(model, backend='aot_eager')(idx, idx)[1]
    assert torch.allclose(loss, compiled, atol=1e-6)


@pytest.mark.parametrize('name, stored', [('sm', 'SM'), ('gk', 'GK'), ('GKPOLY-8', 'GKpoly-8'),
                                          ('pa_ReLU', 'PA_relu'), ('Pa_Relu-Square', 'PA_relu-square')])
def test_names_are_accepted_in_any_case(name, stored):
    assert GPTConfig(attn_type=name).attn_type == stored


@pytest.mark.parametrize('name', ['', 'softmax', 'GKpoly', 'GKpoly-', 'GKpoly-21', 'GKpoly--1', 'PA_',
                                  'PA_softmax', 'PA_dropout', 'PA_nonsense', 'GK-2'])
def test_unknown_names_list_the_choices(name):
    with pytest.raises(ValueError, match='not one of SM, GK, GKpoly-n .*PA_gelu, PA_relu, .*PA_relu-square'):
        GPTConfig(attn_type=name)


def test_alibi_goes_with_a_softmax_only():
    with pytest.raises(ValueError, match='alibi'):
        GPTConfig(attn_type='GK', pos_emb='alibi')


@each_type
def test_the_default_checkpoint_loads_under_each_type(attn_type):
    model = GPT(GPTConfig(**TINY))
    other = GPT(GPTConfig(**TINY | {'attn_type': attn_type}))
    other.load_state_dict(model.state_dict())
    assert ('attn_type' in model_args(other.config)) == (attn_type != 'SM')
    assert config_from_args(model_args(other.config)) == other.config


def test_a_shorter_block_size_divides_by_the_shorter_one():
    model = GPT(GPTConfig(**TINY | {'attn_type': 'PA_relu', 'pa_norm': 'block_size'}))
    model.crop_block_size(8)
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())
    idx = torch.randint(64, (1, 8))
    assert torch.equal(model(idx)[0], again(idx)[0])


def test_softmax_is_pytorchs_own():
    q, k, v = qkv(1, 2, 9, 8)
    assert torch.equal(attend('SM')(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
