"""A line of model.py is edited, and training, evaluation and sampling change as the edited file by
itself says, in float32 and in 16 bits, with adapters, int8 weights and logits in parts."""

import ast
import json
import pickle

import numpy as np
import pytest
from conftest import ROOT

LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN'  # a vocabulary of 40
X_ALONE = '''
def forward(self, x):
    q, k, v = self.c_attn(x).split(x.shape[2], dim=2)
    past = torch.ones(x.shape[1], x.shape[1]).tril()
    return self.c_proj((q @ k.mT * 0.1).sigmoid() * past @ v)
'''


def of_argument(place, keyword, new):
    """An edit of a call's argument, given by its place or its keyword. new: its source; X is what it was."""
    def edit(call):
        if place < len(call.args):
            call.args[place] = expression(new, call.args[place])
        else:
            [argument] = [argument for argument in call.keywords if argument.arg == keyword]
            argument.value = expression(new, argument.value)
        return call
    return edit


def of_call(new):
    return lambda call: expression(new, call)


def expression(source, old):
    return ast.parse(source.replace('X', f'({ast.unparse(old)})'), mode='eval').body


def smoothed(call):
    call.keywords.append(ast.keyword('label_smoothing', ast.Constant(0.5)))
    return call


def taking_x_alone(function):
    return ast.parse(X_ALONE).body[0]


EDITS = {  # name: {what model.py calls or, within a class, defines: the edit of it}
    'nothing': {},
    'label smoothing': {'cross_entropy': smoothed},
    'a loss that is no mean': {'cross_entropy': of_call('X ** 2')},
    'scale of attention': {'scaled_dot_product_attention': of_argument(1, 'key', '0.2 * X')},
    'factor before gelu': {'gelu': of_argument(0, 'input', '3 * X')},
    'norms': {'layer_norm': of_argument(4, 'eps', '0.5'),
              'ln_2': lambda call: call.args[0]},
    'positions': {'wpe': of_argument(0, 'input', '31 - X')},
    'an attention that takes x alone': {'CausalSelfAttention.forward': taking_x_alone},
}


class Editor(ast.NodeTransformer):
    def __init__(self, edits):
        self.edits, self.made, self.place = edits, [], ''

    def visit_ClassDef(self, node):
        self.place = node.name
        return self.generic_visit(node)

    def visit_FunctionDef(self, node):
        return self.edited(f'{self.place}.{node.name}', node)

    def visit_Call(self, node):
        return self.edited(getattr(node.func, 'attr', ''), node)

    def edited(self, name, node):
        node = self.generic_visit(node)
        if name not in self.edits:
            return node
        self.made.append(name)
        return self.edits[name](node)


LOSS_ONLY = ('nothing', 'label smoothing', 'a loss that is no mean')  # sampling stays as it is
WHOLE = 'a loss that is no mean'  # can't be computed in parts
REFERENCE = '''
import torch
from model import GPT, GPTConfig

def batch(split):
    file = bytearray(open(f'{DATA}/{split}.bin', 'rb').read())
    ids = torch.frombuffer(file, dtype=torch.uint16).long()
    return ids[None, :-1], ids[None, 1:]

def scrambled():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model

def train(dtype):
    model, found = scrambled(), []
    opt = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(3):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss, val = (model(*batch(split))[1] for split in ('train', 'val'))
        found.append((loss.item(), val.item()))
        loss.backward()
        opt.step()
        opt.zero_grad()
    return found

@torch.no_grad()
def gap(text):
    """By how many standard deviations another token's logit exceeds that of a text's at most."""
    model, worst = scrambled().eval(), 0.0
    ids = torch.tensor([[LETTERS.index(c) for c in text]])
    for t in range(3, ids.shape[1]):
        logits = model(ids[:, max(0, t - 32):t])[0][0, -1]
        worst = max(worst, (logits.max() - logits[ids[0, t]]).item() / logits.std().item())
    return worst

torch.save({
    'model': scrambled().state_dict(), 'iter_num': 0, 'best_val_loss': 9.0, 'config': {'data_dir': DATA},
    'model_args': {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'bias': True,
                   'vocab_size': 40, 'dropout': 0.0}}, 'base/ckpt.pt')
'''


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Splits of a single window each, so that every batch is the same."""
    folder, generator = tmp_path_factory.mktemp('window'), np.random.default_rng(0)
    for split in ('train', 'val'):
        generator.integers(0, 40, 33).astype(np.uint16).tofile(folder / f'{split}.bin')
    meta = {'vocab_size': 40, 'itos': dict(enumerate(LETTERS))}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture(scope='module')
def visit(elsewhere, copy_repository, data):
    """A function that gives a function, which runs scripts or code beside an edited model.py."""
    def make(edit):
        editor = Editor(EDITS[edit])
        tree = editor.visit(ast.parse((ROOT / 'model.py').read_text(encoding='utf-8')))
        assert editor.made == [*EDITS[edit]]
        folder = copy_repository(ast.unparse(ast.fix_missing_locations(tree)))
        known = f'DATA, LETTERS = {str(data)!r}, {LETTERS!r}\n{REFERENCE}\n'
        (folder / 'base').mkdir()

        def run(*command, code=''):
            found = elsewhere(folder, *command, code=known * (not command) + code)
            assert found.error == '', found.error
            return found if command else found.result
        return run, folder
    return make


@pytest.fixture(scope='module')
def unedited(visit):
    return visit('nothing')[0]


def logged(folder):
    """[(training loss, validation loss)] of a run's iterations, as its evaluations say too."""
    entries = [json.loads(line) for line in (folder / 'run/log.jsonl').read_text().splitlines()]
    evaluated = [(e['train_loss'], e['val_loss']) for e in entries if 'val_loss' in e]
    trained = [e['loss'] for e in entries if 'loss' in e]
    assert [a for a, _ in evaluated] == pytest.approx(trained, rel=1e-4)
    return evaluated


TRAIN = ('train.py', '--init_from=base', '--out_dir=run', '--max_iters=2', '--eval_interval=1',
         '--bias', '--eval_iters=1', '--decay_lr=False', '--learning_rate=1e-2', '--grad_clip=0',
         '--batch_size=4', '--block_size=32', '--gradient_accumulation_steps=2', '--device=cpu',
         '--plot=False')
SAMPLE = ('sample.py', '--out_dir=base', '--start=abc', '--num_samples=2', '--max_new_tokens=45',
          '--json', '--device=cpu')
IN_PARTS = 'import support.training.loss; support.training.loss.CHUNK = 7 * 40'


def texts(run, *args):
    """What sample.py writes, with the prompt, past block_size."""
    lines = run(*SAMPLE, *args).output.splitlines()
    return ['abc' + json.loads(line)['text'] for line in lines if line.startswith('{')]


@pytest.mark.parametrize('edit', EDITS)
def test_edit_acts_in_training_evaluation_and_sampling(edit, visit, unedited, data):
    run, folder = visit(edit)
    exact, in_16_bits = run(code='result = [train(torch.float32), train(torch.bfloat16)]')
    plain = unedited(code='result = train(torch.float32)')
    assert edit == 'nothing' or max(abs(a - b) for a, b in zip(exact[0], plain[0])) > 0.04

    def loss(*args):
        out = run('eval.py', '--out_dir=base', f'--data_dir={data}', '--device=cpu', *args).output
        return json.loads(out.splitlines()[-1])['results']['loss']['loss']
    assert loss() == pytest.approx(exact[0][1], rel=1e-5)
    assert loss('--weights=int8') == pytest.approx(exact[0][1], rel=5e-3)

    for dtype, near, far in (('float32', 1e-3, 0.01), ('bfloat16', 0.08, 0.16)):
        text, _ = texts(run, '--temperature=0', f'--dtype={dtype}')
        assert run(code=f'result = gap({text!r})') < near
        assert edit in LOSS_ONLY or unedited(code=f'result = gap({text!r})') > far

    log = run(*TRAIN, f'--data_dir={data}', code=IN_PARTS).output
    np.testing.assert_allclose(logged(folder), exact, rtol=1e-4)
    assert ('loss: computed with all logits in memory' in log) == (edit == WHOLE)
    run(*TRAIN, f'--data_dir={data}', '--dtype=bfloat16', '--lora_rank=2')
    assert logged(folder)[0] == pytest.approx(in_16_bits[0], rel=1e-4)


def test_nothing_is_put_in_the_place_of_a_module_s_methods():
    """No assignment to an attribute forward, loss or attend, outside constructors."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('support/**/*.py'), *ROOT.glob('scripts/*.py')]:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        made = [f for f in ast.walk(tree) if getattr(f, 'name', '') == '__init__']
        allowed = {node for f in made for node in ast.walk(f)}
        for node in {*ast.walk(tree)} - allowed:
            name = node.attr if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) else ''
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setattr':
                name = getattr(node.args[1], 'value', '')
            assert name not in ('forward', 'loss', 'attend'), f'{path}, line {node.lineno}'
