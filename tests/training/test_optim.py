"""Parameter groups, schedules, and the optimizer's state as named tensors."""

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
from bardlet.training import optim

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}


def small(model: str, **more: object) -> tuple[torch.nn.Module, TrainConfig]:
    config = TrainConfig(model=model, **SHAPE, **more).resolved()  # type: ignore[arg-type]
    return models.build(config.model_config(11)), config


@pytest.mark.parametrize("model", ["gpt2", "qwen3", *RUNGS])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_partition_the_parameters(model: str, tied: bool) -> None:
    """Each parameter is in exactly one group; Muon has the matrices between embeddings and head and nothing else."""
    module, _ = small(model, tie_embeddings=tied)
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
    """What it would train of the same parts in a block: the projections of each head, the feed-forward layer."""
    module, _ = small(model)
    assert [name.split(".")[-2] for name, _ in optim.parameter_groups(module, muon=True)["muon"]] == parts


@given(steps=st.integers(1, 3000), warmup=st.integers(0, 300), low=st.floats(0, 1),
       schedule=st.sampled_from(["stable-decay", "cosine", "linear"]))
def test_schedules_rise_then_fall_and_end_low(steps: int, warmup: int, low: float, schedule: str) -> None:
    """Between 0 and 1, rising to the end of the warm-up and never again; the step after the last would be at `low`."""
    config = TrainConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=low)  # type: ignore[arg-type]
    share = [optim.learning_rate(step, steps, config) for step in range(steps + 1)]
    warm = min(warmup, steps // 5)
    assert all(0 <= s <= 1 + 1e-9 for s in share)
    assert share[:warm] == sorted(share[:warm])
    assert all(a >= b - 1e-9 for a, b in zip(share[warm:], share[warm + 1 :], strict=False))
    assert abs(share[steps] - low) < 1e-9


def test_a_longer_plan_leaves_the_plateau_as_it_was() -> None:
    """Before its decay, stable-decay does not depend on how long the run will be: a plan may change there."""
    config = TrainConfig(warmup_steps=10, decay_share=0.4)
    for step in range(600):
        assert optim.learning_rate(step, 1000, config) == optim.learning_rate(step, 1300, config)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_comes_back(kind: str) -> None:
    """The same next step, to the last bit, from restored state."""
    torch.manual_seed(0)
    module, config = small("qwen3", optimizer=kind)
    twin, _ = small("qwen3", optimizer=kind)
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


def test_adamw_is_that_of_torch() -> None:
    """To the last bit, in two groups, with a parameter that has no gradient at first; hooks run once."""
    torch.manual_seed(0)
    sizes = ((8, 4), (4,), (3, 3))
    mine = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]

    def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]

    torchs = torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    ours, called = optim.AdamW(groups(mine), lr=0.1, fused=True), []
    ours.register_step_post_hook(lambda *_: called.append(1))
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
    assert called == [1, 1, 1]


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    """Three steps with momentum and decay, as torch.optim.Muon makes them one matrix at a time (in bf16: 3 digits)."""
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
def test_an_orthogonal_update_has_singular_values_near_1(shape: tuple[int, int], dtype: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whatever the matrix's own were, and its singular vectors stay; in bf16, and where that is slow in fp32."""
    monkeypatch.setattr(optim, "pick_dtype", lambda *_: dtype)
    assert optim.orthogonalize(torch.randn(1, *shape)).dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    own = torch.linspace(0.05, 1, 24 if 24 in shape else 40) * torch.tensor([[1e-3], [1e3]])
    x = optim.orthogonalize(u @ torch.diag_embed(own) @ v).float()
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5
    assert values.max() < 1.3
    turned = u.mT @ x @ v.mT  # diagonal, if x has the singular vectors of g
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 0.1


def test_state_that_does_not_fit_is_named() -> None:
    """A tensor for no parameter, or of another shape, is an error that says which."""
    module, config = small("gpt2")
    optimizers = optim.build(module, config)
    module(torch.arange(8)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    saved = optim.state_tensors(optimizers, module)
    with pytest.raises(BardletError, match=r"here: .*no\.such/exp_avg"):
        optim.load_state_tensors(optimizers, module, {**saved, "no.such/exp_avg": torch.zeros(1)}, "here")
    other = {**saved, "transformer.wpe.weight/exp_avg": torch.zeros(3, 3)}
    with pytest.raises(BardletError, match=r"transformer\.wpe\.weight/exp_avg has another shape"):
        optim.load_state_tensors(optimizers, module, other, "here")


def test_state_of_another_optimizer_or_a_part_of_it_is_refused() -> None:
    """A run that had AdamW for a matrix does not go on with Muon from nothing, as if that were its momentum."""
    module, config = small("qwen3", optimizer="adamw")
    twin, other = small("qwen3", optimizer="muon")
    adamw, muon = optim.build(module, config), optim.build(twin, other)
    module(torch.arange(8)[None]).square().mean().backward()
    adamw[0].step()
    saved = optim.state_tensors(adamw, module)
    with pytest.raises(BardletError, match=r"here: .*self_attn\.q_proj\.weight is not that of Muon"):
        optim.load_state_tensors(muon, twin, saved, "here")
    first = {name: tensor for name, tensor in saved.items() if name.startswith("model.embed_tokens.")}
    with pytest.raises(BardletError, match="is not that of AdamW"):
        optim.load_state_tensors(adamw, module, first, "here")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_no_state_is_that_before_the_first_step(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a run saves that has skipped all its steps so far: it goes on with its first, to the last bit."""
    module, config = small("qwen3", optimizer=kind)
    twin = copy.deepcopy(module)
    first, second = optim.build(module, config), optim.build(twin, config)
    saved = optim.state_tensors(first, module)
    assert not saved
    optim.load_state_tensors(second, twin, saved, "here")
    assert "here: the optimizers had done no step" in caplog.text
    for net, optimizers in ((module, first), (twin, second)):
        net(torch.arange(8)[None]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_a_gradient_muon_stays(decay: float) -> None:
    """Whatever its momentum and decay: a full step in the direction of an old gradient would be one for no reason."""
    torch.manual_seed(0)
    moving, still = (torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    muon = optim.Muon([moving, still], lr=0.1, weight_decay=decay)
    for p in (moving, still):
        p.grad = torch.randn(4, 6)
    muon.step()
    before = still.detach().clone()
    moving.grad, still.grad = torch.randn(4, 6), torch.zeros(4, 6)
    other = moving.detach().clone()
    muon.step()
    assert torch.equal(still, before) and not torch.equal(moving, other)
