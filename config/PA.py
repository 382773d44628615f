"""
GPT-2 (124M) converted to pointwise attention: gelu(q.k) / length instead of the softmax.

    python data/openwebtext/prepare.py
    python train.py config/PA.py
    python train.py config/PA.py --attn_type=PA_relu --out_dir=out-PA-relu

GPT-2's weights were trained with another attention, so the loss starts high and the run brings it down.
Written for a GPU; not yet timed there.
"""

out_dir = 'out-PA'
init_from = 'gpt2'
attn_type = 'PA_gelu'
dataset = 'openwebtext'

# 8 sequences * 1024 tokens * 40 micro-steps = 327,680 an iteration
batch_size = 8
gradient_accumulation_steps = 40

learning_rate = 6e-4  # that of pretraining: the attention is learned anew
warmup_iters = 100
max_iters = 3000
lr_decay_iters = 3000

eval_interval = 250
eval_iters = 100
log_interval = 10

wandb_project = 'attention'
wandb_run_name = 'gpt2-PA-gelu'
