"""
A GPT of GPT-2's size (124M) on OpenWebText, with what the field has learned since.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py

Muon, rotary positions, query-key norm, value residuals, squared ReLU, heads of 128 channels and a decay to
zero, after modded-nanogpt's track 3 baseline, which reports 3.28 after 3250 steps of 524,288 tokens, 503 s on
8 H100. Written for one node of 8 GPUs; neither its time nor its loss has been measured yet.

What differs from that recipe:
    learning rates   0.04 for the embedding, 10 times that of the output layer and of vectors, the best of a
                     small ablation (docs/ablations.md); there 0.7 for an embedding of initial deviation 1
                     that is then normalised, 0.015 for vectors
    decay            linear from the end of the warm-up on; there over the last 70 %, which gained nothing
    weight decay     0.05 for the embedding and the output layer too; there for Muon's matrices
    rotary positions over all channels of a head; there over half of them, which gained nothing
    value residuals  here, not there
"""

# 16 sequences * 1024 tokens * 32 micro-steps = 524,288 tokens an iteration
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8  # a multiple of the number of GPUs

# 162M parameters, 38.6M of them in an output layer of its own
n_head = 6
pos_emb = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
value_residual = True
tie_weights = False
init = 'zero_proj'

optimizer = 'muon'
muon_lr = 0.025
learning_rate = 4e-3  # of the output layer, as in the recipe, and of vectors
embedding_lr = 4e-2
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 100
max_iters = 3250  # 524,288 * 3250 = 1.7 billion tokens
lr_decay_iters = 3250

eval_interval = 250
eval_iters = 200
log_interval = 10

out_dir = 'out-fast-gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'fast-gpt2-124M'
