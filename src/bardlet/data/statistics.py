"""Corpus statistics: length, alphabet and n-gram losses of a text, before any training.

Measured once, cached under the hash of the text. Length and alphabet decide the tokenizer and the plan of a timed run;
the n-gram losses only predict its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bardlet.data import ngram
from bardlet.data.corpus import Corpus, dev_split_start
from bardlet.data.named import cache_folder
from bardlet.runtime import cache as runtime_cache
from bardlet.tokenizer import code_points

Progress = Callable[[str, int, int | None], None]

PIECE = 4_096
"""Characters per piece of the sample."""
SAMPLE = 1 << 19
"""Maximum number of characters that the n-gram models count: it takes a second, and suffices for contexts of six."""
LONGEST = 6
"""Characters of the longest context."""
DOMAIN_SHIFT = 0.07
"""Threshold of `domain_shift`. (Ten corpora had at most 0.04; the ends of sorted lists of names had 0.09 to 0.21, and
there n-gram models are worse than guessing.)"""
END = "\uffff"
"""Ends each document of the sample. No text has it: Unicode reserves it for internal use."""
VERSION = 10


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of a text."""

    characters: int
    """Length of the whole text."""
    train_characters: int
    """Length of its training split."""
    alphabet: str
    """Every different character of the whole text, in order of code points."""
    losses: tuple[float, ...] = ()
    """Held-out losses, in nats per character, of n-gram models with 0, 1, ... 6 characters, then with 0, 1, 2 words of
    context, counted on the training split; empty if the text is too short. The end of a document adds to the loss but
    is no character, as in the losses of a run."""
    quarter: tuple[float, ...] = ()
    """The same, counted on a quarter of the text; the difference shows how much more text helps."""
    domain_shift: float = 0.0
    """Relative excess of the unigram loss on the held-out split, counted on the training split, over that on the
    training split itself (at least 1 nat). The end of a sorted list has other letters than its beginning."""
    counted: int = 0
    """Characters that `losses` were counted on."""
    drift: float = 0.0
    """Relative excess of the best n-gram loss on the held-out split over that on lines of the training split, counted
    on others of its lines. The end of a chronological text speaks of other things than its beginning."""

    @property
    def counting(self) -> tuple[float, ...] | None:
        """N-gram features for the scaling law, or None if the n-gram losses say nothing about the held-out split.

        (loss of the best n-gram model, the same counted on a quarter, characters counted, log ratio of the losses with
        six and with three characters of context, log ratio of the losses with one word of context and of the best
        model). The last is 0 for a text without words. None for a text that is too short, a loop, or a domain shift.
        """
        if not self.losses or min(self.losses) < 1e-3 or self.domain_shift > DOMAIN_SHIFT:
            return None
        best, words = min(self.losses), self.losses[LONGEST + 1:]
        far = math.log(self.losses[LONGEST] / self.losses[LONGEST // 2])
        return best, min(self.quarter), float(self.counted), far, math.log(words[1] / best) if words else 0.0


def measure_corpus(corpus: Corpus, progress: Progress | None = None, cache: Path | None = None,
                   val_part: str = "val") -> CorpusStatistics:
    """Return the statistics of `corpus`: from the cache, or by reading it once.

    Args:
        val_part: the split whose `losses` are measured: "val", or "dev", the last tenth of the training split.
    """
    folder, key = (cache or cache_folder()) / "surveys", {"text": corpus.hash, "of": val_part, "version": VERSION}
    if (cached := runtime_cache.read(folder, key)) is not None:
        shift = cached.pop("unlike")  # the name that versions before 0.2 gave it in the cache
        return CorpusStatistics(**cached | {name: tuple(cached[name]) for name in ("losses", "quarter")},
                                domain_shift=shift)
    statistics = _read(corpus, progress, val_part)
    entry = asdict(statistics)
    entry["unlike"] = entry.pop("domain_shift")
    runtime_cache.write(folder, key, entry)
    return statistics


def _read(corpus: Corpus, progress: Progress | None, val_part: str) -> CorpusStatistics:
    characters = {"train": 0, "val": 0}
    sample = {"train": _Sample(SAMPLE), "val": _Sample(SAMPLE // 8)}
    for part in characters:
        for _, blocks in corpus.blocks(part):
            for text in blocks:
                characters[part] += len(text)
                sample[part].add(text, ends=False)
                if progress:
                    progress(f"measuring {corpus.title or corpus.name}", sum(characters.values()), None)
            sample[part].end()
    train, val = sample["train"].text(), sample["val"].text()
    if val_part == "dev":
        cut = dev_split_start(len(train))
        train, val = train[:cut], train[cut:]
    losses, quarter, domain_shift, drift = _ngram_features(train, val)
    return CorpusStatistics(sum(characters.values()), characters["train"], corpus.store.alphabet, losses, quarter,
                            domain_shift, len(train) - train.count(END), drift)


def _entropy(text: str) -> float:
    """Return the entropy of the characters of `text`, in nats."""
    _, counts = np.unique(code_points(text), return_counts=True)
    return float(-(counts / len(text) * np.log(counts / len(text))).sum())


def _ngram_features(train: str, val: str) -> tuple[tuple[float, ...], tuple[float, ...], float, float]:
    """Return `losses`, `quarter`, `domain_shift` and `drift` of `CorpusStatistics`."""
    characters = len(val) - val.count(END)
    if min(len(train) // 4, characters) < 100:
        return (), (), 0.0, 0.0
    train, val = (text.replace(END, "\n") for text in (train, val))
    piece = max(1, min(PIECE, len(train) // 64))
    # Draw lines at random. Of a sorted list, longer pieces would miss most beginnings, and more text would seem to help
    # a lot. Of questions and answers, every fourth line would be a question.
    parts = [line[i:i + piece] for line in train.splitlines(keepends=True) for i in range(0, len(line), piece)]
    drawn = np.random.default_rng(0).random(len(parts)) < 0.25
    quarter = "".join(part for part, take in zip(parts, drawn, strict=True) if take)
    others = [part for part, take in zip(parts, drawn, strict=True) if not take]
    alike = "".join(others[:: max(1, round(sum(map(len, others)) / len(val)))])
    alphabet, entropy = len(set(train)) + 1, _entropy(train)
    with ThreadPoolExecutor() as pool:  # NumPy sorts without the lock of Python, so the three run at once
        full, part, same = (pool.submit(_losses, train, val, alphabet), pool.submit(_losses, quarter, val, alphabet),
                            pool.submit(_best_loss, quarter, alike, alphabet))
        full_losses, quarter_losses, alike_loss = full.result(), part.result(), same.result()
    drift = min(quarter_losses[:LONGEST + 1]) / alike_loss - 1 if alike_loss > 1e-3 else 0.0
    per_character = len(val) / characters
    return (tuple(per_character * loss for loss in full_losses), tuple(per_character * loss for loss in quarter_losses),
            (full_losses[0] - entropy) / max(entropy, 1.0), round(drift, 4))


def _best_loss(train: str, text: str, alphabet: int) -> float:
    """Return the lowest of the character n-gram losses of `text`, counted on `train`; 0 if `text` is too short."""
    if len(text) <= 100:
        return 0.0
    return float(ngram.ngram_losses(code_points(train), code_points(text), LONGEST, alphabet).mean(1).min())


def _losses(train: str, val: str, alphabet: int) -> tuple[float, ...]:
    """Return character and word n-gram losses in nats per character of `val`, with line breaks between documents."""
    nats = ngram.ngram_losses(code_points(train), code_points(val), LONGEST, alphabet)
    by_order = nats.mean(1)
    best = nats[by_order.argmin()]
    spelling = np.concatenate((np.full(LONGEST, best.mean()), best))  # the first LONGEST characters have no loss
    few_words = min(len(ngram.WORD.findall(text)) for text in (train, val)) < 100  # one long word, or no word breaks
    return *map(float, by_order), *([] if few_words else ngram.word_losses(train, val, spelling))


class _Sample:
    """Evenly spread pieces of a stream of documents, at most `limit` characters: every k-th piece, with a growing k."""

    def __init__(self, limit: int) -> None:
        self.limit, self.every, self.seen = limit, 1, 0
        self.pieces: list[str] = []
        self.rest = ""

    def add(self, text: str, ends: bool = True) -> None:
        """Add the next document of the stream, or a block of it that does not end it."""
        text = self.rest + text + END * ends
        whole = len(text) // PIECE * PIECE
        self.rest = text[whole:]
        for start in range(0, whole, PIECE):
            if self.seen % self.every == 0:
                self.pieces.append(text[start:start + PIECE])
            self.seen += 1
            if len(self.pieces) * PIECE > self.limit:
                self.pieces = self.pieces[::2]
                self.every *= 2

    def end(self) -> None:
        """End a document."""
        self.add("")

    def text(self) -> str:
        """Return the sample."""
        return "".join(self.pieces) + self.rest
