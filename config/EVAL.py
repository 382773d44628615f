"""
The loss of a trained checkpoint on any data set, with the attention it was trained with or another.

    python train.py config/EVAL.py --out_dir=out-PA
    python train.py config/EVAL.py --out_dir=out-PA --dataset=wikitext        # tinystories, lambada, ptb, ...
    python train.py config/EVAL.py --out_dir=out-PA --attn_type=SM

Writes nothing.
"""

init_from = 'finetune'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 300  # 300 batches * 8 sequences * 1024 tokens = 2,457,600 tokens of each split
wandb_log = False
