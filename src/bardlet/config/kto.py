"""Settings of `bardlet kto`. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from bardlet.config.finetuning import DPOConfig


@dataclass(frozen=True)
class KTOConfig(DPOConfig):
    """Settings of Kahneman-Tversky optimization."""

    stage = command = "kto"
    summary = "align a model with liked and disliked completions (KTO)"
    about = ("Kahneman-Tversky optimization on unpaired feedback: JSON records with `prompt`, `completion` and `label` "
             "(true: liked), or with `messages` and `label`. The model at the start is the reference.")
    example = "bardlet kto runs/chats-sft feedback.jsonl"

    batch_size: int = 16
    """Completions per micro-batch. Over all processes."""
    desirable_weight: float = 1.0
    """Weight of the loss on liked completions. Balance the classes: weight times count of liked completions should be
    1 to 4/3 times that of disliked ones."""
    undesirable_weight: float = 1.0
    """Weight of the loss on disliked completions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: 0 < x < 100, "more than 0 and below 100", "desirable_weight", "undesirable_weight")
