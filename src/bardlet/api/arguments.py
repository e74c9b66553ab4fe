"""Check the arguments of the Python API, and name its keywords in errors.

The functions in api/ serve the commands too, so their errors name flags. `bardlet.train` and the other public functions
are these functions with `names_keywords`: a Python user reads `n_layer` where the command line has `--n-layer`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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
    """Decorate a public function: a BardletError that it raises names its keywords instead of the command's flags."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BardletError as error:  # changed in place: its type and its exit code stay
            names = keywords(function)
            error.args = tuple(in_python(arg, names) if isinstance(arg, str) else arg for arg in error.args)
            raise

    return wrapper


def in_python(text: str, names: Mapping[str, str]) -> str:
    """Return `text` with the flags in `names` replaced. Quoted commands and other flags stay as they are."""
    return re.sub(r"`[^`]*`|(?<!\w)'[^']*'|(?<![\w-])--([a-z][a-z0-9-]*)",
                  lambda match: names.get(match[1] or "", match[0]), text)


def keywords(function: Callable[..., Any]) -> dict[str, str]:
    """Return the keyword for each flag without its dashes: {"n-layer": "n_layer", "no-pack": "pack=False", ...}."""
    name = function.__name__
    kinds = [kind for kind in CONFIGS if kind.command == ("train" if name == "plan" else name)]
    defaults = {each.name: each.default for each in inspect.signature(function).parameters.values()}
    for kind in (EvaluationOptions,) if name == "evaluate" else kinds:
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
