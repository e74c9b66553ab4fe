"""Combine the settings that a user gave with those of a file, for the commands and the Python API. No torch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.pretraining import SET_BY_WEIGHTS, FromScratch, TrainConfig, TranslationConfig
from bardlet.config.settings import Settings, flag
from bardlet.config.stages import NAMED_PAIRS, config_class
from bardlet.config.toml import read_toml, settings_in, why_not
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")


def configure(values: dict[str, Any], file: Path | None) -> FromScratch:
    """Return the settings of a run from those on the command line and in a file.

    A setting on the command line that does nothing is an error; one in a file, which may be of another run, is ignored
    with a notice.
    """
    kind: type[FromScratch] = TranslationConfig if names_pairs(values, file) else TrainConfig
    known = set(kind.__dataclass_fields__)
    for name in values:
        if name not in known:
            raise BardletError(f"{flag(name)}: {why_not(name, kind)}")
    defaults = file_settings(file, kind, values)
    config = kind(**defaults | values)
    if ignored := [name for name in config.unused() if name not in values]:
        log.warning("%s: ignored, does not apply to %s", ", ".join(ignored), config.model)
        defaults = {name: value for name, value in defaults.items() if name not in ignored}
        config = kind(**defaults | values)
    config.refuse_unused(values)
    # the stage compares the others with the weights; a default looks as if it were not typed
    compared = config.set_by_user - {"vocab_size"}
    if config.init and (ignored := [name for name in SET_BY_WEIGHTS if name in values and name not in compared]):
        log.warning("%s: ignored, --init %s sets it", ", ".join(map(flag, ignored)), config.init)
    return config


def names_pairs(values: dict[str, Any], file: Path | None) -> bool:
    """Return True if the command line, or else the file, names sentence pairs."""
    text = values.get("text", ())
    if {"pair", "source", "target"} & set(values) or (text and text[0] in NAMED_PAIRS):
        return True
    return file is not None and not text and config_class(settings_in(file)) is TranslationConfig


def file_settings(file: Path | None, kind: type[Settings], typed: Collection[str]) -> dict[str, Any]:
    """Return the settings in a TOML file for the class `kind`; empty without a file.

    typed: names of the settings on the command line. --steps or --minutes replaces both of the file and its replans.
    """
    if file is None:
        return {}
    settings, _ = read_toml(file, kind)
    values = {each.name: getattr(settings, each.name) for each in fields(kind)}
    known = {*values, "stage", *(SET_BY_WEIGHTS if issubclass(kind, FineTuneConfig) else ())}
    if unused := [name for name in settings_in(file) if name not in known]:
        user = {TrainConfig: "training on a text", TranslationConfig: "training on sentence pairs"}.get(kind)
        log.warning("%s: ignored, %s has no such setting", ", ".join(unused), user or f"`bardlet {kind.command}`")
    if {"steps", "minutes"} & set(typed):
        values |= {"replans": (), "steps": None, "minutes": None}
    return values
