"""
What a run will need, told before it begins: data, arithmetic, memory, disk, time.

    print(describe(model, ...))
    with out_of_memory_advice(batch_size=12, gradient_accumulation_steps=40):
        ...
"""

import os
import re
import shutil
import statistics
from contextlib import contextmanager

import torch

import runtime


def describe(model, run, tokens, iterations, sequences, batch_size, out_dir):
    """A short table of a run's needs, warnings included.

    model: on its device. tokens: {split: number of tokens}. iterations, sequences: those still to do, by all
    processes. Counts and sizes are exact, but for memory, which is an estimate.
    """
    c = model.config
    n_params = model.get_num_params(non_embedding=False)
    to_see = sequences * c.block_size
    memory, there = memory_needed(model, batch_size, run.dtype), runtime.total_memory(run.device)
    disk, free = 4 * checkpoint_bytes(model), free_disk(out_dir)  # three files, and one being written
    rows = {
        'data': f'{tokens["train"]:,} tokens to train on, {tokens["val"]:,} to validate',
        'model': f'{n_params:,} parameters: {c.n_layer} layers of {c.n_embd}, {c.n_head} heads, block_size '
                 f'{c.block_size}, vocabulary {c.vocab_size:,}',
        'run': f'{iterations:,} iterations of {to_see // max(1, iterations):,} tokens: {to_see:,} tokens, '
               f'{to_see / tokens["train"]:.2f} epochs, {model.estimate_mfu(sequences, 1.0, 1.0):.1e} FLOPs',
        'memory': f'about {size(memory)}' + (f' of {size(there)} on {run.device}' if there else '')
                  + ('  <- TOO LITTLE: a smaller batch_size, or activation_checkpointing'
                     if there and memory > there else ''),
        'disk': f'{size(disk)} for checkpoints, {size(free)} free'
                + ('  <- TOO LITTLE' if disk > free else ''),
    }
    return '\n'.join(f'{name:8}{text}' for name, text in rows.items())


def memory_needed(model, batch_size, dtype):
    """Bytes that training holds at its highest, estimated.

    Parameters are in float32, and so are gradient and AdamW's two moments of each that is trained: 4 bytes
    a parameter and 12. A block keeps 16
    n_embd values a token for its backward pass: the inputs of two normalisations, of c_attn and c_fc, q, k, v
    and the attention's result, and four times n_embd before and after the activation; with
    activation_checkpointing only its input, the rest for one block at a time. Then there are the logits of a
    chunk of tokens and the gradient of the output layer.
    """
    c = model.config
    size = 4 if dtype == 'float32' else 2
    tokens = batch_size * c.block_size
    block = tokens * c.n_embd * 16 * size
    kept = c.n_layer * tokens * c.n_embd * 4 + block if model.activation_checkpointing else c.n_layer * block
    head = 2 * 4 * min(tokens * c.vocab_size, 1 << 24) + 4 * c.vocab_size * c.n_embd
    return 4 * model.get_num_params(non_embedding=False) + 12 * n_trained(model) + kept + head


def checkpoint_bytes(model):
    """A checkpoint holds the parameters and two moments of each that is trained, in float32; what has
    adapters twice, without and with them."""
    adapted = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2 and not p.requires_grad)
    return 4 * (model.get_num_params(non_embedding=False) + adapted) + 8 * n_trained(model)


def n_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def free_disk(folder):
    """Free bytes where `folder` is or will be."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def smaller_batch(batch_size, gradient_accumulation_steps):
    """(batch_size, gradient_accumulation_steps) of the same product with the next smaller batch that divides
    it; None for a batch of 1."""
    fits = [b for b in range(1, batch_size // 2 + 1) if batch_size % b == 0]
    return (fits[-1], gradient_accumulation_steps * batch_size // fits[-1]) if fits else None


@contextmanager
def out_of_memory_advice(batch_size, gradient_accumulation_steps):
    """Turn an allocation that failed into a MemoryError of one line that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not re.search('(allocate|out of) memory', str(error)):  # as a CPU, and MPS, say it
            raise
        smaller = smaller_batch(batch_size, gradient_accumulation_steps)
        how = (f'--batch_size={smaller[0]} --gradient_accumulation_steps={smaller[1]} trains on the same '
               'tokens an iteration' if smaller else 'a shorter --block_size or a smaller model needs less')
        raise MemoryError(f'out of memory at batch_size={batch_size}: {how}; --activation_checkpointing=True '
                          'needs less too, and is slower') from None


def time_needed(times, iterations, eval_interval, eval_batches, micro_steps):
    """What a run takes, in words. times: seconds of a few iterations, of which the first two don't count;
    iterations: the range that the run does; eval_batches: of each process an evaluation."""
    step = statistics.median(times[2:] or times)
    n_evals = sum(i % eval_interval == 0 or i == iterations[-1] for i in iterations)
    evaluations = n_evals * eval_batches * step / micro_steps / 3  # a forward pass is a third of a step
    return (f'{step * 1000:.2f}ms an iteration, {duration(len(iterations) * step + evaluations)} in all, '
            f'of which evaluations {duration(evaluations)}')


def size(n_bytes):
    return f'{n_bytes / 1e9:,.1f} GB' if n_bytes >= 1e9 else f'{n_bytes / 1e6:,.1f} MB'


def duration(seconds):
    """3725 -> '1 h 2 min'"""
    for unit, length, part, per in (('d', 86400, 'h', 3600), ('h', 3600, 'min', 60), ('min', 60, 's', 1)):
        if seconds >= length:
            return f'{int(seconds // length)} {unit} {int(seconds % length // per)} {part}'
    return f'{seconds:.0f} s'
