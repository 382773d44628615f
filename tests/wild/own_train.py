"""Somebody's own training script, in the style of those built on nanoGPT."""
import math
import os
import pickle

import numpy as np
import torch

from model import GPT, GPTConfig

out_dir = 'out'
dataset = 'tiny'
batch_size = 4
block_size = 16
n_embd = 32
re = 1.0  # named like a module
N_BEST = 3
betas = (0.9, 0.95)
probe = None
learning_rate: float = 1e-3
max_iters = 3
before = set(globals())
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open('configurator.py').read())  # overrides from command line or config file
config = {k: globals()[k] for k in config_keys}  # will be useful for logging
new = set(globals()) - before - {'before', 'config_keys', 'config'}
print('new names:', sorted(k for k in new if k[0] != '_'))
print('config:', config)
print('more:', betas, probe, math.pi)

data = np.memmap(os.path.join('data', dataset, 'train.bin'), dtype=np.uint16, mode='r')
vocab_size = pickle.load(open(os.path.join('data', dataset, 'meta.pkl'), 'rb'))['vocab_size']
model_args = dict(n_layer=1, n_head=2, n_embd=n_embd, block_size=block_size,
                  bias=False, vocab_size=vocab_size, dropout=0.0)
model = GPT(GPTConfig(**model_args))
optimizer = model.configure_optimizers(0.1, learning_rate, betas, 'cpu')
for iter_num in range(max_iters):
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x, y = (torch.stack([torch.from_numpy(data[i + d:i + d + block_size].astype(np.int64)) for i in ix])
            for d in (0, 1))
    logits, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
os.makedirs(out_dir, exist_ok=True)
torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model_args,
            'iter_num': max_iters, 'best_val_loss': loss.detach(), 'config': config},
           os.path.join(out_dir, 'ckpt.pt'))
