"""`bardlet export`: read a model, check that the format can hold it, write."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bardlet import tokenizer as tokenization
from bardlet.config.pretraining import TranslationConfig
from bardlet.config.settings import Settings
from bardlet.errors import BardletError, printable, quoted
from bardlet.evaluation import memorization
from bardlet.export import gguf, html, onnx
from bardlet.run import card, hf
from bardlet.run import folder as run_folder
from bardlet.runtime import atomic
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

DTYPES = {"hf": ("fp32",), "gguf": gguf.DTYPES, "html": html.DTYPES, "onnx": ("fp32",)}
"""The formats, and the precisions of each; the first is the default."""
SUFFIXES = {"hf": "-hf", "gguf": ".gguf", "html": ".html", "onnx": "-onnx"}
"""Suffix that the default name of an export adds to the name of the model."""
CHECKED_TOKENS = 5_000
"""Tokens that the memorization check generates."""


@dataclass(frozen=True)
class Source:
    """A model to be exported. documents: of its training text. starts_documents, translates: see `api.models.Model`.

    config, record: of the run that trained it; None, {}: it is no run.
    """

    folder: Path
    model: Any
    tokenizer: Tokenizer
    documents: int = 2
    starts_documents: bool = False
    translates: bool = False
    config: Settings | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def export(folder: Path, to: str, out: Path | None = None, dtype: str | None = None,
           tell: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Export the model in `folder`, and return the files or the folder that were written.

    Args:
        to: html, gguf, onnx or hf.
        out: the file, for onnx and hf the folder; it must not exist yet. None: the name of the model, here.
        dtype: one of DTYPES[to]; None: the first.
        tell: called with what the owner should know before others get the model, as a line.

    Raises:
        BardletError: the format cannot hold such a model, or something is in the way.
    """
    if to not in DTYPES:
        raise BardletError(f"--to {to}: must be one of {', '.join(DTYPES)}")
    if dtype not in (None, *DTYPES[to]):
        raise BardletError(f"--dtype {dtype}: must be {', '.join(DTYPES[to][:-1])}{' or ' * (len(DTYPES[to]) > 1)}"
                           f"{DTYPES[to][-1]} for --to {to}")
    out = out or Path(name_of(folder) + SUFFIXES[to])
    if out.exists():
        raise BardletError(f"{out}: exists already; {'remove it, or ' * out.is_file()}choose another --out")
    if not out.absolute().parent.is_dir():
        raise BardletError(f"{out.parent}: no such folder; make it with: mkdir -p {quoted(out.parent)}")
    source = read(folder)
    if notice := unfinished(source):
        log.warning("%s", notice)
    if to in ("gguf", "onnx") and getattr(source.config, "prefix_lm", False):
        raise BardletError(f"--to {to}: this model reads its source in both directions (--prefix-lm), which other "
                           "programs do not; translate with `bardlet translate`")
    precision = dtype or DTYPES[to][0]
    if to == "hf":
        written = [write_folder(out, source)]
    elif to == "onnx":
        onnx.check(source.model)
        written = [write_folder(out, source, weights=False)]
    elif to == "gguf":
        written = write_gguf(out, source, precision)
    else:
        return [write_page(out, source, precision, tell)]
    if source.config is not None:
        tell("whoever gets the model can make it repeat its training data; "
             f"`bardlet doctor {quoted(folder)} --memorised` says how much it copies")
    return written


def read(folder: Path) -> Source:
    """Read a run folder or a model of Hugging Face."""
    scores = hf.read_model_config(folder).scores
    model, tokenizer = hf.read_folder(folder, scores=scores)
    source = Source(folder, model, tokenization.with_stand_in(tokenizer), translates=model.config.model == "encdec")
    if not (folder / "run.toml").exists():
        return source
    config, record = run_folder.settings(folder, use_edited=True)
    return replace(source, **run_folder.prompt_facts(config, record, model.config.block_size), config=config,
                   record=record, translates=isinstance(config, TranslationConfig))


def unfinished(source: Source) -> str:
    """Return a notice if a model comes from a run that is not finished, else an empty string."""
    config, record = source.config, source.record
    if config is None or record.get("finished"):
        return ""
    steps = config.replans[-1][1] if config.replans else config.steps
    step = record.get("selected_step") or 0
    return (f"{source.folder}: the run is not finished; its weights are of step {step:,} of {steps or 0:,}; "
            f"`bardlet resume {quoted(source.folder)}` finishes it")


def name_of(folder: Path) -> str:
    """Return the name of a model: of its folder, in the Hub's cache of the model, not of the commit."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--"):
        return whole.parents[1].name.rpartition("--")[2]
    return whole.name


def write_folder(out: Path, source: Source, weights: bool = True) -> Path:
    """Write a folder without checkpoints, logs and settings: what the Hub and other libraries need, and a run's card.

    weights: write model.safetensors; otherwise onnx/model.onnx, where transformers.js looks for it.
    """
    out.mkdir()
    try:
        hf.write_folder(out, source.model, source.tokenizer)
        if weights:
            hf.write_weights(out, source.model.hf_state_dict())
        else:
            (out / "onnx").mkdir()
            onnx.write(out / "onnx" / "model.onnx", source.model)
            onnx.write_tokenizer(out, source.tokenizer)
        _write_card(out, source, onnx=not weights)
    except BaseException:
        atomic.remove_folder(out)
        raise
    return out


def _write_card(out: Path, source: Source, onnx: bool) -> None:
    """Write the card with its pictures; that of a model of another tool only beside its own weights."""
    if onnx and source.config is None:
        return
    for name in ("README.md", "loss.png", "margins.png"):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
    if source.config is not None and not (out / "README.md").exists():
        log.warning("%s: has no model card (README.md) yet; a finished run has one", source.folder)
    elif source.config is not None:
        path = out / "README.md"
        text = path.read_text(encoding="utf-8")
        atomic.write_text(path, card.for_export(text, source.config, source.record, onnx))


def write_gguf(out: Path, source: Source, dtype: str) -> list[Path]:
    """Write a GGUF file, and beside it a Modelfile for Ollama."""
    modelfile = out.with_name(f"{out.stem}.Modelfile")
    if out == modelfile:
        raise BardletError(f"{out}: is the name of the file for Ollama, which is written beside; name a file like "
                           f"{out.stem}.gguf")
    if modelfile.exists():
        raise BardletError(f"{modelfile}: exists already, and an export writes it; remove it, or choose another --out")
    if not out.name.isprintable():
        raise BardletError(f"{printable(out.name)}: a Modelfile cannot name such a file; choose another --out")
    if "NFC" in gguf.normalizers(source.tokenizer):
        log.warning("the model composes accents in what it reads (NFC), and llama.cpp does not: give it composed text")
    gguf.write(out, source.model, source.tokenizer, name_of(source.folder), dtype, source.starts_documents)
    context = source.model.config.block_size
    try:
        atomic.write_text(modelfile, gguf.modelfile(out.name, source.tokenizer, context, source.translates))
    except BaseException:
        out.unlink()  # so that the same command works again
        raise
    return [out, modelfile]


def write_page(out: Path, source: Source, dtype: str, tell: Callable[[str], None]) -> Path:
    """Write the page, and tell first what share of the model's writing is copied from its training text."""
    if source.translates and source.model.config.model != "encdec":
        raise BardletError("--to html: the page translates with encoder-decoders only; use --to hf")
    html.check(source.model, source.tokenizer, dtype)
    tell(copied(source))
    trained = ", trained with bardlet" * (source.config is not None)
    notes = [f"{source.model.config.model}, {sum(p.numel() for p in source.model.parameters()):,} parameters{trained}. "
             "It runs in this page, on your device: nothing is sent anywhere. What it writes is made up."]
    html.write(out, source.model, source.tokenizer, {"title": name_of(source.folder), "notes": notes},
               start=html.Start(source.documents, source.starts_documents), dtype=dtype)
    return out


def copied(source: Source) -> str:
    """Return a line on how much of the model's writing is copied, so that a private text is not sent unknowingly."""
    if source.config is None:
        return "the page contains the model, which may repeat what it was trained on"
    try:
        measured = memorization.measure(source.folder, CHECKED_TOKENS, 0.8, 0)
    except BardletError as error:
        return f"how much the model copies from its training data is unknown: {error}"
    return f"memorization: {measured}; whoever has the page can make the model repeat its training data"
