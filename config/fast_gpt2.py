"""
A GPT of GPT-2's size (124M) on OpenWebText, with what the field has learned since.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py

Muon, rotary positions, query-key norm, value residuals, squared ReLU, heads of 128 channels and a decay to
zero, as in public speed runs, which need a fraction of the tokens of train_gpt2. Written for one node
of 8 GPUs; neither its time nor its loss has been measured yet.
"""

# 16 sequences * 1024 tokens * 32 micro-steps = 524,288 tokens an iteration
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8  # a multiple of the number of GPUs

# 124M parameters
n_head = 6
pos_emb = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
value_residual = True
init = 'zero_proj'

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3  # of the embedding, for the most part
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'wsd'
min_lr = 0.0
warmup_iters = 100
max_iters = 5000  # 524,288 * 5000 = 2.6 billion tokens
lr_decay_iters = 5000

eval_interval = 250
eval_iters = 200
log_interval = 10

out_dir = 'out-fast-gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'fast-gpt2-124M'
