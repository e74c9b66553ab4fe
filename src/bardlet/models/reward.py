"""Scalar heads for reward and value models: GPT-2 or Llama with a number per token instead of logits.

The body is the language model's; a linear layer, `score`, maps the hidden state of a token to a number. The layout is
that of Hugging Face's classes that end in ForSequenceClassification, with one label: they read the last token before
the padding on the right.

    B rows   T positions   C channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.models.gpt2 import GPT2
from bardlet.models.llama import Llama
from bardlet.ops.cross_entropy import IGNORE


class ScalarModel(nn.Module):
    """The scalar head, for both families: a value per token, or a reward per row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, tie_embeddings=True, scores=True))  # tied: no head over the vocabulary
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        # hidden states are normed, so rewards are about 1 in size (Stiennon et al. 2020, *Learning to summarize*,
        # appendix B.2)
        nn.init.normal_(self.score.weight, std=(config.n_embd + 1) ** -0.5)

    if TYPE_CHECKING:  # defined by the other parent class

        def hidden(self, idx_BT: Tensor) -> Tensor: ...

    def values(self, idx_BT: Tensor) -> Tensor:
        """Return a value at each token of idx_BT (int64), from the tokens up to it: (B, T), float32."""
        return self._apply_head(self.hidden(idx_BT))

    def forward(self, idx_BT: Tensor, length_B: Tensor) -> Tensor:
        """Return the reward of each row of idx_BT (int64), read at the last of length_B (int64) tokens: (B,), float32.

        Tokens past a row's length have no influence; the reward of a row of length 0 is meaningless.
        """
        x_BTC = self.hidden(idx_BT)
        last_B = (length_B - 1).clamp_min(0)
        return self._apply_head(x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), last_B])

    def _apply_head(self, x: Tensor) -> Tensor:
        """Map hidden states (..., C) to numbers (...), in float32: bfloat16 would make many of them equal."""
        with torch.autocast(x.device.type, enabled=False):
            return self.score(x.float()).squeeze(-1)


class ScalarGPT2(ScalarModel, GPT2):  # type: ignore[misc]  # GPT2's body, but not a language model
    """GPT-2 with a scalar head."""

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json."""
        return {**GPT2.to_hf(config), "architectures": ["GPT2ForSequenceClassification"], **ONE_LABEL}


class ScalarLlama(ScalarModel, Llama):  # type: ignore[misc]
    """Llama, or a relative, with a scalar head."""

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json."""
        language_model = Llama.to_hf(config)
        kind = language_model["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        return {**language_model, "architectures": [kind], **ONE_LABEL}


ONE_LABEL: Mapping[str, Any] = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}


def with_scalar_head(model: Any) -> Any:
    """Return a copy of the body of `model` (gpt2 or one of LLAMA) with a new scalar head, from torch's generator."""
    scorer = models.build(replace(model.config, scores=True))
    body = {name: x for name, x in model.hf_state_dict().items() if not name.startswith(("lm_head.", "score."))}
    scorer.load_hf_state_dict({**body, "score.weight": scorer.score.weight.detach()})
    return scorer


class ActorCritic(nn.Module):
    """A policy and a critic that predicts the reward still to come, which PPO trains together.

    From outside it is the policy: its shape, its files, its weights. `extra_tensors` has the critic's weights.
    """

    def __init__(self, policy: Any, critic: Any) -> None:
        super().__init__()
        self.config, self.policy, self.critic = policy.config, policy, critic
        self.to_hf, self.hf_state_dict = policy.to_hf, policy.hf_state_dict
        self.load_hf_state_dict = policy.load_hf_state_dict

    def forward(self, idx_BT: Tensor, target_BT: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return (-log p of each target, the critic's value before it): (B, T) float32 each, 0 where IGNORE."""
        valid_BT = target_BT != IGNORE
        loss_BT = self.policy(idx_BT, target_BT, reduction="none", temperature=temperature)
        return loss_BT, loss_BT.new_zeros(loss_BT.shape).masked_scatter(valid_BT, self.critic.values(idx_BT)[valid_BT])

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the critic's weights."""
        return self.critic.hf_state_dict()

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors from `extra_tensors`. Raises BardletError if they do not fit."""
        self.critic.load_hf_state_dict(tensors)
