"""
What survives a run: checkpoint files, written so that no crash can damage the one before.

    save('out/ckpt.pt', {'model': ..., 'optimizer': ..., 'model_args': ..., 'iter_num': ..., ...})
    state = load('out/ckpt.pt')
"""

import pickle
import struct
import zipfile
from pathlib import Path

import torch

from dataset import replacing

# what torch.load raises where a file is cut or is no checkpoint
UNREADABLE = (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, LookupError,
              struct.error, TypeError, AttributeError, AssertionError)


def save(path, state):
    """Write `state` to `path` so that the file is at all times the old one or the new one, whole."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path, mmap=False):
    """A checkpoint as a dict of CPU tensors and plain values; no code in the file is run.

    mmap: read tensors from the file as they are used; right for a reader that doesn't need them all.
    Raises FileNotFoundError or ValueError, in one line, if it isn't there or isn't a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is missing: train a model there first, or name another --out_dir')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        state = f'{type(error).__name__}: {error}'.splitlines()[0]
    if not (isinstance(state, dict) and all(isinstance(state.get(k), dict) for k in ('model', 'model_args'))
            and all(isinstance(name, str) for name in state['model'])):
        reason = state if isinstance(state, str) else 'it has no model and model_args'
        raise ValueError(f'{path} is not a checkpoint, or a damaged one ({reason[:200]})')
    state['model'] = clean_names(state['model'])
    return state


def clean_names(weights):
    """The model's own tensor names, from files that older scripts wrote: torch.compile's prefix and the
    causal masks, which are no parameters, are dropped."""
    names = {name: name.removeprefix('_orig_mod.') for name in weights}
    return {clean: weights[name] for name, clean in names.items() if not clean.endswith('.attn.bias')}


def load_optimizer(optimizer, saved):
    """Give an optimizer the buffers of a saved state, keeping its own settings: a resumed run takes its
    weight decay and betas from its config. Buffers of a tensor that was cropped are cropped as it was.
    Raises ValueError if the parameters don't match."""
    groups = [{**own, 'params': theirs['params']} for own, theirs in
              zip(optimizer.state_dict()['param_groups'], saved['param_groups'], strict=True)]
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
    for p, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if buffer.dim() and buffer.shape != p.shape:
                buffers[name] = buffer[tuple(map(slice, p.shape))].clone()
