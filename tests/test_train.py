"""train.py: each setting reaches what it changes; what a run logs, saves, starts from and refuses."""

import functools
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
from runs import logged, read_log

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
             'wsd': min(1, 5 * (1 - done))}[s.lr_schedule]
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


@functools.cache
def losses_of_plain_loop(folder, *args):
    return plain_loop(folder, settings_of(*args))


IN_THE_LOOP = [  # the last one is what the row is about, those before it are its context
    '--learning_rate=3e-3', '--min_lr=5e-3', '--warmup_iters=4', '--warmup_iters=0',
    '--lr_decay_iters=3', '--decay_lr=False', '--lr_schedule=linear', '--lr_schedule=wsd',
    '--lr_schedule=constant', '--weight_decay=9',
    '--beta1=0.5', '--beta2=0.5', '--grad_clip=1.5', '--grad_clip=0', '--seed=7', '--dropout=0.3',
    '--gradient_accumulation_steps=3', '--batch_size=3', '--block_size=8', '--sampler=epoch',
    '--gradient_accumulation_steps=3 --batch_ramp_iters=3',
    '--gradient_accumulation_steps=3 --batch_ramp_iters=3 --sampler=epoch',
    '--dtype=bfloat16', '--tie_weights=False --embedding_lr=0.1', '--n_layer=1', '--n_head=4',
    '--n_embd=16', '--bias=True',
    '--activation=relu2', '--activation=swiglu', '--learning_rate=0.1 --activation=gelu_tanh',
    '--pos_emb=rope', '--pos_emb=alibi', '--pos_emb=none', '--pos_emb=rope --rope_theta=4',
    '--pos_emb=rope --rope_scaling=(8,1,4,16)', '--norm=rmsnorm', '--norm_eps=0.1', '--qk_norm=True',
    '--qkv_bias=True', '--tie_weights=False', '--value_residual=True', '--logit_softcap=0.5',
    '--n_kv_head=1', '--head_size=8', '--n_inner=48', '--ngram=3', '--ngram=3 --ngram_rows=9',
    '--init=zero_proj', '--attn_type=GK', '--attn_type=PA_relu --pa_norm=block_size',
]


@pytest.mark.parametrize('args', ['', *IN_THE_LOOP])
def test_run_computes_what_a_plain_loop_does_and_each_setting_matters(args, train, char_data, tmp_path):
    args = args.split()
    train(*LOOP, *args)
    found, rates = logged(tmp_path / 'out'), logged(tmp_path / 'out', 'lr')
    settings = SimpleNamespace(**settings_of(*LOOP, *args))
    assert rates == pytest.approx({i: plain_rate(settings, i) for i in range(6)})
    rounding = 1e-3 if '--dtype=bfloat16' in args else 1e-5
    assert found == pytest.approx(losses_of_plain_loop(char_data, *LOOP, *args), abs=rounding)
    without = losses_of_plain_loop(char_data, *LOOP, *args[:-1])
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


def test_adapters_are_of_the_rank_scaled_by_alpha_and_all_that_is_trained(train, tmp_path):
    train('--max_iters=2')
    base = State.load(tmp_path / 'out/ckpt.pt').model
    train(f'--init_from={tmp_path / "out"}', '--lora_rank=3', '--lora_alpha=12', '--max_iters=2',
          '--learning_rate=0.1', out_dir=tmp_path / 'tuned')
    state = State.load(tmp_path / 'tuned/latest.pt')
    for name, whole in state.model.items():
        adapted = name.removesuffix('weight')
        change = torch.zeros(())
        if f'{adapted}lora_A' in state.trained:
            a, b = state.trained[f'{adapted}lora_A'], state.trained[f'{adapted}lora_B']
            assert a.shape[0] == b.shape[1] == 3 and b.any()
            change = 12 / 3 * b @ a
        assert torch.allclose(whole, base[name] + change, atol=1e-7)
    assert sum('lora_A' in name for name in state.trained) == 8


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
        bits, = logged(tmp_path / 'out', f'{split}_bits_per_byte').values()
        assert bits == pytest.approx(loss / math.log(2))  # a character is a byte here


def test_samples_come_from_the_weights_that_are_saved(train, char_data, tmp_path):
    run = runtime.start('cpu')
    train('--max_iters=2')
    for more in ((), (f'--init_from={tmp_path / "out"}', '--lora_rank=2')):
        out_dir = tmp_path / f'sampled{len(more)}'
        log = train('--max_iters=5', '--sample_interval=2', '--keep_interval=2', '--learning_rate=0.1',
                    '--seed=5', '--eval_interval=100', *more, out_dir=out_dir)['log']
        found = dict(re.findall(r'^sample at iteration (\d+):\n(.*?)\n-{15}$', log, re.M | re.S))
        assert list(found) == ['0', '2', '4']
        for i in (2, 4):
            model, tokenizer, _ = models.load_model(str(out_dir / f'ckpt_{i}.pt'), '', run)
            start = Dataset(char_data)['val'][:1].tolist()
            assert sample_text(model, tokenizer, start, run, seed=5 + i) == found[str(i)]


# interval settings -> the iterations of what is printed and of the states that are there at the end
INTERVALS = [
    ('--eval_interval=3', {'step': [0, 3, 6, 7], 'ckpt': 7, 'latest': 8}),
    ('--eval_interval=9', {'step': [0, 7], 'ckpt': 7, 'latest': 8}),
    ('--log_interval=3', {'iter': [0, 3, 6], 'latest': 8}),
    ('--sample_interval=3', {'sample at iteration': [0, 3, 6]}),
    ('--checkpoint_interval=2', {'latest': 8, 'previous': 6}),
    ('--checkpoint_interval=0', {'latest': None, 'previous': None, 'ckpt': 7}),
    ('--keep_interval=3', {'ckpt_3': 3, 'ckpt_6': 6, 'ckpt_7': None, 'ckpt_0': None}),
    ('--learning_rate=0 --min_lr=0 --eval_interval=2 --patience=2', {'step': [0, 2, 4], 'latest': 4}),
    ('--learning_rate=0 --min_lr=0 --eval_interval=2 --always_save_checkpoint=False', {
        'ckpt': None, 'latest': 8}),
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
    assert sizes['ckpt_2.pt'] == pytest.approx(sizes['ckpt.pt'], rel=0.01)
    assert list(losses(train('--max_iters=6', *args, '--init_from=resume')['log'])) == [5, 6]
    for name in ('latest.pt', 'previous.pt'):
        (tmp_path / 'out' / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match='nothing to resume: .*no optimizer state'):
        train('--init_from=resume')


ELSEWHERE = (  # settings whose effect other tests show, here and in the files in brackets
    'optimizer muon_lr lora_rank lora_alpha activation_checkpointing eval_iters ckpt_with_optimizer '
    'max_iters out_dir data_dir dataset init_from eval_only wandb_log wandb_project wandb_run_name '
    'device threads compile dry_run (test_plan) plot (test_log) pack (test_masks) '
    'parallel backend (test_fsdp, test_runtime) dist_timeout (test_resume)')


def test_each_setting_is_shown_to_matter():
    args = ' '.join([*IN_THE_LOOP, *(args for args, _ in INTERVALS)])
    shown = re.findall(r'--(\w+)=', args) + re.sub(r'\(.*?\)', '', ELSEWHERE).split()
    assert set(shown) == set(settings_of())


def test_compiled_run_equals_the_uncompiled_one(train, tmp_path):
    args = ('--max_iters=4', '--eval_interval=2', '--dropout=0.2')
    train(*args)
    torch.compiler.set_default_backend('aot_eager')  # which needs no C++ compiler, and no minute
    try:
        train(*args, '--compile=True', out_dir=tmp_path / 'compiled')
    finally:
        torch.compiler.set_default_backend(None)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    for name in 'loss', 'val_loss':
        found, expected = (logged(tmp_path / folder, name) for folder in ('compiled', 'out'))
        assert found == pytest.approx(expected, abs=1e-5)
    weights = torch.load(tmp_path / 'compiled/ckpt.pt')['model']
    assert all(name.startswith(('transformer.', 'lm_head.')) for name in weights)


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
    script = train('--max_iters=7', '--eval_interval=3', '--gradient_accumulation_steps=3')
    log, out = script['log'], tmp_path / 'out'
    for line in LINES:
        assert re.search(rf'^{line}$', log, re.M), f'{line}\n{log}'
    assert list(losses(log)) == [*range(8)] and list(evaluations(log)) == [0, 3, 6, 7]
    assert losses(log) == pytest.approx(logged(out), abs=1e-4)
    best = min(logged(out, 'val_loss').items(), key=lambda item: item[1])
    last = dict(line.split(': ') for line in log.splitlines()[-7:])
    assert (int(last['best_iter']), float(last['best_val_loss'])) == (best[0], pytest.approx(best[1]))
    assert float(last['best_val_bits_per_byte']) == pytest.approx(best[1] / math.log(2), rel=1e-5)
    assert (last['iterations'], last['tokens']) == ('8', str(8 * 192))
    assert float(last['seconds']) > 0 and int(last['peak_memory_bytes']) > 1e7
    state = torch.load(out / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer', 'data',
            'scaler', 'guard', 'seconds', 'n_tokens', 'n_worse', 'wandb_id'} == set(state)
    assert state['iter_num'] == 7 and state['best_val_loss'] == pytest.approx(best[1])
    assert state['config']['gradient_accumulation_steps'] == 3 and state['config']['device'] == 'cpu'
    untrained = train('--max_iters=0', out_dir=tmp_path / 'short')['log']
    assert evaluations(untrained)[0] == evaluations(log)[0]
    assert not (tmp_path / 'short/ckpt.pt').exists()


@pytest.mark.parametrize('args', ['--dropout=0.2', '--optimizer=muon'])
def test_evaluations_and_samples_leave_no_trace_in_the_training(args, train, tmp_path):
    train('--max_iters=6', args, '--eval_interval=100', out_dir=tmp_path / 'rarely')
    train('--max_iters=6', args, '--eval_interval=1', '--sample_interval=2', out_dir=tmp_path / 'often')
    for name in ('loss', 'grad_norm'):
        assert logged(tmp_path / 'rarely', name) == logged(tmp_path / 'often', name)


@pytest.mark.parametrize('always', [True, False])
def test_best_loss_is_kept_and_so_is_its_model_unless_each_is_saved(always, train, tmp_path):
    train('--max_iters=20', '--eval_interval=20', '--learning_rate=1e-2')
    best = State.load(tmp_path / 'out/ckpt.pt').best_val_loss
    log = train('--max_iters=25', '--init_from=resume', '--learning_rate=3', '--decay_lr=False',
                '--eval_interval=7', f'--always_save_checkpoint={always}')['log']  # makes it worse
    state = State.load(tmp_path / 'out/ckpt.pt')
    assert state.iter_num == (25 if always else 20) and state.best_val_loss == best
    assert evaluations(log)[25][1] > best and f'best_val_loss: {round(best, 6)}\nbest_iter: 20' in log


@pytest.mark.parametrize('bias', [True, False])
def test_checkpoints_go_from_ours_to_nanogpt_s_and_back(bias, train, char_data, tmp_path):
    """Either goes on with the other's as it would have itself."""
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
    log = train('--eval_only', '--max_iters=6')['log']
    assert list(evaluations(log)) == [0] and not losses(log) and not (tmp_path / 'out').exists()
    train('--max_iters=4')
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()}
    trained = train('--eval_only', '--init_from=resume', '--eval_interval=3', '--max_iters=6')['log']
    assert list(evaluations(trained)) == [4] and not losses(trained)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / 'out').iterdir()} == before


def test_run_starts_from_the_weights_that_are_named_and_nothing_else(train, tmp_path):
    """A folder, one of its states, or the run in out_dir, with dropout and attention of its own."""
    train('--max_iters=4', '--eval_interval=2', '--bias=True', '--keep_interval=2')
    kept = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    for source, name in ((tmp_path / 'out', 'ckpt.pt'), (tmp_path / 'out/ckpt_2.pt', 'ckpt_2.pt'),
                         ('finetune', 'earlier-1/ckpt.pt')):
        out_dir = tmp_path / ('out' if source == 'finetune' else name)
        script = train(f'--init_from={source}', '--attn_type=GK', '--dropout=0.1', '--bias=False',
                       '--max_iters=3', '--eval_interval=3', '--learning_rate=0', '--min_lr=0',
                       out_dir=out_dir)
        assert list(losses(script['log'])) == [0, 1, 2, 3]
        assert 'attn_type: GK, where the checkpoint has SM' in script['log']
        assert 'as in the checkpoint: bias=True (not False)' in script['log']
        old, new = State.load(tmp_path / 'out' / name), State.load(out_dir / 'ckpt.pt')
        assert new.model_args == old.model_args | {'attn_type': 'GK', 'dropout': 0.1}
        assert all(torch.equal(new.model[k], old.model[k]) for k in old.model)
        assert new.best_val_loss == pytest.approx(evaluations(script['log'])[0][1], abs=1e-4)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out/earlier-1').iterdir()} == kept


@pytest.fixture
def bpe_data(tmp_path):
    """Random ids of GPT-2's vocabulary."""
    (tmp_path / 'bpe').mkdir()
    for split in ('train', 'val'):
        np.random.randint(50257, size=1000).astype(np.uint16).tofile(tmp_path / f'bpe/{split}.bin')
    return tmp_path / 'bpe'


def test_gpt2_and_each_attention_are_fine_tuned_one_after_the_other(train, tmp_path, gpt2_folder, bpe_data):
    def run(name, *args):
        script = train(*args, *TINY_ARGS, '--n_layer=1', '--n_head=1', '--max_iters=1', '--eval_interval=1',
                       '--dropout=0.1', f'--data_dir={bpe_data}', f'--out_dir={tmp_path / name}')
        return script['model'].config, evaluations(script['log'])

    gpt2 = f'--init_from={gpt2_folder}'
    for attn_type, args in (('SM', [gpt2]), ('GKpoly-4', [gpt2, '--attn_type=GKpoly-4']),
                            ('GK', ['config/train_11.py']), ('PA_gelu', ['config/PA.py', gpt2])):
        config, found = run(attn_type, *args)
        assert (config.attn_type, config.dropout, config.block_size) == (attn_type, 0.1, 16)
        assert config.activation == ('gelu_tanh' if gpt2 in args else 'gelu')
        again, evaluated = run(attn_type, 'config/EVAL.py', f'--attn_type={attn_type}')
        assert list(evaluated.values()) == [found[1]]


def test_each_config_file_fits_train_py(train, tmp_path):
    for path in (ROOT / 'config').glob('*.py'):
        with pytest.raises(FileNotFoundError, match='train.bin is missing'):
            train(str(path), '--device=cpu', '--compile=False', data_dir=tmp_path / 'nowhere')


MISTAKES = [
    ('--learning_rat=1', 'Unknown config key: learning_rat (did you mean learning_rate'),
    ('--batch_size=many', 'batch_size '), ('--max_iters=2.5', 'max_iters '),
    ('--init_from=resume', 'ckpt.pt is missing'), ('--init_from=gpt3', 'gpt3 is neither'),
    ('--init_from=finetune', 'ckpt.pt'), ('--device=tpu', 'device=tpu is not on this machine'),
    ('--n_embd=33', 'must be a multiple of n_head'), ('config/no_such.py', 'no config config/no_such.py'),
    ('--sampler=shuffled', 'sampler=shuffled is not one of'), ('--optimizer=sgd', 'is not one of'),
    ('--lr_schedule=cosin', 'is not one of'), ('--parallel=zero', 'is not one of'),
    ('--parallel=fsdp --optimizer=muon', 'optimizer=muon needs them whole'),
    ('--embedding_lr=0.1', 'tie_weights=False'), ('--out_dir=', 'out_dir is empty'),
    *((f'--{name}={value}', f'{name}={value} must be ') for name, value in (
        ('grad_clip', -1.0), ('weight_decay', -1.0), ('eval_iters', -1), ('beta1', 2.0), ('n_layer', 0),
        ('learning_rate', -1.0), ('learning_rate', math.inf), ('dropout', 1.0), ('lora_alpha', -1.0),
        ('batch_size', 0), ('seed', 10**22), ('threads', -1), ('patience', -1))),
]


@pytest.mark.parametrize('args, reason', MISTAKES, ids=[args for args, _ in MISTAKES])
def test_mistake_is_one_line(args, reason, train, tmp_path):
    with pytest.raises(USER_ERRORS) as error:
        train(*args.replace('inf', '1e999').split())
    assert reason in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


WANDB = '''
import json, os
def init(**settings): record(settings)
def log(values): record(values)
def finish(): record('finish')
def record(what): print(json.dumps(what), file=open(os.environ['RECORD'], 'a'))
'''
BROKEN = ['raise ImportError("broken")', 'def init(**settings): raise RuntimeError("no key")',
          'def init(**settings): pass\ndef log(values): raise OSError("no network")\ndef finish(): 1 / 0']


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    def install(body):
        (tmp_path / 'wandb.py').write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, 'wandb', raising=False)
        monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
    yield install
    sys.modules.pop('wandb', None)


def test_wandb_gets_each_line_once_and_a_resumed_run_goes_on(train, fake_wandb, tmp_path):
    fake_wandb(WANDB)
    for args in ('--max_iters=2', '--max_iters=4 --init_from=auto', '--max_iters=2',
                 '--max_iters=3 --eval_only', '--max_iters=3 --dry_run'):
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
    last = read_log(tmp_path / 'out')[-2]['health']['update_ratio']
    assert [r for r in records if 'health/update_ratio/1' in r][-1]['health/update_ratio/1'] == last[1]


@pytest.mark.parametrize('body', BROKEN)
def test_broken_wandb_leaves_the_run_whole(body, train, fake_wandb):
    fake_wandb(body)
    log = train('--max_iters=3', '--eval_interval=1', '--wandb_log')['log']
    assert len(losses(log)) == 4 and log.count('wandb is off') == 1
