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
    from bardlet.api.exports import export_model
    from bardlet.api.models import Model, load
    from bardlet.api.runs import delete, runs
    from bardlet.api.training import Run, StageFunction, open_run, plan, resume, train
    from bardlet.errors import BardletError

    sft: StageFunction
    reward: StageFunction
    dpo: StageFunction
    kto: StageFunction
    ppo: StageFunction
    grpo: StageFunction

__version__ = "0.2.0"

_MODULES = {
    "bardlet.api.training": ("train", "plan", "resume", "open_run", "Run"),
    "bardlet.api.models": ("load", "Model"),
    "bardlet.api.evaluation": ("evaluate",),
    "bardlet.api.exports": ("export_model",),
    "bardlet.api.runs": ("runs", "delete"),
    "bardlet.errors": ("BardletError",),
}

WITHOUT_TORCH = ("BardletError", "delete", "runs")
"""Parts that compute nothing."""

__all__ = ["BardletError", "Model", "Run", "delete", "dpo", "evaluate", "export_model", "grpo", "kto", "load",
           "open_run", "plan", "ppo", "resume", "reward", "runs", "sft", "train"]


def __getattr__(name: str) -> Any:
    """Import a part of the API on first use (PEP 562). The errors of its functions name keywords, not flags."""
    if name not in __all__:
        raise AttributeError(f"module 'bardlet' has no attribute '{name}'")
    if name not in WITHOUT_TORCH:
        importlib.import_module("bardlet.runtime.contention").choose_waiting()  # before torch is imported
    value = _import(name)
    if not isinstance(value, type):
        value = importlib.import_module("bardlet.api.arguments").names_keywords(value)
        value.__module__ = "bardlet"  # for pickle, which looks a function up by its name
    globals()[name] = value
    return value


def _import(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    stages = importlib.import_module("bardlet.config.stages").FINE_TUNING
    [kind] = (kind for kind in stages if kind.command == name)
    return importlib.import_module("bardlet.api.training").stage_function(kind)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
