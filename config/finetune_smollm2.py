"""
Fine-tune SmolLM2 (135M, Apache-2.0) on your own text or on conversations, all weights, on one GPU.

    python data/text/prepare.py my_text.txt --name=my_text --tokenizer=HuggingFaceTB/SmolLM2-135M
    python train.py config/finetune_smollm2.py --dataset=my_text
    python train.py config/finetune_smollm2.py --dataset=my_text --init_from=HuggingFaceTB/SmolLM2-360M
    python sample.py --out_dir=out-smollm2

init_from: any Llama, Mistral, Qwen 2 or GPT-2 of the hub, or a folder (docs/open-models.md).
Weights, gradients and AdamW's moments take 16 bytes a parameter: 2.2 GB for 135M, 5.8 GB for 360M,
27 GB for 1.7B, activations not counted. We have not timed it: no GPU was at hand. On a CPU:
config/finetune_lora_smollm2_cpu.py.
"""

out_dir = 'out-smollm2'
init_from = 'HuggingFaceTB/SmolLM2-135M'
dataset = 'my_text'

# 4 sequences * 8 micro-steps * 1024 tokens = 32,768 an iteration
batch_size = 4
gradient_accumulation_steps = 8
block_size = 1024
sampler = 'epoch'
max_iters = 200

learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 10
lr_decay_iters = 200
weight_decay = 0.01

eval_interval = 20
eval_iters = 20
always_save_checkpoint = False  # keep the best
ckpt_with_optimizer = False

wandb_project = 'finetune'
wandb_run_name = 'smollm2'
