"""The record of a run in run.toml: what happened, a dataclass for each stage.

An entry is None, and not in the file, until the run has come to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from bardlet.config.settings import AUTO, Auto
from bardlet.errors import BardletError, printable


@dataclass
class Record:
    """What any run puts on record."""

    results: ClassVar[tuple[str, ...]] = ()
    """The entries that `--json` prints of a finished run, beside those that it prints of each."""

    text: str = ""
    """The name of the data."""
    text_hash: str = ""
    """sha256 (hex) of what they hold."""
    tokenizer: str = ""
    documents: int = 0
    """Documents, pairs, conversations or questions to learn from."""
    tokens: int = 0
    """Their tokens that are to be predicted."""
    minutes: float | None = None
    """The time that the run was given."""
    leaked: float | None = None
    """The share of what is held out that stands in the training part, too."""
    guessing: float | None = None
    """The loss where each token is as likely as any other."""
    batches: Auto[int] = AUTO
    """Batches of an epoch, where it has whole ones."""
    left_out: Auto[int] = AUTO
    """How many are too long for the window."""
    reasons: list[str] | None = None
    """Why the plan is as it is; None: no plan was made."""
    most_steps: int | None = None
    """More steps would only learn the text by heart; None: nobody knows."""
    expected: float | None = None
    """The loss that the plan should come to, in nats per character."""
    parameters: Auto[int] = AUTO
    trainable: Auto[int] = AUTO
    """Parameters that learn, with LoRA."""
    base_hash: str | None = None
    """sha256 (hex) of the weights of --init, where they are a reference."""
    val_tokens: Auto[int] = AUTO
    """Targets that an evaluation looks at."""
    val_tokens_of: Auto[int] = AUTO
    """... of how many that there are."""
    evaluation_rows: int | None = None
    """Rows that an evaluation takes at once, where memory is short."""
    launch: str | None = None
    """Which start of torchrun began the run."""

    saved: int | None = None
    """The step of the newest checkpoint."""
    train_loss: float | None = None
    val_loss: Auto[float] = AUTO
    """Of the weights at the root."""
    selected_by: str | None = None
    """How they were chosen: best, last, average."""
    selected_step: Auto[int] = AUTO
    averaged: int | None = None
    """Over how many steps they are a mean."""
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
        """From the entries of a run.toml; what another version of bardlet knew besides is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def update(self, **values: Any) -> None:
        """Set some entries; AttributeError for one that there is not."""
        for name, value in values.items():
            getattr(self, name)
            setattr(self, name, value)

    def for_json(self) -> dict[str, Any]:
        """What `--json` prints of `results`."""
        return {name: getattr(self, name) for name in self.results}

    def fill(self, values: Mapping[str, Any]) -> None:
        """Take those of the `values` whose entries are not there yet."""
        for field in fields(self):
            if getattr(self, field.name) is None:
                setattr(self, field.name, values.get(field.name))

    def mapping(self) -> dict[str, Any]:
        """The entries that are there, by their names."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in entries.items() if value is not None}


@dataclass
class TextRecord(Record):
    """Of pretraining on a text."""

    duplicated: float | None = None
    """The share of the training part that repeats what stands before it."""
    characters_per_token: Auto[float] = AUTO
    """Of the held-out text."""
    bigram: float | None = None
    """The loss of a table of pairs of characters, in nats per character."""
    counting: list[float] | None = None
    """What `data/statistics.py` says to the scaling law."""
    untold: list[str] | None = None
    """The settings of somebody's own for which no loss is predicted."""
    characters: float | None = None
    """Characters that were learned from."""
    rung: str | None = None
    """Of the ladder."""


@dataclass
class PairsRecord(Record):
    """Of training on pairs of sentences."""

    results = ("bleu", "chrf")

    characters_per_token: Auto[float] = AUTO
    """Of the held-out targets."""
    bleu: Auto[float] = AUTO
    chrf: Auto[float] = AUTO
    bleu_signature: Auto[str] = AUTO


@dataclass
class ConversationsRecord(Record):
    """Of supervised fine-tuning."""

    results = ("val_loss_before", "ended")

    cut: Auto[int] = AUTO
    """Conversations that lost their last messages."""
    unanswered: Auto[int] = AUTO
    """Those without an answer."""
    val_loss_before: Auto[float] = AUTO
    """The loss of the base."""
    ended: float | None = None
    """The share of its answers that end by themselves."""


@dataclass
class PreferencesRecord(Record):
    """Of DPO."""

    results: ClassVar[tuple[str, ...]] = ("accuracy", "longer", "margin")

    longer: Auto[float] = AUTO
    """The share of the held-out pairs in which the chosen answer is the longer one."""
    accuracy: Auto[float] = AUTO
    """The share in which it has the greater reward."""
    margin: Auto[float] = AUTO
    """By how much, on average."""


@dataclass
class RewardRecord(PreferencesRecord):
    """Of training a reward model."""

    results: ClassVar[tuple[str, ...]] = (*PreferencesRecord.results, "accuracy_longer", "accuracy_shorter",
                                          "likes_length", "calibration_error")

    accuracy_longer: float | None = None
    accuracy_shorter: float | None = None
    likes_length: Auto[float] = AUTO
    """The correlation of margin and difference in length."""
    calibration_error: Auto[float] = AUTO

    def for_json(self) -> dict[str, Any]:
        """What `--json` prints; not of pairs that there are not, such as those with a longer chosen answer."""
        return {name: value for name, value in super().for_json().items() if value is not None}


@dataclass
class RolloutsRecord(Record):
    """Of PPO and GRPO. Before: of the model that the run began with."""

    results = ("ended", "reward_before", "reward_after", "sampled_before", "sampled_after", "kl", "answer_length",
               "different_before", "different", "distinct_before", "distinct")

    reward_hash: str | None = None
    """sha256 (hex) of the weights of the reward model."""
    reward_mean: Auto[float] = AUTO
    """Of the answers before, as the reward says it."""
    reward_deviation: Auto[float] = AUTO
    reward_before: Auto[float] = AUTO
    """The mean reward of the answers to held-out questions."""
    reward_after: Auto[float] = AUTO
    sampled_before: Auto[float] = AUTO
    """The same of answers that were drawn."""
    sampled_after: Auto[float] = AUTO
    different_before: Auto[float] = AUTO
    """The share of different answers."""
    different: Auto[float] = AUTO
    distinct_before: Auto[float] = AUTO
    """The share of different pairs of words."""
    distinct: Auto[float] = AUTO
    kl: Auto[float] = AUTO
    """Nats of an answer between it and the model that the run began with."""
    ended: Auto[float] = AUTO
    """The share of answers that end by themselves."""
    answer_length: Auto[float] = AUTO
    """Tokens of an answer."""


RECORDS = (TextRecord, PairsRecord, ConversationsRecord, RewardRecord, RolloutsRecord)


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of a record as they were read. BardletError where one is not of its type."""
    kinds = {name: kind for record in RECORDS for name, kind in _kinds(record).items()}
    for name, value in values.items():
        kind = kinds.get(name)
        if kind and value is not None and type(value) not in ((float, int) if kind is float else (kind,)):
            raise BardletError(f"{where}: record.{name} is {printable(value)}, which it cannot be; put back a copy")
    return values


def _kinds(record: type[Record]) -> dict[str, type]:
    """The plain type of each entry of a record: list for list[str], float for float | None."""
    found = {}
    for name, hint in get_type_hints(record).items():
        inner = [kind for kind in getattr(hint, "__args__", ()) if kind is not type(None)]
        plain = inner[0] if inner and type(None) in hint.__args__ else hint
        found[name] = getattr(plain, "__origin__", plain)
    return {name: kind for name, kind in found.items() if kind is not ClassVar}
