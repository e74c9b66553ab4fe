"""Packing: each conversation once per epoch, no attention between conversations, and targets only in answers."""

from __future__ import annotations

from collections.abc import Iterable
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
from bardlet.models.llama import Llama
from bardlet.training import losses

PAD = 1
CONFIG = ModelConfig(model="qwen3", vocab_size=23, block_size=24, n_layer=2, n_head=2, n_kv_head=1, n_embd=16,
                     head_dim=8, n_inner=24, activation="silu", norm_eps=1e-6)  # fmt: skip


def random_chats(random: np.random.Generator, number: int, longest: int) -> TokenizedChats:
    """Return conversations of up to `longest` tokens; some have no answer, some have long ones."""
    length = random.integers(1, longest + 1, number)
    answer = [random.random(n) < random.choice([0.0, 0.3, 0.9]) for n in length]
    for mask in answer:
        mask[0] = False  # a role token is never a target
    return TokenizedChats(random.integers(2, 23, length.sum()).astype("<u2"), np.concatenate(answer), np.cumsum(length))


@given(st.lists(st.integers(1, 30), max_size=60))
@settings(max_examples=300)
def test_rows_have_each_item_once_without_overlap(lengths: list[int]) -> None:
    length = -np.sort(-np.array(lengths, np.int64))
    row, position = pack(length, 30)
    taken = np.zeros((len(length), 30), int)
    for r, p, n in zip(row, position, length, strict=True):
        assert p + n <= 30
        taken[r, p : p + n] += 1
    assert taken.max(initial=0) <= 1 and taken.sum() == length.sum()
    full = taken.sum(1)[: row.max(initial=-1) + 1]
    assert (full > 0).all()
    if length.max(initial=0) <= 10:  # a new row starts only if no other has room
        assert (full[:-1] > 20).all()


def test_random_mixtures_lose_nothing_and_give_finite_losses() -> None:
    """200 of them; tests/acceptance/test_more_of_the_same.py has 1000."""
    check_mixtures(range(200))


def check_mixtures(seeds: Iterable[int]) -> None:
    """Assert that each epoch has every conversation with an answer that fits once, and that the counts add up."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    for seed in seeds:
        random = np.random.default_rng(seed)
        chats = random_chats(random, int(random.integers(1, 30)), 40)  # some exceed the context of 24
        packed = seed % 3 > 0
        batches = ChatBatches(chats, 24, int(random.integers(1, 5)), seed, PAD, int(random.integers(1, 3)), packed)
        fit = batches.fitted
        assert len(fit.indices) + fit.left_out + fit.unanswered == len(chats)
        assert fit.unanswered == sum(not chats.answer[a:b].any() for a, b in zip(chats.starts, chats.ends, strict=True))
        for epoch in range(2):
            steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
            epoch_batches = [batches.batch(step) for step in steps]
            assert sorted(targets_of(epoch_batches)) == expected_targets(chats, fit)
            inputs = [tuple(chats.tokens[a : a + n])
                      for a, n in zip(chats.starts[fit.indices], fit.length, strict=True)]
            assert sorted(inputs_of(epoch_batches, packed)) == sorted(inputs)
        if epoch_batches and seed % 5 == 0:
            total = sum(losses.completion_loss(model, batch) for batch in epoch_batches)
            assert torch.isfinite(total)
            if seed % 10 == 0:
                total.backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def expected_targets(chats: TokenizedChats, fit: FittedRows) -> list[tuple[int, int]]:
    """Return (token, next token) wherever the next token is part of an answer."""
    positions = [int(t) for i, n in zip(fit.indices, fit.length, strict=True)
                 for t in range(chats.starts[i], chats.starts[i] + n) if chats.answer[t + 1]]  # fmt: skip
    return sorted((int(chats.tokens[t]), int(chats.tokens[t + 1])) for t in positions)


def targets_of(batches: list[data_batch.Batch]) -> list[tuple[int, int]]:
    """Return (input, target) wherever there is a target."""
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        where = batch["target"] != losses.IGNORE
        pairs += zip(batch["idx"][where].tolist(), batch["target"][where].tolist(), strict=True)
    return pairs


def inputs_of(batches: list[data_batch.Batch], packed: bool) -> list[tuple[int, ...]]:
    """Return the input tokens of each conversation: by segment if packed, else each row without padding."""
    inputs = []
    for batch in batches:
        for b, row in enumerate(batch["idx"]):
            if packed:
                segment = batch["segment"][b]
                inputs += [tuple(row[segment == n].tolist()) for n in range(1, int(segment.max()) + 1)]
            elif (row != PAD).any():
                inputs.append(tuple(row[row != PAD].tolist()))
    return inputs


@pytest.mark.parametrize("kind", [Llama, GPT2])
def test_packed_equals_unpacked(kind: type) -> None:
    """Loss and gradients agree within 1e-5."""
    torch.manual_seed(1)
    gpt2 = replace(CONFIG, model="gpt2", n_kv_head=2, activation="gelu_new", norm_eps=1e-5)
    model = kind(CONFIG if kind is Llama else gpt2).double()
    chats = random_chats(np.random.default_rng(5), 40, 30)
    results = []
    for packed in (True, False):
        batches = ChatBatches(chats, 24, 8, 3, PAD, packed=packed)
        epoch = list(batches.all())
        model.zero_grad()
        total = sum(losses.completion_loss(model, batch) for batch in epoch)
        total.backward()
        results.append((total.item(), [p.grad.clone() for p in model.parameters()], len(epoch)))
    assert results[0][2] < results[1][2], "packing takes fewer batches"
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_long_conversation_ends_with_its_last_answer_that_fits() -> None:
    answer = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 1], bool)  # three answers that end at tokens 3, 7 and 9
    chats = TokenizedChats(np.arange(10), answer, np.array([10]))
    for room, length, cut in ((9, 9, 0), (8, 7, 1), (7, 7, 1), (6, 3, 1), (3, 3, 1)):
        fit = fit_to_window(chats, room)
        assert (fit.length.tolist(), fit.cut, fit.left_out) == ([length], cut, 0), room
    assert fit_to_window(chats, 2).left_out == 1
    assert fit_to_window(TokenizedChats(np.arange(10), np.zeros(10, bool), np.array([4, 10])), 50).unanswered == 2


def test_epochs_differ_but_are_reproducible() -> None:
    chats = random_chats(np.random.default_rng(2), 60, 20)
    batches, again = (ChatBatches(chats, 24, 4, 9, PAD) for _ in range(2))
    n = batches.batches_per_epoch
    first, second = ([batches.batch(step)["idx"] for step in range(e * n, (e + 1) * n)] for e in (0, 1))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, again.batch(n + step)["idx"]) for step, a in enumerate(second))
    other = ChatBatches(chats, 24, 4, 10, PAD)
    assert not all(torch.equal(a, other.batch(step)["idx"]) for step, a in enumerate(first))
