"""
Measure how fast this machine trains a model, generates from it, and reads its data.

    python bench.py                                          # training, 124M on data/openwebtext
    python bench.py --mode=all --real_data=False --batch_size=4 --block_size=256 --num_steps=5
    python bench.py --dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
    python bench.py --mode=decode --real_data=False --decode_batch=8
    python bench.py --mode=decode --real_data=False --weights=int8
    python bench.py --batch_size=64 --residual_16bit=True    # beside the run without it
    python bench.py --profile=True                           # a trace, and the ten most expensive operators

Prints a table, then the same and a description of the machine as one line of JSON.
"""

from configurator import configure  # import first: reports missing packages

import itertools
import json
import platform
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch

from model import GPTConfig
from support.errors import MissingFile, UserError
from support.machine import hardware, runtime
from support.machine.linear import use_cpu_linears
from support.sampling.decoding import Sampling, compile_for_decoding, for_sampling, stream
from support.sampling.quantize import build_quantized, check_weights
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import PADDED_GPT2_VOCAB
from support.text.windows import Split, prefetch
from support.training import models
from support.training.diagnostics import Guard
from support.training.loss import lean_loss
from support.training.optim import keep_gradients, make_optimizer
from support.training.plan import parameters_in_words

# ---------------------------------------------------------------------------- settings

mode = 'train'  # train, decode, data, all
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
bias = False  # further options of the model are those of GPTConfig in model.py
real_data = True  # False: random tokens, no data needed
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin; empty: data/<dataset>
num_steps = 20  # timed, after half as many to warm up
decode_batch = 1  # samples generated at once
decode_tokens = 100  # in each sample, after the prompt
prompt_tokens = 1
weights = 'full'  # full; with mode=decode int8, int4
activation_checkpointing = False  # in training
residual_16bit = False  # in training: the residual stream in dtype's 16 bits
cudnn_attention = True  # in training, where it is faster; False: FlashAttention's kernel
cuda_graphs = False  # in training, with compile: replay recorded kernels
optimizer = 'adamw'  # adamw, muon
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile
profile = False  # write bench_trace.json and print the ten most expensive operators
peak_flops = 0.0  # FLOP/s, of which MFU is the share used; 0: looked up or measured

settings = configure(globals(), GPTConfig)
OPTIMIZER = {'optimizer': optimizer, 'learning_rate': 1e-4, 'muon_lr': 1e-4, 'weight_decay': 1e-2,
             'beta1': 0.9, 'beta2': 0.95, 'embedding_lr': 0.0, 'cuda_graphs': cuda_graphs}

if mode not in ('train', 'decode', 'data', 'all'):
    raise UserError(f'mode={mode} is not one of train, decode, data, all')
for name in ('batch_size', 'block_size', 'num_steps', 'decode_batch', 'decode_tokens', 'prompt_tokens'):
    if globals()[name] < 1:
        raise UserError(f'{name}={globals()[name]} must be at least 1')

if optimizer not in ('adamw', 'muon'):
    raise UserError(f'optimizer={optimizer} is not one of adamw, muon')
if mode == 'decode' and compile == 'auto':
    compile = False  # as sample.py does
check_weights(weights)
if weights != 'full' and mode != 'decode':
    raise UserError(f'weights={weights} cannot be trained: use mode=decode, not mode={mode}')

# ---------------------------------------------------------------------------- data, model


def load_tokens():
    """The split to train on, and the size of its vocabulary."""
    if not real_data:
        tokens = torch.randint(PADDED_GPT2_VOCAB, (1 << 20,)).to(torch.uint16).numpy()
        split = Split('train', tokens)
        split.check_length(block_size)
        return split, PADDED_GPT2_VOCAB
    try:
        data = Dataset(find_dataset(data_dir, dataset), splits=('train',))
    except FileNotFoundError as error:
        raise MissingFile(f'{error}; or measure on random tokens: --real_data=False') from None
    data.check(block_size, data.vocab_size)
    return data['train'], data.vocab_size


run = runtime.start(device, dtype, compile, seed=seed, threads=threads)
tokens, vocab_size = load_tokens()
config = models.config_from_settings(settings, vocab_size)
model = models.make_model(config).to(run.device)
model.activation_checkpointing, model.residual_16bit = activation_checkpointing, residual_16bit
if weights != 'full':
    model = build_quantized(config, model.state_dict().items(), weights)
use_cpu_linears(model, run)
lean = lean_loss(model, run)
opt = None
if weights == 'full':
    opt = make_optimizer(model, OPTIMIZER | {'compile': run.compile}, run.device_type)
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == 'float16' and run.device_type == 'cuda')
guard = Guard(run.device, 1.0, scaler.is_enabled())
if cuda_graphs:
    keep_gradients(model, run)
compiled = compile_for_decoding(model) if run.compile and mode == 'decode' else None
if run.compile and mode != 'decode':
    model.compile(mode='reduce-overhead' if cuda_graphs else None)
print(parameters_in_words(model))


# ---------------------------------------------------------------------------- the work

def get_batch(iteration):
    starts = tokens.train_windows('random', seed, iteration, batch_size, block_size)
    return [run.to_device(a) for a in tokens.read(starts, block_size)]


batches = prefetch(get_batch, ((i,) for i in itertools.count()))


def train_step(iteration):
    """As train.py makes it: batches ahead of their use, clipping, the guard."""
    x, y = next(batches)
    with hardware.attention_kernels(run.device, cudnn_attention and block_size):
        with run.autocast():
            _, loss = model(x, y, **lean)
        scaler.scale(loss).backward()
    scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if guard.allows(iteration, loss.detach(), grad_norm, opt):
        scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=not cuda_graphs)


def decode(_, n_tokens=decode_tokens):
    model.eval()
    prompt = torch.zeros(1, prompt_tokens, dtype=torch.int64, device=run.device)
    with run.autocast():
        sampling = Sampling(1.0, 200, max_new_tokens=decode_tokens)
        pieces = stream(model, prompt, sampling, n_samples=decode_batch, compiled=compiled)
        for _ in range(n_tokens):
            next(pieces)
    pieces.close()
    model.train()


def time_calls(function, n, n_warm=None):
    """Seconds of each of n calls, after half as many; the device is idle before and after each."""
    for i in range(max(1, n // 2) if n_warm is None else n_warm):
        function(i)
    times = []
    for i in range(n):
        run.synchronize()
        begin = time.perf_counter()
        function(i)
        run.synchronize()
        times.append(time.perf_counter() - begin)
    return times


def row(work, times, n_tokens, flops=None, n_bytes=None):
    """A row of the table; n_tokens, flops and n_bytes are those of one call."""
    median = statistics.median(times)
    return {'work': work, 'median_s': median, 'min_s': min(times), 'max_s': max(times), 'calls': len(times),
            'tokens_per_s': n_tokens / median, 'flops_per_s': flops and flops / median,
            'bytes_per_s': n_bytes and n_bytes / median}


def measure_training():
    profiler = torch.profiler.profile() if profile else nullcontext()
    with profiler:
        times = time_calls(train_step, num_steps)
    found = row('train', times, batch_size * block_size, flops=hardware.training_flops(model, batch_size))
    if profile:
        profiler.export_chrome_trace('bench_trace.json')
        by = 'self_cuda_time_total' if run.device_type == 'cuda' else 'self_cpu_time_total'
        print(profiler.key_averages().table(sort_by=by, row_limit=10))
        print('wrote bench_trace.json (open it in chrome://tracing or ui.perfetto.dev)')
    return found


def measure_decoding():
    for_sampling(model, run, decode_batch, decode_tokens)
    first_call, *_ = time_calls(decode, 1, n_warm=0)
    first_token = statistics.median(time_calls(partial(decode, n_tokens=1), 5))
    # each token reads every weight once for all samples, and on average half the final keys and values
    cached = 2 * n_layer * n_embd * (prompt_tokens + decode_tokens // 2) * decode_batch
    size = hardware.DTYPES[run.dtype].itemsize
    n, n_output = model.get_num_params(), model.lm_head.weight.numel()
    weight_bytes = {'full': size * n, 'int8': n, 'int4': n_output + (n - n_output) * 5 / 8}[weights]
    n_bytes = decode_tokens * (weight_bytes + size * cached)
    found = row('decode', time_calls(decode, max(3, num_steps // 4)), decode_tokens * decode_batch,
                n_bytes=n_bytes)
    return found | {'first_call_s': first_call, 'first_token_s': first_token}


def measure_reading():
    n_tokens = batch_size * block_size
    return row('data', time_calls(get_batch, 10 * num_steps), n_tokens, n_bytes=2 * n_tokens)  # uint16


# ---------------------------------------------------------------------------- results

def print_table(rows, limits):
    print(f'\n{"work":8} {"median":>10} {"min":>10} {"max":>10} {"tokens/s":>12} {"GFLOP/s":>10} {"GB/s":>8} '
          f'{"of this machine":>16}')
    for r in rows:
        print(f'{r["work"]:8}', *(f'{1000 * r[k]:8.2f}ms' for k in ('median_s', 'min_s', 'max_s')),
              f'{r["tokens_per_s"]:12,.0f}', f'{(r["flops_per_s"] or 0) / 1e9:10.1f}',
              f'{(r["bytes_per_s"] or 0) / 1e9:8.2f}', f'{r["share"]:16.1%}')
    print(f'{"limit":8} {"":32} {"":12} {limits["flops_per_s"] / 1e9:10.1f} '
          f'{limits["bytes_per_s"] / 1e9:8.2f}   a matrix product, a copy, or the best above')


MEASUREMENTS = {'train': measure_training, 'decode': measure_decoding, 'data': measure_reading}
rows = [MEASUREMENTS[name]() for name in ('train', 'data', 'decode') if mode in (name, 'all')]
limits = {'flops_per_s': hardware.measure_matmul(run.device, run.dtype),
          'bytes_per_s': hardware.measure_bandwidth(run.device)}
for r in rows:
    rate = 'flops_per_s' if r['flops_per_s'] else 'bytes_per_s'
    limits[rate] = max(limits[rate], r[rate])
    r['share'] = r[rate] / limits[rate]
    if r['work'] == 'decode':
        print(f'time to first token: {1000 * r["first_token_s"]:.2f}ms, {r["tokens_per_s"]:,.0f} tokens/s, '
              f'{r["share"]:.1%} of the memory\'s bandwidth; first call: {1000 * r["first_call_s"]:.0f}ms')
    if r['work'] == 'train':
        peak = peak_flops or hardware.data_sheet_flops(run.device, run.dtype) or limits[rate]
        print(f'time per iteration: {1000 * r["median_s"]:.4f}ms, MFU: {100 * r[rate] / peak:.2f}%')
print_table(rows, limits)
print(json.dumps({
    'rows': rows, 'measured_limits': limits, 'peak_memory_bytes': hardware.peak_memory(run.device),
    'parameters': model.get_num_params(), 'batch_size': batch_size, 'block_size': block_size,
    'decode_batch': decode_batch, 'weights': weights, 'device': hardware.device_name(run.device),
    'dtype': run.dtype, 'compile': run.compile, 'torch': torch.__version__,
    'python': platform.python_version(), 'machine': f'{platform.system()} {platform.machine()}'}))
