"""How good a model is: its loss on text that it did not learn from, in units that can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bardlet.config.model import ModelConfig
from bardlet.data.batch import Batch
from bardlet.runtime.device import autocast
from bardlet.training.losses import count_targets, next_token_loss


@dataclass(frozen=True)
class Score:
    """A loss in the field's three units. The last two compare models whatever their tokenizers."""

    loss: float
    """Nats per token."""
    nats_per_char: float
    bits_per_byte: float
    tokens: int


ROWS = 64
"""Rows that an evaluation takes at once, where there is memory for them."""
LARGE = 128 * 2**20
"""Bytes that the widest tensor of an evaluation may have in float32: a few of them are there at once."""


def rows_at_once(shape: ModelConfig, length: int, most: int = LARGE) -> int:
    """How many rows of `length` tokens an evaluation takes at once: ROWS, or as many as keep its widest tensor in
    float32 (logits, inner layer, or attention's weights) under `most` bytes; at least 1. Logits count as if all of them
    were there, as for a rung."""
    widest = 4 * length * max(shape.vocab_size, shape.n_inner, 3 * shape.n_embd, shape.n_head * length)
    return max(1, min(ROWS, most // widest))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: str = "fp32",
              rows: int = ROWS, loss: Callable[[nn.Module, Batch], torch.Tensor] = next_token_loss) -> float:
    """The mean loss in nats over every unmasked target of `batches`; `loss` gives the sum of a batch.

    The sums of the batches are added in float64 on the host. `dtype` is the precision of the matrix products. At most
    `rows` rows go through the model at once: a batch of more is cut into pieces.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        for start in range(0, len(batch["target"]), rows):
            piece = {name: t[start : start + rows].to(device) for name, t in batch.items()}
            with autocast(dtype, device):
                total += loss(model, piece).item()
        tokens += count_targets(batch)
    return total / tokens if tokens else math.nan


def score(loss: float, tokens: int, characters: int, size: int, first: str = "") -> Score:
    """`loss` (nats per token) in the three units.

    Args:
        tokens: how many tokens the text has; every one but the first was predicted.
        characters, size: the length of the text, in characters and in bytes of UTF-8.
        first: the text of the first token, which is left out of both.
    """
    nats = loss * (tokens - 1)
    characters, size = characters - len(first), size - len(first.encode())
    return Score(loss, nats / max(1, characters), nats / math.log(2) / max(1, size), tokens - 1)


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """The share of different runs of n words among all that stand in `texts`, 0 to 1; 0 where there is none.

    (Li et al. 2016, *A Diversity-Promoting Objective Function for Neural Conversation Models*, section 4.)
    """
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


# ---------------------------------------------------------------- translations


@dataclass(frozen=True)
class TranslationScore:
    """BLEU and chrF of a translation, 0 to 100, as sacreBLEU computes them; its signatures say how."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    lines: int


def translation_score(translated: Sequence[str], references: Sequence[str],
                      lowercase: bool = False) -> TranslationScore:
    """How close translations are to one reference each (Papineni et al. 2002; Popovic 2015; Post 2018, sacreBLEU).

    lowercase: capitals do not count, which the signature says (`case:lc`).
    """
    from sacrebleu.metrics import BLEU, CHRF  # half a second

    bleu, chrf = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    scores = [metric.corpus_score(list(translated), [list(references)]).score for metric in (bleu, chrf)]
    signatures = [str(metric.get_signature()) for metric in (bleu, chrf)]  # once it has seen the references
    return TranslationScore(scores[0], scores[1], signatures[0], signatures[1], len(translated))
