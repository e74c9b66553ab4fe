"""What a text is like, before anything is made of it: how long, of which characters, and how hard to predict.

Read once, kept in the cache under the text's hash. The tokenizer and the plan of a timed run are chosen by its length
and alphabet; how hard it is says what loss to expect, and chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bardlet.data import ngram
from bardlet.data.corpus import Corpus, cache_folder, development_begins
from bardlet.runtime import cache as runtime_cache
from bardlet.tokenizer import code_points

Progress = Callable[[str, int, int | None], None]

PIECE = 4_096
"""Characters of a piece of the sample."""
SAMPLE = 1 << 19
"""Most characters that the n-gram models learn from: a second of counting, and enough for contexts of six."""
LONGEST = 6
"""Characters of the longest context."""
DOMAIN_SHIFT = 0.07
"""From where on a held-out part is unlike the rest: by so much its letters alone cost more, as a share. (Of ten corpora
it was 0.04 at most; of the ends of sorted lists of names 0.09 to 0.21, and there counting is worse than guessing.)"""
END = "\uffff"
"""Stands behind each document of the sample. No text has it: Unicode keeps it free for such use."""
VERSION = 9


@dataclass(frozen=True)
class CorpusStatistics:
    """What was found in a text."""

    characters: int
    """Of the whole text."""
    train_characters: int
    """Of its training part."""
    alphabet: str
    """Every different character of the whole text, in order of code points."""
    losses: tuple[float, ...] = ()
    """Nats per character that n-gram models of 0, 1, ... 6 characters, then of 0, 1, 2 words of context lose on the
    held-out part, having counted the training part; empty for a text too short. The end of a document costs as well,
    and is no character, as in the losses of a run."""
    quarter: tuple[float, ...] = ()
    """The same, having counted a quarter as much: the difference tells how much more text helps."""
    domain_shift: float = 0.0
    """By how much the letters alone of the held-out part cost more than those of the training part, by the counts of
    the latter, as a share (of a nat at least): the end of a sorted list has others than its beginning."""
    counted: int = 0
    """Characters that the first were counted on."""

    @property
    def counting(self) -> tuple[float, ...] | None:
        """The loss of the best n-gram model; of the best that counted a quarter as much; how many characters the first
        counted; what six characters of context are worth beside three, and letters beside words, as logarithms of the
        losses' ratios (the last 0 for a text without words). None for a text too short, or without surprise, and where
        counting says nothing of the held-out part."""
        if not self.losses or min(self.losses) < 1e-3 or self.domain_shift > DOMAIN_SHIFT:  # too short, a loop, a sorted list
            return None
        best, words = min(self.losses), self.losses[LONGEST + 1:]
        far = math.log(self.losses[LONGEST] / self.losses[LONGEST // 2])
        return best, min(self.quarter), float(self.counted), far, math.log(words[1] / best) if words else 0.0


def measure_corpus(corpus: Corpus, progress: Progress | None = None, cache: Path | None = None,
           held_out: str = "val") -> CorpusStatistics:
    """The survey of `corpus`: from the cache, or by reading it once.

    Args:
        held_out: the part that `losses` are of: "val", or "dev", the last tenth of the training part.
    """
    folder, key = (cache or cache_folder()) / "surveys", {"text": corpus.hash, "of": held_out, "version": VERSION}
    if (facts := runtime_cache.read(folder, key)) is not None:
        return CorpusStatistics(**facts | {name: tuple(facts[name]) for name in ("losses", "quarter")})
    found = _read(corpus, progress, held_out)
    runtime_cache.write(folder, key, asdict(found))
    return found


def _read(corpus: Corpus, progress: Progress | None, held_out: str) -> CorpusStatistics:
    counted = {"train": 0, "val": 0}
    alphabet: set[str] = set()
    sample = {"train": _Sample(SAMPLE), "val": _Sample(SAMPLE // 8)}
    for part in counted:
        for text in corpus.documents(part):
            counted[part] += len(text)
            for start in range(0, len(text), 1 << 20):
                alphabet.update(text[start:start + (1 << 20)])
            sample[part].add(text)
            if progress:
                progress("read", sum(counted.values()), None)
    learned, held = sample["train"].text(), sample["val"].text()
    if held_out == "dev":
        cut = development_begins(len(learned))
        learned, held = learned[:cut], learned[cut:]
    losses, quarter, unlike = _ngram_features(learned, held)
    return CorpusStatistics(sum(counted.values()), counted["train"], "".join(sorted(alphabet)), losses, quarter, unlike,
                  len(learned) - learned.count(END))


def _entropy(text: str) -> float:
    """What a character of `text` costs, in nats, by its own frequencies."""
    _, counts = np.unique(code_points(text), return_counts=True)
    return float(-(counts / len(text) * np.log(counts / len(text))).sum())


def _ngram_features(learned: str, held: str) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The losses of `CorpusStatistics`, having counted all of `learned` and a quarter of it, and how unlike it `held` is."""
    characters = len(held) - held.count(END)
    if min(len(learned) // 4, characters) < 100:
        return (), (), 0.0
    learned, held = (text.replace(END, "\n") for text in (learned, held))
    piece = max(1, min(PIECE, len(learned) // 64))
    # line by line, by lot: of a sorted list longer pieces would leave out most beginnings, and more text seem to help a
    # lot; every fourth line of questions and answers would be a question
    parts = [line[i:i + piece] for line in learned.splitlines(keepends=True) for i in range(0, len(line), piece)]
    drawn = np.random.default_rng(0).random(len(parts)) < 0.25
    quarter = "".join(part for part, take in zip(parts, drawn, strict=True) if take)
    alphabet, own = len(set(learned)) + 1, _entropy(learned)
    all_of_it, a_quarter = (_losses(text, held, alphabet) for text in (learned, quarter))
    ends = len(held) / characters
    return (tuple(ends * loss for loss in all_of_it), tuple(ends * loss for loss in a_quarter),
            (all_of_it[0] - own) / max(own, 1.0))


def _losses(learned: str, held: str, alphabet: int) -> tuple[float, ...]:
    """In nats per character of `held`, line breaks between documents among them."""
    nats = ngram.ngram_losses(code_points(learned), code_points(held), LONGEST, alphabet)
    characters = nats.mean(1)
    best = nats[characters.argmin()]
    spelling = np.concatenate((np.full(LONGEST, best.mean()), best))  # nobody knows what the first ones would cost
    few = min(len(ngram.WORD.findall(text)) for text in (learned, held)) < 100  # one long word, or a script without
    return *map(float, characters), *([] if few else ngram.word_losses(learned, held, spelling))


class _Sample:
    """Pieces evenly spread over a stream of documents, at most `most` characters: every k-th piece, k growing."""

    def __init__(self, most: int) -> None:
        self.most, self.every, self.seen = most, 1, 0
        self.pieces: list[str] = []
        self.rest = ""

    def add(self, document: str) -> None:
        """The next document of the stream."""
        text = self.rest + document + END
        whole = len(text) // PIECE * PIECE
        self.rest = text[whole:]
        for start in range(0, whole, PIECE):
            if self.seen % self.every == 0:
                self.pieces.append(text[start:start + PIECE])
            self.seen += 1
            if len(self.pieces) * PIECE > self.most:
                self.pieces = self.pieces[::2]
                self.every *= 2

    def text(self) -> str:
        """The sample."""
        return "".join(self.pieces) + self.rest
