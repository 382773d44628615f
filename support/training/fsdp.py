"""
Fully sharded data parallelism, by PyTorch's FSDP2: each process keeps 1/n of every parameter, gradient and
optimizer buffer (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023). It gathers a block's parameters
before it computes with them, and frees them afterwards.

    model = shard(model, run)                                 # on its device
    norm = full_tensor(clip_grad_norm_(model.parameters(), 1.0))
    weights = full_model_state(model)                         # as one process without FSDP has them
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from support.errors import UserError


def check_parallel(mode, run, optimizer):
    """UserError for settings that don't go together."""
    if mode not in ('ddp', 'fsdp'):
        raise UserError(f'parallel={mode} is not one of ddp, fsdp')
    if mode == 'fsdp' and run.device_type not in ('cuda', 'cpu'):
        raise UserError(f'parallel=fsdp is for CUDA and CPUs, this run is on {run.device}')
    if mode == 'fsdp' and optimizer == 'muon':
        raise UserError('parallel=fsdp cuts matrices into parts, optimizer=muon needs them whole: use '
                        '--parallel=ddp or --optimizer=adamw')
    if mode == 'fsdp' and run.dtype == 'float16':
        raise UserError('dtype=float16 needs a gradient scaler, which parallel=fsdp does not have: use '
                        '--dtype=bfloat16')


def shard(model, run):
    """The model in parts, on its device. Each block moves there on its own: no device ever holds all.
    UserError for a model without transformer.h."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    if not hasattr(getattr(model, 'transformer', None), 'h'):
        raise UserError('parallel=fsdp shards the blocks in transformer.h, which this model.py lacks: use '
                        '--parallel=ddp')
    if not dist.is_initialized():  # a single process makes a group of its own
        dist.init_process_group(run.backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.DeviceMesh.from_group(dist.group.WORLD, run.device_type)
    # As under autocast: matrices in 16 bits, the residual stream and sums of gradients in 32. A CPU's
    # normalisations accept no 16-bit weights, so there autocast does it.
    low = torch.bfloat16 if run.dtype == 'bfloat16' and run.device_type == 'cuda' else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy, mesh=mesh)
        if hasattr(block, 'values'):
            register_fsdp_forward_method(block, 'values')
    fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), mesh=mesh)
    if run.backend == 'gloo':
        model.set_force_sum_reduction_for_comms(True)  # Gloo has no mean
    for module in (*model.transformer.h, model):  # a first time in inference mode would leave tensors of it
        module.unshard()
        module.reshard()
    # Embeddings that an evaluation left gathered would be stale at the next one.
    model.register_forward_hook(lambda model, *_: None if torch.is_grad_enabled() else model.reshard())
    return model


def is_sharded(model):
    return hasattr(model, 'set_requires_gradient_sync')


def compile_blocks(model):
    """Compile each block, and leave FSDP's own work between them uncompiled."""
    for block in model.transformer.h:
        block.compile()


@contextmanager
def no_sync(model):
    """Within a with statement gradients add up on each process, whole; otherwise their parts are averaged."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def full_tensor(tensor):
    """The value of a sharded tensor, the same on all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def full_model_state(model):
    """The state dict of the whole model; under FSDP on the first process, in the machine's memory, and an
    empty one on the others. All processes call it."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_world_size() == 1:  # then these are the parameters' own memory
        weights = {name: t.clone() for name, t in weights.items()}
    first = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(p, name)
        if weights:  # a parameter of two names is one tensor
            weights[name] = weights[first[p]]
    return weights


def full_optimizer_state(model, optimizer):
    """The same of an optimizer, with its parameters numbered as one process numbers them."""
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
