"""int8 and int4 weights: near the full ones, products against naive ones, read in turn, refused where
they can't be."""

import json
import re

import pytest
import torch
from conftest import TINY, scrambled, tiny
from torch import nn

from support.machine.runtime import Runtime
from support.sampling import quantize
from support.sampling.quantize import Int4Linear, Int8Linear, build_quantized
from support.text.tokenizer import CharTokenizer
from support.training.models import load_model, model_args
from support.training.state import State

CPU = Runtime('cpu', 'float32', False, 'gloo')
MODELS = [{}, {'bias': False, 'tie_weights': False, 'activation': 'swiglu', 'norm': 'rmsnorm'},
          {'pos_emb': 'rope', 'n_kv_head': 1, 'value_residual': True, 'ngram': 2, 'ngram_rows': 64,
           'logit_softcap': 15.0}]
KINDS = {'int8': Int8Linear, 'int4': Int4Linear}
each_model = pytest.mark.parametrize('options', MODELS)
each_kind = pytest.mark.parametrize('kind', KINDS)


def models(kind='int8', **options):
    """A GPT that the context matters to, and the same with smaller weights."""
    full = scrambled(tiny(**options), 0.1).eval()
    return full, build_quantized(full.config, full.state_dict().items(), kind)


def dequantised(full, small):
    """A full GPT with the weights that the smaller ones stand for."""
    model, state = type(full)(full.config).eval(), dict(small.state_dict())
    for name in [name for name in state if name.endswith('.scale')]:
        matrix, scale = name.replace('.scale', '.weight'), state.pop(name)
        state[matrix] = naive_int4(state[matrix], scale) if scale.dim() == 3 else \
            state[matrix] * scale[:, None]
    model.load_state_dict(state)
    return model


def naive_int4(q, scale):
    """Weights, (out, in), of 4-bit numbers and of (in / 32, out, 2) scales and zeros, one by one."""
    scale, q = scale.tolist(), q.tolist()
    return torch.tensor([[scale[i // 32][row][0] * (n - 8) + scale[i // 32][row][1]
                          for i, n in enumerate(numbers)] for row, numbers in enumerate(q)])


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------- the weights

def test_each_weight_is_off_by_half_a_step_at_most():
    weight = torch.randn(6000, 64) * torch.rand(6000, 1) ** 4  # quantised in several pieces
    weight[7] = 0
    int8, scale = quantize.quantize(weight)
    assert int8.dtype == torch.int8 and scale.dtype == torch.float32
    assert ((int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert (int8[7] == 0).all() and (int8.abs().amax(dim=1)[:7] >= 126).all()
    int4, scale = quantize.quantize4(weight[:300])
    assert int4.dtype == torch.uint8 and int4.max() <= 15 and scale.shape == (2, 300, 2)
    # half a step, and what rounding the scales to bfloat16 moves
    groups = weight[:300].unflatten(1, (2, 32))
    step = ((groups.amax(dim=2) - groups.amin(dim=2)) / 15).repeat_interleave(32, dim=1)
    error = (naive_int4(int4, scale) - weight[:300]).abs()
    assert (error <= 0.6 * step + 1e-30).all() and (error <= 0.5 * step).float().mean() > 0.9


@each_model
@each_kind
def test_all_matrices_but_positions_and_ngrams_are_smaller_and_tied_ones_are_shared(kind, options):
    full, small = models(kind, **options)
    assert not [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert {type(small.transformer.h[1].mlp.c_proj), type(small.lm_head)} == {KINDS[kind], Int8Linear}
    floats = {name for name, p in small.named_parameters() if p.dim() > 1 and p.is_floating_point()}
    assert floats <= {'transformer.wpe.weight', 'transformer.wne.weight'}
    assert (small.lm_head.weight is small.transformer.wte.weight) == full.config.tie_weights
    assert {*full.state_dict()} == {name for name in small.state_dict() if not name.endswith('.scale')}


# ---------------------------------------------------------------------------- the products

@each_model
@each_kind
@torch.no_grad()
def test_a_smaller_model_computes_as_its_dequantised_weights_do(kind, options):
    full, small = models(kind, **options)
    same = dequantised(full, small)  # before its weights are brought into a library's order
    for n_rows in (1, 26):
        idx = torch.randint(TINY['vocab_size'], (n_rows, 3))
        logits, _ = small(idx, idx)
        assert logits.dtype == torch.float32
        assert distance(logits, same(idx, idx)[0].double()) < 0.02  # bfloat16 activations
        assert 0 < distance(logits, full(idx, idx)[0].double()) < {'int8': 0.1, 'int4': 0.4}[kind]


def layer_of(kind, linear):
    layer, function = KINDS[kind](linear), {'int8': quantize.quantize, 'int4': quantize.quantize4}[kind]
    layer.weight.data, scale = function(linear.weight)
    layer.scale.data = scale
    return layer


def naive_product(layer, x):
    """In float64, a row of the layer at a time, before its first use."""
    if layer.scale.dim() == 3:
        weight = naive_int4(layer.weight, layer.scale)
    else:
        weight = torch.stack([w * s for w, s in zip(layer.weight, layer.scale)])
    y = torch.stack([(x.double() * w.double()).sum(dim=-1) for w in weight], dim=-1)
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize('kind, n_in, n_out, bound', [
    ('int8', 32, 21, 0.01), ('int8', 33, 21, 0.01),
    ('int8', 1040, 1024, 2e-4),  # more than 2^20 weights: products of digits, exact but for their rounding
    ('int4', 64, 48, 0.01), ('int4', 32, 16, 0.01)])
@pytest.mark.parametrize('n_rows', [1, 5, 32, 33])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_a_layer_of_any_size_gives_the_naive_product_within_rounding(kind, n_in, n_out, bound, n_rows, bias):
    layer = layer_of(kind, nn.Linear(n_in, n_out, bias))
    x = torch.randn(n_rows, 1, 2 * n_in)[..., :n_in]  # not contiguous
    exact = naive_product(layer, x)
    if bound < 0.01 and not layer.has_product():
        pytest.skip('no FBGEMM')
    assert distance(layer.plain_product(x, torch.float32), exact) < 0.01  # of other devices
    for _ in range(2):  # the second time from the library's order
        assert distance(layer(x), exact) < bound  # inputs may be rounded
    if n_rows > 1 and bound < 0.01:
        assert torch.equal(layer(x[:1]), layer(x)[:1])  # whatever other rows there are


@each_model
@each_kind
def test_checkpoint_read_in_turn_gives_the_model_quantised_whole(kind, options, tmp_path):
    full, small = models(kind, **options)
    State(full.state_dict(), model_args(full.config), iter_num=5,
          tokenizer=CharTokenizer.of_text('ab').to_dict()).save(tmp_path / 'ckpt.pt')
    read, _, state = load_model('resume', tmp_path, CPU, kind)
    (tmp_path / 'ckpt.pt').write_bytes(b'')  # nothing is read from the file any more
    ours, theirs = read.state_dict(), small.state_dict()
    assert state.iter_num == 5
    assert {*ours} == {*theirs} and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------- the scripts

def test_fewer_bits_cost_a_trained_model_little_of_its_loss_and_sample_its_words(train, tmp_path, run_here):
    train('--max_iters=60', '--eval_interval=60', '--learning_rate=1e-2', '--n_embd=64', '--log_interval=30')
    args = ('eval.py', f'--out_dir={tmp_path / "out"}', '--device=cpu')
    results = json.loads(run_here(*args, '--task=int8,int4')['log'].splitlines()[-1])['results']
    losses = {'full': results['int8']['loss_full']}
    for kind, percent in (('int8', 0.5), ('int4', 5)):
        costs = results[kind]
        assert costs['loss_full'] == losses['full'] < 2.2 and abs(costs['increase_percent']) < percent
        losses[kind] = costs[f'loss_{kind}']
        assert losses[kind] == pytest.approx(losses['full'] * (1 + costs['increase_percent'] / 100))
    assert len({*losses.values()}) == 3
    for weights, loss in losses.items():
        line = json.loads(run_here(*args, f'--weights={weights}')['log'].splitlines()[-1])
        assert line['results']['loss']['loss'] == loss and line['weights'] == weights
    for kind in KINDS:
        text = run_here('sample.py', *args[1:], f'--weights={kind}', '--max_new_tokens=30')['log']
        assert re.search('king|queen|crown|sword|night|day|love|war', text)
