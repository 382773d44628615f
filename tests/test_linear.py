"""matmul.py: faster products compute the same, wherever they are used."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from model import GPT, GPTConfig, softmax_attention
from support.machine import hardware
from support.machine.runtime import Runtime
from support.sampling.decoding import generate
from support.training.loss import checkpoint_activations, use_lean_loss
from support.machine.linear import (OneDNNAttention, OneDNNLinear, attend_at_once, onednn_forward,
                                    use_fast_products)

FLOAT32, BFLOAT16 = (Runtime('cpu', dtype, False, 'gloo') for dtype in ('float32', 'bfloat16'))


@pytest.fixture
def products(monkeypatch):
    """Chooses the library of float32 products."""
    def choose(library):
        monkeypatch.setenv('FLOAT32_PRODUCTS', library)
        hardware.measure_onednn.cache_clear()
    yield choose
    monkeypatch.undo()
    hardware.measure_onednn.cache_clear()


def is_attached(model):
    return getattr(model.transformer.h[0].mlp.c_fc.__dict__.get('forward'), 'func', None) is onednn_forward


@pytest.mark.parametrize('shape', [(5, 8, 16), (3, 7, 65), (1, 1, 33)])
@pytest.mark.parametrize('bias', [True, False])
def test_gradients_equal_float64_within_rounding(shape, bias):
    B, T, n_out = shape
    x, w = torch.randn(B, T, 32, requires_grad=True), torch.randn(n_out, 32, requires_grad=True)
    b = torch.randn(n_out, requires_grad=True) if bias else None
    grad = torch.randn(B, T, n_out)
    y = OneDNNLinear.apply(x, w, b)
    found = [y, *torch.autograd.grad(y, [t for t in (x, w, b) if t is not None], grad)]
    exact = [t.detach().double().requires_grad_() for t in (x, w, b) if t is not None]
    y = torch.nn.functional.linear(*exact)
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


@pytest.mark.skipif(not hardware.measure_onednn()[0], reason='oneDNN rounds float32 products here')
@pytest.mark.parametrize('n_kv_head', [4, 2, 1])
@pytest.mark.parametrize('T', [1, 2, 33])
def test_attention_by_whole_products_equals_float64_within_rounding(n_kv_head, T):
    q, k, v = (torch.randn(3, n, T, 8, requires_grad=True) for n in (4, n_kv_head, n_kv_head))
    grad = torch.randn(3, T, 4, 8).transpose(1, 2)  # as attention's output is used
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    found, expected = OneDNNAttention.apply(q, k, v), softmax_attention(*exact)
    found.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=1e-5)


def test_attention_is_left_to_pytorch_where_scores_are_many_masked_dropped_or_no_gradient_is_wanted():
    q, calls = torch.randn(1, 1, 4, 8, requires_grad=True), []

    def attend(*args):
        calls.append(args)
        return args[0]

    long, mask = torch.randn(1, 2, 1500, 1), torch.zeros(4, 4)
    attend_at_once(attend, q, q, q)
    assert not calls
    with torch.no_grad():
        attend_at_once(attend, q, q, q)
    for args in ((q, q, q, 0.1), (q, q, q, 0.0, mask), (long, long, long)):
        attend_at_once(attend, *args)
    assert len(calls) == 4 and calls[2][4] is mask


def test_frozen_weights_and_inputs_get_no_gradient():
    x, w, b = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)
    OneDNNLinear.apply(x, w, b).sum().backward()
    assert x.grad is None and w.grad is not None and b.grad is not None
    x.requires_grad_()
    OneDNNLinear.apply(x, w.detach(), b.detach()).sum().backward()
    assert x.grad is not None


def test_a_hundred_iterations_equal_the_plain_path(products, train):
    """Both choices, forced; the losses that the log rounds are compared before they are rounded."""
    found = {}
    for library in ('default', 'onednn'):
        products(library)
        script = train('--max_iters=100', '--eval_interval=100', '--dropout=0.1', '--learning_rate=1e-2')
        assert is_attached(script['model']) == (library == 'onednn' and torch.backends.mkldnn.is_available())
        assert f'products: {"onednn" if is_attached(script["model"]) else "default"}' in script['log']
        found[library] = [*script['losses'].values(), script['loss'].item()]
    assert found['default'] == pytest.approx(found['onednn'], abs=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
def test_resumed_run_multiplies_by_the_library_of_its_start(products, train, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, 'measure_onednn', lambda: (True, True))
    monkeypatch.setenv('FLOAT32_PRODUCTS', 'default')
    assert train('--max_iters=4')['config']['products'] == 'default'
    monkeypatch.delenv('FLOAT32_PRODUCTS')
    script = train('--max_iters=6', '--init_from=resume')
    assert 'float32 products: default, as before the stop\n' in script['log']
    assert not is_attached(script['model']) and script['config']['products'] == 'default'
    assert is_attached(train('--max_iters=1', out_dir=tmp_path / 'new')['model'])


@pytest.mark.parametrize('attach', [lambda model: None, use_lean_loss, checkpoint_activations])
def test_they_go_with_either_loss_and_activation_checkpointing(products, attach):
    products('onednn')
    idx, grads = torch.randint(64, (3, 32)), []
    for fast in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**TINY, pos_emb='rope', activation='swiglu', n_kv_head=1))
        attach(model)
        if fast:
            use_fast_products(model, FLOAT32)
        model(idx, idx)[1].backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_attention_in_float32_under_bfloat16_computes_the_same():
    idx, losses = torch.randint(64, (3, 32)), []
    for fast in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**TINY))
        if fast:
            use_fast_products(model, BFLOAT16)
        with BFLOAT16.autocast():
            loss = model(idx, idx)[1]
        loss.backward()
        losses.append(torch.cat([loss.detach()[None], model.transformer.h[0].attn.c_attn.weight.grad[0]]))
    assert not torch.equal(*losses)  # attention was rounded less
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)


def test_sampling_uses_its_own_kernels_and_leaves_the_training_s(products):
    products('onednn')
    model, idx = GPT(GPTConfig(**TINY)).eval(), torch.randint(64, (2, 5))
    expected = generate(model, idx, 20, temperature=0)
    use_fast_products(model, FLOAT32)
    assert torch.equal(generate(model, idx, 20, temperature=0), expected) and is_attached(model)
    with torch.no_grad():
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)


@pytest.mark.parametrize('device, compile', [('cuda', False), ('cpu', True)])
def test_other_devices_and_compilers_are_left_alone(products, device, compile):
    products('onednn')
    model = GPT(GPTConfig(**TINY))
    use_fast_products(model, Runtime(device, 'float32', compile, 'gloo'))
    assert not is_attached(model)


@pytest.mark.parametrize('where, name', [(torch.Tensor, '__matmul__'), (torch, 'baddbmm')])
def test_a_library_that_rounds_more_is_not_taken(where, name, monkeypatch):
    exact = getattr(where, name)

    class Rounding:
        """What AMX does under the flag, with attention's products only on some machines."""
        def __enter__(self):
            monkeypatch.setattr(where, name, lambda *args: exact(*(t.bfloat16() for t in args)).float())

        def __exit__(self, *_):
            monkeypatch.undo()

    for wanted in ('', 'onednn'):
        monkeypatch.setenv('FLOAT32_PRODUCTS', wanted)
        monkeypatch.setattr(hardware, 'OneDNN', Rounding)
        hardware.measure_onednn.cache_clear()
        assert not hardware.prefers_onednn()
    hardware.measure_onednn.cache_clear()


def test_flag_is_put_back_and_an_unknown_choice_is_refused():
    before = torch.get_float32_matmul_precision()
    with hardware.OneDNN():
        pass
    assert torch.get_float32_matmul_precision() == before
    done = subprocess.run([sys.executable, 'bench.py', '--device=cpu'], cwd=ROOT, text=True,
                          env=os.environ | {'FLOAT32_PRODUCTS': 'mkl'}, capture_output=True)
    message = 'ValueError: FLOAT32_PRODUCTS=mkl is not one of onednn, default\n'
    assert done.returncode and done.stderr == message
