"""
Numbers that blow up: losses and gradients that are not finite, or far above those before.

    if guard.allows(iter_num, loss, norm, optimizer):
        optimizer.step()                  # which itself leaves out what is not finite
    guard.stop_if_not_finite(iter_num)    # now and then: it waits for the device
"""

import math
import statistics

import torch

MEMORY = 128  # updates that a spike is judged by


class Guard:
    """Keeps bad updates out of the weights.

    grad_clip: the largest norm a gradient keeps; guard.n_clipped counts those above it, on the device.
    skip_spikes: leave out updates whose loss or gradient norm is this many standard deviations above the mean
    of the last MEMORY; 0: none. unscaled: whether a gradient scaler deals with gradients that aren't finite.
    """

    def __init__(self, device, grad_clip, skip_spikes, unscaled):
        self.grad_clip, self.skip_spikes, self.unscaled = grad_clip, skip_spikes, unscaled
        self.n_clipped = torch.zeros((), device=device)
        self.first_bad = torch.full((), math.inf, device=device)  # the first iteration that wasn't finite
        self.n_skipped, self.recent = 0, []  # updates left out; loss and gradient norm of the last others

    def allows(self, iteration, loss, norm, optimizer):
        """Whether to make an update, of a loss and a gradient norm that are still on the device. Where they
        aren't finite the optimizer leaves it out, by found_inf: the host needn't wait for them."""
        self.n_clipped += norm > self.grad_clip
        finite = torch.isfinite(loss) if self.unscaled else torch.isfinite(loss + norm)
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=iteration))
        optimizer.found_inf = (~finite).float().to(norm.device)  # the parameters', on a CPU if offloaded
        if not self.skip_spikes:
            return True
        values = loss.item(), norm.item()
        if len(self.recent) == MEMORY and any(
                v > statistics.mean(before) + self.skip_spikes * statistics.pstdev(before)
                for v, before in zip(values, zip(*self.recent))):
            self.n_skipped += 1
            return False
        self.recent = [*self.recent[1 - MEMORY:], values]
        return True

    def stop_if_not_finite(self, iteration, last_state, *values):
        """FloatingPointError, on all processes, if an update was held back or one of `values`, the same on
        all, is not finite."""
        if self.first_bad.item() < math.inf or not all(map(math.isfinite, values)):
            iteration = min(self.first_bad.item(), iteration)
            raise FloatingPointError(
                f'iteration {iteration:.0f}: the loss or the gradient is not finite; no update was made with '
                f'it. {last_state}. A lower learning_rate or a longer warm-up may help')

    def stop_if_unfit(self, iteration, last_state, state):
        """FloatingPointError if a weight or an optimizer's buffer is not finite: such a state isn't saved."""
        parts = state['model'], state.get('trained', {}), *state['optimizer']['state'].values()
        if not all(t.isfinite().all() for part in parts for t in part.values()):
            raise FloatingPointError(f'iteration {iteration}: weights or optimizer buffers are not finite, '
                                     f'so nothing was saved. {last_state}')

    def state_dict(self):
        return {'n_skipped': self.n_skipped, 'recent': self.recent, 'n_clipped': self.n_clipped.item()}

    def load_state_dict(self, state):
        self.n_skipped, self.recent = state['n_skipped'], state['recent']
        self.n_clipped.fill_(state['n_clipped'])
