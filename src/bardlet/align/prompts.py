"""Questions as tokens, up to where an answer begins: what a model writes answers to, to learn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bardlet.align import chat
from bardlet.config import TrainConfig
from bardlet.data import Progress
from bardlet.errors import BardletError
from bardlet.examples import Examples, Question
from bardlet.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Question number i is questions[i], as tokens ids[i], (T,) int64."""

    questions: list[Question]
    ids: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, which: slice) -> Prompts:
        """The questions of a slice."""
        return Prompts(self.questions[which], self.ids[which])

    def some(self, most: int) -> Prompts:
        """At most so many of them, evenly spread."""
        return self.part(slice(None, None, max(1, -(-len(self) // most))))


@dataclass(frozen=True)
class PreparedPrompts:
    """Questions as tokens; none is in both parts. left_out: how many are too long, of both."""

    train: Prompts
    val: Prompts
    tokenizer: Tokenizer
    left_out: int


def prepare(found: Examples, words: Tokenizer, config: TrainConfig, progress: Progress | None = None,
            window: int | None = None) -> PreparedPrompts:  # fmt: skip
    """The questions as tokens by the tokenizer of the model.

    window: of the model, in tokens; a question that leaves no room in it for an answer of --answer-tokens is left out.

    Raises:
        BardletError: no question is left.
    """
    room = (window or config.block_size) - config.answer_tokens
    marks, left_out = chat.marks_of(words), 0
    made: list[Prompts] = []
    for part, questions in zip(("train", "val"), found.questions(), strict=True):
        if progress:
            progress(f"questions, {part}", 0, len(questions))
        ids = [chat.encode(words, one.prompt, ask=True, marks=marks)[0] for one in questions]
        kept = [i for i, one in enumerate(ids) if len(one) <= room]
        left_out += len(ids) - len(kept)
        if not kept:
            raise BardletError(f"{found.name}: no question leaves room for an answer of {config.answer_tokens} tokens "
                               f"in the model's window of {room + config.answer_tokens}; take fewer --answer-tokens")
        made.append(Prompts([questions[i] for i in kept], [ids[i] for i in kept]))
    train, val = made
    return PreparedPrompts(train, val, words, left_out)


def parts(ready: PreparedPrompts, config: TrainConfig) -> tuple[Prompts, Prompts]:
    """(training, held-out) questions. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return ready.train, ready.val
    cut = int(0.9 * len(ready.train))
    return ready.train.part(slice(cut)), ready.train.part(slice(cut, None))


def asked(number: int, size: int, prompts: int, seed: int) -> np.ndarray:
    """Which of so many questions the rollout of a number from 0 on asks: (size,) int64. An epoch asks each once.

    A pure function of (seed, number).
    """
    epochs, within = np.divmod(np.arange(number * size, (number + 1) * size), prompts)
    orders = {int(e): np.random.default_rng([seed % 2**64, int(e)]).permutation(prompts) for e in set(epochs)}
    return np.array([orders[int(e)][i] for e, i in zip(epochs, within, strict=True)], np.int64)
