"""Losses as pure functions of tensors; each returns a sum over the terms it names.

With masked targets, a mean of micro-batch means is not the mean of the batch. So no function here divides: the
training step divides the sum by the number of unmasked targets in the whole global batch.

    B rows   T positions   V vocabulary size   A completions   G prompts   K completions per prompt
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bardlet.data.batch import Batch
from bardlet.ops.cross_entropy import IGNORE


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed cross-entropy of the next tokens.

    Args:
        model: maps ids and targets to their summed loss (`LanguageModel.forward`).
        batch: `idx` (B, T) int64, and `target` (B, T) int64 with IGNORE where there is no loss.

    Returns:
        A scalar in nats, float32: -sum of log p(target).
    """
    total: torch.Tensor = model(batch["idx"], batch["target"])
    return total


def translation_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0, prefix: bool = False) -> torch.Tensor:
    """Return the summed cross-entropy of the target tokens.

    Args:
        model: an encoder-decoder if `batch` has a `source`, otherwise decoder-only.
        batch: as built by `bitext_batches.PairFormat`.
        smoothing: label smoothing, the share of each target spread evenly over the vocabulary (Szegedy et al. 2016,
            *Rethinking the Inception Architecture*, section 7).
        prefix: attend to the source bidirectionally in a decoder-only model.

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
    """Return the summed cross-entropy of the completion tokens in conversations.

    Args:
        model: decoder-only.
        batch: `idx` and `target` as for `next_token_loss`. With `segment` (B, T) int64 a row holds several
            conversations, and attention stays within each.

    Returns:
        A scalar in nats, float32. The head is computed only where there is a target.
    """
    total: torch.Tensor = model(batch["idx"], batch["target"], segment_BT=batch.get("segment"))
    return total


def count_targets(batch: Batch) -> int:
    """Return the number of unmasked targets in `batch`."""
    return int((batch["target"] != IGNORE).sum())


# ---------------------------------------------------------------- preferences


def bradley_terry_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
    """Return the summed reward-model loss on comparisons: -log p(chosen beats rejected).

    Bradley and Terry (1952); Ouyang et al. (2022), *Training language models to follow instructions with human
    feedback*, equation 1. The arguments are the rewards of the two completions of each pair, (B,).
    """
    return -F.logsigmoid(chosen_B.float() - rejected_B.float()).sum()


def dpo_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, reference_chosen_B: torch.Tensor,
             reference_rejected_B: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of direct preference optimization (Rafailov et al. 2023, equation 7), summed over the pairs.

    The reward of a completion is beta log(policy / reference), and the loss is `bradley_terry_loss` of these rewards:
    log 2 per pair while the policy equals the reference.

    Args:
        chosen_B, rejected_B: log p of the two completions of each pair under the policy, in nats.
        reference_chosen_B, reference_rejected_B: the same under the reference, which gets no gradient.
        beta: KL coefficient.
    """
    return bradley_terry_loss(beta * (chosen_B - reference_chosen_B), beta * (rejected_B - reference_rejected_B))


def kto_loss(log_ratio_B: torch.Tensor, kl: torch.Tensor, desirable_B: torch.Tensor, beta: float,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> torch.Tensor:
    """Return the loss of Kahneman-Tversky optimization, summed over single completions.

    Ethayarajh et al. (2024), *KTO: Model Alignment as Prospect Theoretic Optimization*, equation 8: weight times 1
    minus the value of the reward beta log(policy / reference) relative to beta times `kl`, which gets no gradient.

    Args:
        log_ratio_B: log p of whole completions under the policy minus that under the reference, in nats.
        kl: estimate of KL(policy || reference), a scalar; negative estimates count as 0.
        desirable_B: bool, True for a liked completion.
    """
    distance_B = beta * (log_ratio_B - kl.detach().clamp(min=0).to(log_ratio_B.dtype))
    value_B = torch.sigmoid(torch.where(desirable_B, distance_B, -distance_B))
    weight_B = torch.where(desirable_B, value_B.new_tensor(desirable_weight), value_B.new_tensor(undesirable_weight))
    return (weight_B * (1 - value_B)).sum()


# ---------------------------------------------------------------- reinforcement
# One completion per row; mask_AT is True at its tokens, which are contiguous.


def advantages(reward_AT: torch.Tensor, value_AT: torch.Tensor, mask_AT: torch.Tensor, discount: float = 1.0,
               lam: float = 0.95) -> torch.Tensor:
    """Return generalized advantage estimates (Schulman et al. 2016, equation 16): (A, T), 0 outside the mask.

    A token's advantage is the sum over l >= 0 of (discount lam)^l delta, l tokens ahead, with delta = reward +
    discount (next value) - value. The value after the last token of a completion is 0.

    Args:
        reward_AT: reward of each token. value_AT: the critic's value before each token. lam: lambda in the paper; 0
            relies on the values, 1 on the rewards alone.
    """
    advantage_AT = torch.zeros_like(value_AT)
    running_A = torch.zeros_like(value_AT[:, 0])
    next_value_A = torch.zeros_like(running_A)
    for t in reversed(range(value_AT.shape[1])):
        delta_A = reward_AT[:, t] + discount * next_value_A - value_AT[:, t]
        running_A = (delta_A + discount * lam * running_A) * mask_AT[:, t]
        next_value_A = value_AT[:, t] * mask_AT[:, t]
        advantage_AT[:, t] = running_A
    return advantage_AT


def group_advantages(reward_GK: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """Return GRPO's advantages, rewards relative to their group (Shao et al. 2024, *DeepSeekMath*, section 4.1).

    Args:
        reward_GK: rewards of K completions for each of G prompts. scale: divide by the standard deviation of the group
            (Liu et al. 2025, *Understanding R1-Zero-Like Training*, omit it).

    Returns:
        (G, K), with mean 0 in each group; all 0 if the rewards of a group are equal.
    """
    centered_GK = reward_GK - reward_GK.mean(1, keepdim=True)
    return centered_GK / (reward_GK.std(1, keepdim=True) + 1e-4) if scale else centered_GK


def whiten(x_AT: torch.Tensor, mask_AT: torch.Tensor) -> torch.Tensor:
    """Return x with mean 0 and standard deviation 1 over the mask, 0 outside: (A, T)."""
    x_N = x_AT[mask_AT]
    return torch.where(mask_AT, (x_AT - x_N.mean()) * torch.rsqrt(x_N.var(unbiased=False) + 1e-8), 0.0)


def clipped_policy_loss(logp_AT: torch.Tensor, old_AT: torch.Tensor, advantage_AT: torch.Tensor, mask_AT: torch.Tensor,
                        clip: float) -> torch.Tensor:
    """Return PPO's clipped policy objective (Schulman et al. 2017, equation 7) as a loss, summed over the mask.

    While the policy is the one that sampled the completions, the gradient is the plain policy gradient. It is 0 for a
    token whose probability ratio has moved beyond `clip` in the direction of its advantage.

    Args:
        logp_AT: current log p of the tokens. old_AT: log p when they were sampled. advantage_AT: from `advantages`, or
            (A, 1) with a single advantage per completion.
    """
    logp_N, old_N, advantage_N = (x.expand_as(mask_AT)[mask_AT] for x in (logp_AT, old_AT, advantage_AT))
    ratio_N = (logp_N - old_N).exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N).sum()


def clipped_value_loss(value_AT: torch.Tensor, old_AT: torch.Tensor, return_AT: torch.Tensor, mask_AT: torch.Tensor,
                       clip: float) -> torch.Tensor:
    """Return PPO's value loss, half the squared error with value changes clipped to `clip`, summed over the mask.

    From Schulman's implementation (Huang et al. 2022, *The 37 Implementation Details of PPO*, detail 9).
    """
    value_N, old_N, return_N = value_AT[mask_AT], old_AT[mask_AT], return_AT[mask_AT]
    clipped_N = old_N + (value_N - old_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N) ** 2, (clipped_N - return_N) ** 2).sum()


def kl_estimate(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return a non-negative estimate of KL(policy | reference) per sampled token, in the arguments' shape.

    r - 1 - log r with r = reference / policy: unbiased, with less variance than -log r (Schulman 2020, *Approximating
    KL Divergence*, k3).
    """
    log_r = reference - logp
    return log_r.exp() - 1 - log_r


def grpo_loss(logp_AT: torch.Tensor, old_AT: torch.Tensor, reference_AT: torch.Tensor, advantage_A: torch.Tensor,
              mask_AT: torch.Tensor, clip: float, beta: float) -> torch.Tensor:
    """Return the loss of group relative policy optimization (Shao et al. 2024, equation 3), summed over the mask.

    It is `clipped_policy_loss` with one advantage per completion, plus beta times `kl_estimate` to the reference. The
    paper averages over each completion first; here every token counts the same (Yu et al. 2025, *DAPO*, section 3.3).
    """
    kl = kl_estimate(logp_AT[mask_AT], reference_AT[mask_AT]).sum()
    return clipped_policy_loss(logp_AT, old_AT, advantage_A[:, None], mask_AT, clip) + beta * kl
