"""Checked reading of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bardlet.errors import BardletError, Unsupported, printable

_required: Any = object()


def get_value(hf: Mapping[str, Any], key: str, kind: type, default: Any = _required) -> Any:
    """Return `hf[key]` as a `kind` (int: at least 1; float: at least 0), or `default` if it is missing or null.

    Raises BardletError if a required entry is missing or an entry is not of that kind.
    """
    value = hf.get(key)
    if value is None:
        if default is _required:
            raise BardletError(f"config.json has no '{key}': the file is damaged or belongs to another model family; "
                               "copy it again")
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid, expected = {
        int: (isinstance(value, int) and is_number and value >= 1, "a positive integer"),
        float: (is_number and value >= 0, "a non-negative number"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a string"),
    }[kind]
    if not valid:
        raise BardletError(f"config.json: '{key}' is {printable(value)}, but must be {expected}; copy the file again")
    return kind(value)


def check_supported(hf: Mapping[str, Any], key: str, *supported: Any) -> None:
    """Raise Unsupported if `hf` sets `key` to a value that bardlet does not support."""
    if key in hf and hf[key] not in supported:
        raise Unsupported(
            f"config.json: '{key}' is {printable(hf[key])}, but bardlet supports only "
            f"{' or '.join(map(repr, supported))}; use transformers for this model"
        )
