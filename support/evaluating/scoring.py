"""
How good a model is: the loss of a split, log-probabilities of texts, LAMBADA, HellaSwag.

    loss = mean_loss(model, run, data['val'], Windows(block_size=1024, batch_size=12))
    scorer = Scorer(model, tokenizer, run, batch_size)
    log_p, is_greedy = scorer.texts([('The capital of France is', ' Paris')])[0]
    task = TASKS['lambada']
    task.measure(task.read('lambada_test.jsonl'), scorer.texts)  # {'acc': 0.4, ...}

The tasks follow EleutherAI's lm-eval (lambada_openai and hellaswag) and give the same figures; a test
compares them.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure, go_offline_if_cut_off, read_text
from support.machine.hardware import attention_kernels

MAX_LOGITS = 1 << 28  # in memory at once: 1 GiB of float32


# ---------------------------------------------------------------------------- the loss of a split

class Windows(NamedTuple):
    """The windows of a split that an evaluation reads: n_batches of them, spread evenly; 0: all."""
    block_size: int
    batch_size: int
    n_batches: int = 0


@torch.no_grad()
def mean_loss(model, run, split, windows, lean=None, watch=iter):
    """Mean cross-entropy in nats of a split's `windows`, shared among the processes.

    lean: arguments of the forward pass that save memory (support/training/loss.py). watch: wraps the loop
    over the batches, as tqdm does, and may end it by an exception.
    """
    was_training = model.training
    model.eval()
    losses, counts = [torch.zeros((), device=run.device)], [0]
    batches = split.eval_windows(*windows)
    # pad with batches without targets: a sharded model needs all processes for each forward pass
    batches = np.pad(batches, ((0, -len(batches) % run.world_size), (0, 0)), constant_values=len(split))
    try:
        for starts in watch(batches[run.rank::run.world_size]):
            x, y = split.read(starts, windows.block_size)
            with run.autocast(), attention_kernels(run.device, windows.block_size):
                _, loss = model(run.to_device(x), run.to_device(y), **(lean or {}))
            if (y >= 0).any():
                losses.append(loss.clone())  # a CUDA graph writes the next one over it
                counts.append(int((y >= 0).sum()))
    finally:
        model.train(was_training)
    total = torch.stack(losses).cpu().double() @ torch.tensor(counts).double()  # MPS has no float64
    loss_sum, n_targets = run.sum(total.item(), sum(counts))
    return loss_sum / n_targets


def count_targets(run, split, token_bytes, windows):
    """Number of targets in the windows that `mean_loss` reads, and of the bytes of their text. token_bytes:
    (n_vocab,) int64; an id beyond it has no text."""
    n_targets, n_bytes = 0, 0
    for starts in split.eval_windows(*windows)[run.rank::run.world_size]:
        _, y = split.read(starts, windows.block_size)
        targets = y[y >= 0]
        n_targets += len(targets)
        n_bytes += int(token_bytes[targets[targets < len(token_bytes)]].sum())
    return run.sum(n_targets, n_bytes)


class BitsPerByte:
    """Turns losses, which depend on the tokenizer, into bits for each byte of text, by which models of any
    tokenizer can be compared.

        in_bits = BitsPerByte(run, data, windows)  # as for mean_loss
        in_bits({'train': 4.1, 'val': 4.2})  # {'train_bits_per_byte': 1.48, ...}; all processes call it
    """

    def __init__(self, run, data, windows):
        self.run, self.data, self.windows = run, data, windows

    @functools.cached_property
    def bits_per_nat(self):
        """{split: a byte's bits for each nat of a target}, {} where the text isn't known."""
        tokenizer = self.data.tokenizer
        knows = self.run.is_master and tokenizer.knows_text()
        token_bytes = self.run.broadcast(tokenizer.token_bytes() if knows else None)
        if token_bytes is None:
            return {}
        counts = {name: count_targets(self.run, split, token_bytes, self.windows)
                  for name, split in self.data.splits.items()}
        return {name: n_targets / math.log(2) / n_bytes for name, (n_targets, n_bytes) in counts.items()
                if n_bytes}

    def __call__(self, losses):
        return {f'{name}_bits_per_byte': losses[name] * bits for name, bits in self.bits_per_nat.items()}

    def in_words(self, losses):
        """The same as the end of a line of the log."""
        return ''.join(f', {name.replace("_bits_per_byte", "")} {bits:.4f} bits/byte'
                       for name, bits in self(losses).items())


# ---------------------------------------------------------------------------- log-probabilities

@dataclass
class Scorer:
    """Log-probabilities of texts under a model. run: a Runtime. batch_size: texts at a time."""
    model: torch.nn.Module
    tokenizer: object
    run: object
    batch_size: int

    @torch.no_grad()
    def tokens(self, pairs, desc=None):
        """For each pair of lists of ids, (context, continuation): the log-probability in nats of
        each token of the continuation, (n,) float64, and whether it is the likeliest, (n,) bool.

        A context that doesn't fit into block_size loses its beginning. desc: a title for the
        progress bar. Raises ValueError if a continuation alone is longer than block_size.
        """
        block_size, vocab_size = self.model.config.block_size, self.model.config.vocab_size
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > block_size:
            raise UserError(f'the model\'s block_size={block_size} is too short for an answer of '
                            f'{longest} tokens')
        rows = [(context + continuation)[-block_size - 1:] for context, continuation in pairs]
        left = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together
        results = [None] * len(rows)
        with tqdm(total=len(rows), desc=desc, disable=None) as bar:
            while left:  # the longest first
                T = max(1, len(rows[left[-1]]) - 1)
                n = max(1, min(self.batch_size, len(left), MAX_LOGITS // (T * vocab_size)))
                batch, left = left[-n:], left[:-n]
                counts = [len(pairs[i][1]) for i in batch]
                x, y = map(self.run.to_device, pad_rows([rows[i] for i in batch], counts, T))
                with self.run.autocast(), attention_kernels(self.run.device):
                    logits, _ = self.model(x, y)
                logits, targets = logits[y >= 0].float(), y[y >= 0]  # (N, V), (N,): row after row
                log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().double()
                is_greedy = (logits.argmax(-1) == targets).cpu()
                for i, *found in zip(batch, log_p.split(counts), is_greedy.split(counts)):
                    results[i] = found
                bar.update(n)
        return results

    def ids(self, pairs, desc=None):
        """[(log-probability in nats, whether greedy decoding gives it)] of each continuation."""
        return [(log_p.sum().item(), is_greedy.all().item())
                for log_p, is_greedy in self.tokens(pairs, desc)]

    def texts(self, pairs, desc=None):
        """Like `ids`, for pairs of strings."""
        return self.ids([encode_pair(self.tokenizer, *pair) for pair in pairs], desc)

    def whole_text(self, text, desc=None):
        """A text's ids, and the log-probability of each, (n,) float64."""
        ids = self.tokenizer.encode(text)
        if not ids:
            raise UserError('there is no text to score')
        pairs = windows_of(ids, self.tokenizer.first_token(), self.model.config.block_size)
        found = self.tokens(pairs, desc)
        return ids, torch.cat([log_p for log_p, _ in found])


def windows_of(ids, first, block_size):
    """Pairs in which each id of a text is predicted once: in pieces of block_size, side by side,
    the last of which has as much context as fits. first: the id before the text."""
    ids, pairs = [first, *ids], []
    for at in range(1, len(ids), block_size):
        end = min(at + block_size, len(ids))
        pairs.append((ids[max(0, end - block_size - 1):at], ids[at:end]))
    return pairs


def pad_rows(rows, counts, T):
    """x, y: (n, T) int64, inputs and targets from rows of ids; only the last counts[i] ids of row i are
    targets, all else in y is -1."""
    x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -1)
    for i, (row, count) in enumerate(zip(rows, counts)):
        end = len(row) - 1
        x[i, :end] = row[:-1]
        y[i, end - count:end] = row[len(row) - count:]
    return x, y


def encode_pair(tokenizer, context, continuation):
    """The ids of both, cut where the context ends. White space at its end goes to the continuation,
    and an empty context becomes the token that begins a text."""
    text, context = context + continuation, context.rstrip()
    before = tokenizer.encode(context)
    return before or [tokenizer.first_token()], tokenizer.encode(text)[len(before):]


# ---------------------------------------------------------------------------- tasks

def perplexity(nats):
    """exp(nats); infinite where a diverged model's is beyond a float's range."""
    return math.exp(nats) if nats < 709 else math.inf


def measure_lambada(items, score):
    """Predict the last word of a passage (Paperno et al. 2016), as OpenAI did for GPT-2; items have a `text`.

    acc: share of words whose tokens are all the likeliest; perplexity: of the last word, as exp(mean nats).
    """
    pairs = [(before, f' {word}') for before, _, word in (item['text'].rpartition(' ') for item in items)]
    scores = score(pairs, 'lambada')
    return {'acc': np.mean([greedy for _, greedy in scores]),
            'perplexity': perplexity(-np.mean([log_p for log_p, _ in scores])), 'n': len(items)}


def measure_hellaswag(items, score):
    """Choose the right one of four endings of a text (Zellers et al. 2019).

    acc: share of items whose right ending has the highest log-probability; acc_norm: the same with
    log-probabilities divided by the ending's length in characters.
    """
    endings = [[f' {clean_wikihow(ending)}' for ending in item['endings']] for item in items]
    questions = [clean_wikihow(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}')
                 for item in items]
    pairs = [(question, ending) for question, of_item in zip(questions, endings) for ending in of_item]
    scores = iter(score(pairs, 'hellaswag'))
    hits = []
    for item, of_item in zip(items, endings):
        log_p = np.array([next(scores)[0] for _ in of_item])
        lengths = np.array([len(ending) - 1 for ending in of_item])
        hits.append([p.argmax() == int(item['label']) for p in (log_p, log_p / lengths)])
    acc, acc_norm = np.mean(hits, axis=0)
    return {'acc_norm': acc_norm, 'acc': acc, 'n': len(items)}


def clean_wikihow(text):
    """HellaSwag's text without WikiHow's marks in brackets."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


class Task(NamedTuple):
    """A benchmark: measure(items, score) returns its figures; hub_name and split say where its
    items are."""
    measure: Callable
    hub_name: str
    split: str
    is_item: Callable  # whether a dict has what is measured
    needs: str  # the same in words

    def read(self, source='', limit=0):
        """The first `limit` items (0: all), dicts, from a jsonl, json or parquet file or a dataset
        on the hub. Raises FileNotFoundError or ValueError in one line."""
        source = source or self.hub_name
        items = read_items(source, self.split)[:limit or None]
        if not items:
            raise UserError(f'{source} has no items')
        for number, item in enumerate(items, 1):
            if not isinstance(item, dict) or not self.is_item(item):
                raise UserError(f'{source}: item {number:,} of {len(items):,} lacks {self.needs}')
        return items


def is_passage(item):
    return isinstance(item.get('text'), str)


def is_question(item):
    texts = [item.get('activity_label'), item.get('ctx_a'), item.get('ctx_b')]
    endings, label = item.get('endings'), str(item.get('label'))
    if not isinstance(endings, list) or not all(isinstance(text, str) for text in texts + endings):
        return False
    return label in map(str, range(len(endings)))


TASKS = {
    'lambada': Task(measure_lambada, 'EleutherAI/lambada_openai', 'test', is_passage,
                    'a text, a string'),
    'hellaswag': Task(measure_hellaswag, 'Rowan/hellaswag', 'validation', is_question,
                      'activity_label, ctx_a, ctx_b, strings, endings, a list of strings, or '
                      'label, the number of one'),
}


# ---------------------------------------------------------------------------- their items

def read_items(source, split):
    """The items of a jsonl, json or parquet file, or of a dataset on the hub, as a list."""
    path = Path(source)
    if path.suffix.lower() not in ('.jsonl', '.json'):
        return read_table(path, split)
    text = read_text(path)
    with explain_failure(f'{source} is neither JSON nor JSON lines'):
        if text.lstrip().startswith('['):
            return json.loads(text)
        return [json.loads(line) for line in text.split('\n') if line.strip()]


def read_table(source, split):
    """A local parquet file or a dataset on the hub, as a list of dicts."""
    is_file = source.suffix.lower() == '.parquet'
    if is_file and not source.is_file():
        raise MissingFile(f'{source} is missing')
    go_offline_if_cut_off()
    import datasets
    message = f'can\'t load {source}; a local jsonl, json or parquet file works too: --source=PATH'
    with explain_failure(message, datasets.exceptions.DatasetGenerationError):
        if is_file:
            return datasets.Dataset.from_parquet(str(source)).to_list()
        return datasets.load_dataset(source.as_posix(), split=split).to_list()
