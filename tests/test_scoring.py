"""scoring.py: which texts are scored, and that batches, files and padding change nothing."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig
from support.machine.runtime import Runtime
from support.training.loss import lean_loss
from support.evaluating.scoring import (TASKS, BitsPerByte, count_targets, encode_pair, mean_loss,
                                     measure_hellaswag, read_items, score_ids)
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, NoTokenizer
from support.text.tokens import eval_windows, read_windows

KEYS = ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label')
HELLASWAG = [  # as in the published files; and the questions that they become
    ('Roof shingle removal', 'A man is sitting on a roof.', 'he',
     ['is using wrap to wrap a pair of skis.', 'is ripping level tiles off.', "is holding a rubik's cube.",
      'starts pulling up roofing on a roof.'], 3),
    ('Finance and Business', '[header] How to sell [title] Look  at it. [step] Do this [substeps] now.', '',
     ['[substeps] Write it down.', 'Go [title] away  from here.', 'Sell.',
      'Café owners know [header] more.'], 2),
    ('Cats', 'Two cats sit. One runs,\u2028' + 'and runs, ' * 40, 'THE dog',
     ['barks.', 'sleeps all day long in the sun.', 'is a fish', 'meows a little.'], 1),
    ('Dogs', 'A dog sits.', 'it', ['barks at all the cats of the town.', 'sleeps.', 'a', 'the'], 2),
]
QUESTIONS = [
    'Roof shingle removal: A man is sitting on a roof. He',
    'Finance and Business: How to sell. Look at it. Do this now.',
    'Cats: Two cats sit. One runs,\u2028' + 'and runs, ' * 40 + 'The dog',
    'Dogs: A dog sits. It',
]
ENDINGS = {  # endings with marks, and what becomes of them
    '[substeps] Write it down.': ' Write it down.', 'Go [title] away  from here.': 'Go. away from here.',
    'Café owners know [header] more.': 'Café owners know more.'}


def write_hellaswag(path):
    lines = [json.dumps(dict(zip(KEYS, item)), ensure_ascii=False) for item in HELLASWAG]
    path.write_text('\n'.join(lines), encoding='utf-8')
    return path


@pytest.fixture
def hellaswag_file(tmp_path):
    return write_hellaswag(tmp_path / 'hellaswag.jsonl')


@pytest.mark.parametrize('attached', [lambda _: nullcontext(), lean_loss], ids=['plain', 'lean'])
def test_mean_loss_counts_every_target_once_whatever_the_batch(attached):
    model, run = GPT(GPTConfig(**TINY)).double(), Runtime('cpu', 'float32', False, 'gloo')
    tokens = torch.randint(64, (32 * 5 + 7,)).to(torch.uint16).numpy()
    ids, nats = torch.from_numpy(tokens.astype(np.int64))[None], 0.0
    for start in range(0, 32 * 5 + 6, 32):
        window = ids[:, start:start + 33]
        with torch.no_grad():
            nats += model(window[:, :-1], window[:, 1:])[1].item() * (window.shape[1] - 1)
    for batch_size in (1, 4):
        with attached(model):
            found = mean_loss(model, run, tokens, 32, batch_size)
        assert found == pytest.approx(nats / (32 * 5 + 6)) and model.training


def test_bits_per_byte_are_the_nats_over_the_bytes_of_the_text():
    model, run = GPT(GPTConfig(**TINY)).double(), Runtime('cpu', 'float32', False, 'gloo')
    tokenizer = CharTokenizer({i: chr(64 * (i + 1)) for i in range(60)})  # 1 to 3 bytes; others have none
    data = {split: torch.randint(n, (32 * 9 + 7,)).to(torch.uint16).numpy() for split, n in
            (('train', 60), ('val', 64))}
    for n_batches in (0, 2):
        windows = 32, 2, n_batches
        losses = {split: mean_loss(model, run, tokens, *windows) for split, tokens in data.items()}
        found, nats, n_bytes = BitsPerByte(run, tokenizer, data, *windows)(losses), 0, 0
        for starts in eval_windows(data['val'], *windows):
            for x, y in zip(*read_windows(data['val'], starts, 32)):
                x, y = torch.from_numpy(x)[None], torch.from_numpy(y)[None]
                with torch.no_grad():
                    logits, _ = model(x, y)
                nats += torch.nn.functional.cross_entropy(logits[0], y[0], ignore_index=-1,
                                                          reduction='sum').item()
                n_bytes += sum(len(tokenizer.itos[i].encode()) for i in y[0].tolist() if 0 <= i < 60)
        assert found['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / n_bytes)
        assert {*found} == {'train_bits_per_byte', 'val_bits_per_byte'}


def test_processes_count_each_target_once_together():
    tokens, lengths = np.random.default_rng(0).integers(64, size=1000).astype(np.uint16), np.arange(60)
    counts = {}
    for world_size in (1, 2, 3):
        parts = [count_targets(SimpleNamespace(rank=rank, world_size=world_size, sum=lambda *values: values),
                               tokens, lengths, 32, 4, 5) for rank in range(world_size)]
        counts[world_size] = np.sum(parts, axis=0).tolist()
    assert counts[1] == counts[2] == counts[3] and counts[1][0] == 5 * 4 * 32


def test_bits_per_byte_are_left_out_where_the_text_is_unknown(monkeypatch, tmp_path):
    run, data = Runtime('cpu', 'float32', False, 'gloo'), {'val': np.arange(100, dtype=np.uint16)}
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(GPT2Tokenizer, 'token_bytes', None)  # nothing is downloaded
    for tokenizer in (NoTokenizer(64), GPT2Tokenizer()):
        in_bits = BitsPerByte(run, tokenizer, data, 8, 2, 0)
        assert in_bits({'val': 1.0}) == {} and in_bits.told({'val': 1.0}) == ''


def test_gpt2_s_files_are_found_where_tiktoken_keeps_them(bpe):
    assert GPT2Tokenizer().knows_text()


def test_hellaswag_s_texts_are_cleaned_of_their_marks(hellaswag_file):
    asked = []

    def score(pairs, _):
        asked.extend(pairs)
        return [(-1.0, False)] * len(pairs)

    measure_hellaswag(read_items(str(hellaswag_file), '', ()), score)
    assert asked == [(question, f' {ENDINGS.get(ending, ending)}')
                     for (*_, endings, _), question in zip(HELLASWAG, QUESTIONS) for ending in endings]


def test_items_come_from_the_hub_by_default(monkeypatch):
    import datasets
    asked, item = [], dict.fromkeys(('text', 'activity_label', 'ctx_a', 'ctx_b', 'endings', 'label'), '')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(datasets, 'load_dataset', lambda name, split: (
        asked.append((name, split)), datasets.Dataset.from_list([item] * 3))[1])
    for task in TASKS.values():
        assert read_items(task.hub_name, task.split, task.needed, limit=2) == [item] * 2
    assert asked == [('EleutherAI/lambada_openai', 'test'), ('Rowan/hellaswag', 'validation')]


def test_scores_do_not_depend_on_the_batch():
    model, run = GPT(GPTConfig(**TINY)).double().eval(), Runtime('cpu', 'float32', False, 'gloo')
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(64, size=n).tolist(), generator.integers(64, size=m).tolist())
             for n, m in generator.integers(1, 33, (20, 2))]
    pairs += [(pairs[0][0], []), ([1], pairs[0][1][:1])]
    alone = [score_ids(model, run, 1, [pair])[0] for pair in pairs]
    for (log_p, greedy), (others, likewise) in zip(alone, score_ids(model, run, 7, pairs), strict=True):
        assert abs(log_p - others) < 1e-5 and greedy == likewise
    assert alone[-2] == (0.0, True) and alone[-1][0] < 0


def test_white_space_belongs_to_the_word_after_it(bpe):
    tokenizer = GPT2Tokenizer()
    expected = tokenizer.encode('the old'), tokenizer.encode(' man')
    assert encode_pair(tokenizer, 'the old ', 'man') == encode_pair(tokenizer, 'the old', ' man') == expected
    assert encode_pair(tokenizer, '', 'man') == ([50256], tokenizer.encode('man'))


def test_jsonl_json_and_parquet_hold_the_same_items(hellaswag_file, tmp_path):
    import datasets
    items = read_items(str(hellaswag_file), 'validation', KEYS)
    (tmp_path / 'x.json').write_text(json.dumps(items), encoding='utf-8')
    datasets.Dataset.from_list(items).to_parquet(tmp_path / 'x.parquet')
    for name in ('x.json', 'x.parquet'):
        assert read_items(str(tmp_path / name), 'validation', KEYS) == items
    assert len(items) == 4 and read_items(str(hellaswag_file), 'validation', KEYS, limit=2) == items[:2]
