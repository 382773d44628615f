"""
The loss of OpenAI's gpt2 (124M) on OpenWebText: published as 3.11 (train) and 3.12 (validation).

    python data/openwebtext/prepare.py
    python train.py eval_gpt2
"""

init_from = 'gpt2'
eval_only = True
batch_size = 8
eval_iters = 500  # 500 batches * 8 sequences * 1024 tokens = 4,096,000 tokens of each split
wandb_log = False
