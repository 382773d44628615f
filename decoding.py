"""
Turning a model's logits into text: the cache of keys and values, the loop, and the draw.

    for tokens in stream(model, idx, max_new_tokens=100, temperature=0.8, top_k=200):
        print(tokens)  # (B, 1), as soon as they are made

B batch, T positions, V vocabulary, as in model.py, which imports this file and isn't imported by it.
"""

import math

import torch
from torch.nn import functional as F


class KVCache:
    """Keys and values of the positions that one layer has seen, with room for n_positions.

    The first `append` may bring any number of positions, each later one a single position, which sees all.
    """

    def __init__(self, n_positions):
        self.n_positions = n_positions
        self.length = 0
        self.last_ids = None  # (B, ngram - 1), in the first layer's only: what GPT.embed_ngrams needs

    def append(self, k, v):
        """k, v: (B, nh, T, hs) -> all so far, (B, nh, length, hs)"""
        if self.length == 0:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.n_positions, t.shape[3]) for t in (k, v))
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def repeat(self, n):
        """Each row n times, for n continuations of one prompt."""
        self.k, self.v = self.k.repeat_interleave(n, dim=0), self.v.repeat_interleave(n, dim=0)
        if self.last_ids is not None:
            self.last_ids = self.last_ids.repeat_interleave(n, dim=0)


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, n_samples=1, lengths=None):
    """Continue each row of idx, (B, T) int64, n_samples times; yield the tokens of each position,
    (B n_samples, 1), as they are made, from position T (or the shortest of `lengths`) on.

    temperature 0 takes the likeliest token. Only the `top_k` likeliest are drawn from, and only ids
    below `n_vocab`, where the vocabulary's last rows are padding. lengths: (B,), where prompts differ
    in length and are filled up at their ends; row b's text then has lengths[b] + max_new_tokens tokens.

    Keys and values of past tokens are kept while all fits into block_size. Past it the window slides,
    every token's position changes, and with it all that was kept: each new token costs a whole window.
    """
    T = idx.shape[1]
    first = T if lengths is None else int(lengths.min())  # from here on a row may need a new token
    out = F.pad(idx, (0, max_new_tokens)).repeat_interleave(n_samples, dim=0)
    given = None if lengths is None else lengths.repeat_interleave(n_samples)[:, None]  # (B n_samples, 1)
    caches, block_size = None, model.config.block_size
    if first < block_size:
        caches = [KVCache(min(block_size, T + max_new_tokens)) for _ in model.transformer.h]
    for t in range(first, T + max_new_tokens):
        if t > block_size:
            caches = None
        if t == first:  # the prompt, once for all its samples
            logits, _ = model(idx[:, max(0, t - block_size):t], caches=caches)
            logits = logits.repeat_interleave(n_samples, dim=0)
            for cache in caches or ():
                cache.repeat(n_samples)
        else:
            logits, _ = model(out[:, t - 1:t] if caches else out[:, t - block_size:t], caches=caches)
        token = draw(logits[:, -1, :n_vocab].float(), temperature, top_k)  # (B n_samples, 1)
        out[:, t:t + 1] = token if given is None else torch.where(t < given, out[:, t:t + 1], token)
        yield out[:, t:t + 1]


def draw(logits, temperature, top_k):
    """logits: (B, V) -> token ids (B, 1), drawn from softmax(logits / temperature) over the top_k.

    By the Gumbel-max trick (Gumbel 1954): the argmax of logits plus Gumbel noise. Unlike
    torch.multinomial it can't return an id outside the range or of probability 0 on any device.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < floor, -math.inf)
    exponential = torch.empty_like(logits).exponential_().clamp_min_(1e-20)
    return (logits - exponential.log()).argmax(dim=-1, keepdim=True)
