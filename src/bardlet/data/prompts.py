"""Questions as tokens, up to where an answer begins: what a model writes answers to, to learn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bardlet.config.finetuning import RolloutConfig
from bardlet.data import chat_template
from bardlet.data.corpus import development_begins
from bardlet.data.records import Examples, Question
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
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

    def up_to(self, length: int) -> Prompts:
        """Those of at most so many tokens."""
        kept = [i for i, ids in enumerate(self.ids) if len(ids) <= length]
        return Prompts([self.questions[i] for i in kept], [self.ids[i] for i in kept])

    def evenly_spread(self, most: int) -> Prompts:
        """At most so many of them, evenly spread."""
        return self.part(slice(None, None, max(1, -(-len(self) // most))))


@dataclass(frozen=True)
class PromptDataset:
    """Questions as tokens; none is in both parts."""

    train: Prompts
    val: Prompts
    tokenizer: Tokenizer


def tokenize_prompts(found: Examples, tokenizer: Tokenizer, progress: Progress | None = None) -> PromptDataset:
    """The questions as tokens by the tokenizer of the model."""
    marks = chat_template.special_tokens(tokenizer)
    made: list[Prompts] = []
    for part, questions in zip(("train", "val"), found.questions(), strict=True):
        if progress:
            progress(f"questions, {part}", 0, len(questions))
        ids = [chat_template.encode(tokenizer, one.prompt, ask=True, marks=marks)[0] for one in questions]
        made.append(Prompts(questions, ids))
    train, val = made
    return PromptDataset(train, val, tokenizer)


def split(ready: PromptDataset, config: RolloutConfig) -> tuple[Prompts, Prompts]:
    """(training, held-out) questions that leave room in the window for an answer of --answer-tokens.

    The development split is the last tenth of the training part, too long ones counted, so that it is the same one in
    all stages. BardletError where no question is left.
    """
    learned, held = ready.train, ready.val
    if config.val_part == "dev":
        cut = development_begins(len(learned))
        learned, held = learned.part(slice(cut)), learned.part(slice(cut, None))
    room = config.block_size - config.answer_tokens
    fitting = learned.up_to(room), held.up_to(room)
    if not all(map(len, fitting)):
        raise BardletError(f"no question leaves room for an answer of {config.answer_tokens} tokens in the model's "
                           f"window of {config.block_size}; take fewer --answer-tokens")
    return fitting


def sample_prompts(number: int, size: int, prompts: int, seed: int) -> np.ndarray:
    """Which of so many questions the rollout of a number from 0 on asks: (size,) int64. An epoch asks each once.

    A pure function of (seed, number).
    """
    epochs, within = np.divmod(np.arange(number * size, (number + 1) * size), prompts)
    orders = {int(e): np.random.default_rng([seed % 2**64, int(e)]).permutation(prompts) for e in set(epochs)}
    return np.array([orders[int(e)][i] for e, i in zip(epochs, within, strict=True)], np.int64)
