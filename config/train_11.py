"""
One layer, one head, a Gaussian kernel instead of the softmax, on TinyStories.

    python data/tinystories/prepare.py
    python train.py config/train_11.py
    python train.py config/train_11.py --attn_type=SM --out_dir=out-11-SM      # any other type of attention

Written for one GPU; not yet timed there.
"""

out_dir = 'out-11'
dataset = 'tinystories'
attn_type = 'GK'  # SM, GK, GKpoly-n, PA_f: see docs/attention.md

# 12 sequences * 1024 tokens * 40 micro-steps = 491,520 tokens an iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40

# 46.5M parameters, 38.6M of them the embedding
n_layer = 1
n_head = 1
n_embd = 768

max_iters = 10000
lr_decay_iters = 10000
eval_interval = 500
log_interval = 10

wandb_project = 'attention'
wandb_run_name = 'one-layer-GK'
