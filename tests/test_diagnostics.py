"""diagnostics.py: what is measured is what it is called, and the training doesn't notice."""

import json
import math

import naive
import pytest
import torch
from conftest import scrambled, tiny, tokens

from support.errors import NotFinite
from support.machine.runtime import Runtime
from support.training.diagnostics import Guard, measure_vitals, watch_update

RUN = Runtime('cpu', 'float32', False, 'gloo')
MODELS = ({}, {'pos_emb': 'rope', 'qk_norm': True, 'n_head': 4, 'n_kv_head': 2},
          {'attn_type': 'PA_relu'}, {'attn_type': 'GKpoly-0'})


def entries(folder, key):
    found = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    return [e for e in found if key in e]


@pytest.mark.parametrize('options', MODELS)
def test_vitals_are_those_of_the_formulas_and_leave_the_model_as_it_was(options):
    model, x, layers = scrambled(tiny(dropout=0.5, **options)), tokens(3, 20), []
    weights, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    found = measure_vitals(model, RUN, x.numpy())
    with torch.no_grad():
        naive.logits(model, x, layers)
    of_layers = [[torch.stack(parts) for parts in zip(*texts)] for texts in zip(*layers)]
    streams, sizes = zip(*of_layers)
    expected = {'activation_rms': [stream.square().mean().sqrt() for stream in streams],
                'attention_logit': [size.max() for size in sizes]}
    if options.get('attn_type') == 'GKpoly-0':
        expected['out_of_range'] = [(size > 1).sum() for size in sizes]
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx([float(v) for v in values], rel=1e-4)
        for name, values in expected.items()}
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_update_ratio_is_that_of_the_trained_matrices_of_a_layer():
    model, record = scrambled(tiny()), {}
    block = model.transformer.h[1]
    block.mlp.c_fc.weight.requires_grad_(False)
    matrices = [p for p in block.parameters() if p.dim() == 2 and p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in matrices])
    with torch.no_grad(), watch_update(model, record):
        for p in block.parameters():
            p.mul_(1.25 if p.dim() == 2 and p.requires_grad else 7)
        block.attn.c_attn.weight[0, 0] += 3
    after = torch.cat([p.detach().flatten() for p in matrices])
    ratio = ((after - before).norm() / before.norm()).item()
    assert record['update_ratio'].tolist() == [0.0, pytest.approx(ratio)]


def test_first_update_is_a_learning_rate_in_size_and_vitals_are_those_of_the_evaluations(train, tmp_path):
    """Evaluations at 0, 3, 6, 7 and lines at 0, 5."""
    script = train('--max_iters=7', '--eval_interval=3', '--log_interval=5', '--weight_decay=0',
                   '--init=zero_proj', '--learning_rate=1e-5', '--warmup_iters=0', '--decay_lr=False')
    kinds = [(e['iter'], 'line' if 'loss' in e else 'health' if 'health' in e else 'evaluation')
             for e in entries(tmp_path / 'out', 'iter')]
    assert kinds == sorted([(i, kind) for i in (0, 3, 6, 7) for kind in ('evaluation', 'health')]
                           + [(0, 'line'), (5, 'line')])
    found = [e['health'] for e in entries(tmp_path / 'out', 'health')]
    assert all([*h] == ['activation_rms', 'attention_logit', 'update_ratio'] for h in found)
    assert all(len(values) == 2 for h in found for values in h.values())
    moved = [p for name, p in script['model'].transformer.h[0].named_parameters() if p.dim() == 2]
    n_moved = sum(p.numel() for p in moved if p.shape[0] == 32)  # c_proj: others have no gradient
    size = math.sqrt(sum(p.square().sum().item() for p in moved if p.shape[0] != 32))
    assert found[0]['update_ratio'][0] == pytest.approx(1e-5 * math.sqrt(n_moved) / size, rel=0.02)


def test_share_of_clipped_updates_is_since_the_last_line(train, tmp_path):
    train('--max_iters=12', '--grad_clip=1e9', out_dir=tmp_path / 'never')
    lines = entries(tmp_path / 'never', 'loss')
    assert all(e['clipped'] == 0 for e in lines)
    clip = sorted(e['grad_norm'] for e in lines)[6]  # clipping hardly changes AdamW: about half
    for name, interval in (('each', 1), ('fourth', 4)):
        train('--max_iters=12', f'--grad_clip={clip}', f'--log_interval={interval}',
              out_dir=tmp_path / name)
    each, fourth = ([e['clipped'] for e in entries(tmp_path / name, 'loss')]
                    for name in ('each', 'fourth'))
    assert each == [float(e['grad_norm'] > clip) for e in entries(tmp_path / 'each', 'loss')]
    assert 0 < sum(each) < 13
    assert fourth == [each[0], *(sum(each[i - 3:i + 1]) / 4 for i in (4, 8, 12))]


def test_a_loss_that_is_not_finite_ends_the_run_with_its_iteration_even_if_it_is_seen_later():
    for bad, has_scaler in ((math.nan, False), (math.inf, True)):
        guard = Guard('cpu', 1.0, has_scaler)
        opt = torch.optim.SGD([torch.ones(1, requires_grad=True)])
        for iteration, loss in enumerate((1.0, 1.0, bad, 1.0, bad)):
            allowed = guard.allows(iteration, torch.tensor(loss), torch.tensor(2.0), opt)
            assert allowed == math.isfinite(loss)
        with pytest.raises(NotFinite, match='iteration 2: .* no update was made with it. All is '):
            guard.stop_if_not_finite(5, 'All is lost')
        again = Guard('cpu', 1.0, has_scaler)
        again.load_state_dict(guard.state_dict())
        again.stop_if_not_finite(3, '')
        assert again.n_clipped == 5
        with pytest.raises(NotFinite, match='iteration 3'):
            again.stop_if_not_finite(3, '', 1.0, math.nan)
    scaled = Guard('cpu', 1.0, has_scaler=True)  # which deals with gradients itself
    assert scaled.allows(0, torch.tensor(1.0), torch.tensor(math.inf), opt)
    scaled.stop_if_not_finite(0, '')
