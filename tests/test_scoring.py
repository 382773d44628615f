"""scoring.py: which texts are scored, and that batches, files and padding change nothing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, tiny
from torch.nn import functional as F

from support.evaluating.scoring import TASKS, BitsPerByte, Scorer, Windows, mean_loss, measure_hellaswag
from support.machine.runtime import Runtime
from support.text.tokenizer import CharTokenizer
from support.text.windows import Split
from support.training.loss import lean_loss

CPU = Runtime('cpu', 'float32', False, 'gloo')
KEYS = ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label')
HELLASWAG = [  # as in the published files; and the questions that they become
    ('Finance and Business', '[header] How to sell [title] Look  at it. [step] Do this [substeps] now.', '',
     ['[substeps] Write it down.', 'Go [title] away  from here.', 'Sell.',
      'Café owners know [header] more.'], 2),
    ('Cats', 'Two cats sit. One runs,\u2028' + 'and runs, ' * 40, 'THE dog',
     ['barks.', 'sleeps all day long in the sun.', 'is a fish', 'meows a little.'], 1),
]
QUESTIONS = [
    'Finance and Business: How to sell. Look at it. Do this now.',
    'Cats: Two cats sit. One runs,\u2028' + 'and runs, ' * 40 + 'The dog',
]
ENDINGS = {  # endings with marks, and what becomes of them
    '[substeps] Write it down.': ' Write it down.', 'Go [title] away  from here.': 'Go. away from here.',
    'Café owners know [header] more.': 'Café owners know more.'}


def random_split(n, size, name='val'):
    return Split(name, torch.randint(size, (n,)).to(torch.uint16).numpy())


# ---------------------------------------------------------------------------- the loss of a split

@pytest.mark.parametrize('loss', [lambda *_: {}, lean_loss], ids=['plain', 'lean'])
def test_mean_loss_counts_each_target_once_whatever_the_batch(loss):
    model, split, nats = tiny().double(), random_split(32 * 5 + 7, 64), 0.0
    ids = torch.from_numpy(split[:].astype(np.int64))[None]
    for window in (ids[:, start:start + 33] for start in range(0, 32 * 5 + 6, 32)):
        nats += model(window[:, :-1], window[:, 1:])[1].item() * (window.shape[1] - 1)
    for batch_size in (1, 4):
        found = mean_loss(model, CPU, split, Windows(32, batch_size), loss(model, CPU))
        assert found == pytest.approx(nats / (32 * 5 + 6)) and model.training


def test_bits_per_byte_are_the_nats_over_the_bytes_of_the_text():
    model = tiny().double()
    tokenizer = CharTokenizer({i: chr(64 * (i + 1)) for i in range(60)})  # 1 to 3 bytes; others have none
    splits = {name: random_split(32 * 9 + 7, n, name) for name, n in (('train', 60), ('val', 64))}
    data = SimpleNamespace(splits=splits, tokenizer=tokenizer)
    for n_batches in (0, 2):
        windows, nats, n_bytes = Windows(32, 2, n_batches), 0, 0
        losses = {name: mean_loss(model, CPU, split, windows) for name, split in splits.items()}
        found = BitsPerByte(CPU, data, windows)(losses)
        for starts in splits['val'].eval_windows(*windows):
            x, y = map(torch.from_numpy, splits['val'].read(starts, 32))
            nats += F.cross_entropy(model(x, y)[0].mT, y, ignore_index=-1, reduction='sum').item()
            n_bytes += sum(len(tokenizer.itos[i].encode()) for i in y.flatten().tolist() if 0 <= i < 60)
        assert found['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / n_bytes)
        assert {*found} == {'train_bits_per_byte', 'val_bits_per_byte'}


# ---------------------------------------------------------------------------- log-probabilities

@torch.no_grad()
def plain_log_p(model, context, continuation):
    """Of each token of the continuation, and whether it is the likeliest."""
    ids = torch.tensor([(context + continuation)[-TINY['block_size'] - 1:]])
    log_p = model(ids[:, :-1], ids[:, 1:])[0][0].log_softmax(-1)[len(ids[0]) - 1 - len(continuation):]
    return log_p[range(len(continuation)), continuation], log_p.argmax(-1) == torch.tensor(continuation)


def test_scores_are_those_of_a_plain_computation_and_do_not_depend_on_the_batch():
    model, rng = tiny().double().eval(), np.random.default_rng(0)
    pairs = [(rng.integers(64, size=n).tolist(), rng.integers(64, size=m).tolist())
             for n, m in rng.integers(1, 33, (20, 2))]
    with torch.no_grad():  # one that greedy decoding gives
        best = model(torch.tensor([pairs[0][0]]))[0].argmax().item()
    pairs += [(pairs[0][0], [best]), (pairs[0][0], [])]
    for batch_size in (1, 7):
        scorer = Scorer(model, None, CPU, batch_size)
        for pair, (log_p, is_greedy), (total, greedy) in zip(
                pairs[:-1], scorer.tokens(pairs), scorer.ids(pairs)):
            expected, likeliest = plain_log_p(model, *pair)
            assert torch.allclose(log_p, expected, atol=1e-5) and torch.equal(is_greedy, likeliest)
            assert total == pytest.approx(expected.sum().item(), abs=1e-4) and greedy == likeliest.all()
        assert scorer.ids(pairs)[-2][1] is True and scorer.ids(pairs)[-1] == (0.0, True)
    with pytest.raises(ValueError, match='block_size=32 is too short for an answer of 33 tokens'):
        scorer.ids([([1], [1] * 33)])


@pytest.mark.parametrize('n', [1, 64, 75])
def test_whole_text_is_predicted_token_by_token_from_as_much_as_fits(n):
    """Piece after piece of a window's length, the last one with a whole window before it."""
    model, tokenizer = tiny().double().eval(), CharTokenizer({i: chr(97 + i) for i in range(60)} | {60: '\n'})
    text = tokenizer.decode(torch.randint(60, (n,)).tolist())
    ids, log_p = Scorer(model, tokenizer, CPU, 3).whole_text(text)
    assert ids == tokenizer.encode(text) and len(log_p) == n
    before = [60, *ids]  # after a line end
    whole, left = n // 32 * 32, n % 32
    expected = [plain_log_p(model, before[i:i + 1], ids[i:i + 32])[0] for i in range(0, whole, 32)]
    if left:
        expected.append(plain_log_p(model, before[:whole + 1], ids[whole:])[0])
    assert torch.allclose(log_p, torch.cat(expected), atol=1e-5)


# ---------------------------------------------------------------------------- tasks

def test_hellaswag_s_texts_are_cleaned_and_read_from_any_kind_of_file(tmp_path):
    import datasets
    task, asked = TASKS['hellaswag'], []
    lines = [json.dumps(dict(zip(KEYS, item)), ensure_ascii=False) for item in HELLASWAG]
    (tmp_path / 'X.JSONL').write_text('\n'.join(lines), encoding='utf-8')
    items = task.read(str(tmp_path / 'X.JSONL'))
    datasets.Dataset.from_list(items).to_parquet(tmp_path / 'x.parquet')
    assert task.read(str(tmp_path / 'x.parquet')) == items

    def score(pairs, _):
        asked.extend(pairs)
        return [(-1.0, False)] * len(pairs)
    measure_hellaswag(items, score)
    assert asked == [(question, f' {ENDINGS.get(ending, ending)}')
                     for (*_, endings, _), question in zip(HELLASWAG, QUESTIONS) for ending in endings]


@pytest.mark.parametrize('log_p, label, acc, acc_norm', [
    ([-1.0, -2.9], 1, 0, 1),  # 'a' and 'bcd': 2.9 / 3 is less than 1 / 1, but 2.9 / 4 more than 1 / 2
    ([-1.0, -3.1], 0, 1, 1), ([-1.0, -2.0], 0, 1, 0)])
def test_hellaswag_s_lengths_are_those_of_the_endings_without_the_blank_before(log_p, label, acc, acc_norm):
    item = dict(zip(KEYS, ('a', 'b', 'c', ['a', 'bcd'], label)))
    found = measure_hellaswag([item], lambda pairs, _: [(p, False) for p in log_p])
    assert found == {'acc': acc, 'acc_norm': acc_norm, 'n': 1}
