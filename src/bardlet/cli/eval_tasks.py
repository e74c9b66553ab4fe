"""`bardlet eval DIR --task NAME ...`: how many questions a model answers, with what guessing would get beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet import console

if TYPE_CHECKING:
    from bardlet.evaluation.likelihood import ChatFormat, Result
    from bardlet.tokenizer import Tokenizer

TEXT, TEMPLATE = "plain text", "chat template"
"""How a question is put."""


def run(folder: Path, asked_for: Sequence[str], limit: int | None, device: str, dtype: str, json: bool) -> int:
    """Ask a model `limit` questions (None: all) of each task, print a line for each; returns the exit code."""
    from bardlet.evaluation import likelihood, tasks
    from bardlet.run import hf
    from bardlet.runtime import device as runtime_device

    names = tuple(dict.fromkeys(asked_for))
    asked = {name: tasks.records(name, limit) for name in names}  # what is missing is said before any work
    model, tokenizer = hf.read_folder(folder)
    where = runtime_device.pick_device(device)
    runtime_device.set_threads_and_determinism(None, False, where)
    model.to(where)
    talker, dtype = chat_format(tokenizer), runtime_device.pick_dtype(dtype, where)
    figures: dict[str, dict[str, Any]] = {}
    for name, questions in asked.items():
        by_template = talker is not None and tasks.find(name).kind == "number"
        begun = time.monotonic()
        with console.preparation_progress() as progress:
            assert progress is not None
            tell = partial(progress, f"{name}: {console.count(len(questions), 'question')}")
            result = likelihood.TaskEvaluator(model, tokenizer, where, dtype, talker, tell).measure(name, questions)
        seconds, form = time.monotonic() - begun, TEMPLATE if by_template else TEXT
        print_result(name, result, form, seconds, model.config.block_size)
        figures[name] = {**asdict(result), "form": form, "seconds": round(seconds, 3)}
    console.say("± is one standard error")
    if json:
        console.say_json({"run": str(folder), "tasks": figures})
    return 0


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """How a model with bardlet's chat template is asked; None for every other tokenizer."""
    from bardlet.data import chat_template
    from bardlet.evaluation.likelihood import ChatFormat
    from bardlet.inference import answers

    if tokenizer.chat_template != chat_template.TEMPLATE:
        return None
    return ChatFormat(lambda text: chat_template.encode(tokenizer, [{"role": "user", "content": text}], ask=True)[0].tolist(),
                  answers.stop_ids(tokenizer))


def print_result(name: str, result: Result, form: str, seconds: float, window: int) -> None:
    """One line for a person, and a note for each thing that was not as it should be."""
    parts = [f"acc {_percent(result.acc, result.stderr)}"]
    if result.acc_norm is not None:
        parts.append(f"acc_norm {_percent(result.acc_norm, result.stderr_norm)}")
    if result.acc_last is not None:
        parts.append(f"by the last number {_percent(result.acc_last, result.stderr_last)}")
    if result.perplexity is not None:
        parts.append(f"perplexity {result.perplexity:,.1f}")
    parts.append(f"chance {100 * result.chance:.1f} %")
    if result.always is not None:
        parts.append(f"always the same answer {100 * result.always:.1f} %")
    how = "by the chat template" if form == TEMPLATE else f"as {form}"
    console.say(f"{name}: {', '.join(parts)} ({console.count(result.records, 'question')} {how}, {seconds:.1f} s)")
    for count, what in ((result.cut, f"too long for the model's window of {window}: the beginning was cut off"),
                        (result.too_long, f"left out: too long for the model's window of {window}"),
                        (result.unseen, "left out: with characters that the tokenizer has never seen")):  # fmt: skip
        if count:
            console.say(f"note: {console.count(count, 'question')} {what}")


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
