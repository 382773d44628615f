"""diagnostics.py: what is measured is what it is called, and the training doesn't notice."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig
from support.machine import runtime
from support.training import diagnostics
from support.training import checkpoint

RUN = runtime.Runtime('cpu', 'float32', False, 'gloo')
MODELS = ({}, {'bias': True}, {'pos_emb': 'rope', 'qk_norm': True, 'n_head': 4, 'n_kv_head': 2},
          {'pos_emb': 'alibi'}, {'attn_type': 'PA_relu'}, {'attn_type': 'GK', 'pos_emb': 'rope'},
          {'value_residual': True})


def model_and_batch(dropout=0.5, **options):
    model = GPT(GPTConfig(**TINY | {'dropout': dropout} | options))
    with torch.no_grad():  # away from the initial weights, for which all is small
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model, torch.randint(64, (3, 20)).numpy()


def entries(folder, key):
    found = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    return [e for e in found if key in e]


# ---------------------------------------------------------------------------- what is measured

@pytest.mark.parametrize('options', MODELS)
def test_attention_logit_is_the_largest_of_a_naive_loop(options, monkeypatch):
    model, x = model_and_batch(**options)
    found = diagnostics.measure_vitals(model, RUN, x)['attention_logit']
    largest = []

    def naive(q, k, v, *args):
        """Every query, every key up to it; query head h belongs to key head h // (heads that share it)."""
        shared = q.shape[1] // k.shape[1]
        size = (lambda a, b: float((a - b).square().sum()) / 2) if options.get('attn_type') == 'GK' else \
            (lambda a, b: abs(float(a @ b)))
        largest.append(max(size(q[b, h, t], k[b, h // shared, s]) / math.sqrt(q.shape[3])
                           for b in range(len(q)) for h in range(q.shape[1])
                           for t in range(q.shape[2]) for s in range(t + 1)))
        return attend(q, k, v, *args)

    attend = model.transformer.h[0].attn.attend
    for block in model.transformer.h:
        monkeypatch.setattr(block.attn, 'attend', naive)
    with torch.no_grad():
        model.eval()(torch.from_numpy(x))
    assert found.tolist() == pytest.approx(largest, rel=1e-4) and len(found) == 2


@pytest.mark.parametrize('options', MODELS)
def test_activation_rms_is_that_of_what_the_last_normalisation_gets(options):
    model, x = model_and_batch(**options)
    found = diagnostics.measure_vitals(model, RUN, x)['activation_rms']
    seen = []
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(torch.from_numpy(x))
    assert found.shape == (2,)
    assert found[-1].item() == pytest.approx(seen[0].numpy().std(mean=0.0), rel=1e-5)


def test_update_ratio_is_that_of_the_matrices_of_a_layer():
    model, _ = model_and_batch()
    block, record = model.transformer.h[1], {}
    before = [p.detach().clone() for p in block.parameters()]
    with torch.no_grad(), diagnostics.watch_update(model, record):
        for p in block.parameters():
            p.mul_(1.25) if p.dim() == 2 else p.mul_(7)
        block.attn.c_attn.weight[0, 0] += 3
    before, after = ([p.detach() for p in params if p.dim() == 2] for params in (before, block.parameters()))
    change = sum(((p - b) ** 2).sum() for p, b in zip(after, before))
    weights = sum((b ** 2).sum() for b in before)
    assert record['update_ratio'].tolist() == [0.0, pytest.approx((change / weights).sqrt().item(), rel=1e-5)]


def test_adamw_s_first_update_is_a_learning_rate_in_size(train, tmp_path):
    """Its first step moves each weight by the learning rate, whatever the gradient."""
    script = train('--max_iters=0', '--weight_decay=0', '--learning_rate=3e-4', '--decay_lr=False')
    found, = entries(tmp_path / 'out', 'health')
    block = script['model'].transformer.h[0]
    rms = math.sqrt(sum((p ** 2).sum() for p in block.parameters() if p.dim() == 2).item()
                    / sum(p.numel() for p in block.parameters() if p.dim() == 2))
    assert found['health']['update_ratio'][0] == pytest.approx(3e-4 / rms, rel=0.02)


def test_share_of_clipped_updates_is_since_the_last_line(train, tmp_path):
    train('--max_iters=12', '--log_interval=1', '--grad_clip=1e9', out_dir=tmp_path / 'never')
    lines = entries(tmp_path / 'never', 'loss')
    assert all(e['clipped'] == 0 for e in lines)
    norms = [e['grad_norm'] for e in lines]
    clip = sorted(norms)[6]  # as clipping barely changes AdamW's updates, about half of them will be clipped
    args = ('--max_iters=12', f'--grad_clip={clip}')
    train(*args, out_dir=tmp_path / 'each')
    each = [e['clipped'] for e in entries(tmp_path / 'each', 'loss')]
    assert each == [float(e['grad_norm'] > clip) for e in entries(tmp_path / 'each', 'loss')]
    assert 0 < sum(each) < 13
    train(*args, '--log_interval=4', out_dir=tmp_path / 'fourth')
    fourth = [e['clipped'] for e in entries(tmp_path / 'fourth', 'loss')]
    assert fourth == [each[0], *(sum(each[i - 3:i + 1]) / 4 for i in (4, 8, 12))]


def test_half_precision_is_measured(train, tmp_path):
    train('--max_iters=0', '--dtype=bfloat16')
    found, = entries(tmp_path / 'out', 'health')
    assert all(math.isfinite(v) for values in found['health'].values() for v in values)


# ---------------------------------------------------------------------------- no trace

def test_measuring_leaves_the_model_as_it_was():
    model, x = model_and_batch()
    attends, weights = [b.attn.attend for b in model.transformer.h], model.state_dict()
    weights = {k: v.clone() for k, v in weights.items()}
    state = torch.random.get_rng_state()
    diagnostics.measure_vitals(model, RUN, x)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert [b.attn.attend for b in model.transformer.h] == attends
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_training_is_the_same_without_it(train, tmp_path, monkeypatch, optimizer):
    args = ('--max_iters=6', '--eval_interval=2', '--dropout=0.2', f'--optimizer={optimizer}')
    train(*args, out_dir=tmp_path / 'with')
    assert [e['iter'] for e in entries(tmp_path / 'with', 'health')] == [0, 2, 4, 6]
    monkeypatch.setattr(diagnostics, 'measure_vitals', lambda *args: {})
    monkeypatch.setattr(diagnostics, 'watch_update', lambda *args: nullcontext())
    train(*args, out_dir=tmp_path / 'without')
    a, b = ([(e['loss'], e['grad_norm']) for e in entries(tmp_path / name, 'loss')]
            for name in ('with', 'without'))
    assert a == b and len(a) == 7
    a, b = (checkpoint.load(tmp_path / name / 'latest.pt')['model'] for name in ('with', 'without'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_numbers_are_logged_with_the_next_line(train, tmp_path):
    """Evaluations at 0, 3, 6, 7 and lines at 0, 5: nothing is fetched from the device in between."""
    train('--max_iters=7', '--eval_interval=3', '--log_interval=5')
    kinds = [(e['iter'], 'line' if 'loss' in e else 'health' if 'health' in e else 'evaluation')
             for e in entries(tmp_path / 'out', 'iter')]
    assert kinds == [(0, 'evaluation'), (0, 'health'), (0, 'line'), (3, 'evaluation'), (3, 'health'),
                     (5, 'line'), (6, 'evaluation'), (6, 'health'), (7, 'evaluation'), (7, 'health')]
    assert all(len(v) == 2 for e in entries(tmp_path / 'out', 'health') for v in e['health'].values())
    assert all(set(e['health']) == {'activation_rms', 'attention_logit', 'update_ratio'}
               for e in entries(tmp_path / 'out', 'health'))


def test_squared_distances_beyond_a_polynomial_are_counted_and_told(train, tmp_path):
    args = ('--max_iters=3', '--eval_interval=3', '--attn_type=GKpoly-0', '--qk_norm', '--n_layer=1')
    script = train(*args)  # |q - k|^2 / (2 sqrt(hs)) of normalised ones is up to 2 sqrt(hs) = 8
    counts = [x['health']['out_of_range'] for x in entries(tmp_path / 'out', 'health')]
    assert [len(c) for c in counts] == [1, 1] and counts[0][0] > 0
    assert f'{counts[0][0]:,} squared distances of the attention lie beyond' in script['log']
    quiet = train(*args, '--attn_type=GKpoly-10')
    assert 'lie beyond' not in quiet['log']
    assert 'out_of_range' not in train(*args, '--attn_type=GK')['vitals']


def test_counts_and_sizes_of_the_gaussian_kernel_equal_loops():
    q, k = torch.randn(2, 5, 4) * 2, torch.randn(2, 5, 4) * 2
    x = diagnostics.AttentionProbe(None, 'GKpoly-1').sizes(q, k)
    for h in range(2):
        for t in range(5):
            for j in range(5):
                expected = (q[h, t] - k[h, j]).square().sum() / 4 if j <= t else torch.tensor(0.0)
                assert torch.allclose(x[h, t, j], expected, atol=1e-4)
