"""Forms of the studio as command lines: the page shows them, and a job runs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bardlet.data.named import NAMED
from bardlet.server.errors import Refusal

RUN_NAME = re.compile(r"[\w][\w.\-]{0,79}", re.UNICODE)

SAMPLE_TOKENS = 200
"""Tokens that a training writes at each evaluation, for its page."""

Finite = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]


class Selection(BaseModel):
    """Texts of one kind. files: ids of stored files, or names of corpora."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["text", "pairs", "conversations", "preferences"] = "text"
    files: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=50)]


class Training(Selection):
    """A form. base: the model to start from, for the later stages."""

    minutes: Finite | None = None
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    base: Annotated[str, Field(max_length=500)] | None = None
    lora: Annotated[int, Field(ge=1, le=1024)] | None = None
    tokenizer: Literal["auto", "char", "byte", "bpe"] = "auto"
    model: Literal["qwen3", "gpt2"] = "qwen3"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    name: Annotated[str, Field(max_length=80)] | None = None


class Climb(BaseModel):
    """A form for a ladder. rungs: as `bardlet ladder --rungs` takes them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rungs: Annotated[str, Field(pattern=r"^[0-9]{1,2}(-[0-9]{1,2})?$")] = "1-7"


def file_names(form: Selection, path: Callable[[str], str]) -> list[str]:
    """Return the files of a form as a command names them. path: returns the path of a stored file."""
    return [name if name in NAMED else path(name) for name in form.files]


def arguments(form: Training, path: Callable[[str], str], model: Callable[[str], str]) -> list[str]:
    """Return the command line of a form, without `bardlet` and --out.

    Args:
        path: returns the path of a stored file. model: returns the folder of a model.
    """
    names = file_names(form, path)
    if form.kind == "text":
        words = ["train", *names, *(("--init", model(form.base)) if form.base else ())]
        words += [*_flag("tokenizer", form, "auto"), *_flag("model", form, "qwen3")] if not form.base else []
    elif form.kind == "pairs":
        if len(names) != 2:
            raise Refusal(400, "A translator needs two files: the sentences, and the translation of each line.",
                          param="files", code="invalid_value")
        words = ["train", "--source", names[0], "--target", names[1]]
    else:
        if form.base is None:
            raise Refusal(400, "Conversations and preferences train a model further; choose one.", param="base",
                          code="missing_parameter")
        command = "sft" if form.kind == "conversations" else "dpo"
        words = [command, model(form.base), *names, *_flag("lora", form)]
    more = [word for name in ("minutes", "steps", "seed") for word in _flag(name, form)]
    return [*words, *more, "--sample-tokens", str(SAMPLE_TOKENS)]


def _flag(name: str, form: Training, default: object = None) -> list[str]:
    """Return the flag of a field that is set."""
    value = getattr(form, name)
    if value is None or value == default:
        return []
    return [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]


def run_name(form: Training, taken: Callable[[str], bool]) -> str:
    """Return a name for the run: the form's, or one made from its first file. A number tells it from others."""
    if form.name is not None:
        if not RUN_NAME.fullmatch(form.name):
            raise Refusal(400, "A name has letters, digits, dots, hyphens and underscores, and begins with a letter, "
                          "a digit or an underscore.", param="name", code="invalid_value")
        if taken(form.name):
            raise Refusal(409, "There is a run of this name; choose another one.", param="name", code="name_taken")
        return form.name
    stem = re.sub(r"[^\w\-]+", "-", Path(form.files[0]).name.partition(".")[0], flags=re.UNICODE).strip("-_") or "run"
    ending = {"text": "", "pairs": "-translator", "conversations": "-chat", "preferences": "-preferred"}[form.kind]
    for number in range(1, 10_000):
        name = f"{stem[:60]}{ending}" + (f"-{number}" if number > 1 else "")
        if not taken(name):
            return name
    raise Refusal(409, "There are too many runs of this name; choose another one.", param="name", code="name_taken")


def shown(words: list[str]) -> str:
    """Return a command line as a person types it."""
    return shlex.join(["bardlet", *words])
