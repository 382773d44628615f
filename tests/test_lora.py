"""lora.py: adapters alone are trained, and what is saved needs no knowledge of them."""

import numpy as np
import pytest
import soak
import torch
from conftest import TINY, evaluations, losses

from model import GPT, GPTConfig
from support.training import lora
from support.training.loss import checkpoint_activations, use_lean_loss
from support.training import checkpoint, plan

LORA = ('--init_from=finetune', '--lora_rank=4', '--lora_alpha=8', '--learning_rate=1e-2', '--max_iters=12',
        '--eval_interval=6', '--lr_decay_iters=12', '--dropout=0.2')
RANK, C, L = 4, TINY['n_embd'], TINY['n_layer']
N_ADAPTERS = L * RANK * (C + 3 * C + C + C + C + 4 * C + 4 * C + C)  # inputs and outputs of four layers


@pytest.fixture
def model():
    return GPT(GPTConfig(**TINY)).eval()


@pytest.fixture
def adapted(model):
    """That model with adapters that are not 0 any more."""
    lora.add_adapters(model, RANK, 8.0)
    for name, p in model.named_parameters():
        if name.endswith('lora_B'):
            p.data.normal_(std=0.1)
    return model


@pytest.fixture
def base(train, tmp_path):
    """A folder with a model to adapt."""
    train('--max_iters=3', '--eval_interval=3', out_dir=tmp_path / 'base')
    return f'--finetune_from={tmp_path / "base"}'


@pytest.fixture(scope='module')
def two_ranks():
    ranks = soak.Ranks(2)
    yield ranks
    ranks.close()


def tokens():
    return torch.randint(TINY['vocab_size'], (4, TINY['block_size']))


# ---------------------------------------------------------------------------- the mathematics

def test_model_begins_as_the_one_it_was(model):
    idx = tokens()
    before, before_without_grad = model(idx, idx)[0], model.generate(idx[:, :4], 8, temperature=0)
    lora.add_adapters(model, RANK, 8.0)
    assert torch.equal(model(idx, idx)[0], before)
    assert torch.equal(model.generate(idx[:, :4], 8, temperature=0), before_without_grad)


def test_adapted_layer_equals_its_definition(model):
    linear, x = model.transformer.h[1].mlp.c_fc, torch.randn(3, 5, C)
    expected = linear(x)
    lora.add_adapters(model, RANK, 6.0)
    torch.nn.init.normal_(linear.lora_B)
    expected = expected + 6 / RANK * (x @ linear.lora_A.T @ linear.lora_B.T)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('options', [{}, {'bias': False, 'n_kv_head': 1, 'activation': 'swiglu',
                                          'tie_weights': False}], ids=['gpt2', 'others'])
def test_plain_model_with_merged_weights_computes_the_same(options):
    model = GPT(GPTConfig(**TINY | options)).eval()
    lora.add_adapters(model, RANK, 8.0)
    unadapted, idx = model(tokens())[0], tokens()
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            torch.nn.init.normal_(linear.lora_B, std=0.1)
    plain = GPT(model.config).eval()
    plain.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(plain(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=2e-6)
    assert (model(idx)[0] - unadapted).abs().max() > 1e-2


def test_merging_leaves_the_model_and_shares_what_has_no_adapter(adapted):
    before = {name: p.clone() for name, p in adapted.state_dict().items()}
    merged = lora.merged_state_dict(adapted)
    assert list(merged) == list(GPT(adapted.config).state_dict())
    assert all(torch.equal(p, before[name]) for name, p in adapted.state_dict().items())
    copied = {name for name, p in adapted.state_dict().items()
              if name in merged and p.data_ptr() != merged[name].data_ptr()}
    assert copied == {f'transformer.h.{i}.{n}.weight' for i in range(L)
                      for n in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}


def test_rank_0_changes_nothing(model):
    before = list(model.state_dict())
    lora.add_adapters(model, 0, 8.0)
    assert list(model.state_dict()) == list(lora.merged_state_dict(model)) == before
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_get_the_same_gradient_from_either_loss_and_with_activation_checkpointing(adapted):
    adapted.train()
    idx, found = tokens(), []
    for attach in (lambda model: None, use_lean_loss, checkpoint_activations):
        attach(adapted)
        adapted(idx, idx)[1].backward()
        found.append({n: p.grad for n, p in adapted.named_parameters()})
        adapted.zero_grad()
    assert all((g is not None) == ('lora' in name) for name, g in found[0].items())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- runs

def test_only_adapters_change_and_have_optimizer_state(train, base, tmp_path):
    script = train(*LORA, base)
    before, state = (checkpoint.load(tmp_path / name) for name in ('base/ckpt.pt', 'out/latest.pt'))
    for name, p in state['trained'].items():
        if 'lora' in name:
            assert p.abs().max() > 0
        else:
            assert torch.equal(p, before['model'][name])
    trained = [p for p in script['model'].parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == N_ADAPTERS
    assert set(script['opt'].state) == set(trained) and len(state['optimizer']['state']) == 16
    assert f'num decayed parameter tensors: 16, with {N_ADAPTERS:,} parameters' in script['log']
    assert evaluations(script['log'])[12] < evaluations(script['log'])[0]


def test_checkpoint_is_a_plain_model_of_the_same_loss(train, base, tmp_path):
    log = train(*LORA, base, '--eval_iters=0')['log']
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    GPT(GPTConfig(**state['model_args'])).load_state_dict(state['model'])
    again = train('--init_from=resume', '--eval_only', '--eval_iters=0')['log']
    assert again.splitlines()[-1] == [line for line in log.splitlines() if line.startswith('step')][-1]
    for start in ('resume', 'finetune'):  # and with adapters that are new
        more = train(f'--init_from={start}', '--lora_rank=2', '--eval_only', '--eval_iters=0')['log']
        assert list(evaluations(more).values()) == list(evaluations(again).values())


def test_two_processes_equal_one_and_each_is_resumed_bit_for_bit(base, two_ranks, train, char_data, tmp_path):
    args = [*LORA, '--dropout=0.0', '--gradient_accumulation_steps=2', base]
    data, two = f'--data_dir={char_data}', f'--out_dir={tmp_path / "two"}'
    replies = two_ranks.train(*args, data, two)
    assert [r.error for r in replies] == [None, None]
    one = train(*args, out_dir=tmp_path / 'one')['log']
    assert losses(one) == pytest.approx(losses(replies[0].output), abs=1e-4)
    states = [checkpoint.load(tmp_path / name / 'latest.pt') for name in ('one', 'two')]
    for name, p in states[0]['trained'].items():
        torch.testing.assert_close(p, states[1]['trained'][name], rtol=0, atol=1e-4)
    parts = f'--out_dir={tmp_path / "parts"}'
    two_ranks.train(*args, data, parts, kind='stop', at=5)
    replies = two_ranks.train(*args, data, parts, '--init_from=auto')
    assert not any(r.error for r in replies) and 'resuming at iteration 6' in replies[0].output
    assert soak.differences(tmp_path / 'two', tmp_path / 'parts') == []


def test_stopped_run_with_dropout_equals_the_uninterrupted_one_bit_for_bit(train, base, tmp_path):
    train(*LORA, base, out_dir=tmp_path / 'whole')
    with soak.Fault(0, kind='stop', at=9)():
        train(*LORA, base, out_dir=tmp_path / 'parts')
    assert checkpoint.load(tmp_path / 'parts/latest.pt')['iter_num'] == 9
    train(*LORA, '--init_from=resume', out_dir=tmp_path / 'parts')
    assert soak.differences(tmp_path / 'whole', tmp_path / 'parts') == []


def test_gpt2_from_a_folder_is_adapted(train, gpt2_folder, tmp_path):
    for split in ('train', 'val'):
        np.random.randint(50257, size=2000).astype(np.uint16).tofile(tmp_path / f'{split}.bin')
    script = train(f'--init_from={gpt2_folder}', '--lora_rank=4', '--max_iters=2', '--eval_interval=2',
                   '--activation_checkpointing=True', data_dir=tmp_path)
    assert plan.n_trained(script['model']) == N_ADAPTERS
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['model_args']['activation'] == 'gelu_tanh'


def test_told_sizes_are_those_of_a_run_with_adapters(train, base, tmp_path):
    script = train(*LORA, base)
    model, size = script['model'], (tmp_path / 'out/latest.pt').stat().st_size
    n_all = model.get_num_params(non_embedding=False)
    frozen = n_all - N_ADAPTERS
    assert plan.checkpoint_bytes(model) == 4 * (frozen + N_ADAPTERS + L * 12 * C * C) + 8 * N_ADAPTERS
    assert plan.checkpoint_bytes(model) < size < plan.checkpoint_bytes(model) + 100_000
    plain = GPT(model.config)
    setup = plan.Setup(1, 4, 2, False, False, False, 4, 0)
    saved = plan.memory_needed(plain, setup) - plan.memory_needed(model, setup)
    assert saved == 12 * frozen - 16 * N_ADAPTERS + plain.lm_head.weight.nbytes  # of its second gradient
    weights, attention = model.get_num_params(), 12 * L * C * model.config.block_size
    assert model.estimate_mfu(1, 1.0, 1e12) * 1e12 == pytest.approx(16 * (4 * weights + attention))


# ---------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('args, message', [
    (('--lora_rank=-1',), 'lora_rank=-1 must be at least 0'),
    (('--init_from=scratch',), 'lora_rank=4 adapts a trained model: --init_from=gpt2'),
    (('--init_from=auto',), 'lora_rank=4 adapts a trained model: --init_from=gpt2'),
    (('--ema_decay=0.9',), 'lora_rank=4 goes with optimizer=adamw, ema_decay=0 and parallel=ddp only'),
    (('--optimizer=muon',), 'lora_rank=4 goes with optimizer=adamw, ema_decay=0 and parallel=ddp only'),
])
def test_settings_that_do_not_go_with_adapters_are_refused(args, message, train, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(*LORA, base, *args)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('before, args, message', [
    (LORA, ('--lora_rank=0',), 'lora_rank=0, but the run to resume has 4'),
    (LORA, ('--lora_rank=8', '--lora_alpha=8'), 'lora_rank=8, but the run to resume has 4'),
    (LORA, ('--lora_rank=4',), 'lora_alpha=16.0, but the run to resume has 8'),
    ((), ('--lora_rank=4',), 'lora_rank=4, but the run to resume has 0'),
])
def test_adapters_of_a_run_stay_as_they_are(before, args, message, train, base):
    train(*before, base, '--max_iters=1')
    with pytest.raises(ValueError, match=message):
        train(*args, '--init_from=resume', '--max_iters=3')
