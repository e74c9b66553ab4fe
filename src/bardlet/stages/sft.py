"""Supervised fine-tuning on conversations.

Conversations are formatted with bardlet's chat template; the loss covers the assistant's messages, with the token
that ends each. Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 1.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from bardlet import console
from bardlet import tokenizer as tokenization
from bardlet.config.finetuning import SFTConfig
from bardlet.data import batch, chat_template, forms, records, shards
from bardlet.data.corpus import dev_split_start
from bardlet.data.named import cache_folder
from bardlet.data.packing import PARTS, ChatBatches, TokenizedChats
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import answers
from bardlet.inference.generate import eval_mode
from bardlet.models.base import with_vocabulary
from bardlet.run import card, hf, hub, plots
from bardlet.run.record import ConversationsRecord
from bardlet.runtime import manifest
from bardlet.runtime.seeds import torch_seed
from bardlet.stages.finetuning import FineTuning
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

VERSION = 5
ANSWERS, FEW_FOR_CHAT = 0.5, 200
"""Share of the generated completions that must end with a stop token for a chat, unless the run has this many steps:
then long answers meet the limit of this test, and longer training would not help."""
EVAL_PROMPTS, SAMPLES = 50, 3
"""Evenly spread held-out conversations whose first completion a finished run generates, and number of these samples."""


@dataclass(frozen=True)
class ChatDataset:
    """Tokenized conversations. leaked: share of held-out conversations that are also in the training split."""

    train: TokenizedChats
    val: TokenizedChats
    tokenizer: Tokenizer
    leaked: float


class SFT(FineTuning[SFTConfig, Examples, ChatDataset, ConversationsRecord]):
    """`bardlet sft BASE DATA`."""

    material = "conversations"
    unit = "completion tokens"
    template = "conversations"
    record_class = ConversationsRecord
    epochs = 3

    def load_data(self) -> Examples:
        """Find the conversation files named in the settings."""
        return records.find(self.config.text, "conversations after the base model: records with `messages`, or with a "
                            "prompt and an answer", self.config.max_bad)

    def place(self, empty: Any) -> Any:
        """Return the base model as this process's share of it, unless its vocabulary has to grow."""
        known = tokenization.load(hub.folder(cast(str, self.config.init)))
        whole = chat_template.is_missing(known) and not chat_template.is_foreign(known)
        return None if whole else self.share_of(empty)

    def longest(self) -> int | None:
        """Return the tokens of the longest conversation."""
        return max(int(np.diff(part.ends, prepend=0).max()) for part in (self.data.train, self.data.val) if len(part))

    def prepare_base(self, model: Any, tokenizer: Tokenizer) -> tuple[Any, Tokenizer]:
        """Return the base model and its tokenizer with the chat template's special tokens, and rows for them.

        A tokenizer of characters also gets the characters that only the conversations have.
        """
        if chat_template.is_foreign(tokenizer) or not chat_template.is_missing(tokenizer):
            return model, tokenizer
        if self.config.lora:
            raise BardletError(f"--lora {self.config.lora}: LoRA trains no embeddings, and {self.config.init} needs "
                               "new tokens for chat; drop --lora")
        texts = (chat_template.escape_special(str(message["content"])) for messages in
                 self.load_data().read(forms.conversation) for message in messages) if tokenizer.kind == "char" else ()
        grown = chat_template.with_special_tokens(tokenizer, texts)
        special = len(grown.special) - len(tokenizer.special)
        characters = grown.vocab_size - tokenizer.vocab_size - special
        log.warning("%s: adding %s for chat%s to its vocabulary of %d", self.config.init,
                    console.count(special, "special token"),
                    f" and {console.count(characters, 'new character')} of the conversations" if characters else "",
                    tokenizer.vocab_size)
        if grown.vocab_size > model.config.vocab_size:
            model = with_vocabulary(model, grown.vocab_size, torch_seed(self.config.seed))
        return model, grown

    def tokenize(self, tokenizer: Tokenizer | None) -> ChatDataset:
        """Tokenize the conversations with the base model's tokenizer; rank 0 writes, the other ranks read."""
        if tokenizer is None:
            raise BardletError("fine-tuning starts from a pretrained model; name it with --init DIR")
        source = self.source
        key = hashlib.sha256(f"{source.hash} {tokenizer.hash} {tokenizer.chat_template} {VERSION}".encode()).hexdigest()
        folder = cache_folder() / "tokens" / f"{source.name[:60]}-chat-{key[:16]}"
        with self.dist.main_first():
            return shards.build_or_read(folder, lambda folder: _build(source, tokenizer, folder, self.progress),
                                        lambda folder: _open(folder, tokenizer, source.max_bad))

    def parts(self) -> tuple[TokenizedChats, TokenizedChats]:
        """Return (training, held-out) conversations. The development split is the last tenth of the training split."""
        if self.config.val_part == "val":
            return self.data.train, self.data.val
        cut = dev_split_start(len(self.data.train))
        return self.data.train.part(slice(cut)), self.data.train.part(slice(cut, None))

    def objective(self, config: SFTConfig) -> Objective:
        """Return packed rows, the loss on completions, and the same loss on held-out conversations as evaluation."""
        train, validation = self.parts()
        pad = int(self.data.tokenizer.pad_id or 0)
        batches = ChatBatches(train, config.block_size, config.batch_size * config.grad_accum, config.seed, pad,
                              config.grad_accum * self.dist.parts, config.pack)
        eval_batches = validation_batches(validation, config, pad)
        for nonempty, name in ((batches.number_of_rows, "conversation"), (eval_batches, "held-out conversation")):
            if not nonempty:
                raise BardletError(f"{self.record.text}: no {name} has a completion that ends within the context "
                                   f"window of {config.block_size} tokens; use a larger --block-size, or a base model "
                                   "with a longer window")
        self.record.val_tokens = sum(map(losses.count_targets, eval_batches))
        self.record.val_tokens_of = int(validation.answer.sum())
        fitted = batches.fitted
        self.record.update(batches=batches.batches_per_epoch, cut=fitted.cut, left_out=fitted.left_out,
                           unanswered=fitted.unanswered)

        def validation_loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.rows_at_once(model.config, config.block_size)
            return metrics.mean_loss(model, eval_batches, self.dist.device, config.dtype, rows, losses.completion_loss)

        return Objective(batches.batch, losses.completion_loss, losses.count_targets, validation_loss,
                         batches.describe_batch, batches.widest)

    def new_record(self, tokenizer: Tokenizer) -> ConversationsRecord:
        """Return the record of a new run, with its statistics of the conversations."""
        train, _ = self.parts()
        return ConversationsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(train),
            tokens=int(train.answer.sum()), minutes=self.config.minutes, leaked=self.data.leaked,
            guessing=round(math.log(tokenizer.vocab_size), 4))

    def evaluate_before(self, trainer: Trainer) -> None:
        """Record the base model's loss."""
        with eval_mode(trainer.model):
            self.record.val_loss_before = round(trainer.objective.evaluate(trainer.model), 4)

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""
        r, validation = self.record, self.parts()[1]
        lines = [f"conversations: {r.text}, {r.documents:,} for training, {len(validation):,} held out",
                 f"base: {trainer.config.init}, loss {r.val_loss_before:z.4f} nats per token on held-out completions"]
        if r.cut or r.left_out:
            lines.append(f"longer than the context window of {trainer.config.block_size} tokens: {r.cut:,} cut after "
                         f"the last completion that fits, {r.left_out:,} left out because none fits")
        if r.unanswered:
            lines.append(f"left out, without an assistant message: {r.unanswered:,}")
        return lines, trainer.state.steps / r.batches

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        r = self.record
        lines = [f"held-out completions: {r.val_loss_before:z.4f} nats per token before, {r.val_loss:z.4f} after"]
        if r.ended is not None:
            lines.append(f"generated completions of held-out prompts: {r.ended:.0%} end with a stop token"
                         + "; the model does not answer yet, train it longer" * self.unready())
        return lines + self.selection_bias()

    def unready(self) -> bool:
        """Return True after a short run if most of the generated completions did not end."""
        r = self.record
        return r.ended is not None and r.ended < ANSWERS and (r.saved or 0) < FEW_FOR_CHAT

    def measure(self, trainer: Trainer) -> str:
        """Record the share of completions that end with a stop token, draw the curve and return some completions."""
        validation = self.parts()[1]
        units = score(validation, self.data.tokenizer, self.record.val_loss)
        self.record.update(nats_per_char=units.nats_per_char, bits_per_byte=units.bits_per_byte)
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record))
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        prompts = [ids for ids in map(_prompt, _evenly_spread(validation, EVAL_PROMPTS))
                   if 0 < len(ids) < trainer.config.block_size // 2]
        completions = answers.generate_answers(model, tokenizer, prompts, **answers.SAMPLING)
        ended = round(sum(ended for _, ended in completions) / len(completions), 4) if completions else None
        self.record.ended = ended
        return "\n\n".join(f"{tokenizer.decode(ids.tolist())}\n  -> {text}" for ids, (text, _) in
                           list(zip(prompts, completions, strict=True))[:SAMPLES])


    def sample(self, trainer: Trainer, tokens: int) -> str:
        """Return an answer of the current weights to a held-out message, after that message."""
        tokenizer = self.data.tokenizer
        prompts = [ids for ids in map(_prompt, _evenly_spread(self.parts()[1], EVAL_PROMPTS))
                   if 0 < len(ids) < trainer.config.block_size // 2][:1]
        written = answers.generate_answers(trainer.model, tokenizer, prompts, **answers.SAMPLING)
        return "\n\n".join(f"{tokenizer.decode(ids.tolist())}\n  -> {text}"
                           for ids, (text, _) in zip(prompts, written, strict=True))


def _build(source: Examples, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Write the arrays of both splits and prepared.json into an empty folder."""
    both, names, special = source.conversations(), ["prepared.json"], chat_template.special_tokens(tokenizer)
    for part, conversations in zip(PARTS, both, strict=True):
        rows = []
        for number, messages in enumerate(conversations):
            if progress and number % 1000 == 0:
                progress(f"tokenizing the {part} split", number, len(conversations))
            rows.append(chat_template.encode(tokenizer, messages, special=special))
        names += TokenizedChats.of(rows, tokenizer.dtype).save(folder, part)
    train = set(map(records.as_text, both[0]))
    leaked = sum(records.as_text(messages) in train for messages in both[1]) / len(both[1])
    (folder / "prepared.json").write_text(json.dumps({"leaked": round(leaked, 4)}) + "\n", encoding="utf-8")
    manifest.write_manifest(folder, [*names, source.report.save(folder)])


def _open(folder: Path, tokenizer: Tokenizer, max_bad: float) -> ChatDataset:
    shards.check(folder)
    records.Report.load(folder).announce(max_bad)
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    train, val = (TokenizedChats.load(folder, part) for part in PARTS)
    return ChatDataset(train, val, tokenizer, facts["leaked"])


def validation_batches(chats: TokenizedChats, config: SFTConfig, pad: int) -> list[batch.Batch]:
    """Return batches of held-out conversations: only every k-th one if they exceed --eval-tokens."""
    rows = ChatBatches(chats, config.block_size, metrics.ROWS, 0, pad)
    every = -(-rows.number_of_rows * config.block_size // config.eval_tokens) if config.eval_tokens else 1
    if every > 1:
        chosen = np.arange(0, len(chats), every)
        starts, ends = chats.starts[chosen], chats.ends[chosen]
        token_indices = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        subset = TokenizedChats(chats.tokens[token_indices], chats.answer[token_indices], np.cumsum(ends - starts))
        rows = ChatBatches(subset, config.block_size, metrics.ROWS, 0, pad)
    return list(rows.all())


def score(chats: TokenizedChats, tokenizer: Tokenizer, mean: float) -> metrics.Score:
    """Return the mean loss of completion tokens in all three units."""
    text = tokenizer.decode(chats.tokens[chats.answer].tolist(), skip_special=True)
    return metrics.score(mean, int(chats.answer.sum()) + 1, len(text), len(text.encode()))


def _evenly_spread(chats: TokenizedChats, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids, completion mask) of at most `number` conversations, evenly spread."""
    indices = range(0, len(chats), -(-len(chats) // number))
    return [(chats.tokens[chats.starts[i] : chats.ends[i]], chats.answer[chats.starts[i] : chats.ends[i]])
            for i in indices]


def _prompt(chat: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the ids of a conversation up to its first completion; empty without one."""
    ids, answer = chat
    return ids[: int(answer.argmax())] if answer.any() else ids[:0]
