"""A number instead of the next token: gpt2 and qwen3 with a scalar head, for reward models and value models.

The body is the language model's; one linear map, `score`, reads the state at a token. The layout is Hugging Face's
GPT2ForSequenceClassification and Qwen3ForSequenceClassification with one label, which read the state at the last token
that is no padding, of rows that are padded on the right.

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
from bardlet.models.qwen3 import Qwen3
from bardlet.ops.cross_entropy import IGNORE


class ScalarModel(nn.Module):
    """What both families with a scalar head have in common: the head, and what is read from it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, tie_embeddings=True, scores=True))  # tied: no head over the vocabulary
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        # of normed states: rewards are about 1 in size (Stiennon et al. 2020, *Learning to summarize*, appendix B.2)
        nn.init.normal_(self.score.weight, std=(config.n_embd + 1) ** -0.5)

    if TYPE_CHECKING:  # the other parent's

        def hidden(self, idx_BT: Tensor) -> Tensor: ...

    def values(self, idx_BT: Tensor) -> Tensor:
        """A number at each token of idx_BT (int64), of what stands up to there: (B, T), float32."""
        return self._scored(self.hidden(idx_BT))

    def forward(self, idx_BT: Tensor, length_B: Tensor) -> Tensor:
        """The reward of each row of idx_BT (int64), read at the last of its length_B (int64) tokens: (B,), float32.

        What stands behind a row's length changes nothing; of a row of length 0 the number means nothing.
        """
        x_BTC = self.hidden(idx_BT)
        last_B = (length_B - 1).clamp_min(0)
        return self._scored(x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), last_B])

    def _scored(self, x: Tensor) -> Tensor:
        """The head: states (..., C) -> numbers (...), in float32: bfloat16 would make many of them equal."""
        with torch.autocast(x.device.type, enabled=False):
            return self.score(x.float()).squeeze(-1)


class ScalarGPT2(ScalarModel, GPT2):  # type: ignore[misc]  # the body of one, but no language model
    """GPT-2 with a scalar head."""

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {**GPT2.to_hf(config), "architectures": ["GPT2ForSequenceClassification"], **ONE_LABEL}


class ScalarQwen3(ScalarModel, Qwen3):  # type: ignore[misc]
    """Qwen3 with a scalar head."""

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {**Qwen3.to_hf(config), "architectures": ["Qwen3ForSequenceClassification"], **ONE_LABEL}


ONE_LABEL: Mapping[str, Any] = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}


def with_scalar_head(model: Any) -> Any:
    """A scalar head, from torch's global generator, on a copy of the body of a gpt2 or qwen3 `model`."""
    scorer = models.build(replace(model.config, scores=True))
    body = {name: x for name, x in model.hf_state_dict().items() if not name.startswith(("lm_head.", "score."))}
    scorer.load_hf_state_dict({**body, "score.weight": scorer.score.weight.detach()})
    return scorer


class ActorCritic(nn.Module):
    """A policy and, beside it, a model that expects how much reward is still to come: what PPO trains together.

    To the outside it is the policy: its shape, its files, its weights. `beside` has those of the critic.
    """

    def __init__(self, policy: Any, critic: Any) -> None:
        super().__init__()
        self.config, self.policy, self.critic = policy.config, policy, critic
        self.to_hf, self.hf_state_dict = policy.to_hf, policy.hf_state_dict
        self.load_hf_state_dict = policy.load_hf_state_dict

    def forward(self, idx_BT: Tensor, target_BT: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(-log p of each target, what the critic expects before it is known): (B, T) float32 each, 0 where IGNORE."""
        where_BT = target_BT != IGNORE
        loss_BT = self.policy(idx_BT, target_BT, reduction="none", temperature=temperature)
        return loss_BT, loss_BT.new_zeros(loss_BT.shape).masked_scatter(where_BT, self.critic.values(idx_BT)[where_BT])

    def extra_tensors(self) -> dict[str, Tensor]:
        """The critic's weights."""
        return self.critic.hf_state_dict()

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `beside` gave. Raises BardletError for what does not fit."""
        self.critic.load_hf_state_dict(tensors)
