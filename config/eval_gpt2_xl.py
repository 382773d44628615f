"""
The loss of OpenAI's gpt2-xl (1558M) on OpenWebText: published as 2.56 (train) and 2.54 (validation).

    python data/openwebtext/prepare.py
    python train.py eval_gpt2_xl
"""

init_from = 'gpt2-xl'
eval_only = True
batch_size = 8
eval_iters = 500  # 500 batches * 8 sequences * 1024 tokens = 4,096,000 tokens of each split
wandb_log = False
