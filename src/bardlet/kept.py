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
    with suppress(OSError, ValueError):
        entry = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        if isinstance(entry, dict) and entry.get("key") == json.loads(json.dumps(key)):
            return {name: value for name, value in entry.items() if name != "key"}
    return None


def write(folder: Path, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Keep `facts` (plain values) in `folder` under `key`. A folder that cannot be written keeps nothing."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False, encoding="utf-8") as file:
            json.dump({"key": dict(key), **facts}, file, indent=1)
        os.replace(file.name, _path(folder, key))


def _path(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
