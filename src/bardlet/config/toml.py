"""Settings as TOML: read and checked, written with what happened, and sealed. Nothing here imports torch.

A key that is unknown, or a value of another kind, is an error with its place; `run.toml` ends with its own sha256.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import SET_BY_WEIGHTS, FromScratch, TrainConfig, TranslationConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import CONFIGS, classes_with, config_class
from bardlet.errors import BardletError, printable

S = TypeVar("S", bound=Settings)
STAGES = tuple(dict.fromkeys(config.stage for config in CONFIGS))
SHAPE = ("model", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "tie_embeddings")
"""What run.toml says of the shape of a model that was fine-tuned."""


@overload
def from_mapping(values: Mapping[str, Any], where: str) -> Settings: ...
@overload
def from_mapping(values: Mapping[str, Any], where: str, kind: type[S]) -> S: ...
def from_mapping(values: Mapping[str, Any], where: str, kind: Any = None) -> Any:
    """The settings of `values`; an unknown name, or a value of another type, is an error that names `where`.

    Args:
        kind: the class of settings that is wanted; None: the one that `values` are for. What only other classes have
            is left out.
    """
    stage = values.get("stage", "pretrain")
    if stage not in STAGES:
        raise BardletError(f"{where}: stage = {printable(stage)}: it must be one of {', '.join(STAGES)}")
    kind = kind or config_class(values)
    known = {f.name for f in fields(kind)}
    values = {name: value for name, value in values.items() if name != "stage"}
    if issubclass(kind, FineTuneConfig):  # run.toml tells its reader the shape, which the weights decide
        values = {name: value for name, value in values.items() if name not in SET_BY_WEIGHTS}
    hints, ready = get_type_hints(kind), {}
    for name, value in values.items():
        if name in known:
            ready[name] = _typed(value, hints[name], f"{where}: {name}")
        elif not classes_with(name):
            near = get_close_matches(name, known, 1)
            raise BardletError(f"{where}: unknown setting '{name}'" + (f"; did you mean '{near[0]}'?" if near
                               else "; `bardlet train --help` lists them (here with _ for -)"))
    try:
        return kind(**ready)
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


def why_not(name: str, kind: type[Settings]) -> str:
    """Why a class of settings does not have the one of this name, which others have, and what to do."""
    others = classes_with(name)
    if issubclass(kind, TranslationConfig) and TrainConfig in others:
        return "pairs of sentences have none; leave it out" + ", or give --batch-tokens" * (name == "batch_size")
    stages = [f"`bardlet {other.command}`" for other in others if issubclass(other, FineTuneConfig)]
    if stages and len(stages) == len(others):
        return f"is for {', '.join(stages)}; leave it out"
    if issubclass(kind, FineTuneConfig):
        return f"`bardlet {kind.command}` does not have that; leave it out"
    return "is for translation; leave it out, or give --source F --target F or --pair"


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: 'text, in " "'}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` from TOML as `hint` wants it (a list is a tuple, an int serves as a float), or an error."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            raise BardletError(f"{where} = {printable(value)}: it must be one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BardletError(f"{where} = {printable(value)}: it must be a list, in [ ]")
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise BardletError(f"{where} = {printable(value)}: it must have {len(kinds)} entries")
        return tuple(_typed(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    if inner:  # X | None
        return None if value is None else _typed(value, next(k for k in inner if k is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise BardletError(f"{where} = {printable(value)}: it must be {KINDS[hint]}")
    return value


MAX_TOML_BYTES = 1 << 22
"""Bytes of the largest file of settings that is read: a run writes 3 kB, and more where many files were named."""


@overload
def read_toml(path: Path) -> tuple[Settings, dict[str, Any]]: ...
@overload
def read_toml(path: Path, kind: type[S]) -> tuple[S, dict[str, Any]]: ...
def read_toml(path: Path, kind: Any = None) -> Any:
    """The settings in a TOML file, and its `[record]` (empty in a file that no run wrote). kind: of `from_mapping`."""
    values = _read(path)
    record = values.pop("record", {})
    if not isinstance(record, dict):
        raise BardletError(f"{path}: record = {printable(record)}: it must be a table, [record]; take the line out")
    settings = from_mapping(values, str(path), kind) if kind else from_mapping(values, str(path))
    return settings, record


def settings_in(path: Path) -> dict[str, Any]:
    """What a TOML file says of settings, as it says it, unchecked. BardletError where it cannot be read."""
    return {name: value for name, value in _read(path).items() if name != "record"}


def _read(path: Path) -> dict[str, Any]:
    """What a TOML file holds. BardletError where it cannot be read."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BardletError(f"{path}: is no file; name a TOML file of settings")
        if path.stat().st_size > MAX_TOML_BYTES:
            raise BardletError(f"{path}: {path.stat().st_size:,} bytes are too many for a file of settings; "
                               "name another, or put back a copy")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BardletError(f"{path}: there is no such file; --config wants a TOML file of settings") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); name a TOML file of settings") from None
    except UnicodeDecodeError as error:
        raise BardletError(f"{path}: byte {error.start} is no UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: is not TOML: {error}; a line is `name = value`, text in \" \"") from None


def as_mapping(config: Settings) -> dict[str, Any]:
    """Every setting by its name, with the stage: what `from_mapping` reads."""
    return {"stage": config.stage, **asdict(config)}


def to_toml(config: Settings, record: Mapping[str, Any], shape: ModelConfig | None = None) -> str:
    """The text of run.toml: every setting that the model has and that has a value, then what happened.

    shape: of the model, which the settings of fine-tuning do not have and a reader of the file wants to know.
    """
    import tomli_w

    values = asdict(config)
    if isinstance(config, FineTuneConfig) and shape:
        values = {"tokenizer": "auto", **{name: getattr(shape, name) for name in SHAPE}, **values}
    if isinstance(config, FromScratch):
        values = {name: value for name, value in values.items() if not config.lacks(name)}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
              if value is not None}  # TOML has no null
    values["replans"] = [list(pair) for pair in config.replans]
    head = (f"# Written by bardlet. `bardlet {config.command} --config run.toml` repeats this run; "
            "[record] says what happened.\n")
    happened = {name: value for name, value in record.items() if value is not None}
    text = head + tomli_w.dumps({"stage": config.stage, **values, "record": happened})
    return f"{text}{DIGEST_LINE}{_digest(text)}\n"


DIGEST_LINE = "# sha256 of all above, by which `bardlet resume` sees that nobody changed it: "


def is_untouched(path: Path) -> bool:
    """Whether a run.toml is, byte for byte, what a run wrote."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_TOML_BYTES:
        return False
    text, _, digest = path.read_bytes().decode("utf-8", "replace").rpartition(DIGEST_LINE)
    return digest == _digest(text) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def non_default(config: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING} | config.auto_defaults
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in defaults and getattr(config, f.name) not in (defaults[f.name], None)}
