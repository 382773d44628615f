"""
Several processes, one model: each with all of it (DDP), or with a part of each block (FSDP2).

    model = place(model, run, 'fsdp', cpu_offload=False)      # on its device, in parts
    parallel_model, hold_gradients = connect(model, run)      # to call; a context without exchange
    norm = whole(clip_grad_norm_(model.parameters(), 1.0))    # the number that all processes share
    weights = whole_model(model)                              # as one process without FSDP has them

FSDP, fully sharded data parallelism (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023): a process
keeps 1/n of every parameter, gradient and optimizer buffer. It collects a block's parameters before it
computes with them and forgets them after.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from runtime import print0

MODES = ('ddp', 'fsdp')


def check(mode, run, optimizer, cpu_offload):
    """ValueError for what doesn't go together."""
    if mode not in MODES:
        raise ValueError(f'parallel={mode} is not one of {", ".join(MODES)}')
    if cpu_offload and (mode != 'fsdp' or run.device_type != 'cuda'):
        raise ValueError('cpu_offload=True keeps what a GPU would hold in the machine\'s memory: it needs '
                         f'parallel=fsdp and CUDA, this run has parallel={mode} on {run.device}')
    if mode == 'fsdp' and run.device_type not in ('cuda', 'cpu'):
        raise ValueError(f'parallel=fsdp is for CUDA and CPUs, this run is on {run.device}')
    if mode == 'fsdp' and optimizer == 'muon':
        raise ValueError('parallel=fsdp cuts matrices in parts, optimizer=muon needs them whole: use '
                         '--parallel=ddp or --optimizer=adamw')
    if mode == 'fsdp' and run.grad_scaler().is_enabled():
        raise ValueError('dtype=float16 needs a gradient scaler, which parallel=fsdp has none of: use '
                         '--dtype=bfloat16')


def place(model, run, mode, cpu_offload=False):
    """The model on its device. With FSDP each block moves there on its own, so that no device ever holds all
    of it."""
    if mode == 'ddp':
        return model.to(run.device)
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    how = {'mesh': make_mesh(run, cpu_offload),
           'offload_policy': CPUOffloadPolicy() if cpu_offload else OffloadPolicy()}
    # As under autocast: matrices in 16 bits, the residual stream and gradients' sums in 32. On a CPU autocast
    # does it alone, whose normalisations take no weights of 16 bits beside it.
    low = torch.bfloat16 if run.dtype == 'bfloat16' and run.device_type == 'cuda' else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy, **how)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)
    if run.backend == 'gloo':
        model.set_force_sum_reduction_for_comms(True)  # Gloo has no mean
    # an evaluation leaves no embeddings gathered, which the next one would take though weights have changed
    model.register_forward_hook(lambda model, *_: None if torch.is_grad_enabled() else model.reshard())
    return model


def make_mesh(run, cpu_offload):
    """All processes in a row. One alone makes a group of its own; with cpu_offload it needs Gloo as well, for
    what is in the machine's memory."""
    if not dist.is_initialized():
        dist.init_process_group(run.backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend=f'cpu:gloo,cuda:{run.backend}') if cpu_offload else dist.group.WORLD
    return dist.DeviceMesh.from_group(group, run.device_type)


def is_sharded(model):
    return hasattr(model, 'set_requires_gradient_sync')


def compile_in_place(model):
    """Without wrappers: no prefix gets on the parameters' names. FSDP's own work stays outside."""
    print0('compiling the model (the first iterations wait for it)')
    if not is_sharded(model):
        model.compile()
        return
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward)


def connect(model, run, cpu_offload=False):
    """What to call in place of the model, compiled if the run is, and a context in which no gradients are
    exchanged. With cpu_offload they always are: whole ones would take the room that it is there to save."""
    if run.compile:
        compile_in_place(model)
    if is_sharded(model):
        return model, nullcontext if cpu_offload else lambda: no_sync(model)
    if run.world_size == 1:
        return model, nullcontext
    ddp = nn.parallel.DistributedDataParallel(
        model, device_ids=[run.device] if run.device_type == 'cuda' else None)
    return ddp, ddp.no_sync


@contextmanager
def no_sync(model):
    """Within it, gradients add up on each process, whole; without, its parts of them are summed over all."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def whole(tensor):
    """A sharded tensor's value, the same on all processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def whole_model(model):
    """The state dict of the whole model; under FSDP on the first process, in the machine's memory, and
    nothing on the others. All processes call it."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_world_size() == 1:  # then what is gathered is the parameters' own memory
        weights = {name: t.clone() for name, t in weights.items()}
    if weights and model.config.tie_weights:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    return weights


def whole_optimizer(model, optimizer):
    """The same of an optimizer, its parameters by number, as one process has it."""
    if not is_sharded(model):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return state
    names = [name for group in state['param_groups'] for name in group['params']]
    numbers = {name: i for i, name in enumerate(names)}
    groups = [group | {'params': [numbers[n] for n in group['params']]} for group in state['param_groups']]
    return {'state': {numbers[n]: state['state'][n] for n in names if n in state['state']},
            'param_groups': groups}
