"""train.py: what a run logs, saves, resumes and refuses."""

import importlib.util
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS, evaluations, losses

import support.text.dataset
from model import GPT, GPTConfig
from support.training import checkpoint
from support.text.prepare import write_text_dataset, write_tokens

LINES = [
    r'^tokens per iteration will be: 64$',
    r'^found vocab_size = \d+ \(inside .*meta\.pkl\)$',
    r'^number of parameters: \d+\.\d\dM(, |$)',
    r'^num decayed parameter tensors: 10, with [\d,]+ parameters$',
    r'^num non-decayed parameter tensors: 5, with 160 parameters$',
    r'^step 0: train loss \d\.\d{4}, val loss \d\.\d{4}, train \d\.\d{4} bits/byte, val \d\.\d{4} bits/byte$',
    r'^saving checkpoint to .*out$',
    r'^iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%',
]


def test_log_has_the_lines_that_scripts_parse(train):
    log = train('--max_iters=2')['log']
    for line in LINES:
        assert re.search(line, log, re.M), f'{line}\n{log}'


def test_max_iters_plus_one_updates_evaluated_before_the_update(train):
    script = train('--max_iters=7', '--eval_interval=3')
    assert list(losses(script['log'])) == list(range(8))
    assert list(evaluations(script['log'])) == [0, 3, 6, 7]
    untrained = train('--max_iters=0')['log']
    assert evaluations(untrained)[0] == evaluations(script['log'])[0]


def test_loss_falls(train):
    evaluated = evaluations(train('--max_iters=60', '--learning_rate=1e-2', '--eval_interval=60')['log'])
    assert evaluated[60][1] < evaluated[0][1] - 0.5


def test_nothing_is_saved_at_iteration_0(train, tmp_path):
    train('--max_iters=0')
    assert not (tmp_path / 'out/ckpt.pt').exists()


def test_a_run_shorter_than_eval_interval_is_saved(train, tmp_path):
    train('--max_iters=3', '--eval_interval=1000')
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['iter_num'] == 3


def test_checkpoint_has_the_keys_of_the_contract(train, tmp_path):
    train('--max_iters=2', '--gradient_accumulation_steps=6')
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(state)
    assert state['config']['gradient_accumulation_steps'] == 6 and state['config']['device'] == 'cpu'
    assert set(state['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size',
                                        'dropout'}
    weights = state['model']
    assert torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight'])
    assert set(weights) == set(GPT(GPTConfig(**state['model_args'])).state_dict())


@pytest.mark.parametrize('dropout', ['0.0', '0.2'])
def test_evaluation_leaves_no_trace_in_the_training(train, dropout):
    often = train('--max_iters=8', '--eval_interval=1', f'--dropout={dropout}')['log']
    rarely = train('--max_iters=8', '--eval_interval=100', f'--dropout={dropout}')['log']
    assert losses(often) == losses(rarely)


def test_dropout_acts_after_an_evaluation_and_not_in_it(train):
    without, with_it = (train('--max_iters=2', f'--dropout={p}')['log'] for p in ('0.0', '0.5'))
    assert evaluations(without)[0] == evaluations(with_it)[0]
    assert all(losses(without)[i] != losses(with_it)[i] for i in range(3))


def test_activation_checkpointing_changes_no_number(train, tmp_path):
    args = ('--max_iters=5', '--dropout=0.2', '--learning_rate=1e-2')
    plain = train(*args)['log']
    assert losses(train(*args, '--activation_checkpointing', out_dir=tmp_path / 'b')['log']) == losses(plain)


def test_evaluations_read_the_same_windows_each_time(train):
    log = train('--max_iters=3', '--eval_interval=1', '--learning_rate=0', '--min_lr=0')['log']
    evaluated = evaluations(log)
    assert len(evaluated) == 4 and len(set(evaluated.values())) == 1


def test_evaluation_of_the_whole_split_is_the_mean_over_its_tokens(train):
    script = train('--max_iters=0', '--eval_iters=0')
    model, tokens, T = script['model'].eval(), torch.from_numpy(script['data']['val'].astype(np.int64)), 16
    total = 0.0
    for start in range(0, len(tokens) - 1, T):
        y = tokens[start + 1:start + 1 + T]
        with torch.no_grad():
            total += model(tokens[None, start:start + len(y)], y[None])[1].item() * len(y)
    assert math.isclose(total / (len(tokens) - 1), script['estimate_loss']()['val'], rel_tol=1e-5)


def test_logged_loss_is_the_mean_over_the_micro_steps(train):
    one = losses(train('--max_iters=3', '--batch_size=8', '--gradient_accumulation_steps=1')['log'])
    four = losses(train('--max_iters=3', '--batch_size=2', '--gradient_accumulation_steps=4')['log'])
    assert one == pytest.approx(four, abs=1.01e-4)


def test_resumed_run_equals_uninterrupted_run(train, tmp_path):
    args = ('--eval_interval=4', '--lr_decay_iters=8', '--learning_rate=1e-2')
    whole = train('--max_iters=8', *args, out_dir=tmp_path / 'whole')['log']
    train('--max_iters=4', *args, out_dir=tmp_path / 'parts')
    resumed = train('--max_iters=8', *args, '--init_from=resume', out_dir=tmp_path / 'parts')['log']
    assert losses(resumed) == {i: x for i, x in losses(whole).items() if i >= 5}
    a, b = (checkpoint.load(tmp_path / name / 'latest.pt') for name in ('whole', 'parts'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert a['best_val_loss'] == b['best_val_loss']


def test_eval_only_evaluates_once_and_writes_nothing(train, tmp_path):
    fresh = train('--eval_only', '--max_iters=6')['log']
    assert list(evaluations(fresh)) == [0] and not losses(fresh) and not (tmp_path / 'out').exists()
    train('--max_iters=4')
    before = (tmp_path / 'out/ckpt.pt').stat()
    resumed = train('--eval_only', '--init_from=resume', '--eval_interval=3', '--max_iters=6')['log']
    assert list(evaluations(resumed)) == [4] and not losses(resumed)
    assert (tmp_path / 'out/ckpt.pt').stat() == before and len(list((tmp_path / 'out').iterdir())) == 3


# five iterations that make a trained model worse
SPOIL = ('--init_from=resume', '--eval_interval=5', '--learning_rate=3', '--decay_lr=False',
         '--warmup_iters=0')


def test_best_loss_is_remembered_when_every_state_is_saved(train, tmp_path):
    train('--max_iters=20', '--eval_interval=20', '--learning_rate=1e-2')
    best = checkpoint.load(tmp_path / 'out/ckpt.pt')['best_val_loss']
    log = train('--max_iters=25', *SPOIL)['log']
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert evaluations(log)[25][1] > best and state['iter_num'] == 25 and state['best_val_loss'] == best


def test_a_worse_model_does_not_replace_a_better_one(train, tmp_path):
    train('--max_iters=20', '--eval_interval=20', '--learning_rate=1e-2')
    train('--max_iters=25', *SPOIL, '--eval_interval=7', '--always_save_checkpoint=False')  # 21 is the first
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['iter_num'] == 20


def test_learning_rate_schedule(train):
    script = train('--max_iters=0', '--learning_rate=1', '--min_lr=0.1', '--warmup_iters=4',
                   '--lr_decay_iters=12')
    rates = [script['get_lr'](i) for i in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.55) and rates[12:] == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize('schedule, shares', [
    ('cosine', [1.0, 0.853553, 0.5, 0.146447, 0.0]), ('linear', [1.0, 0.75, 0.5, 0.25, 0.0]),
    ('wsd', [1.0, 1.0, 1.0, 1.0, 0.0]), ('constant', [1.0, 1.0, 1.0, 1.0, 1.0])])
def test_schedules_go_from_the_learning_rate_to_the_least(train, schedule, shares):
    script = train('--max_iters=0', '--learning_rate=1', '--min_lr=0', '--warmup_iters=0',
                   '--lr_decay_iters=100', f'--lr_schedule={schedule}')
    assert [script['get_lr'](i) for i in (0, 25, 50, 75, 100)] == pytest.approx(shares, abs=1e-6)
    assert schedule != 'wsd' or script['get_lr'](90) == pytest.approx(0.5)


def test_decay_that_ends_with_the_warm_up_does_not_divide_by_zero(train):
    log = train('--max_iters=4', '--warmup_iters=2', '--lr_decay_iters=2')['log']
    assert len(losses(log)) == 5


def test_batch_grows_to_the_whole_number_of_micro_steps(train, tmp_path):
    script = train('--batch_ramp_iters=3', '--gradient_accumulation_steps=4', '--max_iters=5')
    assert [script['ramp'].at(i) for i in range(6)] == [1, 2, 3, 4, 4, 4]
    assert [script['ramp'].before(i) for i in range(6)] == [0, 1, 3, 6, 10, 14]
    lines = [json.loads(line) for line in (tmp_path / 'out/log.jsonl').read_text().splitlines()]
    trained = [x for x in lines if 'loss' in x]
    tokens = [x['tokens_per_s'] * x['ms'] / 1000 for x in trained]
    assert tokens == pytest.approx([64, 128, 192, 256, 256, 256])
    assert '6 iterations of 192 tokens: 1,152 tokens' in script['log']


def test_epochs_are_the_same_for_any_size_of_the_micro_steps(train):
    args = ('--sampler=epoch', '--max_iters=8', '--eval_interval=100')
    one = train(*args, '--batch_size=4', '--gradient_accumulation_steps=2')['log']
    other = train(*args, '--batch_size=2', '--gradient_accumulation_steps=4')['log']
    a, b = losses(one), losses(other)
    assert len(a) == 9 and all(abs(a[i] - b[i]) < 2e-4 for i in a)


def test_the_averaged_weights_are_evaluated_and_sampled_from(train, tmp_path):
    script = train('--ema_decay=0.99', '--max_iters=30', '--eval_interval=30', '--learning_rate=1e-2')
    state = checkpoint.load(tmp_path / 'out/latest.pt')
    assert any((state['model'][k] != state['trained'][k]).any() for k in state['model'])
    log = train('--init_from=resume', '--eval_only')['log']
    by_file, = (val for _, val in evaluations(log).values())
    assert by_file == pytest.approx(evaluations(script['log'])[30][1], abs=2e-4)
    script['model'].load_state_dict(state['trained'])
    assert script['estimate_loss']()['val'] != pytest.approx(by_file, abs=2e-4)


def test_a_decay_of_zero_averages_nothing(train, tmp_path):
    script = train('--max_iters=2')
    assert 'trained' not in checkpoint.load(tmp_path / 'out/latest.pt') and not script['average'].params


@pytest.mark.parametrize('wrong', ['--sampler=shuffled', '--optimizer=sgd', '--lr_schedule=cosin'])
def test_unknown_choices_are_refused_before_any_work(train, tmp_path, wrong):
    with pytest.raises(ValueError, match='is not one of'):
        train(wrong)
    assert not (tmp_path / 'out').exists()


def test_resuming_takes_weight_decay_and_betas_from_the_config(train, tmp_path):
    train('--max_iters=2')
    train('--max_iters=4', '--init_from=resume', '--weight_decay=0.5', '--beta1=0.8', '--beta2=0.7')
    decayed, others = checkpoint.load(tmp_path / 'out/ckpt.pt')['optimizer']['param_groups']
    assert (decayed['weight_decay'], others['weight_decay']) == (0.5, 0.0)
    assert tuple(decayed['betas']) == tuple(others['betas']) == (0.8, 0.7)


def test_block_size_on_resume_shrinks_the_model_or_gives_way_to_it(train, tmp_path):
    train('--max_iters=2')
    longer = train('--max_iters=3', '--init_from=resume', '--block_size=1000')
    assert longer['window'] == 16 and 'block_size 1000 exceeds the model\'s 16; using 16' in longer['log']
    train('--max_iters=6', '--init_from=resume', '--block_size=8')
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert state['model_args']['block_size'] == 8
    assert state['model']['transformer.wpe.weight'].shape == (8, 32)
    assert state['optimizer']['state'][1]['exp_avg'].shape == (8, 32)  # wpe is the second parameter


def test_a_checkpoint_in_the_old_format_is_resumed(train, tmp_path):
    """As older scripts wrote it: compile's prefix, mask buffers, a tensor as best loss, no tokenizer."""
    train('--max_iters=2')
    path = tmp_path / 'out/ckpt.pt'
    state = torch.load(path)
    old = {f'_orig_mod.{k}': v for k, v in state['model'].items()}
    old['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)
    torch.save({k: v for k, v in state.items() if k != 'tokenizer'}
               | {'model': old, 'best_val_loss': torch.tensor(9.0)}, path)
    (path.parent / 'latest.pt').unlink()
    assert list(losses(train('--max_iters=4', '--init_from=resume')['log'])) == [2, 3, 4]


def test_gpt2_is_fine_tuned_and_remembers_its_activation(train, tmp_path, gpt2_folder):
    data = tmp_path / 'bpe'
    for split in ('train', 'val'):
        write_tokens(data / f'{split}.bin', [np.arange(50257 - 300, 50257)])
    script = train('--max_iters=2', f'--init_from={gpt2_folder}', '--dropout=0.1', data_dir=data)
    assert len(losses(script['log'])) == 3
    args = checkpoint.load(tmp_path / 'out/ckpt.pt')['model_args']
    assert args['activation'] == 'gelu_tanh' and args['block_size'] == 16 and args['dropout'] == 0.1


@pytest.mark.parametrize('attn_type', ['GK', 'GKpoly-4', 'PA_gelu'])
def test_gpt2_is_converted_to_another_attention(train, tmp_path, gpt2_folder, attn_type):
    data = tmp_path / 'bpe'
    data.mkdir()
    for split in ('train', 'val'):
        np.random.randint(50257, size=3000).astype(np.uint16).tofile(data / f'{split}.bin')
    script = train('--max_iters=2', f'--init_from={gpt2_folder}', f'--attn_type={attn_type}', data_dir=data)
    assert len(losses(script['log'])) == 3
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['model_args']['attn_type'] == attn_type


def test_finetune_takes_the_weights_and_nothing_else_of_its_source(train, tmp_path):
    train('--max_iters=4', '--eval_interval=2', '--bias=True')
    source = (tmp_path / 'out/ckpt.pt').read_bytes()
    script = train('--init_from=finetune', f'--finetune_from={tmp_path / "out"}', '--attn_type=GK',
                   '--dropout=0.1', '--max_iters=3', '--eval_interval=3', '--bias=False', '--learning_rate=0',
                   '--min_lr=0', out_dir=tmp_path / 'tuned')
    assert list(losses(script['log'])) == [0, 1, 2, 3]
    assert 'attn_type: GK, where the checkpoint has SM' in script['log']
    old, new = (checkpoint.load(tmp_path / name / 'ckpt.pt') for name in ('out', 'tuned'))
    assert new['model_args'] == old['model_args'] | {'attn_type': 'GK', 'dropout': 0.1}
    assert all(torch.equal(new['model'][k], old['model'][k]) for k in old['model'])
    assert new['best_val_loss'] == pytest.approx(evaluations(script['log'])[0][1], abs=1e-4)
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == source


def test_finetune_in_place_keeps_the_source_aside(train, tmp_path):
    train('--max_iters=2')
    source = (tmp_path / 'out/ckpt.pt').read_bytes()
    train('--init_from=finetune', '--max_iters=2')
    assert (tmp_path / 'out/earlier/ckpt.pt').read_bytes() == source


def test_the_checkpoints_attention_is_kept_unless_another_is_named(train, tmp_path):
    train('--max_iters=2', '--attn_type=PA_relu', '--pa_norm=none')
    kept = train('--init_from=finetune', '--eval_only', '--max_iters=2')['model'].config
    assert (kept.attn_type, kept.pa_norm) == ('PA_relu', 'none')
    assert train('--init_from=finetune', '--eval_only', '--attn_type=sm')['model'].config.attn_type == 'SM'


def test_the_attention_configs_run_one_after_the_other(train, tmp_path, gpt2_folder):
    data = tmp_path / 'bpe'
    data.mkdir()
    for split in ('train', 'val'):
        np.random.randint(50257, size=3000).astype(np.uint16).tofile(data / f'{split}.bin')
    small = (*TINY_ARGS, '--n_layer=1', '--n_head=1', '--max_iters=2', '--eval_interval=2',
             f'--data_dir={data}')

    def run(config, name, *args):
        return train(f'config/{config}.py', *small, f'--out_dir={tmp_path / name}', *args)
    one = run('train_11', 'one')
    assert one['model'].config.attn_type == 'GK' and set(evaluations(one['log'])) == {0, 2}
    pointwise = run('PA', 'PA', f'--init_from={gpt2_folder}')
    assert pointwise['model'].config.attn_type == 'PA_gelu' and 2 in evaluations(pointwise['log'])
    for name, trained in (('one', one), ('PA', pointwise)):
        evaluated = run('EVAL', name)
        assert not losses(evaluated['log'])
        assert list(evaluations(evaluated['log']).values()) == [evaluations(trained['log'])[2]]
        assert evaluated['model'].config.attn_type == trained['model'].config.attn_type


def test_finetune_without_a_source_is_one_line(train, tmp_path):
    with pytest.raises(FileNotFoundError, match='ckpt.pt'):
        train('--init_from=finetune')


def test_a_run_with_its_own_tokenizer_tells_bits_per_byte_and_keeps_the_tokenizer(train, tmp_path, run_here):
    write_text_dataset(tmp_path / 'data', 'Uma avó faz pão, e 1995 crianças cantam. ' * 99, 'bpe', 'us',
                       vocab_size=300)
    script = train('--max_iters=2', '--eval_interval=2', data_dir=tmp_path / 'data')
    line = re.search(r'^step 2: train loss [\d.]+, val loss [\d.]+, (.*)$', script['log'], re.M)[1]
    found = re.fullmatch(r'train ([\d.]+) bits/byte, val ([\d.]+) bits/byte', line)
    logged = [e for e in map(json.loads, (tmp_path / 'out/log.jsonl').read_text().splitlines())
              if 'val_loss' in e][-1]
    assert [*map(float, found.groups())] == [round(logged[f'{s}_bits_per_byte'], 4) for s in ('train', 'val')]
    assert re.search(r'^found vocab_size = \d+ \(inside .*tokenizer.json\)', script['log'], re.M)
    shutil.rmtree(tmp_path / 'data')
    log = run_here('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1', '--device=cpu',
                   '--start=Uma avó', '--max_new_tokens=20')['log']
    assert '\nUma avó' in log
    run_here('export.py', f'--out_dir={tmp_path / "out"}', f'--export_dir={tmp_path / "exported"}')
    assert (tmp_path / 'exported/tokenizer.json').read_text(encoding='utf-8') == script['tokenizer'].json
    write_text_dataset(tmp_path / 'same', 'Uma avó canta. ' * 99, str(tmp_path / 'exported'), 'us')
    write_text_dataset(tmp_path / 'other', 'Uma avó canta. ' * 99, 'bpe', 'us', vocab_size=260)
    train(f'--init_from={tmp_path / "exported"}', '--max_iters=0', data_dir=tmp_path / 'same')
    with pytest.raises(ValueError, match='another tokenizer .* --tokenizer=.*exported'):
        train(f'--init_from={tmp_path / "exported"}', '--max_iters=0', data_dir=tmp_path / 'other')
    with pytest.raises(ValueError, match='another tokenizer than that of'):
        train('--init_from=resume', data_dir=tmp_path / 'other')


def test_gpt2_is_not_fine_tuned_on_characters(train, gpt2_folder):
    with pytest.raises(ValueError, match='gpt2 has another tokenizer than .*--tokenizer=gpt2'):
        train(f'--init_from={gpt2_folder}')


def test_a_run_is_not_resumed_on_data_of_another_tokenizer(train, tmp_path, char_data):
    train('--max_iters=2')
    shutil.copytree(char_data, tmp_path / 'bpe')
    (tmp_path / 'bpe/meta.pkl').unlink()
    with pytest.raises(ValueError, match='meta.pkl is missing, but dataset.json says .* are characters'):
        train('--init_from=resume', data_dir=tmp_path / 'bpe')
    (tmp_path / 'bpe/dataset.json').unlink()
    with pytest.raises(ValueError, match='another tokenizer'):
        train('--init_from=resume', data_dir=tmp_path / 'bpe')


def test_settings_that_the_checkpoint_overrules_are_told_in_one_line(train):
    train('--max_iters=2')
    log = train('--max_iters=3', '--init_from=auto', '--n_layer=6', '--bias=True', '--n_kv_head=2')['log']
    assert '\nas in the checkpoint: n_layer=2 (not 6), bias=False (not True)\n' in log  # 2 of 2 heads are all
    assert 'as in the checkpoint' not in train('--max_iters=4', '--init_from=auto', '--dropout=0.1')['log']


def test_run_stopped_before_its_first_model_can_be_fine_tuned_and_evaluated(train, tmp_path):
    train('--max_iters=2')
    (tmp_path / 'out/ckpt.pt').unlink()
    for args in (['--init_from=finetune', f'--finetune_from={tmp_path / "out"}'],
                 ['--init_from=resume', '--eval_only', f'--out_dir={tmp_path / "out"}']):
        log = train('--max_iters=0', *args, out_dir=tmp_path / 'other')['log']
        assert f'taking {tmp_path / "out/latest.pt"}, the state of iteration 3' in log


def test_run_named_as_a_gpt2_is_refused_with_the_ways_to_go_on_from_it(train, tmp_path):
    train('--max_iters=0')
    with pytest.raises(ValueError, match='--init_from=finetune --finetune_from=.*out .*--init_from=resume'):
        train(f'--init_from={tmp_path / "out"}', out_dir=tmp_path / 'other')


def test_dataset_is_looked_for_in_the_repository_too(train, char_data, tmp_path, monkeypatch):
    monkeypatch.setattr(support.text.dataset, 'ROOT', tmp_path / 'repository')
    shutil.copytree(char_data, tmp_path / 'repository/data/words')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    there = f'there is no {os.path.join("data", "words")} here: using {tmp_path / "repository/data/words"}'
    script = train('--max_iters=0', '--dataset=words', data_dir='')
    assert script['log'].count(there) == 1 and script['folder'] == str(tmp_path / 'repository/data/words')
    shutil.copytree(char_data, tmp_path / 'elsewhere/data/words')
    assert train('--max_iters=0', '--dataset=words', data_dir='')['folder'] == os.path.join('data', 'words')


def test_run_without_settings_names_small_data_first(train, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(support.text.dataset, 'ROOT', tmp_path)
    with pytest.raises(FileNotFoundError, match='^to begin small, .*train_shakespeare_char_cpu.py; .*90 GB'):
        train(data_dir='')
    with pytest.raises(FileNotFoundError, match='^data.words.train.bin is missing'):
        train('--dataset=words', data_dir='')


def test_no_gradient_scaler_on_a_cpu(train):
    script = train('--max_iters=1', '--dtype=float16')
    assert not script['scaler'].is_enabled() and script['run'].dtype == 'float16'


def test_every_config_file_fits_train_py(train, tmp_path):
    for path in sorted((ROOT / 'config').glob('*.py')):
        with pytest.raises(FileNotFoundError, match='train.bin is missing'):
            train(str(path), '--device=cpu', '--compile=False', data_dir=tmp_path / 'nowhere')
    assert path


def fake_wandb(folder, body):
    (folder / 'wandb.py').write_text(body, encoding='utf-8')
    return {'PYTHONPATH': str(folder)}


RECORDER = '''
import json, os
def init(**settings): pass
def log(values): print(json.dumps(values), file=open(os.environ['RECORD'], 'a'))
def finish(): pass
'''


def test_two_processes_equal_one(run_script, char_data, tmp_path):
    """Evaluated after each of 20 updates, in full precision, which the log has not."""
    records = []
    for launcher in ((), ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')):
        record = tmp_path / f'record{len(records)}'
        env = fake_wandb(tmp_path, RECORDER) | {'RECORD': str(record), 'OMP_NUM_THREADS': '1'}
        done = run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}',
                          '--gradient_accumulation_steps=4', '--learning_rate=1e-2', '--max_iters=20',
                          '--eval_interval=1', '--wandb_log', env=env, launcher=launcher)
        assert len(losses(done.stdout)) == 21
        records.append([e for e in map(json.loads, record.read_text().splitlines()) if 'val/loss' in e])
    one, two = records
    assert len(one) == len(two) == 21
    for a, b in zip(one, two, strict=True):
        assert set(a) >= {'iter', 'train/loss', 'val/loss', 'lr', 'mfu', 'train/bits_per_byte'}
        assert abs(a['train/loss'] - b['train/loss']) < 1e-5 and abs(a['val/loss'] - b['val/loss']) < 1e-5
        for split in ('train', 'val'):  # a character is a byte here
            assert math.isclose(a[f'{split}/bits_per_byte'], a[f'{split}/loss'] / math.log(2))
            assert math.isclose(b[f'{split}/bits_per_byte'], b[f'{split}/loss'] / math.log(2))
    assert one[-1]['val/loss'] < one[0]['val/loss'] - 0.1


def test_gradients_are_synchronised_in_the_last_micro_step_only(train, monkeypatch):
    synchronised = []

    class Recorder(torch.nn.Module):
        """In the place of DDP, with its interface."""

        def __init__(self, module, device_ids, gradient_as_bucket_view):
            super().__init__()
            self.module, self.held = module, False

        @contextmanager
        def no_sync(self):
            self.held = True
            yield
            self.held = False

        def forward(self, *args, **kwargs):
            synchronised.append(not self.held)
            return self.module(*args, **kwargs)

    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', Recorder)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, timeout: None)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda tensor, **_: None)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', lambda values: None)
    monkeypatch.setattr(torch.distributed, 'all_gather_object', lambda values, value: None)
    monkeypatch.setattr(torch.distributed, 'new_group', lambda backend, timeout: None)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    train('--max_iters=1', '--gradient_accumulation_steps=6')
    assert synchronised == [False, False, True] * 2


@pytest.mark.parametrize('body', [
    'raise ImportError("broken")',
    'def init(**settings): raise RuntimeError("no key")',
    'def init(**settings): pass\ndef log(values): raise OSError("no network")\ndef finish(): 1 / 0',
])
def test_a_broken_wandb_leaves_the_run_whole(train, tmp_path, monkeypatch, body):
    fake_wandb(tmp_path, body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    log = train('--max_iters=3', '--eval_interval=1', '--wandb_log')['log']
    sys.modules.pop('wandb', None)
    assert len(losses(log)) == 4 and log.count('wandb is off') == 1


@pytest.mark.skipif(shutil.which('g++') is None or importlib.util.find_spec('torch._inductor') is None,
                    reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_run_equals_eager_run(train, tmp_path):
    args = ('--max_iters=4', '--n_layer=1')
    eager = losses(train(*args)['log'])
    compiled = losses(train(*args, '--compile=True', out_dir=tmp_path / 'compiled')['log'])
    assert eager == pytest.approx(compiled, abs=2e-4)
    assert all(k.startswith(('transformer.', 'lm_head.')) for k in
               torch.load(tmp_path / 'compiled/ckpt.pt')['model'])


def damage(data, kind):
    """Spoil a copy of the small data in the way of `kind`; returns what the error must mention."""
    path = data / 'train.bin'
    tokens = np.fromfile(path, np.uint16)
    if kind == 'missing':
        path.unlink()
        return 'train.bin is missing'
    if kind == 'odd':
        path.write_bytes(path.read_bytes()[:-1])
        return 'truncated'
    if kind == 'truncated':
        tokens[:-100].tofile(path)
        return 'truncated'
    (data / 'dataset.json').unlink()
    if kind == 'id beyond the vocabulary':
        tokens[77] = 60000
        tokens.tofile(path)
        return 'token id 60000'
    tokens[:10].tofile(data / 'val.bin')
    return 'too few for block_size'


@pytest.mark.parametrize('kind', ['missing', 'odd', 'truncated', 'id beyond the vocabulary', 'short split'])
def test_damaged_data_is_one_line(run_script, char_data, tmp_path, kind):
    data = shutil.copytree(char_data, tmp_path / 'data')
    reason = damage(data, kind)
    done = run_script('train.py', *TINY_ARGS, f'--data_dir={data}', f'--out_dir={tmp_path / "out"}', ok=False)
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args, reason', [
    (['--learning_rat=1'], 'Unknown config key: learning_rat (did you mean learning_rate'),
    (['CONFIG'], 'Unknown config key: bach_size (did you mean batch_size'),
    (['--batch_size=many'], 'batch_size takes int'),
    (['--init_from=resume'], 'ckpt.pt is missing'),
    (['--init_from=gpt3'], 'gpt3 is neither'),
    (['--device=tpu'], 'device=tpu is not on this machine'),
    (['--n_embd=33'], 'must be a multiple of n_head'),
    (['config/no_such.py'], 'no config config/no_such.py'),
])
def test_a_mistake_is_one_line(run_script, char_data, tmp_path, args, reason):
    config = tmp_path / 'wrong.py'
    config.write_text('bach_size = 3\n')
    args = [str(config) if a == 'CONFIG' else a for a in args]
    done = run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}',
                      *args, ok=False)
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_file_that_is_no_checkpoint_is_one_line_and_stays(run_script, char_data, tmp_path):
    (tmp_path / 'out').mkdir()
    path = tmp_path / 'out/ckpt.pt'
    path.write_bytes(b'not a checkpoint')
    done = run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={path.parent}',
                      '--init_from=resume', ok=False)
    assert 'is not a checkpoint' in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert path.read_bytes() == b'not a checkpoint'


def test_accumulation_that_does_not_divide_is_refused(run_script, char_data, tmp_path):
    done = run_script('train.py', *TINY_ARGS, f'--data_dir={char_data}', f'--out_dir={tmp_path / "out"}',
                      '--gradient_accumulation_steps=3', ok=False,
                      launcher=('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'))
    assert 'ValueError: gradient_accumulation_steps=3 counts over all processes' in done.stderr


@pytest.mark.parametrize('setting, told', [
    ('grad_clip=-1', 'at least 0 and finite'), ('weight_decay=-1', 'at least 0'), ('ema_decay=2', 'below 1'),
    ('eval_iters=-1', 'at least 0'), ('beta1=2', 'below 1'), ('learning_rate=-1', 'at least 0'),
    ('learning_rate=1e999', 'finite'), (f'seed={10**22}', '64 bits'), ('dropout=1', 'below 1'),
    ('n_layer=0', 'at least 1'), ('lora_alpha=-1', 'at least 0'), ('batch_size=0', 'at least 1'),
])
def test_settings_that_cannot_be_meant_are_refused_with_their_range(setting, told, train, tmp_path):
    with pytest.raises(ValueError, match=f'^{setting.split("=")[0]}=.* must be .*{told}'):
        train(f'--{setting}')
    assert not (tmp_path / 'out').exists()


def test_whole_number_written_as_a_float_is_one(train):
    assert list(losses(train('--max_iters=2e0')['log'])) == [0, 1, 2]
    with pytest.raises(ValueError, match='takes int'):
        train('--max_iters=2.5')
