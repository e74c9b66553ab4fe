"""The model families by name, and what they share in reading and writing Hugging Face's files.

Importing this file imports no torch: `bardlet --help` lists the families in a few milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bardlet.errors import BardletError, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bardlet.config import ModelConfig

FAMILIES = {
    "bigram": "bardlet.models.ladder:BigramModel",
    "averaging": "bardlet.models.ladder:AveragingModel",
    "one-head": "bardlet.models.ladder:OneHeadModel",
    "multi-head": "bardlet.models.ladder:MultiHeadModel",
    "feed-forward": "bardlet.models.ladder:FeedForwardModel",
    "residual": "bardlet.models.ladder:ResidualModel",
    "layer-norm": "bardlet.models.ladder:LayerNormModel",
    "dropout": "bardlet.models.ladder:DropoutModel",
    "rotary": "bardlet.models.ladder:RotaryModel",
    "swiglu": "bardlet.models.ladder:SwiGLUModel",
    "qk-norm": "bardlet.models.ladder:QKNormModel",
    "gpt2": "bardlet.models.gpt2:GPT2",
    "qwen3": "bardlet.models.qwen3:Qwen3",
    "encdec": "bardlet.models.encdec:EncDec",
}
SCALAR = {"gpt2": "bardlet.models.heads:ScalarGPT2", "qwen3": "bardlet.models.heads:ScalarQwen3"}
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


_required: Any = object()


def take(hf: Mapping[str, Any], key: str, kind: type, default: Any = _required) -> Any:
    """`hf[key]` as a `kind` (int: at least 1; float: at least 0). A missing or null entry gives `default`.

    Raises BardletError where the entry is required and missing, or is not of that kind.
    """
    value = hf.get(key)
    if value is None:
        if default is _required:
            raise BardletError(f"config.json has no '{key}': the file is damaged or of another model family")
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good, words = {
        int: (isinstance(value, int) and number and value >= 1, "a whole number of at least 1"),
        float: (number and value >= 0, "a number of at least 0"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a text"),
    }[kind]
    if not good:
        raise BardletError(f"config.json: '{key}' is {shown(value)}, but {words} is needed there")
    return kind(value)


def refuse(hf: Mapping[str, Any], key: str, *computed: Any) -> None:
    """Raises BardletError where `hf` sets `key` to something else than the values that bardlet computes."""
    if key in hf and hf[key] not in computed:
        raise BardletError(
            f"config.json: '{key}' is {shown(hf[key])}, which bardlet does not compute "
            f"(only {' or '.join(map(repr, computed))}): use transformers for this model"
        )


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` into the model's parameters (each to the parameter's own dtype and device).

    Raises BardletError, before anything is copied, that names the first tensor that is missing, not expected
    or of another shape.
    """
    expected = model.state_dict()
    for name, parameter in expected.items():
        if name not in tensors:
            raise BardletError(f"the weights have no '{name}': config.json and the weights do not belong together")
        if tensors[name].shape != parameter.shape:
            raise BardletError(
                f"the weights have '{name}' of shape {list(tensors[name].shape)}, but config.json asks for "
                f"{list(parameter.shape)}: they do not belong together"
            )
    for name in tensors:
        if name not in expected:
            raise BardletError(f"the weights have '{name}', which this model has no place for")
    model.load_state_dict(dict(tensors))
