"""Evaluation metrics: held-out loss in units that compare across tokenizers, diversity, BLEU and chrF."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bardlet.config.model import ModelConfig
from bardlet.data.batch import Batch
from bardlet.runtime.device import autocast
from bardlet.runtime.turns import in_turn
from bardlet.training.losses import count_targets, next_token_loss


@dataclass(frozen=True)
class Score:
    """A loss in the three usual units. The last two are comparable across tokenizers."""

    loss: float
    """Nats per token."""
    nats_per_char: float
    bits_per_byte: float
    tokens: int


ROWS = 64
"""Rows per evaluation batch, if memory allows."""
MAX_BYTES = 128 * 2**20
"""Maximum size of the widest float32 tensor of an evaluation; a few of them exist at once."""


def rows_at_once(shape: ModelConfig, length: int, max_bytes: int = MAX_BYTES) -> int:
    """Return the number of rows of `length` tokens per evaluation batch, from 1 to ROWS.

    The widest float32 tensor (logits, inner layer or attention weights) stays under `max_bytes`. All logits count,
    since lecture models materialize them.
    """
    widest = 4 * length * max(shape.vocab_size, shape.n_inner, 3 * shape.n_embd, shape.n_head * length)
    return max(1, min(ROWS, max_bytes // widest))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: str = "fp32",
              rows: int = ROWS, loss: Callable[[nn.Module, Batch], torch.Tensor] = next_token_loss) -> float:
    """Return the mean loss in nats over all unmasked targets of `batches`; `loss` computes the sum over a batch.

    Batches of more than `rows` rows are split into micro-batches. Their sums are added in float64 on the host, in their
    order: the same result whether one process computes them or several share them (`turns.shared_by`). `dtype` is the
    precision of the matrix products.
    """
    tokens = 0

    def micro_batches() -> Iterator[Batch]:
        nonlocal tokens
        for batch in batches:
            tokens += count_targets(batch)
            for start in range(0, len(batch["target"]), rows):
                yield {name: t[start : start + rows] for name, t in batch.items()}

    def computed(micro_batch: Batch) -> float:
        with autocast(dtype, device):
            return loss(model, {name: t.to(device) for name, t in micro_batch.items()}).item()

    total = sum(in_turn(computed, micro_batches()))
    return total / tokens if tokens else math.nan


def score(loss: float, tokens: int, characters: int, size: int, first: str = "") -> Score:
    """Convert `loss` (nats per token) to all three units.

    Args:
        tokens: length of the text in tokens; all but the first were predicted.
        characters, size: length of the text in characters and in UTF-8 bytes.
        first: text of the first token, which is subtracted from both.
    """
    nats = loss * (tokens - 1)
    characters, size = characters - len(first), size - len(first.encode())
    return Score(loss, nats / max(1, characters), nats / math.log(2) / max(1, size), tokens - 1)


def describe_loss(loss: float, nats_per_char: float) -> str:
    """Return a loss per token and per character, or per character alone if both are the same number."""
    per_token, per_character = f"{loss:z.4f}", f"{nats_per_char:z.4f}"
    also = f"{per_token} nats per token, " if per_token != per_character else ""
    return f"{also}{per_character} nats per character"


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Return distinct-n: unique word n-grams divided by all word n-grams of `texts`; 0 without any n-gram.

    (Li et al. 2016, *A Diversity-Promoting Objective Function for Neural Conversation Models*, section 4.)
    """
    ngrams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# ---------------------------------------------------------------- translations


@dataclass(frozen=True)
class TranslationScore:
    """BLEU and chrF from 0 to 100, with the sacreBLEU signatures that make them reproducible."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    lines: int


def translation_score(translated: Sequence[str], references: Sequence[str],
                      lowercase: bool = False) -> TranslationScore:
    """Compute BLEU and chrF against one reference per line (Papineni et al. 2002; Popovic 2015; Post 2018, sacreBLEU).

    lowercase: ignore case; the signature then has `case:lc`.
    """
    from sacrebleu.metrics import BLEU, CHRF  # slow import: half a second

    bleu, chrf = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    scores = [metric.corpus_score(list(translated), [list(references)]).score for metric in (bleu, chrf)]
    signatures = [str(metric.get_signature()) for metric in (bleu, chrf)]  # complete only after scoring
    return TranslationScore(scores[0], scores[1], signatures[0], signatures[1], len(translated))


def auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
    """Return the probability that a row of label True scores higher than one of label False; a tie counts half."""
    lower = np.sort(score_N[~label_N])
    below, below_or_equal = (np.searchsorted(lower, score_N[label_N], side=side) for side in ("left", "right"))
    return float((below + below_or_equal).mean() / (2 * len(lower)))
