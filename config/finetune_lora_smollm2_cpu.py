"""
Fine-tune SmolLM2 (135M) on Shakespeare on a CPU: only low-rank adapters (LoRA) are trained.
"""

out_dir = 'out-smollm2-lora'
init_from = 'HuggingFaceTB/SmolLM2-135M'
dataset = 'shakespeare_smollm2'

device = 'cpu'
compile = False

lora_rank = 8
lora_alpha = 32.0

# 1 sequence * 256 tokens = 256 an iteration
batch_size = 1
gradient_accumulation_steps = 1
block_size = 256
max_iters = 100

learning_rate = 1e-3
lr_schedule = 'linear'
warmup_iters = 5
lr_decay_iters = 100
min_lr = 0.0
weight_decay = 0.0

eval_interval = 50
eval_iters = 32
always_save_checkpoint = False
ckpt_with_optimizer = False
log_interval = 5
