"""Whether to compile a run's blocks, and what the compiler has done on this machine before."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bardlet import __version__
from bardlet.config.model import WITHOUT_BLOCKS, ModelConfig
from bardlet.config.settings import Settings
from bardlet.data import corpus
from bardlet.planning import calibrate, clock
from bardlet.runtime import cache, compiler, device
from bardlet.runtime.distributed import Dist
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")


def keep_compiled() -> None:
    """Have the compiler keep its work in bardlet's cache; torch's own place for it is a temporary folder.

    To be called before the compiler is loaded, which then chooses its folder.
    """
    folder = _compiled_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _compiled_folder() -> Path:
    """The compiler's folder for this type of processor.

    What is compiled holds weights packed for the instructions of one processor, and the compiler's own key does not
    name them: on another processor that shares the cache the process aborts (torch 2.13).
    """
    return corpus.cache_folder() / "compiler" / hashlib.sha256(device.processor().encode()).hexdigest()[:12]


def choose_compile(trainer: Trainer, seconds: float | None = None) -> None:
    """Resolve --compile: auto compiles where a compiler is found and the run is long enough to win the time back.

    The compiler takes less time where this machine has compiled the same model before.

    Args:
        seconds: how long the run will be; None: measure a few eager steps to find out.
    """
    missing = compiler.compiler_missing(trainer.dist.device)
    blocks = trainer.model.config.model not in WITHOUT_BLOCKS  # a table has nothing to compile
    on = trainer.config.compile == "on" and blocks
    if on and missing:
        log.warning("--compile on: %s; going on without compilation, which is slower", missing)
        on = False
    if trainer.config.compile == "auto" and not missing and blocks:
        if seconds is None:
            seconds = clock.seconds_per_step(trainer, 2) * (trainer.config.steps or 1)
        before = compiled_before(trainer.config, trainer.model.config, trainer.machine, trainer.dist)
        takes = calibrate.COLD if cache.read(*before) is None else calibrate.WARM
        gain = calibrate.COMPILED_PAIRS if trainer.config.short_rows else calibrate.COMPILED
        on = bool(trainer.dist.broadcast_int(int(calibrate.worth_compiling(seconds, takes, gain))))
    if on and (on := _compile(trainer)) and trainer.dist.main:
        cache.write(*compiled_before(trainer.config, trainer.model.config, trainer.machine, trainer.dist), {})
    trainer.config = replace(trainer.config, compile="on" if on else "off")
    trainer.machine.update(compiled=on, compiler=compiler.compiler(trainer.dist.device) if on else "")


def compiled_before(config: Settings, shape: ModelConfig, machine: dict[str, Any],
                     dist: Dist) -> tuple[Path, dict[str, Any]]:
    """(folder, key) under which it is kept that this machine has compiled this model: all that the work depends on.

    The folder lies in the compiler's own: who empties that empties both.
    """
    rows = getattr(config, config.batch_setting) // dist.world
    return _compiled_folder() / "models", {
        "bardlet": __version__, "compiler": compiler.compiler(dist.device),
        "machine": {name: machine[name] for name in ("processor", "torch", "dtype", "threads")},
        "model": asdict(shape), "rows": rows, "block_size": config.block_size}


def _compile(trainer: Trainer) -> bool:
    """Compile the blocks and try them once; where that fails, say so and go on without. Returns whether it worked."""
    log.info("compiling (the first time on a machine takes up to a minute)")
    compiler.compile_blocks(trainer.model, widths=trainer.config.rows_vary)
    try:
        clock.seconds_per_step(trainer, 1)
    except Exception as error:
        compiler.compile_blocks(trainer.model, on=False)
        what = (str(error).strip().splitlines() or ["no message"])[0][:150]
        log.warning("torch.compile failed here (%s: %s); going on without compilation", type(error).__name__, what)
        return False
    return True
