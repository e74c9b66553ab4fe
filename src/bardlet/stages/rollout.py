"""A model writes answers, with its cache of keys and values; how likely each token was, and what the answers show.

A answers, T positions. The rows of a rollout are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bardlet.config.finetuning import RolloutConfig
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.data.prompts import Prompts
from bardlet.data.records import Question
from bardlet.evaluation import metrics
from bardlet.inference import answers as inference_answers
from bardlet.inference import generate
from bardlet.runtime import compiler, threads
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.stages.rewards import Answer
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs
from bardlet.training.losses import IGNORE

AT_ONCE, CACHE = 64, 2**31
"""Answers that are written at once, at most, and bytes of their keys and values."""


@dataclass(frozen=True)
class Rollout:
    """Answers to questions, and as what a model sees and what it wrote: `idx_AT` int64, questions and answers;
    `target_AT` int64, the token after each where it is one of the answer, else IGNORE."""

    questions: list[Question]
    answers: list[Answer]
    idx_AT: torch.Tensor
    target_AT: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each answer, with the one that ends it: (A,) int64."""
        return (self.target_AT != IGNORE).sum(1)

    def part(self, which: slice) -> Rollout:
        """The answers of a slice."""
        return Rollout(self.questions[which], self.answers[which], self.idx_AT[which], self.target_AT[which])


def sample_rollout(policy: Any, tokenizer: Tokenizer, prompts: Prompts, which: Sequence[int], seeds: Sequence[int],
          config: RolloutConfig, dist: Dist, temperature: float) -> Rollout:
    """An answer to each of the prompts `which`, of up to --answer-tokens; each process writes its share of them.

    Args:
        policy: gpt2 or qwen3. seeds: one for each answer, which then does not depend on those beside it.
    """
    rows = [prompts.ids[i] for i in which]
    mine = range(len(rows))[dist.rows(len(rows))] if len(rows) % dist.world == 0 else range(len(rows))
    order = sorted(mine, key=lambda i: len(rows[i]))  # rows of one batch have similar lengths
    size = rows_at_once(policy.config, max(map(len, rows)) + config.answer_tokens)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    stops = inference_answers.stop_ids(tokenizer)

    def written(batch: Sequence[int]) -> list[list[int]]:
        return generate.generate(policy, [rows[i].tolist() for i in batch], config.answer_tokens, stop_ids=stops,
                                 temperature=temperature, seed=[seeds[i] for i in batch])  # fmt: skip

    width = max(map(len, rows)) + config.answer_tokens
    made = torch.full((len(rows), width), -1, dtype=torch.int64)  # -1: nothing was written there
    with generate.eval_mode(policy), compiler.eager(policy):
        for batch, new in zip(batches, threads.run_in_threads(written, batches, dist.device), strict=True):
            for i, ids in zip(batch, new, strict=True):
                made[i, len(rows[i]) : len(rows[i]) + len(ids)] = torch.tensor(ids)
    if len(mine) < len(rows):
        made = (dist.sum((made + 1).to(dist.device)) - 1).cpu()
    return _rollout([prompts.questions[i] for i in which], rows, made, tokenizer)


def rows_at_once(shape: ModelConfig, length: int) -> int:
    """How many answers are written at once whose rows have up to `length` tokens: their cache fits into CACHE bytes."""
    row = 4 * 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * min(length, shape.block_size)  # float32, k and v
    return max(1, min(AT_ONCE, CACHE // row))


def _rollout(questions: list[Question], rows: Sequence[np.ndarray], made_AT: torch.Tensor, tokenizer: Tokenizer) -> Rollout:
    """From the questions' ids and what was written behind them, -1 where nothing was."""
    answers, ends = [], {chat_template.special_id(tokenizer, "end"), tokenizer.eos_id}
    for ids in made_AT:
        new = ids[ids >= 0].tolist()
        known = [token for token in new if token < tokenizer.vocab_size]  # spare rows of the head mean nothing
        ended = bool(new) and new[-1] in ends
        answers.append(Answer(tokenizer.decode(known, skip_special=True).strip(), ended))
    width = int((made_AT >= 0).any(0).nonzero().max()) + 1
    target_AT = torch.where(made_AT[:, 1:width] >= 0, made_AT[:, 1:width], IGNORE)
    idx_AT = made_AT[:, : width - 1].clamp_min(0)  # what is written last is predicted, and not read
    for i, row in enumerate(rows):
        idx_AT[i, : len(row)] = torch.from_numpy(row)
    return Rollout(questions, answers, idx_AT, target_AT)


@torch.no_grad()
def log_probability(model: Any, rollout: Rollout, config: RolloutConfig, dist: Dist) -> torch.Tensor:
    """log p of what was written, at the temperature at which it was: (A, T) float32 on the CPU, 0 elsewhere."""
    made = torch.zeros(rollout.idx_AT.shape)
    with generate.eval_mode(model), compiler.eager(model):
        for rows in slices(rollout, metrics.rows_at_once(model.config, rollout.idx_AT.shape[1])):
            idx, target = (dist.to_device(x[rows]) for x in (rollout.idx_AT, rollout.target_AT))
            with autocast(config.dtype, dist.device):
                made[rows] = logprobs.log_probability(model, idx, target, config.temperature).cpu()
    return made


def slices(rollout: Rollout, size: int) -> Iterator[slice]:
    """The rows of a rollout, so many at once."""
    for first in range(0, len(rollout.answers), size):
        yield slice(first, first + size)


@dataclass(frozen=True)
class RolloutStats:
    """What answers show, on average. tokens: of an answer; ended: the share that ended by themselves; different: that
    of different answers; distinct: of different pairs of words (Li et al. 2016, *A Diversity-Promoting Objective*).
    """

    reward: float
    tokens: float
    ended: float
    different: float
    distinct: float


def rollout_stats(rollout: Rollout, reward_A: np.ndarray) -> RolloutStats:
    """What the answers of a rollout show."""
    texts = [answer.text for answer in rollout.answers]
    return RolloutStats(float(reward_A.mean()), rollout.lengths.double().mean().item(),
                 sum(answer.ended for answer in rollout.answers) / len(texts),
                 len(set(texts)) / len(texts), metrics.distinct_ngrams(texts, 2))
