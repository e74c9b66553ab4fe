"""The model families by name.

Importing this module does not import torch, so `bardlet --help` lists the families in milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bardlet.config.model import LLAMA
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
    **dict.fromkeys(LLAMA, "bardlet.models.llama:Llama"),
    "encdec": "bardlet.models.encdec:EncDec",
}
SCALAR = {"gpt2": "bardlet.models.reward:ScalarGPT2", **dict.fromkeys(LLAMA, "bardlet.models.reward:ScalarLlama")}
"""Classes with a scalar head, by family."""
MODEL_TYPES = {"pegasus": "encdec"}
"""Hugging Face model types whose family has another name here."""


def load_class(name: str) -> Any:
    """Import and return the class of the family `name`. Raises BardletError for a name that is not in FAMILIES."""
    if name not in FAMILIES:
        raise BardletError(f"unknown model '{name}'; choose one of {', '.join(FAMILIES)}")
    return _import_object(FAMILIES[name])


def _import_object(path: str) -> Any:
    """Return the object that `module:attribute` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(config: ModelConfig) -> Any:
    """Return a model of the family `config.model`, in fp32 on the CPU, initialized from torch's global generator."""
    return (_import_object(SCALAR[config.model]) if config.scores else load_class(config.model))(config)
