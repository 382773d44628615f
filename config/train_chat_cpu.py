"""
Train a small GPT from nothing that answers questions, on a CPU.

    python data/chat/prepare.py                      # or: FILE.jsonl of your own
    python train.py config/train_chat_cpu.py         # half a minute on two cores
    python sample.py --out_dir=out-chat --interactive=True --chat=True

With the example it memorises a hundred conversations about this repository and answers their
questions. docs/chat.md says what to expect of others. The architecture is Llama's, which export.py
writes for transformers.
"""

out_dir = 'out-chat'
dataset = 'chat'
device = 'cpu'
compile = False

# 16 conversations an iteration, each in a window of 128 tokens: 23 epochs of the example
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
sampler = 'epoch'

# 0.6M parameters
n_layer = 2
n_head = 4
n_embd = 128
pos_emb = 'rope'
norm = 'rmsnorm'
activation = 'swiglu'

optimizer = 'muon'
learning_rate = 3e-3
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 10
max_iters = 150
lr_decay_iters = 150

eval_interval = 30
eval_iters = 0
log_interval = 5
