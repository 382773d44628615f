"""decoding.py: each sample against a loop over whole windows, draws against formulas, texts in pieces."""

import copy
import math

import pytest
import torch
from conftest import scrambled, tiny, tokens
from hypothesis import example, given
from hypothesis import strategies as st

from support.machine.runtime import Runtime
from support.sampling.decoding import (Text, draw_token, for_sampling, generate, gumbel,
                                       keep_likeliest, noise_keys, penalize)
from support.sampling.quantize import build_quantized


MODELS = [{}, {'pos_emb': 'rope', 'n_kv_head': 1, 'qk_norm': True, 'rope_scaling': (4.0, 1.0, 4.0, 16)},
          {'pos_emb': 'alibi', 'n_head': 4, 'n_kv_head': 2, 'norm': 'rmsnorm', 'activation': 'swiglu'},
          {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50, 'logit_softcap': 5.0, 'tie_weights': False},
          {'value_residual': True, 'pos_emb': 'rope', 'head_size': 8}, {'attn_type': 'GK'},
          {'attn_type': 'PA_sigmoid', 'pa_norm': 'block_size'}]
DRAWS = [{'temperature': 0}, {'temperature': 0, 'repetition_penalty': 1.5, 'n_vocab': 50}, {},
         {'temperature': 0.8, 'top_k': 20}, {'top_p': 0.9, 'min_p': 0.01, 'n_vocab': 60},
         {'temperature': 3.0, 'top_k': 9, 'top_p': 0.8, 'min_p': 0.05, 'repetition_penalty': 1.3}]


def made(block_size=12, **options):
    """A model in float64 whose weights are large enough for each token of the context to matter."""
    return scrambled(tiny(block_size=block_size, **options), 0.3).double().eval()


def plain(model, prompt, n, seed=0, n_vocab=None, **options):
    """A prompt, a list of ids, and n more, each from the last block_size ids and by `choice`."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.block_size:]]))[0][0, -1].tolist()[:n_vocab]
        noise = gumbel(noise_keys([seed], len(ids) + 1)[:, -1:], torch.arange(len(logits))[None])[0]
        ids.append(choice(logits, set(ids), noise.tolist(), **options))
    return ids


def choice(logits, seen, noise, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """An id, drawn as the papers say, which decoding.py names."""
    c = repetition_penalty
    logits = [(x / c if x > 0 else x * c) if i in seen else x for i, x in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if temperature == 0:
        return order[0]
    order = order[:top_k]
    p = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    kept = [i for n, i in enumerate(order) if sum(p[:n]) / sum(p) < top_p and p[n] >= min_p * p[0]]
    return max(kept, key=lambda i: logits[i] / temperature + noise[i])


def prompts(*lengths):
    """Prompts of these lengths, as one batch filled up with 7s, and the lengths."""
    texts = [tokens(n).tolist() for n in lengths]
    return texts, torch.tensor([t + [7] * (max(lengths) - len(t)) for t in texts]), torch.tensor(lengths)


# ---------------------------------------------------------------------------- the loop

@pytest.mark.parametrize('options', MODELS, ids=str)
def test_cached_samples_are_those_of_whole_windows_whatever_the_model_and_the_draw(options):
    """Of prompts shorter than block_size and longer, two samples each, far past block_size."""
    model = made(**options)
    texts, batch, lengths = prompts(1, 5, 12, 15)
    for i, draw in enumerate(DRAWS if options == {} else [DRAWS[0], DRAWS[5]]):
        seeds = range(10 * i, 10 * i + 8)
        out = generate(model, batch, 18, n_samples=2, lengths=lengths, seeds=seeds, **draw)
        assert out.shape == (8, 15 + 18)
        for row, seed, text in zip(out.tolist(), seeds, [t for t in texts for _ in range(2)]):
            assert row[:len(text) + 18] == plain(model, text, 18, seed, **draw), (draw, len(text))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('options', MODELS[:3], ids=str)
def test_model_prepared_for_sampling_gives_the_same_samples(options, dtype):
    """In bfloat16 bit for bit: the embedding keeps its own type, also where the output layer shares it."""
    run, samples = Runtime('cpu', dtype, False, 'gloo'), []
    model, idx = made(**options, dropout=0.5).float(), tokens(3, 4)
    for _ in range(2):
        with run.autocast():
            samples.append(generate(model, idx, 20, temperature=0.8, top_k=20, seeds=range(3)))
        for_sampling(model, run, 3, n_steps=500)
    assert torch.equal(*samples) and model.transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize('weights', ['full', 'int8', 'int4'])
def test_compiled_steps_with_a_cpu_s_own_products_give_the_same_text_and_leave_nothing_out(weights):
    """Past block_size too. The layers are large enough for libraries whose weights no compiler follows."""
    options = {'block_size': 24, 'n_layer': 1, 'n_embd': 256, 'n_inner': 4096, 'pos_emb': 'rope'}
    plain, idx = scrambled(tiny(**options), 0.05).eval(), tokens(2, 5)
    if weights != 'full':
        plain = build_quantized(plain.config, plain.state_dict().items(), weights)
    model = copy.deepcopy(plain)
    for m, is_compiled in ((plain, False), (model, True)):
        for_sampling(m, Runtime('cpu', 'float32', is_compiled, 'gloo'), 2, n_steps=500)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=True)
    texts = [generate(model, idx, 30, seeds=range(2), **how)
             for model, how in ((plain, {}), (model, {'compiled': compiled}))]
    assert torch.equal(*texts)


# ---------------------------------------------------------------------------- seeds

@pytest.mark.parametrize('draw', DRAWS[2:], ids=str)
def test_row_depends_on_its_seed_and_not_on_its_batch(draw):
    """Alone, among other samples and prompts, shorter and longer, in float32, in which products of one row
    and of several round differently."""
    model, seeds = made().float(), [0, 1, 1337, 2**40, -5]
    texts, batch, lengths = prompts(1, 6, 15)
    alone = [[generate(model, torch.tensor([t]), 20, seeds=[s], **draw)[0].tolist() for s in seeds]
             for t in texts]
    assert len({*map(tuple, alone[1])}) == len(seeds)
    out = generate(model, batch, 20, n_samples=5, lengths=lengths, seeds=seeds[::-1] * 3, **draw).tolist()
    for i, row in enumerate(out):
        expected = alone[i // 5][4 - i % 5]
        assert row[:len(expected)] == expected


def test_seeds_leave_the_generator_of_torch_alone_and_without_them_it_decides():
    model, idx, samples = made(), tokens(1, 3), []
    before = torch.get_rng_state()
    generate(model, idx, 5, seeds=[1])
    assert torch.equal(torch.get_rng_state(), before)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, idx, 20).tolist())
    assert samples[0] == samples[1] != samples[2]


def test_noise_stays_the_same_from_version_to_version():
    """So that a seed gives the same sample again."""
    keys = noise_keys([0, 1337], 1025)
    noise = gumbel(keys[:, 1024:], torch.tensor([[0, 1, 50256]] * 2))
    assert keys[:, [0, 1024]].tolist() == [
        [0, 8101005175654470197], [-6681136782711664046, -6159405201061185756]]
    assert noise.flatten().tolist() == pytest.approx(
        [-0.862951, -0.109100, 0.488992, -0.988331, 5.329561, 0.255545], abs=1e-5)
    out = draw_token(torch.zeros(6, 1000), noise_keys(range(6), 4)[:, 3:])
    assert out.flatten().tolist() == [78, 36, 960, 839, 93, 251]


HALVES = torch.tensor([[1 / 16, 1 / 4, 1 / 16, 1 / 2, 1 / 8]]).log() + 7
ALIKE = torch.zeros(1, 4)  # whose probabilities and their sums are exact


@pytest.mark.parametrize('logits, options, n_kept', [
    (HALVES, {'top_k': 9}, 5), (HALVES, {'top_p': 0.49}, 1), (HALVES, {'top_p': 0.51}, 2),
    (HALVES, {'min_p': 0.51}, 1), (HALVES, {'min_p': 0.49}, 2), (HALVES, {'top_k': 2, 'top_p': 0.66}, 1),
    (ALIKE, {}, 4), (ALIKE, {'top_p': 0.25}, 1), (ALIKE, {'top_p': 0.5}, 2), (ALIKE, {'top_p': 0.75}, 3),
    (ALIKE, {'min_p': 1.0}, 4)], ids=str)
def test_likeliest_are_kept_up_to_the_edge_and_none_beyond(logits, options, n_kept):
    values, ids = keep_likeliest(logits, **options)
    kept = ids[values > -math.inf].tolist()
    assert len(kept) == n_kept and logits[0, kept].min() >= logits[0].sort().values[-n_kept]


@pytest.mark.parametrize('top_k', [None, 1, 30])
@pytest.mark.parametrize('top_p', [1.0, 0.1, 0.95])
@pytest.mark.parametrize('min_p', [0.0, 0.02, 0.5])
@pytest.mark.parametrize('penalty', [1.0, 1.3, 0.8])
def test_what_is_drawn_from_equals_transformers(top_k, top_p, min_p, penalty):
    from transformers.generation import logits_process as theirs
    logits, seen = torch.randn(100, 64) * 3, tokens(100, 40)  # many of them more than once
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    ours = penalize(logits, torch.cat((seen, tokens(100, 20)), dim=1), 40, penalty)  # 20 aren't there yet
    assert torch.equal(ours, expected)
    expected = theirs.TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = theirs.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    expected = theirs.MinPLogitsWarper(min_p)(None, expected) if min_p else expected
    values, ids = keep_likeliest(ours, top_k, top_p, min_p)
    assert torch.equal(torch.full_like(logits, -math.inf).scatter(1, ids, values), expected)


def test_tiny_temperatures_and_one_candidate_are_greedy():
    logits = torch.randn(500, 20) * 10
    for options in ({'temperature': 1e-40}, {'top_k': 1}, {'top_p': 1e-9}, {'min_p': 1.0}):
        drawn = draw_token(logits, noise_keys(range(500), 1), **options)
        assert torch.equal(drawn, logits.argmax(-1, keepdim=True))


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
@example('bab', ['ab'], None, b'')  # the prompt ends in a
def test_text_in_pieces_equals_the_whole_and_nothing_of_a_stop_string_leaks(text, stop, data, broken):
    """Pieces end anywhere, inside characters too; the end may be broken UTF-8."""
    raw = text.encode() + broken
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8))) if data else range(len(raw))
    pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    expected, ended = first_stop(raw.decode(errors='replace'), stop)
    grown = Text('pr\u00f6mpt a', len(pieces), stop)
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


@pytest.mark.parametrize('stop, pieces, shown, ended', [
    (['abc', '\n\n'], ['x', 'a', 'b', 'd', 'a\n', 'y'], ['x', '', '', 'abd', 'a', '\ny'], None),
    (['abc'], ['xa', 'bc', ''], ['x', '', ''], 'stop'),
    ([], [b'\xe2', b'\x82', b'\xac', b'\xe2', 'a'], ['', '', '\u20ac', '', '\ufffda'], None)])
def test_what_is_decided_is_shown_at_once_and_no_more(stop, pieces, shown, ended):
    grown, found = Text('', 100, stop), []
    for piece in pieces:
        if not grown.ended:
            grown.add(piece if isinstance(piece, bytes) else piece.encode())
        found.append(grown.take())
    assert (found, grown.ended) == (shown, ended)
