"""Settings as TOML: read and validate them, write run.toml with its own digest. Nothing here imports torch.

An unknown key or a value of the wrong type is an error that names its location.
"""

from __future__ import annotations

import hashlib
import os
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
T = TypeVar("T")
STAGES = tuple(dict.fromkeys(config.stage for config in CONFIGS))
SHAPE = ("model", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "tie_embeddings")
"""Settings of the base model's shape that the run.toml of a fine-tuning run repeats."""


@overload
def from_mapping(values: Mapping[str, Any], where: str) -> Settings: ...
@overload
def from_mapping(values: Mapping[str, Any], where: str, kind: type[S]) -> S: ...
def from_mapping(values: Mapping[str, Any], where: str, kind: Any = None) -> Any:
    """Return the settings in `values`.

    Args:
        where: the source of the values, for error messages.
        kind: the settings class; None: by `config_class`. Settings that only other classes have are dropped.

    Raises:
        BardletError: an unknown name, or a value of the wrong type.
    """
    stage = values.get("stage", "pretrain")
    if stage not in STAGES:
        raise BardletError(f"{where}: stage = {printable(stage)}: must be one of {', '.join(STAGES)}")
    kind = kind or config_class(values)
    known = {f.name for f in fields(kind)}
    values = {name: value for name, value in values.items() if name != "stage"}
    if issubclass(kind, FineTuneConfig):  # run.toml repeats the shape for its reader; the weights decide it
        values = {name: value for name, value in values.items() if name not in SET_BY_WEIGHTS}
    hints, checked = get_type_hints(kind), {}
    for name, value in values.items():
        if name in known:
            checked[name] = _typed(value, hints[name], f"{where}: {name}")
        elif not classes_with(name):
            near = get_close_matches(name, known, 1)
            raise BardletError(f"{where}: unknown setting '{name}'" + (f"; did you mean '{near[0]}'?" if near
                               else "; `bardlet train --help-all` lists the settings (write _ for -)"))
    try:
        return kind(**checked)
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


def options(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return a dataclass of options that are not settings, from Python values.

    Raises:
        BardletError: an unknown name, or a value of the wrong type.
    """
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = get_close_matches(name, hints, 1)
            raise BardletError(f"{where}: unknown option '{name}'; "
                               + (f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(sorted(hints))}"))
    checked = {name: typed(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**checked)
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return a Python value as the type `hint`, such as `int | None`. Raise BardletError for another type."""
    return _typed(plain(value), hint, where)


def plain(value: Any) -> Any:
    """Return a Python value as TOML would have it: paths as strings, NumPy scalars as numbers."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", None) else value


def why_not(name: str, kind: type[Settings]) -> str:
    """Explain why a settings class lacks a setting that others have, and what to do."""
    others = classes_with(name)
    if issubclass(kind, TranslationConfig) and TrainConfig in others:
        return "does not apply to sentence pairs; drop it" + ", or use --batch-tokens" * (name == "batch_size")
    stages = [f"`bardlet {other.command}`" for other in others if issubclass(other, FineTuneConfig)]
    if stages and len(stages) == len(others):
        return f"is a setting of {', '.join(stages)}; drop it"
    if issubclass(kind, FineTuneConfig):
        return f"does not apply to `bardlet {kind.command}`; drop it"
    return "is a setting of translation; drop it, or name pairs with --source FILE --target FILE or --pair"


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a TOML value as the type `hint` (a list becomes a tuple, an int a float), or raise BardletError.

    A string where a list of strings belongs is a list of one.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            raise BardletError(f"{where} = {printable(value)}: must be one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        value = [value] if isinstance(value, str) and inner == (str, ...) else value
        if not isinstance(value, list | tuple):
            raise BardletError(f"{where} = {printable(value)}: must be a list")
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise BardletError(f"{where} = {printable(value)}: must have {len(kinds)} entries")
        return tuple(_typed(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    if inner:  # X | None
        return None if value is None else _typed(value, next(k for k in inner if k is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise BardletError(f"{where} = {printable(value)}: must be {KINDS[hint]}")
    return value


MAX_TOML_BYTES = 1 << 22
"""Maximum size of a settings file in bytes. A run writes 3 kB, more if it names many files."""


@overload
def read_toml(path: Path) -> tuple[Settings, dict[str, Any]]: ...
@overload
def read_toml(path: Path, kind: type[S]) -> tuple[S, dict[str, Any]]: ...
def read_toml(path: Path, kind: Any = None) -> Any:
    """Return the settings in a TOML file and its `[record]`, empty if no run wrote it. kind: as in `from_mapping`."""
    values = _read(path)
    record = values.pop("record", {})
    if not isinstance(record, dict):
        raise BardletError(f"{path}: record = {printable(record)}: must be a table, [record]; delete the line")
    if record:
        values.setdefault("separator", "none")  # runs of older versions read each file as one document
    settings = from_mapping(values, str(path), kind) if kind else from_mapping(values, str(path))
    return settings, record


def settings_in(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file, not validated. Raise BardletError if it cannot be read."""
    return {name: value for name, value in _read(path).items() if name != "record"}


def record_in(path: Path) -> dict[str, Any]:
    """Return the `[record]` of a TOML file, not validated; empty if no run wrote it. Raises as `settings_in`."""
    record = _read(path).get("record", {})
    return record if isinstance(record, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a TOML file. Raise BardletError if it cannot be read."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BardletError(f"{path}: is not a regular file; name a TOML settings file")
        if path.stat().st_size > MAX_TOML_BYTES:
            raise BardletError(f"{path}: {path.stat().st_size:,} bytes is too large for a settings file; "
                               "name another, or restore a copy")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BardletError(f"{path}: no such file; --config takes a TOML settings file") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); name a TOML settings file") from None
    except UnicodeDecodeError as error:
        raise BardletError(f"{path}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: not valid TOML: {error}; write `name = value`, with text in \" \"") from None


def as_mapping(config: Settings) -> dict[str, Any]:
    """Return every setting by name, with the stage: the inverse of `from_mapping`."""
    return {"stage": config.stage, **asdict(config)}


def to_toml(config: Settings, record: Mapping[str, Any], shape: ModelConfig | None = None) -> str:
    """Return the text of run.toml: every setting with a value that applies to the model, then the record.

    shape: the shape of the base model, which fine-tuning settings lack.
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
            "[record] has the results.\n")
    results = {name: value for name, value in record.items() if value is not None}
    text = head + tomli_w.dumps({"stage": config.stage, **values, "record": results})
    return f"{text}{DIGEST_LINE}{_digest(text)}\n"


DIGEST_LINE = "# sha256 of everything above; `bardlet resume` uses it to detect edits: "
OLD_DIGEST_LINE = "# sha256 of all above, by which `bardlet resume` sees that nobody changed it: "
"""The same line in a run.toml of an older version."""


def is_untouched(path: Path) -> bool:
    """Return True if a run.toml is byte for byte as a run wrote it."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_TOML_BYTES:
        return False
    contents = path.read_bytes().decode("utf-8", "replace")
    parts = (contents.rpartition(line) for line in (DIGEST_LINE, OLD_DIGEST_LINE))
    return any(digest == _digest(text) + "\n" for text, _, digest in parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def non_default(config: Settings) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING} | config.auto_defaults
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in defaults and getattr(config, f.name) not in (defaults[f.name], None)}
