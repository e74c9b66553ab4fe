"""Parameter groups, schedules, optimizers and their state as named tensors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bardlet import models
from bardlet.config.model import RUNGS
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.training import optim, optimizers

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}


def small_model(model: str, **settings: object) -> tuple[torch.nn.Module, TrainConfig]:
    """Return a small model and its resolved settings."""
    config = TrainConfig(model=model, **SHAPE, **settings).resolved()  # type: ignore[arg-type]
    return models.build(config.model_config(11)), config


@pytest.mark.parametrize("model", ["gpt2", "qwen3", *RUNGS])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_partition_the_parameters(model: str, tied: bool) -> None:
    """Each parameter is in exactly one group; Muon gets exactly the matrices between embeddings and head."""
    module, _ = small_model(model, tie_embeddings=tied)
    groups = optim.parameter_groups(module, muon=True)
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    for name, p in groups["muon"]:
        assert p.ndim == 2 and re.search(r"\.h\.|\.layers\.|^blocks\.|^sa_heads?\.|^ffwd\.", name), name
    assert all(p.ndim < 2 for _, p in groups["no_decay"])
    assert not any("embed" in name or "wte" in name or "wpe" in name or "lm_head" in name for name, _ in groups["muon"])
    assert bool(groups["muon"]) == (model not in ("bigram", "averaging"))
    assert not optim.parameter_groups(module, muon=False)["muon"]


@pytest.mark.parametrize("model, parts", [("one-head", ["key", "query", "value"]),
                                          ("multi-head", ["key", "query", "value"] * 2),
                                          ("feed-forward", ["key", "query", "value"] * 2 + ["0"])])
def test_muon_trains_the_matrices_of_a_layer_without_blocks(model: str, parts: list[str]) -> None:
    """The same matrices as in a block: the projections of each head and the feed-forward layer."""
    module, _ = small_model(model)
    assert [name.split(".")[-2] for name, _ in optim.parameter_groups(module, muon=True)["muon"]] == parts


@given(steps=st.integers(1, 3000), warmup=st.integers(0, 300), low=st.floats(0, 1),
       schedule=st.sampled_from(["stable-decay", "cosine", "linear"]))
def test_schedules_warm_up_then_decay_to_the_minimum(steps: int, warmup: int, low: float, schedule: str) -> None:
    """Shares are in [0, 1], rise only during warm-up, and would reach `low` one step after the last."""
    config = TrainConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=low)  # type: ignore[arg-type]
    share = [optim.learning_rate(step, steps, config) for step in range(steps + 1)]
    warm = min(warmup, steps // 5)
    assert all(0 <= s <= 1 + 1e-9 for s in share)
    assert share[:warm] == sorted(share[:warm])
    assert all(a >= b - 1e-9 for a, b in zip(share[warm:], share[warm + 1 :], strict=False))
    assert abs(share[steps] - low) < 1e-9


def test_a_longer_plan_does_not_change_the_plateau() -> None:
    """Before its decay, stable-decay is independent of the number of steps, so replanning is safe there."""
    config = TrainConfig(warmup_steps=10, decay_share=0.4)
    for step in range(600):
        assert optim.learning_rate(step, 1000, config) == optim.learning_rate(step, 1300, config)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_saving_and_loading(kind: str) -> None:
    """The next step from restored state is bitwise the same."""
    torch.manual_seed(0)
    module, config = small_model("qwen3", optimizer=kind)
    twin, _ = small_model("qwen3", optimizer=kind)
    first, second = optim.build(module, config), optim.build(twin, config)

    def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        idx = torch.arange(8)[None]
        model(idx).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step(module, first)
    twin.load_state_dict(module.state_dict())
    optim.load_state_tensors(second, twin, optim.state_tensors(first, module), "here")
    step(module, first)
    step(twin, second)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_adamw_matches_torch() -> None:
    """Bitwise, in two groups, with parameters that have no gradient at first; hooks run once."""
    torch.manual_seed(0)
    sizes = ((8, 4), (4,), (3, 3))
    mine = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]

    def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]

    torchs = torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    ours, calls = optim.AdamW(groups(mine), lr=0.1, fused=True), []
    ours.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(3):
        for p, q in zip(mine, theirs, strict=True):
            if step or p.ndim == 1:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        ours.step()
        torchs.step()
        ours.zero_grad()
        torchs.zero_grad()
        assert all(torch.equal(p, q) and p.grad is None for p, q in zip(mine, theirs, strict=True))
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_muon_matches_torch(shape: tuple[int, int]) -> None:
    """Three batched steps with momentum and decay match torch.optim.Muon to bf16's 3 digits."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for _ in range(3)]
    mine, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    ours = optim.Muon(mine, lr=0.1, weight_decay=0.2)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, nesterov=True)
    for _ in range(3):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    for p, q, before in zip(mine, theirs, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - before).norm()


@pytest.mark.parametrize("shape", [(40, 40), (24, 64), (64, 24)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_orthogonalized_matrices_have_singular_values_near_1(shape: tuple[int, int], dtype: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """From any singular values, keeping the singular vectors, in bf16 and in fp32."""
    monkeypatch.setattr(optimizers, "pick_dtype", lambda *_: dtype)
    update = optimizers.orthogonalize(torch.randn(1, *shape))
    assert update.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    original = torch.linspace(0.05, 1, 24 if 24 in shape else 40) * torch.tensor([[1e-3], [1e3]])
    x = optimizers.orthogonalize(u @ torch.diag_embed(original) @ v).float()
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5
    assert values.max() < 1.3
    rotated = u.mT @ x @ v.mT  # diagonal if x keeps the singular vectors
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 0.1


def test_state_that_does_not_fit_is_an_error() -> None:
    """The message names a tensor of no parameter, or of the wrong shape."""
    module, config = small_model("gpt2")
    optimizers = optim.build(module, config)
    module(torch.arange(8)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    saved = optim.state_tensors(optimizers, module)
    with pytest.raises(BardletError, match=r"here: .*no\.such/exp_avg"):
        optim.load_state_tensors(optimizers, module, {**saved, "no.such/exp_avg": torch.zeros(1)}, "here")
    other = {**saved, "transformer.wpe.weight/exp_avg": torch.zeros(3, 3)}
    with pytest.raises(BardletError, match=r"transformer\.wpe\.weight/exp_avg does not have the shape"):
        optim.load_state_tensors(optimizers, module, other, "here")


def test_state_of_another_optimizer_or_partial_state_is_refused() -> None:
    """Muon does not silently start from zero momentum with a checkpoint of AdamW."""
    module, config = small_model("qwen3", optimizer="adamw")
    twin, other = small_model("qwen3", optimizer="muon")
    adamw, muon = optim.build(module, config), optim.build(twin, other)
    module(torch.arange(8)[None]).square().mean().backward()
    adamw[0].step()
    saved = optim.state_tensors(adamw, module)
    with pytest.raises(BardletError, match=r"here: .*self_attn\.q_proj\.weight does not belong to Muon"):
        optim.load_state_tensors(muon, twin, saved, "here")
    first = {name: tensor for name, tensor in saved.items() if name.startswith("model.embed_tokens.")}
    with pytest.raises(BardletError, match="does not belong to AdamW"):
        optim.load_state_tensors(adamw, module, first, "here")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_empty_state_is_that_before_the_first_step(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A run that skipped every step so far saves no state; after a resume, its first step is bitwise the same."""
    module, config = small_model("qwen3", optimizer=kind)
    twin = copy.deepcopy(module)
    first, second = optim.build(module, config), optim.build(twin, config)
    saved = optim.state_tensors(first, module)
    assert not saved
    optim.load_state_tensors(second, twin, saved, "here")
    assert "here: saved before the first optimizer step" in caplog.text
    for net, both in ((module, first), (twin, second)):
        net(torch.arange(8)[None]).square().mean().backward()
        for optimizer in both:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_skips_a_matrix_with_zero_gradient(decay: float) -> None:
    """Whatever its momentum and decay: otherwise an old gradient would cause a full step."""
    torch.manual_seed(0)
    moving, still = (torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    muon = optim.Muon([moving, still], lr=0.1, weight_decay=decay)
    for p in (moving, still):
        p.grad = torch.randn(4, 6)
    muon.step()
    still_before = still.detach().clone()
    moving.grad, still.grad = torch.randn(4, 6), torch.zeros(4, 6)
    moving_before = moving.detach().clone()
    muon.step()
    assert torch.equal(still, still_before) and not torch.equal(moving, moving_before)
