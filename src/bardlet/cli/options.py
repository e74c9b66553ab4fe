"""From words on the command line to a dataclass, by tyro; its boxed messages become one sentence.

tyro's message says which setting is wrong; what was typed and what would fit are looked up here, since the box wraps
its lines and cuts long words.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, make_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from bardlet.config.settings import Settings, flag
from bardlet.config.stages import classes_with
from bardlet.config.toml import why_not
from bardlet.errors import BardletError

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], command: str, default: Any = None, hidden: Sequence[str] = ()) -> T:
    """A `kind` from `argv`; `--help` prints and exits with 0.

    hidden: settings that cannot be typed.

    Raises:
        BardletError: what is wrong with the first word that does not fit, on one line.
    """
    import tyro

    hints, marks = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    hints = {flag(field.name): hints[field.name] for field in fields(cast(Any, kind))
             if field.name not in hidden and tyro.conf.Positional not in getattr(marks[field.name], "__metadata__", ())}
    for word in argv:  # tyro would take what follows = for the next word
        name, equals, _ = word.partition("=")
        if equals and hints.get(name) is bool:
            raise BardletError(f"{word}: {name} takes no value; write {name}, or --no-{name[2:]}")
    said, printed = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(printed):
            return tyro.cli(_without(kind, hidden), args=list(argv), prog=f"bardlet {command}", default=default)
    except SystemExit as end:
        if end.code in (0, None):
            sys.stdout.write(printed.getvalue())
            raise
    what = _in_words(_unboxed(said.getvalue() + printed.getvalue()), argv, hints, kind)
    raise BardletError(f"{what}; `bardlet {command} --help` lists the settings")


def _without(kind: type[T], hidden: Sequence[str]) -> type[T]:
    """`kind`, a dataclass, of which the command line does not show some settings."""
    import tyro

    suppressed: Any = tyro.conf.Suppress
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(cast(Any, kind))}
    again = [(name, suppressed[hints[name]], defaults[name]) for name in hidden]
    made = make_dataclass(kind.__name__, again, bases=(kind,), frozen=True) if again else kind
    made.__doc__ = kind.__doc__
    return cast(type[T], made)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a command lets a model write."""

    tokens: int = 500
    """How many tokens to write."""
    temperature: float = 0.8
    """Below 1 more careful, above 1 wilder; 0: always the likeliest token."""
    top_k: int | None = 50
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text; none: another text each time."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Precision of the weights; int8 is the fastest on a CPU, and rounds them anew for every call."""

    def __post_init__(self) -> None:
        for name, holds, what in (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more, and finite"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise BardletError(f"--{name} {getattr(self, name.replace('-', '_'))}: it must be {what}")

    def prepared(self, model: Any) -> dict[str, Any]:
        """Put `model` on its device; returns the options that `generate.stream` wants."""
        import torch

        from bardlet.runtime import device as runtime_device

        runtime_device.place(model, self.device, self.dtype)
        seed = int(torch.seed() % 2**31) if self.seed is None else self.seed
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": seed}
        return {**options, "dtype": torch.int8} if self.dtype == "int8" else options


def _unboxed(boxed: str) -> str:
    """What a message of tyro says, without its frame and its advice."""
    lines = (line.strip("│╭╮╰╯─ ") for line in boxed.splitlines())
    return " ".join(line for line in lines if line.strip("-"))


def _in_words(text: str, argv: Sequence[str], hints: dict[str, Any], kind: type) -> str:
    """One sentence: the setting, what was typed, and what would fit."""
    if "Unrecognized options" in text:
        return _unknown(argv, hints, text, kind)
    if missing := re.search(r"Missing from .*? STR (.*?)\.? \(required\)", text):
        return f"something is missing: {missing[1][:1].lower()}{missing[1][1:]}"
    # the message quotes the setting, or its help text begins with it
    named = re.search(r"(?:argument '|Error parsing |Argument helptext: )(--[\w-]+)", text)
    if named and named[1] in hints:
        name, fits = named[1], _kind(hints[named[1]])
        typed = _typed(name, argv)
        return f"{name} needs a value: {fits}" if typed is None else f"{name} {typed}: it must be {fits}"
    return text.split(" Argument helptext")[0].split(" For full helptext")[0]


def _unknown(argv: Sequence[str], hints: dict[str, Any], text: str, kind: type) -> str:
    """The first word that looks like a setting and is none; else the first word too many."""
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        known = name in hints or "--" + name.removeprefix("--no-") in hints
        if re.match(r"-+[A-Za-z]", word) and not known:
            setting = name.strip("-").replace("-", "_")
            for alike in (setting, setting.removeprefix("no_")):
                if issubclass(kind, Settings) and classes_with(alike):
                    return f"{name}: {why_not(alike, kind)}"
            near = get_close_matches(name, hints, 1)
            return f"there is no setting {word.partition('=')[0]}" + (f" (did you mean {near[0]}?)" if near else "")
    extra = re.search(r"Unrecognized options: (\S+?),? ", text + " ")
    return f"there is a word too many: {extra[1] if extra else ' '.join(argv)} (text with spaces goes into quotes)"


def _typed(name: str, argv: Sequence[str]) -> str | None:
    """What was given to `name`, the last time; None: nothing."""
    value = None
    for place, word in enumerate(argv):
        key, equals, rest = word.partition("=")
        if key.replace("_", "-") == name:
            value = rest if equals else argv[place + 1] if place + 1 < len(argv) else None
            if not equals and value is not None and re.match(r"--?[A-Za-z]", value):
                value = None  # the next setting
    return value


def _kind(hint: Any) -> str:
    """What values fit a type, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "nothing, it is a switch"}
    inner = [k for k in get_args(hint) if k is not type(None)]
    if inner and type(None) in get_args(hint):
        return f"{_kind(inner[0])}, or None"
    return kinds.get(hint, "of another kind")
