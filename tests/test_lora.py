"""lora.py: adapters alone are trained, and what is saved needs no knowledge of them."""

import numpy as np
import pytest
import torch
from conftest import evaluations, losses, save_model, scrambled, tiny, tokens
from runs import differences

from model import GPT, GPTConfig
from support.training import lora
from support.training.loss import ChunkedLoss
from support.training.state import State

LORA = ('--lora_rank=4', '--lora_alpha=8', '--learning_rate=1e-2', '--max_iters=12',
        '--eval_interval=6', '--lr_decay_iters=12', '--dropout=0.2')
ADAPTED = [f'transformer.h.{i}.{name}' for i in range(2)
           for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]


@pytest.fixture
def base(char_data, tmp_path):
    """--init_from of a folder with a model to adapt."""
    model = scrambled(tiny(vocab_size=21, block_size=16, bias=False), 0.1)
    return f'--init_from={save_model(tmp_path / "base", model, char_data)}'


@pytest.mark.parametrize('options', [{}, {'bias': False, 'n_kv_head': 1, 'activation': 'swiglu',
                                          'tie_weights': False, 'pos_emb': 'rope'}])
def test_adapted_model_is_the_plain_one_with_merged_weights_also_in_its_gradients(options):
    model, idx = scrambled(tiny(**options)), tokens(4, 32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(idx, idx)[0]
    lora.add_adapters(model, 0, 6.0)  # which changes nothing
    assert [*model.state_dict()] == [*before] and all(p.requires_grad for p in model.parameters())
    lora.add_adapters(model, 4, 6.0)
    assert torch.equal(model(idx, idx)[0], expected)  # it begins as the one it was
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [*adapters] == [f'{name}.lora_{letter}' for name in ADAPTED for letter in 'AB']
    scrambled(model)
    with torch.no_grad():  # which leaves the frozen weights as they were
        for name, p in model.named_parameters():
            p.copy_(before.get(name, p))
    merged = {f'{name}.weight': before[f'{name}.weight'] + 6 / 4 * adapters[f'{name}.lora_B']
              @ adapters[f'{name}.lora_A'] for name in ADAPTED}
    plain = GPT(model.config)
    own = dict(plain.named_parameters())
    untied = {name: p for name, p in (before | merged).items() if name in own}
    logits, loss = torch.func.functional_call(plain, untied, (idx, idx))
    want = torch.autograd.grad(loss, adapters.values())
    assert (logits - expected).abs().max() > 0.1
    torch.testing.assert_close(model(idx, idx)[0], logits, rtol=0, atol=1e-4)
    for checkpointing, lean in ((False, {}), (True, {}), (False, {'loss': ChunkedLoss(model, 7 * 64)})):
        model.activation_checkpointing = checkpointing
        found = torch.autograd.grad(model(idx, idx, **lean)[1], adapters.values())
        for a, b in zip(found, want):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    state = lora.merged_state_dict(model)
    assert [*state] == [*before]
    for name, p in (before | merged).items():
        torch.testing.assert_close(state[name], p)


@pytest.mark.parametrize('share', [
    lambda h: setattr(h, '1', h[0]), lambda h: setattr(h[1].mlp.c_fc, 'weight', h[0].mlp.c_fc.weight)],
    ids=['block', 'weight'])
def test_a_weight_that_is_used_twice_has_one_adapter(share):
    model, plain, idx = scrambled(tiny()), tiny(), tokens(2, 16)
    for each in (model, plain):
        share(each.transformer.h)
    lora.add_adapters(model, 4, 8.0)
    plain.load_state_dict(lora.merged_state_dict(scrambled(model)))
    torch.testing.assert_close(plain(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=1e-4)


def test_run_trains_adapters_only_saves_a_plain_model_of_the_same_loss_and_resumes(train, base, tmp_path):
    log = train(*LORA, base)['log']
    before, state = State.load(tmp_path / 'base/ckpt.pt'), State.load(tmp_path / 'out/latest.pt')
    adapters = {name for name in state.trained if 'lora' in name}
    for name, p in state.trained.items():
        assert p.any() if name in adapters else torch.equal(p, before.model[name])
    assert len(state.optimizer['state']) == len(adapters) == 16
    assert f'num decayed parameter tensors: 16, with {2 * 4 * 16 * 32:,} parameters' in log
    evaluated = evaluations(log)
    assert evaluated[12][1] < evaluated[0][1] - 0.1
    GPT(GPTConfig(**state.model_args)).load_state_dict(state.model)
    for args in (['resume'], [tmp_path / 'out', '--lora_rank=2']):  # and with adapters that are new
        again = train(f'--init_from={args[0]}', '--eval_only', *args[1:])['log']
        assert [*evaluations(again).values()] == [evaluated[12]]

    parts = tmp_path / 'parts'
    train(*LORA, base, '--max_iters=5', out_dir=parts)
    train(*LORA, '--init_from=resume', out_dir=parts)
    assert {*differences(tmp_path / 'out', parts)} <= {'log.jsonl'}  # which both evaluations are in
    train(base, '--max_iters=1', out_dir=tmp_path / 'plain')
    for folder, args, message in (
            ('parts', ['--lora_rank=0'], 'lora_rank=0, but the run to resume has 4'),
            ('parts', ['--lora_rank=4'], 'lora_alpha=16.0, but the run to resume has 8'),
            ('plain', ['--lora_rank=4'], 'lora_rank=4, but the run to resume has 0')):
        with pytest.raises(ValueError, match=message):
            train(*args, '--init_from=resume', '--max_iters=15', out_dir=tmp_path / folder)


def test_rank_and_alpha_reach_the_adapters(train, base, tmp_path):
    logs = [losses(train(*LORA, base, *more, out_dir=tmp_path / str(i))['log'])
            for i, more in enumerate(((), ('--lora_alpha=80',), ('--lora_rank=2',)))]
    assert len({log[0] for log in logs}) == 1 and len({log[12] for log in logs}) == 3


def test_gpt2_from_a_folder_is_adapted(train, gpt2_folder, tmp_path):
    for split in ('train', 'val'):
        np.random.randint(50257, size=2000).astype(np.uint16).tofile(tmp_path / f'{split}.bin')
    train(f'--init_from={gpt2_folder}', '--lora_rank=4', '--max_iters=2', '--eval_interval=2',
          '--activation_checkpointing=True', data_dir=tmp_path)
    state = State.load(tmp_path / 'out/ckpt.pt')
    assert state.model_args['activation'] == 'gelu_tanh'
    assert 'transformer.h.1.mlp.c_fc.weight' in state.model


GOES_WITH = 'lora_rank=4 goes with optimizer=adamw and parallel=ddp only'
ADAPTS = 'lora_rank=4 adapts a trained model: --init_from=gpt2, or a folder'


@pytest.mark.parametrize('args, message', [
    ('--lora_rank=-1', 'lora_rank=-1 must be at least 0'), ('--init_from=scratch', ADAPTS),
    ('--init_from=auto', ADAPTS), ('--parallel=fsdp', GOES_WITH), ('--optimizer=muon', GOES_WITH)])
def test_settings_that_do_not_go_with_adapters_are_refused(args, message, train, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(*LORA, base, args)
    assert not (tmp_path / 'out').exists()
