"""model.py's GPT-2: against transformers, and the interface that people's code uses. Its formulas,
and those of every option, are tested in test_options.py."""

import math

import pytest
import torch
from conftest import scrambled, tiny, tokens
from torch.nn import functional as F

from model import GPT, GPTConfig


def transformers_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = {'vocab_size': 64, 'n_positions': 32, 'n_embd': 32, 'n_layer': 2, 'n_head': 2,
             'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    return scrambled(GPT2LMHeadModel(GPT2Config(**sizes | changes)))


@pytest.mark.parametrize('changes, options', [
    ({}, ('gelu_tanh', True)), ({'activation_function': 'gelu'}, ('gelu', True)),
    ({'tie_word_embeddings': False}, ('gelu_tanh', False))])
def test_weights_of_transformers_give_its_logits_and_its_losses_over_ten_steps(
        changes, options, tmp_path):
    theirs = transformers_gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert (ours.config.activation, ours.config.tie_weights) == options
    idx = tokens(4, 32)
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)
    opt = ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    groups = [{'params': [p for p in theirs.parameters() if (p.dim() >= 2) == is_matrix],
               'weight_decay': 0.1 * is_matrix} for is_matrix in (True, False)]
    their_opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(10):
        idx, values = tokens(4, 33), []
        their_loss = F.cross_entropy(theirs(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())
        for loss, each in ((ours(idx[:, :-1], idx[:, 1:])[1], opt), (their_loss, their_opt)):
            each.zero_grad()
            loss.backward()
            each.step()
            values.append(loss.item())
        assert abs(values[0] - values[1]) < 1e-4


@pytest.mark.parametrize('changes', [
    {'scale_attn_weights': False}, {'layer_norm_epsilon': 1e-6}, {'activation_function': 'relu'}])
def test_weights_of_another_architecture_are_refused(changes, tmp_path):
    transformers_gpt2(**changes).save_pretrained(tmp_path)
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        GPT.from_pretrained(str(tmp_path))


def test_tensor_names_and_shapes_are_the_contract():
    model, h = tiny(n_layer=1), 'transformer.h.0'
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        'transformer.wte.weight': (64, 32), 'transformer.wpe.weight': (32, 32),
        f'{h}.ln_1.weight': (32,), f'{h}.ln_1.bias': (32,),
        f'{h}.ln_2.weight': (32,), f'{h}.ln_2.bias': (32,),
        f'{h}.attn.c_attn.weight': (96, 32), f'{h}.attn.c_attn.bias': (96,),
        f'{h}.attn.c_proj.weight': (32, 32), f'{h}.attn.c_proj.bias': (32,),
        f'{h}.mlp.c_fc.weight': (128, 32), f'{h}.mlp.c_fc.bias': (128,),
        f'{h}.mlp.c_proj.weight': (32, 128), f'{h}.mlp.c_proj.bias': (32,),
        'transformer.ln_f.weight': (32,), 'transformer.ln_f.bias': (32,),
        'lm_head.weight': (64, 32)}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_cropping_the_block_size_keeps_the_short_windows():
    model, idx = scrambled(tiny()), tokens(2, 16)
    before = model(idx, idx)[0]
    model.crop_block_size(16)
    assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 16 and model.transformer.wpe.weight.shape == (16, 32)
    assert model.transformer.wpe.weight.requires_grad and model.generate(idx, 3).shape == (2, 19)
    with pytest.raises(AssertionError, match='17 positions, but block_size is 16'):
        model(tokens(1, 17))


def test_numbers_of_parameters_and_of_flops():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124439808
    assert model.get_num_params() == 124439808 - 1024 * 768
    flops = 6 * model.get_num_params() + 12 * 12 * 768 * 1024  # of a token
    assert math.isclose(model.estimate_mfu(8, 2.0), flops * 1024 * 8 / 2.0 / 312e12)
    model.requires_grad_(False)
    frozen = 4 * model.get_num_params() + 12 * 12 * 768 * 1024
    assert math.isclose(model.estimate_mfu(1, 1.0), frozen * 1024 / 312e12)


def test_generation_can_be_seeded_and_takes_any_temperature():
    model, idx = scrambled(tiny(), 0.3).eval(), tokens(1, 4)
    many, greedy = idx.repeat(4000, 1), model.generate(idx, 9, temperature=0)
    for temperature in (0.5, 2.0):
        torch.manual_seed(1)
        drawn = model.generate(many, 1, temperature)
        torch.manual_seed(1)
        assert torch.equal(model.generate(many, 1, temperature), drawn)
        p = (model(idx)[0][0, 0] / temperature).softmax(dim=0)
        assert (drawn[:, -1].bincount(minlength=64) / 4000 - p).abs().max() < 0.03
    for options in ({'top_k': 1}, {'temperature': 1e-4}):
        assert torch.equal(model.generate(idx, 9, **options), greedy)
