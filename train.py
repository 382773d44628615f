"""
Train a GPT.

    python train.py config/train_shakespeare_char.py                 # one process: GPU, Apple GPU or CPU
    python train.py --dataset=my_text --batch_size=32 --max_iters=5000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py            # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29400 train.py config/train_gpt2.py     # on each of two nodes

Every setting below can be given in a config file or as --key=value; --help lists them.
"""

from configurator import configure  # first, as it says what this Python lacks

import itertools
import math
import os
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from model import GPT
from support.hub.huggingface import load_pretrained
from support.training import fsdp
from support.machine import hardware, runtime
from support.machine.console import print0
from support.machine.signals import Stopped, StopRequest
from support.training import lora
from support.training.diagnostics import Guard, measure_vitals, watch_update
from support.training.loss import checkpoint_activations, use_lean_loss
from support.machine.linear import use_fast_products
from support.training.optim import WeightAverage, configure_optimizer
from support.evaluating.scoring import BitsPerByte, mean_loss
from support.training import checkpoint, plan
from support.training.folder import claim, move_earlier_run, release
from support.training.log import Drawing, Meter, Progress, RunLog, Wandb, show_sample
from support.training.start import check_data, check_ranks, check_settings, find_state, open_data, restore
from support.training.state import build_model, config_from_settings, load_optimizer, load_weights, model_args
from support.text.tokens import (BatchRamp, choose_windows, epoch_length, eval_windows, fingerprint, prefetch,
                                 read_windows, target_share)

# ---------------------------------------------------------------------------- settings

# run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume, else scratch), finetune, gpt2, ..., or a folder
finetune_from = ''  # the folder whose ckpt.pt init_from=finetune starts from; empty: out_dir
eval_interval = 2000  # iterations between evaluations
eval_iters = 200  # batches of each split in an evaluation; 0: the whole split
eval_only = False  # evaluate once, write nothing
log_interval = 1  # iterations between lines of the log
sample_interval = 0  # iterations between printed samples; 0: none
plot = True  # draw out_dir/loss.png after evaluations, if matplotlib is installed
always_save_checkpoint = True  # ckpt.pt at every evaluation, not only when the validation loss improves
checkpoint_interval = 1000  # iterations between states to resume from; 0: only when told to stop
ckpt_with_optimizer = True  # False: ckpt.pt is a third of the size, and only latest.pt can be resumed
dry_run = False  # print what the run needs, time a few iterations, write nothing
plan_gpus = ''  # with dry_run: only print what the run would need on these, such as 8xH100
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin and val.bin; empty: data/<dataset>
allow_changed_data = False  # resume on data that has changed since
sampler = 'random'  # random: windows from anywhere; epoch: each window once an epoch, shuffled
gradient_accumulation_steps = 40  # micro-steps an iteration, over all processes
batch_ramp_iters = 0  # iterations over which the micro-steps of a process rise from 1 to their number
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more if the data is seen many times
bias = False  # biases in the linear and normalisation layers
# model, beyond GPT-2 (model.py has the sources)
activation = 'gelu'  # gelu, gelu_tanh, relu2, swiglu
pos_emb = 'learned'  # learned, rope, alibi, none
norm = 'layernorm'  # layernorm, rmsnorm
qk_norm = False  # normalise queries and keys
tie_weights = True  # one matrix for the token embedding and the output layer
value_residual = False  # layers mix their values with the first layer's
logit_softcap = 0.0  # keep logits between -cap and cap; 0: unlimited
n_kv_head = 0  # heads of keys and values; 0: n_head
ngram = 1  # add embeddings of the last 2 to this many tokens; 1: none
ngram_rows = 16384  # rows of their table
init = 'gpt2'  # gpt2, zero_proj
# attention, which may differ from that of the checkpoint to start from
attn_type = 'auto'  # SM, GK, GKpoly-n, PA_f (docs/attention.md); auto: as in the checkpoint, else SM
pa_norm = 'auto'  # divisor of PA_f: length, block_size, none; auto: as in the checkpoint, else length
# optimizer
optimizer = 'adamw'  # adamw, muon (for the matrices of the blocks, with AdamW for the rest)
muon_lr = 0.02  # Muon's highest learning rate; learning_rate is then AdamW's
learning_rate = 6e-4  # the highest, after the warm-up
embedding_lr = 0.0  # that of the token embedding, with tie_weights=False; 0: learning_rate
max_iters = 600000
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip gradients to this norm; 0: don't
ema_decay = 0.0  # decay of averaged weights, which are evaluated and sampled from; 0: none
lora_rank = 0  # train low-rank adapters only: fine-tuning in little memory; 0: train all weights
lora_alpha = 16.0  # the adapters' output is scaled by alpha / rank
# learning rate: linear warm-up, then a cosine down to min_lr
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'cosine'  # cosine, linear, wsd, constant
warmup_iters = 2000
lr_decay_iters = 600000  # where min_lr is reached
min_lr = 6e-5
# machine
parallel = 'ddp'  # ddp: each process holds the whole model; fsdp: a part of it
cpu_offload = False  # fsdp on GPUs: keep parameters and optimizer in the machine's memory; slow
backend = 'auto'  # nccl, gloo
dist_timeout = 600.0  # seconds a process waits for the others before the run ends
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile: takes a minute, makes the iterations faster
activation_checkpointing = False  # recompute activations in the backward pass: less memory, slower
seed = 1337

config = configure(globals())
if dry_run and plan_gpus:
    print(plan.scale_of(config))
    raise SystemExit

# ---------------------------------------------------------------------------- machine

run = runtime.resolve(device, dtype, compile, backend, dist_timeout, threads)
check_settings(config, run)
if run.world_size > 1:
    dist.init_process_group(run.backend, timeout=timedelta(seconds=dist_timeout),
                            **runtime.restart_store(run.rank, run.world_size))
run.begin(seed)
config.update(device=run.device, dtype=run.dtype, compile=run.compile, backend=run.backend)
autocast = torch.autocast(run.device_type, hardware.DTYPES[run.dtype], enabled=run.dtype != 'float32')
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == 'float16' and run.device_type == 'cuda')
micro_steps = gradient_accumulation_steps // run.world_size  # of this process
ramp, sequences = BatchRamp(micro_steps, batch_ramp_iters), run.world_size * batch_size  # of a micro-step

# ---------------------------------------------------------------------------- data

folder, data, tokenizer, data_vocab = open_data(config)
fingerprints = {split: fingerprint(folder, split, tokens) for split, tokens in data.items()}
check_ranks(config, fingerprints, run)

# ---------------------------------------------------------------------------- model

claim(config, run)
state, is_resumed = find_state(config, run)  # of an earlier run, or None
changes = {'dropout': dropout} | {k: config[k] for k in ('attn_type', 'pa_norm') if config[k] != 'auto'}
if state:
    model = build_model(state, changes)
elif init_from in ('scratch', 'auto'):
    model = GPT(config_from_settings(config, data_vocab))
else:
    model = load_pretrained(init_from, changes)
window = min(block_size, model.config.block_size)  # tokens of a sequence
if window < block_size:
    print0(f'block_size {block_size} exceeds the model\'s {window}; using {window}')
check_data(config, folder, data, window, model.config, data_vocab, tokenizer, fingerprints, state, is_resumed)
in_bits = BitsPerByte(run, tokenizer, data, window, batch_size, eval_iters)
print0(f'tokens per iteration will be: {gradient_accumulation_steps * batch_size * window:,}')

if window < model.config.block_size:
    model.crop_block_size(window)
lora.add_adapters(model, lora_rank, lora_alpha)
use_lean_loss(model)
use_fast_products(model, run)
if activation_checkpointing:
    checkpoint_activations(model)
model = fsdp.shard(model, run, cpu_offload) if parallel == 'fsdp' else model.to(run.device)
average = WeightAverage(model, ema_decay)
print0(plan.parameters_in_words(model))

# ---------------------------------------------------------------------------- optimizer

muon = {'lr_scale': muon_lr / learning_rate, 'weight_decay': weight_decay} if optimizer == 'muon' else None
opt = configure_optimizer(model, weight_decay, learning_rate, (beta1, beta2), run.device_type, muon,
                          embedding_lr)
kinds = ['decayed', 'non-decayed', *(['embedding'] if embedding_lr else []), 'Muon']
for name, group in zip(kinds, opt.param_groups):
    count = sum(p.numel() for p in group['params'])
    print0(f'num {name} parameter tensors: {len(group["params"])}, with {count:,} parameters')

# what one iteration hands to the next, besides the weights; batches and dropout follow from (seed, iteration)
iter_num, best_val_loss = 0, math.inf
meter, wandb_id = Meter(run), os.urandom(4).hex()
guard = Guard(run.device, grad_clip or math.inf, scaler.is_enabled())
if is_resumed:
    iter_num, best_val_loss, wandb_id = restore(
        state, meter, guard, gradient_accumulation_steps * batch_size * window, wandb_id)
    if not eval_only:
        if 'trained' in state:  # then state['model'] is their average, or has adapters merged in
            load_weights(model, state['trained'])
        load_optimizer(opt, state['optimizer'], getattr(model.transformer.wpe, 'weight', None))
        scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
del state
first_iter = saved_iter = iter_num

# ---------------------------------------------------------------------------- compilation, processes

if run.compile:
    print0('compiling the model (the first iterations wait for it)')
    if parallel == 'fsdp':
        fsdp.compile_blocks(model)
    else:
        model.compile()  # torch.compile in place: no prefix on the parameters' names
parallel_model, no_sync = model, nullcontext
if parallel == 'fsdp' and not cpu_offload:  # offloaded, whole gradients would take the room that was saved
    no_sync = partial(fsdp.no_sync, model)
elif parallel == 'ddp' and run.world_size > 1:
    parallel_model = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[run.device] if run.device_type == 'cuda' else None, gradient_as_bucket_view=True)
    no_sync = parallel_model.no_sync


# ---------------------------------------------------------------------------- what the loop calls

def get_batch(iteration, micro_step):
    """x, y: (B, T), this process's part of the iteration's global batch, and its weight in the loss."""
    at = ramp.before(iteration) * sequences if sampler == 'epoch' else iteration
    starts = choose_windows(data['train'], sampler, seed, at, ramp.at(iteration) * sequences, window)
    first = (micro_step * run.world_size + run.rank) * batch_size
    x, y = read_windows(data['train'], starts[first:first + batch_size], window)
    return run.to_device(x), run.to_device(y), target_share(data['train'], starts, first, batch_size, window)


def get_lr(it):
    """Learning rate of an iteration: linear warm-up, then from learning_rate to min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # 0 to 1
    share = {
        'cosine': 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2017, eq. 5, one period
        'linear': 1 - progress,
        'wsd': min(1.0, (1 - progress) / 0.2),  # stable, decaying in the last fifth (Hu et al. 2024)
        'constant': 1.0}[lr_schedule]
    return min_lr + share * (learning_rate - min_lr)


def estimate_loss(watch=iter):
    """Mean loss of each split, with the averaged weights if there are any. watch: see mean_loss."""
    with average.in_place():
        losses = {split: mean_loss(model, run, tokens, window, batch_size, eval_iters, watch)
                  for split, tokens in data.items()}
    print0(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}'
           f'{in_bits.told(losses)}', style='bold')
    return losses


def update(iteration, lr, vitals=None):
    """One iteration: forward, backward, clipping, the optimizer's step. Returns the loss of the whole batch
    and the norm of the gradient, on the device. vitals: a record of diagnostics to add to, or None."""
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
    run.seed(seed, iteration)
    loss, n_micro = torch.zeros((), device=run.device), ramp.at(iteration)
    meter.begin_iteration()
    with plan.out_of_memory_advice(batch_size, gradient_accumulation_steps):
        for micro_step in range(n_micro):
            x, y, share = next(batches)
            with no_sync() if micro_step < n_micro - 1 else nullcontext():  # exchange gradients at the end
                with autocast:
                    micro_loss = parallel_model(x, y)[1] * share / n_micro
                meter.begin_waiting()
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    loss = run.mean(loss)
    scaler.unscale_(opt)
    grad_norm = fsdp.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    guard.watch(iteration, loss, grad_norm, opt)
    with watch_update(model, vitals) if vitals else nullcontext():
        scaler.step(opt)
    scaler.update()
    average.update(iteration)
    opt.zero_grad(set_to_none=True)
    meter.end_iteration(n_micro * sequences * window)
    return loss, grad_norm


def save_state(name, keep=None, with_optimizer=True):
    """Write all that an exact resume needs to out_dir, on the first process; all call it. Returns False, on
    all, if the file could not be written: a full disk costs a warning, not the run."""
    with average.in_place():
        weights = lora.merged_state_dict(model) if lora_rank else fsdp.full_model_state(model)
    state = {
        'model': weights,
        'optimizer': fsdp.full_optimizer_state(model, opt),
        'model_args': model_args(model.config),
        'iter_num': iter_num, 'best_val_loss': best_val_loss,
        'config': config,
        'tokenizer': tokenizer.to_dict(), 'chat': getattr(data['train'], 'template', None),
        'scaler': scaler.state_dict(), 'guard': guard.state_dict(),
        'data': fingerprints,
        'seconds': meter.seconds, 'n_tokens': meter.tokens, 'wandb_id': wandb_id,
    }
    if ema_decay or lora_rank:
        state['trained'] = fsdp.full_model_state(model)
    saved = True
    if run.is_master:
        guard.stop_if_unfit(iter_num, last_state(), state)
        if not with_optimizer:
            state = {k: v for k, v in state.items() if k not in ('optimizer', 'trained')}
        try:
            checkpoint.save(os.path.join(out_dir, name), state, keep and os.path.join(out_dir, keep))
        except OSError as error:
            print0(f'NOT SAVED: {error}. The run goes on and tries again at the next interval')
            saved = False
    return run.broadcast(saved)


def last_state():
    return f'The last good state is that of iteration {saved_iter}, in {out_dir}' if saved_iter > 0 else \
        'No state was saved before'


# ---------------------------------------------------------------------------- without training

if eval_only:
    estimate_loss()
    run.stop()
    raise SystemExit

batches = prefetch(get_batch, ((i, m) for i in itertools.count(iter_num) for m in range(ramp.at(i))))
end = max(iter_num, max_iters + 1)
print0(plan.describe(model, run, {k: epoch_length(v, window) for k, v in data.items()}, end - iter_num,
                     (ramp.before(end) - ramp.before(iter_num)) * sequences, batch_size, out_dir, parallel,
                     activation_checkpointing, cpu_offload))
if dry_run:
    meter.begin_lap()
    for i in range(iter_num, min(end, iter_num + 12)):
        loss, _ = update(i, get_lr(i))
        print0(f'iter {i}: loss {loss.item():.4f}, time {meter.lap()["ms"]:.2f}ms')
    n_batches = sum(len(eval_windows(v, window, batch_size, eval_iters)) for v in data.values())
    print0('time    ' + plan.time_needed(meter.times, range(iter_num, end), eval_interval,
                                         n_batches / run.world_size, micro_steps))
    run.stop()
    raise SystemExit

# ---------------------------------------------------------------------------- training loop

if run.is_master and iter_num == 0:
    move_earlier_run(out_dir)
print0('to go on after a stop: the same command with --init_from=auto')
wandb = Wandb({'project': wandb_project, 'name': wandb_run_name, 'config': config, 'id': wandb_id,
               'resume': 'allow'} if run.is_master and wandb_log else None)
log = RunLog(os.path.join(out_dir, 'log.jsonl') if run.is_master else None, iter_num, wandb)
drawing = Drawing([os.path.join(os.path.dirname(__file__), 'plot.py'), out_dir, '--low_priority=True']
                  if run.is_master and plot else None)
progress, stop = Progress(max_iters), StopRequest(run)
probe, _ = read_windows(data['val'], eval_windows(data['val'], window, batch_size, 1)[0], window)
peak = hardware.Peak(run.device, run.dtype)
is_alone = parallel != 'fsdp'  # the first process, in measurements: it has the whole model
measuring = run.is_master or not is_alone
mfu = math.nan  # in percent
meter.begin_lap()

while iter_num <= max_iters and not stop.agreed():
    lr = get_lr(iter_num) if decay_lr else learning_rate

    # evaluation and saving, before the update; their time doesn't count
    evaluating = iter_num % eval_interval == 0 or iter_num == max_iters
    saving = checkpoint_interval and iter_num % checkpoint_interval == 0 and iter_num > first_iter
    sampling = sample_interval and iter_num % sample_interval == 0
    vitals = None
    if evaluating or saving or sampling:
        try:
            with meter.pause() as seconds:
                guard.stop_if_not_finite(iter_num, last_state())
                if evaluating:
                    losses = estimate_loss(stop.watch)
                    guard.stop_if_not_finite(iter_num, last_state(), *losses.values())
                    log.write({'iter': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'],
                               **in_bits(losses), 'lr': lr, 'mfu': mfu, 'seconds': seconds,
                               'tokens': meter.tokens})
                    if measuring:
                        with stop.alone(is_alone):
                            vitals = measure_vitals(model, run, probe, stop.check if is_alone else None)
                            log.write_later(iter_num, vitals)
                    if iter_num > first_iter:
                        drawing.start()
                    best_before, best_val_loss = best_val_loss, min(best_val_loss, losses['val'])
                    if iter_num > 0 and (best_val_loss < best_before or always_save_checkpoint):
                        print0(f'saving checkpoint to {out_dir}')
                        if not save_state('ckpt.pt', with_optimizer=ckpt_with_optimizer):
                            best_val_loss = best_before
                if saving and save_state('latest.pt', keep='previous.pt'):
                    saved_iter = iter_num
                if sampling and measuring:
                    with stop.alone(is_alone), average.in_place():
                        text = show_sample(model, tokenizer, data['val'][:1].tolist(), run, iter_num,
                                           seed + iter_num, stop.watch)
                        wandb.log_sample(iter_num, text)
        except Stopped:  # in an evaluation or a sample, which doesn't count
            continue

    loss, grad_norm = update(iter_num, lr, vitals)

    # log: the mean loss of the whole batch, the mean time since the last line
    if iter_num % log_interval == 0:
        guard.stop_if_not_finite(iter_num, last_state())
        entry = {'iter': iter_num, 'loss': loss.item(), 'lr': lr, 'grad_norm': grad_norm.item(),
                 'clipped': guard.n_clipped.item() / min(log_interval, iter_num + 1)} | meter.lap()
        rate = entry['tokens_per_s'] / run.world_size / window  # sequences/s of a process
        entry['mfu'] = mfu = peak.percent(model.estimate_mfu(rate, 1.0, 1.0))
        progress.show(entry)
        log.write(entry)
        guard.n_clipped.zero_()
    iter_num += 1

# ---------------------------------------------------------------------------- the end

stop.close()
stopped = iter_num <= max_iters
guard.stop_if_not_finite(iter_num, last_state())
if iter_num > saved_iter and (checkpoint_interval or stopped) and not save_state('latest.pt', 'previous.pt'):
    raise SystemExit(f'the state of iteration {iter_num} is lost. {last_state()}')
if stopped:
    print0(f'stopped at iteration {iter_num}; to go on: the same command with --init_from=auto')
log.close()
wandb.call('finish')
drawing.close(patience=meter.seconds / 100)
release(out_dir)
run.stop()
