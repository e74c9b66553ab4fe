"""The training step and the loop: equivalences, numbers that are none, the average, the clock's decisions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, settings_of

from bardlet import models
from bardlet.config.model import RUNGS, WITHOUT_BLOCKS
from bardlet.config.pretraining import TrainConfig
from bardlet.config.toml import read_toml
from bardlet.data import batch as data_batch
from bardlet.errors import BardletError
from bardlet.run import checkpoint, hf
from bardlet.run.record import Record
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Stopped
from bardlet.training import checkpointing, optim
from bardlet.training import losses as loss
from bardlet.training import state as training_state
from bardlet.training import trainer as training

ALONE = Dist(0, 1, torch.device("cpu"))


def objective(batch: data_batch.Batch) -> training_state.Objective:
    return training_state.Objective(lambda step: batch, loss.next_token_loss, loss.count_targets, lambda model: 0.0)


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_micro_batches_add_up_when_targets_are_masked(model: str) -> None:
    """Rows with one, two, ... unmasked targets: 8 x 1 and 1 x 8 give the same gradient, not a mean of means."""
    torch.manual_seed(0)
    idx, target = torch.randint(11, (8, 8)), torch.randint(11, (8, 8))
    for row in range(8):
        target[row, row + 1 :] = loss.IGNORE
    results = []
    for accumulate in (1, 8):
        config = TrainConfig(model=model, n_layer=2, n_head=2, n_embd=16, block_size=8,  # type: ignore[arg-type]
                             grad_accum=accumulate, optimizer="adamw", grad_clip=0).resolved()
        torch.manual_seed(1)
        net = models.build(config.model_config(11))
        gradients: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_, net=net, gradients=gradients: gradients.update({n: p.grad.clone() for n, p in
                                                                       net.named_parameters()}))
        value, norm = training.train_step(net, [optimizer], {"idx": idx, "target": target},
                                          objective({}), config, ALONE, "fp32")
        results.append((value, norm, gradients))
    (loss_1, norm_1, whole), (loss_8, norm_8, parts) = results
    assert math.isclose(loss_1, loss_8, rel_tol=1e-6) and math.isclose(norm_1, norm_8, rel_tol=1e-5)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-7)


def trainer(tmp_path: Path, **settings: Any) -> training_state.Trainer:
    """A tiny run on a fixed batch, not begun."""
    values: dict[str, Any] = {"model": "qwen3", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8,
                              "batch_size": 2, "log_every": 1, "eval_every": 0, "save_every": 0, "steps": 5}
    config = TrainConfig(**(values | settings)).resolved()
    torch.manual_seed(0)
    net = models.build(config.model_config(11))
    idx = torch.randint(11, (2, 9))
    batch = {"idx": idx[:, :-1].contiguous(), "target": idx[:, 1:].contiguous()}
    evaluation = training_state.Objective(lambda step: batch, loss.next_token_loss, loss.count_targets,
                                lambda model: loss.next_token_loss(model, batch).item() / 16)
    machine = {"dtype": "fp32", "compiled": False}
    return training_state.Trainer(tmp_path, net, optim.build(net, config), evaluation, config, ALONE, machine, Record(),
                            training_state.State(steps=config.steps or 0))


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--on-nan stop: the weights are those of before, and the line says which step."""
    t = trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    object.__setattr__(t.objective, "loss", lambda model, batch: loss.next_token_loss(model, batch) * math.nan)
    with pytest.raises(BardletError, match="the loss of step 1 is not a finite number"):
        training.fit(t)
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())
    assert not checkpoint.steps_saved(tmp_path)


PLACES = [(place, number) for place in ("loss", "gradient", "weight", "optimizer") for number in range(4)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("place", "number"), PLACES, ids=lambda x: str(x))
def test_a_bad_number_anywhere_stops_in_its_step(place: str, number: int, value: float, tmp_path: Path) -> None:
    """In the loss, a gradient, a weight or the optimizer's state, in step 4: that step stops, and nothing is saved."""
    t = trainer(tmp_path, steps=8, save_every=1, keep_checkpoints=9)
    parameters = list(t.model.parameters())
    p = parameters[number * (len(parameters) - 1) // 3]
    real, hooks = t.objective.loss, []

    def spoil(model: torch.nn.Module, batch: data_batch.Batch) -> torch.Tensor:
        if t.state.step == 3 and place == "weight":
            p.data.view(-1)[-1] = value
        if t.state.step == 3 and place == "gradient":
            hooks.append(p.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value)))
        if t.state.step == 3 and place == "optimizer":
            for optimizer in t.optimizers:
                for state in optimizer.state.values():
                    for tensor in state.values():
                        if torch.is_tensor(tensor) and tensor.ndim:
                            tensor.view(-1)[number] = value
        return real(model, batch) * (value if t.state.step == 3 and place == "loss" else 1.0)

    object.__setattr__(t.objective, "loss", spoil)
    with pytest.raises(BardletError, match=r"of step 4 is not a finite number \(batch 4\)"):
        training.fit(t)
    newest = checkpoint.newest_whole(tmp_path)
    assert newest.name == "step-00000003"
    assert all(x.isfinite().all() for x in (*hf.read_tensors(newest / "model.safetensors").values(),
                                            *hf.read_tensors(newest / "trainer.safetensors").values()))


def test_skip_leaves_out_a_step_and_stops_at_ten(tmp_path: Path) -> None:
    """--on-nan skip: a bad step changes nothing, ten in a row are an error."""
    t = trainer(tmp_path, on_nan="skip", steps=30)
    bad = {3, *range(12, 30)}

    def sometimes(model: torch.nn.Module, batch: data_batch.Batch) -> torch.Tensor:
        return loss.next_token_loss(model, batch) * (math.inf if t.state.step in bad else 1.0)

    object.__setattr__(t.objective, "loss", sometimes)
    seen: dict[int, torch.Tensor] = {}
    with pytest.raises(BardletError, match="step 22 is not"):
        training.fit(t, watch=lambda line: seen.update({line["step"]: next(t.model.parameters()).detach().clone()}))
    assert torch.equal(seen[3], seen[4]) and not torch.equal(seen[4], seen[5])


def test_the_average_is_the_mean_over_the_last_fifth(tmp_path: Path) -> None:
    """--keep average of 10 steps: the mean of the weights after steps 9 and 10, by hand."""
    t = trainer(tmp_path, keep="average", steps=10)
    after: list[dict[str, torch.Tensor]] = []
    training.fit(t, watch=lambda line: after.append({n: p.detach().clone() for n, p in t.model.named_parameters()}))
    kept = hf.read_tensors(tmp_path / "model.safetensors")
    for name, value in kept.items():
        torch.testing.assert_close(value, (after[8][name] + after[9][name]) / 2)
    assert t.record.selected_by == "average" and t.state.averaged == 2
    for name, p in t.model.named_parameters():
        assert torch.equal(p, after[9][name]), "the model itself goes on from its own weights"


def fit_with_losses(trainer: training_state.Trainer, losses: list[float]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Train with these validation losses: (the first parameter after each step, the record in run.toml)."""
    values, after = iter(losses), []
    object.__setattr__(trainer.objective, "evaluate", lambda model: next(values))
    training.fit(trainer, watch=lambda line: after.append(next(trainer.model.parameters()).detach().clone()))
    return after, read_toml(trainer.run / "run.toml")[1]


def test_best_keeps_the_lowest_validation_loss(tmp_path: Path) -> None:
    """The root holds the weights of the best evaluation, and run.toml says which."""
    t = trainer(tmp_path, eval_every=1, steps=6)
    after, record = fit_with_losses(t, [3.0, 2.0, 1.0, 4.0, 1.5, 1.2, 1.1])  # the last is that of the average
    assert (record["selected_by"], record["selected_step"], record["val_loss"]) == ("best", 3, 1.0)
    name = next(name for name, _ in t.model.named_parameters())
    assert torch.equal(hf.read_tensors(tmp_path / "model.safetensors")[name], after[2])


def test_the_average_is_among_those_that_best_is_chosen_from(tmp_path: Path) -> None:
    """The mean of the weights after steps 9 and 10 has the lowest loss: it is what the root holds."""
    t = trainer(tmp_path, eval_every=5, steps=10)
    after, record = fit_with_losses(t, [2.0, 1.5, 1.0])
    assert (record["selected_by"], record["val_loss"], record["averaged"]) == ("best", 1.0, 2)
    name = next(name for name, _ in t.model.named_parameters())
    torch.testing.assert_close(hf.read_tensors(tmp_path / "model.safetensors")[name], (after[8] + after[9]) / 2)


def test_what_the_clock_decided_can_be_repeated(tmp_path: Path) -> None:
    """Replans are recorded with their step; a run that reads them makes the same weights without a clock."""
    (tmp_path / "timed").mkdir()
    (tmp_path / "again").mkdir()
    timed = trainer(tmp_path / "timed", steps=20)
    timed.state.replans = [(0, 20)]
    training.fit(timed, replan=lambda state: {4: 15, 9: 17}.get(state.step))
    assert timed.state.replans == [(0, 20), (4, 15), (9, 17)] and timed.state.step == 17

    config, record = read_toml(tmp_path / "timed" / "run.toml")
    again = trainer(tmp_path / "again", steps=config.steps, replans=config.replans)
    training.fit(again)
    assert again.state.step == 17
    for p, q in zip(timed.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """SIGTERM at the end of the second step: it is saved, and no third one begun; the exit code is the shell's 143."""
    import signal

    t = trainer(tmp_path)
    with pytest.raises(Stopped, match="after step 2, and saved; go on with `bardlet resume") as caught:
        training.fit(t, watch=lambda line: signal.raise_signal(signal.SIGTERM) if line["step"] == 2 else None)
    assert caught.value.exit_code == 143
    assert checkpoint.newest_whole(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("model", ["gpt2", "qwen3", *RUNGS])
def test_the_loop_learns(model: str, text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The same loop trains each model well below what knowing nothing costs, 2.38 here.

    Four seeds on each of two classes: averaging 2.00 at most, bigram 1.83, all others 1.72.
    """
    rate = ["--lr", "0.05"] if model == "bigram" else ["--lr", "0.01"] if model in WITHOUT_BLOCKS else []
    summary = bardlet("train", text, "--out", tmp_path / "run", "--model", model,
                      *settings_of(model, TINY), "--steps", "120" if model == "averaging" else "60", *rate)
    assert summary["val_loss"] < 0.7 * math.log(30)
    assert set(summary) == {"run", "steps", "resumed_from", "seconds", "train_loss", "val_loss", "nats_per_char",
                            "expected", "selected_by", "tokens_per_second", "parameters"}


def test_what_was_compiled_is_kept_in_the_cache(tmp_path: Path) -> None:
    """torch's own folder, chosen when its compiler is loaded, is a temporary one; without ours it stays."""
    lines = ("import torch", "from bardlet.config.pretraining import TrainConfig",
             "from bardlet.runtime.distributed import Dist", "from bardlet.stages.pretrain import Pretraining",
             "config = Pretraining(TrainConfig(), Dist(0, 1, torch.device('cpu'))).resolve_machine()",
             "from torch._inductor.runtime.cache_dir_utils import cache_dir", "print(cache_dir())")
    (tmp_path / "file").write_text("")
    for cache, kept in ((tmp_path / "cache", True), (tmp_path / "file", False)):
        env = {**os.environ, "BARDLET_CACHE": str(cache)}
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)
        said = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=env, capture_output=True, text=True)
        assert said.stdout.startswith(str(cache / "compiler")) == kept


def test_a_run_that_was_never_measured_leaves_its_newest_weights(tmp_path: Path) -> None:
    """--keep best without an evaluation yet: whoever stops it finds the weights of the last save, not of the first."""
    t = trainer(tmp_path, keep="best", eval_every=0, save_every=2, steps=6)
    for step in (2, 4):
        with torch.no_grad():
            next(iter(t.model.parameters())).add_(1.0)
        t.state.step = step
        checkpointing.save(t)
        saved = hf.read_weights(t.run)
        assert all(torch.equal(saved[name], x) for name, x in t.model.hf_state_dict().items() if name in saved)
        assert t.record.selected_step == step
