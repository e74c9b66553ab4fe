"""Replay: continue with a new text without forgetting the old one, the text that --init was trained on.

A share of the rows of each batch comes from the old text (`data/replay.py`), and evaluations measure the loss on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bardlet.config.pretraining import TrainConfig
from bardlet.config.settings import as_typed
from bardlet.data import corpus, rows
from bardlet.data.corpus import Corpus
from bardlet.data.replay import Mixture
from bardlet.data.text import inner_suffix
from bardlet.data.windows import Windows
from bardlet.errors import BardletError
from bardlet.run import folder
from bardlet.run.record import TextRecord
from bardlet.training.state import Objective, Trainer
from bardlet.training.trainer import evaluate


def find(config: TrainConfig) -> dict[str, Any]:
    """Return the old text of a new run: its name, hash, and the arguments that find it (`record.replay`).

    Raises:
        BardletError: it is unknown, missing, or changed since --init was trained on it.
    """
    setting, base = f"--replay {as_typed(config.replay)}", Path(config.init or "")
    if config.replay_text is not None:
        has_rows = inner_suffix(Path(config.replay_text)) in rows.SUFFIXES
        text = corpus.find([config.replay_text], config.field if has_rows else "text", separator=config.separator,
                           normalize=config.normalize)
        return _entry(text, [config.replay_text], config.separator)
    if not (base / "run.toml").exists():
        raise BardletError(f"{setting}: {base} does not say which text it was trained on; name a text with "
                           "--replay-text TEXT")
    trained, record = folder.read_run(base)
    if not isinstance(trained, TrainConfig):
        raise BardletError(f"{setting}: {base} was not trained on a plain text; name a text with --replay-text TEXT")
    try:
        text = corpus.find(trained.text, trained.field, separator=trained.separator, normalize=trained.normalize)
    except BardletError as error:
        raise BardletError(f"{setting}: the text of {base} cannot be read ({error}); run the command in the folder "
                           "where that run was started, or name the text with --replay-text TEXT") from None
    if text.hash != record.get("text_hash"):
        raise BardletError(f"{setting}: the text {text.name} changed since {base} was trained on it; restore it, or "
                           "name a text with --replay-text TEXT")
    return _entry(text, list(trained.text), trained.separator)


def _entry(text: Corpus, arguments: list[str], separator: str) -> dict[str, Any]:
    entry = {"name": text.name, "hash": text.hash, "text": arguments, "field": text.field, "separator": separator}
    return entry | ({"normalize": text.normalize} if text.normalize else {})


def load(entry: Mapping[str, Any]) -> Corpus:
    """Return the corpus of `record.replay`. Raise BardletError if it cannot be read."""
    try:
        return corpus.find([str(name) for name in entry["text"]], str(entry["field"]),
                           separator=str(entry["separator"]), normalize=entry.get("normalize"))
    except BardletError as error:
        raise BardletError(f"the old text of --replay cannot be read ({error}); restore it; relative paths start at "
                           "the folder where the run was started") from None
    except (KeyError, TypeError):
        raise BardletError("run.toml: record.replay is damaged; restore a copy of the file") from None


def changed_text(record: Mapping[str, Any]) -> str | None:
    """Return the name of a run's old text if it changed since the run started, else None."""
    entry = record.get("replay")
    if not isinstance(entry, Mapping):
        return None
    text = load(entry)
    return text.name if text.hash != entry.get("hash") else None


class Replay:
    """The old text of a run, as tokens.

    Args:
        name: its name.
        train: its training tokens.
        loss: returns the loss of a model on its held-out tokens.
    """

    def __init__(self, name: str, train: np.ndarray, loss: Callable[[Any], float]) -> None:
        self.name, self.train, self.loss = name, train, loss
        self.latest: dict[str, float] = {}

    def mix(self, objective: Objective, new: Windows, share: float) -> Objective:
        """Return an objective with a share of old rows in each batch, which evaluates on the old text, too."""
        try:
            old = Windows(self.train, new.block_size, new.batch_size, new.seed)
        except BardletError as error:
            raise BardletError(f"--replay: {self.name}: {error}") from None
        mixture = Mixture(new, old, share)

        def evaluate_both(model: Any) -> float:
            value = objective.evaluate(model)
            self.latest = {"old_val_loss": self.loss(model)}
            return value

        return replace(objective, batch=mixture.batch, describe_batch=mixture.describe_batch, evaluate=evaluate_both,
                       evaluation_metadata=lambda: self.latest)


def evaluate_before(trainer: Trainer) -> None:
    """Record the losses on both texts before training."""
    before = evaluate(trainer)
    old = trainer.objective.evaluation_metadata()["old_val_loss"]
    trainer.record.update(val_loss_before=before, old_val_loss_before=old)


def describe(config: TrainConfig, record: TextRecord) -> list[str]:
    """Return the plan's line about the old text."""
    name = (record.replay or {}).get("name")
    share = f"{100 * config.replay:g} % of each batch" if config.replay else "nothing"
    return [f"replay: {share} from the old text, {name}; validation loss before training "
            f"{record.val_loss_before:z.4f} on {record.text}, {record.old_val_loss_before:z.4f} on {name}"]


def results(record: TextRecord) -> list[str]:
    """Return the result lines of a finished run: both losses before training, the old text's after it."""
    name = (record.replay or {}).get("name")
    return [f"on the old text, {name}: {record.old_val_loss:z.4f} {record.loss_unit}, "
            f"{record.old_val_loss_before:z.4f} before training; on {record.text} {record.val_loss_before:z.4f} before"]
