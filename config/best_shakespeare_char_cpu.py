"""
Shakespeare character by character, for two CPU cores and two minutes.

    python data/shakespeare_char/prepare.py
    python train.py config/best_shakespeare_char_cpu.py
    python sample.py --out_dir=out-best-shakespeare-char

On two cores of an AMD EPYC (Zen 4) 103 seconds as a whole process, to a loss of 1.49 over the whole
validation split (1.492 to 1.495, five runs of three seeds).
"""

from support.machine.hardware import has_bfloat16

out_dir = 'out-best-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
dtype = 'bfloat16' if has_bfloat16('cpu') else 'float32'  # a quarter faster where native
compile = False

# 16 sequences * 256 characters = 4,096 an iteration, half of it at first: 1.8 epochs in all
sampler = 'epoch'
gradient_accumulation_steps = 2
batch_ramp_iters = 180
batch_size = 8
block_size = 256

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
max_iters = 480
lr_decay_iters = 480

eval_interval = 480
eval_iters = 8
plot = False  # there are two evaluations to draw
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 0
