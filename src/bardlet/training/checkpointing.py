"""A trainer to and from a checkpoint, and run.toml as the run stands."""

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
from bardlet.errors import BardletError
from bardlet.run import checkpoint, hf, metrics
from bardlet.run import folder as run_folder
from bardlet.training import optim
from bardlet.training.state import State, Trainer


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers of all tensors are finite: their norm is, then."""
    floats = [x for x in tensors if x.is_floating_point()]
    return bool(nn.utils.get_total_norm(floats).isfinite()) if floats else True


def save(t: Trainer) -> None:
    """A checkpoint of this step, written by rank 0."""
    if not t.dist.main:
        return
    weights = t.model.hf_state_dict()
    state = {f"optimizer/{name}": v for name, v in optim.state_tensors(t.optimizers, t.model).items()}
    state |= {f"average/{name}": v for name, v in t.average.items()}
    state |= {f"beside/{name}": v for name, v in _beside(t.model).items()}
    state |= {f"stage/{name}": v for name, v in (t.objective.memory.tensors() if t.objective.memory else {}).items()}
    state["rng"] = torch.get_rng_state()
    if not _finite([*weights.values(), *state.values()]):
        raise BardletError(f"a number of the optimizer after step {t.state.step} is not finite; nothing was saved. "
                           f"`bardlet resume {t.run}` goes on from the last checkpoint")
    if t.config.keep != "best" or math.isinf(t.best) or not (t.run / "model.safetensors").exists():
        # a run that is stopped here is a model, too: until --keep has something to choose from, the newest weights
        hf.write_weights(t.run, weights)
        t.record.update(selected_by="last", selected_step=t.state.step)
    facts = {**asdict(t.state), "machine": t.machine, "config": as_mapping(repeatable(t)), "record": t.record.mapping()}
    checkpoint.save(t.run, t.state.step, weights, state, facts, t.config.keep_checkpoints)
    t.record.saved = t.state.step
    write_run(t)


def _beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that the files of the model which the run makes do not have: a value model's, the factors of LoRA."""
    return {f"{name}/{key}": x for name, part in _with_beside(model) for key, x in part.beside().items()}


def _with_beside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of the parts of a model that have such weights."""
    return ((name, part) for name, part in model.named_modules() if hasattr(part, "beside"))


def restore(t: Trainer, folder: Path, best_is_lost: bool = False) -> None:
    """Put `t` where it was when the checkpoint `folder` was saved, and cut metrics.jsonl there.

    best_is_lost: the weights at the root are gone: the next that are evaluated are the best.
    """
    (weights, tensors), facts = checkpoint.load(folder), checkpoint.read_facts(folder)
    t.model.load_hf_state_dict(weights)
    rest: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "average": {}, "beside": {}, "stage": {}}
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind in rest:
            rest[kind][key] = value
    optim.load_state_tensors(t.optimizers, t.model, rest["optimizer"], str(folder / "trainer.safetensors"))
    shapes = {name: p.shape for name, p in t.model.named_parameters()}
    odd = [name for name, v in rest["average"].items() if shapes.get(name) != v.shape]
    if odd or tensors.get("rng", torch.empty(0)).shape != torch.get_rng_state().shape:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: {(odd or ['rng'])[0]} is missing or has "
                           "another shape; take another checkpoint")
    if {name: x.shape for name, x in _beside(t.model).items()} != {name: x.shape for name, x in rest["beside"].items()}:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: it does not have the weights that are learned "
                           "beside the model's own; take another checkpoint")
    for name, part in _with_beside(t.model):
        part.load_beside({key: rest["beside"][f"{name}/{key}"] for key in part.beside()})
    if t.objective.memory:
        t.objective.memory.load(rest["stage"])
    t.average = {name: v.to(t.dist.device) for name, v in rest["average"].items()}
    torch.set_rng_state(tensors["rng"].byte())
    known = {name: facts[name] for name in asdict(t.state) if name in facts}
    t.state = State(**{**known, "replans": [(a, b) for a, b in facts["replans"]]})
    if t.dist.main:
        lines = metrics.cut_metrics(t.run, t.state.step, t.state.evaluated)
        values = [line["val_loss"] for line in lines if "val_loss" in line]
        if t.record.selected_by == "best" and t.record.selected_step <= t.state.step:
            values.append(t.record.val_loss)  # a lost line of metrics.jsonl does not make worse weights the best
        t.best = math.inf if best_is_lost else min((v for v in values if math.isfinite(v)), default=math.inf)


def write_run(t: Trainer) -> dict[str, Any]:
    """run.toml: the settings as resolved and the record of what happened so far, which is returned."""
    record = {**t.record.mapping(), "steps": t.state.step, "seconds": round(t.state.seconds, 3),
              "tokens_per_second": round(t.state.tokens / max(t.state.seconds, 1e-9), 1), "machine": t.machine}
    if t.dist.main:
        run_folder.write_run(t.run, repeatable(t), record, t.model.config)
    return record


def repeatable(t: Trainer) -> Settings:
    """The settings with which this run can be repeated without a clock."""
    first = t.state.replans[0][1] if t.state.replans else t.state.steps
    return replace(t.config, steps=first, minutes=None, replans=tuple(t.state.replans))
