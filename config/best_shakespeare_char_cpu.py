"""
Shakespeare character by character, as well as two CPU cores learn it in a minute.

    python data/shakespeare_char/prepare.py
    python train.py config/best_shakespeare_char_cpu.py
    python sample.py --out_dir=out-best-shakespeare-char

On two cores of an AMD EPYC (Zen 5) 51 seconds as a whole process, to a loss of 1.52 over the whole
validation split (1.515 to 1.521 over two seeds, one and two threads, two machines).
"""

out_dir = 'out-best-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False

# 32 sequences * 128 characters = 4,096 an iteration, half of it at first: 1.4 epochs in all
sampler = 'epoch'
gradient_accumulation_steps = 2
batch_ramp_iters = 135
batch_size = 16
block_size = 128

# 0.8M parameters, and 8.4M in the table of n-grams
n_layer = 4
n_head = 2
n_kv_head = 1  # as good here, and quicker
n_embd = 128
pos_emb = 'rope'
activation = 'swiglu'
qk_norm = True
value_residual = True
ngram = 5
ngram_rows = 65536

optimizer = 'muon'
muon_lr = 0.05
learning_rate = 6e-3
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 15
max_iters = 370
lr_decay_iters = 370

eval_interval = 370
eval_iters = 8
plot = False  # there are two evaluations to draw
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 0
