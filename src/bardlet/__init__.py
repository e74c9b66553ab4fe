"""bardlet: a text goes in, a GPT that you trained, understood and can run anywhere comes out.

    import bardlet

    run = bardlet.train("my.txt", minutes=2)
    print(run.model.generate("Once", max_new_tokens=100))

Nothing heavy is imported before a function is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bardlet.api.evaluation import evaluate
    from bardlet.api.models import Model, load
    from bardlet.api.runs import runs
    from bardlet.api.training import Run, open_run, plan, resume, train
    from bardlet.errors import BardletError

__version__ = "0.2.0"

_MODULES = {
    "bardlet.api.training": ("train", "plan", "resume", "open_run", "Run"),
    "bardlet.api.models": ("load", "Model"),
    "bardlet.api.evaluation": ("evaluate",),
    "bardlet.api.runs": ("runs",),
    "bardlet.errors": ("BardletError",),
}

__all__ = ["BardletError", "Model", "Run", "evaluate", "load", "open_run", "plan", "resume", "runs", "train"]


def __getattr__(name: str) -> Any:
    """Import a part of the API on first use (PEP 562): also `sft`, `reward`, `dpo` and the other stages."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    for kind in importlib.import_module("bardlet.config.stages").FINE_TUNING:
        if name == kind.command:
            return importlib.import_module("bardlet.api.training").stage_function(kind)
    raise AttributeError(f"module 'bardlet' has no attribute '{name}'")


def __dir__() -> list[str]:
    stages = importlib.import_module("bardlet.config.stages").FINE_TUNING
    return sorted({*globals(), *__all__, *(kind.command for kind in stages)})
