"""Save a trainer to a checkpoint, restore it, and write run.toml."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.config.toml import as_mapping
from bardlet.errors import BardletError, quoted
from bardlet.models.base import Lazy
from bardlet.run import checkpoint, hf, metrics, samples, shares
from bardlet.run import folder as run_folder
from bardlet.runtime import parallelize
from bardlet.training import optim
from bardlet.training.saving import Saver, own_rows
from bardlet.training.state import State, Trainer


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return True if every number in the tensors is finite, judged by their total norm."""
    floats = [x for x in tensors if x.is_floating_point()]
    return bool(nn.utils.get_total_norm(floats).isfinite()) if floats else True


def save(trainer: Trainer) -> None:
    """Write a checkpoint of the current step, on rank 0 only.

    With a sharded model, all ranks must call it; it returns while the checkpoint is still being written.
    """
    if trainer.saver:
        _save_shares(trainer, trainer.saver)
        return
    if not trainer.dist.main:
        return
    weights = trainer.model.hf_state_dict()
    state = {f"optimizer/{name}": v for name, v in optim.state_tensors(trainer.optimizers, trainer.model).items()}
    state |= {f"average/{name}": v for name, v in trainer.average.items()}
    state |= {f"beside/{name}": v for name, v in _extra_tensors(trainer.model).items()}
    stage_state = trainer.objective.stage_state
    state |= {f"stage/{name}": v for name, v in (stage_state.tensors() if stage_state else {}).items()}
    state["rng"] = torch.get_rng_state()
    if not all_finite([*weights.values(), *state.values()]):
        raise _not_finite(trainer)
    if _needs_result(trainer):
        hf.write_weights(trainer.run, weights)
        trainer.record.update(selected_by="last", selected_step=trainer.state.step)
    checkpoint.save(trainer.run, trainer.state.step, weights, state, _metadata(trainer),
                    trainer.config.keep_checkpoints)
    trainer.record.saved = trainer.state.step
    write_run(trainer)


def _save_shares(trainer: Trainer, saver: Saver) -> None:
    """Write this rank's rows of a sharded model and its optimizer state, and complete the checkpoint in the background.
    """
    note_saved(trainer, saver.wait())
    rows = own_rows(trainer)
    if trainer.dist.ranks_where(not all_finite(each.tensor for each in rows.values())):
        raise _not_finite(trainer)
    if trainer.dist.broadcast_int(int(trainer.dist.main and _needs_result(trainer))):
        write_result(trainer)
        trainer.record.update(selected_by="last", selected_step=trainer.state.step)
    saver.start(trainer.run, trainer.state.step, rows, _metadata(trainer), trainer.config.keep_checkpoints)


def note_saved(trainer: Trainer, step: int | None) -> None:
    """Record that the checkpoint of a step is complete; None: there is no new one."""
    if step is not None:
        trainer.record.saved = step
        write_run(trainer)


def _not_finite(trainer: Trainer) -> BardletError:
    return BardletError(f"weights or optimizer state are not finite after step {trainer.state.step}; nothing was "
                        f"saved. `bardlet resume {quoted(trainer.run)}` continues from the last checkpoint")


def _needs_result(trainer: Trainer) -> bool:
    """Return True if the newest weights go to the root of the run: until --keep best has an evaluation to choose by,
    they make a stopped run usable."""
    return (trainer.config.keep != "best" or math.isinf(trainer.best)
            or not (trainer.run / "model.safetensors").exists())


def _metadata(trainer: Trainer) -> dict[str, Any]:
    return {**asdict(trainer.state), "machine": trainer.machine, "config": as_mapping(replay_settings(trainer)),
            "record": trainer.record.mapping()}


def write_result(trainer: Trainer) -> None:
    """Write the current weights to the root of the run, on rank 0; with a sharded model, all ranks must call it."""
    if not parallelize.is_sharded(trainer.model):
        if trainer.dist.main:
            hf.write_weights(trainer.run, trainer.model.hf_state_dict())
        return
    weights = trainer.model.hf_state_dict()
    pieces = (piece for x in weights.values() for piece in parallelize.pieces(x))
    if trainer.dist.main:
        hf.write_pieces(trainer.run, weights, pieces)
    else:
        deque(pieces, maxlen=0)  # this rank sends its rows


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
    metadata = checkpoint.read_metadata(folder)
    if saved := checkpoint.shares_in(folder):
        rng = _restore_shares(trainer, saved, folder)
    else:
        rng = _restore_whole(trainer, folder)
    torch.set_rng_state(rng.byte())
    known = {name: metadata[name] for name in asdict(trainer.state) if name in metadata}
    trainer.state = State(**{**known, "replans": [(a, b) for a, b in metadata["replans"]]})
    if trainer.dist.main:
        lines = metrics.cut_metrics(trainer.run, trainer.state.step, trainer.state.evaluated)
        samples.cut(trainer.run, trainer.state.evaluated)
        values = [line["val_loss"] for line in lines if "val_loss" in line]
        if trainer.record.selected_by == "best" and trainer.record.selected_step <= trainer.state.step:
            values.append(trainer.record.val_loss)  # in case its line of metrics.jsonl was lost
        trainer.best = math.inf if best_is_lost else min((v for v in values if math.isfinite(v)), default=math.inf)


def _restore_shares(trainer: Trainer, saved: shares.SharedTensors, folder: Path) -> torch.Tensor:
    """Restore weights, optimizer state, average and stage from a shared model's checkpoint; return the random state.

    A sharded model reads its own rows, any other model all rows.
    """
    where, parameters = str(folder), dict(trainer.model.named_parameters())

    def read(name: str, like: Any) -> Any:
        """Return a tensor of the checkpoint, sharded as `like` is."""
        if (own := parallelize.local(like)) is like:
            return saved[name].to(like.device)
        if not own.numel():
            return torch.zeros_like(like)
        return parallelize.as_share(saved.rows(name, parallelize.first_row(like), len(own)).to(own.device), like)

    def like(name: str) -> Any:
        """Return the parameter that a tensor of an optimizer's state belongs to, or a scalar if it is one."""
        parameter = name.rpartition("/")[0]
        return torch.zeros(()) if name.endswith("/step") else parameters.get(parameter, torch.zeros(()))

    names = {kind: [name.partition("/")[2] for name in saved if name.startswith(f"{kind}/")]
             for kind in ("parameter", "optimizer", "average", "stage")}
    if set(names["parameter"]) != parameters.keys():
        raise BardletError(f"{where}: damaged: its weights are not those of config.json; use another checkpoint")
    with torch.no_grad():
        for name, p in parameters.items():
            value = read(f"parameter/{name}", p)
            if value.shape != p.shape:
                raise BardletError(f"{where}: damaged: {name} has the wrong shape; use another checkpoint")
            p.copy_(value)
    state = Lazy(names["optimizer"], lambda name: read(f"optimizer/{name}", like(name)))
    optim.load_state_tensors(trainer.optimizers, trainer.model, state, where)
    trainer.average = {name: read(f"average/{name}", parameters[name]) for name in names["average"]}
    if trainer.objective.stage_state:
        trainer.objective.stage_state.load({name: saved[f"stage/{name}"] for name in names["stage"]})
    return saved["rng"]


def _restore_whole(trainer: Trainer, folder: Path) -> torch.Tensor:
    """Restore weights, optimizer state, average and stage from a checkpoint; return the random state."""
    weights, tensors = checkpoint.load(folder)
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
    return tensors["rng"]


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
