"""
A small GPT that writes Python character by character, on text that every machine has.

    python data/stdlib_char/prepare.py
    python train.py config/train_stdlib_char.py
    python sample.py --out_dir=out-stdlib-char

On two cores of an AMD EPYC (AVX-512) two and a quarter minutes, to a validation loss of 1.57. Where there is
a CUDA GPU, a larger model is trained instead, which we haven't timed.
"""

import torch

out_dir = 'out-stdlib-char'
dataset = 'stdlib_char'
gradient_accumulation_steps = 1
beta2 = 0.99
warmup_iters = 100
log_interval = 50
always_save_checkpoint = False

if torch.cuda.is_available():
    # 10.7M parameters; 64 sequences * 256 characters = 16,384 an iteration, 524 iterations an epoch
    n_layer = n_head = 6
    n_embd = 384
    batch_size = 64
    block_size = 256
    learning_rate = 1e-3
    min_lr = 1e-4
    max_iters = lr_decay_iters = 5000
    eval_interval = 500
    eval_iters = 100
else:
    # 0.8M parameters; 16 sequences * 128 characters = 2,048 an iteration
    n_layer = n_head = 4
    n_embd = 128
    batch_size = 16
    block_size = 128
    learning_rate = 3e-3
    min_lr = 1e-4
    max_iters = lr_decay_iters = 1200
    eval_interval = 300
    eval_iters = 50
    compile = False
