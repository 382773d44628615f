"""Somebody's own benchmark, which reads its settings in the main block."""
import time

import torch

from model import GPT, GPTConfig

batch_size = 12
real_data = True
bias = False
seed = 1337
profile = False

if __name__ == '__main__':
    exec(open('configurator.py').read())
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32, bias=bias))
    x = torch.randint(64, (batch_size, 16))
    t0 = time.time()
    _, loss = model(x, x)
    loss.backward()
    print(f'{batch_size} {real_data} {profile}: time per iteration: {(time.time() - t0) * 1000:.4f}ms')
