"""
Measure how fast a model trains on this machine: iterations of forward, backward and update.

    python bench.py                                          # 124M on data/openwebtext
    python bench.py --real_data=False --batch_size=4 --block_size=256 --compile=False --num_steps=5
    python bench.py --dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
    python bench.py --profile=True                           # a trace, and the ten most expensive operators
"""

import os
import statistics
import time
from contextlib import nullcontext

import torch

import runtime
from configurator import configure
from dataset import (PADDED_GPT2_VOCAB, CharTokenizer, check_split, open_split, read_tokenizer, read_windows,
                     train_windows)
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------- settings

batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
bias = False
real_data = True  # False: random tokens, no data needed
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin; empty: data/<dataset>
num_steps = 20  # timed, after half as many to warm up
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile
profile = False  # write bench_trace.json and print the operators that cost most
peak_flops = 0.0  # FLOP/s that MFU is a share of; 0: looked up or, on a CPU, measured

configure(globals())

# ---------------------------------------------------------------------------- model, data

run = runtime.start(device, dtype, compile, seed=seed)
vocab_size = PADDED_GPT2_VOCAB
if real_data:
    data_dir = data_dir or os.path.join('data', dataset)
    try:
        tokens = open_split(data_dir, 'train')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}; or measure on random tokens: --real_data=False') from None
    tokenizer = read_tokenizer(data_dir)
    vocab_size = tokenizer.n_vocab if isinstance(tokenizer, CharTokenizer) else vocab_size
    check_split(tokens, os.path.join(data_dir, 'train.bin'), block_size, vocab_size)
else:
    tokens = torch.randint(vocab_size, (1 << 20,)).to(torch.uint16).numpy()

model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=bias)).to(run.device)
optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), run.device_type)
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == 'float16' and run.device_type == 'cuda')
if run.compile:
    model.compile()


def step(iteration):
    """One iteration, without waiting for the device to finish it."""
    starts = train_windows(seed, iteration, batch_size, len(tokens), block_size)
    x, y = (torch.from_numpy(a).to(run.device) for a in read_windows(tokens, starts, block_size))
    with run.autocast():
        _, loss = model(x, y, return_logits=False)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss


# ---------------------------------------------------------------------------- measurement

for i in range(max(3, num_steps // 2)):
    loss = step(i)
print(f'loss after the warm-up: {loss.item():.4f}')

profiler = torch.profiler.profile() if profile else nullcontext()
times = []
with profiler:
    for i in range(num_steps):
        run.synchronize()
        begin = time.perf_counter()
        step(i)
        run.synchronize()
        times.append(time.perf_counter() - begin)
if profile:
    profiler.export_chrome_trace('bench_trace.json')
    by = f'self_{run.device_type}_time_total' if run.device_type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=10))
    print('wrote bench_trace.json (open it in chrome://tracing or ui.perfetto.dev)')

median = statistics.median(times)
peak_flops = peak_flops or runtime.peak_flops(run.device, run.dtype)
mfu = f'{100 * model.estimate_mfu(batch_size, median, peak_flops):.2f}%' if peak_flops else 'n/a'
print(f'time per iteration: {median * 1000:.4f}ms, MFU: {mfu}, from {min(times) * 1000:.1f} to '
      f'{max(times) * 1000:.1f}ms, {batch_size * block_size / median:.0f} tokens/s')
