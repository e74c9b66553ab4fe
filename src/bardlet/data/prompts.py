"""Prompts as tokens, up to where a completion begins, for stages that learn from sampled completions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bardlet.config.finetuning import RolloutConfig
from bardlet.data import chat_template
from bardlet.data.corpus import dev_split_start
from bardlet.data.forms import Question
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Prompts as questions and as tokens: ids[i], (T,) int64, are the tokens of questions[i]."""

    questions: list[Question]
    ids: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, span: slice) -> Prompts:
        """Return the prompts of a slice."""
        return Prompts(self.questions[span], self.ids[span])

    def up_to(self, length: int) -> Prompts:
        """Return the prompts of at most `length` tokens."""
        kept = [i for i, ids in enumerate(self.ids) if len(ids) <= length]
        return Prompts([self.questions[i] for i in kept], [self.ids[i] for i in kept])

    def evenly_spread(self, limit: int) -> Prompts:
        """Return at most `limit` prompts, evenly spread."""
        return self.part(slice(None, None, max(1, -(-len(self) // limit))))


@dataclass(frozen=True)
class PromptDataset:
    """Tokenized prompts; none is in both splits."""

    train: Prompts
    val: Prompts
    tokenizer: Tokenizer


def tokenize_prompts(examples: Examples, tokenizer: Tokenizer, progress: Progress | None = None) -> PromptDataset:
    """Return the prompts as tokens of the model's tokenizer."""
    special = chat_template.special_tokens(tokenizer)
    parts: list[Prompts] = []
    both = examples.questions()
    examples.report.announce(examples.max_bad)
    for part, questions in zip(("train", "val"), both, strict=True):
        if progress:
            progress(f"tokenizing prompts of the {part} split", 0, len(questions))
        ids = [chat_template.encode(tokenizer, question.prompt, add_generation_prompt=True, special=special)[0]
               for question in questions]
        parts.append(Prompts(questions, ids))
    train, val = parts
    return PromptDataset(train, val, tokenizer)


def split(dataset: PromptDataset, config: RolloutConfig) -> tuple[Prompts, Prompts]:
    """Return the (training, held-out) prompts that leave room in the window for --answer-tokens.

    The development split is the last tenth of the training split, counting prompts that are too long, so that it is the
    same in all stages. BardletError if no prompt is left.
    """
    train, val = dataset.train, dataset.val
    if config.val_part == "dev":
        cut = dev_split_start(len(train))
        train, val = train.part(slice(cut)), train.part(slice(cut, None))
    room = config.block_size - config.answer_tokens
    fitting = train.up_to(room), val.up_to(room)
    if not all(map(len, fitting)):
        raise BardletError(f"every prompt is too long for a completion of {config.answer_tokens} tokens in the model's "
                           f"window of {config.block_size}; use a smaller --answer-tokens")
    return fitting


def sample_prompts(number: int, size: int, prompts: int, seed: int) -> np.ndarray:
    """Return the indices, out of `prompts`, of rollout `number` (from 0): (size,) int64. An epoch uses each once.

    A pure function of (seed, number).
    """
    epochs, within = np.divmod(np.arange(number * size, (number + 1) * size), prompts)
    orders = {int(e): np.random.default_rng([seed % 2**64, int(e)]).permutation(prompts) for e in set(epochs)}
    return np.array([orders[int(e)][i] for e, i in zip(epochs, within, strict=True)], np.int64)
