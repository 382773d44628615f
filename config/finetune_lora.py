"""
Fine-tune GPT-2 on Shakespeare in little memory: only low-rank adapters (LoRA) are trained.

    python data/shakespeare/prepare.py
    python train.py config/finetune_lora.py
    python train.py config/finetune_lora.py --init_from=gpt2-xl --activation_checkpointing=True
    python sample.py --out_dir=out-lora

Beside GPT-2 medium's 355M weights 3.1M are trained, beside XL's 1558M 9.8M. Measured on a CPU, in float32,
with random weights of the 124M size, block_size 256 and a batch of 1, one run each; the settings below were
not tuned:

                                          all weights    lora_rank=8
    gradient and AdamW's moments (exact)     1,486 MB          14 MB
    largest memory of the process            2,826 MB       1,524 MB, while the weights are read
    latest.pt                                1,486 MB         850 MB
"""

out_dir = 'out-lora'
init_from = 'gpt2-medium'
dataset = 'shakespeare'

lora_rank = 8
lora_alpha = 32.0

# 1 sequence * 8 micro-steps * 1024 tokens = 8,192 an iteration; 301,966 tokens, so 37 iterations an epoch
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 80

learning_rate = 2e-4  # this, the decay and the alpha are Hu et al.'s (2021) for GPT-2 medium
lr_schedule = 'linear'
warmup_iters = 8
lr_decay_iters = 80
min_lr = 0.0
weight_decay = 0.01

eval_interval = 10
eval_iters = 40
always_save_checkpoint = False  # keep the best
ckpt_with_optimizer = False  # a model to sample from and to share; latest.pt is there to go on from

wandb_project = 'shakespeare'
wandb_run_name = 'ft-lora'
