"""support/text/masks.py: what is learned of conversations, in windows, in training and in evaluations."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, evaluations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model import GPT, GPTConfig
from support.machine import runtime
from support.evaluating.scoring import mean_loss
from support.training import checkpoint
from support.text.masks import BEGIN, READ, TARGET, Conversations
from support.text.tokens import (
    choose_windows,
    eval_windows,
    fingerprint,
    open_split,
    read_windows,
    target_share,
)

ANSWERS = '--max_iters=6', '--eval_interval=3', '--eval_iters=0', '--gradient_accumulation_steps=4', \
    '--batch_size=2', '--learning_rate=1e-2', '--dropout=0.2'


def make(lengths, seed=0, share=0.4):
    """Conversations with the given lengths, of random tokens; some tokens, at least one each, are targets."""
    generator = np.random.default_rng(seed)
    parts = []
    for length in lengths:
        mask = np.where(generator.random(length) < share, TARGET, READ)
        mask[-1], mask[0] = TARGET, BEGIN
        parts.append(mask)
    mask = np.concatenate(parts).astype(np.uint8)
    return Conversations(generator.integers(0, 64, len(mask)).astype(np.uint16), mask)


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, made in splits.items():
        made.tokens.tofile(folder / f'{split}.bin')
        made.mask.tofile(folder / f'{split}.mask')
    return folder


def write_conversations(folder):
    lengths = np.random.default_rng(3).integers(4, 17, 100)
    return write(folder, train=make(lengths[:80]), val=make(lengths[80:], seed=1))


def conversations_of(made):
    """(ids, mask) of each conversation."""
    begins = np.flatnonzero(made.mask == BEGIN).tolist()
    return [(made.tokens[a:b].astype(np.int64), made.mask[a:b])
            for a, b in zip(begins, [*begins[1:], len(made)])]


@pytest.fixture
def data(tmp_path):
    return write_conversations(tmp_path / 'data')


# ---------------------------------------------------------------------------- windows

@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 12), st.integers(1, 5),
       st.integers(0, 1000))
def test_evaluation_has_each_target_once_and_nothing_else(lengths, block_size, batch_size, seed):
    made = make([*lengths, 2], seed)
    positions = Conversations(np.arange(len(made), dtype=np.uint16), made.mask)
    seen = []
    for starts in eval_windows(positions, block_size, batch_size):
        x, y = read_windows(positions, starts, block_size)
        assert (x + 1 == y)[y >= 0].all()
        seen += y[y >= 0].tolist()
    assert seen == np.flatnonzero(made.mask == TARGET).tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.sampled_from([3, 8, 40]),
       st.sampled_from(['random', 'epoch']))
def test_training_window_begins_with_a_conversation_or_goes_on_with_one(lengths, block_size, sampler):
    made = make(lengths)
    begins = np.flatnonzero(made.mask == BEGIN)
    starts = choose_windows(made, sampler, 1337, 5, 50, block_size)
    first = begins[np.searchsorted(begins, starts, side='right') - 1]  # of their conversations
    ends = np.append(begins, len(made))[np.searchsorted(begins, starts, side='right')]
    assert ((starts - first) % block_size == 0).all()
    _, y = read_windows(made, starts, block_size)
    at = starts[:, None] + np.arange(1, block_size + 1)
    inside = at < ends[:, None]
    assert (y[~inside] == -1).all() and (y >= 0).any(axis=1).all()
    assert (made.count_targets(starts, block_size) == (y >= 0).sum(axis=1)).all()
    assert ((y >= 0) == (inside & (made.mask[np.minimum(at, len(made) - 1)] == TARGET))).all()


def test_an_epoch_has_each_conversation_once():
    made = make([5] * 37)
    for epoch in range(2):
        starts = choose_windows(made, 'epoch', 7, epoch * 37, 37, 16)
        assert sorted(starts.tolist()) == [*range(0, 185, 5)]
    assert set(choose_windows(made, 'random', 7, 0, 37, 16).tolist()) == {*range(0, 185, 5)}


# ---------------------------------------------------------------------------- losses

def nats(model, ids, mask):
    """The loss of each target of one conversation, by itself."""
    ids = torch.from_numpy(ids)[None]
    logits, _ = model(ids[:, :-1], ids[:, 1:])
    each = F.cross_entropy(logits[0], ids[0, 1:], reduction='none')
    return each[torch.from_numpy(mask[1:] == TARGET)]


@pytest.mark.parametrize('n_batches', [0, 1000])
def test_masked_loss_equals_that_of_the_answers_one_conversation_at_a_time(n_batches):
    made = make(np.random.default_rng(5).integers(3, 30, 50))
    model = GPT(GPTConfig(**TINY)).eval()
    with torch.no_grad():
        alone = torch.cat([nats(model, *one) for one in conversations_of(made)]).double().mean().item()
    run = runtime.start('cpu', 'float32', False)
    assert mean_loss(model, run, made, 32, 4, n_batches) == pytest.approx(alone, rel=1e-6)


def test_gradient_of_an_iteration_is_that_of_the_mean_over_all_its_targets():
    """Whatever the micro-batches: their windows have different numbers of targets."""
    made = make(np.random.default_rng(5).integers(3, 30, 50))
    model = GPT(GPTConfig(**TINY))
    starts = choose_windows(made, 'random', 1, 0, 12, 32)
    chosen = [one for s in starts for one in conversations_of(made) if np.array_equal(
        one[0], made.tokens[s:s + len(one[0])]) and made.mask[s] == BEGIN]
    assert len(chosen) == 12
    torch.cat([nats(model, *one) for one in chosen]).mean().backward()
    expected = model.transformer.wte.weight.grad.clone()
    shares = [target_share(made, starts, first, 3, 32) for first in range(0, 12, 3)]
    assert len(set(shares)) > 1 and sum(shares) == pytest.approx(4)
    model.zero_grad()
    for i, share in enumerate(shares):
        x, y = map(torch.from_numpy, read_windows(made, starts[3 * i:3 * i + 3], 32))
        (model(x, y)[1] * share / 4).backward()
    torch.testing.assert_close(model.transformer.wte.weight.grad, expected)


def test_run_on_conversations_evaluates_the_answers_alone(data, train, tmp_path):
    log = train(*ANSWERS, '--dropout=0.0', data_dir=data)['log']
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    model = GPT(GPTConfig(**state['model_args'])).eval()
    model.load_state_dict(state['model'])
    with torch.no_grad():
        for split, found in zip(('train', 'val'), evaluations(log)[6]):
            alone = [nats(model, *one) for one in conversations_of(open_split(data, split))]
            assert found == pytest.approx(torch.cat(alone).mean().item(), abs=1e-4)
    assert evaluations(log)[6][0] < evaluations(log)[0][0]


def weights_of(folder):
    return checkpoint.load(folder / 'latest.pt')['model']


def test_resumed_run_on_conversations_equals_an_uninterrupted_one(data, train, tmp_path):
    args = (*ANSWERS, '--sampler=epoch')
    train(*args, data_dir=data, out_dir=tmp_path / 'whole')
    train(*args, '--max_iters=2', data_dir=data)
    train(*args, '--init_from=resume', data_dir=data)
    whole, parts = weights_of(tmp_path / 'whole'), weights_of(tmp_path / 'out')
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


# ---------------------------------------------------------------------------- files

def test_run_is_not_resumed_on_another_mask(data, train):
    train(*ANSWERS, '--max_iters=1', data_dir=data)
    mask = np.fromfile(data / 'train.mask', np.uint8)
    mask[np.flatnonzero(mask == TARGET)[0]] = READ
    mask.tofile(data / 'train.mask')
    with pytest.raises(ValueError, match='is not the data that .* was trained on'):
        train(*ANSWERS, '--init_from=resume', data_dir=data)


def put(name, *values):
    return lambda folder: np.array(values, np.uint8).tofile(folder / name)


@pytest.mark.parametrize('spoil, words', [
    (put('train.mask', 2, 0, 1), ['train.mask has 3 bytes', 'tokens, and each needs one']),
    (put('train.mask'), ['train.mask has 0 bytes']),
    (lambda folder: (folder / 'val.mask').unlink(), ['val.mask is missing', 'prepare them again']),
    (lambda folder: spoil_mask(folder, 0, READ), ['train.mask is no mask']),
    (lambda folder: spoil_mask(folder, 5, 3), ['train.mask is no mask']),
    (lambda folder: spoil_mask(folder, slice(1, None), READ), ['train.mask is no mask', 'must be some']),
])
def test_mask_that_is_not_of_its_tokens_is_one_line(spoil, words, data, train, tmp_path):
    spoil(data)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(*ANSWERS, data_dir=data)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)
    assert not (tmp_path / 'out').exists()


def spoil_mask(folder, at, value):
    mask = np.fromfile(folder / 'train.mask', np.uint8)
    mask[at] = value
    mask.tofile(folder / 'train.mask')


def test_mask_that_dataset_json_does_not_know_is_told(data):
    digests = {name: hashlib.sha256((data / name).read_bytes()).hexdigest()
               for name in ('train.bin', 'train.mask', 'val.bin', 'val.mask')}
    counts = {split: len(open_split(data, split)) for split in ('train', 'val')}
    info = {'tokens': counts, 'sha256': digests}
    (data / 'dataset.json').write_text(json.dumps(info))
    first = fingerprint(data, 'train', open_split(data, 'train'))
    assert first != digests['train.bin']
    spoil_mask(data, 3, READ), spoil_mask(data, 2, TARGET), os.utime(data / 'dataset.json')
    with pytest.raises(ValueError, match=r'train.mask doesn.t match its SHA-256'):
        fingerprint(data, 'train', open_split(data, 'train'))
    (data / 'dataset.json').write_text(json.dumps(info | {'sha256': {}, 'chat': {'end': ''}}))
    assert fingerprint(data, 'train', open_split(data, 'train')) != first
    (data / 'train.mask').unlink(), (data / 'val.mask').unlink()
    with pytest.raises(FileNotFoundError, match='train.mask is missing'):
        open_split(data, 'train')
