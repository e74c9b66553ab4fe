"""What was found out once and need not be found out again: small JSON files in the cache."""

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
    """What was kept in `folder` under `key` (a mapping of plain values); None: nothing, or a file that is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        facts: dict[str, Any] = entry["facts"]
        if entry["key"] == json.loads(json.dumps(key)) and entry["sha256"] == _digest(facts):
            return facts
    return None


def write(folder: Path, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Keep `facts` (plain values) in `folder` under `key`. A folder that cannot be written keeps nothing."""
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
