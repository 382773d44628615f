"""
What a language model is asked, and how its answers count: log-probabilities of texts, LAMBADA, HellaSwag.

    score = functools.partial(score_texts, model, tokenizer, run, batch_size)
    lambada(read_items('lambada_test.jsonl', 'test', ['text']), score)  # {'acc': 0.4, ...}

The protocols are those of EleutherAI's lm-eval (its tasks lambada_openai and hellaswag), and so are the
figures: tests/test_eval.py compares them.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import go_offline_if_cut_off, read_text

MOST_LOGITS = 1 << 28  # held at once: 1 GB of float32


# ---------------------------------------------------------------------------- log-probabilities

@torch.no_grad()
def score_ids(model, run, batch_size, pairs, desc=None):
    """[(log-probability in nats, whether each token is the likeliest)] of the second of each pair of lists of
    ids, the first being what stands before it. Where block_size is too short, contexts lose their start.
    """
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > block_size:
        raise ValueError(f'the model\'s block_size={block_size} is too short for an answer of {longest} '
                         'tokens')
    rows = [(context + continuation)[-block_size - 1:] for context, continuation in pairs]
    left = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together, the longest first
    results = [None] * len(rows)
    with tqdm(total=len(rows), desc=desc, disable=None) as bar:
        while left:
            T = max(1, len(rows[left[-1]]) - 1)
            n = max(1, min(batch_size, len(left), MOST_LOGITS // (T * vocab_size)))
            batch, left = left[-n:], left[:-n]
            x, y = np.zeros((n, T), np.int64), np.full((n, T), -1)
            for row, i in enumerate(batch):
                end, count = len(rows[i]) - 1, len(pairs[i][1])
                x[row, :end] = rows[i][:-1]
                y[row, end - count:end] = rows[i][len(rows[i]) - count:]
            x, y = run.to_device(x), run.to_device(y)
            with run.autocast():
                logits, _ = model(x, y)
            logits, targets = logits[y >= 0].float(), y[y >= 0]  # (N, V), (N,): row after row
            log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().double()
            is_likeliest = (logits.argmax(-1) == targets).cpu()
            counts = (y >= 0).sum(1).tolist()
            for i, p, likeliest in zip(batch, log_p.split(counts), is_likeliest.split(counts)):
                results[i] = p.sum().item(), likeliest.all().item()
            bar.update(n)
    return results


def encode_pair(tokenizer, context, continuation):
    """The ids of both, cut where the context ends; white space at its end goes to the continuation, whose
    first word it belongs to. Before a text without context stands what begins one."""
    text, context = context + continuation, context.rstrip()
    before = tokenizer.encode(context)
    return before or [first_token(tokenizer)], tokenizer.encode(text)[len(before):]


def first_token(tokenizer):
    """What stands before a text: GPT-2's <|endoftext|>, or with characters a line's end."""
    if tokenizer.to_dict()['kind'] == 'gpt2':
        return tokenizer.n_vocab - 1
    return tokenizer.stoi.get('\n', 0)


def score_texts(model, tokenizer, run, batch_size, pairs, desc=None):
    """As `score_ids`, of pairs of strings."""
    return score_ids(model, run, batch_size, [encode_pair(tokenizer, *pair) for pair in pairs], desc)


def token_bytes(tokenizer):
    """Bytes of UTF-8 that each id stands for, (n_vocab,) int64; 0 for <|endoftext|>, which is no text."""
    if tokenizer.to_dict()['kind'] == 'gpt2':
        tokens = [*map(tokenizer.bpe.decode_single_token_bytes, range(tokenizer.n_vocab - 1)), b'']
    else:
        tokens = [tokenizer.itos.get(i, '').encode() for i in range(tokenizer.n_vocab)]
    return np.array([len(token) for token in tokens])


# ---------------------------------------------------------------------------- tasks

def lambada(items, score):
    """Predicting a passage's last word (Paperno et al. 2016), in OpenAI's form: items have a `text`. acc: how
    often all its tokens are the likeliest ones; perplexity: of the last word, averaged over passages."""
    pairs = [(before, f' {word}') for before, _, word in (item['text'].rpartition(' ') for item in items)]
    scores = score(pairs, 'lambada')
    return {'acc': np.mean([greedy for _, greedy in scores]),
            'perplexity': math.exp(-np.mean([log_p for log_p, _ in scores])), 'n': len(items)}


def hellaswag(items, score):
    """Choosing which of four endings goes on with a text (Zellers et al. 2019). acc: how often the right one
    is the most probable; acc_norm: the one with the highest log-probability a character."""
    endings = [[f' {clean(ending)}' for ending in item['endings']] for item in items]
    pairs = [(clean(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}'), ending)
             for item, of_item in zip(items, endings) for ending in of_item]
    scores = iter(score(pairs, 'hellaswag'))
    hits = []
    for item, of_item in zip(items, endings):
        log_p = np.array([next(scores)[0] for _ in of_item])
        lengths = np.array([len(ending) - 1 for ending in of_item])
        hits.append([p.argmax() == int(item['label']) for p in (log_p, log_p / lengths)])
    acc, acc_norm = np.mean(hits, axis=0)
    return {'acc_norm': acc_norm, 'acc': acc, 'n': len(items)}


def clean(text):
    """HellaSwag's text without the marks that its source, WikiHow, left in brackets."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


@dataclass
class Task:
    """A benchmark: measure(items, score) gives its figures; where its items are, and what each has."""
    measure: Callable
    hub_name: str
    split: str
    needed: tuple


TASKS = {
    'lambada': Task(lambada, 'EleutherAI/lambada_openai', 'test', ('text',)),
    'hellaswag': Task(hellaswag, 'Rowan/hellaswag', 'validation',
                      ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label')),
}


def read_items(source, split, needed, limit=0):
    """Items as dicts, from a jsonl, json or parquet file or a data set on the hub; 0: no limit."""
    path = Path(source)
    if path.suffix in ('.jsonl', '.json'):
        text = read_text(path)
        try:
            items = json.loads(text) if text.lstrip().startswith('[') else \
                [json.loads(line) for line in text.split('\n') if line.strip()]
        except ValueError as error:
            raise ValueError(f'{source} is not JSON, nor a file with JSON in each line ({error})') from None
    else:
        items = load_table(path, split)
    items = items[:limit or None]
    missing = [k for k in needed if not items or not all(k in item for item in items)]
    if missing:
        raise ValueError(f'{source} has {len(items)} items, not all with {", ".join(missing)}')
    return items


def load_table(source, split):
    """A local parquet file or a data set on the hub, as a list of dicts."""
    go_offline_if_cut_off()
    import datasets
    is_file = source.suffix == '.parquet'
    if is_file and not source.is_file():
        raise FileNotFoundError(f'{source} is missing')
    try:
        if is_file:
            return datasets.Dataset.from_parquet(str(source)).to_list()
        return datasets.load_dataset(source.as_posix(), split=split).to_list()
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'can\'t load {source}: {reason[:300]}. A local jsonl, json or parquet file will do '
                         'as well: --source=PATH') from None
