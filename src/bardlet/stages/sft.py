"""Supervised fine-tuning as a stage: a base learns to answer, by the names that `stages/pretrain.py` has, too.

Conversations are written by the one chat template, and the loss is taken on the words of the answers and the token that
ends each. Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bardlet.config.settings import TrainConfig
from bardlet.data import batch, chat_template, records, shards
from bardlet.data.corpus import cache_folder
from bardlet.data.packing import PARTS, ChatBatches, Chats
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import answers
from bardlet.inference.generate import evaluating
from bardlet.run import card, hf, plots
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.stages import base
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, losses
from bardlet.training.state import Objective, Trainer

EPOCHS = 3
"""How often the conversations are read where neither --steps nor --minutes says it."""
VERSION = 4
ASKED, SHOWN = 50, 3
"""Held-out conversations, evenly spread, whose first answer a finished run gives; and those on its card."""


@dataclass(frozen=True)
class PreparedChats:
    """Conversations as tokens. leaked: the share of those held out that are in the training part word for word."""

    train: Chats
    val: Chats
    tokenizer: Tokenizer
    leaked: float


def find(config: TrainConfig) -> Examples:
    """The conversations that the settings name."""
    return records.find(config)


def prepare(found: Examples, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: Progress | None = None) -> PreparedChats:
    """The conversations as tokens by the tokenizer of the base; rank 0 makes them, the others read what it made."""
    if words is None:
        raise BardletError("conversations are learned by a model that has read text before: name it with --init DIR")
    key = hashlib.sha256(f"{found.hash} {words.hash} {chat_template.TEMPLATE} {VERSION}".encode()).hexdigest()
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-chat-{key[:16]}"
    with dist.main_first():
        return shards.cached(folder, lambda whole: _build(found, words, whole, progress),
                             lambda made: _open(made, words))


def _build(found: Examples, words: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Writes the arrays of both parts and prepared.json into an empty folder."""
    both, names, marks = found.conversations(), ["prepared.json"], chat_template.marks_of(words)
    for part, conversations in zip(PARTS, both, strict=True):
        rows = []
        for number, messages in enumerate(conversations):
            if progress and number % 1000 == 0:
                progress(f"tokens, {part}", number, len(conversations))
            rows.append(chat_template.encode(words, messages, marks=marks))
        names += Chats.of(rows, words.dtype).save(folder, part)
    known = set(map(records.said, both[0]))
    leaked = sum(records.said(messages) in known for messages in both[1]) / len(both[1])
    (folder / "prepared.json").write_text(json.dumps({"leaked": round(leaked, 4)}) + "\n", encoding="utf-8")
    manifest.seal(folder, names)


def _open(folder: Path, words: Tokenizer) -> PreparedChats:
    shards.check(folder)
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    train, val = (Chats.load(folder, part) for part in PARTS)
    return PreparedChats(train, val, words, facts["leaked"])


def parts(ready: PreparedChats, config: TrainConfig) -> tuple[Chats, Chats]:
    """(training, held-out) conversations. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return ready.train, ready.val
    cut = int(0.9 * len(ready.train))
    return ready.train.part(slice(cut)), ready.train.part(slice(cut, None))


def chat_objective(ready: PreparedChats, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Rows of conversations, the loss on their answers, and that of the held-out ones as evaluation."""
    learned, held = parts(ready, config)
    pad = int(ready.tokenizer.pad_id or 0)
    batches = ChatBatches(learned, config.block_size, config.batch_size * config.grad_accum, config.seed, pad,
                          config.grad_accum * dist.world, config.pack)
    if not batches.number_of_rows:
        raise BardletError(f"{record['text']}: no conversation has an answer that ends within the window of "
                           f"{config.block_size} tokens; take a larger --block-size, or a base with a longer window")
    look_at = held_out(held, config, pad)
    if not look_at:
        raise BardletError(f"{record['text']}: no held-out conversation has an answer that ends within "
                           f"{config.block_size} tokens; take a larger --block-size, or a base with a longer window")
    record["val_tokens"] = sum(map(losses.count_targets, look_at))
    record["val_tokens_of"] = int(held.answer.sum())
    fit = batches.fitted
    record.update(batches=batches.batches_per_epoch, cut=fit.cut, left_out=fit.left_out, unanswered=fit.unanswered)

    def validation_loss(model: Any) -> float:
        rows = record.get("evaluation_rows") or metrics.rows_at_once(model.config, config.block_size)
        return metrics.mean_loss(model, look_at, dist.device, config.dtype, rows, losses.answers)

    return Objective(batches.batch, losses.answers, losses.count_targets, validation_loss, batches.place,
                     batches.widest)


def held_out(held: Chats, config: TrainConfig, pad: int) -> list[batch.Batch]:
    """Batches of the held-out conversations; of more than --eval-tokens tokens every k-th."""
    rows = ChatBatches(held, config.block_size, metrics.ROWS, 0, pad)
    every = -(-rows.number_of_rows * config.block_size // config.eval_tokens) if config.eval_tokens else 1
    if every > 1:
        chosen = np.arange(0, len(held), every)
        starts, ends = held.starts[chosen], held.ends[chosen]
        which = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        fewer = Chats(held.tokens[which], held.answer[which], np.cumsum(ends - starts))
        rows = ChatBatches(fewer, config.block_size, metrics.ROWS, 0, pad)
    return list(rows.all())


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, PreparedChats]:
    """A base, conversations and optimizers for `config`: a run that has not begun. Arguments: `pretrain`'s."""
    model, words, config = base.begin(config, dist, out, given, in_file, run)
    found = find(config)
    ready = prepare(found, config, words, dist, progress)
    learned, _ = parts(ready, config)
    run = base.folder(run, out, f"{found.name}-sft")
    record: dict[str, Any] = {
        "text": found.name, "text_hash": found.hash, "tokenizer": words.kind, "documents": len(learned),
        "tokens": int(learned.answer.sum()), "minutes": config.minutes, "leaked": ready.leaked,
        "guessing": round(math.log(words.vocab_size), 4)}
    t = assemble(run, model, ready, config, dist, record)
    base.plan(t, EPOCHS)
    with evaluating(t.model):
        record["val_loss_before"] = round(t.objective.evaluate(t.model), 4)
    return t, ready


def assemble(run: Path, model: Any, ready: PreparedChats, config: TrainConfig, dist: Dist,
             record: dict[str, Any], resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the answers, settings resolved. Arguments: `pretrain`'s."""
    return base.trainer(run, model, lambda c: chat_objective(ready, c, dist, record), config, dist, record, resumed)


def said(t: Trainer, ready: PreparedChats) -> tuple[list[str], float]:
    """What a plan says of the conversations, in lines, and how often the planned steps read them."""
    r, held = t.record, len(parts(ready, t.config)[1])
    lines = [f"conversations: {r['text']}, {r['documents']:,} to learn from, {held:,} held out",
             f"base: {t.config.init}, a loss of {r['val_loss_before']:.4f} nats per token of the held-out answers"]
    if r["cut"] or r["left_out"]:
        lines.append(f"too long for the window of {t.config.block_size} tokens: {r['cut']:,} lose their last messages, "
                     f"{r['left_out']:,} are left out, since no answer ends there")
    if r["unanswered"]:
        lines.append(f"left out, without an answer: {r['unanswered']:,}")
    return lines, t.state.steps / r["batches"]


def expect(t: Trainer, ready: PreparedChats) -> None:
    """Nobody knows what loss to expect of an answer."""


def results(facts: dict[str, Any]) -> list[str]:
    """What a finished run has come to, in lines."""
    share = facts.get("ended")
    ended = "" if share is None else f"; of its own to held-out questions {share:.0%} end by themselves"
    return [f"held-out answers: {facts['val_loss_before']:.4f} nats per token before, {facts['val_loss']:.4f} after"
            + ended]


def conclude(t: Trainer, ready: PreparedChats) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curve, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with the share of answers that end by themselves; some answers.
    """
    held = parts(ready, t.config)[1]
    found = score(held, ready.tokenizer, t.record["val_loss"])
    t.record.update(nats_per_char=found.nats_per_char, bits_per_byte=found.bits_per_byte)
    plots.loss_curve(t.run, card.title(t.run, t.record))
    model, words = hf.read_folder(t.run)
    model.to(t.dist.device)
    asked = [ids for ids in map(_question, _some(held, ASKED)) if 0 < len(ids) < t.config.block_size // 2]
    made = answers.answers(model, words, asked, **answers.SAMPLING)
    t.record["ended"] = round(sum(ended for _, ended in made) / len(made), 4) if made else None
    sample = "\n\n".join(f"{words.decode(ids.tolist())}\n  -> {answer}" for ids, (answer, _) in
                         list(zip(asked, made, strict=True))[:SHOWN])
    t.record["finished"] = True
    facts = checkpointing.write_run(t)
    card.chat_card(t.run, t.config, facts, sample)
    return facts, sample


def score(held: Chats, words: Tokenizer, mean: float) -> metrics.Score:
    """The mean loss of the tokens of answers in the three units."""
    text = words.decode(held.tokens[held.answer].tolist(), skip_special=True)
    return metrics.score(mean, int(held.answer.sum()) + 1, len(text), len(text.encode()))


def _some(held: Chats, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, answer) of so many of the conversations, evenly spread."""
    places = range(0, len(held), -(-len(held) // number))
    return [(held.tokens[held.starts[i] : held.ends[i]], held.answer[held.starts[i] : held.ends[i]]) for i in places]


def _question(one: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A conversation up to where its first answer begins."""
    ids, answer = one
    return ids[: int(answer.argmax())] if answer.any() else ids[:0]
