"""
A small GPT that writes Shakespeare character by character.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py
    python sample.py --out_dir=out-shakespeare-char

For a GPU. An H200 came to a validation loss of 1.461 at iteration 1750, 28 seconds after the first
evaluation. nanoGPT reports 1.4697 in about 3 minutes on an A100. Without a GPU use
train_shakespeare_char_cpu.
"""

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

# 64 sequences * 256 characters = 16,384 an iteration, 61 iterations an epoch
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

# 10.65M parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 5000 iterations see the text 80 times

learning_rate = 1e-3  # a small model trains stably with more than GPT-2's 6e-4
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99  # a longer memory, as an iteration has few tokens

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
