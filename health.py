"""
What goes on inside a network while it is trained, measured without a trace in the training.

    record = measure(model, run, x)          # at an evaluation, before the update
    with watch_update(model, record):        # needs the memory of a copy of the blocks' weights
        optimizer.step()
    log.write_later(iter_num, record)

A record has tensors on the device, of a number for each layer:
    activation_rms    root mean square of the residual stream as the block hands it on
    attention_logit   the largest |q . k| / sqrt(hs) of a position with itself or one before
    update_ratio      root mean square of an update, over that of the weights before it: the block's matrices
"""

import math
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch


@torch.no_grad()
def measure(model, run, x):
    """activation_rms and attention_logit in one forward pass of x, an array (B, T), as in an evaluation."""
    blocks, rms, logits = model.transformer.h, [], []

    def spied_on(attend):
        def wrapper(q, k, *args, **kwargs):
            logits.append(largest_logit(q, k))
            return attend(q, k, *args, **kwargs)
        return wrapper

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patch.object(block.attn, 'attend', spied_on(block.attn.attend)))
            hook = block.register_forward_hook(lambda block, args, y: rms.append(y.float().square().mean()))
            stack.callback(hook.remove)
        model.eval()
        with run.autocast():
            model.forward(run.to_device(x))  # not model(), which may have been compiled without the hooks
        model.train()
    return {'activation_rms': torch.stack(rms).sqrt(), 'attention_logit': torch.stack(logits)}


def largest_logit(q, k):
    """q: (B, nh, T, hs), k: (B, n_kv_head, T, hs) -> (); one window at a time, for want of memory."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    largest = [(a @ b.mT).tril().abs().amax() for a, b in zip(q, k)]
    return torch.stack(largest).amax().float() / math.sqrt(q.shape[-1])


@contextmanager
def watch_update(model, record):
    """Adds update_ratio to the record, of what happens to the weights within."""
    layers = [[p for p in block.parameters() if p.dim() == 2] for block in model.transformer.h]
    before = [[p.detach().clone() for p in layer] for layer in layers]
    yield
    norm = torch.nn.utils.get_total_norm
    with torch.no_grad():
        record['update_ratio'] = torch.stack([
            norm(torch._foreach_sub(new, old)) / norm(old) for new, old in zip(layers, before)])
