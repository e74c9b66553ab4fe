"""A cache of measurements, as small JSON files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the entry in `folder` for `key` (a mapping of plain values); None if missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        facts: dict[str, Any] = entry["facts"]
        if entry["key"] == json.loads(json.dumps(key)) and entry["sha256"] == _digest(facts):
            return facts
    return None


def write(folder: Path, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write `facts` (plain values) to `folder` as the entry for `key`, unless the folder cannot be written."""
    text = json.dumps({"key": dict(key), "facts": dict(facts), "sha256": _digest(facts)}, indent=1)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False, encoding="utf-8") as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, _path(folder, key))
            except OSError:  # a full disk
                os.unlink(file.name)


def _path(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / f"{_digest(key)[:24]}.json"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
