"""
GPT-2 (124M) on OpenWebText.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

For one node of 8 GPUs with 40 GB. nanoGPT reports a loss of about 2.85 after about 4 days on 8 A100 40GB.
With fewer GPUs, lower --nproc_per_node: the losses stay the same, and the run takes longer.
"""

# 12 sequences * 1024 tokens * 40 micro-steps = 491,520 tokens an iteration. GPUs of 80 GB and more are faster
# with --batch_size=60 --gradient_accumulation_steps=8, the same batch
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # a multiple of the number of GPUs

# 491,520 * 600,000 iterations = 295 billion tokens, 33 times the data
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
