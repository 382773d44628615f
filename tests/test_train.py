"""train.py: each setting reaches what it changes; what a run logs, saves, starts from and refuses."""

import json
import math
import re
import runpy
import sys
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS, evaluations, losses
from runs import logged

from configurator import configure
from model import GPT, GPTConfig
from support.errors import USER_ERRORS
from support.machine import runtime
from support.text.dataset import Dataset
from support.training import models
from support.training.log import sample_text
from support.training.state import State

LOOP = ('--max_iters=5', '--learning_rate=1e-2', '--min_lr=1e-3', '--lr_decay_iters=5',
        '--eval_interval=100', '--gradient_accumulation_steps=2', '--weight_decay=1.0')


def settings_of(*args):
    """train.py's settings with these arguments."""
    variables = {}
    exec((ROOT / 'train.py').read_text().partition('\nconfig = configure(')[0], variables)
    return configure(variables, GPTConfig, [*TINY_ARGS, *args])


def plain_rate(s, it):
    """Learning rate of an iteration, by the contract's formula."""
    if not s.decay_lr:
        return s.learning_rate
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == 'constant':
        return s.learning_rate
    done = min(1, (it - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters))
    share = {'cosine': (1 + math.cos(math.pi * done)) / 2, 'linear': 1 - done,
             'wsd': min(1, (1 - done) / s.wsd_decay)}[s.lr_schedule]
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def plain_model(folder, settings):
    options = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
    torch.manual_seed(settings['seed'])
    return GPT(GPTConfig(**options, vocab_size=Dataset(folder).vocab_size))


def plain_optimizer(model, s):
    """AdamW as nanoGPT groups the parameters, and a group of the embedding if it has its own rate."""
    apart = [model.transformer.wte.weight] if s.embedding_lr else []
    params = [p for p in model.parameters() if not any(p is q for q in apart)]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': s.weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
              {'params': apart, 'weight_decay': s.weight_decay}]
    return torch.optim.AdamW([g for g in groups if g['params']], betas=(s.beta1, s.beta2), foreach=False)


def plain_loop(folder, settings, model=None, opt=None, first=0):
    """The loss of each iteration of a training loop as nanoGPT has it."""
    s, data, T = SimpleNamespace(**settings), Dataset(folder)['train'], settings['block_size']
    model = model or plain_model(folder, settings)
    opt = opt or plain_optimizer(model, s)
    autocast = torch.autocast('cpu', torch.bfloat16) if s.dtype == 'bfloat16' else nullcontext()
    seen, found = 0, {}
    for it in range(first, s.max_iters + 1):
        n = math.ceil(s.gradient_accumulation_steps * min(1, (it + 1) / (s.batch_ramp_iters + 1)))
        at = seen if s.sampler == 'epoch' else it
        starts = data.train_windows(s.sampler, s.seed, at, n * s.batch_size, T)
        seen += len(starts)
        of_dropout = np.random.SeedSequence((s.seed, 0, it)).generate_state(1, np.uint64)
        torch.manual_seed(int(of_dropout[0]))
        found[it] = 0.0
        for part in starts.reshape(n, -1):
            ids = torch.from_numpy(data.tokens[part[:, None] + np.arange(T + 1)].astype(np.int64))
            with autocast:
                loss = model(ids[:, :-1], ids[:, 1:])[1] / n
            loss.backward()
            found[it] += loss.item()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for p in model.parameters():
            p.grad *= s.grad_clip / max(s.grad_clip, norm) if s.grad_clip else 1
        for i, group in enumerate(opt.param_groups):
            share = s.embedding_lr / s.learning_rate if s.embedding_lr and i == 2 else 1
            group['lr'] = plain_rate(s, it) * share
        opt.step()
        opt.zero_grad()
    return found


IN_THE_LOOP = [  # the last one is what the row is about, those before it are its context
    '--learning_rate=3e-3', '--min_lr=5e-3', '--warmup_iters=4', '--warmup_iters=0',
    '--lr_decay_iters=3', '--decay_lr=False', '--lr_schedule=linear', '--lr_schedule=wsd',
    '--lr_schedule=wsd --wsd_decay=0.7',
    '--lr_schedule=constant', '--weight_decay=9',
    '--beta1=0.5', '--beta2=0.5', '--grad_clip=1.5', '--grad_clip=0', '--seed=7', '--dropout=0.3',
    '--gradient_accumulation_steps=3', '--batch_size=3', '--block_size=8', '--sampler=epoch',
    '--gradient_accumulation_steps=3 --batch_ramp_iters=3',
    '--gradient_accumulation_steps=3 --batch_ramp_iters=3 --sampler=epoch',
    '--dtype=bfloat16', '--tie_weights=False --embedding_lr=0.1', '--n_layer=1', '--bias=True',
    '--activation=swiglu', '--pos_emb=rope', '--value_residual=True', '--init=zero_proj', '--attn_type=GK',
]


@pytest.mark.parametrize('args', ['', *IN_THE_LOOP])
def test_run_computes_what_a_plain_loop_does_and_each_setting_matters(args, train, char_data, tmp_path):
    args = args.split()
    train(*LOOP, *args)
    found, rates = logged(tmp_path / 'out'), logged(tmp_path / 'out', 'lr')
    settings = SimpleNamespace(**settings_of(*LOOP, *args))
    assert rates == pytest.approx({i: plain_rate(settings, i) for i in range(6)})
    rounding = 1e-3 if '--dtype=bfloat16' in args else 1e-5
    assert found == pytest.approx(plain_loop(char_data, vars(settings)), abs=rounding)
    without = plain_loop(char_data, settings_of(*LOOP, *args[:-1]))
    assert not args or found != pytest.approx(without, abs=5e-5)


def test_muon_turns_each_matrix_of_a_block_by_muon_lr_and_adamw_the_rest(train, char_data, tmp_path):
    """After one update, at a third of the rates: an orthogonal matrix, of about ones as singular values."""
    args = (*LOOP, '--optimizer=muon', '--muon_lr=0.6', '--weight_decay=0', '--grad_clip=0')
    script = train(*args, '--max_iters=0')
    before = plain_model(char_data, settings_of(*args)).state_dict()
    for name, p in script['model'].named_parameters():
        change = (before[name] - p).detach()
        if p.dim() == 2 and '.h.' in name:
            for part in change.split(32) if 'c_attn' in name else [change]:
                sizes = torch.linalg.svdvals(part / 0.2) / max(1, part.shape[0] / part.shape[1]) ** 0.5
                assert 0.5 < sizes.median() < 1.3 and sizes.max() < 1.3, name
        else:
            assert change.abs().median() == pytest.approx(1e-2 / 3, rel=1e-2), name


@pytest.mark.parametrize('eval_iters', [3, 0])
def test_evaluation_is_the_mean_over_windows_spread_evenly(eval_iters, train, char_data, tmp_path):
    """eval_iters batches of them, or all: of the model before the first update."""
    train('--max_iters=0', f'--eval_iters={eval_iters}')
    model = plain_model(char_data, settings_of())
    for split in ('train', 'val'):
        tokens = torch.from_numpy(Dataset(char_data)[split][:].astype(np.int64))
        n = math.ceil((len(tokens) - 1) / 16)
        count = eval_iters * 4 or n
        windows = [tokens[i * n // count * 16:][:17] for i in range(count)]
        parts = [windows[:-1], windows[-1:]]  # the last window of all is shorter
        sums = [model(ids[:, :-1], ids[:, 1:])[1].item() * ids[:, 1:].numel()
                for ids in map(torch.stack, parts)]
        loss, = logged(tmp_path / 'out', f'{split}_loss').values()
        assert loss == pytest.approx(sum(sums) / sum(len(w) - 1 for w in windows), rel=1e-5)


def test_samples_come_from_the_weights_that_are_saved(train, char_data, tmp_path):
    run = runtime.start('cpu')
    log = train('--max_iters=5', '--sample_interval=2', '--keep_interval=2', '--learning_rate=0.1',
                '--seed=5', '--eval_interval=100')['log']
    found = dict(re.findall(r'^sample at iteration (\d+):\n(.*?)\n-{15}$', log, re.M | re.S))
    assert list(found) == ['0', '2', '4']
    for i in (2, 4):
        model, tokenizer, _ = models.load_model(str(tmp_path / f'out/ckpt_{i}.pt'), '', run)
        start = Dataset(char_data)['val'][:1].tolist()
        assert sample_text(model, tokenizer, start, run, seed=5 + i) == found[str(i)]


# the iterations of what is printed and of the states that are there at the end
INTERVALS = [
    ('--eval_interval=3', {'step': [0, 3, 6, 7], 'ckpt': 7, 'latest': 8}),
    ('--log_interval=3', {'iter': [0, 3, 6], 'latest': 8}),
    ('--sample_interval=3', {'sample at iteration': [0, 3, 6]}),
    ('--checkpoint_interval=2', {'latest': 8, 'previous': 6}),
    ('--checkpoint_interval=0', {'latest': None, 'previous': None, 'ckpt': 7}),
    ('--keep_interval=3', {'ckpt_3': 3, 'ckpt_6': 6, 'ckpt_7': None, 'ckpt_0': None}),
    ('--learning_rate=0 --min_lr=0 --eval_interval=2 --patience=2', {'step': [0, 2, 4], 'latest': 4}),
    ('--learning_rate=0 --min_lr=0 --eval_interval=2 --always_save_checkpoint=False', {'ckpt': None}),
]


@pytest.mark.parametrize('args, expected', INTERVALS, ids=[args for args, _ in INTERVALS])
def test_interval_settings(args, expected, train, tmp_path):
    log = train('--max_iters=7', '--eval_interval=100', *args.split())['log']
    for name, at in expected.items():
        if isinstance(at, list):
            assert [int(i) for i in re.findall(rf'^{name} (\d+):', log, re.M)] == at, name
        else:
            path = tmp_path / f'out/{name}.pt'
            assert (State.load(path).iter_num if path.exists() else None) == at, name


def test_ckpt_without_optimizer_is_a_third_and_latest_can_be_resumed(train, tmp_path):
    args = ('--eval_interval=2', '--n_embd=128', '--keep_interval=2', '--ckpt_with_optimizer=False')
    train('--max_iters=4', *args)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / 'out').glob('*.pt')}
    assert 0.32 < sizes['ckpt.pt'] / sizes['latest.pt'] < 0.36
    assert list(losses(train('--max_iters=6', *args, '--init_from=resume')['log'])) == [5, 6]
    for name in ('latest.pt', 'previous.pt'):
        (tmp_path / 'out' / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match='nothing to resume: .*no optimizer state'):
        train('--init_from=resume')


def test_threads_checkpointing_and_type_are_those_asked_for(train):
    before = torch.get_num_threads()
    script = train('--eval_only', '--threads=3', '--activation_checkpointing', '--dtype=float16')
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == 3 and script['model'].activation_checkpointing
    assert script['run'].dtype == 'float16' and not script['scaler'].is_enabled()  # which a GPU has


def test_compiled_run_equals_the_uncompiled_one(train, tmp_path):
    args = ('--max_iters=4', '--eval_interval=2', '--dropout=0.2')
    train(*args)
    torch.compiler.set_default_backend('aot_eager')  # which needs no C++ compiler, and no minute
    try:
        train(*args, '--compile=True', out_dir=tmp_path / 'compiled')
    finally:
        torch.compiler.set_default_backend(None)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    for name in ('loss', 'val_loss'):
        found, expected = (logged(tmp_path / folder, name) for folder in ('compiled', 'out'))
        assert found == pytest.approx(expected, abs=1e-5)
    states = [torch.load(tmp_path / folder / 'ckpt.pt')['model'] for folder in ('compiled', 'out')]
    assert [*states[0]] == [*states[1]]


LINES = [
    r'tokens per iteration will be: 192',
    r'found vocab_size = 21 \(inside .*meta\.pkl\)',
    r'number of parameters: 0\.03M(, .*)?',
    r'num decayed parameter tensors: 10, with 25,760 parameters',
    r'num non-decayed parameter tensors: 5, with 160 parameters',
    r'step 0: train loss \d\.\d{4}, val loss \d\.\d{4}(, .*)?',
    r'saving checkpoint to .*out',
    r'iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%(, .*)?',
]


def test_log_has_the_lines_that_scripts_parse(train, tmp_path):
    """And what is printed, logged and saved is what happened: max_iters + 1 updates, evaluated before."""
    out = tmp_path / 'out'
    log = train('--max_iters=7', '--eval_interval=3', '--gradient_accumulation_steps=3')['log']
    for line in LINES:
        assert re.search(rf'^{line}$', log, re.M), f'{line}\n{log}'
    assert list(losses(log)) == [*range(8)] and list(evaluations(log)) == [0, 3, 6, 7]
    assert losses(log) == pytest.approx(logged(out), abs=1e-4)
    state = torch.load(out / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer', 'data',
            'scaler', 'guard', 'seconds', 'n_tokens', 'best_iter', 'wandb_id'} == set(state)
    best = min((loss, i) for i, loss in logged(out, 'val_loss').items())
    assert state['iter_num'] == 7 and (state['best_val_loss'], state['best_iter']) == best
    assert state['config']['gradient_accumulation_steps'] == 3 and state['config']['device'] == 'cpu'


@pytest.mark.parametrize('args', ['--dropout=0.2', '--optimizer=muon'])
def test_evaluations_and_samples_leave_no_trace_in_the_training(args, train, tmp_path):
    train('--max_iters=6', args, '--eval_interval=100', out_dir=tmp_path / 'rarely')
    train('--max_iters=6', args, '--eval_interval=1', '--sample_interval=2', out_dir=tmp_path / 'often')
    for name in ('loss', 'grad_norm'):
        assert logged(tmp_path / 'rarely', name) == logged(tmp_path / 'often', name)


@pytest.mark.parametrize('bias', [True, False])
def test_checkpoints_go_from_ours_to_nanogpt_s_and_back(bias, train, char_data, tmp_path):
    """Each resumes from the other's checkpoint as from its own."""
    args = (*LOOP, '--max_iters=9', f'--bias={bias}')
    settings = settings_of(*args)
    whole = plain_loop(char_data, settings)
    train(*args, '--max_iters=3', '--checkpoint_interval=0')
    ours = torch.load(tmp_path / 'out/ckpt.pt')
    assert ours['iter_num'] == 3
    assert set(ours['model_args']) == {
        'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    their_model = runpy.run_path(ROOT / 'tests/wild/models/plain.py')
    theirs = their_model['GPT'](their_model['GPTConfig'](**ours['model_args']))
    theirs.load_state_dict(ours['model'])
    opt = plain_optimizer(theirs, SimpleNamespace(**settings))
    opt.load_state_dict(ours['optimizer'])
    found = plain_loop(char_data, settings | {'max_iters': 5}, theirs, opt, first=3)
    assert found == pytest.approx({i: whole[i] for i in (3, 4, 5)}, abs=1e-5)
    older = {f'_orig_mod.{name}': t for name, t in theirs.state_dict().items()}
    older['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # a mask of older versions
    torch.save({'model': older, 'optimizer': opt.state_dict(), 'model_args': ours['model_args'],
                'iter_num': 6, 'best_val_loss': torch.tensor(9.0), 'config': {'dataset': 'x'}},
               tmp_path / 'out/ckpt.pt')
    train(*args, '--init_from=resume')
    assert {i: x for i, x in logged(tmp_path / 'out').items() if i >= 6} == pytest.approx(
        {i: whole[i] for i in range(6, 10)}, abs=1e-5)


def test_eval_only_evaluates_once_and_writes_nothing(train, tmp_path):
    train('--max_iters=4')
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()}
    trained = train('--eval_only', '--init_from=resume', '--eval_interval=3', '--max_iters=6')['log']
    assert list(evaluations(trained)) == [4] and not losses(trained)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()} == before


def test_run_starts_from_the_weights_that_are_named_and_nothing_else(train, tmp_path):
    train('--max_iters=4', '--eval_interval=2', '--bias=True', '--keep_interval=2')
    kept = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    for source, name in ((tmp_path / 'out/ckpt_2.pt', 'ckpt_2.pt'), ('finetune', 'earlier-1/ckpt.pt')):
        out_dir = tmp_path / ('out' if source == 'finetune' else 'new')
        train(f'--init_from={source}', '--attn_type=GK', '--dropout=0.1', '--bias=False', '--max_iters=3',
              '--eval_interval=3', '--learning_rate=0', '--min_lr=0', out_dir=out_dir)
        old, new = State.load(tmp_path / 'out' / name), State.load(out_dir / 'ckpt.pt')
        assert new.model_args == old.model_args | {'attn_type': 'GK', 'dropout': 0.1}
        assert all(torch.equal(new.model[k], old.model[k]) for k in old.model)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out/earlier-1').iterdir()} == kept


def test_attentions_are_trained_and_evaluated_by_their_configs(train, char_data, tmp_path):
    def run(*args):
        script = train(*args, *TINY_ARGS, '--n_layer=1', '--n_head=1', '--max_iters=1', '--eval_interval=1',
                       f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}')
        return script['model'].config.attn_type, evaluations(script['log'])
    for attn_type, name in (('GK', 'train_11'), ('PA_gelu', 'PA')):
        found, trained = run(name, '--init_from=scratch')
        assert found == attn_type
        assert list(run('EVAL', f'--attn_type={attn_type}')[1].values()) == [trained[1]]


def test_each_config_file_fits_train_py(train, tmp_path):
    for path in (ROOT / 'config').glob('*.py'):
        with pytest.raises(FileNotFoundError, match='train.bin is missing'):
            train(str(path), '--device=cpu', '--compile=False', data_dir=tmp_path / 'nowhere')


MISTAKES = [
    ('--learning_rat=1', 'Unknown config key: learning_rat (did you mean learning_rate'),
    ('--batch_size=many', 'batch_size '), ('--init_from=resume', 'ckpt.pt is missing'),
    ('--n_embd=33', 'must be a multiple of n_head'), ('--sampler=shuffled', 'sampler=shuffled is not one of'),
    ('--eval_iters=-1', 'eval_iters=-1 must be '), ('--n_layer=1e6', 'n_layer=1000000 must be '),
    ('--batch_size=1e12', 'out of memory: the token ids alone of batch_size=1000000000000 '),
    ('--gradient_accumulation_steps=1e12', 'out of memory: the token ids alone'),
    ('--learning_rate=1e999', 'learning_rate=inf must be '),
]


@pytest.mark.parametrize('args, reason', MISTAKES, ids=[args for args, _ in MISTAKES])
def test_mistake_is_one_line(args, reason, train, tmp_path):
    with pytest.raises(USER_ERRORS) as error:
        train(*args.split())
    assert reason in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_processes_that_can_not_be_connected_are_one_line(train, monkeypatch):
    for setting in ('RANK=0', 'WORLD_SIZE=2', 'MASTER_ADDR=localhost', 'MASTER_PORT=x'):
        monkeypatch.setenv(*setting.split('='))
    with pytest.raises(ValueError, match='can\'t be connected: torchrun sets MASTER_ADDR') as error:
        train('--gradient_accumulation_steps=2')
    assert '\n' not in str(error.value)


WANDB = '''
import json, os
def init(**settings): record(settings)
def log(values): record(values)
def finish(): record('finish')
def record(what): print(json.dumps(what), file=open(os.environ['RECORD'], 'a'))
'''


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
    yield
    sys.modules.pop('wandb', None)


def test_wandb_gets_each_line_once_and_a_resumed_run_goes_on(train, fake_wandb, tmp_path):
    for args in ('--max_iters=2', '--max_iters=4 --init_from=auto', '--max_iters=2'):
        train(*args.split(), '--wandb_log', '--wandb_project=mine', '--wandb_run_name=it',
              '--eval_interval=2')
    records = [json.loads(line) for line in (tmp_path / 'record').read_text().splitlines()]
    inits = [r for r in records if 'project' in r]
    assert inits[0]['id'] == inits[1]['id'] != inits[2]['id']
    assert len(inits) == records.count('finish') == 3
    assert all((r['resume'], r['project'], r['name']) == ('allow', 'mine', 'it') for r in inits)
    evaluated = [r for r in records if 'val/loss' in r]
    assert [r['iter'] for r in evaluated] == [0, 2, 4, 0, 2]
    assert all({'train/loss', 'lr', 'mfu', 'val/bits_per_byte'} <= set(r) for r in evaluated)
    assert [r['iter'] for r in records if 'loss' in r] == [*range(5), *range(3)]
