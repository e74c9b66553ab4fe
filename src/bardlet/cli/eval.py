"""`bardlet eval DIR [TEXT ...]`: loss on a text, BLEU of a translator, accuracy on tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.inference import EvaluationOptions
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.api.evaluation import TaskEvaluation, TextEvaluation, TranslationEvaluation

log = logging.getLogger("bardlet")

USAGE = Usage(
    "eval", "RUN [TEXT ...] [OPTIONS]",
    "Measure a model: its loss on the validation split of its own text or on another text, BLEU of a translator, or "
    "with --task its accuracy on questions with known answers.",
    (("bardlet eval runs/my-qwen3", "loss on the validation split"),
     ("bardlet eval runs/my-qwen3 other.txt", "loss on another text"),
     ("bardlet eval runs/my-qwen3 --task arc-easy boolq --limit 200", "accuracy on 200 questions of each task"),
     ("bardlet eval runs/de-en --source a.de --target a.en", "BLEU and chrF on sentence pairs")),
    (Group("loss on a text", ("field", "protocol", "context")), Group("translation", ("source", "target", "beam")),
     Group("tasks", ("task", "limit")), Group("machine", ("device", "dtype")), Group("output", ("json",))),
    positionals={"run": "RUN", "text": "TEXT"}, metavars={"field": "NAME", "task": "NAME"})


@dataclass(frozen=True, kw_only=True)
class Command(EvaluationOptions):
    """The command line."""

    run: str
    """A run folder, or a gpt2, Llama-like or pegasus model of Hugging Face: its folder, or OWNER/NAME on the Hub."""
    text: tuple[str, ...] = ()
    """Files, folders, globs or named corpora, read whole (default: the validation split of the run's text)."""
    json: bool = False
    """Print one JSON object on the last line."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    from bardlet.api import evaluation
    from bardlet.run import hub

    folder = hub.folder(command.run)
    options = EvaluationOptions(**{each.name: getattr(command, each.name) for each in fields(EvaluationOptions)})
    if options.task:
        with console.preparation_progress() as progress:
            results = evaluation.evaluate_tasks(folder, command.text, options, progress)
            figures = print_tasks(results)
        if command.json:
            console.say_json({"run": str(folder), "tasks": figures})
        return 0
    if command.text:
        warn_of_training_text(folder, command.text, command.field)
    result = evaluation.evaluate_data(folder, command.text, options)
    values = print_translation(result) if isinstance(result, evaluation.TranslationEvaluation) else print_loss(result)
    if command.json:
        console.say_json(values)
    return 0


def warn_of_training_text(folder: Path, text: Sequence[str], field: str) -> None:
    """Warn if the run trained on this text."""
    from bardlet.data import corpus
    from bardlet.run.folder import read_run

    with suppress(BardletError, OSError):  # the evaluation itself reports errors
        config, record = read_run(folder)
        normalize = getattr(config, "normalize", None)
        if record.get("text_hash") == corpus.find(text, field, normalize=normalize).hash:
            log.warning("%s: the run trained on this text; without TEXT, `bardlet eval` measures its validation split",
                        " ".join(text))


def print_loss(result: TextEvaluation) -> dict[str, Any]:
    """Print the loss on a text and return what --json prints."""
    from bardlet.evaluation import metrics

    score = result.score
    if result.skipped_characters:
        console.say(f"note: skipped {result.skipped_characters:,} characters that the tokenizer does not know")
    console.say(f"{result.name}: {metrics.describe_loss(score.loss, score.nats_per_char)}, "
                f"{score.bits_per_byte:.4f} bits per byte, over {score.tokens:,} tokens")
    return {**asdict(score), "skipped_characters": result.skipped_characters}


def print_translation(result: TranslationEvaluation) -> dict[str, Any]:
    """Print BLEU and chrF and return what --json prints."""
    score, search = result.score, "greedy" if result.beam == 1 else f"beam {result.beam}"
    console.say(f"{result.name}: BLEU {score.bleu:.2f}, chrF {score.chrf:.2f}, over {score.lines:,} lines "
                f"({score.lines / result.seconds:.0f} lines/s, {search})")
    console.say(f"sacreBLEU: {score.bleu_signature}; {score.chrf_signature}")
    return {**asdict(score), "seconds": round(result.seconds, 3), "beam": result.beam}


def print_tasks(results: Iterable[TaskEvaluation]) -> dict[str, dict[str, Any]]:
    """Print a line per task as it is measured, and return what --json prints."""
    figures = {}
    for task in results:
        print_task(task)
        figures[task.name] = {**asdict(task.result), "form": task.form, "seconds": round(task.seconds, 3)}
    console.say("± is one standard error")
    return figures


def print_task(task: TaskEvaluation) -> None:
    """Print the accuracy on a task, and a note for questions that were cut or left out."""
    from bardlet.api.evaluation import CHAT_TEMPLATE

    result = task.result
    parts = [f"acc {_percent(result.acc, result.stderr)}"]
    if result.acc_norm is not None:
        parts.append(f"acc_norm {_percent(result.acc_norm, result.stderr_norm)}")
    if result.acc_last is not None:
        parts.append(f"by the last number {_percent(result.acc_last, result.stderr_last)}")
    if result.perplexity is not None:
        parts.append(f"perplexity {result.perplexity:,.1f}")
    parts.append(f"chance {100 * result.chance:.1f} %")
    if result.always is not None:
        parts.append(f"majority answer {100 * result.always:.1f} %")
    form = "in the chat template" if task.form == CHAT_TEMPLATE else f"as {task.form}"
    console.say(f"{task.name}: {', '.join(parts)} ({console.count(result.records, 'question')} {form}, "
                f"{task.seconds:.1f} s)")
    too_long = f"longer than the context window of {task.window} tokens"
    for count, note in ((result.cut, f"{too_long}: the beginning was cut off"),
                        (result.too_long, f"{too_long}: left out"),
                        (result.unseen, "with characters that the tokenizer does not know: left out")):
        if count:
            console.say(f"note: {console.count(count, 'question')} {note}")


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
