"""Rollouts: completions depend on their seeds alone, and log-probabilities match the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bardlet import models
from bardlet.config.finetuning import GRPOConfig
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template, prompts
from bardlet.data.forms import Question
from bardlet.data.prompts import Prompts
from bardlet.evaluation.metrics import distinct_ngrams
from bardlet.runtime.distributed import Dist
from bardlet.stages import rollout
from bardlet.stages.rewards import Completion
from bardlet.tokenizer import Tokenizer, train_bpe
from bardlet.training import losses

DIST = Dist(0, 1, torch.device("cpu"))
SHAPE = ModelConfig("qwen3", vocab_size=270, block_size=48, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                    n_inner=32, activation="silu")  # fmt: skip
SHAPES = {"qwen3": SHAPE, "gpt2": replace(SHAPE, model="gpt2", activation="gelu_new")}
CONFIG = GRPOConfig(reward="exact", answer_tokens=12, temperature=1.3, dtype="fp32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["one and two and three"] * 20), 270)


@pytest.fixture(params=SHAPES)
def policy(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(1)
    model = models.build(replace(SHAPES[request.param], vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that completions differ in length
    return model


@pytest.fixture
def chat_prompts(tokenizer: Tokenizer) -> Prompts:
    questions = [Question([{"role": "user", "content": "one " * n}], str(n)) for n in range(1, 9)]
    return Prompts(questions, [chat_template.encode(tokenizer, question.prompt, add_generation_prompt=True)[0]
                               for question in questions])


def sample(policy: torch.nn.Module, tokenizer: Tokenizer, chat_prompts: Prompts, which: list[int],
           seeds: list[int]) -> rollout.Rollout:  # fmt: skip
    return rollout.sample_rollout(policy, tokenizer, chat_prompts, which, seeds, CONFIG, DIST, CONFIG.temperature)


def test_a_completion_depends_on_its_seed_alone(policy: torch.nn.Module, tokenizer: Tokenizer, chat_prompts: Prompts,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    which, seeds = [0, 5, 5, 2, 7, 1], [11, 12, 13, 14, 15, 16]
    sampled = sample(policy, tokenizer, chat_prompts, which, seeds)
    assert len({completion.text for completion in sampled.completions}) > 3
    assert sampled.completions == [sample(policy, tokenizer, chat_prompts, [i], [seed]).completions[0]
                                   for i, seed in zip(which, seeds, strict=True)]  # fmt: skip
    monkeypatch.setattr(rollout, "MAX_ROWS", 2)
    smaller_batches = sample(policy, tokenizer, chat_prompts, which, seeds)
    assert smaller_batches.completions == sampled.completions and torch.equal(smaller_batches.idx_AT, sampled.idx_AT)
    assert policy.training


def test_the_targets_are_the_completion_tokens(policy: torch.nn.Module, tokenizer: Tokenizer,
                                               chat_prompts: Prompts) -> None:  # fmt: skip
    sampled = sample(policy, tokenizer, chat_prompts, [3, 0, 6], [1, 2, 3])
    ends = {tokenizer.vocab["<|end|>"], tokenizer.eos_id}
    for i, (which, answer) in enumerate(zip([3, 0, 6], sampled.completions, strict=True)):
        mask = sampled.target_AT[i] != losses.IGNORE
        positions, prompt_T = mask.nonzero().flatten(), chat_prompts.ids[which]
        assert positions.tolist() == list(range(len(prompt_T) - 1, len(prompt_T) - 1 + int(sampled.lengths[i])))
        assert sampled.idx_AT[i, : len(prompt_T)].tolist() == prompt_T.tolist()
        assert sampled.idx_AT[i, positions[1:]].tolist() == sampled.target_AT[i, positions[:-1]].tolist()
        ids = sampled.target_AT[i][mask].tolist()
        assert tokenizer.decode(ids, skip_special=True).strip() == answer.text
        assert answer.ended == (ids[-1] in ends) and (answer.ended or len(ids) <= CONFIG.answer_tokens)


def test_log_p_matches_the_sampling_distribution(policy: torch.nn.Module, tokenizer: Tokenizer, chat_prompts: Prompts,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    sampled = sample(policy, tokenizer, chat_prompts, [3, 0, 6], [1, 2, 3])
    monkeypatch.setattr(rollout, "MAX_ROWS", 2)
    logp_AT = rollout.log_probability(policy, sampled, CONFIG, DIST)
    policy.eval()
    for i in range(3):
        n = int((sampled.target_AT[i] != losses.IGNORE).nonzero().max()) + 1
        with torch.no_grad():
            logp = (policy(sampled.idx_AT[i : i + 1, :n])[0] / CONFIG.temperature).log_softmax(-1)
        for t in range(sampled.idx_AT.shape[1]):
            target = int(sampled.target_AT[i, t])
            expected = logp[t, target].item() if target != losses.IGNORE else 0.0
            assert logp_AT[i, t].item() == pytest.approx(expected, abs=1e-5)


def test_rollout_statistics() -> None:
    target = torch.tensor([[5, 6, losses.IGNORE], [5, losses.IGNORE, losses.IGNORE]])
    completions = [Completion("a b a b", True), Completion("a b", False)]
    sampled = rollout.Rollout([], completions, torch.zeros_like(target), target)
    stats = rollout.rollout_stats(sampled, np.array([1.0, 0.0]))
    assert (stats.reward, stats.tokens, stats.ended, stats.different) == (0.5, 1.5, 0.5, 1.0)
    assert stats.distinct == distinct_ngrams(["a b a b", "a b"], 2) == 0.5  # ab ba ab, ab
    assert distinct_ngrams(["a", ""], 2) == 0
    assert (stats.deviation, stats.accuracy) == (0.5, None)
    assert rollout.rollout_stats(sampled, np.array([1.0, 0.0]), group=2).deviation == 0.5
    questions = [Question([], answer) for answer in ("a b a b", "c")]
    known = rollout.Rollout(questions, completions, torch.zeros_like(target), target)
    assert rollout.rollout_stats(known, np.array([1.0, 1.0])).accuracy == 0.5


def test_only_rewards_of_the_same_prompt_are_compared_in_a_group() -> None:
    target = torch.tensor([[5]] * 4)
    sampled = rollout.Rollout([], [Completion("a", True)] * 4, torch.zeros_like(target), target)
    rewards = np.array([1.0, 1.0, 0.0, 0.0], np.float32)
    assert rollout.rollout_stats(sampled, rewards).deviation == 0.5
    assert rollout.rollout_stats(sampled, rewards, group=2).deviation == 0.0


def test_an_epoch_has_each_prompt_once() -> None:
    sampled = np.concatenate([prompts.sample_prompts(number, 6, 15, seed=3) for number in range(5)])  # two epochs
    assert sorted(sampled[:15]) == sorted(sampled[15:]) == list(range(15))
    assert sampled[:15].tolist() != sampled[15:].tolist()
    assert (prompts.sample_prompts(2, 6, 15, seed=3) == sampled[12:18]).all()
    assert (prompts.sample_prompts(0, 15, 15, seed=4) != sampled[:15]).any()
    assert sorted(prompts.sample_prompts(0, 40, 10, seed=0)) == sorted(list(range(10)) * 4)  # more than an epoch
