"""The rungs of the lecture in its order, readable alone. The first: the bigram.

*Let's build GPT: from scratch, in code, spelled out* starts from a table: the row of the current token holds the
logits of the next one. Nothing before the current token is looked at. Shape suffixes are those of `layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.config import ModelConfig
from bardlet.models import load_strictly, refuse, take
from bardlet.models.layers import KVCache, init_weights, new_cache, place


class Bigram(nn.Module):
    """A table of V rows of V logits: all that one token says of the next."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)
        init_weights(self, residual=(), n_layer=1)

    def states(
        self,
        idx_BT: Tensor,
        cache: KVCache | None = None,
        segment_BT: Tensor | None = None,
        prefix_B: Tensor | None = None,
    ) -> Tensor:
        """The row of each token of idx_BT (int64): (B, T, V). No token sees another, whatever the options say."""
        place(idx_BT, self.config.block_size, cache, segment_BT, prefix_B)  # for its errors alone
        if cache is not None:
            cache.length_B += idx_BT.shape[1]
        return self.token_embedding_table(idx_BT)

    def logits(self, x: Tensor) -> Tensor:
        """The rows are the logits."""
        return x

    def forward(
        self,
        idx_BT: Tensor,
        cache: KVCache | None = None,
        segment_BT: Tensor | None = None,
        prefix_B: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each of idx_BT: (B, T, V)."""
        return self.logits(self.states(idx_BT, cache, segment_BT, prefix_B))

    def new_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """A cache of no layers: it only counts."""
        return new_cache(self, (0, batch_size, 0, max_length or self.config.block_size, 0), dtype, device)

    def decoder(self) -> Callable[[Tensor, KVCache], Tensor]:
        """The model for one token a row: (idx_B, cache) -> logits (B, V)."""

        def step(idx_B: Tensor, cache: KVCache) -> Tensor:
            cache.length_B += 1
            return self.token_embedding_table(idx_B)

        return step

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the model. No Hugging Face layout holds a bigram: the type is bardlet's own."""
        return {
            "model_type": "bardlet-bigram",
            "architectures": ["Bigram"],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.block_size,
        }

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json. Raises BardletError for one that is not a bigram's."""
        refuse(hf, "model_type", "bardlet-bigram")
        vocab_size, block_size = take(hf, "vocab_size", int), take(hf, "max_position_embeddings", int)
        return ModelConfig(model="bigram", vocab_size=vocab_size, block_size=block_size)

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The checkpoint: one table."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weights of a checkpoint. Raises BardletError for one that does not fit."""
        load_strictly(self, tensors)
