"""Options of commands that use a trained model: sampling and evaluation. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from bardlet.config.settings import as_typed
from bardlet.errors import BardletError

MAX_TOKENS = 1_000_000
"""Tokens of the longest text to generate: a typing error of more would run for days."""
MAX_TEXTS = 1_000
"""Texts to generate at once: they are one batch in memory."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of text generation."""

    tokens: int = 500
    """Maximum number of tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature: below 1 is more careful, above 1 wilder. 0: always the likeliest token."""
    top_k: int | None = 50
    """Sample from the k likeliest tokens. none: from all."""
    top_p: float | None = None
    """Sample from the likeliest tokens with this total probability."""
    seed: int | None = None
    """The same seed gives the same text (default: a new seed each time)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Precision of the weights (default: bf16 if they are stored so, otherwise fp32). int8 is fastest on a CPU."""

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("tokens", self.tokens >= 1, "at least 1"), ("tokens", self.tokens <= MAX_TOKENS, f"at most {MAX_TOKENS}"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise BardletError(f"--{name} {as_typed(getattr(self, name.replace('-', '_')))}: must be {requirement}")

    @property
    def sampling(self) -> dict[str, Any]:
        """The keywords of `Model.stream`."""
        return {"max_new_tokens": self.tokens, "temperature": self.temperature, "top_k": self.top_k,
                "top_p": self.top_p, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation."""

    field: str = "text"
    """Field of a .jsonl record that holds the text."""
    source: str | None = None
    """File to translate, one sentence per line (default: the held-out pairs)."""
    target: str | None = None
    """File with the reference translations of --source, line by line."""
    beam: int = 1
    """Beam width of a translator."""
    protocol: Literal["full", "random"] = "full"
    """Windows of the text. full: side by side, so that every token counts once; random: 200 batches of 64 random
    windows, as nanoGPT does."""
    context: int | None = None
    """Window length in tokens (default: the block size, at most 256)."""
    task: tuple[str, ...] = ()
    """Tasks with known answers, from $BARDLET_DATA. hellaswag, arc-easy, arc-challenge, openbookqa, piqa, copa,
    winogrande, winograd, boolq, commonsense-qa, siqa, mmlu, lambada, arithmetic, gsm8k."""
    limit: int | None = None
    """Questions per task, evenly spread (default: all)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of matrix products."""

    def __post_init__(self) -> None:
        for name in ("context", "limit", "beam"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BardletError(f"--{name} {value}: must be at least 1")
        for name, choices in (("protocol", ("full", "random")), ("dtype", ("fp32", "bf16"))):
            if (value := getattr(self, name)) not in choices:
                raise BardletError(f"--{name} {value}: must be one of {', '.join(choices)}")

    def refuse(self, *names: str, why: str) -> None:
        """Raise BardletError for the first of these options that the user set, since it would do nothing."""
        for name in names:
            if getattr(self, name) != getattr(EvaluationOptions, name):
                raise BardletError(f"--{name}: {why}; drop it")
