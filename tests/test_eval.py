"""eval.py and lm-eval's adapter: the figures against plain computations and against lm-eval's own."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, save_model, tiny
from test_scoring import ENDINGS, HELLASWAG, QUESTIONS, write_hellaswag
from torch.nn import functional as F

from model import GPT
from support.errors import USER_ERRORS
from support.evaluating.scoring import Scorer
from support.hub.exporting import write_tokenizer
from support.machine.runtime import Runtime
from support.text.dataset import Dataset
from support.text.prepare import write_dataset, write_text_dataset
from support.text.tokenizer import GPT2Tokenizer

PASSAGES = ['the old man walked down to the sea and looked at the', 'she said that she would', 'it was a',
            'Yes. "No," he', 'one two three four five six seven eight nine ten ' * 8 + 'and', 'they ate the']


@pytest.fixture
def gpt2(gpt2_folder, bpe):
    """A folder with a random GPT-2 that is sure of itself, and transformers' model of it."""
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    model.save_pretrained(gpt2_folder)
    write_tokenizer(gpt2_folder, GPT2Tokenizer(), 64)
    return gpt2_folder, model


@torch.no_grad()
def plain_score(model, before, after):
    """One text with transformers' model: its log-probability, and whether all of it is the likeliest."""
    import tiktoken
    ids = [*map(tiktoken.get_encoding('gpt2').encode, (before, after))]
    idx = torch.tensor([(ids[0] + ids[1])[-65:]])
    log_p = model(idx[:, :-1]).logits[0].log_softmax(-1)[-len(ids[1]):]
    return log_p[range(len(ids[1])), ids[1]].sum().item(), log_p.argmax(-1).tolist() == ids[1]


@pytest.fixture
def lambada_file(tmp_path, gpt2):
    """Passages that end in the token that the model finds likeliest, where that is a word."""
    import tiktoken
    coder, lines = tiktoken.get_encoding('gpt2'), []
    for number, passage in enumerate(PASSAGES * 4):
        before = f'{number} {passage}'
        with torch.no_grad():
            logits = gpt2[1](torch.tensor([coder.encode(before)[-64:]])).logits
        likeliest = coder.decode([logits[0, -1].argmax().item()])
        word = likeliest if re.fullmatch(' [A-Za-z]+', likeliest) else ' sky'
        lines.append(json.dumps({'text': before + word}))
    path = tmp_path / 'lambada.jsonl'
    path.write_text('\n'.join(lines), encoding='utf-8')
    return path


@pytest.fixture
def evaluate(run_here):
    """A function that runs eval.py on a CPU, and gives its results."""
    def run(*args):
        return json.loads(run_here('eval.py', '--device=cpu', *args)['log'].splitlines()[-1])['results']
    return run


def test_lambada_and_hellaswag_equal_a_plain_computation(evaluate, gpt2, lambada_file, tmp_path):
    scores = [plain_score(gpt2[1], before, f' {word}') for before, _, word in
              (json.loads(line)['text'].rpartition(' ') for line in lambada_file.open())]
    right = sum(greedy for _, greedy in scores) / len(scores)
    assert 0 < right < 1
    for batch_size in (1, 5):
        found = evaluate(f'--init_from={gpt2[0]}', '--task=lambada', f'--source={lambada_file}',
                         f'--batch_size={batch_size}')['lambada']
        assert found['acc'] == right and found['n'] == 24
        assert math.isclose(math.log(found['perplexity']), -np.mean([p for p, _ in scores]), rel_tol=1e-5)
    hits = []
    for (*_, endings, label), question in zip(HELLASWAG, QUESTIONS):
        endings = [ENDINGS.get(ending, ending) for ending in endings]
        log_p = [plain_score(gpt2[1], question, f' {ending}')[0] for ending in endings]
        by_length = [p / len(ending) for p, ending in zip(log_p, endings)]
        hits.append([np.argmax(p) == label for p in (log_p, by_length)])
    acc, acc_norm = np.mean(hits, axis=0)
    assert 0 < acc < 1 and 0 < acc_norm < 1 and acc != acc_norm
    found = evaluate(f'--init_from={gpt2[0]}', '--task=hellaswag', '--batch_size=3',
                     f'--source={write_hellaswag(tmp_path / "hellaswag.jsonl")}')
    assert found['hellaswag'] == {'acc': acc, 'acc_norm': acc_norm, 'n': 4}


def assert_figures(found, nats, n, n_bytes):
    assert found['n'] == n and math.isclose(math.log(found['perplexity']), nats / n, rel_tol=1e-5)
    assert math.isclose(found.get('loss', nats / n), nats / n, rel_tol=1e-5)
    assert math.isclose(found['bits_per_byte'], nats / math.log(2) / n_bytes, rel_tol=1e-5)


def test_loss_of_gpt2_equals_a_plain_computation(evaluate, gpt2, tmp_path):
    documents = ['Now is the winter of our discontent. ' * 9, 'Größe: 5 €, 😀!\n' * 12, 'The end.']
    ids = [i for text in documents for i in (*GPT2Tokenizer().encode(text), 50256)]
    write_dataset(tmp_path / 'data', {'train': [ids], 'val': [ids]}, GPT2Tokenizer(), 'a test')
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        window = torch.tensor([ids[start:start + 65]])
        with torch.no_grad():
            logits = gpt2[1](window[:, :-1]).logits
        nats += F.cross_entropy(logits[0], window[0, 1:], reduction='sum').item()
    found = evaluate(f'--init_from={gpt2[0]}', f'--data_dir={tmp_path / "data"}', '--batch_size=3')['loss']
    n_bytes = len(''.join(documents).encode()) - len('Now')  # the first token is no target
    assert_figures(found, nats, len(ids) - 1, n_bytes)


@pytest.fixture
def char_run(tmp_path):
    """A run's folder, its model random, its data text in which characters take one to four bytes."""
    write_text_dataset(tmp_path / 'data', 'aé€😀 b\n' * 150, 'char', 'a test')
    model = tiny(vocab_size=7)
    return save_model(tmp_path / 'run', model, tmp_path / 'data'), model.eval()


@torch.no_grad()
def plain_nats(model, ids):
    """Of the ids after the first, in windows side by side."""
    nats, ids = 0.0, torch.tensor([ids])
    for start in range(0, ids.shape[1] - 1, 32):
        x, y = ids[:, start:start + 32], ids[:, start + 1:start + 33]
        nats += model(x[:, :y.shape[1]], y)[1].item() * y.shape[1]
    return nats


def test_loss_of_a_checkpoint_is_over_all_of_its_data_and_limit_takes_less(
        evaluate, char_run, run_here, tmp_path):
    found = evaluate(f'--out_dir={char_run[0]}')
    data = Dataset(tmp_path / 'data')
    ids = data['val'][:].tolist()
    n_bytes = len(data.tokenizer.decode(ids[1:]).encode())
    assert_figures(found['loss'], plain_nats(char_run[1], ids), len(ids) - 1, n_bytes)
    assert evaluate(f'--out_dir={char_run[0]}', '--limit=2', '--batch_size=1')['loss']['n'] == 2 * 32
    run_here('export.py', f'--out_dir={char_run[0]}', f'--export_dir={tmp_path / "exported"}')
    with pytest.raises(ValueError, match='exported doesn.t say what it was trained on: add --dataset=NAME'):
        evaluate(f'--init_from={tmp_path / "exported"}')
    assert found == evaluate(f'--init_from={tmp_path / "exported"}', f'--data_dir={tmp_path / "data"}')


def test_text_is_scored_in_nats_and_bits_a_byte_and_token_by_token(run_here, char_run, tmp_path):
    text = 'é€ ab\n' * 5  # of one window
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    run_here('eval.py', '--device=cpu', f'--out_dir={char_run[0]}', f'--text={tmp_path / "text.txt"}',
             f'--json={tmp_path / "found.jsonl"}')
    *tokens, report = map(json.loads, (tmp_path / 'found.jsonl').read_text().splitlines())
    ids = Dataset(tmp_path / 'data').tokenizer.encode('\n' + text)
    nats = plain_nats(char_run[1], ids)
    assert list(report['results']) == ['text']
    assert_figures(report['results']['text'], nats, len(text), len(text.encode()))
    assert math.isclose(report['results']['text']['nats'], nats, rel_tol=1e-5)
    assert ''.join(t['text'] for t in tokens) == text and [t['id'] for t in tokens] == ids[1:]
    assert math.isclose(-sum(t['log_p'] for t in tokens), nats, rel_tol=1e-5)


def test_several_tasks_make_one_table_and_a_whole_split_shows_its_progress(char_run, tmp_path):
    pty, termios = pytest.importorskip('pty'), pytest.importorskip('termios')
    path, text = tmp_path / 'passages.json', tmp_path / 'text.txt'
    path.write_text(json.dumps([{'text': 'a b é'}, {'text': '€ a'}, {'text': 'unread'}]), encoding='utf-8')
    text.write_text('ab')
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, 'eval.py', f'--out_dir={char_run[0]}', '--task=lambada,loss,int8',
               f'--source={path}', f'--text={text}', '--limit=2', '--device=cpu']
    log = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, encoding='utf-8',
                         timeout=100, check=True).stdout
    assert 'val.bin: 100%' in os.read(main, 1 << 16).decode() and 'val.bin' not in log
    found = json.loads(log.splitlines()[-1])['results']
    assert list(found) == ['text', 'lambada', 'loss', 'int8'] and found['lambada']['n'] == 2
    assert found['int8']['loss_full'] == found['loss']['loss'] != found['int8']['loss_int8']
    for task, metrics in found.items():
        for metric in set(metrics) - {'n'}:
            row = rf'^{task} +{metric} +{metrics[metric]:.4f} +{metrics["n"]:,}$'
            assert re.search(row, log, re.M)


@pytest.mark.parametrize('args, reason', [
    ('--task=lambda', 'not one of loss, int8, int4, lambada, hellaswag, lm_eval:NAME, or --text'),
    ('--task=text', 'or --text=FILE'), ('--text=gone.txt', 'gone.txt is missing'),
    ('--text={empty}', 'there is no text to score'),
    ('--task=lambada --source=gone.jsonl', 'gone.jsonl is missing'),
    ('--task=lambada --source=gone.parquet', 'gone.parquet is missing'),
    ('--task=hellaswag --source={passages}', 'item 1 of 1 lacks activity_label, ctx_a'),
    ('--task=lambada --source={passages}', "not in this model's vocabulary: 'T'"),
    ('--task=lambada --source={long}', 'block_size=32 is too short for an answer of 41 tokens'),
    ('--source={passages}', 'is for task=lambada or hellaswag, not loss'),
    ('--text={passages} --split=train', 'split=train is for task=loss or int8 or int4, not text'),
    ('--task=lambada --data_dir={other}', 'is for task=loss or int8 or int4, not lambada'),
    ('--data_dir={other}', 'was prepared with another tokenizer'),
    ('--data_dir=/not/there', '/not/there/val.bin is missing'), ('--dataset=none', 'val.bin is missing'),
    ('--split=test', 'split=test is not one of train, val'),
    ('--json=missing/x.json', 'json=missing/x.json can\'t be written'), ('--json=tests', 'be written'),
    ('--limit=-1', 'limit=-1 must be at least 0'), ('--batch_size=0', 'batch_size=0 at least 1'),
    ('--task=int8 --weights=int8', 'leave weights=int8 out'), ('--init_from=scratch', 'was never trained'),
    ('--init_from=gone', 'gone is neither'), ('--task=lm_eval:piqa', 'pip install "lm-eval'),
])
def test_mistake_is_one_line_before_the_evaluation(args, reason, run_here, char_run, char_data, tmp_path,
                                                   monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.delitem(sys.modules, 'support.evaluating.lm_eval_adapter', raising=False)
    texts = {'passages': '{"text": "The end"}\n', 'long': json.dumps({'text': 'a ' + 'b' * 40}), 'empty': ''}
    for name, text in texts.items():
        (tmp_path / f'{name}.jsonl').write_text(text)
    paths = {name: tmp_path / f'{name}.jsonl' for name in texts} | {'other': char_data}
    with pytest.raises(USER_ERRORS) as caught:
        run_here('eval.py', f'--out_dir={char_run[0]}', *args.format(**paths).split())
    assert reason in str(caught.value) and '\n' not in str(caught.value)
    assert 'metric' not in capsys.readouterr().out


# ---------------------------------------------------------------------------- lm-eval

@pytest.fixture
def lm_eval_offline(monkeypatch, tmp_path, lambada_file):
    """lm-eval's own LAMBADA and HellaSwag, on the local items."""
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    pytest.importorskip('accelerate', reason='lm-eval needs accelerate for transformers models')
    import datasets
    from lm_eval import tasks
    hellaswag = str(write_hellaswag(tmp_path / 'hellaswag.jsonl'))
    files = {'EleutherAI/lambada_openai': {'test': str(lambada_file)},
             'Rowan/hellaswag': {'train': hellaswag, 'validation': hellaswag}}
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, *_, **__: load(
        'json', data_files=files[path], cache_dir=str(tmp_path / 'cache')))
    folders = [str(Path(tasks.__file__).parent / name) for name in ('hellaswag', 'lambada')]
    from support.evaluating import lm_eval_adapter
    # only these tasks: reading the defaults takes long
    manager = lm_eval_adapter.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(lm_eval_adapter, 'TaskManager', lambda: manager)
    return manager


def test_our_figures_equal_lm_eval_s_own(evaluate, gpt2, lm_eval_offline, lambada_file, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    theirs = simple_evaluate(HFLM(pretrained=str(gpt2[0]), device='cpu', dtype='float32', batch_size=4),
                             tasks=['lambada_openai', 'hellaswag'], task_manager=lm_eval_offline,
                             bootstrap_iters=0)['results']
    ours = {}
    for task, source in (('lambada', lambada_file), ('hellaswag', tmp_path / 'hellaswag.jsonl')):
        ours |= evaluate(f'--init_from={gpt2[0]}', f'--task={task}', f'--source={source}')
    adapted = evaluate(f'--init_from={gpt2[0]}', '--task=lm_eval:lambada_openai,lm_eval:hellaswag')
    for found in ({'lambada_openai': ours['lambada'], 'hellaswag': ours['hellaswag']}, adapted):
        assert found['lambada_openai']['acc'] == theirs['lambada_openai']['acc,none']
        assert math.isclose(math.log(found['lambada_openai']['perplexity']),
                            math.log(theirs['lambada_openai']['perplexity,none']), rel_tol=1e-5)
        assert found['hellaswag'] == {'acc': theirs['hellaswag']['acc,none'], 'n': 4,
                                      'acc_norm': theirs['hellaswag']['acc_norm,none']}


def test_rolling_scores_and_generated_text_equal_lm_eval_s_own(gpt2, lm_eval_offline):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from support.evaluating.lm_eval_adapter import LMEvalModel
    theirs = HFLM(pretrained=str(gpt2[0]), device='cpu', dtype='float32', batch_size=1)
    model, run = GPT.from_pretrained(str(gpt2[0])).eval(), Runtime('cpu', 'float32', False, 'gloo')
    scorer = Scorer(model, GPT2Tokenizer(), run, 4)
    ours = LMEvalModel(scorer)
    texts = [QUESTIONS[2] * 2, 'Hello', PASSAGES[4]]
    requests = [Instance('loglikelihood_rolling', {}, (text,), 0) for text in texts]
    expected = theirs.loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), expected, rtol=1e-5)
    np.testing.assert_allclose([scorer.whole_text(t)[1].sum() for t in texts], expected, rtol=1e-5)
    first = theirs.generate_until([Instance('generate_until', {}, ('Two cats', {'max_gen_toks': 40}), 0)])[0]
    stop = first[len(first) // 2:][:5]
    later = first[first.index(stop) + 5:][:5]
    requests = [Instance('generate_until', {}, (text, {'until': [later, stop], 'max_gen_toks': 40}), 0)
                for text in ['Two cats', *texts]]
    generated = ours.generate_until(requests)
    assert generated == theirs.generate_until(requests) and len(generated[0]) < len(first)
