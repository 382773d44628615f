"""
A GPT once more, with every option of model.py, as plainly as it can be written: one text, one head
at a time, in float64, without a cache. It takes the weights by their names and shares no code with
model.py.

    logits = naive.logits(model, idx)           # (B, T) -> (B, T, V), differentiable
    loss = naive.loss(model, idx, targets)
"""

import math

import torch


def logits(model, idx, vitals=None):
    """vitals: a list to which each text adds [(residual stream, sizes of the attention's logits)]
    of its layers."""
    w = {name: p.double() for name, p in model.named_parameters(remove_duplicate=False)}
    return torch.stack([logits_of_text(model.config, w, ids, vitals) for ids in idx.tolist()])


def loss(model, idx, targets):
    """The mean of -log p over the targets that aren't -1."""
    p, wanted = logits(model, idx).softmax(dim=-1).flatten(0, 1), targets.flatten().tolist()
    kept = [(i, target) for i, target in enumerate(wanted) if target != -1]
    return sum(-p[i, target].log() for i, target in kept) / len(kept)


def logits_of_text(c, w, ids, vitals):
    x = w['transformer.wte.weight'][ids]  # (T, C)
    if c.pos_emb == 'learned':
        x = x + w['transformer.wpe.weight'][:len(ids)]
    for rows in ngram_rows(c, ids):
        x = x + w['transformer.wne.weight'][rows]
    if c.embd_norm:
        x = norm(c, w, 'transformer.ln_embd', x)
    x0, first_v, layers = x, None, []
    for i in range(c.n_layer):
        h = f'transformer.h.{i}'
        y, first_v, sizes = attention(c, w, f'{h}.attn', norm(c, w, f'{h}.ln_1', x), first_v, sees(c, ids))
        x = x + y
        y = activation(c, linear(w, f'{h}.mlp.c_fc', norm(c, w, f'{h}.ln_2', x)))
        x = x + linear(w, f'{h}.mlp.c_proj', y)
        layers.append((x, sizes))
        if c.x0_residual:
            x = x + w['x0_weights'][i] * x0
    if vitals is not None:
        vitals.append(layers)
    y = linear(w, 'lm_head', norm(c, w, 'transformer.ln_f', x))
    return c.logit_softcap * torch.tanh(y / c.logit_softcap) if c.logit_softcap else y


def ngram_rows(c, ids):
    """For n from 2 to c.ngram, the row of each position's last n tokens, in 64-bit arithmetic."""
    found, keys = [], ids
    for n in range(1, c.ngram):
        before = [-1] * n + ids  # the token n positions before
        keys = [wrapped(key * (c.vocab_size + 1) + before[t] + 1) for t, key in enumerate(keys)]
        found.append([(wrapped(key * 2654435761) >> 15) % c.ngram_rows for key in keys])
    return found


def wrapped(n):
    """The signed 64-bit number that n overflows to."""
    return (n + 2**63) % 2**64 - 2**63


def linear(w, name, x):
    return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0.0)


def norm(c, w, name, x):
    if c.norm == 'layernorm':
        x = x - x.mean(dim=1, keepdim=True)
    x = x / (x.square().mean(dim=1, keepdim=True) + c.norm_eps).sqrt()
    return x * w[f'{name}.weight'] + w.get(f'{name}.bias', 0.0)


def activation(c, x):
    if c.activation == 'swiglu':
        gate, value = x[:, :c.n_inner], x[:, c.n_inner:]
        return gate / (1 + torch.exp(-gate)) * value
    if c.activation == 'relu2':
        return x.clamp(min=0) ** 2
    if c.activation == 'gelu_tanh':
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def sees(c, ids):
    """Whether each position attends to each one up to it: (T, T). An end begins a document."""
    document = [ids[:t + 1].count(c.document_end) for t in range(len(ids))]
    return torch.tensor([[s <= t and document[s] == document[t] for s in range(len(ids))]
                         for t in range(len(ids))])


def attention(c, w, name, x, first_v, seen):
    """What the layer adds to x, the first layer's values, and the sizes of all heads' logits."""
    hs, groups, heads, sizes = c.head_size, c.n_head // c.n_kv_head, [], []
    qkv, kv = linear(w, f'{name}.c_attn', x), c.n_kv_head * hs
    q, k, v = qkv.split((c.n_head * hs, kv, kv), dim=1)
    if first_v is None:
        first_v = v
    elif c.value_residual:
        own, of_first = w[f'{name}.value_mix']
        v = own * v + of_first * first_v
    for head in range(c.n_head):
        q_h, at = q[:, head * hs:(head + 1) * hs], head // groups * hs
        k_h, v_h = k[:, at:at + hs], v[:, at:at + hs]
        if c.qk_norm_weights:
            q_h, k_h = (t / (t.square().mean(dim=1, keepdim=True) + c.norm_eps).sqrt()
                        * w[f'{name}.{kind}.weight'] for t, kind in ((q_h, 'q_norm'), (k_h, 'k_norm')))
        elif c.qk_norm:
            q_h, k_h = (t / t.square().mean(dim=1, keepdim=True).sqrt() for t in (q_h, k_h))
        if c.pos_emb == 'rope':
            q_h, k_h = turned(c, q_h), turned(c, k_h)
        heads.append(weights(c, head, q_h, k_h, seen) @ v_h)
        size = (q_h @ k_h.T).abs() / math.sqrt(hs)
        if c.attn_type.startswith('GK'):
            size = distances(q_h, k_h)
        sizes.append(size.tril())
    return linear(w, f'{name}.c_proj', torch.cat(heads, dim=1)), first_v, torch.stack(sizes)


def turned(c, x):
    """Channels i and i + hs / 2 as one complex number, turned by the position times a frequency."""
    half = c.head_size // 2
    f = torch.tensor([frequency(c, i) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * f
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=1)


def frequency(c, i):
    f = c.rope_theta ** (-2 * i / c.head_size)
    if not c.rope_scaling:
        return f
    factor, low, high, original = c.rope_scaling
    turns = original * f / (2 * math.pi)  # within the original length
    if turns < low:
        return f / factor
    if turns > high:
        return f
    kept = (turns - low) / (high - low)
    return (1 - kept) * f / factor + kept * f


def slopes(n):
    """ALiBi's, by Press et al.'s recursion."""
    if math.log2(n).is_integer():
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    lower = 2 ** math.floor(math.log2(n))
    return slopes(lower) + slopes(2 * lower)[::2][:n - lower]


def distances(q, k):
    """|q - k|^2 / (2 sqrt(hs)): (T, T)"""
    return (q[:, None] - k[None]).square().sum(dim=-1) / (2 * math.sqrt(q.shape[1]))


def weights(c, head, q, k, seen):
    """What each position takes of each up to it: q, k: (T, hs) -> (T, T)"""
    T, dot = len(q), q @ k.T * (c.attn_scale or 1 / math.sqrt(q.shape[1]))
    kind, _, n = c.attn_type.partition('-')
    if kind == 'SM':
        if c.pos_emb == 'alibi':
            t = torch.arange(T)
            dot = dot - slopes(c.n_head)[head] * (t[:, None] - t)
        e = torch.exp(dot - dot.tril().amax(dim=1, keepdim=True)) * seen
        return e / e.sum(dim=1, keepdim=True)
    if kind == 'GK':
        return torch.exp(-distances(q, k)).tril()
    if kind == 'GKpoly':
        return ((1 - distances(q, k) / 2 ** int(n)) ** (2 ** int(n))).tril()
    so_far = torch.arange(1, T + 1)[:, None]
    length = {'length': so_far, 'block_size': c.block_size, 'none': 1}[c.pa_norm]
    return (pointwise(c.attn_type.removeprefix('PA_'), dot) / length).tril()


def pointwise(name, x):
    sigmoid = 1 / (1 + torch.exp(-x))
    return {'gelu': 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), 'relu': x.clamp(min=0),
            'sigmoid': sigmoid, 'square': x**2, 'silu': x * sigmoid,
            'relu-square': x.clamp(min=0) ** 2, 'tanh': 2 / (1 + torch.exp(-2 * x)) - 1}[name]
