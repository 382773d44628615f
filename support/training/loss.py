"""
The model's own loss without all of its logits in memory.

    lean = lean_loss(model, run)              # arguments for each call: {'loss': a function}, or {}
    _, loss = model(x, targets, **lean)

The logits of a batch are the largest tensor of a small GPT's training: 12 x 1024 tokens times 50,304 are
2.5 GB in float32. The function calls `model.loss` on a few positions at a time, so what stands there is what
is computed. Before a run moves or shards its model, both are compared on a few numbers.
"""

import inspect

import torch

from support.machine.console import print0

CHUNK = 1 << 23  # logits in memory at a time
GPU_CHUNK = 1 << 26  # few rows don't pay for the addition to the whole matrix's gradient


def lean_loss(model, run):
    """Arguments for a model's forward pass: {'loss': ChunkedLoss}, or {} where the model takes no such
    argument, or where its loss of a few positions isn't the mean of their losses."""
    if 'loss' not in inspect.signature(model.forward).parameters or not hasattr(model, 'loss'):
        print0('loss: computed with all logits in memory, as this model.py takes no loss=')
        return {}
    loss = ChunkedLoss(model, chunk_of(run.device_type))
    if not loss.agrees():
        print0('loss: computed with all logits in memory, as this model\'s loss is no mean over positions')
        return {}
    return {'loss': loss}


def chunk_of(device_type):
    """Logits in memory at a time."""
    return GPU_CHUNK if device_type == 'cuda' else CHUNK


class ChunkedLoss:
    """model.loss for use in its place: (x, targets) -> None, the mean loss. x: (B, T, C), targets: (B, T)."""

    def __init__(self, model, chunk):
        self.model, self.chunk = model, chunk

    def __call__(self, x, targets):
        rows = max(1, self.chunk // self.model.config.vocab_size)
        if torch.compiler.is_compiling() or targets.numel() <= rows:  # a compiler fuses logits and loss
            return None, self.model.loss(x, targets)[1]
        return None, self.in_chunks(x, targets, rows)

    def in_chunks(self, x, targets, rows):
        head = [p for p in self.model.lm_head.parameters() if p.requires_grad]
        x, targets = x.reshape(1, -1, x.shape[-1]), targets.reshape(1, -1)
        return MeanOfChunks.apply(self.model.loss, rows, targets, x, *head)

    def agrees(self):
        """Whether a few positions give the same loss and gradients in chunks as at once."""
        devices = [p.device for p in self.model.parameters()]  # packed weights are of none
        device = next(device for device in devices if device.type != 'meta')
        try:
            return self.compare(*few_positions(self.model.config, device))
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            return False  # a loss that needs more than x and targets, or a whole batch

    def compare(self, x, targets):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        x.requires_grad_(bool(trained))  # 8-bit weights have no backward pass
        both = []
        for loss in (self.model.loss(x, targets)[1], self.in_chunks(x, targets, rows=2)):
            grads = torch.autograd.grad(loss, [x, *trained], allow_unused=True) if trained else []
            both.append([loss.detach(), *grads])
        return all(is_close(a, b) for a, b in zip(*both))


def few_positions(config, device):
    """x, (1, 7, C), of a size that makes logits differ, and targets, (1, 7). Some don't count, but on a GPU,
    where a loss that knows no -1 would end the program."""
    x = 10 * torch.arange(7.0 * config.n_embd, device=device).square().sin().view(1, 7, -1)
    targets = torch.tensor([[1, -1, -1, -1, 0, 2, 1]], device=device).clamp(max=config.vocab_size - 1)
    return x, targets if device.type == 'cpu' else targets.clamp(min=0)


def is_close(a, b):
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


class MeanOfChunks(torch.autograd.Function):
    """The mean of loss(x, targets)[1] over all targets but -1, from a few rows at a time.

    The forward pass computes the gradients too, as only then a chunk's logits are in memory; the backward
    pass scales them. They are of the sum: divided by the number of targets before, they would be too small
    for float16, which the loss's scale then couldn't help.
    """

    @staticmethod
    def forward(ctx, loss, rows, targets, x, *params):
        """x: (1, N, C), targets: (1, N), params: what the gradient is for besides x."""
        with_grad = any(ctx.needs_input_grad)
        total, count = x.new_zeros((), dtype=torch.float32), (targets != -1).sum()
        grads = [torch.empty_like(x), *map(torch.zeros_like, params)] if with_grad else []
        for i in range(0, x.shape[1], rows):
            part = x[:, i:i + rows].detach().requires_grad_(with_grad)
            wanted = targets[:, i:i + rows]
            n = (wanted != -1).sum()
            wanted = torch.where(n > 0, wanted, 0)  # a mean over no targets isn't a number
            with torch.set_grad_enabled(with_grad):
                part_sum = loss(part, wanted)[1] * n
            total += part_sum.detach()
            if with_grad:
                # no grad_outputs, for which PyTorch would import sympy: a quarter of a second
                found = torch.autograd.grad(part_sum, [part, *params])
                grads[0][:, i:i + rows] = found[0]
                for grad, more in zip(grads[1:], found[1:]):
                    grad += more
            del part_sum  # and with it the logits, before the next chunk
        ctx.save_for_backward(count, *grads)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        count, *grads = ctx.saved_tensors
        return None, None, None, *(g.mul_(grad / count) for g in grads)
