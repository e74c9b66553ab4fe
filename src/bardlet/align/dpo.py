"""Direct preference optimization as a stage: which of two answers people prefer, learned without a reward model.

Rafailov et al. (2023), *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*. The reference
is the model that the run begins with; its log p of every answer is computed once. The names are those of `pretrain.py`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import checkpoint, data, examples, files, hf, loss, pretrain, report
from bardlet import train as training
from bardlet.align import base, chat, preferences
from bardlet.align.packing import PARTS
from bardlet.align.preferences import PairBatches, Pairs, PreparedPairs
from bardlet.config import FINE, TrainConfig
from bardlet.corpus import cache_folder
from bardlet.data import Progress
from bardlet.dist import Dist, autocast
from bardlet.errors import BardletError
from bardlet.examples import Examples
from bardlet.generate import evaluating
from bardlet.tokenizer import Tokenizer
from bardlet.train import Stage, Trainer

log = logging.getLogger("bardlet")

AT_ONCE = 8
"""Pairs that go through the model at once where nothing is learned."""
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
    return examples.find(config)


def prepare(found: Examples, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: Progress | None = None) -> Prepared:
    """The preferences as tokens, and the reference's log p of each answer; both are kept in the cache.

    Raises:
        BardletError: the model that the run began with is not there any more, or is another.
    """
    if words is None or config.init is None:
        raise BardletError("preferences are learned by a model that answers already: name it with --init DIR")
    pairs = preferences.prepare(found, words, dist, progress)
    known = files.sha256(files.inside(Path(config.init), "model.safetensors"))
    key = hashlib.sha256(f"{found.hash} {words.hash} {known} {config.block_size} {config.dtype}".encode()).hexdigest()
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-reference-{key[:16]}"

    def build(whole: Path) -> None:
        model, _ = hf.read_folder(Path(str(config.init)))
        model.to(dist.device)
        for part in PARTS:
            if progress:
                progress(f"reference, {part}", 0, None)
            np.save(whole / f"{part}.npy", reference(model, getattr(pairs, part), config, dist))
        files.seal(whole, [f"{part}.npy" for part in PARTS])

    def read(made: Path) -> tuple[np.ndarray, np.ndarray]:
        data.check(made)
        train, val = (np.load(made / f"{part}.npy") for part in PARTS)
        return train, val

    with dist.main_first():
        return Prepared(pairs, *data.cached(folder, build, read), known)


@torch.no_grad()
def reference(model: Any, pairs: Pairs, config: TrainConfig, dist: Dist) -> np.ndarray:
    """log p of both answers of each pair: (N, 2) float32; 0 for a pair that does not fit into the window."""
    made = np.zeros((len(pairs), 2), np.float32)
    with evaluating(model):
        for which, logp_B2 in _log_probabilities(model, _batches(pairs, config), config, dist):
            made[which] = logp_B2.numpy()
    return made


def _batches(pairs: Pairs, config: TrainConfig) -> PairBatches:
    return PairBatches(pairs, config.block_size, AT_ONCE, 0, pad=0)


def _log_probabilities(model: Any, batches: PairBatches, config: TrainConfig,
                       dist: Dist) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """(numbers of some pairs, log p of both answers of each, (B, 2) on the CPU), until all have come."""
    for which in batches.all():
        batch = {name: dist.put(x) for name, x in batches.of(which).items()}
        with autocast(config.dtype, dist.device):
            yield which, loss.pair_log_probability(model, batch).cpu()


def parts(ready: Prepared, config: TrainConfig) -> tuple[tuple[Pairs, np.ndarray], tuple[Pairs, np.ndarray]]:
    """((training pairs, reference), (held-out pairs, reference)). The development split ends the training part."""
    train = ready.pairs.train
    if config.val_part == "val":
        return (train, ready.train_reference), (ready.pairs.val, ready.val_reference)
    cut = int(0.9 * len(train))
    first, rest = slice(cut), slice(cut, None)
    return (train.part(first), ready.train_reference[first]), (train.part(rest), ready.train_reference[rest])


@dataclass(frozen=True)
class Figures:
    """Of held-out pairs: the loss, the share in which the chosen answer has the greater reward, and by how much it has.

    The reward is beta log(policy / reference).
    """

    loss: float
    accuracy: float
    margin: float


@torch.no_grad()
def measure(model: Any, pairs: Pairs, reference_N2: np.ndarray, config: TrainConfig, dist: Dist,
            most: int = 0) -> Figures:
    """The figures of a model in eval mode; most: of so many pairs, evenly spread (0: of all)."""
    batches = _batches(pairs, config)
    every = -(-len(batches.kept) // most) if most else 1
    batches.kept = batches.kept[::every]
    rewards = [config.beta * (policy_B2 - torch.from_numpy(reference_N2[which])).double()
               for which, policy_B2 in _log_probabilities(model, batches, config, dist)]
    if not rewards:
        return Figures(math.nan, math.nan, math.nan)
    chosen, rejected = torch.cat(rewards).unbind(1)
    value = loss.bradley_terry(chosen, rejected).item() / len(chosen)
    return Figures(value, (chosen > rejected).double().mean().item(), (chosen - rejected).mean().item())


def preference_stage(ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Stage:
    """Batches of pairs, DPO's loss, and that of the held-out pairs as evaluation."""
    (learned, known), (held, held_known) = parts(ready, config)
    batches = PairBatches(learned, config.block_size, config.batch_size * config.grad_accum, config.seed,
                          int(ready.tokenizer.pad_id or 0), config.grad_accum * dist.world)
    for pairs, what in ((learned, "pair of answers"), (held, "held-out pair of answers")):
        if not len(_batches(pairs, config).kept):
            raise BardletError(f"{record['text']}: no {what} fits into the model's window of {config.block_size} "
                               "tokens, with its question; take a model with a longer one")
    record["batches"], record["left_out"] = batches.batches_per_epoch, batches.left_out
    reference_N2 = torch.from_numpy(np.array(known)).to(dist.device)
    most = config.eval_tokens // (2 * config.block_size)

    def learn(model: Any, batch: loss.Batch) -> torch.Tensor:
        real_B = (batch["target"] != loss.IGNORE).flatten(1).any(1)
        policy_B2, reference_B2 = loss.pair_log_probability(model, batch), reference_N2[batch["number"]]
        both = zip(policy_B2[real_B].unbind(1), reference_B2[real_B].unbind(1), strict=True)
        (chosen_B, known_chosen_B), (rejected_B, known_rejected_B) = both
        return loss.dpo(chosen_B, rejected_B, known_chosen_B, known_rejected_B, config.beta)

    def evaluate(model: Any) -> float:
        return measure(model, held, held_known, config, dist, most).loss

    return Stage(batches.batch, learn, count_pairs, evaluate, batches.place, batches.widest)


def count_pairs(batch: loss.Batch) -> int:
    """How many pairs of a batch have answers."""
    return int((batch["target"] != loss.IGNORE).flatten(1).any(1).sum())


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, Prepared]:
    """A model that answers, preferences and optimizers: a run that has not begun. Arguments: `pretrain`'s."""
    if out is not None:
        checkpoint.new_folder(Path(out), "")  # before the long part
    model, words, config = base.begin(config, dist, given, {} if run else FINE["dpo"], in_file)
    if words.chat_template != chat.TEMPLATE:
        log.warning("%s has not learned to answer yet: `bardlet sft` first makes the better start", config.init)
    words.chat_template = chat.TEMPLATE
    found = find(config)
    ready = prepare(found, config, words, dist, progress)
    (learned, _), (held, _) = parts(ready, config)
    run = run or checkpoint.new_folder(Path(out) if out else None, f"{found.name}-dpo")
    record: dict[str, Any] = {
        "text": found.name, "text_hash": found.hash, "tokenizer": words.kind, "documents": len(learned),
        "tokens": int(sum(side.answer.sum() for side in learned.sides)), "minutes": config.minutes,
        "guessing": round(math.log(2), 4)}
    t = assemble(run, model, ready, config, dist, record)
    record["longer"] = round(longer(held, config), 4)
    if config.steps is None and config.minutes is None:  # once is the habit: twice is soon too much
        t.config = replace(t.config, steps=record["batches"])
        t.state.steps = record["batches"]
    return t, ready


def assemble(run: Path, model: Any, ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any],
             resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the preferences, settings resolved. Arguments: `pretrain`'s."""
    if record.setdefault("base_hash", ready.base_hash) != ready.base_hash:
        raise BardletError(f"{config.init}: is not the model any more that the run began with, which is its reference; "
                           "put it back")
    make = partial(preference_stage, ready, dist=dist, record=record)
    return pretrain.trainer(run, model, make, config, dist, record, resumed)


def longer(held: Pairs, config: TrainConfig) -> float:
    """The share of the pairs that fit into the window in which the chosen answer has more tokens; equal counts half."""
    kept = _batches(held, config).kept
    chosen, rejected = (side.ends[kept] - side.starts[kept] for side in held.sides)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def said(t: Trainer, ready: Prepared) -> tuple[list[str], float]:
    """What a plan says of the preferences, in lines, and how often the planned steps read them."""
    r, held = t.record, len(parts(ready, t.config)[1][0])
    lines = [f"preferences: {r['text']}, {r['documents']:,} to learn from, {held:,} held out",
             f"reference: {t.config.init}; the longer answer is the chosen one in {r['longer']:.1%} of those held out"]
    if r["left_out"]:
        lines.append(f"left out, longer than the window of {t.config.block_size} tokens: {r['left_out']:,}")
    return lines, t.state.steps / r["batches"]


def expect(t: Trainer, ready: Prepared) -> None:
    """Nobody knows what loss to expect of a preference."""


def results(facts: dict[str, Any]) -> list[str]:
    """What a finished run has come to, in lines."""
    beats = "better than" if facts["accuracy"] > facts["longer"] else "no better than"
    return [f"held-out pairs: the chosen answer has the greater reward in {facts['accuracy']:.1%} (by "
            f"{facts['margin']:.3f} on average), {beats} taking the longer answer, {facts['longer']:.1%}"]


def conclude(t: Trainer, ready: Prepared) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curve, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with the accuracy on held-out pairs; some answers.
    """
    held, known = parts(ready, t.config)[1]
    report.loss_curve(t.run, report.title(t.run, t.record), "DPO's loss (nats per pair)")
    model, words = hf.read_folder(t.run)
    model.to(t.dist.device)
    found = measure(model.eval(), held, known, t.config, t.dist)
    t.record.update(accuracy=round(found.accuracy, 4), margin=round(found.margin, 4))
    first = [held.chosen.tokens[a:b][: int(held.chosen.answer[a:b].argmax())] for a, b in
             list(zip(held.chosen.starts, held.chosen.ends, strict=True))[:: max(1, len(held) // SHOWN)]]
    asked = [ids for ids in first if len(ids) < t.config.block_size // 2][:SHOWN]
    made = chat.answers(model, words, asked, **chat.SAMPLING)
    sample = "\n\n".join(f"{words.decode(ids.tolist())}\n  -> {answer}" for ids, (answer, _) in
                         zip(asked, made, strict=True))
    t.record["finished"] = True
    facts = training.write_run(t)
    report.preference_card(t.run, t.config, facts, sample)
    return facts, sample
