"""What a machine and a run folder are like: a line for each thing that was looked at, and what to do about it.

Nothing is changed, and nothing is computed but hashes; a folder is read as if it came from a stranger.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from bardlet import __version__
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings
from bardlet.config.toml import is_untouched
from bardlet.data import corpus, duplicates
from bardlet.data.duplicates import Overlap
from bardlet.errors import BardletError
from bardlet.inference import text_generation
from bardlet.planning import memory
from bardlet.run import checkpoint, diagnosis, hf, lock, metrics
from bardlet.run import folder as run_folder
from bardlet.run.diagnosis import Finding, damaged, ok, warning
from bardlet.runtime import atomic, compiler, distributed, manifest
from bardlet.runtime import device as runtime_device
from bardlet.stages import stage_of

LOW_SPACE = 2**30
"""Bytes of memory, or of disk, that are few: a run of ten million parameters wants about so many."""


# ---------------------------------------------------------------- the machine


def machine() -> Iterator[Finding]:
    """Versions, processor, device, precision, compiler, memory, disk and data of this machine."""
    yield ok("versions", f"bardlet {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
             f"{platform.system()} {platform.machine()}")
    yield from _processor()
    device = runtime_device.pick_device("auto")
    names = {"cpu": "no GPU that torch can use: the CPU computes", "mps": "the GPU of an Apple processor"}
    yield ok("device", names.get(device.type) or torch.cuda.get_device_name(device))
    if runtime_device.pick_dtype("auto", device) == "bf16":
        yield ok("precision", "bf16, which this processor multiplies natively")
    elif limit := runtime_device.instruction_limit():
        yield ok("precision", f"fp32: {limit} rules out native bf16")
    else:
        yield ok("precision", "fp32: this processor has no native bf16, which would be up to four times as fast")
    if missing := compiler.compiler_missing(device):
        yield warning("compiler", f"{missing}: runs go on without compilation, which is slower; install it (Debian, "
                      "Ubuntu: apt install g++ python3-dev)")
    else:
        yield ok("compiler", compiler.compiler(device) or "Triton, with a C compiler")
    yield from _free_space(device)
    yield from _data()


def _processor() -> Iterator[Finding]:
    """Its name, and whether torch uses all of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, said = torch.get_num_threads(), runtime_device.processor()
    if threads < cores // 2:  # two threads of a core count as two cores
        yield warning("processor", f"{said}: torch uses {threads} of {cores} cores; unset OMP_NUM_THREADS, or give "
                      "--threads")
    else:
        yield ok("processor", f"{said}, {cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)}")


def _free_space(device: torch.device) -> Iterator[Finding]:
    """Memory and disk."""
    left = memory.free_bytes(device)
    if left is None:
        yield ok("memory", "nobody knows how much is free")
    elif left < LOW_SPACE:
        yield warning("memory", f"{left / 1e9:.1f} GB are free: close other programs, or train small models")
    else:
        yield ok("memory", f"{left / 1e9:.1f} GB are free")
    for about, place, setting in (("disk", Path.cwd(), "--out"), ("cache", corpus.cache_folder(), "$BARDLET_CACHE")):
        here = next(path for path in (place, *place.parents) if path.exists())
        room = atomic.free_bytes(here)
        if not os.access(here, os.W_OK):
            yield warning(about, f"{place}: may not be written to; choose another place with {setting}")
        elif room < LOW_SPACE:
            yield warning(about, f"{place}: {room / 1e9:.2f} GB are free; make room, or choose another place with "
                          f"{setting}")
        else:
            yield ok(about, f"{place}: {room / 1e9:.1f} GB are free")


def _data() -> Iterator[Finding]:
    """The named corpora, and the tokens in the cache."""
    here = [name for name in corpus.NAMED if corpus.locate(name)]
    root = os.environ.get("BARDLET_DATA")
    if root and not Path(root).is_dir():
        yield warning("data", f"$BARDLET_DATA is {root}, and there is no such folder; set it anew, or unset it")
    elif here:
        yield ok("data", f"{len(here)} of {len(corpus.NAMED) - 1} named corpora are here: {', '.join(here)}")
    else:
        yield warning("data", "no named corpus is here; `bardlet data get tinyshakespeare`, or take a file of yours")
    for listed in sorted((corpus.cache_folder() / "tokens").glob(f"[!.]*/{manifest.MANIFEST}")):
        if sum(path.stat().st_size for path in listed.parent.iterdir()) > LOW_SPACE:
            continue  # to look at it takes longer than a person waits; a run does
        if wrong := manifest.damaged_files(listed.parent):
            yield warning("cache", f"{wrong}; the tokens will be built again when they are needed")


# ---------------------------------------------------------------- a run


def health(run: Path) -> Iterator[Finding]:
    """The files of a run or Hugging Face folder, whether the run can go on, and what its losses say."""
    if not run.is_dir():
        raise BardletError(f"{run}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    inside = sorted(path.parent.name for path in run.glob("*/run.toml"))
    if inside and not (run / "config.json").exists():
        raise BardletError(f"{run}: has runs in it ({', '.join(inside[:9])}); name one of them")
    yield from _model(run)
    if not (run / "run.toml").exists() and not checkpoint.steps_saved(run):
        return
    found = {folder: checkpoint.find_damage(folder) for folder in checkpoint.steps_saved(run)}
    whole = [folder for folder, wrong in found.items() if not wrong]
    yield from _checkpoints(run, whole, [wrong for wrong in found.values() if wrong])
    try:
        config, record = run_folder.settings(run)
    except BardletError as error:
        yield damaged("settings", str(error))
        return
    if is_untouched(run / "run.toml"):
        yield ok("settings", f"{run / 'run.toml'} is as the run wrote it")
    else:
        yield damaged("settings", f"{run / 'run.toml'}: changed, damaged or missing; `bardlet resume` takes the "
                      "settings of the newest checkpoint")
    yield from _text(config, record.get("text_hash"))
    yield from _machine_of(record.get("machine", {}), config)
    yield from diagnosis.of_text(record)
    steps = config.replans[-1][1] if config.replans else config.steps or 0
    try:
        lines = metrics.read_metrics(run)
        yield from _lines(run / "metrics.jsonl", len(lines))
        yield from diagnosis.of_run(lines, config, steps, record)
    except BardletError as error:
        yield damaged("metrics", str(error))
    holder = None
    with suppress(BardletError):  # a lock that cannot be opened is named by who wants it
        holder = lock.holder(run)
    if holder:
        yield ok("run", f"in use by {holder}")
    elif record.get("finished"):
        yield ok("run", f"finished after {record.get('steps', 0):,} steps")
    elif whole:
        step = int(whole[-1].name[5:])
        yield warning("run", f"{step:,} of {steps:,} steps are saved; `bardlet resume {run}` goes on from there"
                      + ("" if step < steps else ", to its end"))


def _model(run: Path) -> Iterator[Finding]:
    """The Hugging Face folder at the root."""
    begun = time.monotonic()
    try:
        model, tokenizer = hf.read_folder(run, scores=hf.read_model_config(run).scores)
    except BardletError as error:
        yield damaged("model", str(error))
        return
    if not all(p.isfinite().all() for p in model.parameters()):
        yield damaged("model", f"{run / 'model.safetensors'}: a weight is not a finite number; go back to a checkpoint")
        return
    checked = ("as its manifest knows it" if manifest.has_manifest(run)
               else "no manifest, so only its shapes were checked")
    yield ok("model", f"{model.config.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.kind} "
             f"tokenizer: {checked} ({time.monotonic() - begun:.1f} s)")


def _checkpoints(run: Path, whole: list[Path], damages: list[str]) -> Iterator[Finding]:
    """Which can be gone back to, and whether there is room for the next."""
    for wrong in damages:
        yield damaged("checkpoint", f"{wrong}" + (f"; `bardlet resume` goes on from {whole[-1].name}" if whole else ""))
    if not whole:
        yield warning("checkpoint", f"{run}: no whole checkpoint to go on from; start again with "
                      f"`bardlet train --config {run / 'run.toml'} --out ANOTHER`")
        return
    yield ok("checkpoint", f"{', '.join(folder.name for folder in whole)}: whole")
    size = sum(path.stat().st_size for path in whole[-1].iterdir())
    if atomic.free_bytes(run) < 2 * size:
        yield warning("disk", f"{run}: {atomic.free_bytes(run):,} bytes are free, and a save takes {size:,}; free some space")
    if left := run_folder.has_partial(run):
        yield warning("left over", f"{', '.join(path.name for path in left)}: of a process that was killed, or that is "
                      "writing now; the next start removes it")


def _lines(path: Path, good: int) -> Iterator[Finding]:
    """metrics.jsonl, of which so many lines are good."""
    if not os.path.lexists(path):
        yield warning("metrics", f"{path}: missing: the curve begins anew; the run itself does not need it")
        return
    count = path.read_bytes().count(b"\n")
    if good < count:
        yield damaged("metrics", f"{path}: {count - good} of {count} lines are damaged, and left out; the run itself "
                      "does not need them")
    else:
        yield ok("metrics", f"{path}: {good} lines, each with its checksum")


def _text(config: Settings, known: str | None) -> Iterator[Finding]:
    """Whether the text is still the one that the run learns from."""
    named = (getattr(config, name, None) for name in ("pair", "source", "target"))
    name = ", ".join(filter(None, (*config.text, *named)))
    try:
        same = stage_of(config)(config, distributed.Dist(0, 1, torch.device("cpu"))).load_data().hash == known
    except BardletError as error:
        yield warning("text", f"{error}; the run cannot go on without its text")
        return
    if same:
        yield ok("text", f"{name}: the one that the run began with")
    else:
        yield warning("text", f"{name}: not the one that the run began with; put it back, or go on with --allow-change")


def _machine_of(known: dict[str, object], config: Settings) -> Iterator[Finding]:
    """Whether the run would go on bit for bit here."""
    try:
        device = runtime_device.pick_device(config.device)
    except BardletError as error:
        yield warning("machine", f"{error}; the run would not go on bit for bit")
        return
    here = distributed.machine(distributed.Dist(0, 1, device), config.dtype, config.threads or torch.get_num_threads())
    odd = [name for name, value in here.items()
           if name not in ("compiled", "compiler", "processes") and known.get(name, value) != value]
    if odd:
        yield warning("machine", f"{odd[0]} was {known[odd[0]]}, is {here[odd[0]]} here: the run would not go on bit "
                      "for bit; --allow-change goes on all the same")
    else:
        yield ok("machine", f"the one that the run began on (Python {sys.version.split()[0]}): it goes on bit for bit")


# ---------------------------------------------------------------- a model


def measure_memorization(run: Path, tokens: int, temperature: float, seed: int) -> tuple[list[str], list[str], Overlap, Overlap]:
    """(texts, held, own, chance): what the model of a run writes, documents of its validation text, and how much of
    each stands in the training text. The last tells how much of a text that nobody copied stands there.

    Args:
        tokens: how many the model writes at least, in texts of up to 500, twenty at a time.
    """
    config, record = run_folder.settings(run)
    if not isinstance(config, TrainConfig):
        does = "translates" if isinstance(config, TranslationConfig) else "answers"
        raise BardletError(f"{run}: it {does}, and writes no text of its own; "
                           "leave --memorised out")
    found, several = corpus.find(config.text, config.field), record.get("documents", 2)
    model, tokenizer = hf.read_folder(run)
    # a text of less than some hundred tokens has no room for a copy of 32 characters
    prompts = [text_generation.prompt_ids(tokenizer, None, several)] * max(1, min(20, tokens // 500))
    texts: list[str] = []
    count = 0
    while count < tokens:
        made = text_generation.complete(model, tokenizer, prompts, min(500, tokens), temperature=temperature, top_k=50,
                                seed=seed + len(texts))
        texts += [tokenizer.decode(ids, skip_special=True) for ids in made]
        count += max(len(made), sum(map(len, made)))  # a model may end each text before it has begun
    held = list(itertools.islice(found.documents("val"), 10_000))
    own, chance = (duplicates.find_copied(some, found.documents("train")) for some in (texts, held))
    return texts, held, own, chance
