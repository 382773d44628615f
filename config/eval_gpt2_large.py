"""
The loss of OpenAI's gpt2-large (774M) on OpenWebText: published as 2.66 (train) and 2.67 (validation).

    python data/openwebtext/prepare.py
    python train.py eval_gpt2_large
"""

init_from = 'gpt2-large'
eval_only = True
batch_size = 8
eval_iters = 500  # 500 batches * 8 sequences * 1024 tokens = 4,096,000 tokens of each split
wandb_log = False
