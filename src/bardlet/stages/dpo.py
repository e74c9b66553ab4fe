"""Direct preference optimization as a stage: which of two answers people prefer, learned without a reward model.

Rafailov et al. (2023), *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*. The reference
is the model that the run begins with; its log p of every answer is computed once. The names are those of
`stages/pretrain.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.config.settings import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.data import preferences as data_preferences
from bardlet.data import records, shards
from bardlet.data.corpus import cache_folder
from bardlet.data.packing import PARTS
from bardlet.data.preferences import Pairs, PreparedPairs
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.inference import answers
from bardlet.inference.generate import evaluating
from bardlet.run import card, hf, plots
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.stages import base, preference
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, logprobs, losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

SHOWN = 3
"""Held-out questions that a finished run answers on its card."""


@dataclass(frozen=True)
class Prepared:
    """Preferences as tokens, and log p of their answers by the reference: (N, 2) float32 of both parts."""

    pairs: PreparedPairs
    train_reference: np.ndarray
    val_reference: np.ndarray
    base_hash: str
    """sha256 (hex) of the reference's weights."""

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the model."""
        return self.pairs.tokenizer


def find(config: TrainConfig) -> Examples:
    """The preferences that the settings name."""
    return records.find(config)


def prepare(found: Examples, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: Progress | None = None) -> Prepared:
    """The preferences as tokens, and the reference's log p of each answer; both are kept in the cache.

    Raises:
        BardletError: the model that the run began with is not there any more, or is another.
    """
    if words is None or config.init is None:
        raise BardletError("preferences are learned by a model that answers already: name it with --init DIR")
    pairs = data_preferences.prepare(found, words, dist, progress)
    known = hf.weights_hash(Path(config.init))
    parts_of_key = (data_preferences.key(found, words), known, str(config.block_size), config.dtype, dist.device.type)
    key = hashlib.sha256(" ".join(parts_of_key).encode()).hexdigest()
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-reference-{key[:16]}"

    def build(whole: Path) -> None:
        model, _ = hf.read_folder(Path(str(config.init)))
        model.to(dist.device)
        for part in PARTS:
            if progress:
                progress(f"reference, {part}", 0, None)
            np.save(whole / f"{part}.npy", reference(model, getattr(pairs, part), config, dist))
        manifest.seal(whole, [f"{part}.npy" for part in PARTS])

    def read(made: Path) -> tuple[np.ndarray, np.ndarray]:
        shards.check(made)
        train, val = (np.load(made / f"{part}.npy") for part in PARTS)
        return train, val

    with dist.main_first():
        return Prepared(pairs, *shards.cached(folder, build, read), known)


def reference(model: Any, pairs: Pairs, config: TrainConfig, dist: Dist) -> np.ndarray:
    """log p of both answers of each pair: (N, 2) float32; 0 for a pair that does not fit into the window."""
    made = np.zeros((len(pairs), 2), np.float32)
    with evaluating(model):
        which, logp_N2 = preference.measured(partial(logprobs.pair_log_probability, model), pairs, config, dist)
    made[which] = logp_N2.numpy()
    return made


def parts(ready: Prepared, config: TrainConfig) -> tuple[tuple[Pairs, np.ndarray], tuple[Pairs, np.ndarray]]:
    """((training pairs, reference), (held-out pairs, reference)). The development split ends the training part."""
    learned, held = preference.parts(ready.pairs, config)
    known, rest = ready.train_reference[: len(learned)], ready.train_reference[len(learned) :]
    return (learned, known), (held, ready.val_reference if config.val_part == "val" else rest)


def rewards(model: Any, pairs: Pairs, reference_N2: np.ndarray, config: TrainConfig, dist: Dist,
            most: int = 0) -> torch.Tensor:
    """beta log(policy / reference) of both answers of the pairs by a model in eval mode: (N, 2) float64."""
    which, policy_N2 = preference.measured(partial(logprobs.pair_log_probability, model), pairs, config, dist, most)
    return config.beta * (policy_N2 - torch.from_numpy(reference_N2[which]))


def preference_objective(ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Batches of pairs, DPO's loss, and that of the held-out pairs as evaluation."""
    (learned, known), (held, held_known) = parts(ready, config)
    batches = preference.batches(learned, held, int(ready.tokenizer.pad_id or 0), config, dist, record)
    reference_N2 = torch.from_numpy(np.array(known)).to(dist.device)
    most = preference.looked_at(config)

    def learn(model: Any, batch: data_batch.Batch) -> torch.Tensor:
        real_B = batch["length"][:, 0] > 0
        policy_B2, reference_B2 = logprobs.pair_log_probability(model, batch), reference_N2[batch["number"]]
        both = zip(policy_B2[real_B].unbind(1), reference_B2[real_B].unbind(1), strict=True)
        (chosen_B, known_chosen_B), (rejected_B, known_rejected_B) = both
        return losses.dpo(chosen_B, rejected_B, known_chosen_B, known_rejected_B, config.beta)

    def evaluate(model: Any) -> float:
        return preference.figures(rewards(model, held, held_known, config, dist, most)).loss

    return Objective(batches.batch, learn, data_preferences.count, evaluate, batches.place, batches.widest)


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, Prepared]:
    """A model that answers, preferences and optimizers: a run that has not begun. Arguments: `pretrain`'s."""
    model, words, config = base.begin(config, dist, out, given, in_file, run)
    found = find(config)
    ready = prepare(found, config, words, dist, progress)
    (learned, _), (held, _) = parts(ready, config)
    record = preference.record(found, words, learned, held, config)
    t = assemble(base.folder(run, out, f"{found.name}-dpo"), model, ready, config, dist, record)
    base.plan(t, 1)  # the habit: twice is soon too much
    return t, ready


def assemble(run: Path, model: Any, ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any],
             resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the preferences, settings resolved. Arguments: `pretrain`'s."""
    base.same(config, record, ready.base_hash)
    make = partial(preference_objective, ready, dist=dist, record=record)
    return base.trainer(run, model, make, config, dist, record, resumed)


def said(t: Trainer, ready: Prepared) -> tuple[list[str], float]:
    """What a plan says of the preferences, in lines, and how often the planned steps read them."""
    return preference.said(t, len(parts(ready, t.config)[1][0]), f"reference: {t.config.init}")


def expect(t: Trainer, ready: Prepared) -> None:
    """Nobody knows what loss to expect of a preference."""


results = preference.results


def conclude(t: Trainer, ready: Prepared) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curve, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with the accuracy on held-out pairs; some answers.
    """
    held, known = parts(ready, t.config)[1]
    plots.loss_curve(t.run, card.title(t.run, t.record), "DPO's loss (nats per pair)")
    model, words = hf.read_folder(t.run)
    model.to(t.dist.device)
    found = preference.figures(rewards(model, held, known, t.config, t.dist))
    t.record.update(accuracy=round(found.accuracy, 4), margin=round(found.margin, 4))
    first = [held.chosen.tokens[a:b][: int(held.chosen.answer[a:b].argmax())] for a, b in
             list(zip(held.chosen.starts, held.chosen.ends, strict=True))[:: max(1, len(held) // SHOWN)]]
    asked = [ids for ids in first if len(ids) < t.config.block_size // 2][:SHOWN]
    made = answers.answers(model, words, asked, **answers.SAMPLING)
    sample = "\n\n".join(f"{words.decode(ids.tolist())}\n  -> {answer}" for ids, (answer, _) in
                         zip(asked, made, strict=True))
    t.record["finished"] = True
    facts = checkpointing.write_run(t)
    card.preference_card(t.run, t.config, facts, sample)
    return facts, sample
