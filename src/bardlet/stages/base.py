"""Shared by the stages: the model of --init, settings as this machine has them, and the `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from bardlet.config.model import ModelConfig
from bardlet.config.settings import FINE, TrainConfig, option
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.models import lora
from bardlet.planning import memory
from bardlet.planning.compilation import _keep_compiled
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.runtime import device as runtime_device
from bardlet.runtime import distributed
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer
from bardlet.training import optim
from bardlet.training.state import Objective, State, Trainer

log = logging.getLogger("bardlet")

SHORT = 50
"""Steps of a plan that was not asked for; with fewer a notice says so."""


def begin(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str], in_file: Collection[str],
          run: Path | None) -> tuple[Any, Tokenizer, TrainConfig]:
    """(model, tokenizer, config as the model decides it) of --init. The arguments are those of `pretrain.new_trainer`.

    The tokenizer gets the chat template. The rates are FINE's where neither the command line nor a file says them.

    Raises:
        BardletError: no model is named, or one that cannot hold a conversation; a setting that would do nothing; a
            folder that is not free.
    """
    if out is not None:
        run_folder.new_folder(Path(out), "")  # before the long part
    if config.init is None:
        raise BardletError(f"bardlet {config.stage}: name the model that is to learn: a run folder, or a Hugging Face "
                           "folder with a gpt2 or qwen3 model")
    model, words = hf.read_folder(Path(config.init), config.dropout)
    if not hasattr(model, "new_cache") or hasattr(model, "encode"):
        raise BardletError(f"{config.init}: a {model.config.model} model does not hold conversations; "
                           "take a base of --model qwen3 or gpt2")
    if words.chat_template not in (None, chat_template.TEMPLATE):
        log.warning("%s writes conversations in another way (its chat_template); from here on in bardlet's",
                    config.init)
    elif config.stage != "sft" and words.chat_template is None:
        log.warning("%s has not learned to answer yet: `bardlet sft` first makes the better start", config.init)
    words.chat_template = chat_template.TEMPLATE
    config.unused(set(given) - set(DECIDED))
    if run is None:  # one that begins again has its rates
        rates = {name: rate for name, rate in FINE[config.stage].items() if name not in {*given, *in_file}}
        config = replace(config, **rates)
    if "block_size" in given and config.block_size > model.config.block_size:
        log.warning("--block-size %d: the model's window has %d tokens, and stays as it is", config.block_size,
                    model.config.block_size)
    torch.manual_seed(config.seed)
    return model, words, as_model(settled(config, dist), model.config, given)


def same(config: TrainConfig, record: dict[str, Any], digest: str) -> None:
    """BardletError where the weights of --init, by their sha256, are not those on record; else they are put there."""
    if record.setdefault("base_hash", digest) != digest:
        raise BardletError(f"{config.init}: is not the model any more that the run began with, which is its reference; "
                           "put it back")


def folder(run: Path | None, out: str | None, name: str) -> Path:
    """The run folder: that of a run that begins again, or a new one."""
    return run or run_folder.new_folder(Path(out) if out else None, name)


def plan(t: Trainer, times: int) -> None:
    """Plan to read what is learned so many times, where neither --steps nor --minutes says something else."""
    if t.config.steps is None and t.config.minutes is None:
        t.state.steps = times * t.record["batches"]
        if t.state.steps < SHORT:
            log.warning("%s is short: to read it %s makes %d steps, which teach little; --steps 200 makes more",
                        t.record["text"], "once" if times == 1 else f"{times} times", t.state.steps)
        t.config = replace(t.config, steps=t.state.steps)


DECIDED = ("model", "n_layer", "n_encoder_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "tie_embeddings",
           "activation", "tokenizer", "vocab_size")
"""The settings that the weights of --init decide."""


def as_model(config: TrainConfig, shape: ModelConfig, given: Collection[str]) -> TrainConfig:
    """`config` with the shape of the weights that training starts from; its windows may be shorter than theirs."""
    ignored = [option(name) for name in DECIDED if name in given]
    if ignored:
        log.warning("%s: not used, --init %s decides it", ", ".join(ignored), config.init)
    asked = "block_size" in given or config.block_size != TrainConfig.block_size
    block = min(shape.block_size, config.block_size) if asked else shape.block_size
    return replace(config, model=cast(Any, shape.model), n_layer=shape.n_layer, n_head=shape.n_head,
                   n_encoder_layer=shape.n_encoder_layer or None, n_kv_head=shape.n_kv_head, n_embd=shape.n_embd,
                   n_inner=shape.n_inner,
                   block_size=block, tie_embeddings=shape.tie_embeddings)


def settled(config: TrainConfig, dist: Dist) -> TrainConfig:
    """`config` with device, precision and threads as this machine has them; PyTorch is told."""
    _keep_compiled()
    threads = runtime_device.settle(config.threads, config.deterministic, dist.device)
    device = dist.device.type if config.device == "auto" else config.device
    dtype = runtime_device.pick_dtype(config.dtype, dist.device)
    return replace(config, dtype=cast(Any, dtype), device=device, threads=threads)


def trainer(run: Path, model: Any, objective: Callable[[TrainConfig], Objective], config: TrainConfig, dist: Dist,
            record: dict[str, Any], resumed: bool) -> Trainer:
    """A `Trainer` at step 0 of the objective that `objective` makes of settings; other arguments as for `assemble`.

    The objective is made once more where its batches have to be computed in smaller pieces than the settings say.
    """
    config = settled(config, dist)
    if config.batch_size % dist.world and not config.parallel:
        raise BardletError(f"--batch-size {config.batch_size} cannot be shared by {dist.world} processes: "
                           f"take a multiple of {dist.world}")
    model.to(dist.device)
    record["parameters"] = sum(x.numel() for x in model.hf_state_dict().values())
    if config.lora:
        lora.adapt(getattr(model, "policy", model), config.lora)  # a critic, which is new, learns as a whole
        record["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    machine = distributed.machine(dist, config.dtype, config.threads or 1)
    t = Trainer(run, model, optim.build(model, config), objective(config), config, dist, machine, record,
                State(steps=config.steps or 0, replans=list(config.replans[:1])))
    if not resumed:
        memory.fit_micro_batches(t)
        if t.config != config:  # rows are then filled up to another multiple
            t.objective = objective(t.config)
    return t
