"""
From a model's logits to text, fast: the loop, seeded draws, the text as it grows.

    for tokens in stream(model, idx, max_new_tokens=100, temperature=0.8, top_k=200, seeds=[1337]):
        print(tokens)  # (B, 1), as soon as they are made
    out = generate(model, idx, max_new_tokens=100)  # (B, T + 100), all at once

B batch, T positions, V vocabulary, as in model.py.
"""

import codecs
import inspect
import math
import sys
from functools import partial

import torch
from torch.nn import functional as F

from support.machine.hardware import DTYPES
from support.machine.linear import keep_weights


def repeat_rows(cache, n):
    """Repeat each row n times, for n continuations of one prompt."""
    cache.kv = {layer: [t.repeat_interleave(n, dim=0) for t in kv] for layer, kv in cache.kv.items()}
    if cache.last_ids is not None:
        cache.last_ids = cache.last_ids.repeat_interleave(n, dim=0)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
    """Continue each row of idx, (B, T) int64, n_samples times, to (B n_samples, T + max_new_tokens).

    The arguments are those of `stream`, which gives the tokens as they are made.
    """
    made = list(stream(model, idx, max_new_tokens, temperature, top_k, **options))
    given = idx[:, :idx.shape[1] + max_new_tokens - len(made)]  # (B, positions before the first made)
    return torch.cat((given.repeat_interleave(options.get('n_samples', 1), dim=0), *made), dim=1)


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, n_samples=1, lengths=None,
           seeds=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Continue each row of idx, (B, T) int64, n_samples times; yield the tokens of each position,
    (B n_samples, 1), as they are made, from position T (or the shortest of `lengths`) on.

    temperature 0 takes the likeliest token. top_k, top_p and min_p: see `keep_likeliest`; repetition_penalty:
    see `penalize`. Ids from `n_vocab` on are padding and never drawn. lengths: (B,), for prompts of different
    lengths, padded at their ends; row b's text then has lengths[b] + max_new_tokens tokens. seeds: an int for
    each of the B n_samples rows (default: drawn by torch's generator); a row's samples depend only on its
    seed, not on its batch.

    Keys and values of past tokens are cached while the text fits into block_size. Past it the window slides
    and every position changes, so each token costs a whole window. The weights must not change meanwhile.
    """
    block_size, rows = model.config.block_size, Rows(idx, max_new_tokens, n_samples, lengths, seeds)
    cache = make_cache(model, min(block_size, rows.end)) if rows.first < block_size else None
    fill = partial(rows.fill, n_vocab=n_vocab, penalty=repetition_penalty, temperature=temperature,
                   top_k=top_k, top_p=top_p, min_p=min_p)

    def step():
        """One more position, from the cache."""
        last = rows.ids.index_select(1, rows.at - 1)
        fill(model(last, cache=cache)[0])

    for t in range(rows.first, rows.end):
        if t == rows.first:  # the prompt, once for all its samples
            prompt = idx[:, max(0, t - block_size):t]
            logits, _ = model(prompt) if cache is None else model(prompt, cache=cache)
            if cache is not None:
                repeat_rows(cache, n_samples)
                if idx.is_cuda:
                    from support.sampling.graphs import in_cuda_graph
                    cache, step = in_cuda_graph(model, cache, rows.at, step)
            fill(logits.repeat_interleave(n_samples, dim=0))
        elif cache is not None and t <= block_size:
            step()
        else:
            fill(model(rows.ids[:, max(0, t - block_size):t])[0])
        yield rows.ids[:, t:t + 1]


def for_sampling(model, run, n_rows):
    """Prepare a model whose weights stay as they are for decoding n_rows texts at a time: in 16 bits linear
    layers keep their weights in that type, which autocast would convert at each token; on a CPU in float32
    several rows get weights in the layout of their product."""
    if run.dtype == 'float32':
        keep_weights(model, n_rows)
        return
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.to(DTYPES[run.dtype])


def make_cache(model, n_positions):
    """A KVCache of the file that the model is from; None for a model whose forward pass takes none."""
    KVCache = getattr(sys.modules[type(model).__module__], 'KVCache', None)
    takes_cache = 'cache' in inspect.signature(model.forward).parameters
    return KVCache(n_positions) if KVCache and takes_cache else None


class Rows:
    """Token ids, (B n_samples, end), filled one position at a time. The arguments are stream's."""

    def __init__(self, idx, max_new_tokens, n_samples, lengths, seeds):
        self.ids = F.pad(idx, (0, max_new_tokens)).repeat_interleave(n_samples, dim=0)
        self.first = idx.shape[1] if lengths is None else int(lengths.min())  # the first position to fill
        self.end = self.ids.shape[1]
        self.given = None if lengths is None else lengths.repeat_interleave(n_samples)[:, None]
        self.keys = noise_keys(seeds, *self.ids.shape).to(idx.device)  # (B n_samples, end)
        self.at = torch.tensor([self.first], device=idx.device)  # to fill; a graph freezes plain numbers

    def fill(self, logits, n_vocab, penalty, **options):
        """Draw each row's token of position `at`. logits: (B n_samples, 1, V); options: draw_token's."""
        logits = penalize(logits[:, -1].float(), self.ids, self.at, penalty)[:, :n_vocab]
        token = draw_token(logits, self.keys.index_select(1, self.at), **options)  # (B n_samples, 1)
        if self.given is not None:
            token = torch.where(self.at < self.given, self.ids.index_select(1, self.at), token)
        self.ids.index_copy_(1, self.at, token)
        self.at.add_(1)


def draw_token(logits, keys, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Token ids (B, 1), drawn from softmax(logits / temperature) over the likeliest. logits: (B, V), keys:
    (B, 1), each of which decides its row's draw.

    Uses the Gumbel-max trick (Gumbel 1954): the argmax of logits plus Gumbel noise. Unlike torch.multinomial
    it can't return an id of probability 0 on any device, and logits that differ in the last digit, as in
    another batch, hardly ever give another token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if temperature != 1:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # small ones don't overflow
    logits, ids = keep_likeliest(logits, top_k, top_p, min_p)  # (B, K), (B, K)
    return ids.gather(1, (logits + gumbel(keys, ids)).argmax(dim=-1, keepdim=True))


def keep_likeliest(logits, top_k=None, top_p=1.0, min_p=0.0):
    """logits: (B, V) -> those to draw from and their ids, (B, K) each, -inf for what is left out.

    top_k keeps the k likeliest; top_p then the fewest whose probabilities add up to top_p (Holtzman et al.
    2020, "The Curious Case of Neural Text Degeneration", section 3.1); min_p then those at least min_p times
    as likely as the likeliest (Nguyen et al. 2024, "Turning Up the Heat").
    """
    V = logits.shape[-1]
    if (top_k or V) >= V and top_p == 1:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    else:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)  # likeliest first
    if top_p < 1:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p.cumsum(dim=-1) - p >= top_p, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits, ids


def penalize(logits, ids, n_seen, penalty):
    """Make tokens that the text already has less likely: divide their logits by the penalty, multiply
    negative ones (Keskar et al. 2019, "CTRL", section 4.1). logits: (B, V), ids: (B, T), the first n_seen of
    which, at least one, are the text -> (B, V)"""
    if penalty == 1:
        return logits
    seen = torch.where(torch.arange(ids.shape[1], device=ids.device) < n_seen, ids, ids[:, :1])  # (B, T)
    old = logits.gather(1, seen)  # (B, T)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def noise_keys(seeds, n_rows, n_positions):
    """An int64 hash of seed and position for each position of each row, (n_rows, n_positions)."""
    seeds = torch.randint(1 << 62, (n_rows,)) if seeds is None else torch.tensor([s % 2**63 for s in seeds])
    return mix(mix(seeds)[:, None] + torch.arange(n_positions))


def gumbel(keys, ids):
    """Gumbel noise, a function of key and token id: (B, 1), (B, K) int64 -> (B, K) float32.

    A generator's noise would depend on earlier draws and on the device.
    """
    bits = mix(keys + ids * (0x9e3779b97f4a7c15 - 2**64)) & ((1 << 23) - 1)
    uniform = (bits + 0.5) * 2.0**-23  # exact in float32, never 0 or 1
    return -(-uniform.log()).log()


def mix(z):
    """A bijective hash of 64-bit numbers: the last steps of SplitMix64 (Steele et al. 2014). The masks turn
    >>, which copies the sign, into a logical shift."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * (0xbf58476d1ce4e5b9 - 2**64)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * (0x94d049bb133111eb - 2**64)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


class Text:
    """The text of one sample while its tokens arrive; `take` gives the part that can no longer change.

    Bytes of an incomplete character, and what may be the beginning of a stop string, can still change.
    `ended` is None, then 'stop' after a stop string, 'end' after the model's own end, or 'length' after
    max_new_tokens.
    """

    def __init__(self, prompt, max_new_tokens, stop=(), hidden=False):
        """prompt: the prompt's bytes; hidden: it isn't shown. stop: strings that end the text, and aren't
        shown."""
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.text = self.decoder.decode(prompt)
        self.start = len(self.text)  # where the continuation begins
        self.stop, self.max_new_tokens = stop, max_new_tokens
        self.n_tokens, self.taken = 0, self.start if hidden else 0
        self.ended = None if max_new_tokens else 'length'

    def add(self, token):
        """token: the next token's bytes."""
        self.n_tokens += 1
        last = self.n_tokens == self.max_new_tokens
        searched = len(self.text)
        self.text += self.decoder.decode(token, last)
        ends = [(at + len(s), at) for s in self.stop
                if (at := self.text.find(s, max(self.start, searched - len(s) + 1))) >= 0]
        if ends:  # the one that was complete first
            self.text = self.text[:min(ends)[1]]
        self.ended = 'stop' if ends else 'length' if last else None

    def end(self):
        """The model has ended the text by a token, which isn't shown."""
        self.n_tokens += 1
        self.text += self.decoder.decode(b'', True)
        self.ended = 'end'

    def take(self):
        """What became final since the last call."""
        end = len(self.text)
        if not self.ended:
            longest = max(map(len, self.stop), default=1)
            for at in range(max(self.start, end - longest + 1), end):
                if any(s.startswith(self.text[at:]) for s in self.stop):
                    end = at
                    break
        piece, self.taken = self.text[self.taken:end], end
        return piece
