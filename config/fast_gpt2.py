"""
A GPT of GPT-2's size (124M) on FineWeb, with what the field has learned since.

    python data/fineweb/prepare.py --shards=18    # the recipe's own files, 1.8 billion tokens
    torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py

After modded-nanogpt's track 3 baseline (records/track_3_optimization/train_gpt_simple.py): Muon, rotary
positions, query-key norm, squared ReLU, heads of 128 channels. It reports a validation loss of 3.28
after 3250 steps of 524,288 tokens, 503 s on 8 H100. Written for one node of 8 GPUs of 80 GB; neither
its time nor its loss has been measured here yet.

What still differs from that recipe:

    part                here                            there
    cap of the logits   15 tanh(x / 15)                 15 x / sqrt(x^2 + 15^2)
    rotary positions    all channels, base 10,000       half of them, base 1024 (docs/ablations.md)
    output layer        no bias                         a bias
    vectors             not decayed                     weight decay 0.001
    momentum of Muon    0.85, 0.95 after 300 steps      0.95
    embedding           float32                         bfloat16
    epsilon of norms    1e-5                            PyTorch's for bfloat16
    gradients           of the mean loss                of the sum, which AdamW's epsilon hardly meets
    training data       windows from anywhere           the files from their beginning
    validation          windows spread over the file    its first 10.5 million tokens

What may gain beyond it, each a setting: --value_residual, --x0_residual, --normuon, --cautious_decay.
"""

dataset = 'fineweb'

# 64 sequences * 1024 tokens * 8 micro-steps = 524,288 tokens an iteration: one micro-step on each of 8 GPUs.
# GPUs of 40 GB: --batch_size=16 --gradient_accumulation_steps=32 makes the same batch
batch_size = 64
block_size = 1024
gradient_accumulation_steps = 8  # a multiple of the number of GPUs

# 162M parameters, 38.6M of them in an output layer of its own
n_head = 6
bias = True
pos_emb = 'rope'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
attn_scale = 0.12  # 1 / sqrt(128) is 0.088
embd_norm = True
logit_softcap = 15.0
tie_weights = False
init = 'zero_proj'
init_gain = 3 ** -0.5  # PyTorch's own spread of a linear layer
zero_head = True

optimizer = 'muon'
muon_lr = 0.025
newton_schulz = 'exact'
embedding_lr = 0.7  # of an embedding of initial deviation 1
learning_rate = 4e-3  # of the output layer
scalar_lr = 0.015
weight_decay = 0.05  # of Muon's matrices
adam_weight_decay = 0.001
beta1 = 0.8
beta2 = 0.95
adam_eps = 1e-10
grad_clip = 0.0

lr_schedule = 'wsd'
wsd_decay = 0.7
min_lr = 0.0
warmup_iters = 0
max_iters = 3250  # 524,288 * 3250 = 1.7 billion tokens
lr_decay_iters = 3250

eval_interval = 125
eval_iters = 160  # 64 * 1024 * 160 = 10.5 million tokens
log_interval = 10

out_dir = 'out-fast-gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'fast-gpt2-124M'
