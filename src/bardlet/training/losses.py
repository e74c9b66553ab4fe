"""Losses as pure functions of tensors. Each is a sum, and says over how many terms.

A mean of micro-batch means is not the mean of the batch as soon as targets are masked, so no function here
divides: the training step divides the sum by the number of unmasked targets of the whole global batch.

    B rows   T positions   V tokens of the vocabulary   A answers   G prompts   K answers to each
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bardlet.data.batch import Batch
from bardlet.ops.cross_entropy import IGNORE


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross-entropy of each next token, summed.

    Args:
        model: maps ids and targets to their summed loss (`LanguageModel.forward`).
        batch: `idx` (B, T) int64, and `target` (B, T) int64 with IGNORE where nothing is to be learned.

    Returns:
        A scalar in nats, float32: -sum of log p(target).
    """
    total: torch.Tensor = model(batch["idx"], batch["target"])
    return total


def translation_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0, prefix: bool = False) -> torch.Tensor:
    """The cross-entropy of each token of the targets, summed.

    Args:
        model: an encoder-decoder where `batch` has a `source` beside the target, else a decoder-only model.
        batch: as `bitext_batches.PairFormat` makes it.
        smoothing: the part of each target that is spread evenly over the vocabulary (Szegedy et al. 2016, *Rethinking
            the Inception Architecture*, section 7).
        prefix: a decoder-only model sees the source both ways.

    Returns:
        A scalar in nats, float32. The head is computed only where there is a target.
    """
    if "source" in batch:
        total: torch.Tensor = model(batch["source"], batch["idx"], batch["source_length"], batch["target"],
                                    smoothing=smoothing)
    else:
        total = model(batch["idx"], batch["target"], prefix_B=batch["prefix"] if prefix else None, smoothing=smoothing)
    return total


def completion_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross-entropy of each token of the answers in conversations, summed.

    Args:
        model: decoder-only.
        batch: `idx` and `target` as for `next_token_loss`; with `segment` (B, T) int64 a row holds several conversations,
            and a token sees those before it of its own.

    Returns:
        A scalar in nats, float32. The head is computed only where there is a target.
    """
    total: torch.Tensor = model(batch["idx"], batch["target"], segment_BT=batch.get("segment"))
    return total


def count_targets(batch: Batch) -> int:
    """How many targets of `batch` the loss is taken on."""
    return int((batch["target"] != IGNORE).sum())


# ---------------------------------------------------------------- preferences


def bradley_terry_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
    """What a reward model learns from comparisons: -log of the odds that it gives to what people chose, summed.

    Bradley and Terry (1952); Ouyang et al. (2022), *Training language models to follow instructions with human
    feedback*, equation 1. The arguments are rewards, (B,), of the two answers of each pair.
    """
    return -F.logsigmoid(chosen_B.float() - rejected_B.float()).sum()


def dpo_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, reference_chosen_B: torch.Tensor,
        reference_rejected_B: torch.Tensor, beta: float) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, equation 7), summed over the pairs.

    The reward of an answer is beta log(policy / reference), and the loss is `bradley_terry_loss` of these rewards: log 2 for
    each pair where the policy is the reference.

    Args: log p of whole answers, (B,) in nats, by the policy and by the reference, which gets no gradient.
    """
    return bradley_terry_loss(beta * (chosen_B - reference_chosen_B), beta * (rejected_B - reference_rejected_B))


# ---------------------------------------------------------------- reinforcement
# One answer a row; mask_AT is True at its tokens, which stand together.


def advantages(reward_AT: torch.Tensor, value_AT: torch.Tensor, mask_AT: torch.Tensor, discount: float = 1.0,
               smoothing: float = 0.95) -> torch.Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16): (A, T), 0 outside the mask.

    How much better a token was than expected: the sum over what follows of (discount smoothing)^l delta, with delta =
    reward + discount (value of the next) - value. After the last token of an answer nothing is worth anything.

    Args:
        reward_AT: what each token earned. value_AT: what was expected before it was written. smoothing: their lambda;
            0 trusts the values, 1 the rewards alone.
    """
    made = torch.zeros_like(value_AT)
    later = torch.zeros_like(value_AT[:, 0])
    worth = torch.zeros_like(later)
    for t in reversed(range(value_AT.shape[1])):
        delta = reward_AT[:, t] + discount * worth - value_AT[:, t]
        later = (delta + discount * smoothing * later) * mask_AT[:, t]
        worth = value_AT[:, t] * mask_AT[:, t]
        made[:, t] = later
    return made


def group_advantages(reward_GK: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """GRPO's advantages (Shao et al. 2024, *DeepSeekMath*, section 4.1): how much better than its group an answer is.

    Args:
        reward_GK: the rewards of K answers to each of G prompts. scale: divide by the deviation within the group (Liu
            et al. 2025, *Understanding R1-Zero-Like Training*, leave that out).

    Returns:
        (G, K), with mean 0 in each group; all 0 where the answers are equally good.
    """
    above = reward_GK - reward_GK.mean(1, keepdim=True)
    return above / (reward_GK.std(1, keepdim=True) + 1e-4) if scale else above


def whiten(x_AT: torch.Tensor, mask_AT: torch.Tensor) -> torch.Tensor:
    """x with mean 0 and deviation 1 over the mask, 0 outside: (A, T)."""
    kept = x_AT[mask_AT]
    return torch.where(mask_AT, (x_AT - kept.mean()) * torch.rsqrt(kept.var(unbiased=False) + 1e-8), 0.0)


def clipped_policy_loss(logp_AT: torch.Tensor, old_AT: torch.Tensor, advantage_AT: torch.Tensor, mask_AT: torch.Tensor,
                   clip: float) -> torch.Tensor:
    """PPO's objective of the policy (Schulman et al. 2017, equation 7) as a loss, summed over the tokens of the mask.

    Its gradient is the plain policy gradient where the policy is still the one that wrote the answers, and 0 where a
    token's probability has moved by more than `clip` already, in the direction that its advantage asks for.

    Args:
        logp_AT: log p of the tokens now; old_AT: when they were written. advantage_AT: as `advantages` gives them; (A,
            1) where all tokens of an answer have one.
    """
    logp_N, old_N, advantage_N = (x.expand_as(mask_AT)[mask_AT] for x in (logp_AT, old_AT, advantage_AT))
    ratio_N = (logp_N - old_N).exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N).sum()


def clipped_value_loss(value_AT: torch.Tensor, old_AT: torch.Tensor, return_AT: torch.Tensor, mask_AT: torch.Tensor,
                  clip: float) -> torch.Tensor:
    """PPO's loss of the values, half the squared error, where they may move by `clip` at once; summed over the mask.

    (Schulman's implementation; Huang et al. 2022, *The 37 Implementation Details of PPO*, detail 9.)
    """
    value_N, old_N, return_N = value_AT[mask_AT], old_AT[mask_AT], return_AT[mask_AT]
    near_N = old_N + (value_N - old_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N) ** 2, (near_N - return_N) ** 2).sum()


def kl_estimate(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy | reference) for each token that the policy drew, never negative: the arguments' shape.

    r - 1 - log r with r = reference / policy: without bias, and with less variance than -log r (Schulman 2020,
    *Approximating KL Divergence*, k3).
    """
    log_r = reference - logp
    return log_r.exp() - 1 - log_r


def grpo_loss(logp_AT: torch.Tensor, old_AT: torch.Tensor, reference_AT: torch.Tensor, advantage_A: torch.Tensor,
         mask_AT: torch.Tensor, clip: float, beta: float) -> torch.Tensor:
    """Group relative policy optimization (Shao et al. 2024, equation 3), summed over the tokens of the mask.

    The paper takes the mean over each answer first; here each token counts the same, whatever the length of its answer
    (Yu et al. 2025, *DAPO*, section 3.3).

    `clipped_policy_loss` with one advantage for all tokens of an answer, and beta times `kl_estimate` from the reference.
    """
    far = kl_estimate(logp_AT[mask_AT], reference_AT[mask_AT]).sum()
    return clipped_policy_loss(logp_AT, old_AT, advantage_A[:, None], mask_AT, clip) + beta * far
