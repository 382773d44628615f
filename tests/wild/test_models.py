"""Anybody's model.py instead of ours trains, resumes, evaluates, samples, or is refused in one line."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_ARGS, evaluations, losses

from support.training.state import State

MODELS = {path.stem: path for path in sorted(Path(__file__).parent.glob('models/*.py'))}
each_model = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(scope='module')
def visit(elsewhere, copy_repository, char_data):
    """A function that gives a copy of the repository with a model instead of ours, and a function
    that runs scripts there. Training is on the small data."""
    @functools.cache
    def of(name):
        folder = copy_repository(MODELS[name].read_text(encoding='utf-8'))

        def run(script='', *args, code=''):
            if script == 'train.py':
                args = (*TINY_ARGS, f'--data_dir={char_data}', '--dropout=0.2', *args)
            return elsewhere(folder, *([script] * bool(script)), *args, code=code)
        return run, folder
    return of


def works(reply):
    assert reply.error == '', reply.error
    return reply.output


def numbers(folder):
    """{name: tensor} of a run's weights and of its optimizer's buffers."""
    state = State.load(folder / 'latest.pt')
    return state.model | {
        f'{name} of {i}': torch.as_tensor(t) for i, buffers in state.optimizer['state'].items()
        for name, t in buffers.items()}


@each_model
def test_it_trains_resumes_bit_for_bit_evaluates_and_samples(name, visit, char_data):
    run, folder = visit(name)
    args = ('--max_iters=30', '--eval_interval=10', '--learning_rate=1e-2', '--lr_decay_iters=30')
    log = works(run('train.py', *args, '--out_dir=whole'))
    assert evaluations(log)[30][1] < evaluations(log)[0][1] - 0.3 and len(losses(log)) == 31
    assert 'loss: computed with all logits in memory, as this model.py takes no loss=\n' in log
    works(run('train.py', *args, '--out_dir=parts', '--max_iters=13'))
    resumed = works(run('train.py', *args, '--out_dir=parts', '--init_from=resume'))
    assert 'resuming at iteration 14' in resumed and losses(log).items() >= losses(resumed).items()
    whole, parts = numbers(folder / 'whole'), numbers(folder / 'parts')
    assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)

    lean = works(run('train.py', '--init_from=resume', '--out_dir=whole', '--eval_only',
                     '--eval_iters=0'))
    found = json.loads(works(run('eval.py', '--out_dir=whole', '--device=cpu')).splitlines()[-1])
    (_, val), = evaluations(lean).values()
    assert found['results']['loss']['loss'] == pytest.approx(val, abs=1e-4)
    for args in (('--dtype=float32',), ('--dtype=bfloat16',)):
        out = works(run('sample.py', '--out_dir=whole', '--start=king', '--num_samples=2',
                        '--temperature=0', '--max_new_tokens=30', '--device=cpu', *args))
        texts = re.findall(r'^king(?s:.*?)(?=\n-------)', out, re.M)
        assert texts == 2 * [run(code=GREEDY).result], args


GREEDY = """
import torch
from model import GPT, GPTConfig
saved = torch.load('whole/ckpt.pt')
model = GPT(GPTConfig(**saved['model_args'])).eval()
model.load_state_dict(saved['model'])
itos = saved['tokenizer']['itos']
ids = [next(i for i in itos if itos[i] == c) for c in 'king']
for _ in range(30):
    ids.append(model(torch.tensor([ids[-16:]]))[0].argmax().item())
result = ''.join(itos[i] for i in ids)
"""
BLOCKS = 'transformer.h, which this model.py lacks: '
CHECKPOINTING = 'activation_checkpointing=True needs a model with the attribute activation_'
LACKS = {  # arguments: what plain.py and mixture.py say to them, '' where they work
    ('--optimizer=muon',): ('', f'optimizer=muon is for the matrices in {BLOCKS}'),
    ('--lora_rank=2', '--init_from=base'): (
        '', f'lora_rank=2 adapts the linear layers in {BLOCKS}'),
    ('--parallel=fsdp',): ('', f'parallel=fsdp shards the blocks in {BLOCKS}'),
    ('--activation_checkpointing',): (CHECKPOINTING, CHECKPOINTING),
    ('--embedding_lr=0.1',): ('embedding_lr=0.1 needs an embedding of its own',
                              'embedding_lr=0.1 is for transformer.wte beside lm_head, which '),
    ('--n_wide=8',): ('Unknown config key: n_wide', ''),
}


@each_model
def test_what_ours_offers_beside_it_works_or_is_refused_in_one_line(name, visit):
    run, folder = visit(name)
    args = ('--max_iters=4', '--eval_interval=2', '--sample_interval=2',
            '--gradient_accumulation_steps=2')
    expected = losses(works(run('train.py', *args, '--out_dir=base')))
    for more, answers in LACKS.items():
        answer, reply = answers[name == 'mixture'], run('train.py', *args, '--out_dir=run', *more)
        if answer:
            assert re.fullmatch(f'ValueError: {re.escape(answer)}.*\n', reply.error), reply.error
            continue
        found = losses(works(reply))
        assert [*found] == [0, 1, 2, 3, 4] and all(0 < loss < 20 for loss in found.values())
        if '--parallel=fsdp' in more:
            assert found == pytest.approx(expected, abs=1e-3)
            one, other = numbers(folder / 'base'), numbers(folder / 'run')
            assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one | other)
            for state in (one, other):
                assert state['lm_head.weight'].data_ptr() == state['transformer.wte.weight'].data_ptr()
    if name == 'plain':
        out = works(run('eval.py', '--out_dir=base', '--weights=int8', '--device=cpu'))
        results = json.loads(out.splitlines()[-1])['results']
        assert results['loss']['loss'] == pytest.approx(expected[4], abs=0.1)
