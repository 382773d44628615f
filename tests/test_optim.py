"""optim.py: Muon against its definition and PyTorch's own, averaged weights."""

import copy
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from support.training import optim
from support.training.optim import (AdamW, Muon, WeightAverage, configure_optimizer, newton_schulz,
                                   orthogonalize)

TINY = {'block_size': 32, 'vocab_size': 64, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'bias': False}


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(optim, 'newton_schulz_dtype', lambda device_type: torch.float32)


@pytest.mark.parametrize('shape', [(16, 16), (48, 16), (16, 64)])
def test_an_update_s_singular_values_are_near_1(shape):
    x = torch.randn(5, *shape)
    values = torch.linalg.svdvals(newton_schulz(x, 5))
    assert values.min() > 0.3 and values.max() < 1.3 and values.median() > 0.65


def test_an_update_keeps_the_singular_vectors(float32):
    x = torch.randn(24, 16)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inside = u.T @ newton_schulz(x[None], 5)[0] @ vh.T
    assert (inside - torch.diag(inside.diag())).abs().max() < 1e-4 and inside.diag().min() > 0.3


def test_matrices_of_many_shapes_come_back_in_order():
    matrices = [torch.randn(s) for s in ((8, 8), (32, 8), (8, 8), (8, 32))]
    for m, update in zip(matrices, orthogonalize(matrices), strict=True):
        assert update.shape == m.shape
        alone = newton_schulz(m[None], 5)[0] * max(1, m.shape[0] / m.shape[1]) ** 0.5
        torch.testing.assert_close(update, alone, rtol=0, atol=1e-5)


def test_muon_equals_pytorch_s(float32, monkeypatch):
    """Whose Newton-Schulz iteration works in bfloat16, but for this test."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.clone)
    ours, theirs = (torch.nn.Parameter(torch.eye(16, 8)) for _ in range(2))
    a = Muon(AdamW([ours], fused=True), {ours: [16]}, lr=0.1, weight_decay=0.1, momentum_warmup=0)
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn='original')
    for _ in range(4):
        grad = torch.randn(16, 8)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - torch.eye(16, 8)).abs().max() > 0.1


def muon_of(model, **changes):
    muon = {'weight_decay': 0.0, 'lr_scale': 1.0} | changes
    return configure_optimizer(model, 0.1, 1e-2, (0.9, 0.95), 'cpu', muon)


def test_muon_has_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(**TINY))
    optimizer = muon_of(model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, others, matrices = ({names[id(p)] for p in g['params']} for g in optimizer.param_groups)
    assert decayed == {'transformer.wte.weight', 'transformer.wpe.weight'}
    assert all('ln_' in n for n in others)
    assert matrices == {f'transformer.h.{i}.{n}.weight' for i in range(2) for n in
                        ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    group = optimizer.param_groups[2]
    parts = dict(zip((names[id(p)] for p in group['params']), group['parts']))
    assert parts['transformer.h.0.attn.c_attn.weight'] == [32, 32, 32]
    assert parts['transformer.h.0.mlp.c_fc.weight'] == [128]


@pytest.mark.parametrize('muon', [None, {'lr_scale': 2.0, 'weight_decay': 0.0}], ids=['adamw', 'muon'])
def test_embedding_of_its_own_has_its_own_learning_rate(muon):
    model = GPT(GPTConfig(**TINY, tie_weights=False))
    optimizer = configure_optimizer(model, 0.0, 1e-2, (0.9, 0.95), 'cpu', muon, embedding_lr=0.1)
    assert [g.get('lr_scale', 1.0) for g in optimizer.param_groups] == [1, 1, 10] + [2] * (muon is not None)
    owned = [p for g in optimizer.param_groups for p in g['params']]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    wte, head = model.transformer.wte.weight, model.lm_head.weight
    before = wte.detach().clone(), head.detach().clone()
    for group in optimizer.param_groups:
        group['lr'] = 1e-2 * group.get('lr_scale', 1.0)
    idx = torch.randint(64, (4, 32))
    model(idx, idx)[1].backward()
    optimizer.step()
    moved = [(p - b).abs().max().item() for p, b in zip((wte, head), before)]
    assert moved == pytest.approx([0.1, 0.01], rel=1e-3)  # AdamW's first step
    with pytest.raises(ValueError, match='embedding_lr=0.1 needs an embedding of its own: tie_weights=False'):
        configure_optimizer(GPT(GPTConfig(**TINY)), 0.0, 1e-2, (0.9, 0.95), 'cpu', muon, embedding_lr=0.1)


def test_momentum_rises_from_085_in_the_warm_up():
    """By its definition: the buffer after each step of constant gradients, and the plain step afterwards."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon(AdamW([p], fused=True), {p: [8]}, lr=0.1, momentum_warmup=4, weight_decay=0.0)
    buffer, grad = torch.zeros(8, 8), torch.randn(8, 8)
    for momentum in (0.87, 0.89, 0.91, 0.93, 0.95, 0.95, 0.95):  # (step + 1) / 5 of the way from 0.85
        p.grad = grad.clone()
        before = p.detach().clone()
        optimizer.step()
        buffer = momentum * buffer + (1 - momentum) * grad
        torch.testing.assert_close(optimizer.state[p]['momentum_buffer'], buffer)
        expected = newton_schulz(((1 - momentum) * grad + momentum * buffer)[None])[0]  # Nesterov's
        torch.testing.assert_close(before - p, 0.1 * expected, rtol=0, atol=1e-5)


def test_a_loaded_state_continues_as_if_it_had_not_been_saved():
    torch.manual_seed(0)
    models = [GPT(GPTConfig(**TINY)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers, idx = [muon_of(m) for m in models], torch.randint(64, (2, 32))
    for i in range(6):
        if i == 3:  # the second continues from what the first saved
            optimizers[1] = muon_of(models[1])
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for model, optimizer in zip(models, optimizers, strict=True):
            model(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_q_k_and_v_are_orthogonalised_apart():
    p = torch.nn.Parameter(torch.zeros(24, 8))
    optimizer = Muon(AdamW([p], fused=True), {p: [8, 8, 8]}, lr=1.0, weight_decay=0.0)
    p.grad = torch.randn(24, 8) * torch.tensor([1.0] * 8 + [100.0] * 8 + [0.01] * 8)[:, None]
    optimizer.step()
    for part in p.detach().split(8):
        values = torch.linalg.svdvals(part)
        assert values.min() > 0.3 and values.max() < 1.3


def test_update_of_many_matrices_takes_few_operators():
    """A GPU waits for each to be launched."""
    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.n += not operator.is_view
            return operator(*args, **(kwargs or {}))

    counts = []
    for n_layer in (2, 6):
        model = GPT(GPTConfig(**TINY | {'n_layer': n_layer}))
        optimizer, idx = muon_of(model), torch.randint(64, (2, 32))
        for _ in range(2):
            model(idx, idx)[1].backward()
            optimizer.found_inf = torch.zeros(())
            with Count() as count:
                optimizer.step()
            optimizer.zero_grad()
        counts.append(count.n)
    assert (counts[1] - counts[0]) / 4 <= 9  # a layer: where and lerp for each of four matrices, cat for one


def test_an_update_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    optimizer, idx = muon_of(model), torch.randint(64, (2, 32))
    for bad in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        model(idx, idx)[1].backward()
        if bad:
            next(model.parameters()).grad[0, 0] = float('nan')
            model.transformer.h[0].attn.c_attn.weight.grad[3, 3] = float('inf')
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if bad else not any(same)
    assert all(b.isfinite().all() for s in optimizer.state.values() for b in s.values())


def worker(rank, world_size, port, path):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=world_size)
    torch.manual_seed(3)
    matrices = [torch.randn(s) for s in ((8, 8), (32, 8), (8, 8), (8, 8), (8, 32))]
    torch.save(orthogonalize(matrices), f'{path}/{rank}')
    torch.distributed.destroy_process_group()


def test_processes_that_share_the_work_get_the_same_updates(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (3, port, str(tmp_path)), nprocs=3)
    torch.manual_seed(3)
    alone = orthogonalize([torch.randn(s) for s in ((8, 8), (32, 8), (8, 8), (8, 8), (8, 32))])
    for rank in range(3):
        for a, b in zip(alone, torch.load(tmp_path / str(rank)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_average_of_the_weights_equals_its_definition():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone()
    for t in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        average.update(t)
        keep = min(0.5, (1 + t) / (10 + t))
        expected = keep * expected + (1 - keep) * model.weight.detach()
    trained = model.weight.detach().clone()
    with average.in_place():
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, trained)
