"""A model writes answers: each a function of its seed alone, and as likely as the model says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bardlet import models
from bardlet.config.finetuning import GRPOConfig
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template, prompts
from bardlet.data.prompts import Prompts
from bardlet.data.records import Question
from bardlet.evaluation.metrics import distinct_ngrams
from bardlet.runtime.distributed import Dist
from bardlet.stages import rollout
from bardlet.stages.rewards import Answer
from bardlet.tokenizer import Tokenizer, train_bpe
from bardlet.training import losses

HERE = Dist(0, 1, torch.device("cpu"))
SHAPE = ModelConfig("qwen3", vocab_size=270, block_size=48, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                    n_inner=32, activation="silu")  # fmt: skip
SHAPES = {"qwen3": SHAPE, "gpt2": replace(SHAPE, model="gpt2", activation="gelu_new")}
CONFIG = GRPOConfig(reward="exact", answer_tokens=12, temperature=1.3, dtype="fp32")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_bpe(iter(["one and two and three"] * 20), 270)


@pytest.fixture(params=SHAPES)
def policy(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(1)
    model = models.build(replace(SHAPES[request.param], vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that answers end at different places
    return model


@pytest.fixture
def asked(tokenizer: Tokenizer) -> Prompts:
    questions = [Question([{"role": "user", "content": "one " * n}], str(n)) for n in range(1, 9)]
    return Prompts(questions, [chat_template.encode(tokenizer, one.prompt, ask=True)[0] for one in questions])


def write(policy: torch.nn.Module, tokenizer: Tokenizer, asked: Prompts, which: list[int],
          seeds: list[int]) -> rollout.Rollout:  # fmt: skip
    return rollout.sample_rollout(policy, tokenizer, asked, which, seeds, CONFIG, HERE, CONFIG.temperature)


def test_an_answer_depends_on_its_seed_alone(policy: torch.nn.Module, tokenizer: Tokenizer, asked: Prompts,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    which, seeds = [0, 5, 5, 2, 7, 1], [11, 12, 13, 14, 15, 16]
    made = write(policy, tokenizer, asked, which, seeds)
    assert len({answer.text for answer in made.answers}) > 3
    assert made.answers == [write(policy, tokenizer, asked, [i], [seed]).answers[0]
                            for i, seed in zip(which, seeds, strict=True)]  # fmt: skip
    monkeypatch.setattr(rollout, "AT_ONCE", 2)
    again = write(policy, tokenizer, asked, which, seeds)
    assert again.answers == made.answers and torch.equal(again.idx_AT, made.idx_AT)
    assert policy.training


def test_the_targets_are_what_was_written_behind_the_question(policy: torch.nn.Module, tokenizer: Tokenizer,
                                                              asked: Prompts) -> None:  # fmt: skip
    made = write(policy, tokenizer, asked, [3, 0, 6], [1, 2, 3])
    ends = {tokenizer.vocab["<|end|>"], tokenizer.eos_id}
    for i, (which, answer) in enumerate(zip([3, 0, 6], made.answers, strict=True)):
        mask = made.target_AT[i] != losses.IGNORE
        places, asked_T = mask.nonzero().flatten(), asked.ids[which]
        assert places.tolist() == list(range(len(asked_T) - 1, len(asked_T) - 1 + int(made.lengths[i])))
        assert made.idx_AT[i, : len(asked_T)].tolist() == asked_T.tolist()
        assert made.idx_AT[i, places[1:]].tolist() == made.target_AT[i, places[:-1]].tolist()
        new = made.target_AT[i][mask].tolist()
        assert tokenizer.decode(new, skip_special=True).strip() == answer.text
        assert answer.ended == (new[-1] in ends) and (answer.ended or len(new) <= CONFIG.answer_tokens)


def test_log_p_is_that_of_the_distribution_it_was_drawn_from(policy: torch.nn.Module, tokenizer: Tokenizer, asked: Prompts,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    made = write(policy, tokenizer, asked, [3, 0, 6], [1, 2, 3])
    monkeypatch.setattr(rollout, "AT_ONCE", 2)
    found = rollout.log_probability(policy, made, CONFIG, HERE)
    policy.eval()
    for i in range(3):
        n = int((made.target_AT[i] != losses.IGNORE).nonzero().max()) + 1
        with torch.no_grad():
            logp = (policy(made.idx_AT[i : i + 1, :n])[0] / CONFIG.temperature).log_softmax(-1)
        for t in range(made.idx_AT.shape[1]):
            target = int(made.target_AT[i, t])
            by_hand = logp[t, target].item() if target != losses.IGNORE else 0.0
            assert found[i, t].item() == pytest.approx(by_hand, abs=1e-5)


def test_what_answers_show() -> None:
    target = torch.tensor([[5, 6, losses.IGNORE], [5, losses.IGNORE, losses.IGNORE]])
    made = rollout.Rollout([], [Answer("a b a b", True), Answer("a b", False)], torch.zeros_like(target), target)
    found = rollout.rollout_stats(made, np.array([1.0, 0.0]))
    assert (found.reward, found.tokens, found.ended, found.different) == (0.5, 1.5, 0.5, 1.0)
    assert found.distinct == distinct_ngrams(["a b a b", "a b"], 2) == 0.5  # ab ba ab, ab
    assert distinct_ngrams(["a", ""], 2) == 0


def test_each_question_is_asked_once_in_an_epoch() -> None:
    asked = np.concatenate([prompts.sample_prompts(number, 6, 15, seed=3) for number in range(5)])  # two epochs
    assert sorted(asked[:15]) == sorted(asked[15:]) == list(range(15)) and asked[:15].tolist() != asked[15:].tolist()
    assert (prompts.sample_prompts(2, 6, 15, seed=3) == asked[12:18]).all()
    assert (prompts.sample_prompts(0, 15, 15, seed=4) != asked[:15]).any()
    assert sorted(prompts.sample_prompts(0, 40, 10, seed=0)) == sorted(list(range(10)) * 4)  # more than there are
