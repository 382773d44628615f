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
from support.sampling.decoding import generate

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason='needs oneDNN')
MODELS = [{}, {'bias': False, 'tie_weights': False, 'activation': 'swiglu', 'pos_emb': 'rope'}]


def runtime(device='cpu', dtype='float32', compile=False):
    return Runtime(device, dtype, compile, 'gloo')


def pair(**options):
    """A model, and a copy with the faster layers."""
    model = scrambled(tiny(**options))
    faster = copy.deepcopy(model)
    use_cpu_linears(faster, runtime(), quiet=True)
    return model, faster


def linears(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


# ---------------------------------------------------------------------------- products

@pytest.mark.parametrize('multiply', [product, OneDNNProduct.apply], ids=['product', 'oneDNN'])
@pytest.mark.parametrize('shape', [(33,), (1, 1, 33), (5, 8, 16), (3, 47, 65)], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_products_and_gradients_equal_float64_within_rounding(multiply, shape, bias):
    *rows, n_out = shape
    given = [torch.randn(*rows, 32), torch.randn(n_out, 32), torch.randn(n_out) if bias else None]
    grad, found = torch.randn(n_out, *rows).movedim(0, -1), []  # not contiguous
    for function, dtype in ((multiply, torch.float32), (F.linear, torch.float64)):
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in given]
        with torch.no_grad():
            without = function(*leaves)
        y = function(*leaves)
        found.append([without, y, *torch.autograd.grad(y, leaves[:2 + bias], grad.to(dtype))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6 * exact.abs().max().item())


@pytest.mark.parametrize('multiply', [product, OneDNNProduct.apply], ids=['product', 'oneDNN'])
def test_frozen_inputs_and_weights_get_no_gradient(multiply):
    for trained in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)]
        for i in trained:
            leaves[i].requires_grad_()
        multiply(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [i in trained for i in range(3)]


def test_other_types_and_autocast_are_computed_as_pytorch_does():
    layer = CPULinear(32, 20)
    plain = nn.Linear(32, 20)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), plain(x))
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(layer.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


# ---------------------------------------------------------------------------- models

@pytest.mark.parametrize('options', MODELS, ids=str)
def test_model_keeps_its_tensors_and_computes_the_same(options, capsys):
    model, faster = pair(**options)
    assert {*linears(model).values()} == {nn.Linear} and {*linears(faster).values()} == {CPULinear}
    assert linears(model).keys() == linears(faster).keys()
    assert (faster.lm_head.weight is faster.transformer.wte.weight) == options.get('tie_weights', True)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in faster.named_parameters()]
    assert [*model.state_dict()] == [*faster.state_dict()]
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
    assert capsys.readouterr().out == ''
    use_cpu_linears(copy.deepcopy(model), runtime())
    use_cpu_linears(faster, runtime())  # a second time there is nothing to do
    assert capsys.readouterr().out.startswith(f'linear layers: {len(linears(model))} of CPULinear')
    assert faster.training and not use_cpu_linears(model.eval(), runtime()) and not model.lm_head.training


class OwnLinear(nn.Linear):
    """Somebody's, which computes something else."""


def changed(layer):
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


def replaced(layer):
    layer.__class__ = OwnLinear


@pytest.mark.parametrize('touch', [
    lambda layer: layer.register_forward_hook(lambda m, x, y: 2 * y),
    lambda layer: layer.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: None), changed, replaced],
    ids=['hook', 'pre-hook', 'backward hook', 'forward', 'class'])
def test_layer_that_is_watched_or_changed_stays(touch):
    model, idx = scrambled(tiny()), tokens(2, 8)
    touch(model.transformer.h[1].mlp.c_fc)
    before, expected = linears(model), model(idx)[0]
    use_cpu_linears(model, runtime(), quiet=True)
    stayed = [name for name, kind in linears(model).items() if kind is before[name]]
    assert stayed == ['transformer.h.1.mlp.c_fc']
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('run', [runtime('cuda'), runtime(dtype='bfloat16'), runtime(compile=True)], ids=str)
def test_other_devices_types_and_compilers_keep_their_layers(run, capsys):
    model = tiny()
    use_cpu_linears(model, run)
    assert {*linears(model).values()} == {nn.Linear} and capsys.readouterr().out == ''


@pytest.mark.parametrize('n_rows', [1, 4])
def test_kept_weights_sample_the_same_and_train_on_their_weights(n_rows):
    model, faster = (m.eval() for m in pair(block_size=12))
    idx = tokens(n_rows, 3)
    keep_weights(faster, n_rows)
    with torch.no_grad():
        torch.testing.assert_close(faster(idx)[0], model(idx)[0], rtol=0, atol=2e-5)
    assert torch.equal(*(generate(m, idx, 30, seeds=range(n_rows)) for m in (model, faster)))
    assert [*model.state_dict()] == [*faster.state_dict()]
    for m in (model, faster):
        with torch.no_grad():
            m.transformer.h[0].mlp.c_fc.weight.mul_(2)
    torch.testing.assert_close(faster(idx)[0], model(idx)[0], rtol=0, atol=2e-5)  # with gradients


def test_products_of_others_stay_exact():
    _, model = pair()
    before = torch.get_float32_matmul_precision()
    model(tokens(3, 32), tokens(3, 32))[1].backward()
    with torch.no_grad():
        model(tokens(3, 32))
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.mkldnn.matmul.fp32_precision in ('none', 'ieee')
