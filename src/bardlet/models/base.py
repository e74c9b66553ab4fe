"""What all models have in common: token ids in; logits, or the loss of the next tokens, out.

`LanguageModel` is the base of the families, `LectureModel` that of the lecture's steps in `lecture.py`. A family writes
`hidden`, where its head is, and how its config.json looks. (`_BT` behind a name is the tensor's shape: B rows, T
positions, C channels, V vocabulary, N targets.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ROTARY, ModelConfig
from bardlet.errors import BardletError
from bardlet.models.hf_config import take
from bardlet.models.layers import KVCache, new_cache
from bardlet.ops.cross_entropy import IGNORE, linear_cross_entropy, token_losses

Reduction = Literal["sum", "none"]


class Predictor(nn.Module):
    """A body with a head over the vocabulary, of whatever architecture."""

    config: ModelConfig

    @property
    def head(self) -> Tensor:
        """The head's weights: (V, C)."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden states (..., C) -> logits (..., V)."""
        return F.linear(x, self.head)

    def token_loss(self, x_BTC: Tensor, target_BT: Tensor | None, reduction: Reduction, smoothing: float,
                  temperature: float) -> Tensor:
        """What `LanguageModel.forward` returns, from the hidden states."""
        if target_BT is None:
            return self.logits(x_BTC)
        if (smoothing and reduction == "none") or (temperature != 1 and reduction == "sum"):
            raise ValueError('smoothing is for reduction="sum", temperature for reduction="none"')
        if reduction == "sum":
            return linear_cross_entropy(x_BTC, self.head, target_BT, smoothing)
        return token_losses(self.logits(x_BTC[target_BT != IGNORE]), target_BT, temperature)

    def new_cache(self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None,
                  device: torch.device | str | None = None) -> KVCache:
        """An empty cache for batch_size rows of up to max_length (default block_size) positions."""
        c = self.config
        shape = (c.n_layer, batch_size, c.n_kv_head, max_length or c.block_size, c.head_dim)
        return new_cache(self, shape, dtype, device)


class LanguageModel(Predictor):
    """A decoder: the ids of a text in, the logits of each next token out."""

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None, segment_BT: Tensor | None = None,
               prefix_B: Tensor | None = None) -> Tensor:
        """The last layer's states of idx_BT (int64): (B, T, C). See `layers.positions_and_mask` for the options.

        With a cache, the new keys and values are written into it and length_B grows by T.
        """
        raise NotImplementedError

    def forward(self, idx_BT: Tensor, target_BT: Tensor | None = None, *, reduction: Reduction = "sum",
                smoothing: float = 0.0, temperature: float = 1.0, **options: Any) -> Tensor:
        """Logits of the token after each of idx_BT (int64): (B, T, V). With targets no logits, but their loss.

        The loss is here, and not behind the model, since a wrapper for several processes has to see one call, and since
        so not all logits have to be there at once.

        Args:
            target_BT: int64, IGNORE where nothing is to be computed.
            reduction: "sum": their cross-entropy, summed, a scalar; "none": -log p of each, (B, T), 0 where IGNORE.
            smoothing: of the sum: the part of each target that is spread evenly over the vocabulary.
            temperature: of "none": divides the logits.
            options: of `hidden`.

        Returns:
            Losses are in nats, float32.
        """
        return self.token_loss(self.hidden(idx_BT, **options), target_BT, reduction, smoothing, temperature)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The checkpoint: names and layout of Hugging Face, contiguous, a tied head left out."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}


SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "n_inner")


class LectureModel(nn.Module):
    """A step of the ladder. Subclasses define the layers and `logits(idx_BT) -> logits_BTV`.

    It keeps no cache of keys and values: `inference/generate.py` asks it for the whole window again at every token, as
    the lecture does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def logits(self, idx: Tensor) -> Tensor:
        """Logits of the token after each of idx (B, T) int64: (B, T, V)."""
        raise NotImplementedError

    def forward(self, idx: Tensor, target: Tensor | None = None, *, reduction: Reduction = "sum",
                temperature: float = 1.0) -> Tensor:
        """The logits, or the loss of targets (`LanguageModel.forward`)."""
        logits = self.logits(idx)
        if target is None:
            return logits
        if reduction == "none":
            return token_losses(logits[target != IGNORE], target, temperature)
        B, T, V = logits.shape
        # in float32: bfloat16 has 8 bits of mantissa, too few to add up a softmax over a vocabulary
        return F.cross_entropy(logits.reshape(B * T, V).float(), target.reshape(B * T), ignore_index=IGNORE,
                               reduction="sum")

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
