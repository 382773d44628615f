"""Optimizers that PyTorch doesn't have in the form we need, and averaged weights."""

from contextlib import contextmanager

import torch
import torch.distributed as dist


def plain(method):
    """A method of PyTorch's optimizers without its wrapper for torch.compile."""
    return getattr(method, '__wrapped__', method)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019), but for wrappers that import all of torch.compile, which
    takes a second. Optimizers aren't compiled here."""
    step = torch.no_grad()(plain(torch.optim.AdamW.step))
    zero_grad = plain(torch.optim.AdamW.zero_grad)
    state_dict = plain(torch.optim.AdamW.state_dict)
    load_state_dict = plain(torch.optim.AdamW.load_state_dict)
    add_param_group = plain(torch.optim.AdamW.add_param_group)


class WeightAverage:
    """Exponential moving average of a model's parameters (Polyak & Juditsky 1992), the model to sample from.

    Of update t, counted from 0, it keeps min(decay, (1 + t) / (10 + t)) of what was, so that it soon forgets
    the initial weights. A decay of 0: none, all methods do nothing.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.params = list(model.parameters()) if decay else []
        self.average = [p.detach().clone() for p in self.params]

    def update(self, t):
        if self.params:
            keep = min(self.decay, (1 + t) / (10 + t))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - keep)

    @contextmanager
    def in_place(self):
        """Within it the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for p, a in zip(self.params, self.average):
            if hasattr(p, 'to_local'):  # FSDP holds on to the memory of its part
                kept = p.detach().clone()
                p.detach().copy_(a)
                a.copy_(kept)
            else:
                p.data, a.data = a.data, p.data


class Muon(AdamW):
    """Muon for some matrices, AdamW for all else, as one optimizer.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") moves a matrix by its
    momentum's nearest orthogonal matrix: U V^T of the singular value decomposition U S V^T, approximated. A
    group of `muon_groups` has `params` and, for each, `parts`: the numbers of rows that are matrices of their
    own, such as q, k and v in c_attn. Several processes share the work and exchange the results.
    Step t's momentum rises from 0.85 to `momentum` in the first `momentum_warmup` steps.
    """

    def __init__(self, adamw_groups, muon_groups, lr, betas, fused, momentum=0.95, momentum_warmup=300):
        settings = {'momentum': momentum, 'momentum_warmup': momentum_warmup, 'step': 0}
        muon_groups = [settings | group for group in muon_groups]
        super().__init__([*adamw_groups, *muon_groups], lr=lr, betas=betas, fused=fused)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's would look for its buffers in all groups

    @torch.no_grad()
    def step(self):
        """One update of all parameters; none where the attribute found_inf, a tensor, is 1."""
        groups = self.param_groups
        self.param_groups = [g for g in groups if 'parts' not in g]
        super().step()
        self.param_groups = groups
        for group in groups:
            if 'parts' in group:
                self.muon_step(group)

    def muon_step(self, group):
        params = group['params']
        found_inf = getattr(self, 'found_inf', None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        grads = [p.grad if found_inf is None else torch.where(found_inf > 0, 0, p.grad) for p in params]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        buffers = [self.state[p]['momentum_buffer'] for p in params]
        warm = min(1.0, (group['step'] + 1) / (group['momentum_warmup'] + 1))
        momentum = 0.85 + warm * (group['momentum'] - 0.85)
        group['step'] += 1
        torch._foreach_lerp_(buffers, grads, (1 - momentum) * keep)
        torch._foreach_lerp_(grads, buffers, momentum)  # Nesterov's
        matrices = [m for g, parts in zip(grads, group['parts'], strict=True) for m in g.split(parts)]
        updates = iter(orthogonalize(matrices))
        for p, parts in zip(params, group['parts'], strict=True):
            update = torch.cat([next(updates) for _ in parts])
            p.mul_(1 - group['lr'] * group['weight_decay'] * keep)
            p.sub_(update * (group['lr'] * keep))


def orthogonalize(matrices):
    """Each matrix's nearest (semi-)orthogonal one, approximately, times sqrt(max(1, rows / columns)), in the
    order given. Matrices of one shape are worked on together, by several processes in equal parts."""
    results = [None] * len(matrices)
    by_shape = {}
    for i, m in enumerate(matrices):
        by_shape.setdefault(tuple(m.shape), []).append(i)
    for (rows, columns), members in by_shape.items():
        x = torch.stack([matrices[i] for i in members])  # (n, rows, columns)
        x = share(x) if dist.is_initialized() else newton_schulz(x)
        for i, update in zip(members, x * max(1, rows / columns) ** 0.5):
            results[i] = update
    return results


def share(x):
    """newton_schulz(x), each process doing its part of x and handing it to the others."""
    world_size = dist.get_world_size()
    part = -(-len(x) // world_size)
    padded = torch.cat([x, x.new_zeros(part * world_size - len(x), *x.shape[1:])])
    mine = newton_schulz(padded[dist.get_rank() * part:][:part])
    dist.all_gather_into_tensor(padded, mine)
    return padded[:len(x)]


def newton_schulz(x, steps=5):
    """x: (n, rows, columns) -> the same with singular values near 1, between 0.7 and 1.2.

    The odd polynomial a s + b s^3 + c s^5 of the singular values, iterated; Jordan et al. (2024) chose its
    coefficients for the steepest slope at 0, not to converge. In bfloat16 on a GPU, float32 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[1] > x.shape[2]
    dtype, x = x.dtype, x.to(torch.bfloat16 if x.device.type == 'cuda' else torch.float32)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if is_tall else x).to(dtype)
