"""Check the arguments of the Python API, and name its keywords in errors.

The functions in api/ serve the commands too, so their errors name flags. `bardlet.train` and the other public functions
are these functions with `names_keywords`: a Python user reads `n_layer` where the command line has `--n-layer`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.inference import EvaluationOptions
from bardlet.config.paths import given
from bardlet.config.stages import CONFIGS
from bardlet.errors import BardletError, printable

P = ParamSpec("P")
R = TypeVar("R")


def path(value: Any, where: str) -> str:
    """Return a path as a string, with the home folder for `~`.

    where: the function and the argument, for the BardletError about another type.
    """
    if not isinstance(value, str | os.PathLike):
        raise BardletError(f"{where} = {printable(value)}: must be a path, as a string or a pathlib.Path")
    if not os.fspath(value):
        raise BardletError(f"{where} = '': an empty path; name a file or a folder")
    return given(str(os.fspath(value)))


def paths(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Return paths, and those in lists of paths, as strings. Raise BardletError for an empty list or another type."""
    found: list[str] = []
    for value in values:
        if isinstance(value, list | tuple):
            if not value:  # no text means the default text, which an empty list hardly asks for
                raise BardletError(f"{where} = {value}: an empty list; name at least one file")
            found += paths(value, where)
        else:
            found.append(path(value, where))
    return tuple(found)


def names_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: a BardletError that it raises names its keywords instead of the command's flags.

    An error that begins with a flag also names the function.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BardletError as error:  # changed in place: its type and its exit code stay
            names, values = keywords(function), choices(function)
            where = f"bardlet.{function.__name__}: " if "." not in function.__qualname__ else ""
            error.args = tuple(where * arg.startswith("--") + in_python(arg, names, values)
                               if isinstance(arg, str) else arg for arg in error.args)
            raise

    return wrapper


def in_python(text: str, names: Mapping[str, str], values: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Return `text` with the flags in `names` replaced, as in to="pdf" for `--to pdf`.

    A word after a flag is its value if it is a number, in capitals, one of the flag's `values`, or before a colon.
    Quoted commands and other flags stay as they are.
    """
    def keyword(match: re.Match[str]) -> str:
        flag, word, colon = match[1] or "", match[2], match[3]
        name = names.get(flag)
        if name is None:
            return match[0]
        if word is None or not name.isidentifier():
            return name + match[0].removeprefix(f"--{flag}")
        if re.fullmatch(r"-?[\d.]+(e-?\d+)?|[A-Z]+|'.*'", word):
            return f"{name}={word}{colon}"
        return f'{name}="{word}"{colon}' if colon or word in values.get(flag, ()) else f"{name} {word}"

    quotation, value = r"`[^`]*`|(?<!\w)'[^']*'", r"-?[\w./~][\w./~-]*(?<![.-])|'[^']*'(?=:)"
    return re.sub(rf"{quotation}|(?<![\w-])--([a-z][a-z0-9-]*)(?: ({value})(:?))?", keyword, text)


def choices(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Return the words that a flag takes, by the flag without its dashes: {"keep": ("best", "last", ...), ...}."""
    hints = dict(get_type_hints(function))
    for kind in _kinds(function):
        hints |= get_type_hints(kind)
    values: dict[str, tuple[str, ...]] = {"device": ("cpu", "cuda", "mps")}
    for name, hint in hints.items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal:
                values[name.replace("_", "-")] = get_args(part)
    return values


def _kinds(function: Callable[..., Any]) -> list[Any]:
    """Return the dataclasses whose fields are keywords of a function."""
    name = function.__name__
    if name == "evaluate":
        return [EvaluationOptions]
    return [kind for kind in CONFIGS if kind.command == ("train" if name == "plan" else name)]


def keywords(function: Callable[..., Any]) -> dict[str, str]:
    """Return the keyword for each flag without its dashes: {"n-layer": "n_layer", "no-pack": "pack=False", ...}."""
    kinds = _kinds(function)
    defaults = {each.name: each.default for each in inspect.signature(function).parameters.values()}
    for kind in kinds:
        defaults |= {field.name: field.default for field in fields(kind)}
    names = {}
    for keyword, default in defaults.items():
        flag = keyword.replace("_", "-")
        names[flag] = f"{keyword}=True" if isinstance(default, bool) else keyword
        if isinstance(default, bool):
            names[f"no-{flag}"] = f"{keyword}=False"
    if "max_new_tokens" in defaults:
        names["tokens"] = "max_new_tokens"
    if any(issubclass(kind, FineTuneConfig) for kind in kinds):
        names["init"] = "model"
    return names
