"""
A smaller GPT that writes Shakespeare character by character, for two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_cpu.py
    python sample.py --out_dir=out-shakespeare-char

On two cores of an AMD EPYC 45 to 53 seconds (Zen 5) or 95 seconds (Zen 4). The last evaluation in
the log is 1.88, over 240 windows. Over the whole validation split the loss is 1.90 (eval.py); seeds
differ by about 0.01.
"""

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False  # it would take longer than it saves

# 12 sequences * 64 characters = 768 an iteration
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

# 0.80M parameters
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # 2000 iterations see the text one and a half times

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 1
always_save_checkpoint = False

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'
