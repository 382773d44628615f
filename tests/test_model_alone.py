"""model.py copied by itself into an empty folder with only PyTorch importable, and inside a package."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# A finder that hides all third-party packages but torch and what torch imports itself.
ALONE = '''
import sys
from importlib.machinery import PathFinder

class OnlyTorch(PathFinder):
    hidden = {'transformers', 'tiktoken', 'datasets', 'wandb', 'tokenizers', 'safetensors', 'matplotlib',
              'support', 'configurator', 'train'} - set(sys.argv[1].split(','))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] in cls.hidden else super().find_spec(name, path, target)

sys.meta_path = [OnlyTorch if finder is PathFinder else finder for finder in sys.meta_path]
import math
import torch
'''
TRAIN = '''
from model import GPT, GPTConfig, KVCache
OPTIONS = [
    {}, {'bias': False, 'dropout': 0.1}, {'pos_emb': 'rope'}, {'pos_emb': 'alibi'}, {'pos_emb': 'none'},
    {'norm': 'rmsnorm'}, {'activation': 'gelu_tanh'}, {'activation': 'relu2'}, {'activation': 'swiglu'},
    {'qk_norm': True}, {'tie_weights': False}, {'value_residual': True}, {'logit_softcap': 10.0},
    {'n_kv_head': 1}, {'ngram': 3, 'ngram_rows': 256}, {'init': 'zero_proj'},
    {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True, 'value_residual': True,
     'n_kv_head': 1, 'ngram': 3, 'ngram_rows': 256, 'tie_weights': False}]
text = torch.arange(400) % 17
for options in OPTIONS:
    torch.manual_seed(0)
    sizes = {'block_size': 16, 'vocab_size': 20, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}
    model = GPT(GPTConfig(**sizes | options))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    losses = []
    for _ in range(30):
        at = torch.randint(380, (8, 1)) + torch.arange(17)
        loss = model(text[at[:, :-1]], text[at[:, 1:]])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], (options, losses[0], losses[-1])
    model.eval()
    for T in (1, 5, 16, 20):  # shorter than the window, as long, longer
        idx = text[None, :T].repeat(2, 1)
        out, expected = model.generate(idx, 30, temperature=0), idx
        for _ in range(30):
            logits = model(expected[:, -16:])[0][:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(out, expected), (options, T)
    drawn = model.generate(idx, 5, temperature=0.8, top_k=3)
    assert drawn.shape == (2, 25) and torch.equal(drawn[:, :20], idx)
try:
    GPTConfig(attn_type='GK')
except ValueError as error:
    assert 'support/attention.py' in str(error)
else:
    raise AssertionError('attn_type=GK was accepted')
print('trained', len(OPTIONS))
'''


def run_alone(folder, program, *allowed):
    (folder / 'main.py').write_text(ALONE + program)
    return subprocess.run([sys.executable, 'main.py', ','.join(allowed)], cwd=folder, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'alone').mkdir()
    shutil.copy(ROOT / 'model.py', tmp_path / 'alone')
    return tmp_path / 'alone'


def test_it_trains_and_generates_past_block_size_with_gpt2_s_architecture_and_each_option(folder):
    done = run_alone(folder, TRAIN)
    assert done.stdout == 'trained 17\n', done.stderr


def test_it_loads_a_gpt2_with_transformers(folder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    done = run_alone(folder, f'''
from model import GPT
from transformers import GPT2LMHeadModel
folder = {str(tmp_path / 'gpt2')!r}
ours, theirs = GPT.from_pretrained(folder).eval(), GPT2LMHeadModel.from_pretrained(folder).eval()
idx = torch.randint(300, (3, 64))
with torch.no_grad():
    print((ours(idx, idx)[0] - theirs(idx).logits).abs().max().item())
''', 'transformers', 'tokenizers', 'safetensors')
    assert done.returncode == 0 and float(done.stdout) < 1e-4, done.stderr


def test_importing_it_imports_nothing_of_ours(folder):
    done = run_alone(folder, '''
import model
ours = [name for name, m in sys.modules.items() if str(getattr(m, '__file__', '')).startswith(sys.path[0])]
print(*(name for name in ours if 'main__' not in name))
''')
    assert done.stdout == 'model\n', done.stderr


@pytest.mark.parametrize('attn_type', ['SM', 'GK'])
def test_it_works_inside_a_package_whatever_else_has_its_names(attn_type, tmp_path):
    (tmp_path / 'nanoGPT/support/network').mkdir(parents=True)
    shutil.copy(ROOT / 'model.py', tmp_path / 'nanoGPT')
    shutil.copy(ROOT / 'support/attention.py', tmp_path / 'nanoGPT/support/network')
    for name in ('model', 'loss', 'optim', 'decoding', 'support'):
        (tmp_path / f'{name}.py').write_text('raise ImportError("a file of somebody else")')
    (tmp_path / 'main.py').write_text(f'''
import torch
from nanoGPT.model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, attn_type={attn_type!r}))
print(model.generate(torch.zeros(1, 1, dtype=torch.int64), 12).shape)
''')
    done = subprocess.run([sys.executable, 'main.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'torch.Size([1, 13])\n', done.stderr


def test_blocks_can_be_called_by_hand_and_parts_replaced():
    import torch

    from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm
    config = GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32)
    model, idx = GPT(config).eval(), torch.arange(10)[None]
    t = model.transformer
    x = t.drop(t.wte(idx) + t.wpe(torch.arange(10)))
    for block in t.h:
        x = block(x)
    assert torch.equal(model.lm_head(t.ln_f(x)), model(idx, idx)[0])
    for part in (Block(config), CausalSelfAttention(config), MLP(config), LayerNorm(32, bias=True)):
        assert part(x).shape == x.shape
    attn, mlp = t.h[0].attn, t.h[0].mlp
    assert (attn.n_head, attn.n_embd, attn.dropout, attn.flash) == (2, 32, 0.0, True)
    seen = []
    mlp.gelu.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    attn.forward = lambda x: torch.zeros_like(x)
    changed = model(idx, idx)[0]
    assert seen == [(1, 10, 128)] and not torch.equal(changed, model.lm_head(t.ln_f(x)))
    h = model.transformer.h[1]
    torch.manual_seed(1)
    model._init_weights(h.mlp.c_fc)
    assert abs(h.mlp.c_fc.weight.std().item() - 0.02) < 0.001 and not h.mlp.c_fc.bias.any()
