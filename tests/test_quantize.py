"""int8 weights: near the full ones, the same by every product, read in turn, refused where they can't be."""

import json
import re

import pytest
import torch
from conftest import TINY, scrambled, tiny
from torch import nn

from support.machine.runtime import Runtime
from support.sampling import quantize
from support.sampling.decoding import generate
from support.sampling.quantize import Int8Linear, build_quantized
from support.text.tokenizer import CharTokenizer
from support.training.loss import lean_loss
from support.training.models import load_model, model_args
from support.training.state import State

CPU = Runtime('cpu', 'float32', False, 'gloo')
MODELS = [{}, {'bias': False, 'tie_weights': False, 'activation': 'swiglu', 'norm': 'rmsnorm'},
          {'pos_emb': 'rope', 'n_kv_head': 1, 'value_residual': True, 'ngram': 2, 'ngram_rows': 64,
           'logit_softcap': 15.0}]


def models(**options):
    """A GPT that the context matters to, and the same in int8."""
    full = scrambled(tiny(**options), 0.1).eval()
    return full, build_quantized(full.config, full.state_dict().items(), 'int8')


def dequantised(full, int8):
    """A full GPT with the weights that int8 stands for."""
    model, state = type(full)(full.config).eval(), dict(int8.state_dict())
    for name in [name for name in state if name.endswith('.scale')]:
        matrix, scale = name.replace('.scale', '.weight'), state.pop(name)
        state[matrix] = state[matrix] * scale[:, None]
    model.load_state_dict(state)
    return model


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------- the weights

def test_each_weight_is_off_by_half_a_step_of_its_row_at_most():
    weight = torch.randn(6000, 50) * torch.rand(6000, 1) ** 4  # quantised in several pieces
    weight[7] = 0
    int8, scale = quantize.quantize(weight)
    assert int8.dtype == torch.int8 and scale.dtype == torch.float32
    highest = weight.abs().amax(dim=1)
    assert ((0.9999 * highest <= scale * 127) & (scale * 127 <= 1.01 * highest + 1e-30)).all()
    assert torch.equal(scale, scale.bfloat16().float())
    assert ((int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert (int8[7] == 0).all() and (int8.abs().amax(dim=1)[:7] >= 126).all()


def test_transposed_and_half_precision_weights_are_quantised_as_their_copies_are():
    weight = torch.randn(40, 30).bfloat16()
    for ours, theirs in zip(quantize.quantize(weight.T), quantize.quantize(weight.T.float().contiguous())):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


@pytest.mark.parametrize('options', MODELS)
def test_all_matrices_but_positions_and_ngrams_are_int8_and_tied_ones_are_shared(options):
    full, int8 = models(**options)
    assert not [m for m in int8.modules() if isinstance(m, nn.Linear)]
    floats = {name for name, p in int8.named_parameters() if p.dim() > 1 and p.dtype != torch.int8}
    assert floats <= {'transformer.wpe.weight', 'transformer.wne.weight'}
    assert (int8.lm_head.weight is int8.transformer.wte.weight) == full.config.tie_weights
    assert int8.get_num_params() == full.get_num_params()
    assert not int8.training and not [p for p in int8.parameters() if p.requires_grad or p.is_meta]
    assert {*full.state_dict()} == {name for name in int8.state_dict() if not name.endswith('.scale')}


# ---------------------------------------------------------------------------- the products

@pytest.mark.parametrize('options', MODELS)
@pytest.mark.parametrize('n_rows', [3, 80])
@torch.no_grad()
def test_int8_model_computes_what_its_dequantised_weights_do(options, n_rows):
    full, int8 = models(**options)
    same, idx = dequantised(full, int8), torch.randint(TINY['vocab_size'], (n_rows // 3, 3))
    logits, _ = int8(idx, idx)
    assert logits.dtype == torch.float32
    assert distance(logits, same(idx, idx)[0]) < 0.02  # bfloat16 activations
    assert 0 < distance(logits, full(idx, idx)[0]) < 0.1


def int8_layer(linear):
    layer = Int8Linear(linear)
    layer.weight.data, layer.scale = quantize.quantize(linear.weight)
    return layer


@pytest.mark.parametrize('n_in', [32, 40, 33, 1])  # the packed product would read beyond 40, 33 and 1
@pytest.mark.parametrize('n_rows', [1, 5, 32, 33])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_a_layer_of_any_size_gives_the_product_in_float64_within_rounding(n_in, n_rows, bias):
    linear = nn.Linear(n_in, 21, bias)
    layer, x = int8_layer(linear), torch.randn(n_rows, 1, 2 * n_in)[..., :n_in]  # not contiguous
    exact = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T  # before its first use
    exact = exact + linear.bias.double() if bias else exact
    assert distance(layer(x).double(), exact) < 0.01  # inputs may be rounded


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('n_rows', [2, 40])
@torch.no_grad()
def test_autocast_gives_the_type_of_a_layer_and_large_sums_stay_finite(dtype, n_rows):
    linear = nn.Linear(512, 16)
    linear.weight.data.fill_(0.01)
    x = torch.full((n_rows, 512), 4.0)  # 512 * 4 * 127 exceeds float16
    with torch.autocast('cpu', dtype=dtype):
        y = int8_layer(linear)(x)
    assert y.dtype == dtype and distance(y.float(), linear(x)) < 0.01


@torch.no_grad()
def test_loss_in_parts_is_that_of_all_logits():
    _, int8 = models()
    idx = torch.randint(TINY['vocab_size'], (4, 32))
    lean = lean_loss(int8, CPU)['loss']
    lean.chunk = 10 * TINY['vocab_size']
    logits, loss = int8(idx, idx, loss=lean)
    assert logits is None and loss.item() == pytest.approx(int8(idx, idx)[1].item(), rel=2e-3)


def test_training_is_refused():
    _, int8 = models()
    idx = torch.randint(TINY['vocab_size'], (2, 8))
    int8.transformer.wpe.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match='not for training'):
        int8(idx, idx)


@pytest.mark.parametrize('options', [{}, {'n_embd': 40}])  # 40: not by the packed product
def test_generating_continues_as_the_dequantised_model_does(options):
    full, int8 = models(**options)
    idx = torch.randint(TINY['vocab_size'], (1, 5))
    same = dequantised(full, int8)  # before its weights are brought into a library's order
    ours = generate(int8, idx, 40, temperature=0)
    assert ours.shape == (1, 45)
    for t in range(5, 45):  # past block_size too
        logits = same(ours[:, max(0, t - 32):t])[0][0, -1]
        assert logits.max() - logits[ours[0, t]] < 0.1 * logits.std()


# ---------------------------------------------------------------------------- reading

@pytest.mark.parametrize('options', MODELS)
def test_checkpoint_read_in_turn_gives_the_model_quantised_whole(options, tmp_path):
    full, int8 = models(**options)
    State(full.state_dict(), model_args(full.config), iter_num=5,
          tokenizer=CharTokenizer.of_text('ab').to_dict()).save(tmp_path / 'ckpt.pt')
    read, _, state = load_model('resume', tmp_path, CPU, 'int8')
    ours, theirs = read.state_dict(), int8.state_dict()
    assert state.iter_num == 5
    assert {*ours} == {*theirs} and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (tmp_path / 'ckpt.pt').write_bytes(b'')  # nothing is read from the file any more
    assert all(torch.equal(read.state_dict()[name], theirs[name]) for name in ours)


def test_tensors_of_another_shape_are_refused():
    full, _ = models()
    state = full.state_dict()
    state['transformer.h.0.mlp.c_fc.weight'] = torch.zeros(5, 32)
    with pytest.raises(RuntimeError, match='size mismatch'):
        build_quantized(full.config, state.items(), 'int8')
    with pytest.raises(RuntimeError, match='Missing key'):
        build_quantized(full.config, list(full.state_dict().items())[:-3], 'int8')


def test_folder_of_transformers_gives_its_gpt2_in_int8(gpt2_folder, bpe):
    full, _, _ = load_model(str(gpt2_folder), '', CPU)
    read, _, state = load_model(str(gpt2_folder), '', CPU, 'int8')
    theirs = build_quantized(full.config, full.state_dict().items(), 'int8').state_dict()
    assert state.iter_num is None and read.config == full.config and not read.training
    assert all(torch.equal(t, theirs[name]) for name, t in read.state_dict().items())


# ---------------------------------------------------------------------------- the scripts

@pytest.fixture
def trained(train, tmp_path):
    """The folder of a model that has learned the words of the small data."""
    train('--max_iters=60', '--eval_interval=60', '--learning_rate=1e-2', '--n_embd=48', '--log_interval=30')
    return tmp_path / 'out'


def test_int8_costs_a_trained_model_less_than_half_a_percent_of_its_loss(trained, run_here):
    args = ('eval.py', f'--out_dir={trained}', '--device=cpu')
    costs = json.loads(run_here(*args, '--task=int8')['log'].splitlines()[-1])['results']['int8']
    assert costs['loss_full'] < 2.2 and abs(costs['increase_percent']) < 0.5
    assert costs['loss_int8'] == pytest.approx(costs['loss_full'] * (1 + costs['increase_percent'] / 100))
    for weights in ('full', 'int8'):
        line = json.loads(run_here(*args, f'--weights={weights}')['log'].splitlines()[-1])
        assert line['results']['loss']['loss'] == costs[f'loss_{weights}'] and line['weights'] == weights
    assert costs['loss_int8'] != costs['loss_full']
    text = run_here('sample.py', f'--out_dir={trained}', '--device=cpu', '--weights=int8', '--num_samples=2',
                    '--max_new_tokens=30')['log']
    assert re.search('king|queen|crown|sword|night|day|love|war', text)
    assert text.count('\n---------------\n') == 2


def test_bench_decodes_in_int8_and_trains_in_full_only(run_script):
    args = ('bench.py', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--num_steps=3',
            '--device=cpu', '--real_data=False', '--decode_tokens=5', '--weights=int8')
    report = json.loads(run_script(*args, '--mode=decode').stdout.splitlines()[-1])
    assert report['weights'] == 'int8' and report['rows'][0]['tokens_per_s'] > 0
    error = run_script(*args, '--mode=all', ok=False).stderr
    assert error == 'ValueError: weights=int8 cannot be trained: use mode=decode, not mode=all\n'


@pytest.mark.parametrize('script, args, message', [
    ('sample.py', ['--weights=int3'], 'weights=int3 is not one of full, int8, int4'),
    ('eval.py', ['--weights=int3'], 'weights=int3 is not one of full, int8, int4'),
    ('bench.py', ['--weights=int3'], 'weights=int3 is not one of full, int8, int4'),
    ('eval.py', ['--weights=int8', '--task=loss,int8'], 'leave weights=int8 out'),
])
def test_weights_that_are_not_known_are_refused_in_one_line(script, args, message, run_here):
    with pytest.raises(ValueError, match=message):
        run_here(script, *args)
