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
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bardlet.config.settings import WITHOUT, TrainConfig
from bardlet.errors import BardletError, shown


def from_mapping(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A `TrainConfig` of `values`; an unknown name, or a value of another type, is an error that names `where`."""
    hints = get_type_hints(TrainConfig)
    known = {f.name for f in fields(TrainConfig)}
    ready = {}
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise BardletError(f"{where}: unknown setting '{name}'" + (f"; did you mean '{near[0]}'?" if near
                               else "; `bardlet train --help` lists them (here with _ for -)"))
        ready[name] = _typed(value, hints[name], f"{where}: {name}")
    try:
        return TrainConfig(**ready)
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: 'text, in " "'}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` from TOML as `hint` wants it (a list is a tuple, an int serves as a float), or an error."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            raise BardletError(f"{where} = {shown(value)}: it must be one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BardletError(f"{where} = {shown(value)}: it must be a list, in [ ]")
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise BardletError(f"{where} = {shown(value)}: it must have {len(kinds)} entries")
        return tuple(_typed(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    if inner:  # X | None
        return None if value is None else _typed(value, next(k for k in inner if k is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise BardletError(f"{where} = {shown(value)}: it must be {KINDS[hint]}")
    return value


MOST_TOML = 1 << 22
"""Bytes of the largest file of settings that is read: a run writes 3 kB, and more where many files were named."""


def read_toml(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings in a TOML file, and its `[record]` (empty in a file that no run wrote)."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BardletError(f"{path}: is no file; name a TOML file of settings")
        if path.stat().st_size > MOST_TOML:
            raise BardletError(f"{path}: {path.stat().st_size:,} bytes are too many for a file of settings; "
                               "name another, or put back a copy")
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BardletError(f"{path}: there is no such file; --config wants a TOML file of settings") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); name a TOML file of settings") from None
    except UnicodeDecodeError as error:
        raise BardletError(f"{path}: byte {error.start} is no UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: is not TOML: {error}; a line is `name = value`, text in \" \"") from None
    record = values.pop("record", {})
    if not isinstance(record, dict):
        raise BardletError(f"{path}: record = {shown(record)}: it must be a table, [record]; take the line out")
    return from_mapping(values, str(path)), record


def settings_in(path: Path) -> set[str]:
    """The names of the settings that a TOML file has, which `read_toml` was able to read."""
    return set(tomllib.loads(path.read_text(encoding="utf-8-sig"))) - {"record"}


def to_toml(config: TrainConfig, record: Mapping[str, Any]) -> str:
    """The text of run.toml: every setting that the model has and that has a value, then what happened."""
    import tomli_w

    has = {k: v for k, v in asdict(config).items() if config.model not in WITHOUT.get(k, ()) and k not in config.others}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in has.items() if v is not None}  # TOML has no null
    settings["replans"] = [list(pair) for pair in config.replans]
    command = "train" if config.stage == "pretrain" else config.stage
    head = (f"# Written by bardlet. `bardlet {command} --config run.toml` repeats this run; "
            "[record] says what happened.\n")
    text = head + tomli_w.dumps({**settings, "record": {k: v for k, v in record.items() if v is not None}})
    return f"{text}{SEAL}{_digest(text)}\n"


SEAL = "# sha256 of all above, by which `bardlet resume` sees that nobody changed it: "


def sealed(path: Path) -> bool:
    """Whether a run.toml is, byte for byte, what a run wrote."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_TOML:
        return False
    text, _, digest = path.read_bytes().decode("utf-8", "replace").rpartition(SEAL)
    return digest == _digest(text) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed(config: TrainConfig) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.default is not MISSING and getattr(config, f.name) != f.default}
