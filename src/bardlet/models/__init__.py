"""The model families by name.

Importing this file imports no torch: `bardlet --help` lists the families in a few milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.config.model import ModelConfig

FAMILIES = {
    "bigram": "bardlet.models.lecture:BigramModel",
    "averaging": "bardlet.models.lecture:AveragingModel",
    "one-head": "bardlet.models.lecture:OneHeadModel",
    "multi-head": "bardlet.models.lecture:MultiHeadModel",
    "feed-forward": "bardlet.models.lecture:FeedForwardModel",
    "residual": "bardlet.models.lecture:ResidualModel",
    "layer-norm": "bardlet.models.lecture:LayerNormModel",
    "dropout": "bardlet.models.lecture:DropoutModel",
    "rotary": "bardlet.models.lecture:RotaryModel",
    "swiglu": "bardlet.models.lecture:SwiGLUModel",
    "qk-norm": "bardlet.models.lecture:QKNormModel",
    "gpt2": "bardlet.models.gpt2:GPT2",
    "qwen3": "bardlet.models.qwen3:Qwen3",
    "encdec": "bardlet.models.encdec:EncDec",
}
SCALAR = {"gpt2": "bardlet.models.reward:ScalarGPT2", "qwen3": "bardlet.models.reward:ScalarQwen3"}
"""The families that can have a scalar head, with it."""
MODEL_TYPES = {"pegasus": "encdec"}
"""Families whose Hugging Face layout has another name."""


def load_class(name: str) -> Any:
    """The class of the family `name`, imported now. Raises BardletError for a name that is not in FAMILIES."""
    if name not in FAMILIES:
        raise BardletError(f"there is no model '{name}': choose one of {', '.join(FAMILIES)}")
    return _imported(FAMILIES[name])


def _imported(place: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(config: ModelConfig) -> Any:
    """A model of the family `config.model` in fp32 on the CPU, initialised from torch's global generator."""
    return (_imported(SCALAR[config.model]) if config.scores else load_class(config.model))(config)
