"""The model that a stage of a chat model begins with."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bardlet import checkpoint, hf, pretrain
from bardlet.align import chat
from bardlet.config import FINE, TrainConfig
from bardlet.dist import Dist
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer
from bardlet.train import Trainer

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
        checkpoint.new_folder(Path(out), "")  # before the long part
    if config.init is None:
        raise BardletError(f"bardlet {config.stage}: name the model that is to learn: a run folder, or a Hugging Face "
                           "folder with a gpt2 or qwen3 model")
    model, words = hf.read_folder(Path(config.init), config.dropout)
    if not hasattr(model, "new_cache") or hasattr(model, "encode"):
        raise BardletError(f"{config.init}: a {model.config.model} model does not hold conversations; "
                           "take a base of --model qwen3 or gpt2")
    if words.chat_template not in (None, chat.TEMPLATE):
        log.warning("%s writes conversations in another way (its chat_template); from here on in bardlet's",
                    config.init)
    elif config.stage != "sft" and words.chat_template is None:
        log.warning("%s has not learned to answer yet: `bardlet sft` first makes the better start", config.init)
    words.chat_template = chat.TEMPLATE
    config.unused(set(given) - set(pretrain.DECIDED))
    if run is None:  # one that begins again has its rates
        rates = {name: rate for name, rate in FINE[config.stage].items() if name not in {*given, *in_file}}
        config = replace(config, **rates)
    if "block_size" in given and config.block_size > model.config.block_size:
        log.warning("--block-size %d: the model's window has %d tokens, and stays as it is", config.block_size,
                    model.config.block_size)
    torch.manual_seed(config.seed)
    return model, words, pretrain.as_model(pretrain.settled(config, dist), model.config, given)


def same(config: TrainConfig, record: dict[str, Any], digest: str) -> None:
    """BardletError where the weights of --init, by their sha256, are not those on record; else they are put there."""
    if record.setdefault("base_hash", digest) != digest:
        raise BardletError(f"{config.init}: is not the model any more that the run began with, which is its reference; "
                           "put it back")


def folder(run: Path | None, out: str | None, name: str) -> Path:
    """The run folder: that of a run that begins again, or a new one."""
    return run or checkpoint.new_folder(Path(out) if out else None, name)


def plan(t: Trainer, times: int) -> None:
    """Plan to read what is learned so many times, where neither --steps nor --minutes says something else."""
    if t.config.steps is None and t.config.minutes is None:
        t.state.steps = times * t.record["batches"]
        if t.state.steps < SHORT:
            log.warning("%s is short: to read it %s makes %d steps, which teach little; --steps 200 makes more",
                        t.record["text"], "once" if times == 1 else f"{times} times", t.state.steps)
        t.config = replace(t.config, steps=t.state.steps)
