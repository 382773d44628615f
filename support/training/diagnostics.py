"""
Numbers that blow up, and what goes on inside a network while it trains.

    guard.watch(iter_num, loss, grad_norm, optimizer)
    optimizer.step()                            # skipped by the optimizer itself if they aren't finite
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

    def watch(self, iteration, loss, grad_norm, optimizer):
        """Tell the optimizer to skip an update whose loss or gradient norm isn't finite. All stays on the
        device: the host doesn't wait."""
        self.n_clipped += grad_norm > self.grad_clip
        finite = torch.isfinite(loss) if self.has_scaler else torch.isfinite(loss + grad_norm)
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=iteration))
        optimizer.found_inf = (~finite).float().to(grad_norm.device)  # the CPU if parameters are offloaded

    def stop_if_not_finite(self, iteration, last_state, *values):
        """FloatingPointError, on all processes, if an update was skipped or one of `values`, the same on all,
        isn't finite."""
        if self.first_bad.item() < math.inf or not all(map(math.isfinite, values)):
            iteration = min(self.first_bad.item(), iteration)
            raise NotFinite(
                f'iteration {iteration:.0f}: the loss or the gradient is not finite; no update was made with '
                f'it. {last_state}. A lower learning_rate or a longer warm-up may help')

    def stop_if_unfit(self, iteration, last_state, state):
        """FloatingPointError if a weight or an optimizer's buffer isn't finite: such a state isn't saved."""
        parts = state['model'], state.get('trained', {}), *state['optimizer']['state'].values()
        if not all(t.isfinite().all() for part in parts for t in part.values()):
            raise NotFinite(f'iteration {iteration}: weights or optimizer buffers are not finite, '
                                     f'so nothing was saved. {last_state}')

    def state_dict(self):
        return {'n_clipped': self.n_clipped.item()}

    def load_state_dict(self, state):
        self.n_clipped.fill_(state['n_clipped'])


class AttentionProbe:
    """Stands in for an attention's `attend` and measures its logits."""

    def __init__(self, attend, attn_type):
        self.attend, self.is_gaussian = attend, attn_type.startswith('GK')
        self.limit = 2.0 ** int(attn_type[7:]) if attn_type.startswith('GKpoly') else math.inf

    def __call__(self, q, k, *args):
        shared = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        found = [(x.amax(), (x > self.limit).sum()) for x in map(self.sizes, q, shared)]  # a window at a time
        self.largest = torch.stack([largest for largest, _ in found]).amax()
        self.n_beyond = torch.stack([count for _, count in found]).sum()
        return self.attend(q, k, *args)

    def sizes(self, q, k):
        """q, k: (nh, T, hs) -> (nh, T, T), 0 for later keys"""
        q, k = q.float(), k.float()
        x = torch.cdist(q, k).square() / 2 if self.is_gaussian else (q @ k.mT).abs()
        return x.tril() / math.sqrt(q.shape[-1])


@torch.no_grad()
def measure_vitals(model, run, x, check=None):
    """A record without update_ratio, from one forward pass of x, an array (B, T), as in an evaluation.
    check: called after each block; it may raise an exception, but not where the model is sharded."""
    blocks, rms = model.transformer.h, []
    probes = [AttentionProbe(block.attn.attend, model.config.attn_type) for block in blocks]

    def look(block, args, y):
        rms.append(mean_square(y))
        if check:
            check()

    hooks = [block.register_forward_hook(look) for block in blocks]
    for block, probe in zip(blocks, probes):
        block.attn.attend = probe
    model.eval()
    try:
        # compiled code would be compiled again for the probes
        with torch.compiler.set_stance('force_eager') if run.compile else nullcontext(), run.autocast():
            model(run.to_device(x))
    finally:
        model.train()
        for block, probe, hook in zip(blocks, probes, hooks):
            block.attn.attend = probe.attend
            hook.remove()
    record = {'activation_rms': torch.stack(rms).sqrt(),
              'attention_logit': torch.stack([probe.largest for probe in probes])}
    if probes[0].limit < math.inf:
        record['out_of_range'] = torch.stack([probe.n_beyond for probe in probes])
    return record


def mean_square(y):
    """y: a block's output, (B, T, C), or a tuple that begins with it"""
    return (y[0] if isinstance(y, tuple) else y).float().square().mean()


@contextmanager
def watch_update(model, record):
    """Add update_ratio to the record: what happens to the weights within a with statement."""
    layers = [[p for p in block.parameters() if p.dim() == 2 and p.requires_grad]
              for block in model.transformer.h]
    before = [[p.detach().clone() for p in layer] for layer in layers]
    yield
    norm = torch.nn.utils.get_total_norm
    with torch.no_grad():
        record['update_ratio'] = torch.stack([full_tensor(norm(torch._foreach_sub(new, old)) / norm(old))
                                              for new, old in zip(layers, before)])
