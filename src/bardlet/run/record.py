"""The record of a run in run.toml: its results and statistics, a dataclass for each stage.

An entry that is not known yet is None and absent from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from bardlet.config.settings import AUTO, Auto
from bardlet.errors import BardletError, printable


@dataclass
class Record:
    """The record of any run."""

    results: ClassVar[tuple[str, ...]] = ()
    """The entries that `--json` prints for a finished run, besides those common to all runs."""

    text: str = ""
    """The name of the corpus or dataset."""
    text_hash: str = ""
    """sha256 (hex) of its contents."""
    tokenizer: str = ""
    documents: int = 0
    """Training examples: documents, pairs, conversations or prompts."""
    tokens: int = 0
    """Training targets: tokens to predict."""
    minutes: float | None = None
    """The time budget."""
    leaked: float | None = None
    """Share of the validation split that also occurs in the training split."""
    guessing: float | None = None
    """The loss of the uniform distribution over tokens."""
    batches: Auto[int] = AUTO
    """Batches per epoch, if epochs consist of whole batches."""
    left_out: Auto[int] = AUTO
    """Examples dropped because they are too long for the window."""
    reasons: list[str] | None = None
    """The reasons for the plan's choices; None: there is no plan."""
    most_steps: int | None = None
    """Steps beyond which the model would memorize the text; None: unknown."""
    expected: float | None = None
    """The predicted validation loss, in nats per character."""
    parameters: Auto[int] = AUTO
    trainable: Auto[int] = AUTO
    """Trainable parameters, with LoRA."""
    base_hash: str | None = None
    """sha256 (hex) of the weights of --init, if they are the reference model."""
    base_revision: str | None = None
    """The commit of --init, if that is a model of the Hub."""
    val_tokens: Auto[int] = AUTO
    """Targets in an evaluation."""
    val_tokens_of: Auto[int] = AUTO
    """Targets in the whole validation split."""
    evaluation_rows: int | None = None
    """Rows per batch of an evaluation, if memory limits them."""
    launch: str | None = None
    """The torchrun launch that started the run."""

    saved: int | None = None
    """The step of the newest checkpoint."""
    train_loss: float | None = None
    val_loss: Auto[float] = AUTO
    """Validation loss of the weights at the root."""
    selected_by: str | None = None
    """The rule that selected these weights: best, last or average."""
    selected_step: Auto[int] = AUTO
    averaged: int | None = None
    """Number of steps in the average."""
    nats_per_char: Auto[float] = AUTO
    bits_per_byte: Auto[float] = AUTO
    finished: bool | None = None
    steps: int | None = None
    seconds: float | None = None
    """Time spent in training steps."""
    tokens_per_second: float | None = None
    machine: dict[str, Any] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the record with the entries of a run.toml, without those that only another version of bardlet knows.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def update(self, **values: Any) -> None:
        """Set entries. Raise AttributeError for an unknown name."""
        for name, value in values.items():
            getattr(self, name)
            setattr(self, name, value)

    def for_json(self) -> dict[str, Any]:
        """Return the entries of `results` for `--json`."""
        return {name: getattr(self, name) for name in self.results}

    def fill(self, values: Mapping[str, Any]) -> None:
        """Set the entries that are None from `values`."""
        for field in fields(self):
            if getattr(self, field.name) is None:
                setattr(self, field.name, values.get(field.name))

    def mapping(self) -> dict[str, Any]:
        """Return the entries that are not None, by name."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in entries.items() if value is not None}


@dataclass
class TextRecord(Record):
    """The record of pretraining on text."""

    duplicated: float | None = None
    """Share of the training split that repeats earlier text."""
    characters_per_token: Auto[float] = AUTO
    """Characters per token of the validation split."""
    bigram: float | None = None
    """Validation loss of a character bigram, in nats per character."""
    counting: list[float] | None = None
    """The features of `data/statistics.py` for the scaling law."""
    drift: float | None = None
    """Relative excess of the n-gram loss on the held-out text, if that is unlike the rest."""
    untold: list[str] | None = None
    """The user's settings that rule out a predicted loss."""
    characters: float | None = None
    """Characters trained on."""
    rung: str | None = None
    """The rung's name in a ladder."""
    replay: dict[str, Any] | None = None
    """The old text of --replay: name, hash, and the arguments that find it; None without --replay."""
    val_loss_before: float | None = None
    """With --replay: the validation loss before training, on the new text."""
    old_val_loss_before: float | None = None
    """... and on the old one."""
    old_val_loss: float | None = None
    """With --replay: the validation loss on the old text, of the weights at the root."""

    def for_json(self) -> dict[str, Any]:
        """Return the losses of --replay, if it was used."""
        names = ("val_loss_before", "old_val_loss_before", "old_val_loss") if self.replay else ()
        return {name: getattr(self, name) for name in names}

    @property
    def loss_unit(self) -> str:
        """The unit of `val_loss`: nats per character where a token is a character."""
        return "nats per character" if self.characters_per_token == 1 else "nats per token"

    def bigram_per_token(self) -> float | None:
        """Return the bigram's loss in nats per token, the unit of the loss curve; None if unknown."""
        return self.bigram * self.characters_per_token if self.bigram and self.characters_per_token else None


@dataclass
class PairsRecord(Record):
    """The record of training on sentence pairs."""

    results = ("bleu", "chrf")

    characters_per_token: Auto[float] = AUTO
    """Characters per token of the held-out targets."""
    bleu: Auto[float] = AUTO
    chrf: Auto[float] = AUTO
    bleu_signature: Auto[str] = AUTO


@dataclass
class ConversationsRecord(Record):
    """The record of supervised fine-tuning."""

    results = ("val_loss_before", "ended")

    cut: Auto[int] = AUTO
    """Conversations truncated to fit the window."""
    unanswered: Auto[int] = AUTO
    """Conversations without an assistant message."""
    val_loss_before: Auto[float] = AUTO
    """Validation loss of the base model."""
    ended: float | None = None
    """Share of generated completions that end on their own."""


@dataclass
class PreferencesRecord(Record):
    """The record of DPO and KTO."""

    results: ClassVar[tuple[str, ...]] = ("accuracy", "longer", "margin")

    longer: Auto[float] = AUTO
    """Share of the held-out pairs whose chosen completion is the longer one."""
    accuracy: Auto[float] = AUTO
    """Share of the held-out pairs whose chosen completion has the higher reward."""
    margin: Auto[float] = AUTO
    """Mean reward margin between chosen and rejected completion."""


@dataclass
class RewardRecord(PreferencesRecord):
    """The record of training a reward model."""

    results: ClassVar[tuple[str, ...]] = (*PreferencesRecord.results, "accuracy_longer", "accuracy_shorter",
                                          "likes_length", "calibration_error")

    accuracy_longer: float | None = None
    accuracy_shorter: float | None = None
    likes_length: Auto[float] = AUTO
    """Correlation between reward margin and length difference."""
    calibration_error: Auto[float] = AUTO

    def for_json(self) -> dict[str, Any]:
        """Return the entries of `results` that are not None: there may be no pairs with a longer chosen completion."""
        return {name: value for name, value in super().for_json().items() if value is not None}


@dataclass
class RolloutsRecord(Record):
    """The record of PPO and GRPO; `before` means the base model."""

    results = ("ended", "reward_before", "reward_after", "sampled_before", "sampled_after", "kl", "answer_length",
               "different_before", "different", "distinct_before", "distinct")

    reward_hash: str | None = None
    """sha256 (hex) of the reward model's weights."""
    reward_mean: Auto[float] = AUTO
    """Mean of the scorer's raw rewards for the base model's completions."""
    reward_deviation: Auto[float] = AUTO
    ended_before: float | None = None
    """Of the base model's completions: the share that end on their own,"""
    answer_length_before: float | None = None
    """their tokens,"""
    accuracy_before: float | None = None
    """and the share that equal the reference answer; None without references."""
    reward_before: Auto[float] = AUTO
    """Mean reward of the completions for held-out prompts."""
    reward_after: Auto[float] = AUTO
    sampled_before: Auto[float] = AUTO
    """Mean reward of completions sampled at --temperature."""
    sampled_after: Auto[float] = AUTO
    different_before: Auto[float] = AUTO
    """Share of distinct completions."""
    different: Auto[float] = AUTO
    distinct_before: Auto[float] = AUTO
    """Share of distinct word bigrams."""
    distinct: Auto[float] = AUTO
    kl: Auto[float] = AUTO
    """Estimated KL divergence from the base model, in nats per completion."""
    ended: Auto[float] = AUTO
    """Share of completions that end on their own."""
    answer_length: Auto[float] = AUTO
    """Tokens per completion."""


RECORDS = (TextRecord, PairsRecord, ConversationsRecord, RewardRecord, RolloutsRecord)


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of a record from the file `where`. Raise BardletError if one has the wrong type."""
    kinds = {name: kind for record in RECORDS for name, kind in _kinds(record).items()}
    for name, value in values.items():
        kind = kinds.get(name)
        if kind and value is not None and type(value) not in ((float, int) if kind is float else (kind,)):
            raise BardletError(f"{where}: record.{name} is {printable(value)}, not a valid {kind.__name__}; "
                               "restore a copy of the file")
    return values


def _kinds(record: type[Record]) -> dict[str, type]:
    """Return the plain type of each entry of a record: list for list[str], float for float | None."""
    kinds = {}
    for name, hint in get_type_hints(record).items():
        inner = [kind for kind in getattr(hint, "__args__", ()) if kind is not type(None)]
        plain = inner[0] if inner and type(None) in hint.__args__ else hint
        kinds[name] = getattr(plain, "__origin__", plain)
    return {name: kind for name, kind in kinds.items() if kind is not ClassVar}
