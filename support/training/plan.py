"""
What a run needs: data, arithmetic, memory, disk, time. Computed before it begins.

    to_do = Work(0, 1000, sequences)
    print(describe(model, run, data, to_do, settings))                 # on this machine
    print(rehearse(step, run, data, to_do, settings))                  # and how long it takes
    print(scale(model, '8xH100', sequences=480, iterations=600000))    # on other GPUs
"""

import dataclasses
import math
import re
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import GPT
from support.errors import OutOfMemory, UserError, amount_asked, is_out_of_memory
from support.machine.console import print0
from support.machine.files import free_disk
from support.machine.hardware import DTYPES, GPUS, best_time, total_memory, training_flops
from support.machine.linear import use_cpu_linears
from support.training.lora import adapted_layers
from support.training.loss import chunk_of


# ---------------------------------------------------------------------------- on this machine

class Work(NamedTuple):
    """What a run still has to do."""
    first: int  # iteration
    end: int  # the first iteration that it doesn't make
    sequences: int  # of all processes


def describe(model, run, data, to_do, settings):
    """A short table of what a run needs, with warnings. model: on its device. settings: train.py's. Counts
    and sizes are exact, but memory is an estimate."""
    c, n_iters, batch_size = model.config, to_do.end - to_do.first, settings['batch_size']
    tokens = to_do.sequences * c.block_size
    epochs = tokens / data['train'].epoch_length(c.block_size)
    disk, free = 4 * checkpoint_bytes(model), free_disk(settings['out_dir'])  # three files and one to come
    rows = {
        'data': f'{len(data["train"]):,} tokens to train on, {len(data["val"]):,} to validate',
        'model': f'{c.n_layer} layers of {c.n_embd}, {c.n_head} heads, block_size {c.block_size}, vocabulary '
                 f'{c.vocab_size:,}',
        'run': f'{n_iters:,} iterations of {tokens // max(1, n_iters):,} tokens: {tokens:,} tokens, '
               f'{epochs:.2f} epochs, {training_flops(model, to_do.sequences):.1e} FLOPs',
        'memory': memory_in_words(model, run, to_do, settings),
        'disk': f'{size(disk)} for checkpoints, {size(free)} free',
    }
    if disk > free:
        rows['disk'] += '  <- TOO LITTLE'
    if run.device_type == 'cuda' and rows['memory'] and not settings['batch_ramp_iters']:
        rows['batch'] = fewer_micro_steps(model, setup_of(run, to_do, settings), total_memory(run.device))
    speedup = bfloat16_speedup(c, run, batch_size, settings['parallel'])
    if speedup >= 1.5:
        rows['dtype'] = f'--dtype=bfloat16 would be about {speedup:.1f} times as fast on this machine'
    return '\n'.join(f'{name:8}{text}' for name, text in rows.items() if text)


def memory_in_words(model, run, to_do, settings):
    """What a device will hold; '' for a model whose blocks are of another kind than ours."""
    if not isinstance(model, GPT) or not hasattr(model, 'activation_checkpointing'):
        return ''
    needed, there = memory_needed(model, setup_of(run, to_do, settings)), total_memory(run.device)
    text = f'about {size(needed)}'
    if there:
        text += f' of {size(there)} on {run.device}'
    if there and needed > there:
        text += '  <- TOO LITTLE: a smaller batch_size, activation_checkpointing, or parallel=fsdp'
    return text


def setup_of(run, to_do, settings):
    """The Setup of train.py's settings."""
    batch_size, n_iters = settings['batch_size'], max(1, to_do.end - to_do.first)
    micro_steps = -(-to_do.sequences // (n_iters * batch_size * run.world_size))
    return Setup(run.world_size, batch_size, micro_steps, sharded=settings['parallel'] == 'fsdp',
                 checkpointing=settings['activation_checkpointing'],
                 dtype_size=DTYPES[run.dtype].itemsize, device_type=run.device_type,
                 reserved=RESERVED if run.device_type == 'cuda' else PROCESS)


def fewer_micro_steps(model, setup, memory):
    """The settings of the largest micro-batch that fits and makes the same batch, in words; '' if that is
    the setup's own."""
    share, T = setup.batch_size * setup.micro_steps, model.config.block_size
    larger = [dataclasses.replace(setup, batch_size=b, micro_steps=share // b)
              for b in range(setup.batch_size + 1, min(share, ENOUGH_TOKENS // T) + 1) if share % b == 0]
    fitting = [s for s in larger if memory_needed(model, s) <= ROOM * memory]
    if not fitting:
        return ''
    return (f'{as_settings(fitting[-1])} is the same batch in fewer micro-steps, and faster: about '
            f'{size(memory_needed(model, fitting[-1]))}')


def parameters_in_words(model):
    """'number of parameters: 10.65M, without the 98,304 of positions', which are only looked up"""
    counted = f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    looked_up = {'positions': 'wpe', 'n-grams': 'wne', 'tokens': 'wte'}
    transformer = getattr(model, 'transformer', None)
    tables = {what: getattr(transformer, name, None) for what, name in looked_up.items()}
    tables = {what: table.weight for what, table in tables.items() if table is not None}
    if tables.get('tokens') is getattr(getattr(model, 'lm_head', None), 'weight', None):
        tables.pop('tokens', None)
    found = [f'the {weight.numel():,} of {what}' for what, weight in tables.items()]
    return f'{counted}, without {" and ".join(found)}' if found else counted


def bfloat16_speedup(config, run, batch_size, parallel='ddp'):
    """How many times as fast this CPU trains in bfloat16 as in float32, measured on two layers of the model
    and a vocabulary in proportion; 0 if the run isn't in float32 on a CPU."""
    is_asked = run.device_type == 'cpu' and run.dtype == 'float32' and not run.compile and run.world_size == 1
    if not is_asked or parallel == 'fsdp' or config.n_embd < 256:  # narrow models gain less than 1.5
        return 0
    n_layer = min(2, config.n_layer)
    vocab_size = -(-config.vocab_size * n_layer // config.n_layer)
    small = dataclasses.replace(config, n_layer=n_layer, vocab_size=vocab_size)
    n = max(1, min(batch_size, 1024 // config.block_size))
    idx = torch.arange(n * config.block_size).view(n, -1) % small.vocab_size
    seconds = []
    for dtype in ('float32', 'bfloat16'):
        with torch.random.fork_rng(devices=[]):
            model, other = GPT(small), dataclasses.replace(run, dtype=dtype)
        use_cpu_linears(model, other, quiet=True)

        def step(model=model, other=other):
            with other.autocast():
                loss = model(idx, idx)[1]
            loss.backward()
        step()
        seconds.append(best_time(step, 'cpu', repeats=2))
    return seconds[0] / seconds[1]


def checkpoint_bytes(model):
    """A checkpoint holds the parameters and two moments of each trained one, in float32. With adapters it
    holds the adapted matrices twice: merged with them and as they were."""
    adapted = sum(layer.weight.numel() for layer in adapted_layers(model).values())
    return 4 * (model.get_num_params(non_embedding=False) + adapted) + 8 * n_trained(model)


def n_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def head_gradient(model):
    """Bytes of the output layer's gradient."""
    head = model.lm_head.weight
    return 4 * head.numel() if head.requires_grad else 0


# ---------------------------------------------------------------------------- memory

ENOUGH_TOKENS = 1 << 16  # of a micro-batch: with more, a GPU of 80 GB is hardly faster
ROOM = 0.9  # share of a device's memory to fill, as the formulas are within 5 %
RESERVED = 2e9  # bytes for CUDA, libraries' workspaces and gaps between allocations: an assumption
PROCESS = 0.4e9  # bytes of Python with PyTorch, which count where the CPU is the device


@dataclass(frozen=True)
class Setup:
    """How a run uses its devices."""
    n_processes: int  # one a device
    batch_size: int  # sequences of a micro-batch
    micro_steps: int  # of each process, an iteration
    sharded: bool = False  # FSDP
    checkpointing: bool = False  # of activations
    dtype_size: int = 2  # bytes of a number in matrix products
    reserved: float = RESERVED
    device_type: str = 'cuda'


def memory_needed(model, setup):
    """Bytes that a device holds at the peak of an iteration."""
    activations = activation_memory(model, setup)
    if setup.n_processes * setup.micro_steps == 1:
        # gradients come as activations go, but the output layer's comes with the loss
        later = 4 * n_trained(model) - head_gradient(model)
        block = setup.batch_size * model.config.block_size * block_activations(model, setup.dtype_size)
        activations = max(activations - later, block)
    return state_memory(model, setup) + activations + setup.reserved


def state_memory(model, setup):
    """Bytes on a device that don't depend on the batch, in float32: the parameters, and for each trained one
    a gradient and AdamW's two moments.

    Autocast adds copies of the matrices in 16 bits, later micro-steps a second gradient of the output layer
    and, under DDP, its buckets, which otherwise are the gradients. FSDP holds 1/n of the state, and
    gathered: the embeddings and their gradient in float32, two blocks in 16 bits, a block's gradient in both
    types. Between micro-steps it holds the sum of whole gradients too.
    """
    n, trained = model.get_num_params(non_embedding=False), n_trained(model)
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    low = setup.dtype_size if setup.dtype_size < 4 else 0  # bytes of a copy in 16 bits
    if not setup.sharded:
        again = head_gradient(model) if setup.micro_steps > 1 else 0
        buckets = 4 * trained if setup.n_processes > 1 and setup.micro_steps > 1 else 0
        return 4 * n + 12 * trained + buckets + low * blocks + again
    block = blocks // model.config.n_layer
    gathered = 8 * (n - blocks) + (2 * setup.dtype_size + 4 + low) * block
    accumulated = 4 * n if setup.micro_steps > 1 else 0
    return 16 * n // setup.n_processes + gathered + accumulated


def block_activations(model, size):
    """Bytes a token that a block keeps for its backward pass, with numbers of `size` bytes in matrix
    products: the inputs of both normalisations, in float32, and of the four matrices; q, k, v; the
    activation's argument, swiglu's gate. For GPT-2's block, (8 + 14 size) C."""
    block, C = model.transformer.h[0], model.config.n_embd
    mlp = block.mlp.c_fc.out_features + block.mlp.c_proj.in_features * (
        2 if model.config.activation == 'swiglu' else 1)
    return 2 * 4 * C + size * (2 * C + block.attn.c_attn.out_features + C + mlp)


def activation_memory(model, setup):
    """Bytes that a micro-batch keeps, with the loss's chunk of logits."""
    c, tokens = model.config, setup.batch_size * model.config.block_size
    block = block_activations(model, setup.dtype_size)
    blocks = c.n_layer * 4 * c.n_embd + block if setup.checkpointing else c.n_layer * block
    head = 3 * 4 * c.n_embd * tokens + 3 * 4 * min(tokens * c.vocab_size, chunk_of(setup.device_type))
    return tokens * blocks + head


# ---------------------------------------------------------------------------- on other machines

NODE = 8  # GPUs
MOST_SEQUENCES = 1 << 16  # of a micro-batch: more gain nothing
MFU = 0.4  # share of a GPU's peak in matrix products: an assumption, see docs/SCALING.md
# A, alpha, B, beta of the loss of N parameters after D tokens: Hoffmann et al. 2022, approach 3 ("Training
# Compute-Optimal Large Language Models"), and Besiroglu et al. 2024, a second fit of the same data
FITS = {
    'Hoffmann et al.': (406.4, 0.34, 410.7, 0.28),
    'Besiroglu et al.': (482.01, 0.3478, 2085.43, 0.3658),
}
STRATEGIES = {
    'ddp': {},
    'ddp + checkpointing': {'checkpointing': True},
    'fsdp': {'sharded': True},
    'fsdp + checkpointing': {'sharded': True, 'checkpointing': True},
}


def scale(model, gpus, sequences, iterations):
    """A table of what a run needs on other GPUs, with each strategy; docs/SCALING.md explains it.

    model: may be on the meta device. gpus: their number and kind, such as 8xH100. sequences: of
    block_size tokens an iteration. Computed, not measured.
    """
    n_gpus, kind = parse_gpus(gpus)
    if sequences % n_gpus:
        raise UserError(f'gradient_accumulation_steps * batch_size = {sequences} sequences an iteration '
                        f'can\'t be shared by {n_gpus} GPUs: take a multiple of that')
    n, tokens = model.get_num_params(non_embedding=False), sequences * model.config.block_size
    best = ', '.join(f'{best_tokens(n, *fit):.1e} ({name})' for name, fit in FITS.items())
    lines = [f'{n:,} parameters on {n_gpus:,} {kind}, {tokens:,} tokens an iteration, '
             f'{tokens * iterations:.1e} in all',
             f'tokens for the lowest loss at the same arithmetic: {best}',
             f'{"strategy":22}{"state":>10}{"micro-batch":>13}{"memory":>12}{"iteration":>13}'
             f'{"run":>16}{"GPU-hours":>14}']
    found = {}
    for name, strategy in STRATEGIES.items():
        setups = possible_setups(n_gpus, sequences // n_gpus, strategy)
        fitting = [s for s in setups if memory_needed(model, s) <= GPUS[kind].memory]
        if fitting:
            found[name] = fitting[-1]
            row = scale_row(model, kind, fitting[-1], iterations)
        else:
            row = (f'{size(state_memory(model, setups[0])):>10}  does not fit: a micro-batch of 1 '
                   f'needs {size(memory_needed(model, setups[0]))}')
        lines.append(f'{name:22}{row}')
    lines.append(f'Times are estimates: arithmetic at {MFU:.0%} of the data sheet\'s rate')
    if found:
        fastest = min(found.values(), key=lambda setup: iteration_time(model, kind, setup))
        lines.append(f'The fastest: {as_settings(fastest)}')
    return '\n'.join(lines)


def parse_gpus(gpus):
    """'8xH100' -> (8, 'H100'), a key of GPUS."""
    count, _, name = gpus.partition('x')
    if not re.fullmatch('0*[1-9][0-9]{0,8}', count):
        raise UserError(f'gpus={gpus} is no number and kind of GPUs, such as 8xH100')
    kind = next((k for k in GPUS if squeeze(k) == squeeze(name or 'H100')), None)
    if kind is None:
        raise UserError(f'gpus={gpus}: {name} is not one of {", ".join(GPUS)}')
    return int(count), kind


def possible_setups(n_gpus, share, strategy):
    """Setups with each micro-batch that divides a GPU's share of the sequences, smallest first."""
    return [Setup(n_gpus, b, share // b, **strategy)
            for b in range(1, min(share, MOST_SEQUENCES) + 1) if share % b == 0]


def as_settings(setup):
    """The arguments of train.py that give a Setup."""
    parallel = 'fsdp' if setup.sharded else 'ddp'
    more = ' --activation_checkpointing=True' if setup.checkpointing else ''
    return (f'--parallel={parallel} --batch_size={setup.batch_size} '
            f'--gradient_accumulation_steps={setup.micro_steps * setup.n_processes}{more}')


def squeeze(name):
    """'RTX 4090' -> 'rtx4090'"""
    return ''.join(name.lower().split())


def scale_row(model, gpu, setup, iterations):
    state, memory = size(state_memory(model, setup)), size(memory_needed(model, setup))
    step = iteration_time(model, gpu, setup)
    whole = duration(step * iterations)
    return (f'{state:>10}{setup.batch_size:13}{memory:>12}{step:>11.2f} s{whole:>16}'
            f'{step * iterations * setup.n_processes / 3600:>14,.0f}')


def iteration_time(model, gpu, setup):
    """Seconds: the longer of arithmetic and exchange, which overlap.

    A ring passes each byte on once: DDP 8 N an iteration (gradients, there and back), FSDP 4 N a micro-step
    (parameters of 16 bits, twice) and 4 N an iteration (gradients).
    """
    n, n_gpus, micro_steps = model.get_num_params(non_embedding=False), setup.n_processes, setup.micro_steps
    flops = training_flops(model, setup.batch_size * micro_steps)  # of a GPU
    arithmetic = flops * (4 / 3 if setup.checkpointing else 1) / (MFU * GPUS[gpu].flops)
    bytes_each = 4 * micro_steps + 4 if setup.sharded else 8
    bandwidth = GPUS[gpu].near if n_gpus <= NODE else GPUS[gpu].far
    exchange = n * bytes_each * (n_gpus - 1) / n_gpus / bandwidth
    return max(arithmetic, exchange)


def best_tokens(n_params, A, alpha, B, beta):
    """Tokens with which a model of this size has the lowest loss of all models of the same arithmetic: where
    the derivatives of E + A / N^alpha + B / D^beta along 6 N D = const. are equal."""
    return (beta * B / (alpha * A) * n_params ** alpha) ** (1 / beta)


# ---------------------------------------------------------------------------- time

def rehearse(step, run, data, to_do, settings):
    """Make up to 12 iterations, and say how long the whole run would take."""
    n, n_iters = min(12, to_do.end - to_do.first), to_do.end - to_do.first
    if n <= 0:
        return 'time    none, the run is finished'
    times = []
    for i in range(n):
        run.synchronize()
        begin = time.perf_counter()
        loss, _ = step()
        run.synchronize()
        times.append(time.perf_counter() - begin)
        print0(f'iter {to_do.first + i}: loss {loss.item():.4f}, time {1000 * times[-1]:.2f}ms')
    seconds = statistics.median(times[2:] or times)  # the first two choose kernels
    every, last = settings['eval_interval'], to_do.end - 1
    n_evals = last // every - (to_do.first - 1) // every + (last % every > 0)
    windows = data['val'].count_windows(settings['block_size']), data['train'].count_windows(
        settings['block_size'])
    asked = settings['eval_iters'] * settings['batch_size'] or math.inf
    n_windows = sum(min(asked, count) for count in windows)
    # a forward pass is a third of a step
    per_window = seconds / (to_do.sequences / n_iters) / 3
    evaluations = n_evals * n_windows * per_window
    whole = duration(n_iters * seconds + evaluations)
    return (f'time    {seconds * 1000:.2f}ms an iteration, {whole} in all, '
            f'of which evaluations {duration(evaluations)}')


# ---------------------------------------------------------------------------- out of memory

MOST_PARTS = 1000  # of a batch


@contextmanager
def out_of_memory_advice(batch_size, gradient_accumulation_steps):
    """Turn an allocation that failed into an OutOfMemory that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        factor = next((n for n in range(2, MOST_PARTS) if batch_size % n == 0), None)
        how = 'a shorter --block_size or a smaller model needs less'
        if factor:
            how = (f'--batch_size={batch_size // factor} --gradient_accumulation_steps='
                   f'{gradient_accumulation_steps * factor} trains on the same tokens an iteration')
        raise OutOfMemory(f'out of memory at batch_size={batch_size}{amount_asked(error)}: {how}; '
                          '--activation_checkpointing=True needs less too, and is slower') from None


# ---------------------------------------------------------------------------- words

def size(n_bytes):
    return f'{n_bytes / 1e9:,.1f} GB' if n_bytes >= 1e9 else f'{n_bytes / 1e6:,.1f} MB'


def duration(seconds):
    """3725 -> '1 h 2 min'"""
    for unit, length, part, per in (('d', 86400, 'h', 3600), ('h', 3600, 'min', 60), ('min', 60, 's', 1)):
        if seconds >= length:
            return f'{int(seconds // length)} {unit} {int(seconds % length // per)} {part}'
    return f'{int(seconds)} s'
