"""Somebody's own sampling script, in the style of those built on nanoGPT."""
import os
import pickle

import torch

from model import GPT, GPTConfig

THIS_DIR = os.path.dirname(os.path.abspath(__file__))
out_dir = 'out'
start = '\n'  # or '<|endoftext|>' or etc. Can also specify a file, use as: 'FILE:prompt.txt'
max_new_tokens = 5
temperature = 0.8
top_k = 200
device = 'cpu'
compile = False
exec(open(os.path.join(THIS_DIR, 'configurator.py')).read())  # works from any folder

checkpoint = torch.load(os.path.join(out_dir, 'ckpt.pt'), map_location=device)
model = GPT(GPTConfig(**checkpoint['model_args']))
model.load_state_dict(checkpoint['model'])
with open(os.path.join(THIS_DIR, 'data', checkpoint['config']['dataset'], 'meta.pkl'), 'rb') as f:
    meta = pickle.load(f)
x = torch.tensor([[meta['stoi'][c] for c in start]])
y = model.generate(x, max_new_tokens, temperature=temperature, top_k=top_k)
print(repr(''.join(meta['itos'][i] for i in y[0].tolist())))
print('---------------')
