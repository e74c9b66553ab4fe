"""What every rung of `lecture.py` has besides its idea: a configuration, and files of its own.

A rung maps token ids to logits and nothing else. It keeps no cache of keys and values: `inference/generate.py` asks it
for the whole window again at every token, as the lecture does. (`_BT` behind a name is the tensor's shape.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bardlet.config.model import ROTARY, ModelConfig
from bardlet.errors import BardletError
from bardlet.models.hf_config import take

SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "n_inner")


class Rung(nn.Module):
    """A step of the ladder. Subclasses define the layers and `forward(idx_BT) -> logits_BTV`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    # No Hugging Face layout holds a rung: the same files, with a model_type of bardlet's own.

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        shape = {name: getattr(config, name) for name in SHAPE}
        return {"model_type": f"bardlet-{config.model}", "vocab_size": config.vocab_size, **shape,
                "activation": config.activation, "norm_eps": config.norm_eps, "dropout": config.dropout,
                "rope_theta": config.rope_theta}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json. Raises BardletError where something is missing or cannot be."""
        name = take(hf, "model_type", str).removeprefix("bardlet-")
        shape = {key: take(hf, key, int) for key in SHAPE}
        if shape["n_embd"] % shape["n_head"]:
            raise BardletError(f"config.json: n_embd {shape['n_embd']} cannot be divided among {shape['n_head']} heads")
        head_dim = shape["n_embd"] // shape["n_head"]
        if head_dim % 2 and name in ROTARY:
            raise BardletError(f"config.json: heads of {head_dim} channels; rotary positions turn pairs, so it is even")
        return ModelConfig(name, take(hf, "vocab_size", int), **shape, n_kv_head=shape["n_head"], head_dim=head_dim,
                           dropout=take(hf, "dropout", float, 0.0), norm_eps=take(hf, "norm_eps", float),
                           activation=take(hf, "activation", str), tie_embeddings=False,
                           rope_theta=take(hf, "rope_theta", float, 10_000.0))

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The checkpoint: the parameters by their names here."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weights of a checkpoint. Raises BardletError for one that does not fit."""
        load_strictly(self, tensors)


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
