"""
Numbers that blow up, and what goes on inside a network while it trains.

    if guard.allows(iter_num, loss, grad_norm, optimizer):
        optimizer.step()                        # or it skips on the device what isn't finite
    guard.stop_if_not_finite(iter_num, where)   # now and then: it waits for the device

    record = measure_vitals(model, run, x)             # at an evaluation, before the update
    with watch_update(model, record):           # needs the memory of a copy of the blocks' weights
        optimizer.step()

A record has tensors on the device, with a number for each layer:
    activation_rms    root mean square of the residual stream after the block
    attention_logit   the largest |q . k| / sqrt(hs), for Gaussian kernels |q - k|^2 / (2 sqrt(hs)), of a
                      position with itself or one before it
    out_of_range      GKpoly-n only: how many of them exceed 2^n, where its polynomial rises again
    update_ratio      root mean square of an update over that of the weights before it, for the block's
                      trained matrices
"""

import inspect
import math
from contextlib import contextmanager, nullcontext

import torch

from support.errors import NotFinite
from support.training.fsdp import full_tensor


class Guard:
    """Keeps updates that aren't finite out of the weights, and counts the clipped ones.

    grad_clip: the norm above which gradients are clipped. has_scaler: whether a gradient scaler deals with
    gradients that aren't finite.
    """

    def __init__(self, device, grad_clip, has_scaler):
        self.grad_clip, self.has_scaler = grad_clip, has_scaler
        self.n_clipped = torch.zeros((), device=device)
        self.first_bad = torch.full((), math.inf, device=device)  # the first iteration that wasn't finite

    def allows(self, iteration, loss, grad_norm, optimizer):
        """Whether the optimizer may make a step. One that can skip an update on the device, as PyTorch's
        gradient scaler asks for, is given found_inf, so that the host doesn't wait; any other waits."""
        self.n_clipped += grad_norm > self.grad_clip
        finite = torch.isfinite(loss) if self.has_scaler else torch.isfinite(loss + grad_norm)
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=iteration))
        if getattr(optimizer, '_step_supports_amp_scaling', False):
            optimizer.found_inf = (~finite).float()
            return True
        return bool(finite)

    def stop_if_not_finite(self, iteration, last_state, *values):
        """NotFinite, on all processes, if an update was skipped or one of `values`, the same on all,
        isn't finite."""
        if self.first_bad.item() < math.inf or not all(map(math.isfinite, values)):
            iteration = min(self.first_bad.item(), iteration)
            raise NotFinite(
                f'iteration {iteration:.0f}: the loss or the gradient is not finite; no update was made with '
                f'it. {last_state}. A lower learning_rate or a longer warm-up may help')

    def stop_if_unfit(self, iteration, last_state, state):
        """NotFinite if a weight or an optimizer's buffer isn't finite: such a state isn't saved."""
        parts = state.model, state.trained or {}, *state.optimizer['state'].values()
        tensors = [t for part in parts for t in part.values() if torch.is_tensor(t)]
        if not all(t.isfinite().all() for t in tensors):
            raise NotFinite(f'iteration {iteration}: weights or optimizer buffers are not finite, so nothing '
                            f'was saved. {last_state}')

    def state_dict(self):
        return {'n_clipped': self.n_clipped.item()}

    def load_state_dict(self, state):
        self.n_clipped.fill_(state['n_clipped'])


@torch.no_grad()
def measure_vitals(model, run, x, check=None):
    """A record without update_ratio, from one forward pass of x, an array (B, T), as in an evaluation; {} for
    a model without transformer.h, and without attention's part where blocks have no attn.heads. check: called
    after each block; it may raise an exception, but not where the model is sharded."""
    blocks = blocks_of(model)
    if not blocks:
        return {}
    rms, logits = [], []

    def look(block, args, y):
        rms.append(mean_square(y))
        if check:
            check()

    def look_at_attention(attention, args):
        q, k, _ = attention.heads(args[0])
        logits.append(attention_logits(q, k, attention.config.attn_type))

    hooks = [block.register_forward_hook(look) for block in blocks]
    hooks += [block.attn.register_forward_pre_hook(look_at_attention) for block in blocks
              if gives_heads(getattr(block, 'attn', None))]
    model.eval()
    try:
        # compiled code would be compiled again for the hooks
        with torch.compiler.set_stance('force_eager') if run.compile else nullcontext(), run.autocast():
            model(run.to_device(x))
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    record = {'activation_rms': torch.stack(rms).sqrt()}
    if logits:
        record['attention_logit'] = torch.stack([largest for largest, _ in logits])
    if any(count is not None for _, count in logits):
        record['out_of_range'] = torch.stack([count for _, count in logits])
    return record


def gives_heads(attention):
    """Whether it has the method `heads` of model.py's attention; other models have numbers of that name."""
    return inspect.ismethod(getattr(attention, 'heads', None)) and hasattr(
        getattr(attention, 'config', None), 'attn_type')


def blocks_of(model):
    """The blocks of a GPT, [] for a model that keeps them elsewhere."""
    return list(getattr(getattr(model, 'transformer', None), 'h', None) or [])


def attention_logits(q, k, attn_type):
    """The largest logit of a layer, and for GKpoly-n how many exceed 2^n, else None. q: (B, nh, T, hs),
    k: (B, n_kv_head, T, hs)"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    limit = None
    if attn_type.startswith('GKpoly-'):
        limit = 2 ** int(attn_type.removeprefix('GKpoly-'))
    largest, n_beyond = [], []
    for window in zip(q, k):  # one at a time
        x = logit_sizes(*window, is_gaussian=attn_type.startswith('GK'))
        largest.append(x.amax())
        n_beyond.append((x > limit).sum() if limit else None)
    return torch.stack(largest).amax(), torch.stack(n_beyond).sum() if limit else None


def logit_sizes(q, k, is_gaussian):
    """q, k: (nh, T, hs) -> (nh, T, T), 0 for later keys"""
    q, k = q.float(), k.float()
    x = torch.cdist(q, k).square() / 2 if is_gaussian else (q @ k.mT).abs()
    return x.tril() / math.sqrt(q.shape[-1])


def mean_square(y):
    """y: a block's output, (B, T, C), or a tuple that begins with it"""
    y = y[0] if isinstance(y, tuple) else y
    return y.float().square().mean()


@contextmanager
def watch_update(model, record):
    """Add update_ratio to the record: what happens to the weights within a with statement."""
    layers = [[p for p in block.parameters() if p.dim() == 2 and p.requires_grad]
              for block in blocks_of(model)]
    layers = [layer for layer in layers if layer]
    before = [[p.detach().clone() for p in layer] for layer in layers]
    yield
    norm = torch.nn.utils.get_total_norm
    if layers:
        with torch.no_grad():
            ratios = [full_tensor(norm(torch._foreach_sub(new, old)) / norm(old))
                      for new, old in zip(layers, before)]
        record['update_ratio'] = torch.stack(ratios)
