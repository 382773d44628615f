"""What is learned of conversations: windows, shares of a loss, and masks that don't fit."""

import numpy as np
import pytest
import torch
from conftest import TINY, evaluations, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import refusal
from torch.nn import functional as F

from model import GPT, GPTConfig
from support.evaluating.scoring import Windows, mean_loss
from support.machine import runtime
from support.text.dataset import Dataset
from support.text.masks import BEGIN, READ, TARGET, Conversations
from support.training.state import State

ANSWERS = ('--max_iters=6', '--eval_interval=3', '--eval_iters=0', '--batch_size=2',
           '--gradient_accumulation_steps=4', '--learning_rate=1e-2', '--dropout=0.2', '--sampler=epoch')


def make(lengths, seed=0, pack=False):
    """Conversations of these lengths, of random tokens; some, at least one each, are targets."""
    generator, parts = np.random.default_rng(seed), []
    for length in lengths:
        mask = np.where(generator.random(length) < 0.4, TARGET, READ)
        mask[-1], mask[0] = TARGET, BEGIN
        parts.append(mask)
    mask = np.concatenate(parts).astype(np.uint8)
    split = Conversations('train', generator.integers(0, 64, len(mask)).astype(np.uint16), mask)
    split.pack = pack
    return split


def conversations_of(split):
    """(ids, mask) of each conversation."""
    begins = np.flatnonzero(split.mask[:] == BEGIN).tolist()
    return [(split[a:b].astype(np.int64), split.mask[a:b])
            for a, b in zip(begins, [*begins[1:], len(split)])]


@pytest.fixture
def folder(tmp_path):
    lengths, folder = np.random.default_rng(3).integers(4, 17, 100), tmp_path / 'data'
    folder.mkdir()
    for split, made in (('train', make(lengths[:80])), ('val', make(lengths[80:], seed=1))):
        made.tokens.tofile(folder / f'{split}.bin')
        made.mask.tofile(folder / f'{split}.mask')
    return folder


def spoil(folder, at, value, name='train.mask'):
    mask = np.fromfile(folder / name, np.uint8)
    mask[at] = value
    mask.tofile(folder / name)


# ---------------------------------------------------------------------------- windows

def test_windows_of_conversations_stay_the_same_from_version_to_version():
    lengths = 5, 30, 2, 9, 17, 40, 3
    mask = np.concatenate([[BEGIN, *([READ, TARGET] * n)[:n - 2], TARGET] for n in lengths])
    split = Conversations('train', np.arange(106, dtype=np.uint16), mask.astype(np.uint8))
    assert split.eval_windows(8, 15).tolist() == [
        [0, 5, 13, 21, 29, 35, 37, 46, 54, 63, 71, 79, 87, 95, 103]]
    assert split.eval_windows(8, 4, 2).tolist() == [[0, 5, 21, 35], [46, 63, 79, 95]]
    assert split.train_windows('epoch', 1337, 5, 12, 8).tolist() == [
        35, 46, 95, 79, 13, 54, 29, 103, 0, 5, 87, 46]
    starts = split.train_windows('random', 1337, 5, 12, 8)
    assert starts.tolist() == [5, 5, 21, 21, 35, 37, 54, 63, 71, 79, 95, 95]
    assert split.epoch_length(8) == 120 and split.fingerprint({}) == \
        '207d131237d045307847185b203b8b1f570720c19a0be97f7ebd7c4082963ca9'


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 12), st.integers(1, 5),
       st.integers(0, 1000))
def test_evaluation_has_each_target_once_and_nothing_else(lengths, block_size, batch_size, seed):
    mask = make([*lengths, 2], seed).mask
    split, seen = Conversations('val', np.arange(len(mask), dtype=np.uint16), mask), []
    for starts in split.eval_windows(block_size, batch_size):
        x, y = split.read(starts, block_size)
        assert (x + 1 == y)[y >= 0].all()
        seen += y[y >= 0].tolist()
    assert seen == np.flatnonzero(mask == TARGET).tolist()


# ---------------------------------------------------------------------------- packed

def test_packed_windows_stay_the_same_from_version_to_version():
    split, none = make([5, 30, 2, 9, 17, 40, 3], pack=True), [-1] * 3
    assert split.train_windows('epoch', 1337, 5, 6, 32).tolist() == [
        [46, 37, 35, 0], [5, 103, -1, -1], [95, *none], [95, *none], [5, 103, -1, -1], [63, *none]]
    assert split.train_windows('random', 1337, 5, 6, 32).tolist() == [
        [63, *none], [63, *none], [5, 103, -1, -1], [37, 35, 0, 46], [37, 35, 0, 46], [95, *none]]
    assert split.epoch_length(32) == 4 * 32 and split.padding(32) == pytest.approx(1 - 107 / (4 * 33))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.sampled_from([3, 16, 45]),
       st.integers(0, 1000))
def test_an_epoch_of_packed_windows_has_each_target_once_and_no_other(lengths, block_size, seed):
    split = make(lengths, seed, pack=True)
    split.tokens = np.arange(len(split), dtype=np.uint16)
    begins = np.append(np.flatnonzero(split.mask == BEGIN), len(split))
    n = split.epoch_length(block_size) // block_size
    for epoch in range(2):
        windows = split.train_windows('epoch', seed, epoch * n, n, block_size)
        x, y = split.read(windows, block_size)
        assert ((x + 1 == y) | (y < 0)).all()  # no target follows another conversation's token
        assert sorted(y[y >= 0].tolist()) == np.flatnonzero(split.mask == TARGET).tolist()
        for starts, row in zip(windows, x.tolist()):
            starts = starts[starts >= 0]
            ends = np.minimum(begins[np.searchsorted(begins, starts, side='right')], starts + block_size + 1)
            inside = [place for start, end in zip(starts, ends) for place in range(start, end)]
            assert row[:len(inside)] == inside[:block_size]


def test_packed_windows_follow_from_seed_and_place_alone_and_neighbours_change():
    split = make(np.random.default_rng(1).integers(4, 20, 400), pack=True)
    n = split.epoch_length(64) // 64

    def windows(first, count):
        return [{*row} - {-1} for row in split.train_windows('epoch', 7, first, count, 64).tolist()]

    whole = windows(0, 2 * n)
    assert windows(n - 2, 5) == whole[n - 2:n + 3]
    assert sum(window in whole[:n] for window in whole[n:]) < n / 4


# ---------------------------------------------------------------------------- losses

def nats(model, ids, mask):
    """The loss of each target of one conversation, by itself."""
    ids = torch.from_numpy(ids)[None]
    logits, _ = model(ids[:, :-1], ids[:, 1:])
    each = F.cross_entropy(logits[0], ids[0, 1:], reduction='none')
    return each[torch.from_numpy(mask[1:] == TARGET)]


def test_masked_loss_equals_that_of_the_answers_one_conversation_at_a_time():
    split = make(np.random.default_rng(5).integers(3, 30, 50))
    model = GPT(GPTConfig(**TINY)).eval()
    with torch.no_grad():
        each = torch.cat([nats(model, *one) for one in conversations_of(split)])
    run = runtime.start('cpu', 'float32', False)
    assert mean_loss(model, run, split, Windows(32, 4, 0)) == pytest.approx(
        each.double().mean().item(), rel=1e-6)


def test_gradient_of_an_iteration_is_that_of_the_mean_over_all_its_targets():
    """Whatever the micro-batches: their windows have different numbers of targets."""
    split = make(np.random.default_rng(5).integers(3, 30, 50))
    model, begins = GPT(GPTConfig(**TINY)), np.flatnonzero(split.mask == BEGIN)
    starts = split.train_windows('random', 1, 0, 12, 32)
    chosen = [conversations_of(split)[i] for i in np.searchsorted(begins, starts)]
    torch.cat([nats(model, *one) for one in chosen]).mean().backward()
    expected = model.transformer.wte.weight.grad.clone()
    shares = [split.target_share(starts, first, 3, 32) for first in range(0, 12, 3)]
    assert len(set(shares)) > 1 and sum(shares) == pytest.approx(4)
    model.zero_grad()
    for i, share in enumerate(shares):
        x, y = map(torch.from_numpy, split.read(starts[3 * i:3 * i + 3], 32))
        (model(x, y)[1] * share / 4).backward()
    torch.testing.assert_close(model.transformer.wte.weight.grad, expected)


def test_run_evaluates_the_answers_and_resumes_as_if_uninterrupted(folder, train, tmp_path):
    log = train(*ANSWERS, data_dir=folder, out_dir=tmp_path / 'whole')['log']
    state = State.load(tmp_path / 'whole/latest.pt')
    model, data = GPT(GPTConfig(**state.model_args)).eval(), Dataset(folder)
    model.load_state_dict(State.load(tmp_path / 'whole/ckpt.pt').model)
    with torch.no_grad():
        for split, found in zip(('train', 'val'), evaluations(log)[6]):
            alone = torch.cat([nats(model, *one) for one in conversations_of(data[split])])
            assert found == pytest.approx(alone.mean().item(), abs=1e-4)
    train(*ANSWERS, '--max_iters=2', data_dir=folder)
    train(*ANSWERS, '--init_from=resume', data_dir=folder)
    resumed = State.load(tmp_path / 'out/latest.pt').model
    assert all(torch.equal(state.model[k], resumed[k]) for k in resumed)


def test_packing_is_asked_for_and_changes_what_a_window_holds(folder, train, tmp_path):
    logs = [train(*ANSWERS, f'--pack={pack}', data_dir=folder,
                  out_dir=tmp_path / str(pack))['log']
            for pack in (False, True)]
    assert losses(logs[0]) != losses(logs[1])
    assert evaluations(logs[0])[0] == evaluations(logs[1])[0]


# ---------------------------------------------------------------------------- files

@pytest.mark.parametrize('change, told', [
    (lambda folder: (folder / 'train.mask').write_bytes(b'\2\0\1'), 'train.mask has 3 bytes, but'),
    (lambda folder: (folder / 'val.mask').unlink(), 'val.mask is missing'),
    (lambda folder: spoil(folder, 0, READ), 'train.mask is no mask')])
def test_mask_that_is_not_of_its_tokens_is_one_line(change, told, folder):
    change(folder)
    assert told in refusal(Dataset, folder)
