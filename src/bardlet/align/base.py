"""The model that a stage of a chat model begins with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bardlet import hf, pretrain
from bardlet.config import TrainConfig
from bardlet.dist import Dist
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")


def begin(config: TrainConfig, dist: Dist, given: Collection[str], rates: Mapping[str, Any],
          in_file: Collection[str]) -> tuple[Any, Tokenizer, TrainConfig]:
    """(model, tokenizer, config as the model decides it) of --init.

    Args:
        given, in_file: the settings that somebody typed, and those of a file of settings.
        rates: what the stage takes where neither says anything.

    Raises:
        BardletError: no model is named, or one that cannot hold a conversation; a setting that would do nothing.
    """
    if config.init is None:
        raise BardletError(f"bardlet {config.stage}: name the model that is to learn: a run folder, or a Hugging Face "
                           "folder with a gpt2 or qwen3 model")
    model, words = hf.read_folder(Path(config.init), config.dropout)
    if not hasattr(model, "new_cache") or hasattr(model, "encode"):
        raise BardletError(f"{config.init}: a {model.config.model} model does not hold conversations; "
                           "take a base of --model qwen3 or gpt2")
    config.unused(set(given) - set(pretrain.DECIDED))
    config = replace(config, **{name: rate for name, rate in rates.items() if name not in {*given, *in_file}})
    if "block_size" in given and config.block_size > model.config.block_size:
        log.warning("--block-size %d: the model's window has %d tokens, and stays as it is", config.block_size,
                    model.config.block_size)
    return model, words, pretrain.as_model(pretrain.settled(config, dist), model.config, given)
