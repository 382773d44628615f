"""
A small GPT that writes Python character by character, on text that every machine has.

    python data/stdlib_char/prepare.py
    python train.py config/train_stdlib_char.py
    python sample.py --out_dir=out-stdlib-char

On two cores of an AMD EPYC one minute (Zen 5) to two (Zen 4), to a validation loss of 1.24. On a CUDA GPU the
config trains a larger model, which we haven't timed.
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
    # 0.85M parameters, and 8.4M in the table of n-grams
    # 16 sequences * 128 characters * 600 iterations = 1,228,800, a seventh of an epoch
    n_layer = n_head = 4
    n_embd = 128
    pos_emb = 'rope'
    activation = 'swiglu'
    qk_norm = True
    value_residual = True
    ngram = 4
    ngram_rows = 65536
    batch_size = 16
    block_size = 128
    optimizer = 'muon'
    muon_lr = 0.05
    learning_rate = 6e-3
    weight_decay = 0.0
    beta2 = 0.95
    lr_schedule = 'linear'
    min_lr = 0.0
    warmup_iters = 20
    max_iters = lr_decay_iters = 600
    eval_interval = 200
    eval_iters = 50
    compile = False
