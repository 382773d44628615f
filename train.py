"""
Train a GPT.

    python train.py config/train_shakespeare_char.py                 # one process: GPU, Apple GPU or CPU
    python train.py --dataset=my_text --batch_size=32 --max_iters=5000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py            # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29400 train.py config/train_gpt2.py     # on each of two nodes

Every setting below can be given in a config file or as --key=value; --help lists them.
"""

import dataclasses
import itertools
import math
import os
from contextlib import nullcontext

import torch

import checkpoint
import health
import lora
import plan
import runtime
from configurator import configure
from dataset import (PADDED_GPT2_VOCAB, SAMPLERS, check_split, eval_windows, fingerprint, open_split,
                     prefetch, read_meta, read_tokenizer, read_windows)
from evaluation import mean_loss
from guard import Guard
from model import GPT, GPTConfig
from optim import WeightAverage
from parallel import check, connect, place, whole, whole_model, whole_optimizer
from runlog import Drawing, Meter, Progress, RunLog, Wandb, print0, show_sample
from schedule import SCHEDULES, BatchRamp

# ---------------------------------------------------------------------------- settings

# run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume, else scratch), finetune, gpt2, ..., a GPT-2's folder
finetune_from = ''  # the folder whose ckpt.pt init_from=finetune starts from; empty: out_dir
eval_interval = 2000  # iterations between evaluations
eval_iters = 200  # batches an evaluation reads of each split; 0: the whole split
eval_only = False  # evaluate once, write nothing
log_interval = 1  # iterations between lines of the log
sample_interval = 0  # iterations between samples, which are printed; 0: none
plot = True  # draw out_dir/loss.png after evaluations, if matplotlib is installed
always_save_checkpoint = True  # ckpt.pt at every evaluation, not only where the validation loss improves
checkpoint_interval = 1000  # iterations between states to resume from; 0: only when the run is told to stop
ckpt_with_optimizer = True  # False: ckpt.pt is a third of the size, and only latest.pt can be resumed
dry_run = False  # tell what the run needs, measure a few iterations, write nothing
plan_gpus = 0  # with dry_run: tell what it would need on so many GPUs, and no more
plan_gpu = 'H100'  # their kind: A100, H100, H200, B200, RTX 4090
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin and val.bin; empty: data/<dataset>
allow_changed_data = False  # resume on other data than the run has seen so far
sampler = 'random'  # random: windows from anywhere; epoch: each once an epoch, shuffled
gradient_accumulation_steps = 40  # micro-steps an iteration, over all processes
batch_ramp_iters = 0  # iterations in which the micro-steps rise from 1 a process to that number
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more where the data is seen many times
bias = False  # biases in the linear and normalisation layers
# model, beyond GPT-2 (model.py has the sources)
activation = 'gelu'  # gelu, gelu_tanh, relu2, swiglu
pos_emb = 'learned'  # learned, rope, alibi, none
norm = 'layernorm'  # layernorm, rmsnorm
qk_norm = False  # queries and keys normalised
tie_weights = True  # one matrix for the token embedding and the output layer
value_residual = False  # layers mix their values with the first layer's
residual_scale = False  # learned weights of the residual stream and the embedding
logit_softcap = 0.0  # logits between -cap and cap; 0: unlimited
n_kv_head = 0  # heads of keys and values; 0: n_head
ngram = 1  # embeddings of the last 2 to this many tokens; 1: none
ngram_rows = 16384  # of the table of these
init = 'gpt2'  # gpt2, zero_proj
# attention, which may differ from that of the weights it starts from
attn_type = 'auto'  # SM, GK, GKpoly-n, PA_f (model.py); auto: as in the checkpoint, SM where there is none
pa_norm = 'auto'  # of PA_f: length, block_size, none; auto: as in the checkpoint, else length
# optimizer
optimizer = 'adamw'  # adamw, muon (the blocks' matrices; AdamW for all else)
muon_lr = 0.02  # of Muon, where learning_rate is AdamW's
muon_weight_decay = 0.0
muon_momentum = 0.95
learning_rate = 6e-4  # the highest, after the warm-up
max_iters = 600000
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: unlimited
ema_decay = 0.0  # of an average of the weights, which is evaluated and sampled from; 0: none
skip_spikes = 0.0  # skip updates whose loss or norm is this many deviations above the last 128's; 0: none
lora_rank = 0  # of adapters, which alone are trained: fine-tuning in little memory (lora.py); 0: none
lora_alpha = 16.0  # what they add counts alpha / rank times
# learning rate: linear warm-up, then a cosine down to min_lr
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'cosine'  # cosine, linear, wsd, constant
warmup_iters = 2000
lr_decay_iters = 600000  # where min_lr is reached
min_lr = 6e-5
# machine
parallel = 'ddp'  # ddp: each process has the whole model; fsdp: a part of each block
cpu_offload = False  # fsdp on GPUs: parameters and optimizer in the machine's memory; slow
backend = 'auto'  # nccl, gloo
dist_timeout = 600.0  # seconds a process waits for the others before the run ends
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile: takes a minute, makes the iterations faster
activation_checkpointing = False  # keep one tensor a block and compute the rest again: less memory, slower
peak_flops = 0.0  # FLOP/s of one device, which mfu is a share of; 0: looked up or, on a CPU, measured
seed = 1337

config = configure(globals())
grad_clip = grad_clip or math.inf
named = [f.name for f in dataclasses.fields(GPTConfig)]
architecture = {k: config[k] for k in named if config.get(k, 'auto') != 'auto'}
if dry_run and plan_gpus:
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=PADDED_GPT2_VOCAB, **architecture))
    print(plan.scale(model, plan_gpus, plan_gpu, gradient_accumulation_steps * batch_size, max_iters + 1))
    raise SystemExit

# ---------------------------------------------------------------------------- machine, data

run = runtime.start(device, dtype, compile, backend, seed, dist_timeout)
config.update(device=run.device, dtype=run.dtype, compile=run.compile, backend=run.backend)

for name, choices in {'sampler': SAMPLERS, 'optimizer': ('adamw', 'muon'), 'lr_schedule': SCHEDULES}.items():
    if config[name] not in choices:
        raise ValueError(f'{name}={config[name]} is not one of {", ".join(choices)}')
check(parallel, run, optimizer, cpu_offload)
if min(batch_size, block_size, gradient_accumulation_steps, eval_interval, log_interval) < 1:
    raise ValueError('batch_size, block_size, gradient_accumulation_steps, eval_interval and log_interval '
                     'must be at least 1')
if gradient_accumulation_steps % run.world_size:
    raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} counts over all processes '
                     f'and must be a multiple of their number, {run.world_size}')
micro_steps = gradient_accumulation_steps // run.world_size
ramp, sequences = BatchRamp(micro_steps, batch_ramp_iters), run.world_size * batch_size  # of a micro-step

data_dir = data_dir or os.path.join('data', dataset)
data = {split: open_split(data_dir, split) for split in ('train', 'val')}
tokenizer, meta = read_tokenizer(data_dir), read_meta(data_dir)
data_vocab = meta['vocab_size'] if meta else PADDED_GPT2_VOCAB
if meta:
    print0(f'found vocab_size = {data_vocab} (inside {os.path.join(data_dir, "meta.pkl")})')

# ---------------------------------------------------------------------------- model, optimizer

model = state = None
changes = {'dropout': dropout} | {k: config[k] for k in ('attn_type', 'pa_norm') if config[k] != 'auto'}
if init_from == 'finetune':
    state = checkpoint.load(os.path.join(finetune_from or out_dir, 'ckpt.pt'))
elif eval_only and init_from == 'resume':
    state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
elif init_from in ('resume', 'auto'):
    state = checkpoint.find(out_dir, run, must_exist=init_from == 'resume', dry_run=dry_run)
going_on = state is not None and init_from != 'finetune'
lora.check(config, state, going_on)
if state:
    model_config = GPTConfig.from_args(state['model_args'] | changes)
    if state.get('tokenizer', tokenizer.to_dict()) != tokenizer.to_dict():
        raise ValueError(f'the checkpoint was trained with another tokenizer than that of {data_dir}')
    if (stored := state['model_args'].get('attn_type', 'SM')) != model_config.attn_type:
        print0(f'attn_type: {model_config.attn_type}, where the checkpoint has {stored}')
elif init_from in ('scratch', 'auto'):
    model_config = GPTConfig(vocab_size=data_vocab, **architecture)
else:
    model = GPT.from_pretrained(init_from, changes)
    model_config = model.config
    if meta and data_vocab != model_config.vocab_size:
        raise ValueError(f'{data_dir} holds characters, but {init_from} has a vocabulary of '
                         f'{model_config.vocab_size}: prepare the text as GPT-2 BPE (data/shakespeare does)')

if block_size > model_config.block_size:
    print0(f'block_size is {model_config.block_size}, the most that this model has, not {block_size}')
    block_size = model_config.block_size
for split, tokens in data.items():
    check_split(tokens, os.path.join(data_dir, f'{split}.bin'), block_size, model_config.vocab_size)
fingerprints = {split: fingerprint(data_dir, split, tokens) for split, tokens in data.items()}
if going_on and not (eval_only or allow_changed_data) and state.get('data', fingerprints) != fingerprints:
    raise ValueError(f'{data_dir} is not the data that {out_dir} was trained on: to go on with other data, '
                     'add --allow_changed_data=True')
print0(f'tokens per iteration will be: {gradient_accumulation_steps * batch_size * block_size:,}')

model = model or GPT(model_config)
if state:
    model.load_state_dict(state['model'])
if block_size < model_config.block_size:
    model.crop_block_size(block_size)
lora.add_adapters(model, lora_rank, lora_alpha)
model = place(model, run, parallel, cpu_offload)
average = WeightAverage(model, ema_decay)
model.activation_checkpointing = activation_checkpointing
print0(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')

muon = {'lr_scale': muon_lr / learning_rate, 'weight_decay': muon_weight_decay,
        'momentum': muon_momentum} if optimizer == 'muon' else None
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), run.device_type, muon)
for name, group in zip(('decayed', 'non-decayed', 'Muon'), optimizer.param_groups):
    count = sum(p.numel() for p in group['params'])
    print0(f'num {name} parameter tensors: {len(group["params"])}, with {count:,} parameters')
scaler = run.grad_scaler()

# what goes from one iteration to the next, weights apart; batches and dropout follow from (seed, iteration)
iter_num, best_val_loss = 0, math.inf
meter, wandb_id = Meter(run), os.urandom(4).hex()
guard = Guard(run.device, grad_clip, skip_spikes, scaler.is_enabled())
if going_on:
    iter_num, best_val_loss = state['iter_num'], float(state['best_val_loss'])
    meter.seconds, wandb_id = state.get('seconds', 0.0), state.get('wandb_id', wandb_id)
    guard.load_state_dict(state.get('guard') or guard.state_dict())
    meter.tokens = state.get('n_tokens', iter_num * gradient_accumulation_steps * batch_size * block_size)
    print0(f'resuming at iteration {iter_num}')
    if not eval_only:
        if 'trained' in state:  # of which state['model'] is the average, or adapters and all in one
            checkpoint.load_weights(model, state['trained'])
        checkpoint.load_optimizer(optimizer, state['optimizer'])
        scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
del state
first_iter = saved_iter = iter_num

parallel_model, hold_gradients = connect(model, run, cpu_offload)


# ---------------------------------------------------------------------------- what the loop calls

def get_batch(iteration, micro_step):
    """x, y: (B, T), this process's part of the iteration's global batch."""
    at = ramp.before(iteration) * sequences if sampler == 'epoch' else iteration
    starts = SAMPLERS[sampler](seed, at, ramp.at(iteration) * sequences, len(data['train']), block_size)
    first = (micro_step * run.world_size + run.rank) * batch_size
    x, y = read_windows(data['train'], starts[first:first + batch_size], block_size)
    return run.to_device(x), run.to_device(y)


def estimate_loss():
    """Mean loss of each split, with the averaged weights if there are any."""
    with average.in_place():
        return {split: mean_loss(model, run, tokens, block_size, batch_size, eval_iters)
                for split, tokens in data.items()}


def get_lr(it):
    """Learning rate of an iteration; the cosine is Loshchilov & Hutter's (2017, eq. 5), without restarts."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # 0 to 1
    return min_lr + SCHEDULES[lr_schedule](progress) * (learning_rate - min_lr)


def save(name, keep=None, with_optimizer=True):
    """Write all that an exact resume needs to out_dir, on the first process; all call it. A full disk costs a
    warning, not the run: returns False, on all, where the file could not be written."""
    with average.in_place():
        averaged = lora.merged_state_dict(model) if lora_rank else whole_model(model)
    state = {
        'model': averaged,
        'optimizer': whole_optimizer(model, optimizer),
        'model_args': model.config.to_args(),
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'config': config,
        'tokenizer': tokenizer.to_dict(),
        'scaler': scaler.state_dict(),
        'data': fingerprints,
        'seconds': meter.seconds,
        'n_tokens': meter.tokens,
        'guard': guard.state_dict(),
        'wandb_id': wandb_id,
    }
    if ema_decay or lora_rank:
        state['trained'] = whole_model(model)
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


# ---------------------------------------------------------------------------- training loop

if not eval_only:
    end = max(iter_num, max_iters + 1)
    print0(plan.describe(model, run, {k: len(v) for k, v in data.items()}, end - iter_num,
                         (ramp.before(end) - ramp.before(iter_num)) * sequences, batch_size, out_dir))
is_watching = (run.is_master or parallel == 'fsdp') and not (eval_only or dry_run)  # fsdp's run it together
is_writing = run.is_master and is_watching
if is_writing:
    if iter_num == 0 and (earlier := checkpoint.move_earlier_run(out_dir)):
        print0(f'{out_dir} holds an earlier run: its checkpoints are in {earlier} now')
    print0('to go on after a stop: the same command with --init_from=auto')
wandb = Wandb({'project': wandb_project, 'name': wandb_run_name, 'config': config, 'id': wandb_id,
               'resume': 'allow'} if is_writing and wandb_log else None)
log = RunLog(os.path.join(out_dir, 'log.jsonl') if is_writing else None, iter_num, wandb)
drawing = Drawing([os.path.join(os.path.dirname(__file__), 'plot.py'), out_dir, '--low_priority=True']
                  if is_writing and plot else None)
progress = Progress(max_iters)
probe, _ = read_windows(data['val'], eval_windows(len(data['val']), block_size, batch_size, 1)[0], block_size)
if not eval_only:
    peak_flops = peak_flops or runtime.peak_flops(run.device, run.dtype)
batches = prefetch(get_batch, ((i, m) for i in itertools.count(iter_num) for m in range(ramp.at(i))))
mfu = float('nan')  # percent
stop, stopped = runtime.StopRequest(run), False
meter.begin_lap()

while iter_num <= max_iters:
    stopped = stop.agreed() or (dry_run and len(meter.times) == 12)
    if stopped:
        break
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)

    # evaluation and saving, before the update; their time doesn't count
    evaluating = iter_num % eval_interval == 0 or iter_num == max_iters
    saving = checkpoint_interval and iter_num % checkpoint_interval == 0 and iter_num > first_iter
    sampling = sample_interval and iter_num % sample_interval == 0
    if eval_only or (evaluating or saving or sampling) and not dry_run:
        with meter.pause() as seconds:
            guard.stop_if_not_finite(iter_num, last_state())
            if evaluating or eval_only:
                losses = estimate_loss()
                print0(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}',
                       style='bold')
                if eval_only:
                    break
                guard.stop_if_not_finite(iter_num, last_state(), *losses.values())
                log.write({'iter': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'],
                           'lr': lr, 'mfu': mfu, 'seconds': seconds, 'tokens': meter.tokens})
                if is_watching:
                    vitals = health.measure(model, run, probe)
                    log.write_later(iter_num, vitals)
                if iter_num > first_iter:
                    drawing.start()
                best_before, best_val_loss = best_val_loss, min(best_val_loss, losses['val'])
                if iter_num > 0 and (best_val_loss < best_before or always_save_checkpoint):
                    print0(f'saving checkpoint to {out_dir}')
                    if not save('ckpt.pt', with_optimizer=ckpt_with_optimizer):
                        best_val_loss = best_before
            if saving and save('latest.pt', keep='previous.pt'):
                saved_iter = iter_num
            if sampling and is_watching:
                with average.in_place():
                    text = show_sample(model, tokenizer, data['val'][:1].tolist(), run, iter_num,
                                       seed + iter_num)
                wandb.log_sample(iter_num, text)

    # forward and backward; DDP averages the gradients in the last micro-step only
    run.seed(seed, iter_num)
    loss, n_micro = torch.zeros((), device=run.device), ramp.at(iter_num)
    meter.begin_iteration()
    with plan.out_of_memory_advice(batch_size, gradient_accumulation_steps):
        for micro_step in range(n_micro):
            x, y = next(batches)
            with hold_gradients() if micro_step < n_micro - 1 else nullcontext():
                with run.autocast():
                    _, micro_loss = parallel_model(x, y, return_logits=False)
                    micro_loss = micro_loss / n_micro
                meter.begin_waiting()
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    loss = run.mean(loss)  # of the whole batch, on the device
    scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))

    if guard.allows(iter_num, loss, norm, optimizer):
        with health.watch_update(model, vitals) if evaluating and is_watching else nullcontext():
            scaler.step(optimizer)
    else:
        print0(f'iter {iter_num}: update skipped, a spike ({guard.n_skipped} so far)')
    scaler.update()
    average.update(iter_num)
    optimizer.zero_grad(set_to_none=True)

    # log: the mean loss of the whole batch, the mean time since the last line
    meter.end_iteration(n_micro * sequences * block_size)
    if iter_num % log_interval == 0 or dry_run:
        guard.stop_if_not_finite(iter_num, last_state())
        loss, norm = loss.item(), norm.item()
        entry = {'iter': iter_num, 'loss': loss, 'lr': lr, 'grad_norm': norm, 'skipped': guard.n_skipped,
                 'clipped': guard.n_clipped.item() / min(log_interval, iter_num + 1)} | meter.lap()
        rate = entry['tokens_per_s'] / run.world_size / block_size  # sequences/s of a process
        entry['mfu'] = mfu = 100 * model.estimate_mfu(rate, 1.0, peak_flops or math.nan)
        progress.show(entry)
        log.write(entry)
        guard.n_clipped.zero_()
    iter_num += 1

# ---------------------------------------------------------------------------- the end

stop.close()
if dry_run and meter.times:
    n_batches = sum(len(eval_windows(len(v), block_size, batch_size, eval_iters)) for v in data.values())
    print0('time    ' + plan.time_needed(meter.times, range(first_iter, max_iters + 1), eval_interval,
                                         n_batches / run.world_size, micro_steps))
elif not (dry_run or eval_only):
    guard.stop_if_not_finite(iter_num, last_state())
    wanted = iter_num > saved_iter and (checkpoint_interval or stopped)
    if wanted and not save('latest.pt', keep='previous.pt'):
        raise SystemExit(f'the state of iteration {iter_num} is lost. {last_state()}')
    if stopped:
        print0(f'stopped at iteration {iter_num}; to go on: the same command with --init_from=auto')
log.close()
wandb.call('finish')
drawing.close(patience=meter.seconds / 100)
run.stop()
