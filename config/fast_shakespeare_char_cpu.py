"""
Shakespeare character by character in seconds, on two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/fast_shakespeare_char_cpu.py
    python sample.py --out_dir=out-fast-shakespeare-char

On two cores of an AMD EPYC (Zen 4) four seconds as a whole process, to a loss of 1.88 over the whole
validation split (1.87 to 1.88 over three seeds); train_shakespeare_char_cpu takes 95 seconds to 1.90.
"""

out_dir = 'out-fast-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False

# 32 sequences * 64 characters = 2,048 an iteration, 0.1 epochs in all
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

# 0.2M parameters, and 4.2M in the table of n-grams
n_layer = 1
n_head = 4
n_embd = 128
pos_emb = 'rope'
qk_norm = True
ngram = 4  # so short a run learns most from which letters follow which
ngram_rows = 32768

optimizer = 'muon'
muon_lr = 0.05
learning_rate = 1.2e-2
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 5
max_iters = 44
lr_decay_iters = 44

eval_interval = 44
eval_iters = 5
log_interval = 5
checkpoint_interval = 0  # ckpt.pt is enough of so short a run
always_save_checkpoint = False
