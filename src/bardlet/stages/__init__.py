"""Training stages; `stage_of` picks the class for a config."""

from __future__ import annotations

import importlib
from typing import Any, cast

from bardlet.config.settings import Settings
from bardlet.config.stages import STAGES
from bardlet.stages.base import Stage


def stage_of(config: Settings) -> type[Stage[Any, Any, Any, Any]]:
    """Return the stage class for these settings, by the registry in config/stages.py."""
    name = next(STAGES[kind] for kind in type(config).__mro__ if kind in STAGES)
    module, _, stage = name.partition(":")
    return cast(type[Stage[Any, Any, Any, Any]], getattr(importlib.import_module(f"bardlet.stages.{module}"), stage))
