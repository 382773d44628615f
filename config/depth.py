"""
A GPT of any depth: everything else follows from n_layer.

    python data/fineweb/prepare.py --shards=18
    python scripts/plan.py --n_layer=20 config/depth.py --gpus=8xH100       # what it needs
    torchrun --standalone --nproc_per_node=8 train.py --n_layer=12 config/depth.py
    python train.py --n_layer=4 config/depth.py --batch_size=4 --gradient_accumulation_steps=8 --max_iters=200

The last one is for a CPU. The rules are nanochat's (scripts/base_train.py) and those of the papers below;
the rates at depth 12 are those of config/fast_gpt2.py. n_layer, block_size, batch_size,
gradient_accumulation_steps and max_iters may be given before or after this file, and the rest follows from
them. Not measured yet at any depth.

    depth   parameters    tokens    tokens an iteration   iterations     FLOPs
        4        28.9M      192M                262,144          733   2.1e+16
        8        76.7M      611M                524,288        1,165   2.2e+17
       12       162.2M    1,483M                524,288        2,828   1.3e+18
       20       522.0M    5,490M              1,048,576        5,236   1.7e+19
"""

import math
import sys

from support.errors import UserError
from support.machine.console import print0


def _given(name, default):
    """A setting of the command line, wherever it stands there."""
    found = [arg.partition('=')[2] for arg in sys.argv if arg.startswith(f'--{name}=')]
    try:
        value = int(float(found[-1])) if found else default
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f'{name}={found[-1] if found else default} must be a whole number of at least 1')
    return value


n_layer = _given('n_layer', n_layer)  # noqa: F821, train.py's own
block_size = _given('block_size', block_size)  # noqa: F821
batch_size = _given('batch_size', 32)
dataset = 'fineweb'
_V = 50304  # GPT-2's vocabulary, padded
_HEAD = 128  # channels of a head, as in modded-nanogpt and nanochat


def _width(depth):
    """64 channels a layer, rounded up to whole heads (nanochat, aspect_ratio)."""
    return math.ceil(64 * depth / _HEAD) * _HEAD


def _scaling_params(depth):
    """Those that grow with the work of a token: matrices and the output layer (nanochat, dev/LOG.md)."""
    return 12 * depth * _width(depth) ** 2 + _V * _width(depth)


# width
n_embd = _width(n_layer)
n_head = n_embd // _HEAD

# tokens: 12 a scaling parameter (nanochat's fit; Hoffmann et al. 2022: about 20 a parameter)
_D, _D12 = 12 * _scaling_params(n_layer), 12 * _scaling_params(12)

# batch: 2^19 tokens at depth 12, then as D^0.383 (Bergsma et al. 2025, "Power Lines"), a power of 2
_B = 2 ** round(math.log2(2 ** 19 * (_D / _D12) ** 0.383))
gradient_accumulation_steps = _given('gradient_accumulation_steps',
                                     max(1, round(_B / (batch_size * block_size))))
_B = gradient_accumulation_steps * batch_size * block_size

# iterations
max_iters = lr_decay_iters = _given('max_iters', max(1, _D // _B))
_D = max_iters * _B

# rates: as sqrt(B) (Malladi et al. 2022, for Adam; nanochat for Muon too); AdamW's of the embedding and the
# output layer as 1 / sqrt(width) too (nanochat)
_larger_batch = math.sqrt(_B / 2 ** 19)
_wider = math.sqrt(n_embd / 768)
muon_lr = 0.025 * _larger_batch
embedding_lr = 0.7 * _larger_batch / _wider
learning_rate = 4e-3 * _larger_batch / _wider  # of the output layer
scalar_lr = 0.015 * _larger_batch

# decay: B / (rate * decay * D) stays what it is at depth 12 (Wang & Aitchison 2024, "How to set AdamW's
# weight decay as you scale model and dataset size")
weight_decay = 0.05 * _larger_batch * _D12 / _D
adam_weight_decay = 0.001

# the rest is that of config/fast_gpt2.py
bias = False
pos_emb = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
attn_scale = 0.12
embd_norm = True
x0_residual = True
logit_softcap = 15.0
tie_weights = False
init = 'zero_proj'
init_gain = 3 ** -0.5
zero_head = True
optimizer = 'muon'
newton_schulz = 'exact'
beta1 = 0.8
beta2 = 0.95
adam_eps = 1e-10
grad_clip = 0.0
lr_schedule = 'wsd'
wsd_decay = 0.65  # nanochat
min_lr = 0.05 * learning_rate  # nanochat
warmup_iters = min(40, max_iters // 10)  # nanochat: 40

eval_interval = 250
eval_iters = 50
log_interval = 10
out_dir = f'out-depth-{n_layer}'

_n_params = 12 * n_layer * n_embd ** 2 + 2 * _V * n_embd
_flops = (6 * _scaling_params(n_layer) + 12 * n_layer * n_embd * block_size) * _D
print0(f'depth {n_layer}: {n_embd} channels, {n_head} heads, {_n_params / 1e6:.1f}M parameters, '
       f'{_D / 1e6:,.0f}M tokens, {_B:,} an iteration, {max_iters:,} iterations, {_flops:.1e} FLOPs')
