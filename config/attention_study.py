"""
One type of attention on Shakespeare's characters; scripts/attention_study.py compares all types.

    python data/shakespeare_char/prepare.py
    python train.py config/attention_study.py --attn_type=GK
    python scripts/attention_study.py                # every type, three seeds: a table and a picture

With rotary positions and Muon even a short run shows differences. docs/ablations.md has the results.
"""

out_dir = 'out-attention-study'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False

# 32 sequences * 64 characters * 150 iterations = 307,200 tokens, 0.3 epochs
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

# 0.80M parameters
n_layer = 4
n_head = 4
n_embd = 128
pos_emb = 'rope'

optimizer = 'muon'
muon_lr = 0.04
learning_rate = 6e-3
weight_decay = 0.0
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 10
max_iters = 150
lr_decay_iters = 150

eval_interval = 50
eval_iters = 14  # 14 batches * 32 sequences * 64 characters: a quarter of the validation split
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 0
