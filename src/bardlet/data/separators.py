"""Find what separates the documents of a text file: an end-of-text mark, or line breaks in a list of short lines."""

from __future__ import annotations

import re
import statistics

from bardlet.errors import BardletError

AUTO, NONE = "auto", "none"
END_OF_TEXT, LINE_BREAK = "<|endoftext|>", r"\n"

MIN_LINES = 100
"""Lines that a list must have at least, in its first part."""
MAX_LINE, MAX_WORDS, MAX_PUNCTUATED, MIN_DISTINCT = 60, 3, 0.05, 0.9
"""A list has lines of at most MAX_LINE characters and a mean of MAX_WORDS words; at most the share MAX_PUNCTUATED ends
like a sentence, and at least MIN_DISTINCT are distinct."""


def chosen(setting: str) -> str | None:
    """Return the regular expression for a --separator other than auto; None for none."""
    if setting == NONE:
        return None
    try:
        text = setting.encode("latin-1", "backslashreplace").decode("unicode_escape")  # \\n is a line break
    except UnicodeDecodeError as error:
        raise BardletError(f"--separator {setting}: {error.reason}; write a backslash as \\\\") from None
    return re.escape(text)


def found_in(sample: str) -> tuple[str | None, str]:
    """Return (regular expression, notice) for the beginning of a text; (None, "") for one document."""
    if END_OF_TEXT in sample:
        return (rf"\n?{re.escape(END_OF_TEXT)}\n?",
                f"has {END_OF_TEXT}, so it is read as separate documents; --separator none reads it as one text")
    if is_list(sample):
        return LINE_BREAK, ("is a list of short lines, so each line is a document, and the order does not matter; "
                            "--separator none reads it as one text")
    return None, ""


def is_list(sample: str) -> bool:
    """Return True if a text is a list of names or words, one per line, and not prose, verse or code."""
    lines = sample.rstrip("\n").split("\n")[:2000]
    if len(lines) < MIN_LINES or max(map(len, lines)) > MAX_LINE:
        return False
    return (all(line.strip() and not line[0].isspace() for line in lines)
            and statistics.mean(len(line.split()) for line in lines) <= MAX_WORDS
            and sum(line.rstrip()[-1] in ".,;:!?{}()[]\"'" for line in lines) <= MAX_PUNCTUATED * len(lines)
            and len(set(lines)) >= MIN_DISTINCT * len(lines))
