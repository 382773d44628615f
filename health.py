"""
What goes on inside a network while it is trained, measured without a trace in the training.

    record = measure(model, run, x)          # at an evaluation, before the update
    with watch_update(model, record):        # needs the memory of a copy of the blocks' weights
        optimizer.step()
    log.write_later(iter_num, record)

A record has tensors on the device, of a number for each layer:
    activation_rms    root mean square of the residual stream as the block hands it on
    attention_logit   the largest |q . k| / sqrt(hs), for Gaussian kernels |q - k|^2 / (2 sqrt(hs)), of a
                      position with itself or one before
    out_of_range      of GKpoly-n, how many of the latter are above 2^n, where its polynomial rises again
    update_ratio      root mean square of an update, over that of the weights before it: the block's
                      matrices that are trained
"""

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch

from parallel import is_sharded, whole


@torch.no_grad()
def measure(model, run, x):
    """activation_rms and attention_logit in one forward pass of x, an array (B, T), as in an evaluation."""
    blocks, attn_type = model.transformer.h, model.config.attn_type
    limit = 2.0 ** int(attn_type[7:]) if attn_type.startswith('GKpoly') else math.inf
    sizes, rms, logits, beyond = partial(logit_sizes, attn_type), [], [], []

    def spied_on(attend):
        def wrapper(q, k, *args, **kwargs):
            k_all = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            found = [(x.amax(), (x > limit).sum()) for x in map(sizes, q, k_all)]  # a window at a time
            logits.append(torch.stack([largest for largest, _ in found]).amax())
            beyond.append(torch.stack([count for _, count in found]).sum())
            return attend(q, k, *args, **kwargs)
        return wrapper

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patch.object(block.attn, 'attend', spied_on(block.attn.attend)))
            hook = block.register_forward_hook(lambda block, args, y: rms.append(y.float().square().mean()))
            stack.callback(hook.remove)
        model.eval()
        with run.autocast():
            # not model() where that may have been compiled without the hooks; FSDP's needs it
            (model if is_sharded(model) else model.forward)(run.to_device(x))
        model.train()
    record = {'activation_rms': torch.stack(rms).sqrt(), 'attention_logit': torch.stack(logits)}
    return record | ({'out_of_range': torch.stack(beyond)} if limit < math.inf else {})


def logit_sizes(attn_type, q, k):
    """q, k: (nh, T, hs) -> (nh, T, T), 0 for keys to come"""
    q, k = q.float(), k.float()
    x = torch.cdist(q, k).square() / 2 if attn_type.startswith('GK') else (q @ k.mT).abs()
    return x.tril() / math.sqrt(q.shape[-1])


@contextmanager
def watch_update(model, record):
    """Adds update_ratio to the record, of what happens to the weights within."""
    layers = [[p for p in block.parameters() if p.dim() == 2 and p.requires_grad]
              for block in model.transformer.h]
    before = [[p.detach().clone() for p in layer] for layer in layers]
    yield
    norm = torch.nn.utils.get_total_norm
    with torch.no_grad():
        record['update_ratio'] = torch.stack([
            whole(norm(torch._foreach_sub(new, old)) / norm(old)) for new, old in zip(layers, before)])
