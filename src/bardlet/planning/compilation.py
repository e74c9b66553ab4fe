"""Decide whether to compile a run's blocks, and remember which models this machine has compiled."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bardlet import __version__
from bardlet.config.model import WITHOUT_BLOCKS, ModelConfig
from bardlet.config.settings import Settings
from bardlet.data import named
from bardlet.planning import calibrate, clock
from bardlet.runtime import cache, compiler, device
from bardlet.runtime.distributed import Dist
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")


def keep_compiled() -> None:
    """Keep compiled code in bardlet's cache; by default torch uses a temporary folder.

    Call it before the compiler is loaded: loading fixes the folder.
    """
    folder = _compiled_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _compiled_folder() -> Path:
    """Return the compiler's cache folder for this type of processor.

    Compiled code contains weights packed for one processor's instructions, but the compiler's cache key omits them: on
    another processor that shares the cache, the process aborts (torch 2.13).
    """
    return named.cache_folder() / "compiler" / hashlib.sha256(device.processor().encode()).hexdigest()[:12]


def choose_compile(trainer: Trainer, seconds: float | None = None, compiling: bool = True) -> None:
    """Resolve --compile: auto compiles if there is a compiler and the run is long enough to gain from it.

    Compilation counts as cheaper if this machine has compiled the same model before, and as dearer if it is busy.

    Args:
        seconds: length of the run; None: estimate it from a few eager steps.
        compiling: compile now; False: decide only.
    """
    missing = compiler.compiler_missing(trainer.dist.device)
    blocks = trainer.model.config.model not in WITHOUT_BLOCKS  # nothing to compile without blocks
    on = trainer.config.compile == "on" and blocks
    if on and missing:
        log.warning("--compile on: %s; continuing without compilation, which is slower", missing)
        on = False
    if trainer.config.compile == "auto" and not missing and blocks:
        if seconds is None:
            seconds = clock.seconds_per_step(trainer, 2) * (trainer.config.steps or 1)
        entry = compiled_before(trainer.config, trainer.model.config, trainer.machine, trainer.dist)
        cost = calibrate.COLD if cache.read(*entry) is None else calibrate.WARM
        cost *= clock.slowdown(trainer.dist)
        speedup = calibrate.COMPILED_PAIRS if trainer.config.short_rows else calibrate.COMPILED
        on = bool(trainer.dist.broadcast_int(int(calibrate.worth_compiling(seconds, cost, speedup))))
    if on and compiling and (on := _compile(trainer)) and trainer.dist.main:
        cache.write(*compiled_before(trainer.config, trainer.model.config, trainer.machine, trainer.dist), {})
    trainer.config = replace(trainer.config, compile="on" if on else "off")
    trainer.machine.update(compiled=on, compiler=compiler.compiler(trainer.dist.device) if on else "")


def compiled_before(config: Settings, shape: ModelConfig, machine: dict[str, Any],
                    dist: Dist) -> tuple[Path, dict[str, Any]]:
    """Return (folder, key) of the cache entry that says this machine has compiled this model.

    The key holds everything the compiled code depends on. The folder is inside the compiler's own, so deleting that
    deletes both.
    """
    rows = getattr(config, config.batch_setting) // dist.parts
    return _compiled_folder() / "models", {
        "bardlet": __version__, "compiler": compiler.compiler(dist.device),
        "machine": {name: machine[name] for name in ("processor", "torch", "dtype", "threads")},
        "model": asdict(shape), "rows": rows, "block_size": config.block_size}


def _compile(trainer: Trainer) -> bool:
    """Compile the blocks and run them once. If that fails on any rank, warn, undo it and return False on all.

    First each rank compiles a function alone, since a rank that fails in a training step leaves the others waiting.
    """
    log.info("compiling (up to a minute the first time on this machine)")
    dist, model = trainer.dist, trainer.model
    failure = _failure(lambda: compiler.try_compiler(dist.device)) if dist.world > 1 else None
    if not dist.all_max(int(failure is not None)):
        compiler.compile_blocks(model, widths=trainer.config.rows_vary)
        failure = _failure(lambda: clock.seconds_per_step(trainer, 1))
    failed = dist.all_max(int(failure is not None))
    if failed:
        compiler.compile_blocks(model, on=False)
    if failure:
        log.warning("torch.compile failed (%s); continuing without compilation", failure)
    return not failed


def _failure(work: Callable[[], object]) -> str | None:
    """Return the error of `work` in a line; None if it had none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:150]}"
    return None
