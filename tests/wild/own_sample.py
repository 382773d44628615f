"""Somebody's own sampling script, in the style of those built on nanoGPT."""
import os
import pickle

import torch

from model import GPT, GPTConfig

THIS_DIR = os.path.dirname(os.path.abspath(__file__))
out_dir = 'out'
start = '\n'
max_new_tokens = 5
top_k = 200
device = 'cpu'
exec(open(os.path.join(THIS_DIR, 'configurator.py')).read())  # works from any folder

checkpoint = torch.load(os.path.join(out_dir, 'ckpt.pt'), map_location=device)
model = GPT(GPTConfig(**checkpoint['model_args']))
model.load_state_dict(checkpoint['model'])
with open(os.path.join(THIS_DIR, 'data', checkpoint['config']['dataset'], 'meta.pkl'), 'rb') as f:
    meta = pickle.load(f)
x = torch.tensor([[meta['stoi'][c] for c in start]])
y = model.generate(x, max_new_tokens, top_k=top_k)
print(repr(''.join(meta['itos'][i] for i in y[0].tolist())))
