"""Rollouts: sample completions with a KV cache, compute their log-probabilities and statistics.

A completions, T positions. The rows of a rollout are padded on the right.
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
from bardlet.data.forms import Question
from bardlet.data.prompts import Prompts
from bardlet.evaluation import metrics
from bardlet.inference import answers as inference_answers
from bardlet.inference import generate
from bardlet.inference.drawing import Sampling
from bardlet.runtime import compiler
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.stages.rewards import Completion, exact
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs
from bardlet.training.losses import IGNORE

MAX_ROWS, MAX_CACHE_BYTES = 64, 2**31
"""Completions sampled at a time, at most, and the size of their keys and values."""


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts, as text and as tensors.

    idx_AT: int64, prompts and completions. target_AT: int64, the next token where it belongs to the completion, else
    IGNORE.
    """

    questions: list[Question]
    completions: list[Completion]
    idx_AT: torch.Tensor
    target_AT: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens per completion, with its stop token: (A,) int64."""
        return (self.target_AT != IGNORE).sum(1)

    def part(self, span: slice) -> Rollout:
        """Return the completions of a slice."""
        return Rollout(self.questions[span], self.completions[span], self.idx_AT[span], self.target_AT[span])


def sample_rollout(policy: Any, tokenizer: Tokenizer, prompts: Prompts, indices: Sequence[int], seeds: Sequence[int],
                   config: RolloutConfig, dist: Dist, temperature: float) -> Rollout:
    """Sample a completion of up to --answer-tokens for each of the prompts `indices`; each rank samples its share.

    Args:
        policy: gpt2 or one of LLAMA.
        seeds: a seed per completion, which makes it independent of the rest of its batch.
    """
    rows = [prompts.ids[i] for i in indices]
    own_rows = range(len(rows))[dist.rows(len(rows))] if len(rows) % dist.world == 0 else range(len(rows))
    width = max(map(len, rows)) + config.answer_tokens
    with compiler.eager(policy):
        completions = generate.generate_each(
            policy, [rows[i].tolist() for i in own_rows], [config.answer_tokens] * len(own_rows),
            Sampling(temperature=temperature), seeds=[seeds[i] for i in own_rows],
            rows=rows_at_once(policy.config, width), stop_ids=inference_answers.stop_ids(tokenizer))
    tokens_AT = torch.full((len(rows), width), -1, dtype=torch.int64)  # -1: not a completion token
    for i, ids in zip(own_rows, completions, strict=True):
        tokens_AT[i, len(rows[i]) : len(rows[i]) + len(ids)] = torch.tensor(ids)
    if len(own_rows) < len(rows):
        tokens_AT = (dist.sum((tokens_AT + 1).to(dist.device)) - 1).cpu()
    return _rollout([prompts.questions[i] for i in indices], rows, tokens_AT, tokenizer)


def rows_at_once(shape: ModelConfig, length: int) -> int:
    """Return the number of rows of up to `length` tokens whose keys and values fit into MAX_CACHE_BYTES."""
    row = 4 * 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * min(length, shape.block_size)  # float32, k and v
    return max(1, min(MAX_ROWS, MAX_CACHE_BYTES // row))


def _rollout(questions: list[Question], rows: Sequence[np.ndarray], tokens_AT: torch.Tensor,
             tokenizer: Tokenizer) -> Rollout:
    """Build a rollout from the prompts' ids and the completion tokens after them, -1 elsewhere."""
    completions, ends = [], chat_template.end_ids(tokenizer)
    for ids in tokens_AT:
        completion = ids[ids >= 0].tolist()
        known = [token for token in completion if token < tokenizer.vocab_size]  # the head may have padding rows
        ended = bool(completion) and completion[-1] in ends
        completions.append(Completion(tokenizer.decode(known, skip_special=True).strip(), ended))
    width = int((tokens_AT >= 0).any(0).nonzero().max()) + 1
    target_AT = torch.where(tokens_AT[:, 1:width] >= 0, tokens_AT[:, 1:width], IGNORE)
    idx_AT = tokens_AT[:, : width - 1].clamp_min(0)  # the last token is a target only
    for i, row in enumerate(rows):
        idx_AT[i, : len(row)] = torch.from_numpy(row)
    return Rollout(questions, completions, idx_AT, target_AT)


@torch.no_grad()
def log_probability(model: Any, rollout: Rollout, config: RolloutConfig, dist: Dist) -> torch.Tensor:
    """Return log p of the completion tokens at the sampling temperature: (A, T) float32 on the CPU, 0 elsewhere."""
    logp_AT = torch.zeros(rollout.idx_AT.shape)
    with generate.eval_mode(model), compiler.eager(model):
        for rows in slices(rollout, metrics.rows_at_once(model.config, rollout.idx_AT.shape[1])):
            idx, target = (dist.to_device(x[rows]) for x in (rollout.idx_AT, rollout.target_AT))
            with autocast(config.dtype, dist.device):
                logp_AT[rows] = logprobs.log_probability(model, idx, target, config.temperature).cpu()
    return logp_AT


def slices(rollout: Rollout, size: int) -> Iterator[slice]:
    """Yield slices of `size` rows that cover a rollout."""
    for first in range(0, len(rollout.completions), size):
        yield slice(first, first + size)


@dataclass(frozen=True)
class RolloutStats:
    """Statistics of a rollout.

    reward, tokens: means per completion. ended: share that ended with a stop token. different: distinct completions as
    a share of all. distinct: distinct bigrams of words as a share of all (Li et al. 2016, *A Diversity-Promoting
    Objective Function*). deviation: standard deviation of the rewards that are compared with each other: those of a
    group, on average, or all. accuracy: share of completions that equal their reference answer; None: there is none.
    """

    reward: float
    tokens: float
    ended: float
    different: float
    distinct: float
    deviation: float
    accuracy: float | None


def rollout_stats(rollout: Rollout, reward_A: np.ndarray, group: int = 1) -> RolloutStats:
    """Return the statistics of a rollout. group: adjacent completions of the same prompt."""
    texts = [completion.text for completion in rollout.completions]
    compared = reward_A.astype(np.float64).reshape(-1, group if group > 1 else len(reward_A))
    known = bool(rollout.questions) and all(question.answer is not None for question in rollout.questions)
    accuracy = float(exact(rollout.questions, rollout.completions).mean()) if known else None
    return RolloutStats(float(reward_A.mean()), rollout.lengths.double().mean().item(),
                        sum(completion.ended for completion in rollout.completions) / len(texts),
                        len(set(texts)) / len(texts), metrics.distinct_ngrams(texts, 2),
                        float(compared.std(1).mean()), accuracy)
