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
from loss import LinearCrossEntropy


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


# bytes of memory; bytes/s to one GPU of the same node, to one of another node, to the machine's memory: data
# sheets' (NVLink, PCIe), and for other nodes the usual network of such machines, 25 to 50 GB/s a GPU
GPUS = {
    'A100': (80e9, 300e9, 25e9, 32e9),
    'H100': (80e9, 450e9, 50e9, 64e9),
    'H200': (141e9, 450e9, 50e9, 64e9),
    'B200': (180e9, 900e9, 50e9, 64e9),
    'RTX 4090': (24e9, 32e9, 3e9, 32e9),
}
NODE = 8  # GPUs
# A, alpha, B, beta of the loss of N parameters after D tokens: Hoffmann et al. 2022, approach 3 ("Training
# Compute-Optimal Large Language Models"), and Besiroglu et al. 2024, who fitted the same data again
FITS = {
    'Hoffmann et al.': (406.4, 0.34, 410.7, 0.28),
    'Besiroglu et al.': (482.01, 0.3478, 2085.43, 0.3658),
}
MFU = 0.4  # of a well filled GPU, of the matrix products alone: an assumption, see docs/SCALING.md
RESERVED = 2e9  # bytes for CUDA, libraries' workspaces and what falls between allocations: an assumption
STRATEGIES = {  # sharded, activation checkpointing, offload
    'ddp': (False, False, False),
    'ddp + checkpointing': (False, True, False),
    'fsdp': (True, False, False),
    'fsdp + checkpointing': (True, True, False),
    'fsdp + checkpointing + offload': (True, True, True),
}


def scale(model, n_gpus, gpu, sequences, iterations):
    """A table of what a run needs on n_gpus of a kind, for each strategy; docs/SCALING.md explains it.

    model: may be on the meta device. sequences: of block_size tokens an iteration. Computed, not measured.
    """
    if gpu not in GPUS:
        raise ValueError(f'plan_gpu={gpu} is not one of {", ".join(GPUS)}')
    if sequences % n_gpus:
        raise ValueError(f'gradient_accumulation_steps * batch_size = {sequences} sequences an iteration '
                         f'can\'t be shared by {n_gpus} GPUs: take a multiple of that')
    n, tokens = model.get_num_params(non_embedding=False), sequences * model.config.block_size
    best = ', '.join(f'{best_tokens(n, *fit):.1e} ({name})' for name, fit in FITS.items())
    lines = [f'{n:,} parameters on {n_gpus:,} {gpu}, {tokens:,} tokens an iteration, '
             f'{tokens * iterations:.1e} in all',
             f'tokens that make the best of the arithmetic: {best}',
             f'{"strategy":32}{"state":>10}{"micro-batch":>13}{"memory":>10}{"iteration":>11}{"run":>14}'
             f'{"GPU-hours":>12}']
    for name, strategy in STRATEGIES.items():
        fits = [b for b in range(1, sequences // n_gpus + 1) if sequences // n_gpus % b == 0
                and gpu_memory(model, n_gpus, sequences, b, *strategy) <= GPUS[gpu][0]]
        b = max(fits, default=0)
        row = f'{name:32}{size(state_memory(model, n_gpus, sequences, b or 1, *strategy)):>10}'
        if b:
            seconds = iteration_time(model, n_gpus, gpu, sequences, b, *strategy)
            row += (f'{b:13}{size(gpu_memory(model, n_gpus, sequences, b, *strategy)):>10}{seconds:>9.2f} s'
                    f'{duration(seconds * iterations):>14}{seconds * iterations * n_gpus / 3600:>12,.0f}')
        else:
            row += f'  does not fit: a micro-batch of 1 needs ' \
                   f'{size(gpu_memory(model, n_gpus, sequences, 1, *strategy))}'
        lines.append(row)
    return '\n'.join(lines)


def state_memory(model, n_gpus, sequences, batch_size, sharded, checkpointing, offload):
    """Bytes on a GPU that don't depend on the batch: in float32 parameters, gradients and AdamW's moments.

    DDP adds its buckets for gradients, and autocast copies of the matrices in 16 bits. FSDP holds 1/n, and
    gathered: the embeddings and their gradient in float32, two blocks in 16 bits, a block's gradient in both;
    and between micro-steps the sum of whole gradients, if they are not offloaded.
    """
    n, c = model.get_num_params(non_embedding=False), model.config
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    if not sharded:
        return 16 * n + (4 * n if n_gpus > 1 else 0) + 2 * blocks
    block = blocks // c.n_layer
    gathered = 8 * (n - blocks) + 2 * 2 * block + 6 * block
    accumulated = 4 * n if sequences // n_gpus > batch_size and not offload else 0
    return (0 if offload else 16 * n // n_gpus) + gathered + accumulated


def block_activations(model, size):
    """Bytes a token that a block keeps for its backward pass, for numbers of `size` bytes in matrix products:
    the inputs of both normalisations, which stay in float32, and of the four matrices; q, k, v; the
    activation's argument, swiglu's gate. Of GPT-2's block (8 + 14 size) C."""
    block, C = model.transformer.h[0], model.config.n_embd
    mlp = block.mlp.c_fc.out_features + block.mlp.c_proj.in_features * (
        2 if model.config.activation == 'swiglu' else 1)
    return 2 * 4 * C + size * (2 * C + block.attn.c_attn.out_features + C + mlp)


def activation_memory(model, batch_size, checkpointing, size=2):
    """Bytes of what a micro-batch keeps, the loss's chunk of logits included."""
    c, tokens = model.config, batch_size * model.config.block_size
    block = block_activations(model, size)
    blocks = c.n_layer * 4 * c.n_embd + block if checkpointing else c.n_layer * block
    head = 3 * 4 * c.n_embd * tokens + 3 * 4 * min(tokens * c.vocab_size, LinearCrossEntropy.CHUNK)
    return tokens * blocks + head


def gpu_memory(model, n_gpus, sequences, batch_size, sharded, checkpointing, offload):
    return (state_memory(model, n_gpus, sequences, batch_size, sharded, checkpointing, offload)
            + activation_memory(model, batch_size, checkpointing) + RESERVED)


def iteration_time(model, n_gpus, gpu, sequences, batch_size, sharded, checkpointing, offload):
    """Seconds: the longer of arithmetic and exchange, which overlap, and then what offloading adds.

    A ring passes each byte on once: DDP 8 N an iteration (gradients, there and back), FSDP 4 N a micro-step
    (parameters of 16 bits, twice) and 4 N an iteration (gradients), offloaded 4 N a micro-step.
    """
    _, near, far, host = GPUS[gpu]
    n, micro_steps = model.get_num_params(non_embedding=False), sequences // n_gpus // batch_size
    flops = model.estimate_mfu(sequences, 1.0, 1.0) * (4 / 3 if checkpointing else 1) / n_gpus
    arithmetic = flops / (MFU * runtime.PEAK_FLOPS[gpu])
    bytes_each = 4 * micro_steps + 4 * (micro_steps if offload else 1) if sharded else 8
    sent = n * bytes_each * (n_gpus - 1) / n_gpus
    exchange = sent / (near if n_gpus <= NODE else far)
    # to and from the machine's memory, of whose own speed, 20 GB/s a GPU, AdamW takes 28 bytes a parameter
    offloading = n / n_gpus * (12 * micro_steps / host + 28 / 20e9) if offload else 0
    return max(arithmetic, exchange) + offloading


def best_tokens(n_params, A, alpha, B, beta):
    """Tokens for which a model of this size has the lowest loss of all that train with the same arithmetic,
    by the loss E + A / N^alpha + B / D^beta: where its derivatives along 6 N D = const. meet."""
    return (beta * B / (alpha * A) * n_params ** alpha) ** (1 / beta)


def memory_needed(model, batch_size, dtype):
    """Bytes that training holds at its highest, estimated.

    Parameters are in float32, and so are gradient and AdamW's two moments of each that is trained: 4 bytes
    a parameter and 12. A block keeps 16 n_embd values a token for its backward pass: the inputs of two
    normalisations, of c_attn and c_fc, q, k, v and the attention's result, and four times n_embd before and
    after the activation; with activation_checkpointing only its input, the rest for one block at a time. Then
    there are the logits of a chunk of tokens and the gradient of the output layer.
    """
    c = model.config
    size = 4 if dtype == 'float32' else 2
    tokens = batch_size * c.block_size
    block = tokens * c.n_embd * 16 * size
    kept = c.n_layer * tokens * c.n_embd * 4 + block if model.activation_checkpointing else c.n_layer * block
    head = 2 * 4 * min(tokens * c.vocab_size, LinearCrossEntropy.CHUNK) + 4 * c.vocab_size * c.n_embd
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
