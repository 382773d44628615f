"""
Fine-tune any GPT-2 on your own text.

    python data/text/prepare.py my_text.txt --name=my_text --tokenizer=gpt2
    python train.py config/finetune_gpt2.py --data_dir=data/my_text
    python train.py config/finetune_gpt2.py --init_from=gpt2-xl --data_dir=data/my_custom_data
    python sample.py --out_dir=out-finetune

init_from: gpt2 (124M), gpt2-medium (350M), gpt2-large (774M), gpt2-xl (1558M), or a folder with weights.
config/finetune_shakespeare.py says where the size of the batch comes from.
"""

out_dir = 'out-finetune'
init_from = 'gpt2'
dataset = 'shakespeare'

# 1 sequence * 8 micro-steps * 1024 tokens = 8,192 an iteration
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 800

learning_rate = 3e-5
decay_lr = False

eval_interval = 40
eval_iters = 40
always_save_checkpoint = False

wandb_project = 'finetune'
wandb_run_name = 'finetune-gpt2'
