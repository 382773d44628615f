"""
What changes in the course of a run: the learning rate and the size of the batch.

    lr = min_lr + SCHEDULES['linear'](progress) * (learning_rate - min_lr)
    ramp = BatchRamp(micro_steps=8, iterations=100)
    for micro_step in range(ramp.at(iteration)):
        ...
"""

import math

# The part of the way from min_lr to learning_rate, at a progress from 0 (end of the warm-up) to 1.
SCHEDULES = {
    'cosine': lambda p: 0.5 * (1 + math.cos(math.pi * p)),  # Loshchilov & Hutter 2017, eq. 5, one period
    'linear': lambda p: 1 - p,
    'wsd': lambda p: min(1.0, (1 - p) / 0.2),  # stable, the last fifth decay (Hu et al. 2024)
    'constant': lambda p: 1.0,
}


class BatchRamp:
    """The micro-steps of an iteration, of each process: they rise from 1 to `micro_steps` in `iterations`."""

    def __init__(self, micro_steps, iterations):
        self.micro_steps, self.iterations = micro_steps, iterations

    def at(self, iteration):
        return math.ceil(self.micro_steps * min(1, (iteration + 1) / (self.iterations + 1)))

    def before(self, iteration):
        """Micro-steps of all iterations before this one."""
        rising = min(iteration, self.iterations)
        return sum(map(self.at, range(rising))) + (iteration - rising) * self.micro_steps
