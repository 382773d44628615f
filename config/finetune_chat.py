"""
Fine-tune a GPT-2 to answer, on conversations of your own.

    python data/chat/prepare.py my_chats.jsonl --name=my_chats --tokenizer=gpt2
    python train.py config/finetune_chat.py --dataset=my_chats
    python train.py config/finetune_chat.py --dataset=my_chats --lora_rank=8 --learning_rate=2e-4
    python sample.py --out_dir=out-finetune-chat --interactive=True --chat=True

Lower block_size to the longest conversation, which prepare.py prints. Set max_iters to a few
epochs; the run's first lines say how many epochs it makes. We have not timed it.
"""

out_dir = 'out-finetune-chat'
init_from = 'gpt2'
dataset = 'chat'

# 4 windows * 8 micro-steps = 32 an iteration, each full of conversations
pack = True
batch_size = 4
gradient_accumulation_steps = 8
block_size = 512
sampler = 'epoch'
dropout = 0.1

learning_rate = 3e-5
min_lr = 3e-6
warmup_iters = 20
max_iters = 300
lr_decay_iters = 300

eval_interval = 50
eval_iters = 0
always_save_checkpoint = False

wandb_project = 'finetune'
wandb_run_name = 'finetune-chat'
