"""
The optimizer of a run, AdamW or Muon with AdamW, and averaged weights.

    opt = configure_optimizer(model, weight_decay, learning_rate, betas, 'cuda', muon={'lr_scale': 33})
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from support.errors import UserError
from support.machine.hardware import fastest_float32, has_bfloat16


def configure_optimizer(model, weight_decay, learning_rate, betas, device_type, muon=None, embedding_lr=0.0):
    """AdamW with GPT.configure_optimizers' two groups. embedding_lr: the learning rate of a third one, of the
    token embedding, unless it is 0; ValueError if the output layer has the same weights. muon: settings of a
    last group, the matrices of the blocks, for Muon."""
    adamw = model.configure_optimizers(weight_decay, learning_rate, betas, device_type, AdamW)
    if embedding_lr:
        if model.config.tie_weights:
            raise UserError(f'embedding_lr={embedding_lr} needs an embedding of its own: tie_weights=False')
        wte, decayed = model.transformer.wte.weight, adamw.param_groups[0]
        decayed['params'] = [p for p in decayed['params'] if p is not wte]
        adamw.add_param_group({'params': [wte], 'weight_decay': weight_decay,
                               'lr_scale': embedding_lr / learning_rate})
    if muon is None:
        return adamw
    rows = [n * model.config.n_embd // model.config.n_head for n in model.transformer.h[0].attn.heads]
    matrices = {p: rows if name.endswith('c_attn.weight') else [len(p)]
                for name, p in model.transformer.h.named_parameters() if p.dim() == 2 and p.requires_grad}
    return Muon(adamw, matrices, lr=learning_rate, **muon)


def plain(method):
    """A method of PyTorch's optimizers without its wrapper for torch.compile."""
    return getattr(method, '__wrapped__', method)


class PlainOptimizer(torch.optim.Optimizer):
    """An optimizer that isn't compiled: PyTorch's wrappers would import all of torch.compile, which takes a
    second."""
    zero_grad = plain(torch.optim.Optimizer.zero_grad)
    state_dict = plain(torch.optim.Optimizer.state_dict)
    load_state_dict = plain(torch.optim.Optimizer.load_state_dict)
    add_param_group = plain(torch.optim.Optimizer.add_param_group)


class AdamW(PlainOptimizer, torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019)"""
    step = torch.no_grad()(plain(torch.optim.AdamW.step))


class Muon(PlainOptimizer):
    """Muon for some matrices; the AdamW that it holds for all other parameters.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") moves a matrix by the
    nearest orthogonal matrix of its momentum: U V^T of the singular value decomposition U S V^T,
    approximated. The momentum rises from 0.85 to `momentum` in the first `momentum_warmup` steps. Several
    processes share the work and exchange the results.
    """
    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets found_inf instead of skipping the step

    def __init__(self, adamw, matrices, lr, momentum=0.95, momentum_warmup=300, **settings):
        """adamw: over all parameters. matrices: {parameter: the rows of each matrix in it}, three matrices
        in c_attn.weight. settings: more of the third group, such as lr_scale and weight_decay."""
        for group in adamw.param_groups:
            group['params'] = [p for p in group['params'] if p not in matrices]
        muon = {'params': [*matrices], 'parts': [*matrices.values()], 'lr': lr, 'momentum': momentum,
                'momentum_warmup': momentum_warmup, 'step': 0, **settings}
        super().__init__([*adamw.param_groups, muon], {})
        self.adamw, self.state = adamw, adamw.state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.adamw.__setstate__({'state': self.state, 'param_groups': self.param_groups[:-1]})

    @torch.no_grad()
    def step(self):
        """One update of all parameters; none where the attribute found_inf, a tensor, is 1."""
        found_inf = self.adamw.found_inf = getattr(self, 'found_inf', None)
        self.adamw.step()
        group = self.param_groups[-1]
        params = group['params']
        grads, keep = [p.grad for p in params], 1.0
        if found_inf is not None:  # as a tensor: a number would make the host wait for the device
            skip, zero, keep = found_inf > 0, torch.zeros_like(found_inf), 1 - found_inf
            grads = [torch.where(skip, zero, g) for g in grads]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        buffers = [self.state[p]['momentum_buffer'] for p in params]
        warm = min(1.0, (group['step'] + 1) / (group['momentum_warmup'] + 1))
        momentum = 0.85 + warm * (group['momentum'] - 0.85)
        group['step'] += 1
        new = (1 - momentum) * keep
        for b, g in zip(buffers, grads, strict=True):
            b.lerp_(g, new)
        torch._foreach_lerp_(grads, buffers, momentum)  # Nesterov's
        matrices = [m for g, rows in zip(grads, group['parts'], strict=True) for m in g.split(rows)]
        each = iter(orthogonalize(matrices))
        updates = [torch.cat([next(each) for _ in rows]) if len(rows) > 1 else next(each)
                   for rows in group['parts']]
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'] * keep)
        torch._foreach_mul_(updates, group['lr'] * keep)
        torch._foreach_sub_(params, updates)


def orthogonalize(matrices):
    """The (semi-)orthogonal matrix nearest to each matrix, approximately, times sqrt(max(1, rows / columns)).
    Matrices of equal shape are batched, and shared equally by the processes."""
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
    """newton_schulz(x): each process computes its part of x and sends it to the others."""
    world_size = dist.get_world_size()
    part = -(-len(x) // world_size)
    padded = torch.cat([x, x.new_zeros(part * world_size - len(x), *x.shape[1:])])
    mine = newton_schulz(padded[dist.get_rank() * part:][:part])
    gather = dist.all_gather_single if hasattr(dist, 'all_gather_single') else dist.all_gather_into_tensor
    gather(padded, mine)  # the second name is that of PyTorch before 2.13
    return padded[:len(x)]


def newton_schulz_dtype(device_type):
    return torch.bfloat16 if has_bfloat16(device_type) else torch.float32


def newton_schulz(x, steps=5):
    """x: (n, rows, columns) -> the same with singular values between 0.7 and 1.2.

    Iterates the polynomial a s + b s^3 + c s^5 of the singular values; Jordan et al. (2024) chose its
    coefficients for a steep slope at 0, not for convergence. In bfloat16 where the device multiplies it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[1] > x.shape[2]
    dtype, x = x.dtype, x.to(newton_schulz_dtype(x.device.type))
    x = x.mT.contiguous() if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    with fastest_float32(x.device.type):
        for _ in range(steps):
            gram = x @ x.mT  # (n, rows, rows)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(dtype, memory_format=torch.contiguous_format)


class WeightAverage:
    """Exponential moving average of a model's parameters (Polyak & Juditsky 1992), to evaluate and sample.

    Update t, counted from 0, decays it by min(decay, (1 + t) / (10 + t)), so that it soon forgets the initial
    weights. A decay of 0 averages nothing: all methods do nothing.
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
        """Give the model the averaged weights within a with statement."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for p, a in zip(self.params, self.average):
            if hasattr(p, 'to_local'):  # FSDP keeps references to the memory of its part
                kept = p.detach().clone()
                p.detach().copy_(a)
                a.copy_(kept)
            else:  # not copied: a state dict made in between keeps the averages
                p.data, a.data = a.data, p.data
