"""
The optimizer of a run: what the model's configure_optimizers makes, or Muon for the matrices of its blocks.

    opt = make_optimizer(model, settings, 'cuda')   # settings of train.py
    set_lr(opt, lr=3e-4, highest=6e-4)               # half of each group's own initial_lr

Each group has a name and its own initial_lr, and each parameter that is trained is in exactly one.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.distributed as dist

from support.errors import UserError
from support.machine.console import print0
from support.machine.hardware import fastest_float32, has_bfloat16


@dataclass
class OptimizerOptions:
    """Further settings of the optimizer."""
    scalar_lr: float = 0.0  # of biases, factors of norms and the like; 0: learning_rate
    adam_weight_decay: float | None = None  # of what AdamW trains beside Muon; None: weight_decay
    adam_eps: float = 0.0  # AdamW's epsilon; 0: PyTorch's, 1e-8
    newton_schulz: str = 'steep'  # of Muon: steep (5 steps, about orthogonal), exact (12 steps)
    normuon: bool = False  # of Muon: rows of an update are made equally large
    cautious_decay: bool = False  # of Muon: weights decay only where the update makes them smaller, too


NEWTON_SCHULZ = {  # iterations, and the coefficients of the polynomial a s + b s^3 + c s^5
    'steep': (5, (3.4445, -4.7750, 2.0315)),  # Jordan et al. 2024: singular values of 0.7 to 1.2
    'exact': (12, (2.0, -1.5, 0.5)),  # converges: all but the smallest become 1
}


def make_optimizer(model, settings, device_type):
    """The optimizer for train.py's settings: optimizer, learning_rate, weight_decay, beta1, beta2, muon_lr,
    embedding_lr, and perhaps cuda_graphs, compile, those of OptimizerOptions. UserError where the model lacks
    what they need."""
    settings = vars(OptimizerOptions()) | settings
    lr, weight_decay, how = settings['learning_rate'], settings['weight_decay'], {}
    adam_decay = weight_decay if settings['adam_weight_decay'] is None else settings['adam_weight_decay']
    if 'cls' in inspect.signature(model.configure_optimizers).parameters:
        how = {'cls': AdamW}
    betas = (settings['beta1'], settings['beta2'])
    opt = model.configure_optimizers(adam_decay, lr, betas, device_type, **how)
    if settings['embedding_lr']:
        separate_embedding(opt, model, settings['embedding_lr'], adam_decay)
    if settings['optimizer'] == 'muon':
        opt = Muon(opt, block_matrices(model), settings['muon_lr'], weight_decay)
        opt.newton_schulz, opt.normuon = settings['newton_schulz'], settings['normuon']
        opt.cautious_decay = settings['cautious_decay']
        if settings.get('cuda_graphs') and settings.get('compile'):
            opt.orthogonalize = torch.compile(orthogonalize, dynamic=False, mode='reduce-overhead')
    for i, group in enumerate(opt.param_groups):
        group.setdefault('name', ('decayed', 'non-decayed')[i] if i < 2 else f'group {i}')
        if group['name'] == 'non-decayed' and settings['scalar_lr']:
            group['lr'] = settings['scalar_lr']
        if 'eps' in group and settings['adam_eps']:
            group['eps'] = settings['adam_eps']
        group.setdefault('initial_lr', group['lr'] * group.get('lr_scale', 1.0))  # lr_scale: of muP
    counts = [sum(p is q for group in opt.param_groups for q in group['params'])
              for p in model.parameters() if p.requires_grad]
    assert set(counts) == {1}, f'parameters in {set(counts)} groups of the optimizer, not in one'
    return opt


def separate_embedding(opt, model, lr, weight_decay):
    """Give the token embedding a group with a learning rate of its own."""
    wte, head = (getattr(module, 'weight', None) for module in (
        getattr(getattr(model, 'transformer', None), 'wte', None), getattr(model, 'lm_head', None)))
    if wte is None or head is None:
        raise UserError(f'embedding_lr={lr} is for transformer.wte beside lm_head, which this model.py lacks')
    if wte is head:
        raise UserError(f'embedding_lr={lr} needs an embedding of its own: tie_weights=False')
    for group in opt.param_groups:
        group['params'] = [p for p in group['params'] if p is not wte]
    opt.add_param_group({'params': [wte], 'weight_decay': weight_decay, 'lr': lr, 'name': 'embedding'})


def block_matrices(model):
    """{parameter: the rows of each matrix in it} for the matrices of a model's blocks; c_attn.weight holds
    three, for queries, keys and values."""
    if not hasattr(getattr(model, 'transformer', None), 'h'):
        raise UserError('optimizer=muon is for the matrices in transformer.h, which this model.py lacks: use '
                        '--optimizer=adamw')
    matrices = {}
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2 and p.requires_grad:
            attention = model.transformer.h.get_submodule(name.rpartition('.c_attn')[0])
            rows = [len(p)]
            if name.endswith('c_attn.weight') and hasattr(attention, 'n_kv_head'):
                kv_rows = attention.n_kv_head * attention.head_size
                rows = [len(p) - 2 * kv_rows, kv_rows, kv_rows]
            elif name.endswith('c_attn.weight') and len(p) == 3 * p.shape[1]:
                rows = [p.shape[1]] * 3
            matrices[p] = rows
    return matrices


def keep_gradients(model, run, parallel='ddp'):
    """Give each trained parameter a gradient that keeps its place, for zero_grad(set_to_none=False). A graph
    of PyTorch's would otherwise hand out its own buffer as the first micro-step's gradient, and the next
    micro-step would write over it (pytorch/pytorch#169545). UserError for several processes."""
    if run.world_size > 1 or parallel == 'fsdp':
        raise UserError('cuda_graphs=True is for a single process with parallel=ddp')
    if not run.compile or run.device_type != 'cuda':
        print0('cuda_graphs: nothing is recorded without CUDA and compile=True; gradients keep their memory')
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)


def set_lr(opt, lr, highest):
    """Set the learning rate of each group: lr, of a schedule that rises to `highest`, or the same share of
    the group's own."""
    for group in opt.param_groups:
        own = group['initial_lr']
        group['lr'] = lr if own == highest else own * lr / highest


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
    newton_schulz = 'steep'  # a key of NEWTON_SCHULZ
    normuon = False  # see `even_rows`
    cautious_decay = False  # decay a weight only where the update makes it smaller, too (Chen et al. 2025)

    def __init__(self, adamw, matrices, lr, weight_decay=0.0, momentum=0.95, momentum_warmup=300):
        """adamw: over all parameters. matrices: {parameter: the rows of each matrix in it}."""
        for group in adamw.param_groups:
            group['params'] = [p for p in group['params'] if p not in matrices]
        muon = {'params': [*matrices], 'parts': [*matrices.values()], 'lr': lr, 'name': 'Muon',
                'weight_decay': weight_decay, 'momentum': momentum, 'momentum_warmup': momentum_warmup,
                'step': 0}
        super().__init__([*adamw.param_groups, muon], {})
        self.adamw, self.state = adamw, adamw.state
        self.orthogonalize = orthogonalize  # with cuda_graphs and compile the same, recorded
        # whether torch.amp.GradScaler sets found_inf instead of skipping the step
        self._step_supports_amp_scaling = getattr(adamw, '_step_supports_amp_scaling', False)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.adamw.__setstate__({'state': self.state, 'param_groups': self.param_groups[:-1]})

    @torch.no_grad()
    def step(self):
        """One update of all parameters; none where the attribute found_inf, a tensor, is 1."""
        found_inf = self.adamw.found_inf = getattr(self, 'found_inf', None)
        self.adamw.step()
        group = self.param_groups[-1]
        used = [(p, rows) for p, rows in zip(group['params'], group['parts'], strict=True)
                if p.grad is not None]
        params, parts = [p for p, _ in used], [rows for _, rows in used]
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
        if found_inf is None:
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
        else:
            for b, g in zip(buffers, grads, strict=True):
                b.lerp_(g, (1 - momentum) * keep)
        torch._foreach_lerp_(grads, buffers, momentum)  # Nesterov's
        matrices = [m for g, rows in zip(grads, parts, strict=True) for m in g.split(rows)]
        device_type = params[0].device.type
        with fastest_float32(device_type):
            found = self.orthogonalize(matrices, self.newton_schulz, newton_schulz_dtype(device_type))
        if self.normuon:
            squares = [s for p, rows in used for s in self.row_squares(p).split(rows)]
            found = [even_rows(u, s, keep) for u, s in zip(found, squares, strict=True)]
        each = iter(found)
        updates = [torch.cat([next(each) for _ in rows]) if len(rows) > 1 else next(each) for rows in parts]
        decay = group['lr'] * group['weight_decay'] * keep
        if self.cautious_decay:
            torch._foreach_mul_(params, [
                torch.where(p * u > 0, 1 - decay, 1.0) for p, u in zip(params, updates)])
        else:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_mul_(updates, group['lr'] * keep)
        torch._foreach_sub_(params, updates)

    def row_squares(self, p):
        """NorMuon's buffer of a parameter, (rows, 1)."""
        if 'row_squares' not in self.state[p]:
            self.state[p]['row_squares'] = p.new_zeros(len(p), 1)
        return self.state[p]['row_squares']


def even_rows(update, squares, keep=1.0):
    """NorMuon (Li et al. 2025, "NorMuon: Making Muon more efficient and scalable"): each row of an update,
    which is a neuron's, over the root of its mean square so far; the norm of the whole stays. squares:
    (rows, 1), which moves on by a twentieth."""
    squares.lerp_(update.square().mean(dim=1, keepdim=True), 0.05 * keep)
    even = update / squares.sqrt().clamp(min=1e-10)
    return even * (update.norm() / even.norm().clamp(min=1e-10))


def orthogonalize(matrices, how, dtype):
    """The (semi-)orthogonal matrix nearest to each matrix, approximately, times sqrt(max(1, rows / columns)).
    Matrices of equal shape are batched, and shared equally by the processes. how: of NEWTON_SCHULZ.
    dtype: of the products."""
    results = [None] * len(matrices)
    by_shape = {}
    for i, m in enumerate(matrices):
        by_shape.setdefault(tuple(m.shape), []).append(i)
    for (rows, columns), members in by_shape.items():
        x = torch.stack([matrices[i] for i in members])  # (n, rows, columns)
        iterate = newton_schulz_by_all if dist.is_initialized() else newton_schulz
        x = iterate(x, how, dtype)
        for i, update in zip(members, x * max(1, rows / columns) ** 0.5):
            results[i] = update
    return results


def newton_schulz_by_all(x, how, dtype):
    """newton_schulz(x, how, dtype): each process computes its part of x and sends it to the others."""
    world_size = dist.get_world_size()
    part = -(-len(x) // world_size)
    padded = torch.cat([x, x.new_zeros(part * world_size - len(x), *x.shape[1:])])
    mine = newton_schulz(padded[dist.get_rank() * part:][:part], how, dtype)
    gather = dist.all_gather_single if hasattr(dist, 'all_gather_single') else dist.all_gather_into_tensor
    gather(padded, mine)  # the second name is that of PyTorch before 2.13
    return padded[:len(x)]


def newton_schulz_dtype(device_type):
    """bfloat16 where the device multiplies it."""
    return torch.bfloat16 if has_bfloat16(device_type) else torch.float32


def newton_schulz(x, how, dtype):
    """x: (n, rows, columns) -> the same with singular values near 1, as how of NEWTON_SCHULZ says.

    Iterates the polynomial a s + b s^3 + c s^5 of the singular values, in dtype.
    """
    steps, (a, b, c) = NEWTON_SCHULZ[how]
    is_tall = x.shape[1] > x.shape[2]
    given, x = x.dtype, x.to(dtype)
    x = x.mT.contiguous() if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if is_tall else x
    return x.to(given, memory_format=torch.contiguous_format)
