"""Fonts for the texts in figures: names and tokens may have characters that matplotlib's default font lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    r"""Return (texts, font families) with which matplotlib draws every character.

    A character that no installed font has is replaced by its code, as in \u8bd7: matplotlib would draw a box and print
    a warning. `$` is escaped, which otherwise begins a formula.
    """
    from matplotlib.font_manager import FontProperties, findfont

    default = FontProperties()
    known, families, codes = _characters(findfont(default)), list(default.get_family()), {ord("$"): r"\$"}
    for character in sorted({character for text in texts for character in text} - known - {"\n"}):
        if not character.isprintable() or (family := _family_with(character)) is None:
            codes[ord(character)] = character.encode("unicode_escape").decode()
        elif family not in families:
            families.append(family)
    return [text.translate(codes) for text in texts], families


@cache
def _family_with(character: str) -> str | None:
    """Return the first installed family that has a character; None if none has."""
    return next((name for name, path in _installed() if character in _characters(path)), None)


def _installed() -> Iterator[tuple[str, str]]:
    """Yield (family, file) of the installed fonts, by name; not those that draw a box for every character."""
    from matplotlib.font_manager import fontManager

    regular = {(font.name, font.fname) for font in fontManager.ttflist if font.style == "normal"}
    yield from sorted(font for font in regular if not font[0].startswith("Last Resort"))


@cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters of a font file; none if matplotlib cannot draw them, such as an emoji font's bitmaps."""
    from matplotlib.ft2font import FT2Font

    with suppress(RuntimeError, OSError, ValueError):
        font = FT2Font(path)
        if font.scalable:
            return frozenset(map(chr, font.get_charmap()))
    return frozenset()
