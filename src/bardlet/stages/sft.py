"""Supervised fine-tuning: a base learns to answer.

Conversations are written by the one chat template, and the loss is taken on the words of the answers and the token that
ends each. Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bardlet.config.finetuning import SFTConfig
from bardlet.data import batch, chat_template, records, shards
from bardlet.data.corpus import cache_folder, development_begins
from bardlet.data.packing import PARTS, ChatBatches, TokenizedChats
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import answers
from bardlet.inference.generate import eval_mode
from bardlet.run import card, hf, plots
from bardlet.run.record import ConversationsRecord
from bardlet.runtime import manifest
from bardlet.stages.base import FineTuning
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

VERSION = 4
ASKED, SHOWN = 50, 3
"""Held-out conversations, evenly spread, whose first answer a finished run gives; and those on its card."""


@dataclass(frozen=True)
class ChatDataset:
    """Conversations as tokens. leaked: the share of those held out that are in the training part word for word."""

    train: TokenizedChats
    val: TokenizedChats
    tokenizer: Tokenizer
    leaked: float


class SFT(FineTuning[SFTConfig, Examples, ChatDataset, ConversationsRecord]):
    """`bardlet sft BASE DATA`."""

    material = "conversations"
    unit = "answer tokens"
    template = "conversations"
    record_class = ConversationsRecord
    epochs = 3

    def load_data(self) -> Examples:
        """Find the conversations that the settings name."""
        return records.find(self.config.text, "conversations behind the base, .jsonl or .json, with `messages`, or "
                                              "`instruction` and `output`")

    def tokenize(self, tokenizer: Tokenizer | None) -> ChatDataset:
        """Make tokens of the conversations by the tokenizer of the base; rank 0 writes them, the others read."""
        if tokenizer is None:
            raise BardletError("conversations are learned by a model that has read text before: name it with "
                               "--init DIR")
        found = self.source
        key = hashlib.sha256(f"{found.hash} {tokenizer.hash} {chat_template.TEMPLATE} {VERSION}".encode()).hexdigest()
        folder = cache_folder() / "tokens" / f"{found.name[:60]}-chat-{key[:16]}"
        with self.dist.main_first():
            return shards.build_or_read(folder, lambda whole: _build(found, tokenizer, whole, self.progress),
                                 lambda made: _open(made, tokenizer))

    def parts(self) -> tuple[TokenizedChats, TokenizedChats]:
        """(training, held-out) conversations. The development split is the last tenth of the training part."""
        if self.config.val_part == "val":
            return self.data.train, self.data.val
        cut = development_begins(len(self.data.train))
        return self.data.train.part(slice(cut)), self.data.train.part(slice(cut, None))

    def objective(self, config: SFTConfig) -> Objective:
        """Rows of conversations, the loss on their answers, and that of the held-out ones as evaluation."""
        learned, held = self.parts()
        pad = int(self.data.tokenizer.pad_id or 0)
        batches = ChatBatches(learned, config.block_size, config.batch_size * config.grad_accum, config.seed, pad,
                              config.grad_accum * self.dist.world, config.pack)
        look_at = validation_batches(held, config, pad)
        for some, what in ((batches.number_of_rows, "conversation"), (look_at, "held-out conversation")):
            if not some:
                raise BardletError(f"{self.record.text}: no {what} has an answer that ends within the window of "
                                   f"{config.block_size} tokens; take a larger --block-size, or a base with a longer "
                                   "window")
        self.record.val_tokens = sum(map(losses.count_targets, look_at))
        self.record.val_tokens_of = int(held.answer.sum())
        fit = batches.fitted
        self.record.update(batches=batches.batches_per_epoch, cut=fit.cut, left_out=fit.left_out,
                           unanswered=fit.unanswered)

        def validation_loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.rows_at_once(model.config, config.block_size)
            return metrics.mean_loss(model, look_at, self.dist.device, config.dtype, rows, losses.completion_loss)

        return Objective(batches.batch, losses.completion_loss, losses.count_targets, validation_loss, batches.describe_batch,
                         batches.widest)

    def new_record(self, tokenizer: Tokenizer) -> ConversationsRecord:
        """What run.toml says of the conversations."""
        learned, _ = self.parts()
        return ConversationsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(learned),
            tokens=int(learned.answer.sum()), minutes=self.config.minutes, leaked=self.data.leaked,
            guessing=round(math.log(tokenizer.vocab_size), 4))

    def evaluate_before(self, trainer: Trainer) -> None:
        """Put the loss of the base on record."""
        with eval_mode(trainer.model):
            self.record.val_loss_before = round(trainer.objective.evaluate(trainer.model), 4)

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """What a plan says of the conversations, and how often the planned steps read them."""
        r, held = self.record, len(self.parts()[1])
        lines = [f"conversations: {r.text}, {r.documents:,} to learn from, {held:,} held out",
                 f"base: {trainer.config.init}, a loss of {r.val_loss_before:.4f} nats per token of the held-out answers"]
        if r.cut or r.left_out:
            lines.append(f"too long for the window of {trainer.config.block_size} tokens: {r.cut:,} lose their last "
                         f"messages, {r.left_out:,} are left out, since no answer ends there")
        if r.unanswered:
            lines.append(f"left out, without an answer: {r.unanswered:,}")
        return lines, trainer.state.steps / r.batches

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        r = self.record
        ended = "" if r.ended is None else f"; of its own to held-out questions {r.ended:.0%} end by themselves"
        return [f"held-out answers: {r.val_loss_before:.4f} nats per token before, {r.val_loss:.4f} after{ended}"]

    def measure(self, trainer: Trainer) -> str:
        """Put the share of answers that end by themselves on record and draw the curve; return some answers."""
        held = self.parts()[1]
        found = score(held, self.data.tokenizer, self.record.val_loss)
        self.record.update(nats_per_char=found.nats_per_char, bits_per_byte=found.bits_per_byte)
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record))
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        asked = [ids for ids in map(_question, _evenly_spread(held, ASKED)) if 0 < len(ids) < trainer.config.block_size // 2]
        made = answers.generate_answers(model, tokenizer, asked, **answers.SAMPLING)
        self.record.ended = round(sum(ended for _, ended in made) / len(made), 4) if made else None
        return "\n\n".join(f"{tokenizer.decode(ids.tolist())}\n  -> {answer}" for ids, (answer, _) in
                           list(zip(asked, made, strict=True))[:SHOWN])


def _build(found: Examples, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Write the arrays of both parts and prepared.json into an empty folder."""
    both, names, marks = found.conversations(), ["prepared.json"], chat_template.special_tokens(tokenizer)
    for part, conversations in zip(PARTS, both, strict=True):
        rows = []
        for number, messages in enumerate(conversations):
            if progress and number % 1000 == 0:
                progress(f"tokens, {part}", number, len(conversations))
            rows.append(chat_template.encode(tokenizer, messages, marks=marks))
        names += TokenizedChats.of(rows, tokenizer.dtype).save(folder, part)
    known = set(map(records.as_text, both[0]))
    leaked = sum(records.as_text(messages) in known for messages in both[1]) / len(both[1])
    (folder / "prepared.json").write_text(json.dumps({"leaked": round(leaked, 4)}) + "\n", encoding="utf-8")
    manifest.write_manifest(folder, names)


def _open(folder: Path, tokenizer: Tokenizer) -> ChatDataset:
    shards.check(folder)
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    train, val = (TokenizedChats.load(folder, part) for part in PARTS)
    return ChatDataset(train, val, tokenizer, facts["leaked"])


def validation_batches(held: TokenizedChats, config: SFTConfig, pad: int) -> list[batch.Batch]:
    """Batches of the held-out conversations; of more than --eval-tokens tokens every k-th."""
    rows = ChatBatches(held, config.block_size, metrics.ROWS, 0, pad)
    every = -(-rows.number_of_rows * config.block_size // config.eval_tokens) if config.eval_tokens else 1
    if every > 1:
        chosen = np.arange(0, len(held), every)
        starts, ends = held.starts[chosen], held.ends[chosen]
        which = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        fewer = TokenizedChats(held.tokens[which], held.answer[which], np.cumsum(ends - starts))
        rows = ChatBatches(fewer, config.block_size, metrics.ROWS, 0, pad)
    return list(rows.all())


def score(held: TokenizedChats, tokenizer: Tokenizer, mean: float) -> metrics.Score:
    """The mean loss of the tokens of answers in the three units."""
    text = tokenizer.decode(held.tokens[held.answer].tolist(), skip_special=True)
    return metrics.score(mean, int(held.answer.sum()) + 1, len(text), len(text.encode()))


def _evenly_spread(held: TokenizedChats, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, answer) of so many of the conversations, evenly spread."""
    places = range(0, len(held), -(-len(held) // number))
    return [(held.tokens[held.starts[i] : held.ends[i]], held.answer[held.starts[i] : held.ends[i]]) for i in places]


def _question(one: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A conversation up to where its first answer begins."""
    ids, answer = one
    return ids[: int(answer.argmax())] if answer.any() else ids[:0]
