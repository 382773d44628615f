"""
A model's loss on a dataset, as a measurement: the same windows every time, and no trace in a training run.

    loss = mean_loss(model, run, tokens, block_size=1024, batch_size=12)
"""

import numpy as np
import torch

from dataset import eval_windows, read_windows


@torch.no_grad()
def mean_loss(model, run, tokens, block_size, batch_size, n_batches=0, watch=iter):
    """Mean cross-entropy, in nats, of windows spread evenly over a split, the processes taking turns at the
    batches; 0 batches: all windows. watch: wraps the loop over the batches, as tqdm does."""
    was_training = model.training
    model.eval()
    losses, counts = [torch.zeros((), device=run.device)], [0]
    batches = eval_windows(len(tokens), block_size, batch_size, n_batches)
    # as many for each process, who may need one another to run the model; those added have no targets
    batches = np.pad(batches, ((0, -len(batches) % run.world_size), (0, 0)), constant_values=len(tokens))
    for starts in watch(batches[run.rank::run.world_size]):
        x, y = read_windows(tokens, starts, block_size)
        with run.autocast():
            _, loss = model(run.to_device(x), run.to_device(y), return_logits=False)
        if (y >= 0).any():
            losses.append(loss)
            counts.append(int((y >= 0).sum()))
    model.train(was_training)
    total = torch.stack(losses).cpu().double() @ torch.tensor(counts).double()  # MPS has no float64
    loss_sum, n_targets = run.sum(total.item(), sum(counts))
    return loss_sum / n_targets
