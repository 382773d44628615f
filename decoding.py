"""
From a model's logits to text: the cache of keys and values, the loop, the draw, the text as it grows.

    for tokens in stream(model, idx, max_new_tokens=100, temperature=0.8, top_k=200, seeds=[1337]):
        print(tokens)  # (B, 1), as soon as they are made

B batch, T positions, V vocabulary, as in model.py, which imports this file and isn't imported by it.
"""

import codecs
import math
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F

from parallel import is_sharded

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
MOST_PACKED = 1 << 30  # bytes of weights to copy into oneDNN's order
N_EAGER = 3  # positions made before a CUDA graph is recorded, in which libraries make their choices


class KVCache:
    """Keys and values of the positions that one layer has seen, with room for n_positions.

    The first `append` may bring any number of positions, each later one a single position, which sees all.
    Once `at` is set, positions are appended by the same operations on the same memory each time, as a CUDA
    graph has it; attention then gets all of that memory, and a mask.
    """

    def __init__(self, n_positions):
        self.n_positions = n_positions
        self.length = 0
        self.at = None  # (1,) int64, on the device: where the next position goes
        self.last_ids = None  # (B, ngram - 1), in the first layer's only: what GPT.embed_ngrams needs

    def append(self, k, v):
        """k, v: (B, nh, T, hs) -> all so far, (B, nh, length, hs); with `at`, (B, nh, n_positions, hs)"""
        if self.at is not None:
            return self.k.index_copy_(2, self.at, k), self.v.index_copy_(2, self.at, v)
        if self.length == 0:
            # zeros: what a mask leaves out must not be nan either
            self.k, self.v = (t.new_zeros(*t.shape[:2], self.n_positions, t.shape[3]) for t in (k, v))
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

    def remember(self, ids):
        """ids: (B, ngram - 1)"""
        self.last_ids = ids if self.at is None else self.last_ids.copy_(ids)


def positions_after(caches, idx):
    """Of idx, (B, T), which goes on where the caches end: positions (T,), how many keys attention will see,
    and a mask of these, (1, n_keys), or None where all but those to come are there."""
    if caches and caches[0].at is not None:
        at, n_keys = caches[0].at, caches[0].n_positions
        return at, n_keys, torch.arange(n_keys, device=idx.device) <= at[:, None]
    start = caches[0].length if caches else 0
    end = start + idx.shape[1]
    return torch.arange(start, end, device=idx.device), end, None


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, n_samples=1, lengths=None,
           seeds=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Continue each row of idx, (B, T) int64, n_samples times; yield the tokens of each position,
    (B n_samples, 1), as they are made, from position T (or the shortest of `lengths`) on.

    temperature 0 takes the likeliest token. `keep_likeliest` says what top_k, top_p and min_p leave to draw
    from, `penalize` what repetition_penalty does. Ids from `n_vocab` on are padding and never drawn.
    lengths: (B,), where prompts differ in length and are filled up at their ends; row b's text then has
    lengths[b] + max_new_tokens tokens. seeds: an int for each of the B n_samples rows (default: from torch's
    generator); a row's draws follow from its seed alone, whatever else is in the batch.

    Keys and values of past tokens are kept while all fits into block_size. Past it the window slides,
    every token's position changes, and with it all that was kept: each new token costs a whole window.
    The weights must not change before the last token is made.
    """
    end, block_size = idx.shape[1] + max_new_tokens, model.config.block_size
    first = idx.shape[1] if lengths is None else int(lengths.min())  # from here on a row may need a new token
    out = F.pad(idx, (0, max_new_tokens)).repeat_interleave(n_samples, dim=0)  # (B n_samples, end)
    given = None if lengths is None else lengths.repeat_interleave(n_samples)[:, None]  # (B n_samples, 1)
    keys = noise_keys(seeds, *out.shape).to(idx.device)  # (B n_samples, end)
    at = torch.tensor([first], device=idx.device)  # the position to fill; a graph would repeat a number
    caches = [KVCache(min(block_size, end)) for _ in model.transformer.h] if first < block_size else None
    recording = caches and can_record(model, idx.device)

    def fill(logits):
        """Draw each row's token of position `at`. logits: (B n_samples, 1, V)"""
        logits = penalize(logits[:, -1].float(), out, at, repetition_penalty)[:, :n_vocab]
        token = draw(logits, keys.index_select(1, at), temperature, top_k, top_p, min_p)  # (B n_samples, 1)
        if given is not None:
            token = torch.where(at < given, out.index_select(1, at), token)
        out.index_copy_(1, at, token)
        at.add_(1)

    def step():
        """One position more, by what the caches hold."""
        last = at - 1
        for cache in caches if recording else ():
            cache.at = last
        fill(model(out.index_select(1, last), caches=caches)[0])

    with fast_linears(model, len(out)):
        for t in range(first, end):
            if t == first:  # the prompt, once for all its samples
                logits, _ = model(idx[:, max(0, t - block_size):t], caches=caches)
                for cache in caches or ():
                    cache.repeat(n_samples)
                fill(logits.repeat_interleave(n_samples, dim=0))
            elif caches and t <= block_size:
                if recording and t == first + N_EAGER:
                    step = record(step)
                step()
            else:
                fill(model(out[:, t - block_size:t])[0])
            yield out[:, t:t + 1]


def can_record(model, device):
    """Whether a position can be a CUDA graph: where attention takes a mask, and the model isn't in parts."""
    return device.type == 'cuda' and model.config.attn_type == 'SM' and not is_sharded(model)


def record(step):
    """step as a CUDA graph: a function that repeats its operations on the same tensors, in one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):  # other threads may copy batches
        step()
    return graph.replay


@contextmanager
def fast_linears(model, n_rows):
    """Within it the linear layers do the same faster, for n_rows positions at a time.

    Under autocast their weights are cast once, not for each position. In float32 on a CPU oneDNN multiplies,
    which uses all cores for a few rows, where the default library uses one; for more than one it gets a copy
    of the weights in an order of its own.
    """
    linears = [] if is_sharded(model) else [m for m in model.modules() if hasattr(m, 'fast')]
    packing = n_rows > 1 and sum(m.weight.nbytes for m in linears) <= MOST_PACKED
    compiled = getattr(model, '_compiled_call_impl', None) is not None  # a compiler chooses for itself
    for m in linears:
        kind, w, b = m.weight.device.type, m.weight, m.bias
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            m.fast = partial(F.linear, weight=w.to(dtype), bias=b if b is None else b.to(dtype))
        elif HAS_ONEDNN and kind == 'cpu' and w.dtype == torch.float32 and not compiled:
            w = torch.ops.mkldnn._reorder_linear_weight(w, n_rows) if packing else w
            m.fast = partial(onednn_linear, weight=w, bias=b)
    try:
        yield
    finally:
        for m in linears:
            m.fast = None


def onednn_linear(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, 'none', [], '')


def draw(logits, keys, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """logits: (B, V), keys: (B, 1) -> token ids (B, 1), drawn from softmax(logits / temperature) over the
    likeliest; a row's key decides the draw.

    By the Gumbel-max trick (Gumbel 1954): the argmax of logits plus Gumbel noise. Unlike
    torch.multinomial it can't return an id outside the range or of probability 0 on any device, and a
    change of the logits in the last digit, as another batch size makes, hardly ever changes the token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow at small temperatures
    logits, ids = keep_likeliest(logits, top_k, top_p, min_p)  # (B, K), (B, K)
    return ids.gather(1, (logits + gumbel(keys, ids)).argmax(dim=-1, keepdim=True))


def keep_likeliest(logits, top_k=None, top_p=1.0, min_p=0.0):
    """logits: (B, V) -> those to draw from and their ids, (B, K) each, -inf for what is left out.

    top_k: only the k likeliest. top_p: of these, the fewest that together have probability top_p (Holtzman
    et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1). min_p: of these, the ones at
    least min_p times as likely as the likeliest (Nguyen et al. 2024, "Turning Up the Heat").
    """
    V = logits.shape[-1]
    if top_k is None and top_p == 1:
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
    """Make the tokens that a text has already less likely: divide their logits by the penalty, multiply
    negative ones (Keskar et al. 2019, "CTRL", section 4.1). logits: (B, V), ids: (B, T), of which a text has
    the first n_seen, at least one -> (B, V)"""
    if penalty == 1:
        return logits
    seen = torch.where(torch.arange(ids.shape[1], device=ids.device) < n_seen, ids, ids[:, :1])  # (B, T)
    old = logits.gather(1, seen)  # (B, T)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def noise_keys(seeds, n_rows, n_positions):
    """A random-looking int64 for each position of each row, (n_rows, n_positions), that follows from the
    row's seed and the position."""
    seeds = torch.randint(1 << 62, (n_rows,)) if seeds is None else torch.tensor([s % 2**63 for s in seeds])
    return mix(mix(seeds)[:, None] + torch.arange(n_positions))


def gumbel(keys, ids):
    """Gumbel noise that follows from key and token id: (B, 1), (B, K) int64 -> (B, K) float32.

    A generator's noise would depend on what was drawn before, and on the device.
    """
    bits = mix(keys + ids * (0x9e3779b97f4a7c15 - 2**64)) & ((1 << 23) - 1)
    uniform = (bits + 0.5) * 2.0**-23  # exact in float32, never 0 or 1
    return -(-uniform.log()).log()


def mix(z):
    """Scramble 64-bit numbers, one to one, so that z and z + 1 have nothing in common any more: the last
    steps of SplitMix64 (Steele et al. 2014). The masks undo what >> does to negative numbers."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * (0xbf58476d1ce4e5b9 - 2**64)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * (0x94d049bb133111eb - 2**64)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


class Text:
    """The text of one sample while its tokens come in, of which `take` gives what is decided.

    Undecided are bytes that don't make a whole character yet, and the beginning of what may become a stop
    string. `ended` is None, then 'stop' where a stop string came, or 'length' after max_new_tokens.
    """

    def __init__(self, prompt, max_new_tokens, stop=()):
        """prompt: the prompt's bytes. stop: strings that end the text, and aren't shown."""
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.text = self.decoder.decode(prompt)
        self.start = len(self.text)  # where the continuation begins
        self.stop, self.max_new_tokens = stop, max_new_tokens
        self.n_tokens = self.taken = 0
        self.ended = None if max_new_tokens else 'length'

    def add(self, token):
        """token: the next token's bytes."""
        self.n_tokens += 1
        last = self.n_tokens == self.max_new_tokens
        searched = len(self.text)
        self.text += self.decoder.decode(token, last)
        ends = [(at + len(s), at) for s in self.stop
                if (at := self.text.find(s, max(self.start, searched - len(s) + 1))) >= 0]
        if ends:  # the one that is complete first, whatever pieces the text came in
            self.text = self.text[:min(ends)[1]]
        self.ended = 'stop' if ends else 'length' if last else None

    def take(self):
        """What was decided since the last call."""
        end = len(self.text)
        if not self.ended:
            longest = max(map(len, self.stop), default=1)
            for at in range(max(self.start, end - longest + 1), end):
                if any(s.startswith(self.text[at:]) for s in self.stop):
                    end = at
                    break
        piece, self.taken = self.text[self.taken:end], end
        return piece
