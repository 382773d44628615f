"""
Train a GPT.

    python train.py config/train_shakespeare_char.py                 # one process: GPU, Apple GPU or CPU
    python train.py --dataset=my_text --batch_size=32 --max_iters=5000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py            # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=1 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29400 train.py config/train_gpt2.py     # on each of two nodes

Every setting below can be given in a config file or as --key=value, and so can every option of the model,
the fields of GPTConfig in model.py. --help lists them all.
"""

from configurator import configure  # import first: reports missing packages

import gc
import itertools
import math
import os
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from model import GPTConfig
from support.errors import UserError
from support.evaluating import scoring
from support.machine import hardware, runtime, signals
from support.machine.console import print0
from support.machine.files import explain_failure
from support.machine.linear import use_cpu_linears
from support.text.windows import BatchRamp, prefetch
from support.training import diagnostics, folder, fsdp, lora, models, optim, plan, start
from support.training.log import Meter, RunLog, sample_text
from support.training.loss import lean_loss
from support.training.state import State, kept_name

# ---------------------------------------------------------------------------- settings

# run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume, else scratch), gpt2, ..., a folder, a .pt file
eval_interval = 2000  # iterations between evaluations
eval_iters = 200  # batches of each split in an evaluation; 0: the whole split
eval_only = False  # evaluate once, write nothing
log_interval = 1  # iterations between lines of the log
sample_interval = 0  # iterations between printed samples; 0: none
patience = 0  # evaluations without a better validation loss before the run stops; 0: no limit
plot = True  # draw out_dir/loss.png after evaluations, if matplotlib is installed
always_save_checkpoint = True  # ckpt.pt at every evaluation, not only when the validation loss improves
checkpoint_interval = 1000  # iterations between states to resume from; 0: only when the run stops
keep_interval = 0  # iterations between checkpoints that are kept, as ckpt_5000.pt; 0: none
ckpt_with_optimizer = True  # False: ckpt.pt is a third of the size, and only latest.pt can be resumed
dry_run = False  # print what the run needs, time a few iterations, write nothing
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard = False  # event files in out_dir/tensorboard, for TensorBoard
# data
dataset = 'openwebtext'  # a folder of data/
data_dir = ''  # any other folder with train.bin and val.bin; empty: data/<dataset>
sampler = 'random'  # random: windows from anywhere; epoch: each window once an epoch, shuffled
pack = False  # conversations: as many in a training window as fit, not one
gradient_accumulation_steps = 40  # micro-steps an iteration, over all processes
batch_ramp_iters = 0  # iterations over which the micro-steps of a process rise from 1 to their number
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens a sequence
# model; its other options are those of GPTConfig in model.py
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more if the data is seen many times
bias = False  # biases in the linear and normalisation layers
# optimizer; its other options are those of OptimizerOptions in support/training/optim.py
optimizer = 'adamw'  # adamw, muon (for the matrices of the blocks, with AdamW for the rest)
muon_lr = 0.02  # Muon's highest learning rate; learning_rate is then AdamW's
learning_rate = 6e-4  # the highest, after the warm-up
embedding_lr = 0.0  # that of the token embedding, with tie_weights=False; 0: learning_rate
max_iters = 600000
weight_decay = 0.1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip gradients to this norm; 0: don't
lora_rank = 0  # train low-rank adapters only: fine-tuning in little memory; 0: train all weights
lora_alpha = 16.0  # the adapters' output is scaled by alpha / rank
# learning rate: linear warm-up, then a cosine down to min_lr
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'cosine'  # cosine, linear, wsd, constant
wsd_decay = 0.2  # wsd: the last share of the schedule, in which the rate decays
warmup_iters = 2000
lr_decay_iters = 600000  # where min_lr is reached
min_lr = 6e-5
# machine
parallel = 'ddp'  # ddp: each process holds the whole model; fsdp: a part of it
backend = 'auto'  # nccl, gloo
dist_timeout = 600.0  # seconds a process waits for the others before the run ends
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = 'auto'  # torch.compile: takes a minute, makes the iterations faster
cuda_graphs = False  # with compile, on one GPU: replay recorded kernels, faster where a model is small
residual_16bit = False  # the residual stream in dtype's 16 bits, not in float32: less memory traffic
activation_checkpointing = False  # recompute activations in the backward pass: less memory, slower
seed = 1337

config = configure(globals(), GPTConfig, more=[optim.OptimizerOptions])  # whose fields are settings, too

# ---------------------------------------------------------------------------- machine

run = runtime.resolve(device, dtype, compile, backend, dist_timeout, threads)
start.check_settings(config, run)
if run.world_size > 1:
    with explain_failure('the processes can\'t be connected: torchrun sets MASTER_ADDR and MASTER_PORT'):
        dist.init_process_group(run.backend, timeout=timedelta(seconds=dist_timeout),
                                **runtime.restart_store(run.rank, run.world_size))
run.begin(seed)
config.update(device=run.device, dtype=run.dtype, compile=run.compile, backend=run.backend)
autocast = torch.autocast(run.device_type, hardware.DTYPES[run.dtype], enabled=run.dtype != 'float32')
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == 'float16' and run.device_type == 'cuda')
micro_steps = gradient_accumulation_steps // run.world_size  # of this process
ramp = BatchRamp(micro_steps, batch_ramp_iters)
sequences = run.world_size * batch_size  # of a micro-step, over all processes

# ---------------------------------------------------------------------------- data, model

start.share_names(config, run)  # the first process's: a name may have a time in it
out_dir = config['out_dir']
data = start.open_data(config)
data['train'].pack = pack
fingerprints = data.fingerprints()
start.check_ranks(config, fingerprints, run)
folder.claim(config, run)
state, is_resumed = start.find_state(config, run)  # of an earlier run, or None
model = models.starting_model(config, state, data.vocab_size)
window = min(block_size, model.config.block_size)  # tokens of a sequence
if window < block_size:
    print0(f'block_size {block_size} exceeds the model\'s {window}; using {window}')
windows = scoring.Windows(window, batch_size, eval_iters)  # that an evaluation reads
start.report_start(config, state, is_resumed, model.config)
start.check_start(config, state, is_resumed, data, model.config)
if padding := data['train'].padding(window):
    print0(f'padding: {padding:.1%} of the training windows')
print0(f'tokens per iteration will be: {gradient_accumulation_steps * batch_size * window:,}')

longest = window  # texts that the saved model can have; where positions are computed, as long as before
if getattr(model.config, 'pos_emb', 'learned') != 'learned':
    longest = model.config.block_size
if window < model.config.block_size:
    model.crop_block_size(window)
if activation_checkpointing:
    start.check_offers(model, 'activation_checkpointing')
    model.activation_checkpointing = True
if residual_16bit:
    start.check_offers(model, 'residual_16bit')
    model.residual_16bit = True
lora.add_adapters(model, lora_rank, lora_alpha)
use_cpu_linears(model, run)
lean = lean_loss(model, run)  # arguments of the forward pass: a loss that never holds all logits
model = fsdp.shard(model, run) if parallel == 'fsdp' else model.to(run.device)
print0(plan.parameters_in_words(model))

# ---------------------------------------------------------------------------- optimizer, progress

opt = optim.make_optimizer(model, config, run.device_type)
for group in opt.param_groups:
    count = sum(p.numel() for p in group['params'])
    print0(f'num {group["name"]} parameter tensors: {len(group["params"])}, with {count:,} parameters')

# what one iteration hands to the next, besides the weights; batches and dropout follow from (seed, iteration)
iter_num, best_val_loss, wandb_id = 0, math.inf, os.urandom(4).hex()
best_iter = 0  # of the evaluation with best_val_loss
meter = Meter(run)
guard = diagnostics.Guard(run.device, grad_clip or math.inf, scaler.is_enabled())
if is_resumed:
    iter_num, best_val_loss, wandb_id = state.iter_num, state.best_val_loss, state.wandb_id or wandb_id
    best_iter = iter_num if state.best_iter is None else state.best_iter
    start.restore(state, meter, guard, gradient_accumulation_steps * batch_size * window)
    if not eval_only:
        if state.trained:  # then state.model has adapters merged in
            models.load_weights(model, state.trained)
        models.load_optimizer(opt, state.optimizer)
        scaler.load_state_dict(state.scaler or scaler.state_dict())
lora.shrink_frozen(model, hardware.DTYPES[run.dtype])
del state
first_iter = saved_iter = iter_num

# ---------------------------------------------------------------------------- compilation, processes

if cuda_graphs:
    optim.keep_gradients(model, run, parallel)
if run.compile:
    print0('compiling the model (the first iterations wait for it)')
    if parallel == 'fsdp':
        fsdp.compile_blocks(model)
    else:
        # torch.compile in place: no prefix on the parameters' names
        model.compile(mode='reduce-overhead' if cuda_graphs else None)
parallel_model, no_sync = model, nullcontext
if parallel == 'fsdp':
    no_sync = partial(fsdp.no_sync, model)
elif run.world_size > 1:
    parallel_model = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[run.device] if run.device_type == 'cuda' else None, gradient_as_bucket_view=True)
    no_sync = parallel_model.no_sync


# ---------------------------------------------------------------------------- what the loop calls

def get_batch(iteration, micro_step):
    """x, y: (B, T), this process's part of the iteration's global batch, and its weight in the loss."""
    at = ramp.before(iteration) * sequences if sampler == 'epoch' else iteration
    starts = data['train'].train_windows(sampler, seed, at, ramp.at(iteration) * sequences, window)
    first = (micro_step * run.world_size + run.rank) * batch_size
    x, y = data['train'].read(starts[first:first + batch_size], window)
    share = data['train'].target_share(starts, first, batch_size, window)
    return run.to_device(x), run.to_device(y), share


def get_lr(it):
    """Learning rate of an iteration: linear warm-up, then from learning_rate to min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if lr_schedule == 'constant':
        return learning_rate
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # 0 to 1
    share = {
        'cosine': 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2017, eq. 5, one period
        'linear': 1 - progress,
        'wsd': min(1.0, (1 - progress) / wsd_decay),  # stable, then decaying (Hu et al. 2024)
    }[lr_schedule]
    return min_lr + share * (learning_rate - min_lr)


def estimate_loss(watch=iter):
    """Mean loss of each split over the same windows each time. watch: see scoring.mean_loss."""
    losses = {name: scoring.mean_loss(model, run, split, windows, lean, watch)
              for name, split in data.splits.items()}
    print0(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}'
           f'{bits_per_byte.in_words(losses)}', style='bold')
    return losses


@plan.out_of_memory_advice(batch_size, gradient_accumulation_steps)
def update(lr, vitals=None):
    """One iteration: forward, backward, clipping, the optimizer's step. Returns the loss of the whole batch
    and the norm of the gradient, on the device. vitals: a record of diagnostics to add to, or None."""
    optim.set_lr(opt, lr, learning_rate)
    run.seed(seed, iter_num)
    loss, n_micro = torch.zeros((), device=run.device), ramp.at(iter_num)
    meter.begin_iteration()
    for micro_step in range(n_micro):
        x, y, share = next(batches)
        synced = no_sync() if micro_step < n_micro - 1 else nullcontext()  # exchange gradients at the end
        with synced, hardware.attention_kernels(run.device, window):
            with autocast:
                micro_loss = parallel_model(x, y, **lean)[1] * share / n_micro
            meter.begin_waiting()
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    loss = run.mean(loss)
    scaler.unscale_(opt)
    grad_norm = fsdp.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    with diagnostics.watch_update(model, vitals) if vitals else nullcontext():
        if guard.allows(iter_num, loss, grad_norm, opt):
            scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=not cuda_graphs)
    meter.end_iteration(n_micro * sequences * window)
    return loss, grad_norm


@plan.out_of_memory_advice(batch_size, gradient_accumulation_steps)
def evaluate_and_save(lr):
    """What is due before an iteration's update: evaluation, checkpoints, a sample. Returns vitals, to which
    the update adds, or None. The time doesn't count."""
    global saved_iter
    saving = checkpoint_interval and iter_num % checkpoint_interval == 0 and iter_num > first_iter
    keeping = keep_interval and iter_num % keep_interval == 0 and iter_num > first_iter
    sampling = sample_interval and iter_num % sample_interval == 0
    evaluating = iter_num % eval_interval == 0 or iter_num == max_iters
    if not (evaluating or saving or keeping or sampling):
        return None
    vitals = None
    with meter.pause() as seconds:
        if not gc.isenabled():
            gc.collect()
        guard.stop_if_not_finite(iter_num, last_state())
        if evaluating:
            data.check_unchanged()
            if run.broadcast(folder.check_folder(out_dir)):  # it had to be made again
                saving = iter_num > first_iter
            vitals = evaluate(seconds, lr)
        if saving and save_state('latest.pt', keep='previous.pt'):
            saved_iter = iter_num
        if keeping:
            save_state(kept_name(iter_num), with_optimizer=ckpt_with_optimizer)
        if sampling and is_measuring:
            with stop.alone(is_alone):
                log.sample(iter_num, sample_text(model, data.tokenizer, probe[0, :1].tolist(), run,
                                                 seed + iter_num, stop.watch))
    return vitals


def evaluate(seconds, lr):
    """Losses of both splits, the state of the layers, and ckpt.pt. Returns the vitals."""
    global best_val_loss, best_iter
    losses = estimate_loss(stop.watch)
    guard.stop_if_not_finite(iter_num, last_state(), *losses.values())
    log.evaluation({'iter': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'],
                    **bits_per_byte(losses), 'lr': lr, 'mfu': mfu, 'seconds': seconds,
                    'tokens': meter.tokens})
    vitals = None
    if is_measuring:
        with stop.alone(is_alone):
            vitals = diagnostics.measure_vitals(model, run, probe, stop.check if is_alone else None)
            log.write_later(iter_num, vitals)
    before, best_val_loss = best_val_loss, min(best_val_loss, losses['val'])
    is_best = best_val_loss < before
    best_iter = iter_num if is_best else best_iter
    if iter_num > 0 and (is_best or always_save_checkpoint):
        print0(f'saving checkpoint to {out_dir}')
        if not save_state('ckpt.pt', with_optimizer=ckpt_with_optimizer):
            best_val_loss = before
    return vitals


def is_out_of_patience():
    return patience and iter_num - best_iter >= patience * eval_interval


def save_state(name, keep=None, with_optimizer=True):
    """Write what an exact resume needs to out_dir; all processes call it. Returns False, on all, if the file
    could not be written: a full disk costs a warning, not the run."""
    return run.broadcast(write_state(name, keep, with_optimizer))


def write_state(name, keep=None, with_optimizer=True):
    """The same on the first process; with parallel=ddp it may be the only one that calls it."""
    weights, trained = fsdp.full_model_state(model), None
    if lora_rank:
        weights, trained = lora.merged_state_dict(model), model.state_dict()
    state = State(
        model=weights,
        trained=trained,
        optimizer=fsdp.full_optimizer_state(model, opt),
        model_args=models.model_args(model.config) | {'block_size': longest},
        iter_num=iter_num,
        best_val_loss=best_val_loss,
        best_iter=best_iter,
        config=dict(config),
        tokenizer=data.tokenizer.to_dict(),
        chat=data.template,
        data=fingerprints,
        scaler=scaler.state_dict(),
        guard=guard.state_dict(),
        seconds=meter.total_seconds(),
        n_tokens=meter.tokens,
        wandb_id=wandb_id,
    )
    if not run.is_master:
        return True
    guard.stop_if_unfit(iter_num, last_state(), state)
    if not with_optimizer:
        state = state.without_optimizer()
    try:
        state.save(os.path.join(out_dir, name), keep and os.path.join(out_dir, keep))
    except OSError as error:
        print0(f'NOT SAVED: {error}. The run goes on and tries again at the next interval')
        return False
    return True


def last_state():
    if saved_iter > 0:
        return f'The last good state is that of iteration {saved_iter}, in {out_dir}'
    return 'No state was saved before'


def log_iteration(loss, grad_norm, lr):
    """The mean loss of the whole batch, and means since the last line. What is added here is in log.jsonl,
    wandb and the picture."""
    global mfu
    guard.stop_if_not_finite(iter_num, last_state())
    entry = {'iter': iter_num, 'loss': loss.item(), 'lr': lr, 'grad_norm': grad_norm.item(),
             'clipped': guard.n_clipped.item() / min(log_interval, iter_num + 1)} | meter.lap()
    rate = entry['tokens_per_s'] / run.world_size / window  # sequences/s of a process
    entry['mfu'] = mfu = peak.percent(hardware.training_flops(model, rate))
    log.iteration(entry)
    guard.n_clipped.zero_()


# ---------------------------------------------------------------------------- without training

bits_per_byte = scoring.BitsPerByte(run, data, windows)
if eval_only:
    estimate_loss()
    run.stop()
    raise SystemExit

batches = prefetch(get_batch, ((i, m) for i in itertools.count(iter_num) for m in range(ramp.at(i))))
end = max(iter_num, max_iters + 1)
to_do = plan.Work(iter_num, end, (ramp.before(end) - ramp.before(iter_num)) * sequences)
print0(plan.describe(model, run, data, to_do, config))
if dry_run:
    print0(plan.rehearse(lambda: update(get_lr(iter_num)), run, data, to_do, config))
    run.stop()
    raise SystemExit

# ---------------------------------------------------------------------------- training loop

if run.is_master and iter_num == 0:
    folder.move_earlier_run(out_dir)
if iter_num > max_iters:
    print0(f'finished at iteration {iter_num - 1}; raise --max_iters to go on')
else:
    print0('to continue after a stop: the same command with --init_from=auto')
log, stop = RunLog(config, run, iter_num, wandb_id), signals.StopRequest(run)
probe, _ = data['val'].read(data['val'].eval_windows(window, batch_size, 1)[0], window)
peak, mfu = hardware.Peak(run.device, run.dtype), math.nan  # mfu in percent
is_alone = parallel != 'fsdp'  # the first process, in measurements: it has the whole model
is_measuring = run.is_master or not is_alone
meter.begin_lap()

try:
    while iter_num <= max_iters and not stop.agreed():
        lr = get_lr(iter_num) if decay_lr else learning_rate
        try:
            vitals = evaluate_and_save(lr)
        except signals.Stopped:  # in an evaluation or a sample, which then doesn't count
            continue
        if is_out_of_patience():
            print0(f'stopping: no better validation loss in {patience} evaluations')
            break
        loss, grad_norm = update(lr, vitals)
        if iter_num == first_iter:
            gc.freeze()
            gc.disable()  # it may stop an iteration for half a second; evaluate_and_save collects
        if iter_num % log_interval == 0:
            log_iteration(loss, grad_norm, lr)
        iter_num += 1
except (UserError, OSError):  # data that changed under the run, a disk that is gone: nothing is lost
    if run.is_master and is_alone and iter_num > saved_iter and folder.is_claimed(out_dir):
        write_state('latest.pt', 'previous.pt')
    raise
finally:
    gc.unfreeze()
    gc.enable()

# ---------------------------------------------------------------------------- the end

stop.close()
seconds = meter.total_seconds()
guard.stop_if_not_finite(iter_num, last_state())
stopped = iter_num <= max_iters
if iter_num > saved_iter and (checkpoint_interval or stopped) and not save_state('latest.pt', 'previous.pt'):
    raise OSError(f'the state of iteration {iter_num} is lost. {last_state()}')
log.close(patience=seconds / 100)
if stopped:
    further = ' and a larger --patience' if is_out_of_patience() else ''
    print0(f'stopped at iteration {iter_num}; to continue: the same command with --init_from=auto{further}')
elif os.path.isfile(os.path.join(out_dir, 'ckpt.pt')):
    chat = ' --interactive=True --chat=True' if data.template else ''
    print0(f'to read what it writes: python sample.py --out_dir={out_dir}{chat}')
print0(log.summary({'iterations': iter_num, 'seconds': seconds, 'tokens': meter.tokens,
                    'peak_memory_bytes': hardware.peak_memory(run.device)}))
folder.release(out_dir)
run.stop()
