"""decoding.py: the cache against none, draws against transformers' and the softmax, text against pieces."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import example, given
from hypothesis import strategies as st

from model import GPT, GPTConfig
from support.sampling import decoding, graphs as recording
from support.sampling.decoding import (Text, draw_token, generate, gumbel, keep_likeliest, noise_keys,
                                      penalize, stream)
from support.machine.linear import HAS_ONEDNN, fast_linears
from support.sampling.quantize import build_int8


def tiny(**changes):
    """A model whose weights are large enough for the context to matter."""
    model = GPT(GPTConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)
    return model


def tokens(*shape):
    return torch.randint(TINY['vocab_size'], shape)


def padded(prompts):
    """Prompts (1, T) of any lengths as one batch, filled up with 7s, and the lengths."""
    lengths = torch.tensor([p.shape[1] for p in prompts])
    batch = torch.full((len(prompts), int(lengths.max())), 7)
    for row, prompt in zip(batch, prompts, strict=True):
        row[:prompt.shape[1]] = prompt
    return batch, lengths


def keys(n, position=0):
    """Keys (n, 1) of a draw each, of seeds 0 to n - 1."""
    return noise_keys(range(n), n, position + 1)[:, -1:]


# ---------------------------------------------------------------------------- the loop

def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = tiny().double()
    idx = tokens(2, 3)
    out = generate(model, idx, 40, temperature=0)  # beyond block_size
    assert out.shape == (2, 43) and torch.equal(out[:, :3], idx)
    for t in range(3, 43):
        logits, _ = model(out[:, max(0, t - 32):t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(-1))


@pytest.mark.parametrize('length', [1, 5, 30, 32, 40])
def test_cached_generation_equals_uncached(length):
    """With prompts shorter than, equal to and longer than block_size, and far past it."""
    model = tiny(block_size=32).double()
    idx = tokens(2, length)
    out = generate(model, idx, 60, temperature=0, n_samples=3)
    expected = idx.repeat_interleave(3, dim=0)
    with torch.no_grad():
        for _ in range(60):
            logits, _ = model(expected[:, -32:])
            expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


def test_prompts_of_different_lengths_go_on_as_if_alone():
    model = tiny(block_size=32).double()
    prompts = [tokens(1, n) for n in (3, 9, 17)]
    batch, lengths = padded(prompts)
    for options in ({'temperature': 0}, {'temperature': 0, 'repetition_penalty': 1.5}):
        out = generate(model, batch, 25, lengths=lengths, n_samples=2, **options)
        for i, prompt in enumerate(prompts):
            alone = generate(model, prompt, 25, **options)[0]
            assert torch.equal(out[2 * i, :len(alone)], alone)
            assert torch.equal(out[2 * i + 1, :len(alone)], alone)


def test_streamed_tokens_equal_generated_ones_and_come_one_position_at_a_time():
    model = tiny()
    batch, lengths = padded([tokens(1, 4), tokens(1, 10)])
    seeds = [1, 2, 3, 4]
    pieces = []
    for piece in stream(model, batch, 30, n_samples=2, lengths=lengths, seeds=seeds):
        assert piece.shape == (4, 1)
        pieces.append(piece)
    assert len(pieces) == 6 + 30  # from the shorter prompt's end to the longer one's
    out = generate(model, batch, 30, n_samples=2, lengths=lengths, seeds=seeds)
    assert torch.equal(out, torch.cat((batch[:, :4].repeat_interleave(2, dim=0), *pieces), dim=1))
    assert torch.equal(generate(model, batch, 0), batch)


def test_streaming_does_only_the_work_that_is_asked_for():
    model = tiny()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(model, tokens(1, 4), 1000)
    assert not calls
    next(steps), next(steps)
    assert len(calls) == 2 and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[50:] = 10 * model.lm_head.weight[:14]  # padding that would win if it could
    for options in ({'temperature': 0}, {'top_k': 5}, {'temperature': 100.0}, {'repetition_penalty': 1.2}):
        assert generate(model, tokens(8, 4), 30, n_vocab=50, **options)[:, 4:].max() < 50


# ---------------------------------------------------------------------------- faster layers

@pytest.mark.parametrize('n_rows', [1, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_faster_linear_layers_compute_the_same(n_rows, dtype):
    model, idx = tiny(bias=True), tokens(n_rows, 1)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        for m in linears:
            m.bias is None or m.bias.normal_()
        expected, _ = model(idx)
        with fast_linears(model, n_rows):
            assert all('forward' in m.__dict__ for m in linears)
            found, _ = model(idx)
    assert not any('forward' in m.__dict__ for m in linears)
    tolerance = {'rtol': 1e-5, 'atol': 1e-5} if dtype == torch.float32 else {'rtol': 0, 'atol': 0}
    torch.testing.assert_close(found, expected, **tolerance)


def test_layers_are_as_before_after_a_stream_that_nobody_finished():
    model = tiny()
    steps = stream(model, tokens(1, 4), 1000)
    next(steps)
    assert 'forward' in model.lm_head.__dict__
    del steps
    assert 'forward' not in model.lm_head.__dict__


@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh'])
def test_gelu_is_computed_with_its_layer_unless_somebody_watches(activation):
    model, idx, seen = tiny(activation=activation), tokens(2, 1), []
    with torch.no_grad():
        expected, _ = model(idx)
        with fast_linears(model, 2):
            found, _ = model(idx)
            assert 'forward' in model.transformer.h[0].mlp.gelu.__dict__ or not HAS_ONEDNN
        assert 'forward' not in model.transformer.h[0].mlp.gelu.__dict__
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        first, second = (block.mlp for block in model.transformer.h)
        first.gelu.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
        second.c_fc.register_forward_hook(lambda module, args, y: seen.append(y))
        with fast_linears(model, 2):
            model(idx)
    (x, y), before_gelu = seen
    assert before_gelu.min() < -0.2  # GELU gives no such numbers
    torch.testing.assert_close(y, second.gelu(x))


# ---------------------------------------------------------------------------- repeated operations

@pytest.fixture
def tapes(monkeypatch):
    """The tapes that are recorded, as they come, each with all operators and arguments that it saw."""
    tapes = []

    class Listed(recording.Tape):
        def __init__(self):
            super().__init__()
            self.seen = []
            tapes.append(self)

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen.append((op, args))
            return super().__torch_dispatch__(op, types, args, kwargs)
    monkeypatch.setattr(recording, 'Tape', Listed)
    return tapes


def unrecorded(monkeypatch, *args, **options):
    with monkeypatch.context() as m:
        m.setattr(decoding, 'can_record', lambda *_: False)
        return generate(*args, **options)


@pytest.mark.parametrize('config', [
    {}, {'pos_emb': 'rope', 'n_kv_head': 1, 'qk_norm': True, 'value_residual': True},
    {'pos_emb': 'alibi', 'n_head': 4, 'n_kv_head': 2},
    {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50, 'logit_softcap': 5}])
@pytest.mark.parametrize('options', [
    {'temperature': 0}, {'top_k': 5, 'top_p': 0.9, 'min_p': 0.01, 'repetition_penalty': 1.3, 'n_vocab': 60}])
def test_a_recorded_step_decodes_what_the_model_does(tapes, monkeypatch, config, options):
    """Prompts of different lengths, each with two samples, to the end of block_size and past it, as on a GPU.
    Also what that needs of a step: no copy from or to the CPU, and no grouped queries beside a mask."""
    model = tiny(block_size=32, **config).double()
    monkeypatch.setattr(decoding, 'can_record', lambda *_: True)
    batch, lengths = padded([tokens(1, n) for n in (1, 5, 9)])
    options |= {'n_samples': 2, 'lengths': lengths, 'seeds': range(6)}
    monkeypatch.setattr(recording, 'REACH', 10)
    out = generate(model, batch, 40, **options)
    assert len(tapes) == 3 and all(tape.is_complete for tape in tapes)
    made_of_numbers = torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default
    assert not any(op in made_of_numbers for op, _ in tapes[0].seen)
    attention = [args[:2] for op, args in tapes[0].seen if 'scaled_dot_product' in str(op)]
    assert attention and all(q.shape[1] == k.shape[1] and k.shape[2] == 14 for q, k in attention)
    assert torch.equal(out, unrecorded(monkeypatch, model, batch, 40, **options))


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_a_recorded_step_computes_in_the_same_types(tapes, kind):
    """Logits of recorded steps against those of the model, in the types and by the products of sampling."""
    config, seen = GPTConfig(**TINY | {'block_size': 32}), []
    model = tiny(block_size=32)
    model = build_int8(config, model.state_dict().items()) if kind == 'int8' else model
    idx = tokens(1, 4)
    with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'bfloat16'):
        out = generate(model, idx, 28, temperature=0)
        with torch.no_grad(), fast_linears(model, n_rows=1):
            seen = [model(out[:, :t])[0][:, -1].float() for t in range(4, 32)]
    assert len(tapes) == 1 and tapes[0].is_complete
    for t, logits in zip(range(4, 32), seen, strict=True):  # the token drawn is as likely as the likeliest
        gap = logits.amax(dim=1) - logits.gather(1, out[:, t:t + 1])[:, 0]
        assert gap.max() <= (1e-4 if kind == 'float32' else 0.03) * logits.std()


def test_a_step_that_needs_numbers_or_is_watched_runs_each_time(tapes, monkeypatch):
    class Scale(torch.nn.Module):
        def forward(self, x):
            return x * (2 if x.sum() > 0 else 3)  # of the tokens so far

    model, idx, seen = tiny(block_size=32), tokens(1, 3), []
    model.transformer.drop = Scale()
    out = generate(model, idx, 20, temperature=0)
    assert tapes and not any(tape.is_complete for tape in tapes)
    assert torch.equal(out, unrecorded(monkeypatch, model, idx, 20, temperature=0))
    tapes.clear()
    model = tiny(block_size=32)
    model.transformer.h[1].register_forward_hook(lambda *_: seen.append(1))
    generate(model, idx, 20)
    assert len(seen) == 20 and not tapes


def test_recording_does_not_import_the_compiler():
    """Which takes a second, of the two that a sample takes."""
    code = ('import sys, torch; from model import GPT, GPTConfig;'
            'from support.sampling.decoding import generate;'
            f'generate(GPT(GPTConfig(**{TINY})), torch.zeros(1, 1, dtype=torch.int64), 20);'
            'print("torch._dynamo" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'


@pytest.mark.cuda
@pytest.mark.parametrize('config', [
    {}, {'pos_emb': 'rope', 'n_kv_head': 1}, {'pos_emb': 'alibi', 'n_head': 4, 'n_kv_head': 2}, {'ngram': 3}])
def test_a_cuda_graph_decodes_what_the_model_does(monkeypatch, config):
    model = tiny(block_size=32, **config).double().cuda()
    idx = tokens(3, 4).cuda()
    out = generate(model, idx, 40, seeds=range(3))
    assert torch.equal(out, unrecorded(monkeypatch, model, idx, 40, seeds=range(3)))


@pytest.mark.parametrize('records', [False, True])
def test_a_compiler_takes_a_decoding_step_whole(monkeypatch, records):
    """As sample.py --compile=True asks for it, with any number of positions."""
    monkeypatch.setattr(decoding, 'can_record', lambda *_: records)
    monkeypatch.setattr(recording, 'record', lambda step, device: step() or step)
    model = tiny(block_size=32, pos_emb='rope', n_kv_head=2)
    expected = generate(model, tokens(1, 3).fill_(5), 20, seeds=[1])
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model.compile(dynamic=True, fullgraph=True, backend='eager')
    assert torch.equal(generate(model, tokens(1, 3).fill_(5), 20, seeds=[1]), expected)


# ---------------------------------------------------------------------------- seeds

@pytest.mark.parametrize('options', [{}, {'temperature': 0.8, 'top_k': 200}, {'top_p': 0.9, 'min_p': 0.01},
                                     {'top_k': 20, 'repetition_penalty': 1.3}])
def test_equal_seeds_give_equal_samples_in_any_batch(options):
    """Alone, with other samples, with other prompts, shorter and longer, within block_size and past it."""
    model = tiny(block_size=24).double()
    prompts = [tokens(1, n) for n in (1, 6, 30)]
    seeds = [0, 1, 2, 1337, 2**40, -5]
    alone = [[generate(model, p, 40, seeds=[s], **options)[0] for s in seeds] for p in prompts]
    assert len({tuple(row.tolist()) for row in alone[1]}) == len(seeds)
    together = generate(model, prompts[1], 40, n_samples=6, seeds=seeds, **options)
    assert torch.equal(together, torch.stack(alone[1]))
    batch, lengths = padded(prompts)
    out = generate(model, batch, 40, n_samples=6, lengths=lengths, seeds=seeds[::-1] * 3, **options)
    for i, row in enumerate(out):
        expected = alone[i // 6][5 - i % 6]
        assert torch.equal(row[:len(expected)], expected)


def test_a_batch_in_float32_draws_what_its_rows_draw_alone():
    """Products of one row and of several round differently; noise makes it very unlikely to matter."""
    model, idx = tiny(), tokens(1, 3)
    alone = torch.cat([generate(model, idx, 60, 0.8, 200, seeds=[s]) for s in range(20)])
    assert torch.equal(generate(model, idx, 60, 0.8, 200, n_samples=20, seeds=range(20)), alone)


def test_seeds_leave_torch_s_generator_alone_and_without_them_it_decides():
    model, idx = tiny(), tokens(1, 3)
    before = torch.get_rng_state()
    generate(model, idx, 5, seeds=[1])
    assert torch.equal(torch.get_rng_state(), before)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, idx, 20))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_noise_is_gumbel_s_and_the_same_nowhere():
    """Over seeds, over positions and over ids: mean, variance and extremes, and no correlation."""
    ids = torch.arange(300)[None]
    noise = torch.stack([gumbel(keys(300, position), ids) for position in range(3)]).double()  # (3, 300, 300)
    assert noise.isfinite().all()
    for axis in (1, 2):
        torch.testing.assert_close(noise.mean(axis).mean(), torch.tensor(0.5772).double(), rtol=0, atol=0.01)
        spread = noise.mean(axis).var() * 300  # of means of 300 independent ones: their variance
        torch.testing.assert_close(spread, torch.tensor(math.pi**2 / 6).double(), rtol=0.15, atol=0)
    for a, b in ((noise[0], noise[1]), (noise[0, 1:], noise[0, :-1]), (noise[0, :, 1:], noise[0, :, :-1]),
                 (noise[0, 1:, 1:], noise[0, :-1, :-1]), (noise[1, 1:], noise[0, :-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.02
    assert noise.unique().numel() > 0.97 * noise.numel()


# ---------------------------------------------------------------------------- draws

def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, -math.inf]])
    n = 40000
    for options, kept in (({}, 5), ({'top_k': 2}, 2), ({'top_p': 0.6}, 1), ({'min_p': 0.2}, 2)):
        drawn = draw_token(logits.expand(n, -1), keys(n), 0.7, **options)
        counts = torch.bincount(drawn.flatten(), minlength=5) / n
        expected = (logits[0] / 0.7).softmax(-1)
        expected[expected < expected.sort(descending=True).values[kept - 1]] = 0
        torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.01)
        assert counts[4] == 0


def test_draws_stay_among_the_top_k():
    logits = torch.randn(500, 20)
    drawn = draw_token(logits, keys(500), 5.0, 3)
    assert all(token in row.topk(3).indices for token, row in zip(drawn[:, 0], logits, strict=True))
    assert draw_token(logits, keys(500), 1.0, 1000).max() < 20  # more than there are: all of them


def test_tiny_temperatures_and_one_candidate_are_greedy():
    logits = torch.randn(500, 20) * 10
    for options in ({'temperature': 1e-40}, {'top_k': 1}, {'top_p': 1e-9}, {'min_p': 1.0}):
        assert torch.equal(draw_token(logits, keys(500), **options), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize('top_k', [None, 1, 30])
@pytest.mark.parametrize('top_p', [1.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize('min_p', [0.0, 0.02, 0.5])
def test_what_is_drawn_from_equals_transformers(top_k, top_p, min_p):
    from transformers.generation import logits_process as theirs
    logits = torch.randn(100, 64) * 3
    expected = theirs.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = theirs.MinPLogitsWarper(min_p)(None, expected)
    values, ids = keep_likeliest(logits / 0.7, top_k, top_p, min_p)
    found = torch.full_like(logits, -math.inf).scatter(1, ids, values)
    assert torch.equal(found, expected)


@pytest.mark.parametrize('penalty', [1.0, 1.3, 0.8])
def test_repetition_penalty_equals_transformers(penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    logits, seen = torch.randn(100, 64) * 3, tokens(100, 40)  # many of them more than once
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()) if penalty != 1 else logits
    ids = torch.cat((seen, tokens(100, 20)), dim=1)  # the last 20 aren't there yet
    assert torch.equal(penalize(logits, ids, 40, penalty), expected)


def test_greedy_text_with_a_penalty_equals_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
    ours = tiny(activation='gelu_tanh')
    with torch.no_grad():
        for name, p in theirs.state_dict().items():
            conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            p.copy_(ours.state_dict()[name].T if conv1d else ours.state_dict()[name])
    idx = tokens(3, 5)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False,
                               repetition_penalty=1.4, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(ours, idx, 20, temperature=0, repetition_penalty=1.4), expected)


# ---------------------------------------------------------------------------- text

def first_stop(text, stop):
    """The text up to the first stop string to be complete, looked for character by character."""
    for end in range(len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(s):
                return text[:end - len(s)], 'stop'
    return text, 'length'


letters = st.text(alphabet='ab\u00e9\u20ac\U0001f600', max_size=30)
stops = st.lists(st.text(alphabet='ab\u00e9\U0001f600', min_size=1, max_size=4), max_size=3)


@given(letters, stops, st.data(), st.binary(max_size=3))
@example('aab', ['ab', 'aab', 'b'], None, b'')
def test_text_in_pieces_equals_the_whole_and_nothing_of_a_stop_string_leaks(text, stop, data, broken):
    """Pieces end anywhere, inside characters too; the end may be broken UTF-8."""
    raw = text.encode() + broken
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8))) if data else range(len(raw))
    pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    expected, ended = first_stop(raw.decode(errors='replace'), stop)
    grown = Text('pr\u00f6mpt '.encode() + b'a', len(pieces), stop)
    shown = grown.take()
    assert shown == 'pr\u00f6mpt a'  # where a stop string may not begin
    for piece in pieces:
        assert not grown.ended
        grown.add(piece)
        shown += grown.take()
        assert ('pr\u00f6mpt a' + expected).startswith(shown)
        if grown.ended:
            break
    assert shown == grown.text == 'pr\u00f6mpt a' + expected and grown.ended == ended


def test_all_that_is_decided_is_shown_at_once():
    grown = Text(b'', 100, ['abc', '\n\n'])
    shown = []
    for piece in ('x', 'a', 'b', 'd', 'a\n', 'y', '\u20ac'):
        grown.add(piece.encode())
        shown.append(grown.take())
    grown.add('\u20ac'.encode()[:2])
    shown.append(grown.take())
    grown.add('\u20ac'.encode()[2:])
    shown.append(grown.take())
    assert shown == ['x', '', '', 'abd', 'a', '\ny', '\u20ac', '', '\u20ac']


def test_the_stop_string_that_is_complete_first_ends_the_text():
    for pieces in (['xabbc'], ['x', 'a', 'b', 'b', 'c']):
        grown = Text(b'', 9, ['abb', 'b'])
        for piece in pieces:
            if not grown.ended:
                grown.add(piece.encode())
        assert (grown.take(), grown.ended) == ('xa', 'stop')


def test_no_tokens_are_the_prompt_alone():
    assert Text(b'so', 0).ended == 'length'
