"""Share of a model's writing that is copied from its training data, beside the share of held-out text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bardlet.config.finetuning import SFTConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.data import chat_template, corpus, duplicates, records
from bardlet.data.duplicates import Overlap
from bardlet.data.forms import Message
from bardlet.errors import BardletError
from bardlet.inference import answers, text_generation
from bardlet.run import folder as run_folder
from bardlet.run import hf

LENGTH = 32
"""Characters of the shortest passage that counts as copied."""


@dataclass(frozen=True)
class Memorization:
    """Texts that a model wrote, held-out texts, and how much of both is in the training data."""

    written: list[str]
    held_out: list[str]
    own: Overlap
    chance: Overlap
    """Overlap of the held-out texts: what nobody copied."""
    source: str
    """Name of the training data, in words."""

    def __str__(self) -> str:
        characters = sum(map(len, self.written))
        verdict = ("the model repeats its training data more than new text does"
                   if self.own.share > self.chance.share + 0.01 else "no sign of memorization")
        return (f"{self.own.share:.1%} of {characters:,} generated characters occur in the {self.source}, in passages "
                f"of {LENGTH} characters or more; of the held-out data, which the model never saw, "
                f"{self.chance.share:.1%} do: {verdict}")


def measure(run: Path, tokens: int, temperature: float, seed: int) -> Memorization:
    """Let the model of a run write, and count what is copied: from its text, or of a chat model from its answers.

    Args:
        run: the run folder.
        tokens: minimum number of tokens to generate, in texts of up to 500; a chat model answers held-out prompts
            until it has as many, or no prompt is left.
        temperature: sampling temperature.
        seed: random seed of the first text.

    Raises:
        BardletError: a model that was trained on neither, or data that is not there any more.
    """
    config, record = run_folder.settings(run)
    if isinstance(config, TrainConfig):
        source = corpus.find(config.text, config.field, separator=config.separator, normalize=config.normalize)
        written = _texts(run, record.get("documents", 2), tokens, temperature, seed)
        held_out = list(itertools.islice(source.documents("val"), 10_000))
        return _compare(written, held_out, lambda: source.documents("train"), "training text")
    if isinstance(config, SFTConfig):
        train, held = records.find(config.text, "the conversations of this run", config.max_bad).conversations()
        written = _answers(run, held, tokens, temperature, seed)
        return _compare(written, _of_assistant(held), lambda: _of_assistant(train), "answers it was trained on")
    kind = ("a translator" if isinstance(config, TranslationConfig) else
            "a reward model" if config.stage == "reward" else f"a model after {config.command}")
    raise BardletError(f"{run}: {kind} is not checked for memorization, only models of a text and of `bardlet sft`")


def _compare(written: list[str], held_out: list[str], train: Callable[[], Iterable[str]], source: str) -> Memorization:
    own, chance = (duplicates.find_copied(texts, train(), LENGTH) for texts in (written, held_out))
    return Memorization(written, held_out, own, chance, source)


def _texts(run: Path, documents: int, tokens: int, temperature: float, seed: int) -> list[str]:
    model, tokenizer = hf.read_folder(run)
    # a text of less than a few hundred tokens has little space for a copy of 32 characters
    prompts = [text_generation.prompt_ids(tokenizer, None, documents)] * max(1, min(20, tokens // 500))
    written: list[str] = []
    count = 0
    while count < tokens:
        generated = text_generation.complete(model, tokenizer, prompts, min(500, tokens), temperature=temperature,
                                             top_k=50, seed=seed + len(written))
        written += [tokenizer.decode(ids, skip_special=True) for ids in generated]
        count += max(len(generated), sum(map(len, generated)))  # a model may end every text at once
    return written


def _answers(run: Path, chats: list[list[Message]], tokens: int, temperature: float, seed: int) -> list[str]:
    model, tokenizer = hf.read_folder(run)
    written: list[str] = []
    count = 0
    for first in range(0, len(chats), answers.ROWS):
        prompts = [chat_template.encode(tokenizer, chat[:_first_answer(chat)], add_generation_prompt=True)[0]
                   for chat in chats[first : first + answers.ROWS] if _first_answer(chat) > 0]
        fitting = [ids for ids in prompts if len(ids) < model.config.block_size // 2]
        texts = [text for text, _ in answers.generate_answers(model, tokenizer, fitting, seed=seed + len(written),
                                                              temperature=temperature, top_k=50)]
        written += texts
        count += sum(len(tokenizer.encode(text)) for text in texts)
        if count >= tokens:
            break
    return written


def _first_answer(chat: list[Message]) -> int:
    return next((n for n, message in enumerate(chat) if message["role"] == "assistant"), 0)


def _of_assistant(chats: Iterable[list[Message]]) -> list[str]:
    return [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
