"""The loss of a few positions at a time: against the whole one, and where it stays out."""

import math

import naive
import pytest
import torch
from conftest import TINY, scrambled, tiny, tokens
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.sampling.quantize import build_quantized
from support.training.loss import ChunkedLoss, lean_loss

RUN = Runtime('cpu', 'float32', False, 'gloo')


def masked_targets(B, T):
    """Targets of which a third don't count, and none of the first text's first half."""
    targets = tokens(B, T).masked_fill(torch.rand(B, T) < 0.3, -1)
    targets[0, :T // 2] = -1
    return targets


def loss_and_gradients(model, idx, targets, scale=1.0, **lean):
    logits, loss = model(idx, targets, **lean)
    assert (logits is None) == bool(lean)
    (loss * scale).backward()
    found = [p.grad / scale for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *found]


@pytest.mark.parametrize('options', [
    {}, {'tie_weights': False, 'logit_softcap': 2.0, 'bias': False}])
def test_loss_and_gradients_are_the_formula_s_for_any_number_of_positions_at_a_time(options):
    model, idx, targets = scrambled(tiny(**options)).double(), tokens(3, 20), masked_targets(3, 20)
    expected = naive.loss(model, idx, targets)
    expected = [expected, *torch.autograd.grad(expected, [*model.parameters()])]
    for rows in (1, 7, 59, 60):
        seen = []
        hook = model.lm_head.register_forward_hook(
            lambda m, args, y, seen=seen: seen.append(y.numel() // 64))
        loss = ChunkedLoss(model, rows * 64 + 63)
        for a, b in zip(loss_and_gradients(model, idx, targets, 3.0, loss=loss), expected):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-9)
        assert max(seen) == rows and sum(seen) == 60
        with torch.no_grad():
            assert math.isclose(model(idx, targets, loss=loss)[1], expected[0], rel_tol=1e-6)
        hook.remove()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_in_16_bits_many_positions_give_the_gradient_of_float64(dtype):
    """Divided by their number too early, it would vanish in float16."""
    model, idx, targets = scrambled(tiny(n_layer=1), 0.1), tokens(128, 32), masked_targets(128, 32)
    exact_model = GPT(model.config).double()
    exact_model.load_state_dict(model.state_dict())
    exact = loss_and_gradients(exact_model, idx, targets)
    for lean in ({}, {'loss': ChunkedLoss(model, 100 * 64)}):
        with torch.autocast('cpu', dtype):
            found = loss_and_gradients(model, idx, targets, 2.0**10, **lean)
        assert abs(found[0] - exact[0]) < 1e-3
        for (name, _), a, b in zip(model.named_parameters(), found[1:], exact[1:]):
            assert (a - b).norm() < 0.03 * b.norm(), (name, (a - b).norm() / b.norm())


# ---------------------------------------------------------------------------- other losses

class Edited(GPT):
    """A GPT whose loss is what `formula` makes of logits, (..., V), and targets."""

    def __init__(self, formula):
        super().__init__(GPTConfig(**TINY))
        self.formula, self.scale = formula, nn.Parameter(torch.tensor(1.5))

    def loss(self, x, targets):
        logits = self.logits(x)
        return logits, self.formula(self, logits, targets)


def each(logits, targets):
    """The loss of each position, 0 for those that don't count, and whether it counts."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction='none')
    return losses.view(targets.shape), targets != -1


def masked_mean(x, keep):
    return (x * keep).sum() / keep.sum()


OTHERS = {
    'a sum': lambda m, z, y: each(z, y)[0].sum(),
    'a power of the mean': lambda m, z, y: masked_mean(*each(z, y)) ** 0.5,
    'a learned temperature': lambda m, z, y: masked_mean(*each(z * m.scale, y)),
    'a penalty of weights': lambda m, z, y: masked_mean(*each(z, y)) + m.transformer.wpe.weight.norm(),
}


@pytest.mark.parametrize('name', OTHERS)
def test_any_other_loss_is_computed_whole_and_a_line_says_so(name, capsys):
    assert lean_loss(Edited(OTHERS[name]), RUN) == {}
    assert capsys.readouterr().out == (
        'loss: computed with all logits in memory, as this model\'s loss is no mean over positions\n')


def test_logits_of_a_large_vocabulary_are_never_all_in_memory():
    """65,536 tokens and 256 positions, in training and evaluation, also of int8 weights."""
    model = scrambled(tiny(vocab_size=65536, n_embd=8, n_layer=1, tie_weights=False), 0.1)
    idx, targets = torch.randint(65536, (8, 32)), torch.randint(65536, (8, 32))
    for m in (model, build_quantized(model.config, model.state_dict().items(), 'int8')):
        whole, seen = m(idx, targets)[1], []
        m.lm_head.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.numel()))
        lean = lean_loss(m, RUN)
        seen.clear()
        torch.testing.assert_close(m(idx, targets, **lean)[1], whole)
        assert sum(seen) == 256 * 65536 and max(seen) <= 2**23
