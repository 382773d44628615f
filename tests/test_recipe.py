"""The recipes for larger models: config/fast_gpt2.py, config/depth.py, and the settings that they use."""

import math

import naive
import pytest
import torch
from conftest import ROOT, TINY, scrambled, tiny, tokens

from model import GPT, GPTConfig
from support.errors import UserError
from support.hub.exporting import architecture, beyond
from support.settings import configure
from support.training.models import config_from_settings, load_optimizer
from support.training.optim import OptimizerOptions, make_optimizer

SETTINGS = {'optimizer': 'muon', 'learning_rate': 1e-2, 'weight_decay': 0.5, 'beta1': 0.9, 'beta2': 0.95,
            'muon_lr': 0.03, 'embedding_lr': 0.0}


def settings_of(*args):
    """train.py's settings after these arguments."""
    source = (ROOT / 'train.py').read_text(encoding='utf-8').partition('\nconfig = configure(')[0]
    space = {'__name__': 'settings'}
    exec(compile(source, 'train.py', 'exec'), space)
    return configure(space, GPTConfig, args=[str(a) for a in args], more=[OptimizerOptions])


@pytest.fixture(scope='module')
def recipe():
    return settings_of(ROOT / 'config/fast_gpt2.py')


@pytest.fixture
def small(recipe):
    """The recipe's model in tiny sizes."""
    return GPT(config_from_settings(recipe | {k: v for k, v in TINY.items() if k != 'vocab_size'}, 64))


# ---------------------------------------------------------------------------- fast_gpt2

def test_recipe_computes_its_formula_and_begins_with_a_loss_of_ln_v(small):
    x, y = tokens(2, 32), tokens(2, 32)
    loss = small(x, y)[1]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(64), abs=1e-6)
    assert small.lm_head.weight.grad.any() and not small.transformer.h[0].mlp.c_fc.weight.grad.any()
    model = scrambled(small).double()
    torch.testing.assert_close(model(x, y)[0], naive.logits(model, x), rtol=0, atol=2e-6)


def test_recipe_has_the_rates_decays_and_betas_of_each_kind_of_parameter(recipe, small):
    opt = make_optimizer(small, recipe, 'cpu')
    found = {g['name']: (g['initial_lr'], g['weight_decay'], g.get('betas'), g.get('eps'), len(g['params']))
             for g in opt.param_groups}
    betas, n_vectors = (0.8, 0.95), 2 * (2 + 4) + 2  # norms and biases of two blocks, and two norms
    assert found == {
        'decayed': (4e-3, 0.001, betas, 1e-10, 1), 'embedding': (0.7, 0.001, betas, 1e-10, 1),
        'non-decayed': (0.015, 0.0, betas, 1e-10, n_vectors), 'Muon': (0.025, 0.05, None, None, 8)}


def test_recipe_is_as_long_and_as_large_as_the_record(recipe):
    tokens_each = recipe['batch_size'] * recipe['block_size'] * recipe['gradient_accumulation_steps']
    assert (tokens_each, recipe['max_iters'], recipe['grad_clip']) == (524288, 3250, 0.0)
    with torch.device('meta'):
        model = GPT(config_from_settings(recipe, 50304))
    assert round(model.get_num_params(non_embedding=False) / 1e6) == 162


def test_rate_of_wsd_stays_and_then_falls_to_0(train):
    get_lr = train('--lr_schedule=wsd', '--wsd_decay=0.7', '--warmup_iters=0', '--max_iters=0',
                   '--lr_decay_iters=1000', '--min_lr=0', '--learning_rate=1')['get_lr']
    assert [get_lr(i) for i in (0, 299, 300, 650, 1000)] == pytest.approx([1, 1, 1, 0.5, 0])


@pytest.mark.parametrize('options, name', [
    ({'embd_norm': True}, 'embd_norm'), ({'x0_residual': True}, 'x0_residual'),
    ({'attn_scale': 0.12}, 'attn_scale')])
@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_architectures_of_others_refuse_what_they_do_not_compute(options, name, kind):
    args = TINY | options
    if kind == 'llama':
        args |= {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'bias': False}
    assert beyond(kind, args) == [f'{name}={options[name]}'] and architecture(args) == 'own_gpt'


# ---------------------------------------------------------------------------- Muon's settings

def step_of(options, n=3, spread=1.0):
    """(weights before, weights after, momentum) of the last of n steps of one matrix, (128, 32). The columns
    of its gradients are 1 to `spread` times as large."""
    torch.manual_seed(1)
    model, momentum = scrambled(tiny()), 0
    p = model.transformer.h[0].mlp.c_fc.weight
    opt = make_optimizer(model, SETTINGS | options, 'cpu')
    for step in range(n):
        mu = 0.85 + 0.1 * (step + 1) / 301
        for q in model.parameters():
            q.grad = torch.randn_like(q)
        p.grad *= torch.logspace(0, math.log10(spread), 32)
        grad, before = p.grad.clone(), p.detach().clone()
        momentum = mu * momentum + (1 - mu) * grad
        opt.step()
    return before, p.detach(), mu * momentum + (1 - mu) * grad


def test_momentum_of_all_matrices_is_bit_for_bit_that_of_each_alone():
    model, alone = scrambled(tiny()), {}
    opt = make_optimizer(model, SETTINGS, 'cpu')
    for step in range(3):
        mu = 0.85 + (step + 1) / 301 * (0.95 - 0.85)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            alone.setdefault(name, torch.zeros_like(p)).lerp_(p.grad, 1 - mu)
        opt.step()
    for name, p in model.named_parameters():
        if 'momentum_buffer' in opt.state[p]:
            assert torch.equal(opt.state[p]['momentum_buffer'], alone.pop(name)), name
    assert len(alone) == len([*model.parameters()]) - 8


def test_exact_steps_of_newton_schulz_give_an_orthogonal_matrix():
    before, after, momentum = step_of({'newton_schulz': 'exact'})
    update = (before * (1 - 0.03 * 0.5) - after) / 0.03 / 2  # sqrt(128 / 32)
    u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
    torch.testing.assert_close(update, u @ vh, rtol=0, atol=0.02)  # products may be in 16 bits
    before, after, _ = step_of({'newton_schulz': 'exact'}, spread=50)
    update = (before * (1 - 0.03 * 0.5) - after) / 0.03 / 2
    torch.testing.assert_close(torch.linalg.svdvals(update), torch.ones(32), rtol=0, atol=0.03)


def test_cautious_decay_acts_where_the_update_makes_a_weight_smaller():
    (before, plain, _), (_, cautious, _) = step_of({}, n=1), step_of({'cautious_decay': True}, n=1)
    update = before * (1 - 0.03 * 0.5) - plain
    expected = torch.where(update * before > 0, plain, before - update)
    torch.testing.assert_close(cautious, expected)
    assert 0.3 < (cautious == plain).float().mean() < 0.7


def test_normuon_divides_rows_by_their_size_so_far_and_keeps_the_norm():
    squares = 0
    for n in (1, 2, 3):
        (before, plain, _), (before_even, even, _) = step_of({}, n), step_of({'normuon': True}, n)
        plain, even = before * (1 - 0.03 * 0.5) - plain, before_even * (1 - 0.03 * 0.5) - even
        squares = 0.95 * squares + 0.05 * plain.square().mean(dim=1, keepdim=True)
        expected = plain / squares.sqrt()
        torch.testing.assert_close(even, expected * plain.norm() / expected.norm(), rtol=1e-3, atol=1e-5)


def test_state_of_normuon_continues_bit_for_bit():
    settings, models = SETTINGS | {'normuon': True, 'cautious_decay': True}, [tiny(), tiny()]
    opts = [make_optimizer(model, settings, 'cpu') for model in models]
    for step in range(4):
        if step == 2:
            models[1].load_state_dict(models[0].state_dict())
            load_optimizer(opts[1], opts[0].state_dict())
        idx = tokens(2, 32)
        for model, opt in zip(models[:1 + (step >= 2)], opts):
            model(idx, idx)[1].backward()
            opt.step()
            opt.zero_grad()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize('setting, reason', [
    ('newton_schulz=slow', 'newton_schulz=slow is not one of steep, exact'),
    ('adam_eps=-1', 'adam_eps=-1.0 must be at least 0'),
    ('wsd_decay=0', 'wsd_decay=0.0 must be above 0'),
    ('normuon=True', 'are of optimizer=muon')])
def test_setting_that_no_optimizer_has_is_one_line(setting, reason, train):
    with pytest.raises(UserError, match=reason):
        train(f'--{setting}')


# ---------------------------------------------------------------------------- depth

DEPTH = ROOT / 'config/depth.py'


@pytest.fixture
def at_depth(monkeypatch, capsys):
    """A function that gives the settings of command-line arguments, among them config/depth.py."""
    def settings(*args):
        monkeypatch.setattr('sys.argv', ['train.py', *map(str, args)])
        found = settings_of(*args)
        return found | {'log': capsys.readouterr().out}
    return settings


def test_settings_of_a_depth_are_the_same_wherever_it_stands(at_depth):
    flags = ('--n_layer=8', '--block_size=512', '--batch_size=16', '--max_iters=100')
    before, after = at_depth(*flags, DEPTH), at_depth(DEPTH, *flags)
    differing = [k for k in before if before[k] != after[k] and k != 'log']
    assert not differing and (before['n_embd'], before['n_head'], before['batch_size']) == (512, 4, 16)
    assert before['gradient_accumulation_steps'] * 16 * 512 == 2 ** 19
    assert before['max_iters'] == before['lr_decay_iters'] == 100


@pytest.mark.parametrize('depth, width', [(4, 256), (8, 512), (11, 768), (12, 768), (20, 1280)])
def test_depth_names_the_parameters_and_flops_of_its_model_and_12_tokens_for_each(depth, width, at_depth):
    found = at_depth(f'--n_layer={depth}', DEPTH)
    with torch.device('meta'):
        model = GPT(config_from_settings(found, 50304))
    n, n_scaling = model.get_num_params(non_embedding=False), 12 * depth * width ** 2 + 50304 * width
    each = found['gradient_accumulation_steps'] * found['batch_size'] * 1024
    flops = 312e12 * model.estimate_mfu(each / 1024 * found['max_iters'], 1.0)
    assert f'{width} channels, {width // 128} heads, {n / 1e6:.1f}M parameters' in found['log']
    assert f'{each:,} an iteration, {found["max_iters"]:,} iterations, {flops:.1e} FLOPs' in found['log']
    assert each * found['max_iters'] == pytest.approx(12 * n_scaling, rel=0.01)
    assert each & (each - 1) == 0  # a power of 2


def test_rates_and_decay_at_depth_12_are_those_of_the_recipe(recipe, at_depth):
    found = at_depth('--n_layer=12', DEPTH)
    for name in ('muon_lr', 'embedding_lr', 'learning_rate', 'scalar_lr', 'n_embd', 'n_head'):
        assert found[name] == pytest.approx(recipe[name]), name
    assert found['weight_decay'] == pytest.approx(0.05, rel=0.001)
    deep = at_depth('--n_layer=20', DEPTH)  # twice the batch, 3.7 times the tokens
    assert deep['muon_lr'] == pytest.approx(0.025 * 2 ** 0.5)
    assert deep['learning_rate'] == pytest.approx(4e-3 * 2 ** 0.5 / (1280 / 768) ** 0.5)
    assert deep['weight_decay'] == pytest.approx(0.05 * 2 ** 0.5 / 3.70, rel=0.01)


def test_depth_4_trains_on_a_cpu(train, monkeypatch):
    flags = ('--n_layer=4', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2',
             '--max_iters=6')
    monkeypatch.setattr('sys.argv', ['train.py', *flags])
    log = train(str(DEPTH), *flags, '--n_embd=128', '--n_head=1', '--warmup_iters=0', '--learning_rate=1e-3',
                '--eval_interval=6', '--log_interval=1')['log']
    first, last = (float(line.split('loss ')[1].split(',')[0]) for line in log.splitlines()
                   if line.startswith(('iter 0', 'iter 6')))
    assert first == pytest.approx(math.log(21), abs=0.01) and last < first


@pytest.mark.parametrize('flag', ['--n_layer=0', '--max_iters=many'])
def test_depth_that_is_none_is_one_line(flag, at_depth):
    name, _, value = flag.lstrip('-').partition('=')
    with pytest.raises(ValueError, match=f'{name}.*{value}'):
        at_depth(DEPTH, flag)
