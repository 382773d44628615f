"""eval.py and lm-eval's adapter: the figures against plain computations and against lm-eval's own."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from test_scoring import ENDINGS, HELLASWAG, QUESTIONS, write_hellaswag
from torch.nn import functional as F

from model import GPT, GPTConfig
from support.hub.huggingface import write_tokenizer
from support.machine.runtime import Runtime
from support.training import checkpoint
from support.training.state import model_args
from support.text.prepare import write_dataset, write_text_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, read_tokenizer
from support.text.tokens import open_split

PASSAGES = ['the old man walked down to the sea and looked at the', 'she said that she would', 'it was a',
            'Yes. "No," he', 'one two three four five six seven eight nine ten ' * 8 + 'and', 'they ate the']


@pytest.fixture
def gpt2(tmp_path, bpe):
    """A folder with a random GPT-2 that is sure of itself, and transformers' model of it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    model.save_pretrained(tmp_path / 'gpt2')
    write_tokenizer(tmp_path / 'gpt2', GPT2Tokenizer(), 64)
    return tmp_path / 'gpt2', model


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
def hellaswag_file(tmp_path):
    return write_hellaswag(tmp_path / 'hellaswag.jsonl')


def report(script):
    """The results of a run of eval.py."""
    return json.loads(script['log'].splitlines()[-1])['results']


def test_lambada_equals_a_plain_computation(run_here, gpt2, lambada_file):
    scores = [plain_score(gpt2[1], before, f' {word}') for before, _, word in
              (json.loads(line)['text'].rpartition(' ') for line in lambada_file.open())]
    acc = sum(greedy for _, greedy in scores) / len(scores)
    assert 0 < acc < 1
    for batch_size in (1, 5):
        found = report(run_here('eval.py', f'--init_from={gpt2[0]}', '--task=lambada', '--device=cpu',
                                f'--source={lambada_file}', f'--batch_size={batch_size}'))['lambada']
        assert found['acc'] == acc and found['n'] == 24
        assert math.isclose(math.log(found['perplexity']), -np.mean([p for p, _ in scores]), rel_tol=1e-5)


def test_hellaswag_equals_a_plain_computation(run_here, gpt2, hellaswag_file):
    hits = []
    for (*_, endings, label), question in zip(HELLASWAG, QUESTIONS):
        endings = [ENDINGS.get(ending, ending) for ending in endings]
        log_p = [plain_score(gpt2[1], question, f' {ending}')[0] for ending in endings]
        by_length = [p / len(ending) for p, ending in zip(log_p, endings)]
        hits.append([np.argmax(p) == label for p in (log_p, by_length)])
    acc, acc_norm = np.mean(hits, axis=0)
    assert 0 < acc < 1 and 0 < acc_norm < 1 and acc != acc_norm
    found = report(run_here('eval.py', f'--init_from={gpt2[0]}', '--task=hellaswag', '--device=cpu',
                            f'--source={hellaswag_file}', '--batch_size=3'))['hellaswag']
    assert found == {'acc': acc, 'acc_norm': acc_norm, 'n': 4}


@pytest.fixture
def byte_pairs(tmp_path, bpe):
    """A dataset of three documents in GPT-2's encoding, and its text."""
    documents = ['Now is the winter of our discontent. ' * 9, 'Größe: 5 €, 😀!\n' * 12, 'The end.']
    ids = [i for text in documents for i in (*GPT2Tokenizer().encode(text), 50256)]
    write_dataset(tmp_path / 'byte_pairs', {'train': [ids], 'val': [ids]}, GPT2Tokenizer(), 'a test')
    return tmp_path / 'byte_pairs', ids, ''.join(documents)


def test_loss_of_gpt2_equals_a_plain_computation(run_here, gpt2, byte_pairs):
    folder, ids, text = byte_pairs
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        window = torch.tensor([ids[start:start + 65]])
        with torch.no_grad():
            logits = gpt2[1](window[:, :-1]).logits
        nats += F.cross_entropy(logits[0], window[0, 1:], reduction='sum').item()
    found = report(run_here('eval.py', f'--init_from={gpt2[0]}', f'--data_dir={folder}', '--batch_size=3',
                            '--device=cpu'))['loss']
    n = len(ids) - 1
    n_bytes = len(text.encode()) - len('Now')  # the first token is no target
    assert found['n'] == n and math.isclose(found['loss'], nats / n, rel_tol=1e-5)
    assert math.isclose(math.log(found['perplexity']), nats / n, rel_tol=1e-5)
    assert math.isclose(found['bits_per_byte'], nats / math.log(2) / n_bytes, rel_tol=1e-5)


@pytest.fixture
def char_run(tmp_path):
    """A run's folder, its model random, its data text in which characters take one to four bytes."""
    text = 'aé€😀 b\n' * 150
    write_text_dataset(tmp_path / 'data', text, 'char', 'a test')
    tokenizer = CharTokenizer.of_text(text)
    model = GPT(GPTConfig(**(TINY | {'vocab_size': tokenizer.n_vocab}))).eval()
    checkpoint.save(tmp_path / 'run/ckpt.pt', {
        'model': model.state_dict(), 'model_args': model_args(model.config), 'iter_num': 7,
        'tokenizer': tokenizer.to_dict(), 'config': {'data_dir': str(tmp_path / 'data')}})
    return tmp_path / 'run', model


def test_loss_of_a_checkpoint_is_over_all_of_its_data(run_script, char_run, tmp_path):
    run_script('eval.py', f'--out_dir={char_run[0]}', f'--json={tmp_path}/found.json', '--device=cpu')
    found = json.loads((tmp_path / 'found.json').read_text())
    ids = torch.from_numpy(open_split(tmp_path / 'data', 'val').astype(np.int64))
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        x, y = ids[None, start:start + 32], ids[None, start + 1:start + 33]
        with torch.no_grad():
            nats += char_run[1](x[:, :y.shape[1]], y)[1].item() * y.shape[1]
    n_bytes = len(read_tokenizer(tmp_path / 'data').decode(ids[1:].tolist()).encode())
    assert found['results']['loss']['n'] == len(ids) - 1 and found['iter'] == 7
    assert math.isclose(found['results']['loss']['loss'], nats / (len(ids) - 1), rel_tol=1e-5)
    assert math.isclose(found['results']['loss']['bits_per_byte'], nats / math.log(2) / n_bytes, rel_tol=1e-5)


def test_several_tasks_make_one_table(run_here, char_run, tmp_path):
    path = tmp_path / 'passages.json'
    path.write_text(json.dumps([{'text': 'a b é'}, {'text': '€ a'}, {'text': 'unread'}]), encoding='utf-8')
    done = run_here('eval.py', f'--out_dir={char_run[0]}', '--task=lambada,loss', f'--source={path}',
                    '--limit=2', '--device=cpu')
    found = report(done)
    assert list(found) == ['lambada', 'loss'] and found['lambada']['n'] == 2
    for task, metrics in found.items():
        for metric in set(metrics) - {'n'}:
            row = rf'^{task} +{metric} +{metrics[metric]:.4f} +{metrics["n"]:,}$'
            assert re.search(row, done['log'], re.M)


@pytest.mark.parametrize('args, reason', [
    (['--task=lambda'], 'task=lambda is not one of loss, int8, lambada, hellaswag, lm_eval:NAME'),
    (['--task=lambada', '--source=gone.jsonl'], 'gone.jsonl is missing'),
    (['--task=lambada', '--source=gone.parquet'], 'gone.parquet is missing'),
    (['--task=hellaswag', '--source={passages}'], 'not all with activity_label, ctx_a, ctx_b'),
    (['--task=lambada', '--source={passages}'], "not in this model's vocabulary: 'T'"),
    (['--task=lambada', '--source={long}'], 'block_size=32 is too short for an answer of 41 tokens'),
    (['--data_dir={other}'], 'was prepared with another tokenizer'),
    (['--task=lm_eval:piqa'], 'pip install "lm-eval'),
])
def test_a_mistake_is_one_line(run_here, char_run, char_data, tmp_path, monkeypatch, args, reason):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.delitem(sys.modules, 'support.evaluating.lm_eval_adapter', raising=False)
    paths = {'passages': tmp_path / 'passages.jsonl', 'long': tmp_path / 'long.jsonl', 'other': char_data}
    paths['passages'].write_text('{"text": "The end"}\n')
    paths['long'].write_text(json.dumps({'text': 'a ' + 'b' * 40}))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)) as caught:
        run_here('eval.py', f'--out_dir={char_run[0]}', *(arg.format(**paths) for arg in args))
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def lm_eval_offline(monkeypatch, tmp_path, lambada_file, hellaswag_file):
    """lm-eval's own LAMBADA and HellaSwag, on the local items."""
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    import datasets
    from lm_eval import tasks
    files = {'EleutherAI/lambada_openai': {'test': str(lambada_file)},
             'Rowan/hellaswag': {'train': str(hellaswag_file), 'validation': str(hellaswag_file)}}
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, *_, **__: load(
        'json', data_files=files[path], cache_dir=str(tmp_path / 'cache')))
    folders = [str(Path(tasks.__file__).parent / name) for name in ('hellaswag', 'lambada')]
    from support.evaluating import lm_eval_adapter
    # only these tasks: reading the defaults takes long
    manager = lm_eval_adapter.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(lm_eval_adapter, 'TaskManager', lambda: manager)
    return manager


def test_our_figures_equal_lm_eval_s_own(run_here, gpt2, lm_eval_offline, lambada_file, hellaswag_file):
    pytest.importorskip('accelerate', reason='lm-eval needs accelerate for transformers models')
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    names = ['lambada_openai', 'hellaswag']
    theirs = simple_evaluate(HFLM(pretrained=str(gpt2[0]), device='cpu', dtype='float32', batch_size=4),
                             tasks=names, task_manager=lm_eval_offline, bootstrap_iters=0)['results']
    ours = {}
    for task, source in (('lambada', lambada_file), ('hellaswag', hellaswag_file)):
        ours |= report(run_here('eval.py', f'--init_from={gpt2[0]}', f'--task={task}', f'--source={source}',
                                '--device=cpu'))
    adapted = report(run_here('eval.py', f'--init_from={gpt2[0]}', '--device=cpu',
                              '--task=lm_eval:lambada_openai,lm_eval:hellaswag'))
    for found in ({'lambada_openai': ours['lambada'], 'hellaswag': ours['hellaswag']}, adapted):
        assert found['lambada_openai']['acc'] == theirs['lambada_openai']['acc,none']
        assert math.isclose(math.log(found['lambada_openai']['perplexity']),
                            math.log(theirs['lambada_openai']['perplexity,none']), rel_tol=1e-5)
        assert found['hellaswag'] == {'acc': theirs['hellaswag']['acc,none'], 'n': 4,
                                      'acc_norm': theirs['hellaswag']['acc_norm,none']}


def test_rolling_scores_and_generated_text_equal_lm_eval_s_own(gpt2, lm_eval_offline):
    pytest.importorskip('accelerate', reason='lm-eval needs accelerate for transformers models')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from support.evaluating.lm_eval_adapter import LMEvalModel
    theirs = HFLM(pretrained=str(gpt2[0]), device='cpu', dtype='float32', batch_size=1)
    model = GPT.from_pretrained(str(gpt2[0])).eval()
    ours = LMEvalModel(model, GPT2Tokenizer(), Runtime('cpu', 'float32', False, 'gloo'), 4)
    texts = [QUESTIONS[2] * 2, 'Hello', PASSAGES[4]]
    requests = [Instance('loglikelihood_rolling', {}, (text,), 0) for text in texts]
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests),
                               rtol=1e-5)
    first = theirs.generate_until([Instance('generate_until', {}, ('Two cats', {'max_gen_toks': 40}), 0)])[0]
    stop = first[len(first) // 2:][:5]
    later = first[first.index(stop) + 5:][:5]
    requests = [Instance('generate_until', {}, (text, {'until': [later, stop], 'max_gen_toks': 40}), 0)
                for text in ['Two cats', *texts]]
    generated = ours.generate_until(requests)
    assert generated == theirs.generate_until(requests) and len(generated[0]) < len(first)
