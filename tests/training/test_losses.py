"""Losses against values computed by hand."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.models.base import LectureModel
from bardlet.ops import cross_entropy
from bardlet.runtime.compiler import compiler_missing
from bardlet.training import logprobs, losses
from bardlet.training.losses import IGNORE, count_targets, next_token_loss

needs_compiler = pytest.mark.skipif(compiler_missing(torch.device("cpu")) is not None, reason="no C++ compiler")


class FixedLogits(LectureModel):
    """A model that returns the same logits for every input."""

    def __init__(self, logits_V: list[float]) -> None:
        super().__init__(ModelConfig("bigram", vocab_size=len(logits_V)))
        self.logits_V = torch.tensor(logits_V)

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return self.logits_V.expand(*idx.shape, -1)


def test_equal_logits_cost_log_v_per_target() -> None:
    batch = {"idx": torch.zeros(2, 3, dtype=torch.long), "target": torch.ones(2, 3, dtype=torch.long)}
    torch.testing.assert_close(next_token_loss(FixedLogits([0.0] * 5), batch), torch.tensor(6 * math.log(5)))


def test_the_loss_is_the_sum_of_minus_log_p() -> None:
    """With p = (1/2, 1/4, 1/4), targets 0, 1, 2 cost log 2, log 4 and log 4."""
    model = FixedLogits([math.log(2), 0.0, 0.0])
    batch = {"idx": torch.zeros(1, 3, dtype=torch.long), "target": torch.tensor([[0, 1, 2]])}
    torch.testing.assert_close(next_token_loss(model, batch), torch.tensor(5 * math.log(2)))


def test_masked_targets_do_not_count() -> None:
    """IGNORE adds neither to the sum nor to the count."""
    model = FixedLogits([math.log(2), 0.0, 0.0])
    batch = {"idx": torch.zeros(1, 3, dtype=torch.long), "target": torch.tensor([[0, IGNORE, IGNORE]])}
    torch.testing.assert_close(next_token_loss(model, batch), torch.tensor(math.log(2)))
    assert count_targets(batch) == 1


# ---------------------------------------------------------------- fused linear and cross-entropy


def head_inputs(n: int, c: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return hidden states, head weights, and targets, every fifth of which is IGNORE."""
    torch.manual_seed(0)
    target_N = torch.randint(v, (n,))
    target_N[::5] = IGNORE
    x_NC, weight_VC = (torch.randn(rows, c, dtype=dtype, requires_grad=True) for rows in (n, v))
    return x_NC, weight_VC, target_N


def by_logits(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the result of `linear_cross_entropy`, computed from all logits."""
    logits = nn.functional.linear(x, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), target, ignore_index=IGNORE, reduction="sum",
                                       label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [1, 40, 10**6], ids=["a row", "some rows", "all rows"])
def test_chunks_give_the_loss_and_gradients_of_all_logits(
        monkeypatch: pytest.MonkeyPatch, logits: int, smoothing: float) -> None:  # fmt: skip
    """In float64, so that the order of summation does not matter."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": logits})
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    x, weight, target = head_inputs(23, 5, 11, torch.float64)
    computed = [f(x, weight, target, smoothing) for f in (cross_entropy.linear_cross_entropy, by_logits)]
    torch.testing.assert_close(*computed)
    grads = [torch.autograd.grad(3 * value, (x, weight)) for value in computed]
    torch.testing.assert_close(*grads)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS_FROZEN", 1)
    frozen = torch.autograd.grad(3 * cross_entropy.linear_cross_entropy(x, weight.detach(), target, smoothing), x)
    torch.testing.assert_close(frozen, grads[1][:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_padded_head_has_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As on a GPU: 13 tokens multiplied as 128; the gradient has 13 rows."""
    x, weight, target = head_inputs(23, 16, 13, torch.float64)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 40})
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    plain = with_gradients(x, weight, target, dtype)
    monkeypatch.setattr(cross_entropy, "WIDTHS", {"cpu": 128})
    assert cross_entropy.padded(weight, dtype).shape == (128, 16)
    tolerance = 1e-12 if dtype == torch.float64 else 0.01
    torch.testing.assert_close(with_gradients(x, weight, target, dtype), plain, rtol=tolerance, atol=tolerance)


def with_gradients(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, dtype: torch.dtype,
                   compiled: bool = False) -> tuple[torch.Tensor, ...]:
    """Return the loss of a head, with products in `dtype`, and its gradients."""
    valid = target != IGNORE
    total = cross_entropy._LinearCrossEntropy.apply(x[valid], weight, target[valid], 0.1, dtype, compiled)
    return total, *torch.autograd.grad(total, (x, weight))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_loss_is_the_same_loss(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In chunks of 8 rows and a rest, beside padding; without a gradient, too."""
    x, weight, target = head_inputs(23, 16, 13, torch.float64)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 8 * 13})
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    monkeypatch.setattr(cross_entropy, "WIDTHS", {"cpu": 16})
    tolerance = 1e-12 if dtype == torch.float64 else 0.01
    plain, compiled = (with_gradients(x, weight, target, dtype, on) for on in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(*(cross_entropy.linear_cross_entropy(x, weight, target, 0.1, on)
                                     for on in (False, True)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_with_a_padded_head_is_the_same_model(monkeypatch: pytest.MonkeyPatch, family: str, tied: bool) -> None:
    """Losses, log-probabilities and gradients; its checkpoint has the tokens of the vocabulary, no more."""
    torch.manual_seed(0)
    config = TrainConfig(model=family, n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0).model_config(13)
    model = models.build(replace(config, tie_embeddings=tied)).double()
    idx, target = torch.randint(13, (2, 3, 8))
    target[0, :3] = IGNORE

    def results() -> list[torch.Tensor]:
        loss, each = model(idx, target), model(idx, target, reduction="none", temperature=0.7)
        gradients = torch.autograd.grad(loss + (each * torch.arange(8)).sum(), list(model.parameters()))
        return [model(idx), loss, each, *gradients]

    plain, shapes = results(), {name: x.shape for name, x in model.hf_state_dict().items()}
    monkeypatch.setattr(cross_entropy, "WIDTHS", {"cpu": 128})
    torch.testing.assert_close(results(), plain, rtol=1e-12, atol=1e-12)
    assert {name: x.shape for name, x in model.hf_state_dict().items()} == shapes


def test_the_loss_in_inference_mode_does_not_disturb_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both use the same memory."""
    monkeypatch.setattr(cross_entropy, "_kept", threading.local())
    x, weight, target = head_inputs(23, 5, 11)
    with torch.inference_mode():
        value = cross_entropy.linear_cross_entropy(x, weight, target)
    trained = cross_entropy.linear_cross_entropy(x, weight, target)
    trained.backward()
    torch.testing.assert_close(value, trained)


def test_bf16_is_as_accurate_as_with_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, in 13 chunks: the same loss, and gradients with the same error against float64."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 32)
    x, weight, target = head_inputs(512, 64, 300)
    exact = [g.float() for g in torch.autograd.grad(by_logits(x.double(), weight.double(), target), (x, weight))]
    errors, values = [], []
    for compute in (cross_entropy.linear_cross_entropy, by_logits):
        with torch.autocast("cpu", torch.bfloat16):
            values.append(compute(x, weight, target))
        grads = torch.autograd.grad(values[-1], (x, weight))
        errors.append([float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)])
    torch.testing.assert_close(*values)
    assert all(ours < 1.1 * theirs for ours, theirs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True), (False, False)])
def test_only_required_gradients_are_computed(monkeypatch: pytest.MonkeyPatch, trainable: tuple[bool, bool]) -> None:
    """None for a frozen head (LoRA), for states without gradient, or in an evaluation."""
    with_gradient: list[bool] = []
    chunk = cross_entropy._chunk_loss
    monkeypatch.setattr(cross_entropy, "_chunk_loss", lambda *args: with_gradient.append(args[-1]) or chunk(*args))
    x, weight, target = head_inputs(10, 4, 7)
    expected = by_logits(x, weight, target)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    leaves = [x.detach().requires_grad_(trainable[0]), weight.detach().requires_grad_(trainable[1])]
    value = cross_entropy.linear_cross_entropy(*leaves, target)
    torch.testing.assert_close(value, expected)
    assert value.requires_grad == any(trainable)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(torch.autograd.grad(value, leaf, retain_graph=True)[0], grad)
    for without_grad in (torch.no_grad(), torch.inference_mode()):
        with without_grad:
            torch.testing.assert_close(cross_entropy.linear_cross_entropy(*leaves, target), expected)
    assert with_gradient == [any(trainable), False, False]


class Wrapper(nn.Module):
    """Wrap a model as `module`, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_computes_its_loss_without_all_logits(
        monkeypatch: pytest.MonkeyPatch, family: str, tied: bool) -> None:  # fmt: skip
    """The loss equals that of its logits, which are never materialized, with a DDP-like wrapper and without."""
    torch.manual_seed(0)
    config = TrainConfig(model=family, n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0).model_config(13)
    model = models.build(replace(config, tie_embeddings=tied))
    idx, target = torch.randint(13, (2, 3, 8))
    target[0, :3] = IGNORE
    batch = {"idx": idx, "target": target}
    want = nn.functional.cross_entropy(model(idx).flatten(0, 1), target.flatten(), reduction="sum")
    smoothed = nn.functional.cross_entropy(model(idx).flatten(0, 1), target.flatten(), reduction="sum",
                                           label_smoothing=0.1)
    monkeypatch.setattr(model, "logits", lambda x: pytest.fail("logits"))
    for compute in (next_token_loss, losses.completion_loss):
        torch.testing.assert_close(compute(model, batch), want)
    torch.testing.assert_close(next_token_loss(Wrapper(model), batch), want)
    torch.testing.assert_close(losses.translation_loss(Wrapper(model), batch, 0.1), smoothed)


def test_the_smoothed_loss_of_an_encoder_decoder_is_that_of_its_logits() -> None:
    torch.manual_seed(0)
    model = models.build(TranslationConfig(n_layer=1, n_head=2, n_embd=16, block_size=8).model_config(13))
    model.eval()
    source, idx, target = torch.randint(13, (3, 4, 8))
    target[1, 5:] = IGNORE
    batch = {"source": source, "source_length": torch.tensor([8, 3, 5, 1]), "idx": idx, "target": target}
    logits = model(source, idx, batch["source_length"])
    want = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(losses.translation_loss(model, batch, 0.2), want)


def test_without_targets_loss_and_gradients_are_zero() -> None:
    x, weight, target = head_inputs(10, 4, 7)
    value = cross_entropy.linear_cross_entropy(x, weight, torch.full_like(target, IGNORE))
    value.backward()
    assert value == 0 and not x.grad.any() and not weight.grad.any()


# ---------------------------------------------------------------- preferences


def test_token_losses_match_log_softmax() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7), torch.tensor([[0, 6, IGNORE], [3, IGNORE, 1]])
    where = target != IGNORE
    got = -cross_entropy.token_losses(logits.bfloat16()[where], target)
    want = logits.bfloat16().float().log_softmax(-1).gather(2, target.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(got, torch.where(where, want, 0.0))


@pytest.mark.parametrize("bucket_tokens", [1, 20, 1024])
def test_length_buckets_do_not_change_the_result(bucket_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are the same for any bucket size; a row without targets is all zeros."""
    torch.manual_seed(0)
    model = models.build(ModelConfig("qwen3", vocab_size=11, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=8,
                                     head_dim=4, n_inner=16, activation="silu"))  # fmt: skip
    idx, length = torch.randint(11, (9, 16)), torch.tensor([16, 3, 9, 1, 0, 12, 7, 3, 5])
    position = torch.arange(16)
    in_completion = (position < length[:, None]) & (position >= length[:, None] - 4)
    target = torch.randint(11, (9, 16)).where(in_completion, IGNORE)
    where = target != IGNORE
    want = -cross_entropy.token_losses(model(idx)[where], target, 0.7)
    want.pow(2).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(logprobs, "BUCKET_TOKENS", bucket_tokens)
    got = logprobs.log_probability(model, idx, target, 0.7)
    got.pow(2).sum().backward()
    torch.testing.assert_close(got, want)
    assert not got[4].any()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    buckets = logprobs.bucket_by_length(target != IGNORE)
    assert sorted(torch.cat([rows for rows, _ in buckets]).tolist()) == list(range(9))
    assert max(len(rows) for rows, _ in buckets) - min(len(rows) for rows, _ in buckets) <= 1
    assert len(buckets) == {1: 9, 20: 3, 1024: 1}[bucket_tokens]


def test_bradley_terry_costs_minus_log_p_of_the_choice() -> None:
    """Equal rewards: p = 1/2. A reward higher by log 3: p = 3/4."""
    low, high = torch.zeros(4), torch.full((4,), math.log(3))
    torch.testing.assert_close(losses.bradley_terry_loss(low, low), torch.tensor(4 * math.log(2)))
    torch.testing.assert_close(losses.bradley_terry_loss(high, low), torch.tensor(4 * -math.log(3 / 4)))
    torch.testing.assert_close(losses.bradley_terry_loss(low, high), torch.tensor(4 * math.log(4)))


def test_dpo_starts_at_log_2_and_subtracts_its_reference() -> None:
    """Policy = reference: log 2 per pair, gradient beta / 2. Then beta = 1/2 times a margin of 2 log 3: p = 3/4."""
    chosen, rejected = torch.tensor([-5.0, -7.0]).requires_grad_(), torch.tensor([-4.0, -9.0]).requires_grad_()
    start = losses.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)
    torch.testing.assert_close(start, torch.tensor(2 * math.log(2)))
    start.backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.05))
    torch.testing.assert_close(rejected.grad, torch.full((2,), 0.05))
    margin = losses.dpo_loss(torch.tensor([1.5 * math.log(3)]), torch.tensor([-2.0]), torch.zeros(1),
                             torch.tensor([0.5 * math.log(3) - 2]), beta=0.5)  # fmt: skip
    torch.testing.assert_close(margin, torch.tensor(-math.log(3 / 4)))


# ---------------------------------------------------------------- reinforcement learning


def test_advantages_match_values_by_hand() -> None:
    """Values of 1/2, and a reward of 1 at the last of three tokens, between a prompt and padding."""
    mask = torch.tensor([[False, True, True, True, False]])
    reward, value = torch.tensor([[9.0, 0, 0, 1, 9]]), torch.tensor([[9.0, 0.5, 0.5, 0.5, 9]])
    for lam, want in ((0.0, [0, 0, 0.5]), (0.5, [0.125, 0.25, 0.5]), (1.0, [0.5, 0.5, 0.5])):
        got = losses.advantages(reward, value, mask, 1.0, lam)
        torch.testing.assert_close(got, torch.tensor([[0, *want, 0]]))
    got = losses.advantages(reward, value, mask, discount=0.5, lam=1.0)
    torch.testing.assert_close(got, torch.tensor([[0, 0.25 - 0.5, 0.5 - 0.5, 0.5, 0]]))


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=30)
def test_advantages_with_lambda_1_are_returns_minus_values(n: int, before: int, after: int, seed: int) -> None:
    torch.manual_seed(seed)
    T = before + n + after
    reward, value = torch.randn(2, T), torch.randn(2, T)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[:, before : before + n] = True
    returns = (reward * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(losses.advantages(reward, value, mask, 1.0, 1.0), (returns - value) * mask)


def test_group_advantages_are_relative_to_the_group() -> None:
    got = losses.group_advantages(torch.tensor([[1.0, 0, 0, 1], [3, 3, 3, 3]]))
    want = torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]) * math.sqrt(3) / 2
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    torch.testing.assert_close(losses.group_advantages(torch.tensor([[2.0, 1, 0]]), scale=False),
                               torch.tensor([[1.0, 0, -1]]))  # fmt: skip


def test_whitening_ignores_masked_values() -> None:
    x, mask = torch.tensor([[1.0, 3, 100], [5, 7, 100]]), torch.tensor([[True, True, False]] * 2)
    got = losses.whiten(x, mask)
    torch.testing.assert_close(got[mask], torch.tensor([-3.0, -1, 1, 3]) / math.sqrt(5))
    assert not got[~mask].any()


def test_an_unchanged_policy_has_the_plain_policy_gradient() -> None:
    torch.manual_seed(0)
    old, advantage = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.rand(3, 5) < 0.7
    logp = old.clone().requires_grad_()
    losses.clipped_policy_loss(logp, old, advantage, mask, clip=0.2).backward()
    torch.testing.assert_close(logp.grad, -advantage * mask)


@pytest.mark.parametrize(("ratio", "advantage", "cost", "slope"), [
    (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5), (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0), (1.1, 2.0, -2.2, -2.2),
])  # fmt: skip
def test_a_token_beyond_the_clip_has_no_gradient(ratio: float, advantage: float, cost: float, slope: float) -> None:
    """Only if its ratio moved by more than 0.2 in the direction of its advantage."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1).bool()
    value = losses.clipped_policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2)
    value.backward()
    torch.testing.assert_close((value, logp.grad), (torch.tensor(cost), torch.tensor([[slope]])))


def test_value_changes_are_clipped() -> None:
    """Old 0, return 1, clip 0.2: (1 - 0.1)^2 / 2 at 0.1; beyond the clip (1 - 0.2)^2 / 2, up to the return."""
    old, returns, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for value, cost in ((0.1, 0.405), (0.5, 0.32), (0.9, 0.32), (-0.5, 1.125)):
        got = losses.clipped_value_loss(torch.tensor([[value]]), old, returns, mask, 0.2)
        torch.testing.assert_close(got, torch.tensor(cost))


def test_the_kl_estimate_is_unbiased_and_zero_for_equal_policies() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(6, dtype=torch.float64).log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    assert (losses.kl_estimate(p, q) >= 0).all() and not losses.kl_estimate(p, p).any()
    torch.testing.assert_close((p.exp() * losses.kl_estimate(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_grpo_is_the_policy_gradient_plus_the_kl_gradient() -> None:
    """At the reference: -A per token. Elsewhere plus beta (1 - r), with r = reference / policy."""
    old = torch.log(torch.tensor([[0.5, 0.25], [0.25, 0.5]]))
    mask, advantage = torch.tensor([[True, True], [True, False]]), torch.tensor([2.0, -1.0])
    for reference, r in ((old, 1.0), (old - math.log(2), 0.5)):
        logp = old.clone().requires_grad_()
        losses.grpo_loss(logp, old, reference, advantage, mask, clip=0.2, beta=0.1).backward()
        want = (-advantage[:, None] + 0.1 * (1 - r)) * mask
        torch.testing.assert_close(logp.grad, want)


def test_losses_of_parts_add_up_to_the_whole() -> None:
    """Losses are sums, so micro-batches may have different sizes."""
    torch.manual_seed(0)
    a, b, c, advantage = (torch.randn(6, 4) for _ in range(4))
    mask = torch.rand(6, 4) < 0.5
    for whole, part in (
        (losses.grpo_loss(a, b, c, advantage[:, 0], mask, 0.2, 0.1),
         lambda s: losses.grpo_loss(a[s], b[s], c[s], advantage[s, 0], mask[s], 0.2, 0.1)),
        (losses.clipped_value_loss(a, b, c, mask, 0.2),
         lambda s: losses.clipped_value_loss(a[s], b[s], c[s], mask[s], 0.2)),
        (losses.dpo_loss(a[:, 0], b[:, 0], c[:, 0], c[:, 1], 0.1),
         lambda s: losses.dpo_loss(a[s, 0], b[s, 0], c[s, 0], c[s, 1], 0.1)),
    ):  # fmt: skip
        torch.testing.assert_close(part(slice(0, 1)) + part(slice(1, 6)), whole)
