"""The folders of models, and their names. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bardlet.config.pretraining import TranslationConfig
from bardlet.config.stages import config_class
from bardlet.config.toml import settings_in
from bardlet.errors import BardletError, neutral

DEPTH = 3
"""Levels below a folder like runs/ at which a model is found, as in `bardlet runs`."""
SKIPPED = ("checkpoints",)


def find(roots: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each model, by name: each root that is a model, and the models below the other roots.

    A name is the last part of the path, with the part before it if others have the same; then they are numbered.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        path = Path(root).resolve()
        folders.update(dict.fromkeys([path] if is_model(path) else sorted(_below(path, DEPTH))))
    endings = {folder: _endings(folder) for folder in folders}
    count = Counter(ending for each in endings.values() for ending in each)
    names: dict[str, Path] = {}
    for folder, each in endings.items():
        name = next((ending for ending in each[:2] if count[ending] == 1), each[0])
        number = next(n for n in range(1, len(folders) + 2) if (f"{name}-{n}" if n > 1 else name) not in names)
        names[f"{name}-{number}" if number > 1 else name] = folder
    return names


def is_model(folder: Path) -> bool:
    """Return True for a run, and for a model as Hugging Face has it."""
    return (folder / "config.json").is_file() or (folder / "run.toml").is_file()


def facts(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json; empty if it cannot be read."""
    return _object(folder / "config.json")


def generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's generation_config.json; empty if it cannot be read."""
    return _object(folder / "generation_config.json")


def is_reward_model(folder: Path) -> bool:
    """Return True for a model that scores texts, with a number in place of a head over the vocabulary."""
    kinds = facts(folder).get("architectures")
    return isinstance(kinds, list) and any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def context(folder: Path) -> int | None:
    """Return the tokens of a model's context window, if its config.json says it."""
    values = facts(folder)
    sizes = [values.get(name) for name in ("n_positions", "max_position_embeddings", "block_size")]
    return next((size for size in sizes if type(size) is int), None)


def has_chat_template(folder: Path) -> bool:
    """Return True if a model says how to write a conversation for it."""
    return (folder / "chat_template.jinja").is_file() or "chat_template" in _object(folder / "tokenizer_config.json")


def translates(folder: Path) -> bool:
    """Return True for an encoder-decoder, and for a run that trained on sentence pairs."""
    if facts(folder).get("is_encoder_decoder"):
        return True
    try:
        return config_class(settings_in(folder / "run.toml")) is TranslationConfig
    except BardletError:
        return False


def created(folder: Path) -> int:
    """Return the time of the last change of a model's weights, in seconds since 1970."""
    for name in ("model.safetensors", "config.json", "run.toml"):
        try:
            return int((folder / name).stat().st_mtime)
        except OSError:
            continue
    return 0


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weight files."""
    sizes = 0
    for path in folder.glob("model*.safetensors"):
        try:
            sizes += path.stat().st_size
        except OSError:
            continue
    return sizes


def stamp(folder: Path) -> tuple[Any, ...]:
    """Return a value that changes when the weights to serve change: new ones, or a new checkpoint of a run in progress.
    """
    try:
        status = (folder / "model.safetensors").stat()
        weights: tuple[Any, ...] = (status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        weights = ()
    return (*weights, newest_step(folder) if (folder / ".lock").exists() else None)


def newest_step(folder: Path) -> str | None:
    """Return the name of a run's newest checkpoint."""
    try:
        return max((name for name in os.listdir(folder / "checkpoints") if name.startswith("step-")), default=None)
    except OSError:
        return None


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the models below a folder; links are not followed, since they could lead in circles."""
    try:
        with os.scandir(folder) as entries:
            inside = [Path(entry.path) for entry in entries if entry.name not in SKIPPED
                      and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in inside:
        if is_model(path):
            yield path
        if depth > 1:
            yield from _below(path, depth - 1)


def _shown(part: str) -> str:
    """Return a part of a path as text that JSON and a terminal can show."""
    return neutral(part.encode("utf-8", "surrogateescape").decode("utf-8", "replace")).replace("\n", "\ufffd")


def _endings(folder: Path) -> list[str]:
    """Return the ends of a path, the shortest first: ["x", "a/x", ...]."""
    parts = [_shown(part) for part in folder.parts[1:]] or ["model"]
    return ["/".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 22:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
