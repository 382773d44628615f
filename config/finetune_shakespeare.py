"""
Fine-tune GPT-2 on Shakespeare.

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py
    python sample.py --out_dir=out-shakespeare

Starts from GPT-2 XL (1558M). If the GPU runs out of memory, use --init_from=gpt2-medium or a
smaller --block_size. Time and loss with GPT-2's weights have not been measured. The batch was
chosen on a CPU, with a model of 5M parameters trained on documentation. After an epoch of
Shakespeare its validation loss was 3.88 with 8,192 tokens an iteration and 4.52 with 32,768
(docs/ablations.md).
"""

import time

out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'

# 1 sequence * 8 micro-steps * 1024 tokens = 8,192 an iteration; 301,966 tokens, so 37 iterations an epoch
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 80

learning_rate = 3e-5  # low and constant: keep what GPT-2 knows
decay_lr = False

eval_interval = 10
eval_iters = 40
always_save_checkpoint = False  # it overfits within a few epochs: keep the best

wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
