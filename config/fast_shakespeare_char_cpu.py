"""
Shakespeare character by character in seconds, on two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/fast_shakespeare_char_cpu.py
    python sample.py --out_dir=out-fast-shakespeare-char
"""

out_dir = 'out-fast-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False

# 64 sequences * 64 characters = 4,096 an iteration
gradient_accumulation_steps = 1
batch_size = 64
block_size = 64

n_layer = 2
n_head = 4
n_embd = 128
pos_emb = 'rope'
qk_norm = True
value_residual = True
ngram = 4
ngram_rows = 32768

optimizer = 'muon'
muon_lr = 0.04
learning_rate = 1.2e-2
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 5
max_iters = 25
lr_decay_iters = 25

eval_interval = 25
eval_iters = 20
log_interval = 5
always_save_checkpoint = False
