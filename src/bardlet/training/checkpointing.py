"""Save a trainer to a checkpoint, restore it, and write run.toml."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.config.toml import as_mapping
from bardlet.errors import BardletError, quoted
from bardlet.run import checkpoint, hf, metrics, samples
from bardlet.run import folder as run_folder
from bardlet.runtime import parallelize
from bardlet.training import optim
from bardlet.training.state import State, Trainer


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return True if every number in the tensors is finite, judged by their total norm."""
    floats = [x for x in tensors if x.is_floating_point()]
    return bool(nn.utils.get_total_norm(floats).isfinite()) if floats else True


def save(trainer: Trainer) -> None:
    """Write a checkpoint of the current step, on rank 0 only; with a sharded model, all ranks must call it."""
    sharded = parallelize.is_sharded(trainer.model)
    if not trainer.dist.main and not sharded:
        return
    weights = trainer.model.hf_state_dict()
    state = {f"optimizer/{name}": v for name, v in optim.state_tensors(trainer.optimizers, trainer.model).items()}
    state |= {f"average/{name}": v for name, v in trainer.average.items()}
    state |= {f"beside/{name}": v for name, v in _extra_tensors(trainer.model).items()}
    stage_state = trainer.objective.stage_state
    state |= {f"stage/{name}": v for name, v in (stage_state.tensors() if stage_state else {}).items()}
    state["rng"] = torch.get_rng_state()
    weights, state = ({name: parallelize.full(x) for name, x in tensors.items()} for tensors in (weights, state))
    if not trainer.dist.main:
        return
    if not all_finite([*weights.values(), *state.values()]):
        raise BardletError(f"weights or optimizer state are not finite after step {trainer.state.step}; nothing was "
                           f"saved. `bardlet resume {quoted(trainer.run)}` continues from the last "
                           "checkpoint")
    if trainer.config.keep != "best" or math.isinf(trainer.best) or not (trainer.run / "model.safetensors").exists():
        # until --keep best has an evaluation to choose by, the newest weights make a stopped run usable
        hf.write_weights(trainer.run, weights)
        trainer.record.update(selected_by="last", selected_step=trainer.state.step)
    metadata = {**asdict(trainer.state), "machine": trainer.machine, "config": as_mapping(replay_settings(trainer)),
                "record": trainer.record.mapping()}
    checkpoint.save(trainer.run, trainer.state.step, weights, state, metadata, trainer.config.keep_checkpoints)
    trainer.record.saved = trainer.state.step
    write_run(trainer)


def write_result(trainer: Trainer) -> None:
    """Write the current weights to the root of the run, on rank 0; with a sharded model, all ranks must call it."""
    if trainer.dist.main or parallelize.is_sharded(trainer.model):
        weights = {name: parallelize.full(x) for name, x in trainer.model.hf_state_dict().items()}
        if trainer.dist.main:
            hf.write_weights(trainer.run, weights)


def _extra_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights missing from the exported model: of a value model, and LoRA factors."""
    return {f"{name}/{key}": x for name, part in _with_extra_tensors(model) for key, x in part.extra_tensors().items()}


def _with_extra_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) for each submodule with extra tensors."""
    return ((name, part) for name, part in model.named_modules() if hasattr(part, "extra_tensors"))


def restore(trainer: Trainer, folder: Path, best_is_lost: bool = False) -> None:
    """Restore `trainer` from the checkpoint `folder`, and cut metrics.jsonl back to its step.

    best_is_lost: the weights at the root are gone, so the next evaluation counts as the best.
    """
    (weights, tensors), metadata = checkpoint.load(folder), checkpoint.read_metadata(folder)
    trainer.model.load_hf_state_dict(parallelize.on_all_ranks(weights, trainer.model))
    rest: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "average": {}, "beside": {}, "stage": {}}
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind in rest:
            rest[kind][key] = value
    optim.load_state_tensors(trainer.optimizers, trainer.model, rest["optimizer"], str(folder / "trainer.safetensors"))
    shapes = {name: p.shape for name, p in trainer.model.named_parameters()}
    mismatched = [name for name, v in rest["average"].items() if shapes.get(name) != v.shape]
    if mismatched or tensors.get("rng", torch.empty(0)).shape != torch.get_rng_state().shape:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: {(mismatched or ['rng'])[0]} is missing "
                           "or has the wrong shape; use another checkpoint")
    extra_shapes = {name: x.shape for name, x in _extra_tensors(trainer.model).items()}
    if extra_shapes != {name: x.shape for name, x in rest["beside"].items()}:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: the LoRA or value-model weights are missing "
                           "or have the wrong shape; use another checkpoint")
    for name, part in _with_extra_tensors(trainer.model):
        part.load_extra_tensors(parallelize.on_all_ranks(
            {key: rest["beside"][f"{name}/{key}"] for key in part.extra_tensors()}, trainer.model))
    if trainer.objective.stage_state:
        trainer.objective.stage_state.load(rest["stage"])
    parameters = dict(trainer.model.named_parameters())
    trainer.average = {name: parallelize.cut_like(v.to(trainer.dist.device), parameters[name])
                       for name, v in rest["average"].items()}
    torch.set_rng_state(tensors["rng"].byte())
    known = {name: metadata[name] for name in asdict(trainer.state) if name in metadata}
    trainer.state = State(**{**known, "replans": [(a, b) for a, b in metadata["replans"]]})
    if trainer.dist.main:
        lines = metrics.cut_metrics(trainer.run, trainer.state.step, trainer.state.evaluated)
        samples.cut(trainer.run, trainer.state.evaluated)
        values = [line["val_loss"] for line in lines if "val_loss" in line]
        if trainer.record.selected_by == "best" and trainer.record.selected_step <= trainer.state.step:
            values.append(trainer.record.val_loss)  # in case its line of metrics.jsonl was lost
        trainer.best = math.inf if best_is_lost else min((v for v in values if math.isfinite(v)), default=math.inf)


def write_run(trainer: Trainer) -> dict[str, Any]:
    """Write run.toml, the resolved settings and the record so far, and return the record."""
    record = {**trainer.record.mapping(), "steps": trainer.state.step, "seconds": round(trainer.state.seconds, 3),
              "tokens_per_second": round(trainer.state.tokens / max(trainer.state.seconds, 1e-9), 1),
              "machine": trainer.machine}
    if trainer.dist.main:
        run_folder.write_run(trainer.run, replay_settings(trainer), record, trainer.model.config)
    return record


def replay_settings(trainer: Trainer) -> Settings:
    """Return settings that repeat this run without a clock."""
    first = trainer.state.replans[0][1] if trainer.state.replans else trainer.state.steps
    return replace(trainer.config, steps=first, minutes=None, replans=tuple(trainer.state.replans))
