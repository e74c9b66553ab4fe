"""Reading config.json: values of the right kind, and settings that a model family does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bardlet.errors import BardletError, printable

_required: Any = object()


def take(hf: Mapping[str, Any], key: str, kind: type, default: Any = _required) -> Any:
    """`hf[key]` as a `kind` (int: at least 1; float: at least 0). A missing or null entry gives `default`.

    Raises BardletError where the entry is required and missing, or is not of that kind.
    """
    value = hf.get(key)
    if value is None:
        if default is _required:
            raise BardletError(f"config.json has no '{key}': the file is damaged or of another model family")
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good, words = {
        int: (isinstance(value, int) and number and value >= 1, "a whole number of at least 1"),
        float: (number and value >= 0, "a number of at least 0"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a text"),
    }[kind]
    if not good:
        raise BardletError(f"config.json: '{key}' is {printable(value)}, but {words} is needed there")
    return kind(value)


def refuse(hf: Mapping[str, Any], key: str, *computed: Any) -> None:
    """Raises BardletError where `hf` sets `key` to something else than the values that bardlet computes."""
    if key in hf and hf[key] not in computed:
        raise BardletError(
            f"config.json: '{key}' is {printable(hf[key])}, which bardlet does not compute "
            f"(only {' or '.join(map(repr, computed))}): use transformers for this model"
        )
