"""optim.py: groups, decay and rates of every parameter, Muon against the singular value
decomposition, updates that aren't finite."""

import math

import pytest
import torch
from conftest import scrambled, tiny, tokens

from model import GPT, GPTConfig
from support.errors import NotFinite
from support.training.diagnostics import Guard
from support.training.optim import make_optimizer, set_lr

SETTINGS = {'optimizer': 'adamw', 'learning_rate': 1e-2, 'weight_decay': 0.5, 'beta1': 0.9,
            'beta2': 0.95, 'muon_lr': 0.03, 'embedding_lr': 0.0}
ALL = {'tie_weights': False, 'value_residual': True, 'ngram': 2, 'ngram_rows': 64, 'n_head': 4,
       'n_kv_head': 1, 'activation': 'swiglu', 'norm': 'rmsnorm'}


def optimizer_of(model, **settings):
    return make_optimizer(model, SETTINGS | settings, 'cpu')


# ---------------------------------------------------------------------------- groups

@pytest.mark.parametrize('options', [{}, ALL])
@pytest.mark.parametrize('settings', [{}, {'optimizer': 'muon'}, {'embedding_lr': 0.1},
                                      {'optimizer': 'muon', 'embedding_lr': 0.1}])
def test_each_parameter_is_in_one_group_with_its_own_decay_and_rate(settings, options):
    """Seen in an update without gradients, which only decays: p (1 - rate * weight_decay)."""
    if settings.get('embedding_lr') and not options:
        with pytest.raises(ValueError, match='embedding_lr=0.1 needs an embedding of its own: tie_wei'):
            optimizer_of(tiny(), **settings)
        options = {'tie_weights': False}
    model = scrambled(tiny(**options))
    opt = optimizer_of(model, **settings)
    owned = [p for group in opt.param_groups for p in group['params']]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    names = ['decayed', 'non-decayed', *['embedding'] * ('embedding_lr' in settings),
             *['Muon'] * ('optimizer' in settings)]
    assert [group['name'] for group in opt.param_groups] == names
    set_lr(opt, 5e-3, highest=1e-2)  # half
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in model.named_parameters():
        rate = 1e-2 if p.dim() == 2 else 0.0
        if '.h.' in name and p.dim() == 2 and 'optimizer' in settings:
            rate = 0.03
        if name == 'transformer.wte.weight' and 'embedding_lr' in settings:
            rate = 0.1
        torch.testing.assert_close(p.detach(), before[name] * (1 - rate / 2 * 0.5), msg=name)


def test_groups_of_adamw_are_in_the_order_of_the_parameters():
    params, groups = [*tiny().parameters()], optimizer_of(tiny()).param_groups
    for group, decay, has_dims in zip(groups, (0.5, 0.0), (lambda p: p.dim() >= 2, lambda p: p.dim() < 2)):
        assert [p.shape for p in group['params']] == [p.shape for p in params if has_dims(p)]
        assert (group['weight_decay'], group['betas'], group['lr'], group['initial_lr']) == (
            decay, (0.9, 0.95), 1e-2, 1e-2)


def test_groups_of_a_model_s_own_keep_their_rates():
    class Own(GPT):
        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            params = [*self.parameters()]
            return torch.optim.SGD([
                {'params': params[:1], 'lr': 3.0}, {'params': params[1:2], 'lr_scale': 0.1},
                {'params': params[2:], 'name': 'mine'}], lr=learning_rate)
    opt = optimizer_of(Own(GPTConfig(n_layer=1, n_head=1, n_embd=8)))
    set_lr(opt, 1e-3, highest=1e-2)
    assert [g['name'] for g in opt.param_groups] == ['decayed', 'non-decayed', 'mine']
    assert [g['lr'] for g in opt.param_groups] == pytest.approx([0.3, 1e-4, 1e-3])


# ---------------------------------------------------------------------------- Muon

def assert_orthogonal(update, m):
    """That it is U D V^T where m = U S V^T, and D is S / |S| after five steps of the paper's
    polynomial, which brings all but the smallest near 1. Its products may have been made in 16
    bits."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    d = s / s.norm()
    for _ in range(5):
        d = 3.4445 * d - 4.7750 * d**3 + 2.0315 * d**5
    assert ((d > 0.65) & (d < 1.2) | (s < 0.01 * s.norm())).all()
    assert (update - (u * d) @ vh).norm() < 0.05 * update.norm()


@pytest.mark.parametrize('options', [{}, ALL])
def test_muon_moves_each_matrix_by_u_v_transposed_of_its_momentum(options):
    """q, k and v apart from each other, whatever the sizes of their gradients; a tall one times
    sqrt(rows / columns); Nesterov's momentum, which rises from 0.85 to 0.95 over 301 steps."""
    model = scrambled(tiny(**options))
    opt, momenta = optimizer_of(model, optimizer='muon'), {}
    kv = 32 * model.config.n_kv_head // model.config.n_head
    for step in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) * 10.0 ** torch.randint(-4, 4, ())
            if 'c_attn' in name:
                p.grad *= torch.tensor([1e-3] * 32 + [1.0] * kv + [100.0] * kv)[:len(p)].view(
                    -1, *[1] * (p.dim() - 1))
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        opt.step()
        mu = 0.85 + 0.1 * (step + 1) / 301
        for name, p in model.named_parameters():
            if p.dim() != 2 or '.h.' not in name:
                continue
            momenta[name] = mu * momenta.get(name, 0.0) + (1 - mu) * grads[name]
            moved = (before[name] * (1 - 0.03 * 0.5) - p.detach()) / 0.03
            nesterov = mu * momenta[name] + (1 - mu) * grads[name]
            rows = (32, kv, kv) if 'c_attn' in name else len(p)
            for update, m in zip(moved.split(rows), nesterov.split(rows)):
                assert_orthogonal(update / max(1, len(m) / m.shape[1]) ** 0.5, m)
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------- any optimizer

def step_of_one_process(rank, folder):
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    torch.save(weights_after_a_step(), f'{folder}/{rank}')
    torch.distributed.destroy_process_group()


def weights_after_a_step():
    torch.manual_seed(3)
    model, idx = tiny(n_layer=3), tokens(2, 32)
    opt = optimizer_of(model, optimizer='muon')
    model(idx, idx)[1].backward()
    opt.step()
    return model.state_dict()


def test_processes_that_share_the_work_of_muon_get_the_same_weights(tmp_path):
    torch.multiprocessing.spawn(step_of_one_process, (str(tmp_path),), nprocs=2)
    alone = weights_after_a_step()
    for rank in '01':
        for name, p in torch.load(tmp_path / rank).items():
            torch.testing.assert_close(p, alone[name], rtol=0, atol=1e-3 * 0.03)


def numbers_of(model, opt):
    """All weights and buffers but counts of steps, copied."""
    buffers = [t for state in opt.state.values() for name, t in state.items() if name not in ('step', 'n')]
    return [t.detach().clone() for t in (*model.parameters(), *buffers)]


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_update_that_is_not_finite_changes_nothing_and_ends_the_run(kind):
    model, guard, seen = tiny(), Guard('cpu', 1.0, has_scaler=False), []
    opt = optimizer_of(model, optimizer=kind)
    for iteration in range(3):
        idx = tokens(2, 32)
        loss = model(idx, idx)[1]
        loss.backward()
        if iteration == 1:
            model.transformer.h[0].attn.c_attn.weight.grad[3, 3] = math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard.allows(iteration, loss.detach(), norm, opt):
            opt.step()
        opt.zero_grad()
        seen.append(numbers_of(model, opt))
    assert all(map(torch.equal, *seen[:2])) and not any(map(torch.equal, *seen[1:]))
    with pytest.raises(NotFinite, match='iteration 1: the loss or the gradient is not finite'):
        guard.stop_if_not_finite(3, 'No state was saved before')
