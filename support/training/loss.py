"""
Training in less memory: cross-entropy that never holds all logits, and activation checkpointing.

    use_lean_loss(model)             # model(x, y) returns (None, loss) from here on
    with lean_loss(model):           # the same, for a while
        _, loss = model(x, y)
    checkpoint_activations(model)    # keep the input of each block, recompute the rest in the backward pass
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.machine.hardware import fastest_float32


def use_lean_loss(model):
    """Have a GPT compute its loss without its logits: model(idx, targets) -> (None, loss)."""
    model.loss = partial(loss_alone, model)


@contextmanager
def lean_loss(model):
    """`use_lean_loss` within a with statement; afterwards the model is as before."""
    before = model.__dict__.get('loss')
    use_lean_loss(model)
    try:
        yield
    finally:
        del model.loss
        if before is not None:
            model.loss = before


def loss_alone(model, x, targets):
    """x: (B, T, C), targets: (B, T) -> None, mean cross-entropy in nats"""
    x, targets = x.flatten(0, 1), targets.flatten()
    if torch.compiler.is_compiling():  # the compiler fuses logits and loss by itself
        return None, F.cross_entropy(model.softcap(model.lm_head(x)), targets, ignore_index=-1)
    head = model.lm_head
    w = head.weight if head.weight.is_floating_point() else head.full_weight(x.dtype)  # (V, C)
    with fastest_float32(x.device.type):
        return None, linear_cross_entropy(x, w, targets, model.config.logit_softcap)


def checkpoint_activations(model):
    """Keep only the inputs of a GPT's blocks while it trains (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost"). Call it before the model is sharded or compiled."""
    for block in model.transformer.h:
        block.forward = partial(forward_checkpointed, block, block.forward)


def forward_checkpointed(block, forward, *args):
    return checkpoint(forward, *args, use_reentrant=False) if block.training else forward(*args)


def linear_cross_entropy(x, w, targets, cap=0.0):
    """Mean cross-entropy of the logits x w^T in nats. x: (N, C), w: (V, C), targets: (N,); a target of -1
    doesn't count. A cap that isn't 0 makes the logits cap tanh(x w^T / cap)."""
    return LinearCrossEntropy.apply(x, w, targets, torch.is_grad_enabled(), cap)


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`, a few rows at a time.

    The forward pass computes each chunk's gradient, softmax(x w^T) - onehot(target), while it holds the
    chunk's softmax, so nothing is computed twice and the backward pass only scales. In 16 bits it divides by
    the number of targets at the end, where a loss scale is there too: float16 would lose most of p / N.
    """
    CHUNK = 1 << 23  # logits in memory at a time
    GPU_CHUNK = 1 << 26  # each chunk adds to all of the weights' gradient, which few rows don't pay for

    @staticmethod
    def forward(ctx, x, w, targets, with_grad, cap):
        device, dtype = x.device.type, w.dtype  # of the products
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        rows = max(1, chunk_of(device) // w.shape[0])
        exact = torch.promote_types(dtype, torch.float32)  # of sums
        kept = targets != -1
        share, count = kept.to(exact)[:, None], kept.sum()  # (N, 1)
        if dtype == exact:
            share, count = share / count, None
        loss = x.new_zeros((), dtype=exact)
        dx = torch.empty_like(x) if with_grad else None
        dw = torch.empty_like(w) if with_grad and ctx.needs_input_grad[1] else None  # w may be frozen
        with torch.autocast(device, enabled=False):
            low_w = w.to(dtype)
            for i in range(0, len(x), rows):
                at = slice(i, i + rows)
                low_x, target = x[at].to(dtype), targets[at].clamp(min=0)[:, None]  # (rows, C), (rows, 1)
                logits = (low_x @ low_w.T).to(exact)
                p, part = cross_entropy_gradient(logits, target, share[at], cap, with_grad)
                loss += part
                if with_grad:
                    p = p.to(dtype)
                    dx[at] = p @ low_w
                if dw is not None and dtype == w.dtype:
                    dw.addmm_(p.T, low_x, beta=1 if i else 0)
                elif dw is not None:
                    (dw.add_ if i else dw.copy_)(p.T @ low_x)
                del logits, p  # before the next chunk
        ctx.save_for_backward(dx, dw, count)
        return loss if count is None else loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        grad = grad if count is None else grad / count
        return dx.mul_(grad), None if dw is None else dw.mul_(grad), None, None, None


def chunk_of(device_type):
    """Logits in memory at a time."""
    return LinearCrossEntropy.GPU_CHUNK if device_type == 'cuda' else LinearCrossEntropy.CHUNK


def cross_entropy_gradient(p, target, share, cap, with_grad):
    """Turns logits p, (N, V), into the gradient for them, in place. target, share: (N, 1), the latter each
    row's part of the sum. Returns the gradient, which is of no use without `with_grad`, and the loss, ()."""
    capped = p.div_(cap).tanh_().mul_(cap) / cap if cap else None
    highest, wanted = p.amax(dim=-1, keepdim=True), p.gather(1, target)
    total = p.sub_(highest).exp_().sum(dim=-1, keepdim=True)  # of the softmax
    loss = ((total.log() + highest - wanted) * share).sum()
    if with_grad:
        p.mul_(share / total).scatter_add_(1, target, -share)
        if cap:
            p *= 1 - capped.square()  # the derivative of cap tanh(z / cap)
    return p, loss
