"""Preview of training data: the number of records in some files, and the first ones as a training reads them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bardlet.data import bitext, corpus, forms, records
from bardlet.data.forms import Message, Preference
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

Kind = Literal["text", "pairs", "conversations", "preferences"]
FIRST = 3
"""Records that a preview shows."""
PARTS, EXCERPT = 8, 300
"""Parts of a record that a preview shows, and the characters of each."""


@dataclass(frozen=True)
class Preview:
    """The content of some files.

    unit: "document", "pair", "conversation" or "preference". count: records that can be used. left_out: the others.
    characters: of all usable records. alphabet: number of different characters in a text, else None.
    first: the first records, each as (role or name, excerpt) of its parts.
    """

    unit: str
    count: int
    left_out: int
    characters: int
    alphabet: int | None
    first: list[list[tuple[str, str]]]


def preview(kind: Kind, files: Sequence[str]) -> Preview:
    """Read files as the training of this kind does. The log gets a notice for each oddity, and says what is left out.

    Raises:
        BardletError: a file is missing or unreadable, or nothing in it can be used.
    """
    if kind == "text":
        return _text(files)
    if kind == "pairs":
        return _pairs(files)
    found = records.find(files, kind)
    if kind == "conversations":
        parts = [_messages(messages) for messages in found.read(forms.conversation)]
    else:
        parts = [_preference(each) for each in found.read(forms.preference)]
    report = found.report
    report.announce(max_bad=1)
    if report.unusable > found.max_bad * report.total:
        log.warning("more than %g %% of the records cannot be used, so no training begins; mend them, or train with "
                    "--max-bad 1", 100 * found.max_bad)
    return _made(kind[:-1], parts, report.unusable)


def _text(files: Sequence[str]) -> Preview:
    found = corpus.find(files)
    try:
        characters = sum(len(text) for _, blocks in found.blocks() for text in blocks)
        parts = [[("", next(blocks))] for _, blocks in itertools.islice(found.blocks(), FIRST)]
        return Preview("document", found.count, 0, characters, len(found.store.alphabet), _excerpts(parts))
    finally:
        found.release()


def _pairs(files: Sequence[str]) -> Preview:
    if len(files) != 2:
        raise BardletError("sentence pairs need two files: the sentences, and the translation of each line")
    pairs = bitext.read_pairs(*map(Path, files))
    usable = [pair for pair in pairs if all(pair)]
    if not usable:
        raise BardletError(f"{files[0]}: no line has a translation in {files[1]}")
    parts = [[("source", source), ("target", target)] for source, target in usable]
    return _made("pair", parts, len(pairs) - len(usable))


def _messages(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _preference(each: Preference) -> list[tuple[str, str]]:
    return [*_messages(each.prompt), ("better", each.chosen), ("worse", each.rejected)]


def _made(unit: str, records: list[list[tuple[str, str]]], left_out: int) -> Preview:
    characters = sum(len(text) for parts in records for _, text in parts)
    return Preview(unit, len(records), left_out, characters, None, _excerpts(records[:FIRST]))


def _excerpts(records: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    return [[(name, text if len(text) <= EXCERPT else f"{text[:EXCERPT]} ...") for name, text in parts[:PARTS]]
            for parts in records]
