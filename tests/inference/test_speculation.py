"""Drafts change the time and no token."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from bardlet.config.model import ModelConfig
from bardlet.inference import readers
from bardlet.inference.decoders.pages import PAGE
from bardlet.inference.generate import generate, stream
from bardlet.inference.speculation import LENGTHS, LONGEST, Drafts
from bardlet.models import build
from bardlet.runtime import native

V = 7
CONFIG = ModelConfig("llama", vocab_size=V, block_size=160, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, head_dim=16,
                     n_inner=48, activation="silu", norm_eps=1e-6)  # fmt: skip
GPT2 = replace(CONFIG, model="gpt2", n_kv_head=2, activation="gelu_new", norm_eps=1e-5)


def random_model(config: ModelConfig, scale: float = 4.0) -> Any:
    torch.manual_seed(0)
    model = build(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(scale) if parameter.dim() > 1 else None
    return model


class Counter(readers.PagedReader):
    """Counts the steps that read drafts, and the tokens of drafts that were read and taken back."""

    steps = drafted = wrong = 0

    def read_ahead(self, context: readers.Context, draft: Any) -> torch.Tensor:
        Counter.steps += 1
        Counter.drafted += len(draft)
        return super().read_ahead(context, draft)

    def take_back(self, context: readers.Context, number: int) -> None:
        Counter.wrong += number
        super().take_back(context, number)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> type[Counter]:
    monkeypatch.setattr(readers, "PagedReader", Counter)
    Counter.steps = Counter.drafted = Counter.wrong = 0
    return Counter


@pytest.mark.parametrize(("config", "dtype", "by_torch"), [
    (CONFIG, None, False), (GPT2, None, False), (CONFIG, torch.int8, False), (CONFIG, None, True),
    (CONFIG, torch.bfloat16, True), (CONFIG, torch.int8, True), (GPT2, None, True)])
def test_tokens_are_those_without_drafts(config: ModelConfig, dtype: torch.dtype | None, by_torch: bool,
                                         counter: type[Counter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, past the window and several pages, with stops; `generate` makes no drafts."""
    if by_torch:
        monkeypatch.setattr(native, "library", lambda *args: None)
    model, chance = random_model(config), random.Random(0)
    for seed in range(1 if by_torch else 2):
        pattern = [chance.randrange(V) for _ in range(chance.randrange(3, 9))]
        prompt = (pattern * 30)[: chance.choice([5, 63, 64, 65, 130, 200])]
        for temperature, stop_ids in ((0.0, ()), (0.6, ()), (1.0, (3,))):
            options: dict[str, Any] = {"temperature": temperature, "seed": [seed], "stop_ids": stop_ids, "dtype": dtype}
            before = counter.steps
            [want] = generate(model, [prompt], 250, **options)
            assert counter.steps == before
            assert [step[0] for step in stream(model, [prompt], 250, **options)] == want
    before = counter.steps
    assert len(list(stream(model, [[1, 2] * 20], 20, drafts=False))) == 20 and counter.steps == before
    assert 0 < counter.wrong < counter.drafted  # some drafts were right, and some wrong


def test_a_text_that_repeats_itself_takes_fewer_steps(counter: type[Counter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says: here every step takes one second."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("bardlet.inference.generate.time.perf_counter", lambda: next(ticks))
    model = random_model(CONFIG, 0.0)  # all logits are equal, and the first token wins
    assert list(stream(model, [[0, 0, 0]], 150, temperature=0)) == [[0]] * 150
    assert counter.steps < 30


def test_useless_drafts_become_rare() -> None:
    """Of a random text, at most one step in ten has a draft once it is clear that none is right."""
    chance, text = random.Random(0), []
    drafts, drafted = Drafts([]), 0
    for step in range(2000):
        token = chance.randrange(5)
        draft = drafts.next(20)
        right = 0
        for guess in draft[:1]:
            right += guess == 99
        drafts.learn(len(draft), right, 1.0 + 0.15 * len(draft))
        drafted += bool(draft) and step >= 1000
        drafts.append(token)
        text.append(token)
    assert drafted < 100
    assert drafts.ids == text


def test_drafts_continue_the_longest_match() -> None:
    drafts = Drafts([1, 2, 3, 4, 5, 9, 9, 3, 4, 5, 8, 1, 2, 3, 4, 5])
    assert drafts.next(3)[:1] == [8]  # the newest of the places with 3, 4, 5; nothing longer occurred twice
    longer = Drafts([*range(LENGTHS[1] + 5), 6, 7, 8, 99, *range(LENGTHS[1] + 3)])
    assert longer.next(2)[:1] == [LENGTHS[1] + 3]
    assert Drafts([1, 2]).next(5) == []
    assert len(Drafts([1, 2, 3, 4] * 20).next(99)) <= LONGEST
    assert Drafts([1, 2, 3, 4] * 20).next(0) == []


def test_a_draft_stays_on_its_page() -> None:
    model = random_model(CONFIG)
    with torch.inference_mode():
        reader = readers.PagedReader(model, readers.new_decoder(model, None), 3)
        context = reader.open([1] * (PAGE - 3))
        reader.step()
        reader.append(context, 2)
        assert reader.room(context) == 2
        logits = reader.read_ahead(context, [3, 4])
        reader.take_back(context, 2)
        assert context.ids == [1] * (PAGE - 3) + [2] and context.read == PAGE - 2
        reader.append(context, 5)
        again = reader.read_ahead(context, [])
        other = reader.open([1] * (PAGE - 3) + [2, 5])
        contexts, want = reader.step()
        assert contexts == [other] and torch.equal(want, again) and len(logits) == 3
        assert [node.tokens for node in context.nodes] == [[1] * (PAGE - 3) + [2, 5]]
