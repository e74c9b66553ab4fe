"""Check a machine or a run folder: one finding per subject, with the remedy.

The checks change nothing; they train nothing but a step of a tiny model on a GPU. They trust no folder.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bardlet import __version__, console
from bardlet.config.finetuning import RolloutConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.config.settings import Settings
from bardlet.data import bitext, named
from bardlet.errors import BardletError, Unsupported, one_line, quoted
from bardlet.ladder import rungs
from bardlet.planning import memory
from bardlet.run import checkpoint, diagnosis, foreign, hf, lock, metrics, rollout_diagnosis
from bardlet.run import folder as run_folder
from bardlet.run.diagnosis import Finding, damaged, ok, warning
from bardlet.run.record import TextRecord
from bardlet.runtime import atomic, compiler, contention, distributed, manifest
from bardlet.runtime import device as runtime_device
from bardlet.stages import prediction, stage_of
from bardlet.training import device_check

LOW_SPACE = 2**30
"""Bytes of memory or disk below which to warn: about what a run of ten million parameters needs."""


# ---------------------------------------------------------------- the machine


def machine() -> Iterator[Finding]:
    """Yield findings on versions, processor, device, precision, compiler, memory, disk and data of this machine."""
    yield ok("versions", f"bardlet {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
             f"{platform.system()} {platform.machine()}")
    yield from _processor()
    device = runtime_device.pick_device("auto")
    accelerators = runtime_device.accelerators()
    cpu = "the CPU; " + ("--device mps uses the GPU of this Apple processor" if accelerators else
                         "torch finds no GPU that it can use")
    yield ok("device", cpu if device.type == "cpu" else torch.cuda.get_device_name(device))
    for accelerator in accelerators:
        yield check_device(accelerator)
    if (dtype := runtime_device.pick_dtype("auto", device)) != "fp32":
        yield ok("precision", f"{dtype}, which this processor supports natively")
    elif limit := runtime_device.instruction_limit():
        yield ok("precision", f"fp32: {limit} disables native bf16")
    else:
        yield ok("precision", "fp32: this processor has no native bf16, which would be up to four times as fast")
    if missing := compiler.compiler_missing(device):
        yield warning("compiler", f"{missing}; runs train without compilation, which is slower; install it "
                      f"({compiler.remedy()})")
    else:
        yield ok("compiler", compiler.compiler(device) or ("Triton, with a C compiler"
                 if device.type == "cuda" else "it does not name its version"))
    yield _load()
    yield from _free_space(device)
    yield from _data()


def check_device(device: torch.device) -> Finding:
    """Compare one training step on a device with the CPU's."""
    remedy = f"train with --device cpu, update PyTorch and the driver, and report it to PyTorch ({torch.__version__})"
    try:
        differences = device_check.compare_with_cpu(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # TypeError: no float64 on this device
        return warning(device.type, f"a training step fails on {device}: {one_line(error)}; {remedy}")
    worst = max(differences, key=lambda each: (not each.ok, each.gradient))
    figures = (f"loss {worst.loss:.1e}, gradient of {worst.parameter} {worst.gradient:.1e} (relative, {worst.model}, "
               "float32)")
    if worst.ok:
        return ok(device.type, f"a training step on {device} agrees with the CPU's: {figures}")
    return warning(device.type, f"a training step on {device} differs from the CPU's: {figures}; {remedy}")


def _processor() -> Iterator[Finding]:
    """Check the processor: its name, and that torch uses all its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, name = torch.get_num_threads(), runtime_device.processor()
    if threads < cores // 2:  # two hardware threads of a core count as two cores
        yield warning("processor", f"{name}: torch uses {threads} of {cores} cores; unset OMP_NUM_THREADS, or set "
                      "--threads")
    else:
        yield ok("processor", f"{name}, {cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)}")


def _load() -> Finding:
    """Check if other programs use the cores."""
    factor = contention.slowdown()
    if factor > 1 or contention.cores_are_taken():
        return warning("load", f"the machine is busy: {contention.describe(factor)}; close them before you train, or "
                       "give --minutes accordingly")
    return ok("load", "no other program uses the cores")


def _free_space(device: torch.device) -> Iterator[Finding]:
    """Check free memory and disk space."""
    free = memory.free_bytes(device)
    if free is None:
        yield ok("memory", "the free memory of this device is unknown")
    elif free < LOW_SPACE:
        yield warning("memory", f"only {free / 1e9:.1f} GB are free; close other programs, or train small models")
    else:
        yield ok("memory", f"{free / 1e9:.1f} GB are free")
    for about, folder, setting in (("disk", Path.cwd(), "--out"), ("cache", named.cache_folder(), "$BARDLET_CACHE")):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_disk = atomic.free_bytes(existing)
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            yield warning(about, f"{folder}: not writable; choose another folder with {setting}")
        elif free_disk < LOW_SPACE:
            yield warning(about, f"{folder}: only {free_disk / 1e9:.2f} GB are free; free some space, or choose "
                          f"another folder with {setting}")
        else:
            yield ok(about, f"{folder}: {free_disk / 1e9:.1f} GB are free")


def _data() -> Iterator[Finding]:
    """Check the named corpora and the cached tokens."""
    where = {name: named.locate(name) for name in named.NAMED if name != named.EMBEDDED}
    where |= {name: bitext.locate(name) for name in bitext.NAMED}
    available = [name for name, path in where.items() if path]
    root = os.environ.get("BARDLET_DATA")
    if root and not Path(root).is_dir():
        yield warning("data", f"$BARDLET_DATA is {root}: no such folder; change it, or unset it")
    elif available:
        yield ok("data", f"{len(available)} of {len(where)} named corpora can be read: {', '.join(available)}")
    else:
        yield warning("data", "no named corpus is available; run `bardlet data get tinyshakespeare`, or train on your "
                      "own text")
    for path in sorted((named.cache_folder() / "tokens").glob(f"[!.]*/{manifest.MANIFEST}")):
        if sum(file.stat().st_size for file in path.parent.iterdir()) > LOW_SPACE:
            continue  # too slow here; a run checks it
        if damage := manifest.damaged_files(path.parent):
            yield warning("cache", f"{damage}; the next run that needs these tokens will rebuild them")


# ---------------------------------------------------------------- a run


def health(run: Path) -> Iterator[Finding]:
    """Yield findings on a run or Hugging Face folder: its files, its losses, and if the run can continue.

    Raises:
        BardletError: no such folder, neither a run nor a model, or a model that bardlet does not read.
    """
    foreign.check_folder(run)
    yield from _model(run)
    if not (run / "run.toml").exists() and not checkpoint.steps_saved(run):
        return
    damages = {folder: checkpoint.find_damage(folder) for folder in checkpoint.steps_saved(run)}
    intact = [folder for folder, damage in damages.items() if not damage]
    yield from _checkpoints(run, intact, [damage for damage in damages.values() if damage])
    try:
        config, record = run_folder.settings(run)
    except BardletError as error:
        yield damaged("settings", str(error))
        return
    if run_folder.is_untouched(run):
        yield ok("settings", f"{run / 'run.toml'} is unchanged since the run wrote it")
    else:
        yield damaged("settings", f"{run / 'run.toml'}: edited, damaged or missing; `bardlet resume` uses the "
                      "settings of the newest checkpoint")
    yield from _text(config, record)
    yield from _machine_of(record.get("machine", {}), config, bool(record.get("finished")))
    yield from diagnosis.of_text(record)
    steps = config.replans[-1][1] if config.replans else config.steps or 0
    try:
        lines = metrics.read_metrics(run)
        yield from _lines(run / "metrics.jsonl", len(lines))
        if isinstance(config, RolloutConfig):
            yield from rollout_diagnosis.of_loss(lines)
            yield from rollout_diagnosis.of_rollouts(lines, config, steps, record)
        else:
            yield from diagnosis.of_run(lines, config, steps, record)
            if isinstance(config, TrainConfig):
                yield from _quality(lines, record)
    except BardletError as error:
        yield damaged("metrics", str(error))
    holder = None
    with suppress(BardletError):  # a command that needs the lock reports why it cannot be opened
        holder = lock.holder(run)
    if holder:
        yield ok("run", f"in use by {holder}")
    elif record.get("finished"):
        yield ok("run", f"finished after {console.count(record.get('steps', 0), 'step')}")
    elif intact:
        step = int(intact[-1].name[5:])
        yield warning("run", f"{step:,} of {steps:,} steps are saved; `bardlet resume {quoted(run)}` "
                      + ("continues from there" if step < steps else "finishes the run"))


def _model(run: Path) -> Iterator[Finding]:
    """Check the Hugging Face folder at the root."""
    try:
        model, tokenizer = hf.read_folder(run, scores=hf.read_model_config(run).scores)
    except BardletError as error:
        if isinstance(error, Unsupported) and not (run / "run.toml").exists():
            raise  # another tool's model, which is not damaged
        yield damaged("model", str(error))
        return
    if not all(p.isfinite().all() for p in model.parameters()):
        yield damaged("model", f"{run / 'model.safetensors'}: a weight is not a finite number; go back to a checkpoint")
        return
    checked = ("the files have the checksums in its manifest" if manifest.has_manifest(run)
               else "no manifest, so only its shapes were checked")
    yield ok("model", f"{model.config.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
             f"{tokenizer.kind} tokenizer: {checked}")


def _checkpoints(run: Path, intact: list[Path], damages: list[str]) -> Iterator[Finding]:
    """Check that a checkpoint to continue from exists, and that there is space for the next one."""
    for damage in damages:
        yield damaged("checkpoint", damage + (f"; `bardlet resume` continues from {intact[-1].name}" if intact else ""))
    if not intact:
        yield warning("checkpoint", f"{run}: no intact checkpoint to continue from; start over with "
                      f"`bardlet train --config {quoted(run / 'run.toml')} --out NEW`")
        return
    yield ok("checkpoint", f"{', '.join(folder.name for folder in intact)}: intact")
    size = sum(path.stat().st_size for path in intact[-1].iterdir())
    if atomic.free_bytes(run) < 2 * size:
        yield warning("disk", f"{run}: {atomic.free_bytes(run):,} bytes are free, and a checkpoint takes {size:,}; "
                      "free some space")
    if partial := run_folder.partial_files(run):
        yield warning("left over", f"{', '.join(path.name for path in partial)}: from a process that was killed, or "
                      "that is writing now; the next start removes it")


def _quality(lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the loss of a run on a text with the forecast, with n-gram models, and with other seeds of its rung."""
    known = TextRecord.of(record)
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    if not losses or not isinstance(known.characters_per_token, float | int):
        return
    finished = bool(known.finished)
    loss = known.nats_per_char if finished else min(losses) / known.characters_per_token
    yield prediction.judge(known, float(loss), finished)
    if finished and known.rung and known.text == "tinyshakespeare" and (band := rungs.bands().get(known.rung)):
        said = f"{loss:.3f}; other seeds of the rung {known.rung} get {band['low']:.3f} to {band['high']:.3f}"
        place = rungs.place(loss, band)
        if place == "normal":
            yield ok("rung", said)
        else:
            advice = ("compare your settings with the rung's in its run.toml" if place.startswith("higher") else
                      "does a position see the future, or the validation text?")
            yield warning("rung", f"{said}; yours is {place.split()[0]}: {advice}")


def _lines(path: Path, valid: int) -> Iterator[Finding]:
    """Check metrics.jsonl, of which `valid` lines match their checksum."""
    if not os.path.lexists(path):
        yield warning("metrics", f"{path}: missing; the loss curve starts over, but the run does not need it")
        return
    count = path.read_bytes().count(b"\n")
    if valid < count:
        yield damaged("metrics", f"{path}: {count - valid} of {count} lines are damaged and skipped; the run does not "
                      "need them")
    else:
        yield ok("metrics", f"{path}: {valid} lines, all with a valid checksum")


def _text(config: Settings, record: dict[str, Any]) -> Iterator[Finding]:
    """Check that the text is still the one in the record, and the old text of --replay, too."""
    files = (getattr(config, name, None) for name in ("pair", "source", "target"))
    name = ", ".join(filter(None, (*config.text, *files)))
    try:
        stage = stage_of(config)(config, distributed.Dist(0, 1, torch.device("cpu")))
        stage.source = stage.load_data()
        changed = stage.changed_text(record)
    except BardletError as error:
        yield warning("text", f"{error}; the run cannot continue without its text")
        return
    if changed is None:
        yield ok("text", f"{name}: unchanged since the run started")
    else:
        name = name if changed == stage.source.name else changed
        yield warning("text", f"{name}: changed since the run started; restore it, or continue with --allow-change")


def _machine_of(known: dict[str, object], config: Settings, finished: bool) -> Iterator[Finding]:
    """Check if the run would continue bit for bit on this machine; `known` is the machine it started on."""
    try:
        device = runtime_device.pick_device(config.device)
    except BardletError as error:
        yield warning("machine", f"{error}; the run would not continue bit for bit")
        return
    threads = config.threads or torch.get_num_threads()
    current = distributed.machine(distributed.Dist(0, 1, device), config.dtype, threads)
    different = [name for name, value in current.items()
                 if name not in ("compiled", "compiler", "processes") and known.get(name, value) != value]
    if different:
        name = different[0]
        yield warning("machine", f"{name} was {known[name]}, and is {current[name]} here: the run would not continue "
                      "bit for bit; --allow-change continues it anyway")
    else:
        yield ok("machine", f"the same as at the start of the run (Python {sys.version.split()[0]})"
                 + ("" if finished else "; the run continues bit for bit"))


# ---------------------------------------------------------------- a model
