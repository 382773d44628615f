"""linear.py: layers that multiply faster on a CPU, and compute what the model's own do."""

import copy

import pytest
import torch
from conftest import scrambled, tiny, tokens
from torch import nn
from torch.nn import functional as F

from support.machine.linear import (HAS_ONEDNN, CPULinear, OneDNNProduct, keep_weights, product,
                                    use_cpu_linears)
from support.machine.runtime import Runtime

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason='needs oneDNN')


RUN = Runtime('cpu', 'float32', False, 'gloo')


def pair(**options):
    """A model, and a copy with the faster layers."""
    model = scrambled(tiny(**options))
    faster = copy.deepcopy(model)
    use_cpu_linears(faster, RUN, quiet=True)
    return model, faster


def linears(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize('multiply', [product, OneDNNProduct.apply], ids=['product', 'oneDNN'])
@pytest.mark.parametrize('shape', [  # the last ones: more than 2^18 weights, of one row, several and many
    (33, 32), (1, 1, 33, 32), (5, 8, 16, 32), (3, 47, 65, 32), (1, 530, 520), (3, 2, 530, 520),
    (70, 530, 520)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_products_and_gradients_equal_float64_within_rounding(multiply, shape, bias):
    *rows, n_out, n_in = shape
    given = [torch.randn(*rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out) if bias else None]
    grad, found = torch.randn(n_out, *rows).movedim(0, -1), []  # not contiguous
    for function, dtype in ((multiply, torch.float32), (F.linear, torch.float64)):
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in given]
        with torch.no_grad():
            without = function(*leaves)
        y = function(*leaves)
        found.append([without, y, *torch.autograd.grad(y, leaves[:2 + bias], grad.to(dtype))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6 * exact.abs().max().item())


@pytest.mark.parametrize('numbers', [
    'float32', 'float16', 'bfloat16', 'bfloat16 file', 'bfloat16 large file', 'large', 'tiny'])
@pytest.mark.parametrize('n_rows', [1, 3, 40])
@torch.no_grad()
def test_a_large_layer_gives_the_naive_product_whatever_the_numbers_of_its_kept_weights(n_rows, numbers):
    layer = CPULinear(530, 520)
    weight, kind = layer.weight, getattr(torch, numbers.split()[0], torch.float32)
    scale = {'large': 1e7, 'tiny': 1e-6, 'bfloat16 large file': 1e7}.get(numbers, 1)
    weight.copy_((scale * weight).to(kind))
    layer.bias.mul_(scale)
    x = torch.randn(n_rows, 1, 2 * 530)[..., :530]  # not contiguous
    exact = torch.stack([(x.double() * w.double()).sum(dim=-1) for w in weight], dim=-1) + layer.bias
    if 'file' in numbers:
        layer.weight = nn.Parameter(weight.to(kind))
    before = layer(x)
    keep_weights(nn.Sequential(layer), n_rows, n_steps=500)
    for found in (before, layer(x), layer(x.repeat(50, 1, 1))[:n_rows]):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize('options', [
    {}, {'bias': False, 'tie_weights': False, 'activation': 'swiglu', 'pos_emb': 'rope'}], ids=str)
def test_model_keeps_its_tensors_and_trains_the_same(options):
    model, faster = pair(**options)
    assert {*linears(faster).values()} == {CPULinear}
    assert (faster.lm_head.weight is faster.transformer.wte.weight) == options.get('tie_weights', True)
    assert all(torch.equal(t, faster.state_dict()[n]) for n, t in model.state_dict().items())
    opts = [m.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu') for m in (model, faster)]
    for _ in range(10):
        idx, losses = tokens(3, 32), []
        for m, opt in zip((model, faster), opts):
            losses.append(m(idx, idx)[1])
            opt.zero_grad()
            losses[-1].backward()
            opt.step()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_layer_that_is_watched_stays():
    model, idx = scrambled(tiny()), tokens(2, 8)
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda m, x, y: 2 * y)
    before, expected = linears(model), model(idx)[0]
    use_cpu_linears(model, RUN, quiet=True)
    stayed = [name for name, kind in linears(model).items() if kind is before[name]]
    assert stayed == ['transformer.h.1.mlp.c_fc']
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-5)


def test_kept_weights_compute_the_same_and_train_on_their_weights():
    model, faster = (m.eval() for m in pair(block_size=12))
    idx = tokens(4, 3)
    keep_weights(faster, 4, n_steps=500)
    with torch.no_grad():
        torch.testing.assert_close(faster(idx)[0], model(idx)[0], rtol=0, atol=2e-5)
    for m in (model, faster):
        with torch.no_grad():
            m.transformer.h[0].mlp.c_fc.weight.mul_(2)
    torch.testing.assert_close(faster(idx)[0], model(idx)[0], rtol=0, atol=2e-5)  # with gradients
