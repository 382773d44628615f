"""
Train a GPT.

    python train.py config/train_shakespeare_char.py                 # one process: GPU, Apple GPU or CPU
    python train.py --dataset=my_text --batch_size=32 --max_iters=5000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py            # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29400 train.py config/train_gpt2.py     # on each of two nodes

Every setting below can be given in a config file or as --key=value; --help lists them.
"""

import itertools
import math
import os
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import runtime
from configurator import configure
from dataset import (PADDED_GPT2_VOCAB, check_split, eval_windows, open_split, prefetch, read_meta,
                     read_tokenizer, read_windows, train_windows)
from model import GPT, GPTConfig
from runtime import print0

# ---------------------------------------------------------------------------- settings

# run
out_dir = 'out'  # where checkpoints go
init_from = 'scratch'  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a GPT-2's folder
eval_interval = 2000  # iterations between evaluations
eval_iters = 200  # batches an evaluation reads of each split; 0: the whole split
eval_only = False  # evaluate once, write nothing
log_interval = 1  # iterations between lines of the log
always_save_checkpoint = True  # at every evaluation, not only where the validation loss improves
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin and val.bin; empty: data/<dataset>
gradient_accumulation_steps = 40  # micro-steps an iteration, over all processes
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more where the data is seen many times
bias = False  # biases in the linear and normalisation layers
# AdamW
learning_rate = 6e-4  # the highest, after the warm-up
max_iters = 600000
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
# learning rate: linear warm-up, then a cosine down to min_lr
decay_lr = True  # False: learning_rate throughout
warmup_iters = 2000
lr_decay_iters = 600000  # where min_lr is reached
min_lr = 6e-5
# machine
backend = 'auto'  # nccl, gloo
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile: takes a minute, makes the iterations faster
activation_checkpointing = False  # keep one tensor a block and compute the rest again: less memory, slower
peak_flops = 0.0  # FLOP/s of one device, which mfu is a share of; 0: looked up or, on a CPU, measured
seed = 1337

config = configure(globals())

# ---------------------------------------------------------------------------- machine, data

run = runtime.start(device, dtype, compile, backend, seed)
config.update(device=run.device, dtype=run.dtype, compile=run.compile, backend=run.backend)

if min(batch_size, block_size, gradient_accumulation_steps, eval_interval, log_interval) < 1:
    raise ValueError('batch_size, block_size, gradient_accumulation_steps, eval_interval and log_interval '
                     'must be at least 1')
if gradient_accumulation_steps % run.world_size:
    raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} counts over all processes '
                     f'and must be a multiple of their number, {run.world_size}')
micro_steps = gradient_accumulation_steps // run.world_size

data_dir = data_dir or os.path.join('data', dataset)
data = {split: open_split(data_dir, split) for split in ('train', 'val')}
tokenizer, meta = read_tokenizer(data_dir), read_meta(data_dir)
data_vocab = meta['vocab_size'] if meta else PADDED_GPT2_VOCAB
if meta:
    print0(f'found vocab_size = {data_vocab} (inside {os.path.join(data_dir, "meta.pkl")})')

# ---------------------------------------------------------------------------- model, optimizer

iter_num, best_val_loss = 0, float('inf')
model = state = None
if init_from == 'scratch':
    model_config = GPTConfig(block_size, data_vocab, n_layer, n_head, n_embd, dropout, bias)
elif init_from == 'resume':
    state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
    model_config = GPTConfig.from_args(state['model_args'] | {'dropout': dropout})
    iter_num, best_val_loss = state['iter_num'], float(state['best_val_loss'])
    if state.get('tokenizer', tokenizer.to_dict()) != tokenizer.to_dict():
        raise ValueError(f'{out_dir} was trained with another tokenizer than that of {data_dir}')
else:
    model = GPT.from_pretrained(init_from, {'dropout': dropout})
    model_config = model.config
    if meta and data_vocab != model_config.vocab_size:
        raise ValueError(f'{data_dir} holds characters, but {init_from} has a vocabulary of '
                         f'{model_config.vocab_size}: prepare the text as GPT-2 BPE (data/shakespeare does)')

if block_size > model_config.block_size:
    print0(f'block_size is {model_config.block_size}, the most that this model has, not {block_size}')
    block_size = model_config.block_size
for split, tokens in data.items():
    check_split(tokens, os.path.join(data_dir, f'{split}.bin'), block_size, model_config.vocab_size)
print0(f'tokens per iteration will be: {gradient_accumulation_steps * batch_size * block_size:,}')

model = model or GPT(model_config)
if state:
    model.load_state_dict(state['model'])
    print0(f'resuming from {out_dir} at iteration {iter_num}')
if block_size < model_config.block_size:
    model.crop_block_size(block_size)
model.to(run.device)
model.activation_checkpointing = activation_checkpointing
print0(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')

optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), run.device_type)
for name, group in zip(('decayed', 'non-decayed'), optimizer.param_groups, strict=True):
    count = sum(p.numel() for p in group['params'])
    print0(f'num {name} parameter tensors: {len(group["params"])}, with {count:,} parameters')
if state and not eval_only:
    checkpoint.load_optimizer(optimizer, state['optimizer'])
del state
scaler = run.grad_scaler()

if run.compile:
    print0('compiling the model (the first iterations wait for it)')
    model.compile()  # in place: no wrapper, no prefix on the parameters' names
ddp_model = DistributedDataParallel(model, device_ids=[run.device] if run.device_type == 'cuda' else None) \
    if run.world_size > 1 else model
hold_gradients = ddp_model.no_sync if run.world_size > 1 else nullcontext


# ---------------------------------------------------------------------------- what the loop calls

def to_device(x):
    """On CUDA through pinned memory, which PyTorch keeps for the next time, and without waiting."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(run.device, non_blocking=True) if run.device_type == 'cuda' else x.to(run.device)


def get_batch(iteration, micro_step):
    """x, y: (B, T), this process's part of the iteration's global batch."""
    count = gradient_accumulation_steps * batch_size
    starts = train_windows(seed, iteration, count, len(data['train']), block_size)
    first = (micro_step * run.world_size + run.rank) * batch_size
    x, y = read_windows(data['train'], starts[first:first + batch_size], block_size)
    return to_device(x), to_device(y)


@torch.no_grad()
def estimate_loss():
    """Mean loss of each split over the same windows every time, the processes taking turns at the batches."""
    model.eval()
    means = {}
    for split, tokens in data.items():
        batches = eval_windows(len(tokens), block_size, batch_size, eval_iters)
        losses, counts = [torch.zeros((), device=run.device)], [0]
        for starts in batches[run.rank::run.world_size]:
            x, y = read_windows(tokens, starts, block_size)
            with run.autocast():
                _, loss = model(to_device(x), to_device(y), return_logits=False)
            losses.append(loss)
            counts.append(int((y >= 0).sum()))
        total = torch.stack(losses).cpu().double() @ torch.tensor(counts).double()  # MPS has no float64
        loss_sum, n_targets = run.sum(total.item(), sum(counts))
        means[split] = loss_sum / n_targets
    model.train()
    return means


def get_lr(it):
    """Learning rate of an iteration; the cosine is Loshchilov & Hutter's (2017, eq. 5), without restarts."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def call_wandb(function, *args, **kwargs):
    """A service that the run doesn't depend on: where it fails, the run says so and goes on without."""
    global wandb_log
    if wandb_log and run.is_master:
        try:
            import wandb
            getattr(wandb, function)(*args, **kwargs)
        except Exception as error:
            wandb_log = False
            print0(f'wandb is off from here on: {type(error).__name__}: {error}')


# ---------------------------------------------------------------------------- training loop

if not eval_only:
    call_wandb('init', project=wandb_project, name=wandb_run_name, config=config)
    peak_flops = peak_flops or runtime.peak_flops(run.device, run.dtype)
batches = prefetch(get_batch, ((i, m) for i in itertools.count(iter_num) for m in range(micro_steps)))
mfu = float('nan')
clock, timed_iters = time.perf_counter(), 0

while iter_num <= max_iters:
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr

    # evaluation, before the update; its time doesn't count
    if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
        run.synchronize()
        pause = time.perf_counter()
        losses = estimate_loss()
        print0(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        if eval_only:
            break
        call_wandb('log', {'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'],
                           'lr': lr, 'mfu': mfu * 100})
        improved = losses['val'] < best_val_loss
        best_val_loss = min(best_val_loss, losses['val'])
        if iter_num > 0 and (improved or always_save_checkpoint) and run.is_master:
            print0(f'saving checkpoint to {out_dir}')
            checkpoint.save(os.path.join(out_dir, 'ckpt.pt'), {
                'model': model.state_dict(),
                'optimizer': optimizer.state_dict(),
                'model_args': model.config.to_args(),
                'iter_num': iter_num,
                'best_val_loss': best_val_loss,
                'config': config,
                'tokenizer': tokenizer.to_dict(),
            })
        clock += time.perf_counter() - pause

    # forward and backward; DDP averages the gradients in the last micro-step only
    loss_sum = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        x, y = next(batches)
        with hold_gradients() if micro_step < micro_steps - 1 else nullcontext():
            with run.autocast():
                _, loss = ddp_model(x, y, return_logits=False)
                loss = loss / micro_steps
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    # log: the mean loss of the whole batch, the mean time since the last line
    timed_iters += 1
    if iter_num % log_interval == 0:
        loss = run.sum(loss_sum.item())[0] / run.world_size
        dt = (time.perf_counter() - clock) / timed_iters
        mfu = model.estimate_mfu(batch_size * micro_steps, dt, peak_flops) if peak_flops else float('nan')
        print0(f'iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, '
               f'mfu {f"{mfu * 100:.2f}%" if peak_flops else "n/a"}, lr {lr:.2e}, '
               f'{gradient_accumulation_steps * batch_size * block_size / dt:.0f} tokens/s')
        clock, timed_iters = time.perf_counter(), 0
    iter_num += 1

call_wandb('finish')
run.stop()
