"""
Fine-tune SmolLM2 (135M, Apache-2.0) on a CPU, on your own text: only low-rank adapters (LoRA) are trained.

    python data/text/prepare.py my_text.txt --name=my_text --tokenizer=HuggingFaceTB/SmolLM2-135M
    python train.py config/finetune_lora_smollm2_cpu.py --dataset=my_text
    python sample.py --out_dir=out-smollm2-lora

For conversations, init_from and tokenizer are HuggingFaceTB/SmolLM2-135M-Instruct (docs/open-models.md).
Beside 134.5M weights 2.0M are trained. Measured on tiny Shakespeare with the instruction-tuned model in
float32, over 32 windows of the validation text, on two Zen 4 cores: 2 min 11 s of training, 4 min 28 s with
the three evaluations, 2.0 GB at the peak.

    iteration      validation loss    bits/byte
        0               3.730           1.726
       50               3.363           1.557
      100               3.335           1.544
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
