"""model.py: the mathematics against other implementations and against itself."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from model import GPT, GPTConfig
from support.training.loss import LinearCrossEntropy, lean_loss
from support.training.state import config_from_args, model_args


def tiny(**changes):
    return GPT(GPTConfig(**(TINY | changes)))


def tokens(*shape):
    return torch.randint(TINY['vocab_size'], shape)


def transformers_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = {'vocab_size': 64, 'n_positions': 32, 'n_embd': 32, 'n_layer': 2, 'n_head': 2,
             'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes)))


def test_logits_equal_a_plain_implementation():
    """GPT-2 once more, written with einsum and an explicit mask."""
    model = tiny(bias=True).double().eval()
    w = model.state_dict()
    idx = tokens(3, 20)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return torch.einsum('btc,oc->bto', x, w[f'{name}.weight']) + w[f'{name}.bias']

    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:20]
    for i in range(2):
        h = f'transformer.h.{i}'
        q, k, v = linear(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn').split(32, dim=-1)
        heads = []
        for s in (slice(0, 16), slice(16, 32)):
            scores = torch.einsum('btd,bsd->bts', q[..., s], k[..., s]) / math.sqrt(16)
            scores[:, torch.ones(20, 20).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ v[..., s])
        x = x + linear(torch.cat(heads, -1), f'{h}.attn.c_proj')
        inner = linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), f'{h}.mlp.c_proj')
    expected = norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T
    logits, _ = model(idx, idx)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_logits_equal_transformers_on_a_full_size_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.get_num_params(non_embedding=False) == 124439808
    idx = torch.randint(50257, (2, 100))
    with torch.no_grad():
        difference = (ours(idx, idx)[0] - theirs(idx).logits).abs().max().item()
    assert difference < 1e-4


@pytest.mark.parametrize('activation', ['gelu', 'gelu_new'])
def test_twenty_adamw_steps_equal_transformers(tmp_path, activation):
    theirs = transformers_gpt2(activation_function=activation)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert ours.config.activation == {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}[activation]
    optimizer = ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(20):
        idx = tokens(4, 33)
        _, loss = ours(idx[:, :-1], idx[:, 1:])
        logits = theirs(idx[:, :-1]).logits
        their_loss = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        for value, opt in ((loss, optimizer), (their_loss, their_optimizer)):
            opt.zero_grad()
            value.backward()
            opt.step()
        assert abs(loss.item() - their_loss.item()) < 1e-4


@pytest.mark.parametrize('change', [
    {'scale_attn_by_inverse_layer_idx': True}, {'scale_attn_weights': False}, {'layer_norm_epsilon': 1e-6},
    {'n_inner': 64}, {'activation_function': 'relu'}])
def test_weights_of_another_architecture_are_refused(tmp_path, change):
    transformers_gpt2(**change).save_pretrained(tmp_path)
    (name, value), = change.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        GPT.from_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json'):
        GPT.from_pretrained(str(tmp_path))


def test_no_position_sees_a_later_one():
    model = tiny().eval()
    idx = tokens(2, 24)
    changed = idx.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 64
    before, after = model(idx, idx)[0], model(changed, changed)[0]
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_without_targets_the_last_position_is_given():
    model = tiny().eval()
    idx = tokens(2, 10)
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 64) and loss is None
    torch.testing.assert_close(logits[:, 0], model(idx, idx)[0][:, -1])


@pytest.mark.parametrize('bias', [True, False])
def test_decoding_products_equal_training_products(bias):
    model = tiny(bias=bias).eval()
    idx = tokens(3, 7)
    with_gradients, _ = model(idx)
    with torch.no_grad():
        without, _ = model(idx)
    torch.testing.assert_close(without, with_gradients.detach(), rtol=0, atol=1e-6)


def test_targets_of_minus_one_do_not_count():
    model = tiny().eval()
    idx, targets = tokens(2, 10), tokens(2, 10)
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))


@pytest.mark.parametrize('chunk', [1, 100, 1 << 24])
def test_loss_without_logits_equals_the_loss_with_them(monkeypatch, chunk):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', chunk)
    model = tiny().double()
    idx, targets = tokens(3, 11), tokens(3, 11)
    targets[0, 5:] = -1
    results = []
    for context in (nullcontext(), lean_loss(model)):
        with context:
            logits, loss = model(idx, targets)
        assert (logits is None) == (len(results) == 1)
        (loss * 7).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with torch.no_grad(), lean_loss(model):
        torch.testing.assert_close(model(idx, targets)[1], loss.detach())
    assert model(idx, targets)[0] is not None


@pytest.mark.parametrize('chunk', [100, 1 << 24])
def test_loss_without_logits_under_autocast_equals_the_loss_with_them(monkeypatch, chunk):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', chunk)
    model, idx, targets = tiny(), tokens(3, 11), tokens(3, 11)
    gradients = []
    for context in (nullcontext(), lean_loss(model)):
        with torch.autocast('cpu', torch.bfloat16), context:
            loss = model(idx, targets)[1]
        loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.01 * gradients[0].abs().max().item())


def test_initial_weights_have_the_stated_spread():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            std = 0.02 / math.sqrt(8) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name
            assert abs(p.mean().item()) < std / 20, name
        else:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name


def test_tensor_names_and_shapes_are_the_contract():
    model = tiny(n_layer=1, bias=True)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    h = 'transformer.h.0'
    assert shapes == {
        'transformer.wte.weight': (64, 32), 'transformer.wpe.weight': (32, 32),
        f'{h}.ln_1.weight': (32,), f'{h}.ln_1.bias': (32,),
        f'{h}.ln_2.weight': (32,), f'{h}.ln_2.bias': (32,),
        f'{h}.attn.c_attn.weight': (96, 32), f'{h}.attn.c_attn.bias': (96,),
        f'{h}.attn.c_proj.weight': (32, 32), f'{h}.attn.c_proj.bias': (32,),
        f'{h}.mlp.c_fc.weight': (128, 32), f'{h}.mlp.c_fc.bias': (128,),
        f'{h}.mlp.c_proj.weight': (32, 128), f'{h}.mlp.c_proj.bias': (32,),
        'transformer.ln_f.weight': (32,), 'transformer.ln_f.bias': (32,), 'lm_head.weight': (64, 32)}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(name.endswith('bias') for name in tiny(bias=False).state_dict())


def test_model_args_are_seven_until_an_option_leaves_its_default():
    seven = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert set(model_args(GPTConfig())) == seven
    args = model_args(GPTConfig(activation='gelu_tanh'))
    assert set(args) == seven | {'activation'}
    assert config_from_args(args) == GPTConfig(activation='gelu_tanh')
    with pytest.raises(ValueError, match='flux'):
        config_from_args(args | {'flux': 1})


@pytest.mark.parametrize('wrong', [{'n_embd': 30, 'n_head': 4}, {'n_layer': 0}, {'dropout': 1.0},
                                   {'activation': 'gleu'}, {'vocab_size': -5}])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**wrong)


def test_matrices_are_decayed_and_vectors_are_not_in_order():
    model = tiny(bias=True)
    decayed, others = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    params = list(model.parameters())
    assert [id(p) for p in decayed['params']] == [id(p) for p in params if p.dim() >= 2]
    assert [id(p) for p in others['params']] == [id(p) for p in params if p.dim() < 2]
    assert (decayed['weight_decay'], others['weight_decay']) == (0.1, 0.0)
    assert decayed['betas'] == (0.9, 0.95) and decayed['lr'] == 1e-3


def test_cropping_the_block_size_keeps_the_short_windows():
    model = tiny().eval()
    idx = tokens(2, 16)
    before = model(idx, idx)[0]
    model.crop_block_size(16)
    assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 16 and model.transformer.wpe.weight.requires_grad
    with pytest.raises(AssertionError):
        model(tokens(1, 17))


def test_number_of_parameters_and_flops():
    gpt2 = GPTConfig(vocab_size=50257)
    with torch.device('meta'):
        model = GPT(gpt2)
    assert model.get_num_params() == 124439808 - 1024 * 768
    flops = 6 * model.get_num_params() + 12 * 12 * 12 * 64 * 1024
    assert math.isclose(model.estimate_mfu(8, 2.0), flops * 1024 * 8 / 2.0 / 312e12)
    assert math.isclose(model.estimate_mfu(8, 2.0, peak_flops=1e12), flops * 1024 * 8 / 2.0 / 1e12)
