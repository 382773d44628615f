"""eval.py and lm-eval's adapter: the figures against plain computations and against lm-eval's own."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_model, scrambled, tiny

from support.errors import USER_ERRORS
from support.hub.exporting import write_tokenizer
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset
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


def test_lambada_equals_a_plain_computation(evaluate, gpt2, lambada_file):
    scores = [plain_score(gpt2[1], before, f' {word}') for before, _, word in
              (json.loads(line)['text'].rpartition(' ') for line in lambada_file.open())]
    right = sum(greedy for _, greedy in scores) / len(scores)
    assert 0 < right < 1
    found = evaluate(f'--init_from={gpt2[0]}', '--task=lambada', f'--source={lambada_file}',
                     '--batch_size=5')['lambada']
    assert found['acc'] == right and found['n'] == 24
    assert math.isclose(math.log(found['perplexity']), -np.mean([p for p, _ in scores]), rel_tol=1e-5)


def assert_figures(found, nats, n, n_bytes):
    assert found['n'] == n and math.isclose(math.log(found['perplexity']), nats / n, rel_tol=1e-5)
    assert math.isclose(found.get('loss', nats / n), nats / n, rel_tol=1e-5)
    assert math.isclose(found['bits_per_byte'], nats / math.log(2) / n_bytes, rel_tol=1e-5)


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


def test_loss_of_a_checkpoint_is_over_all_data_unless_limited(evaluate, char_run, run_here, tmp_path):
    found = evaluate(f'--out_dir={char_run[0]}')
    data = Dataset(tmp_path / 'data')
    ids = data['val'][:].tolist()
    n_bytes = len(data.tokenizer.decode(ids[1:]).encode())
    assert_figures(found['loss'], plain_nats(char_run[1], ids), len(ids) - 1, n_bytes)
    assert evaluate(f'--out_dir={char_run[0]}', '--limit=2', '--batch_size=1')['loss']['n'] == 2 * 32
    run_here('export.py', f'--out_dir={char_run[0]}', f'--export_dir={tmp_path / "exported"}')
    assert found == evaluate(f'--init_from={tmp_path / "exported"}', f'--data_dir={tmp_path / "data"}')


def test_diverged_model_has_a_loss_and_an_infinite_perplexity(evaluate, char_run, tmp_path):
    model = scrambled(char_run[1], 100.0)
    found = evaluate(f'--out_dir={save_model(tmp_path / "diverged", model, tmp_path / "data")}')['loss']
    assert found['loss'] > 709 and found['perplexity'] == math.inf


def test_text_is_scored_in_nats_and_bits_a_byte_and_token_by_token(run_here, char_run, tmp_path):
    text = 'é€ ab\n' * 5  # of one window
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    run_here('eval.py', '--device=cpu', f'--out_dir={char_run[0]}', f'--text={tmp_path / "text.txt"}',
             f'--json={tmp_path / "found.jsonl"}')
    *tokens, report = map(json.loads, (tmp_path / 'found.jsonl').read_text().splitlines())
    ids = Dataset(tmp_path / 'data').tokenizer.encode('\n' + text)
    nats = plain_nats(char_run[1], ids)
    assert_figures(report['results']['text'], nats, len(text), len(text.encode()))
    assert math.isclose(report['results']['text']['nats'], nats, rel_tol=1e-5)
    assert ''.join(t['text'] for t in tokens) == text and [t['id'] for t in tokens] == ids[1:]
    assert math.isclose(-sum(t['log_p'] for t in tokens), nats, rel_tol=1e-5)


@pytest.mark.parametrize('args, reason', [
    ('--task=lambda', 'not one of loss, int8, int4, lambada'), ('--text=gone.txt', 'gone.txt is missing'),
    ('--data_dir={other}', 'was prepared with another tokenizer'),
    ('--json=missing/x.json', 'json=missing/x.json can\'t be written'), ('--batch_size=0', 'at least 1'),
    ('--init_from=scratch', 'was never trained')])
def test_mistake_is_one_line_before_the_evaluation(args, reason, run_here, char_run, char_data, capsys):
    with pytest.raises(USER_ERRORS) as caught:
        run_here('eval.py', f'--out_dir={char_run[0]}', *args.format(other=char_data).split())
    assert reason in str(caught.value) and '\n' not in str(caught.value)
    assert 'metric' not in capsys.readouterr().out


def test_figures_of_lm_eval_s_tasks_equal_its_own(evaluate, gpt2, lambada_file, monkeypatch, tmp_path):
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    import datasets
    from lm_eval import simple_evaluate, tasks
    from lm_eval.models.huggingface import HFLM

    from support.evaluating import lm_eval_adapter
    load, files = datasets.load_dataset, {'test': str(lambada_file)}
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: load(
        'json', data_files=files, cache_dir=str(tmp_path / 'cache')))
    folder = str(Path(tasks.__file__).parent / 'lambada')  # reading the defaults takes long
    manager = lm_eval_adapter.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(lm_eval_adapter, 'TaskManager', lambda: manager)
    theirs = simple_evaluate(HFLM(pretrained=str(gpt2[0]), device='cpu', dtype='float32', batch_size=4),
                             tasks=['lambada_openai'], task_manager=manager, bootstrap_iters=0)['results']
    found = evaluate(f'--init_from={gpt2[0]}', '--task=lm_eval:lambada_openai')['lambada_openai']
    assert found['acc'] == theirs['lambada_openai']['acc,none']
    assert math.isclose(found['perplexity'], theirs['lambada_openai']['perplexity,none'], rel_tol=1e-3)
