"""Base classes of all models: token ids in; logits, or the loss of the next tokens, out.

`LanguageModel` is the base class of the families, `LectureModel` that of the rungs in `lecture.py`. A family defines
`hidden`, its head and its config.json. (A suffix like `_BT` is the tensor's shape: B rows, T positions, C channels,
V vocabulary, N targets.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ROTARY, ModelConfig
from bardlet.errors import BardletError
from bardlet.models.hf_config import get_value
from bardlet.models.layers import KVCache, new_cache
from bardlet.ops.cross_entropy import IGNORE, linear_cross_entropy, padded, token_losses

Reduction = Literal["sum", "none"]


class Predictor(nn.Module):
    """A body of any architecture, with a head over the vocabulary."""

    config: ModelConfig
    compiles_loss = False
    """True if torch.compile fuses the operations between head and loss (`compile_blocks`)."""

    @property
    def head(self) -> Tensor:
        """The head's weights: (V, C)."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """Apply the head: hidden states (..., C) -> logits (..., V)."""
        return F.linear(x, self.head)

    def logits_or_loss(self, x_BTC: Tensor, target_BT: Tensor | None, reduction: Reduction, smoothing: float,
                       temperature: float) -> Tensor:
        """Return what `LanguageModel.forward` returns, computed from the hidden states."""
        if target_BT is None:
            return self.logits(x_BTC)
        if (smoothing and reduction == "none") or (temperature != 1 and reduction == "sum"):
            raise ValueError('smoothing needs reduction="sum", temperature needs reduction="none"')
        if reduction == "sum":
            return linear_cross_entropy(x_BTC, self.head, target_BT, smoothing, self.compiles_loss)
        logits_NV = F.linear(x_BTC[target_BT != IGNORE], padded(self.head, self.head.dtype))[:, : len(self.head)]
        return token_losses(logits_NV, target_BT, temperature)

    def new_cache(self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None,
                  device: torch.device | str | None = None) -> KVCache:
        """Return an empty cache for batch_size rows of up to max_length (default block_size) positions."""
        c = self.config
        shape = (c.n_layer, batch_size, c.n_kv_head, max_length or c.block_size, c.head_dim)
        return new_cache(self, shape, dtype, device)


class LanguageModel(Predictor):
    """A decoder-only model: token ids in, logits of each next token out."""

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None, segment_BT: Tensor | None = None,
               prefix_B: Tensor | None = None) -> Tensor:
        """Return the final hidden states of idx_BT (int64): (B, T, C). Options: `layers.positions_and_mask`.

        Writes the new keys and values into a given cache and increases its length_B by T.
        """
        raise NotImplementedError

    def forward(self, idx_BT: Tensor, target_BT: Tensor | None = None, *, reduction: Reduction = "sum",
                smoothing: float = 0.0, temperature: float = 1.0, **options: Any) -> Tensor:
        """Return the logits of the token after each of idx_BT (int64): (B, T, V). With targets, return their loss.

        The model computes the loss itself because a wrapper for several processes has to see one call, and because the
        full logits then never have to be materialized.

        Args:
            target_BT: int64, IGNORE where no loss is computed.
            reduction: "sum": the summed cross-entropy, a scalar; "none": -log p of each target, (B, T), 0 where IGNORE.
            smoothing: for "sum": the share of each target that is spread evenly over the vocabulary.
            temperature: for "none": divides the logits.
            options: passed to `hidden`.

        Returns:
            Losses in nats, float32.
        """
        return self.logits_or_loss(self.hidden(idx_BT, **options), target_BT, reduction, smoothing, temperature)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return the checkpoint: Hugging Face's names and layout, contiguous, without a tied head."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}


@torch.no_grad()
def with_vocabulary(model: LanguageModel, size: int, seed: int) -> LanguageModel:
    """Return a model with `size` rows in embedding and head: the same ones, then new ones near their mean.

    A new row is the mean plus a tenth of the standard deviation as noise, so that new tokens differ from each other.
    """
    grown = type(model)(replace(model.config, vocab_size=size)).to(next(model.parameters()).dtype)
    generator, tensors = torch.Generator().manual_seed(seed), model.state_dict()
    for name, new in grown.state_dict().items():
        old = tensors[name]
        if old.shape != new.shape:
            noise = torch.randn(new[len(old) :].shape, generator=generator)
            rows = old.float().mean(0) + 0.1 * old.float().std(0) * noise
            tensors[name] = torch.cat((old, rows.to(old.dtype)))
    grown.load_state_dict(tensors)
    return grown.train(model.training)


SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "n_inner")


class LectureModel(nn.Module):
    """A rung of the ladder. Subclasses define the layers and `logits(idx_BT) -> logits_BTV`.

    It has no KV cache: `inference/generate.py` recomputes the whole window for every new token, as the lecture does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def logits(self, idx: Tensor) -> Tensor:
        """Return the logits of the token after each of idx (B, T) int64: (B, T, V)."""
        raise NotImplementedError

    def forward(self, idx: Tensor, target: Tensor | None = None, *, reduction: Reduction = "sum",
                temperature: float = 1.0) -> Tensor:
        """Return the logits, or the loss of the targets (`LanguageModel.forward`)."""
        logits = self.logits(idx)
        if target is None:
            return logits
        if reduction == "none":
            return token_losses(logits[target != IGNORE], target, temperature)
        B, T, V = logits.shape
        # in float32: bfloat16's 8-bit mantissa is too coarse to sum a softmax over the vocabulary
        return F.cross_entropy(logits.reshape(B * T, V).float(), target.reshape(B * T), ignore_index=IGNORE,
                               reduction="sum")

    # transformers has no model like a rung: the files are the same, the model_type is bardlet's own

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json."""
        shape = {name: getattr(config, name) for name in SHAPE}
        return {"model_type": f"bardlet-{config.model}", "vocab_size": config.vocab_size, **shape,
                "activation": config.activation, "norm_eps": config.norm_eps, "dropout": config.dropout,
                "rope_theta": config.rope_theta}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the ModelConfig of a config.json. Raises BardletError for a missing or impossible value."""
        name = get_value(hf, "model_type", str).removeprefix("bardlet-")
        shape = {key: get_value(hf, key, int) for key in SHAPE}
        if shape["n_embd"] % shape["n_head"]:
            raise BardletError(f"config.json: n_embd {shape['n_embd']} is not divisible by n_head {shape['n_head']}; "
                               "copy the file again")
        head_dim = shape["n_embd"] // shape["n_head"]
        if head_dim % 2 and name in ROTARY:
            raise BardletError(f"config.json: the head size {head_dim} is odd; rotary positions need an even one")
        return ModelConfig(name, get_value(hf, "vocab_size", int), **shape, n_kv_head=shape["n_head"],
                           head_dim=head_dim, dropout=get_value(hf, "dropout", float, 0.0),
                           norm_eps=get_value(hf, "norm_eps", float),
                           activation=get_value(hf, "activation", str), tie_embeddings=False,
                           rope_theta=get_value(hf, "rope_theta", float, 10_000.0))

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return the checkpoint: the parameters, named as in the module."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a checkpoint. Raises BardletError if they do not fit."""
        load_strictly(self, tensors)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model's parameters, converting each to the parameter's dtype and device.

    A parameter without memory (on the meta device) becomes the tensor itself. Otherwise, of tensors that are read when
    they are asked for (`Lazy`), one at a time is in memory.

    Raises BardletError before copying anything, but for a wrong shape among lazy tensors; it names the first tensor
    that is missing, unexpected or misshapen.
    """
    expected = model.state_dict()
    for name in expected:
        if name not in tensors:
            raise BardletError(f"no tensor '{name}' in the weights: they and config.json do not belong together")
    for name in tensors:
        if name not in expected:
            raise BardletError(f"unexpected tensor '{name}': the weights and config.json do not belong together")
    assign = any(parameter.is_meta for parameter in model.parameters())
    merged = any(hasattr(part, "extra_tensors") for part in model.modules())  # LoRA's weights are sums
    if assign or merged or isinstance(tensors, dict):
        tensors = dict(tensors)
        for name, parameter in expected.items():
            _check_shape(name, tensors[name], parameter)
        model.load_state_dict(tensors, assign=assign)
        return
    with torch.no_grad():
        for name, parameter in expected.items():
            tensor = tensors[name]
            _check_shape(name, tensor, parameter)
            parameter.copy_(tensor)


def _check_shape(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.shape != parameter.shape:
        raise BardletError(f"tensor '{name}' has shape {list(tensor.shape)}, but config.json asks for "
                           f"{list(parameter.shape)}: the two files do not belong together")


def changed(names: Iterable[str], read: Callable[[str], Tensor], source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors that are computed from those of `source` by `read`: a dict if it is one, else `Lazy`."""
    return {name: read(name) for name in names} if isinstance(source, dict) else Lazy(names, read)


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each of which `read` reads when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
