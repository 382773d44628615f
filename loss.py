"""
Cross-entropy of a large vocabulary, without holding all logits in memory.

    loss = linear_cross_entropy(x, weight, targets)      # of the logits x weight^T
"""

import torch


def linear_cross_entropy(x, w, targets, cap=0.0):
    """x: (N, C), w: (V, C), targets: (N,) with -1 for none -> mean cross-entropy in nats. A cap that isn't 0
    makes the logits cap tanh(x w^T / cap)."""
    return LinearCrossEntropy.apply(x, w, targets, torch.is_grad_enabled(), cap)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x w^T, a few rows at a time, so that they are never held all at once.

    The gradient of each chunk, (softmax(x w^T) - onehot(target)) / count, is used up right away, while its
    softmax is there: nothing is computed twice, and the backward pass has only to scale.
    """
    CHUNK = 1 << 23  # logits in memory at a time

    @staticmethod
    def forward(ctx, x, w, targets, with_grad, cap):
        rows = max(1, LinearCrossEntropy.CHUNK // w.shape[0])
        exact = torch.promote_types(x.dtype, torch.float32)  # for sums, where autocast multiplies in 16 bits
        kept = targets != -1
        weight = kept.to(exact) / kept.sum()  # (N,)
        loss = x.new_zeros((), dtype=exact)
        dx = torch.empty_like(x) if with_grad else None
        dw = torch.empty_like(w) if with_grad and ctx.needs_input_grad[1] else None  # none where w is frozen
        for i in range(0, len(x), rows):
            at = slice(i, i + rows)
            p = (x[at] @ w.T).to(exact)  # (rows, V): logits, in whose memory all else is computed
            capped = p.div_(cap).tanh_().mul_(cap) / cap if cap else None
            target, share = targets[at].clamp(min=0)[:, None], weight[at, None]  # (rows, 1)
            highest, wanted = p.amax(dim=-1, keepdim=True), p.gather(1, target)
            total = p.sub_(highest).exp_().sum(dim=-1, keepdim=True)  # of the softmax
            loss += ((total.log() + highest - wanted) * share).sum()
            if with_grad:
                p.mul_(share / total).scatter_add_(1, target, -share)
                if cap:
                    p *= 1 - capped.square()  # the derivative of cap tanh(z / cap)
                dx[at] = p @ w
                if dw is not None and torch.is_autocast_enabled(x.device.type):
                    (dw.add_ if i else dw.copy_)(p.T @ x[at])
                elif dw is not None:
                    dw.addmm_(p.T, x[at], beta=1 if i else 0)  # in place, which autocast doesn't know
            del p  # before the next is made
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), None if dw is None else dw.mul_(grad), None, None, None
