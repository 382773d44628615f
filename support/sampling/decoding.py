"""
From a model's logits to text, fast: the loop, seeded draws, the text as it grows.

    sampling = Sampling(max_new_tokens=100, temperature=0.8, top_k=200)
    for tokens in stream(model, idx, sampling, seeds=[1337]):
        print(tokens)  # (B, 1), as soon as they are made
    out = generate(model, idx, max_new_tokens=100)  # (B, T + 100), all at once

B batch, T positions, V vocabulary, as in model.py.
"""

import codecs
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from support.errors import UserError
from support.machine.hardware import DTYPES, attention_kernels
from support.machine.linear import (HAS_ONEDNN, CPULinear, is_watched, keep_weights,
                                    replace_linears)
from support.settings import parse


@dataclass(frozen=True)
class Sampling:
    """How text is sampled. Raises ValueError for a value out of range."""
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 200  # these three: see `keep_likeliest`
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # see `penalize`
    stop: str | None = None  # a string, in which \n is a line end, or a Python list of strings
    seed: int = 1337  # of the first sample
    max_new_tokens: int = 500

    def __post_init__(self):
        for name, holds, allowed in (
                ('temperature', self.temperature >= 0, 'be at least 0'),
                ('top_k', self.top_k is None or self.top_k >= 1, 'be at least 1, or None'),
                ('top_p', 0 < self.top_p <= 1, 'lie in (0, 1]'),
                ('min_p', 0 <= self.min_p <= 1, 'lie in [0, 1]'),
                ('repetition_penalty', self.repetition_penalty > 0, 'be above 0'),
                ('seed', -2**63 <= self.seed < 2**63, 'fit into 64 bits'),
                ('max_new_tokens', self.max_new_tokens >= 0, 'be at least 0')):
            if not holds:
                raise UserError(f'{name} must {allowed}, not {getattr(self, name)}')
        self.stop_strings()

    def stop_strings(self):
        """The setting `stop` as a list of strings."""
        strings = []
        if self.stop:
            is_list = self.stop.startswith('[')
            strings = parse(self.stop) if is_list else [with_line_ends(self.stop)]
        is_valid = isinstance(strings, list) and all(s and isinstance(s, str) for s in strings)
        if not is_valid:
            raise UserError(f'stop={self.stop} is neither a string nor a list of strings like '
                            "['a', 'b']")
        return strings


def with_line_ends(text):
    """A text of the command line, where a line end is written as a backslash and an n."""
    return text.replace('\\n', '\n')


# ---------------------------------------------------------------------------- the loop

def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
    """Continue each row of idx, (B, T) int64, to (B n_samples, T + max_new_tokens). options: those
    of Sampling and `stream`."""
    of_stream = {k: options.pop(k) for k in ('n_samples', 'lengths', 'seeds', 'n_vocab', 'compiled')
                 if k in options}
    sampling = Sampling(temperature, top_k, max_new_tokens=max_new_tokens, **options)
    made = list(stream(model, idx, sampling, **of_stream))
    given = idx[:, :idx.shape[1] + max_new_tokens - len(made)]  # before the first position made
    given = given.repeat_interleave(of_stream.get('n_samples', 1), dim=0)
    return torch.cat((given, *made), dim=1)


@torch.inference_mode()
def stream(model, idx, sampling, *, n_samples=1, lengths=None, seeds=None, n_vocab=None, compiled=None,
           static=None):
    """Continue each row of idx, (B, T) int64, n_samples times. Yields the tokens of each position,
    (B n_samples, 1), as they are made, from position T (or the shortest of `lengths`) on.

    lengths: (B,), for prompts of different lengths, padded at their ends; row b's text then has
    lengths[b] + max_new_tokens tokens. seeds: an int for each of the B n_samples rows, by default
    drawn by torch's generator; a row's samples depend only on its seed, not on its batch. Ids from
    n_vocab on are padding and never drawn.

    Keys and values of past tokens are cached while the text fits into block_size. Past it the
    window slides and every position changes, so each token costs a whole window. The weights must
    not change meanwhile. compiled: the model compiled, for all but a prompt, whose length changes.
    static: whether each step has the memory of the one before, as a CUDA graph and compiled code need
    it; None: with `compiled`, and on CUDA.
    """
    rows = Rows(idx, sampling, n_samples, lengths, seeds, n_vocab)
    if static is None:
        static = idx.is_cuda or compiled is not None
    compiled = model if compiled is None else compiled  # bool(compiled) would ask for a length
    positions = Positions(model, compiled, idx, rows, n_samples, static)
    try:
        for t in range(rows.first, rows.end):
            positions.make(t)
            yield rows.ids[:, t:t + 1].clone()  # the memory may be used again
    finally:
        positions.close()


class Positions:
    """Makes the positions of `stream`: the first from the prompt, the next from the cache, and past
    block_size each from a whole window."""

    def __init__(self, model, compiled, idx, rows, n_samples, static):
        self.model, self.compiled = model, compiled
        self.rows, self.n_samples, self.static = rows, n_samples, static
        self.block_size, self.device = model.config.block_size, str(idx.device)
        self.prompt = idx[:, max(0, rows.first - self.block_size):rows.first]  # once for all its samples
        self.cache, self.kept, self.step = None, None, self.cached_step
        n = min(self.block_size, rows.end)
        if rows.first < self.block_size and hasattr(model, 'make_cache'):
            if static:
                from support.sampling.graphs import length_to_read
                n = length_to_read(n, self.block_size)  # one shape for prompts of many lengths
            self.cache = model.make_cache(n)
        is_one_shape = static and self.cache is not None
        rows.reserve(max(idx.shape[1], n) + 1 if is_one_shape else
                     min(rows.end, max(idx.shape[1], self.block_size) + 1))

    def make(self, t):
        """Position t of each row."""
        rows = self.rows
        if t == rows.ids.shape[1]:
            rows.reserve(min(rows.end, 2 * t))
        if t == rows.first:
            self.read_prompt()
        elif self.cache is not None and t <= self.block_size:
            self.step()
        else:
            rows.fill(self.forward(self.compiled, rows.ids[:, max(0, t - self.block_size):t], None))

    def read_prompt(self):
        model = self.compiled if self.cache is None else self.model
        logits = self.forward(model, self.prompt, self.cache)
        if self.cache is not None:
            repeat_rows(self.cache, self.n_samples)
        self.rows.fill(logits.repeat_interleave(self.n_samples, dim=0))
        if self.static and self.cache is not None:
            self.use_static_memory()

    def cached_step(self):
        last = self.rows.ids.index_select(1, self.rows.at - 1)
        self.rows.fill(self.forward(self.compiled, last, self.cache))

    def forward(self, model, ids, cache):
        """Logits of the last position, (B, 1, V)."""
        with attention_kernels(self.device):
            return (model(ids) if cache is None else model(ids, cache=cache))[0]

    def use_static_memory(self):
        """Go on in the memory of an earlier call of this shape, or have later ones go on in this."""
        from support.sampling import graphs
        self.shape = graphs.shape_of(self.model, self.rows, self.cache.n_positions)
        kept = graphs.take(self.model, self.shape)
        if kept is None:
            cache, step = graphs.in_cuda_graph(self.model, self.cache, self.rows.at, self.cached_step)
            if cache is self.cache:
                return
            kept = graphs.Kept(self.rows, cache, step)
        else:
            kept.load(self.rows, self.cache, self.cached_step)
        self.kept, self.cache, self.step = kept, kept.cache, kept.step

    def close(self):
        if self.kept:
            from support.sampling import graphs
            graphs.give_back(self.model, self.shape, self.kept)


def for_sampling(model, run, n_rows, n_steps):
    """Prepare a model in evaluation mode, whose weights stay as they are, for decoding n_rows texts
    at a time, n_steps positions in all. Layers that do nothing there are left out. In 16 bits linear
    layers keep their weights in that type, which autocast would convert at each token."""
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is nn.Dropout and not is_watched(child):
                setattr(parent, name, nn.Identity())
            elif type(child) is nn.Linear and run.dtype != 'float32':
                child.weight = nn.Parameter(child.weight.detach())  # a tied embedding keeps its type
                child.to(DTYPES[run.dtype])
    if run.device_type != 'cpu':
        return
    if run.dtype == 'float32' and HAS_ONEDNN:
        replace_linears(model, CPULinear)  # of a model to compile
        keep_weights(model, n_rows, n_steps)
    if run.compile:
        for module in [m for m in model.modules() if hasattr(m, 'hide_product')]:
            module.hide_product()


def compile_for_decoding(model):
    """A model's compiled twin, for `stream`. A product with one row becomes a sum on CUDA, which reads int8
    weights as they are; that of a library would write and read them in 16 bits."""
    return torch.compile(model, dynamic=True, options={'coordinate_descent_tuning': True})


def repeat_rows(cache, n):
    """Repeat each row n times, for n continuations of one prompt."""
    if n == 1:
        return
    cache.kv = {layer: [t.repeat_interleave(n, dim=0) for t in kv]
                for layer, kv in cache.kv.items()}
    for name in ('last_ids', 'document_begin'):
        rows = getattr(cache, name)
        setattr(cache, name, None if rows is None else rows.repeat_interleave(n, dim=0))


class Rows:
    """Token ids of texts, (B n_samples, room), filled one position at a time. The arguments are
    those of `stream`."""

    def __init__(self, idx, sampling, n_samples, lengths, seeds, n_vocab):
        self.sampling, self.n_vocab = sampling, n_vocab
        self.ids = idx.repeat_interleave(n_samples, dim=0)
        self.first = idx.shape[1] if lengths is None else int(lengths.min())  # position to fill
        self.end = idx.shape[1] + sampling.max_new_tokens
        self.given = None if lengths is None else lengths.repeat_interleave(n_samples)[:, None]
        self.seeds = torch.randint(1 << 62, (len(self.ids),)).tolist() if seeds is None else seeds
        self.at = torch.tensor([self.first], device=idx.device)  # a graph freezes plain numbers

    def reserve(self, room):
        """Make room for `room` positions."""
        self.ids = F.pad(self.ids, (0, room - self.ids.shape[1]))
        self.keys = noise_keys(self.seeds, room).to(self.ids.device)

    def fill(self, logits):
        """Draw each row's token of position `at`. logits: (B n_samples, 1, V)"""
        s = self.sampling
        logits = penalize(logits[:, -1].float(), self.ids, self.at, s.repetition_penalty)
        keys = self.keys.index_select(1, self.at)
        token = draw_token(logits[:, :self.n_vocab], keys, s.temperature, s.top_k, s.top_p, s.min_p)
        if self.given is not None:
            token = torch.where(self.at < self.given, self.ids.index_select(1, self.at), token)
        self.ids.index_copy_(1, self.at, token)
        self.at.add_(1)


# ---------------------------------------------------------------------------- draws

def draw_token(logits, keys, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Token ids (B, 1), drawn from softmax(logits / temperature) over the likeliest. logits:
    (B, V), keys: (B, 1), each of which decides its row's draw.

    Uses the Gumbel-max trick (Gumbel 1954): the argmax of logits plus Gumbel noise. Unlike
    torch.multinomial it can't return an id of probability 0 on any device, and logits that differ
    in the last digit, as in another batch, hardly ever give another token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = keep_likeliest(logits, top_k, top_p, min_p, temperature)  # (B, K), (B, K)
    return ids.gather(1, (logits + gumbel(keys, ids)).argmax(dim=-1, keepdim=True))


def keep_likeliest(logits, top_k=None, top_p=1.0, min_p=0.0, temperature=1.0):
    """logits: (B, V) -> those to draw from, over the temperature, and their ids, (B, K) each. -inf
    stands for what is left out.

    top_k keeps the k likeliest; top_p then the fewest whose probabilities add up to top_p (Holtzman
    et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1); min_p then those at
    least min_p times as likely as the likeliest (Nguyen et al. 2024, "Turning Up the Heat").
    """
    V = logits.shape[-1]
    if (top_k or V) >= V and top_p == 1:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    else:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)  # likeliest first
    if temperature != 1:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # 1e-40 overflows nothing
    if top_p < 1:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p.cumsum(dim=-1) - p >= top_p, -math.inf)
    if min_p > 0:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits, ids


def penalize(logits, ids, n_seen, penalty):
    """Make tokens that the text already has less likely: divide their logits by the penalty,
    multiply negative ones (Keskar et al. 2019, "CTRL", section 4.1). logits: (B, V), ids: (B, T),
    the first n_seen of which, at least one, are the text -> (B, V)"""
    if penalty == 1:
        return logits
    is_seen = torch.arange(ids.shape[1], device=ids.device) < n_seen
    seen = torch.where(is_seen, ids, ids[:, :1])  # (B, T)
    old = logits.gather(1, seen)  # (B, T)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def noise_keys(seeds, n_positions):
    """An int64 hash of seed and position for each position of each row, (rows, n_positions)."""
    seeds = torch.tensor([seed % 2**63 for seed in seeds])
    return mix(mix(seeds)[:, None] + torch.arange(n_positions))


def gumbel(keys, ids):
    """Gumbel noise, a function of key and token id: (B, 1), (B, K) int64 -> (B, K) float32.

    A generator's noise would depend on earlier draws and on the device.
    """
    bits = mix(keys + ids * (0x9e3779b97f4a7c15 - 2**64)) & ((1 << 23) - 1)
    uniform = (bits + 0.5) * 2.0**-23  # exact in float32, never 0 or 1
    return -(-uniform.log()).log()


def mix(z):
    """A bijective hash of 64-bit numbers: the last steps of SplitMix64 (Steele et al. 2014). The
    masks turn >>, which copies the sign, into a logical shift."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * (0xbf58476d1ce4e5b9 - 2**64)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * (0x94d049bb133111eb - 2**64)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


# ---------------------------------------------------------------------------- text

class Text:
    """The text of one sample while its tokens arrive; `take` gives the part that can no longer
    change.

    Bytes of an incomplete character, and what may be the beginning of a stop string, can still
    change. `ended` is None, then 'stop' after a stop string, 'end' after the model's own end, or
    'length' after max_new_tokens.
    """

    def __init__(self, prompt, max_new_tokens, stop=()):
        """prompt: what is shown before the sample. stop: strings that end it, and aren't shown."""
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.text, self.start, self.taken = prompt, len(prompt), 0
        self.stop, self.max_new_tokens, self.n_tokens = stop, max_new_tokens, 0
        self.ended = None if max_new_tokens else 'length'

    @property
    def made(self):
        """The text without the prompt."""
        return self.text[self.start:]

    def add(self, token):
        """token: the next token's bytes."""
        self.n_tokens += 1
        is_last = self.n_tokens == self.max_new_tokens
        searched = len(self.text)
        self.text += self.decoder.decode(token, is_last)
        found = []  # (end, start) of each stop string
        for s in self.stop:
            at = self.text.find(s, max(self.start, searched - len(s) + 1))
            if at >= 0:
                found.append((at + len(s), at))
        if found:
            self.text = self.text[:min(found)[1]]  # the one that was complete first
            self.ended = 'stop'
        elif is_last:
            self.ended = 'length'

    def end(self):
        """The model has ended the text by a token, which isn't shown."""
        self.n_tokens += 1
        self.text += self.decoder.decode(b'', True)
        self.ended = 'end'

    def take(self):
        """What became final since the last call."""
        end = len(self.text)
        if not self.ended:
            end -= self.undecided()
        piece, self.taken = self.text[self.taken:end], end
        return piece

    def undecided(self):
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for n in range(min(longest, len(self.text) - self.start), 0, -1):
            if any(s.startswith(self.text[-n:]) for s in self.stop):
                return n
        return 0
