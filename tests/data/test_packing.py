"""Conversations as rows: each once an epoch, none sees another, and nothing but the answers is learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.config.model import ModelConfig
from bardlet.data import batch as data_batch
from bardlet.data.packing import ChatBatches, FittedRows, TokenizedChats, fit_to_window, pack
from bardlet.models.gpt2 import GPT2
from bardlet.models.qwen3 import Qwen3
from bardlet.training import losses

PAD = 1
CONFIG = ModelConfig(model="qwen3", vocab_size=23, block_size=24, n_layer=2, n_head=2, n_kv_head=1, n_embd=16,
                     head_dim=8, n_inner=24, activation="silu", norm_eps=1e-6)  # fmt: skip


def chats(random: np.random.Generator, number: int, longest: int) -> TokenizedChats:
    """Conversations of up to `longest` tokens; of some everything is masked, of some the answer is long."""
    length = random.integers(1, longest + 1, number)
    answer = [random.random(n) < random.choice([0.0, 0.3, 0.9]) for n in length]
    for mask in answer:
        mask[0] = False  # what begins a message is never learned
    return TokenizedChats(random.integers(2, 23, length.sum()).astype("<u2"), np.concatenate(answer), np.cumsum(length))


@given(st.lists(st.integers(1, 30), max_size=60))
@settings(max_examples=300)
def test_rows_hold_everything_once_and_nothing_overlaps(lengths: list[int]) -> None:
    length = -np.sort(-np.array(lengths, np.int64))
    row, place = pack(length, 30)
    taken = np.zeros((len(length), 30), int)
    for r, p, n in zip(row, place, length, strict=True):
        assert p + n <= 30
        taken[r, p : p + n] += 1
    assert taken.max(initial=0) <= 1 and taken.sum() == length.sum()
    full = taken.sum(1)[: row.max(initial=-1) + 1]
    assert (full > 0).all()
    if length.max(initial=0) <= 10:  # a row is begun where no other has room
        assert (full[:-1] > 20).all()


def test_a_thousand_mixes_lose_nothing_and_two_hundred_make_no_nan() -> None:
    """Every epoch ends, each conversation with an answer that fits is in it once, and the counts add up."""
    torch.manual_seed(0)
    model = Qwen3(CONFIG)
    for seed in range(1000):
        random = np.random.default_rng(seed)
        held = chats(random, int(random.integers(1, 30)), 40)  # some are longer than the context of 24
        packed = seed % 3 > 0
        batches = ChatBatches(held, 24, int(random.integers(1, 5)), seed, PAD, int(random.integers(1, 3)), packed)
        fit = batches.fitted
        assert len(fit.which) + fit.left_out + fit.unanswered == len(held)
        assert fit.unanswered == sum(not held.answer[a:b].any() for a, b in zip(held.starts, held.ends, strict=True))
        for epoch in range(2):
            steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
            made = [batches.batch(step) for step in steps]
            assert sorted(learned(made)) == expected(held, fit)
            whole = [tuple(held.tokens[a : a + n]) for a, n in zip(held.starts[fit.which], fit.length, strict=True)]
            assert sorted(spoken(made, packed)) == sorted(whole)
        if made and seed % 5 == 0:
            total = sum(losses.completion_loss(model, batch) for batch in made)
            assert torch.isfinite(total)
            if seed % 10 == 0:
                total.backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def expected(held: TokenizedChats, fit: FittedRows) -> list[tuple[int, int]]:
    """(a token, the next one) wherever the next is of an answer."""
    places = [int(t) for i, n in zip(fit.which, fit.length, strict=True)
              for t in range(held.starts[i], held.starts[i] + n) if held.answer[t + 1]]  # fmt: skip
    return sorted((int(held.tokens[t]), int(held.tokens[t + 1])) for t in places)


def learned(made: list[data_batch.Batch]) -> list[tuple[int, int]]:
    """(what is read, what is to be predicted) wherever there is a target."""
    found: list[tuple[int, int]] = []
    for batch in made:
        where = batch["target"] != losses.IGNORE
        found += zip(batch["idx"][where].tolist(), batch["target"][where].tolist(), strict=True)
    return found


def spoken(made: list[data_batch.Batch], packed: bool) -> list[tuple[int, ...]]:
    """What each conversation of the batches reads, by its segment; of a row of its own all that is no padding."""
    found = []
    for batch in made:
        for b, row in enumerate(batch["idx"]):
            if packed:
                segment = batch["segment"][b]
                found += [tuple(row[segment == n].tolist()) for n in range(1, int(segment.max()) + 1)]
            elif (row != PAD).any():
                found.append(tuple(row[row != PAD].tolist()))
    return found


@pytest.mark.parametrize("kind", [Qwen3, GPT2])
def test_packed_is_unpacked(kind: type) -> None:
    """The same loss and gradients, within 1e-5, whatever shares a row."""
    torch.manual_seed(1)
    gpt2 = replace(CONFIG, model="gpt2", n_kv_head=2, activation="gelu_new", norm_eps=1e-5)
    model = kind(CONFIG if kind is Qwen3 else gpt2).double()
    held = chats(np.random.default_rng(5), 40, 30)
    results = []
    for packed in (True, False):
        batches = ChatBatches(held, 24, 8, 3, PAD, packed=packed)
        made = list(batches.all())
        model.zero_grad()
        total = sum(losses.completion_loss(model, batch) for batch in made)
        total.backward()
        results.append((total.item(), [p.grad.clone() for p in model.parameters()], len(made)))
    assert results[0][2] < results[1][2], "several in a row"
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_too_long_ends_with_its_last_answer_that_fits() -> None:
    answer = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 1], bool)  # three answers, which end with tokens 3, 7 and 9
    held = TokenizedChats(np.arange(10), answer, np.array([10]))
    for room, length, cut in ((9, 9, 0), (8, 7, 1), (7, 7, 1), (6, 3, 1), (3, 3, 1)):
        fit = fit_to_window(held, room)
        assert (fit.length.tolist(), fit.cut, fit.left_out) == ([length], cut, 0), room
    assert fit_to_window(held, 2).left_out == 1
    assert fit_to_window(TokenizedChats(np.arange(10), np.zeros(10, bool), np.array([4, 10])), 50).unanswered == 2


def test_epochs_differ_and_repeat() -> None:
    held = chats(np.random.default_rng(2), 60, 20)
    one, again = (ChatBatches(held, 24, 4, 9, PAD) for _ in range(2))
    n = one.batches_per_epoch
    first, second = ([one.batch(step)["idx"] for step in range(e * n, (e + 1) * n)] for e in (0, 1))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, again.batch(n + step)["idx"]) for step, a in enumerate(second))
    other = ChatBatches(held, 24, 4, 10, PAD)
    assert not all(torch.equal(a, other.batch(step)["idx"]) for step, a in enumerate(first))
