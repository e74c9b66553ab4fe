"""The record of a run in run.toml: which entries there may be, and of which type."""

from __future__ import annotations

from typing import Any

from bardlet.errors import BardletError, shown

RECORD = {"text": str, "text_hash": str, "tokenizer": str, "documents": int, "tokens": int, "minutes": float,
          "most_steps": int, "parameters": int, "trainable": int, "val_tokens": int, "val_tokens_of": int,
          "steps": int, "saved": int, "seconds": float, "tokens_per_second": float, "val_loss": float,
          "train_loss": float, "selected_by": str, "selected_step": int, "averaged": int, "machine": dict,
          "finished": bool, "expected": float, "bigram": float, "characters_per_token": float, "duplicated": float,
          "leaked": float, "launch": str, "reasons": list, "evaluation_rows": int, "rung": str, "counting": list,
          "bits_per_byte": float, "nats_per_char": float, "characters": float, "guessing": float, "batches": int,
          "bleu": float, "chrf": float, "bleu_signature": str, "val_loss_before": float, "cut": int, "left_out": int,
          "ended": float, "unanswered": int, "base_hash": str, "accuracy": float, "margin": float, "longer": float,
          "accuracy_longer": float, "accuracy_shorter": float, "likes_length": float, "calibration_error": float,
          "reward_mean": float, "reward_deviation": float, "reward_hash": str, "reward_before": float,
          "reward_after": float, "sampled_before": float, "sampled_after": float, "kl": float, "answer_length": float,
          "different_before": float, "different": float, "distinct_before": float, "distinct": float}
"""What a record may hold, and of which kind it is."""


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record of a run. BardletError where an entry is not of its kind."""
    for name, value in record.items():
        kind = RECORD.get(name)
        if kind and value is not None and type(value) not in ((float, int) if kind is float else (kind,)):
            raise BardletError(f"{where}: record.{name} is {shown(value)}, which it cannot be; put back a copy")
    return record
