"""model.py by itself in an empty folder with only PyTorch importable, and inside a package."""

import shutil
import subprocess
import sys

from conftest import ROOT

ALONE = '''
import sys
from importlib.machinery import PathFinder

class OnlyTorch(PathFinder):  # hides what isn't PyTorch's
    hidden = ['transformers', 'tiktoken', 'safetensors', 'numpy', 'support', 'configurator', 'train']
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] in cls.hidden else super().find_spec(name, path, target)

sys.meta_path = [OnlyTorch if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from model import GPT, GPTConfig
text = torch.arange(400) % 17
for options in ({}, {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'ngram': 3}):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32, **options))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for i in range(60):
        at = torch.randint(380, (8, 1)) + torch.arange(17)
        loss = model(text[at[:, :-1]], text[at[:, 1:]])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    continued = model.eval().generate(text[None, :5], 30, temperature=0)[0]
    print('trained', loss.item() < 0.5, (continued == text[:35]).all().item())
OnlyTorch.hidden = OnlyTorch.hidden[-3:]
from transformers import GPT2Config, GPT2LMHeadModel
theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4)).eval()
theirs.save_pretrained('gpt2')
ours, idx = GPT.from_pretrained('gpt2').eval(), torch.randint(300, (3, 64))
print('loaded', (ours(idx, idx)[0] - theirs(idx).logits).abs().max().item() < 1e-4)
'''
INSIDE = '''
import torch
from nanoGPT.model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, attn_type='GK'))
print(model.generate(torch.zeros(1, 1, dtype=torch.int64), 12).shape)
'''


def run(folder, program):
    (folder / 'main.py').write_text(program)
    done = subprocess.run([sys.executable, 'main.py'], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_alone_it_trains_generates_and_loads_a_gpt2(tmp_path):
    shutil.copy(ROOT / 'model.py', tmp_path)
    assert run(tmp_path, ALONE) == ['trained True True', 'trained True True', 'loaded True']


def test_it_works_inside_a_package(tmp_path):
    shutil.copytree(ROOT / 'support', tmp_path / 'nanoGPT/support')
    shutil.copy(ROOT / 'model.py', tmp_path / 'nanoGPT')
    assert run(tmp_path, INSIDE) == ['torch.Size([1, 13])']
