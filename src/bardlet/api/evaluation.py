"""Evaluate a model from Python: loss on a text, BLEU of a translator, accuracy on tasks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bardlet.api import arguments
from bardlet.api.models import Model, load
from bardlet.config import toml
from bardlet.config.inference import EvaluationOptions
from bardlet.config.pretraining import TranslationConfig
from bardlet.data import bitext, bitext_batches, chat_template, corpus, shards, windows
from bardlet.data.corpus import Corpus
from bardlet.errors import BardletError, printable
from bardlet.evaluation import likelihood, metrics, tasks
from bardlet.evaluation.likelihood import ChatFormat, Result
from bardlet.evaluation.metrics import Score, TranslationScore
from bardlet.inference import answers, translate
from bardlet.run import folder as run_folder
from bardlet.run import hf, hub
from bardlet.runtime import device as runtime_device
from bardlet.runtime.distributed import Dist
from bardlet.stages import sft, stage_of
from bardlet.stages.pretrain import Pretraining
from bardlet.stages.sft import SFT
from bardlet.stages.translation import Translation
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses

log = logging.getLogger("bardlet")

PLAIN_TEXT, CHAT_TEMPLATE = "plain text", "chat template"
"""Prompt formats of the questions of a task."""


@dataclass(frozen=True)
class TextEvaluation:
    """The loss on a text.

    name: the name of the text. score: the loss in three units. skipped_characters: the number of characters that the
    tokenizer does not know.
    """

    name: str
    score: Score
    skipped_characters: int


@dataclass(frozen=True)
class TranslationEvaluation:
    """BLEU and chrF on sentence pairs. name: the name of the pairs. seconds: the time of the translation."""

    name: str
    score: TranslationScore
    seconds: float
    beam: int


@dataclass(frozen=True)
class TaskEvaluation:
    """Accuracy on a task. form: PLAIN_TEXT or CHAT_TEMPLATE. window: the model's context window in tokens."""

    name: str
    result: Result
    form: str
    seconds: float
    window: int


def evaluate(model: str | os.PathLike[str], *text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
             **options: Any) -> TextEvaluation | TranslationEvaluation | list[TaskEvaluation]:
    """Evaluate a run folder or a Hugging Face folder (`bardlet eval`).

    Args:
        model: the folder, a `Run` or a `Model`.
        text: the text to compute the loss on, or lists of texts; none: the validation split of the run's own text.
        options: the fields of `EvaluationOptions`, for example task="arc-easy", limit=200.

    Returns:
        A `TextEvaluation`; of a translator a `TranslationEvaluation`; with `task` a list of `TaskEvaluation`.

    Raises:
        BardletError: a text, task or option that does not fit the model.
    """
    folder = hub.folder(arguments.path(model, "bardlet.evaluate: model"))
    names = arguments.paths(text, "bardlet.evaluate: text")
    if isinstance(task := options.get("task", ()), str):
        options["task"] = (task,)
    elif not isinstance(task, list | tuple):
        raise BardletError(f"bardlet.evaluate: task = {printable(task)}: must be a name or a list of names")
    chosen = toml.options(EvaluationOptions, options, "bardlet.evaluate")
    if chosen.task:
        return list(evaluate_tasks(folder, names, chosen))
    return evaluate_data(folder, names, chosen)


def evaluate_data(folder: Path, text: Sequence[str],
                  options: EvaluationOptions) -> TextEvaluation | TranslationEvaluation:
    """Return the loss on a text, or BLEU and chrF of a translator."""
    options.refuse("limit", why="needs --task")
    if options.source or options.target or translates(folder):
        return evaluate_translation(folder, text, options)
    options.refuse("beam", why="needs a model that translates")
    return evaluate_text(load(folder, device=options.device), text, options)


def translates(folder: Path) -> bool:
    """Return True if a folder holds a model that was trained on sentence pairs."""
    if (folder / "run.toml").exists():
        return isinstance(run_folder.settings(folder, use_edited=True)[0], TranslationConfig)
    return folder.is_dir() and hf.read_model_config(folder).model == "encdec"


# ------------------------------------------------------------------------ loss on a text


def evaluate_text(model: Model, text: Sequence[str], options: EvaluationOptions) -> TextEvaluation:
    """Return the loss on `text`; without one, on the validation split of the run's own text or conversations."""
    module, tokenizer, device = model.module, model.tokenizer, next(model.module.parameters()).device
    runtime_device.set_threads_and_determinism(None, False, device)
    skipped, window = 0, min(256, module.config.block_size)
    if text:
        source = corpus.find(tuple(text), options.field, normalize="nfc" if tokenizer.nfc else None)
        tokens, characters, size, skipped = encode_corpus(source, tokenizer)
        name = source.name
    else:
        config, record = _own_run(model.folder, "text", "TEXT")
        stage = stage_of(config)(config, Dist(0, 1, device))
        if isinstance(stage, SFT):
            options.refuse("field", "protocol", "context", why="needs a text, and this run trained on conversations")
            return evaluate_completions(model, stage, record, options)
        if not isinstance(stage, Pretraining):
            raise BardletError(f"{model.folder}: trained by {config.stage}; its README.md has the results. Name a text "
                               "to evaluate on, or a --task")
        stage.source = stage.load_data()
        if config.val_part == "dev":
            stage.record = stage.record_class.of(record)  # it has the start of the development split
        _warn_changed(stage.source, record)
        stage.data = shards.tokenize_corpus(stage.source, tokenizer, skip_unseen=True)
        tokens, characters, size = stage.held_out()
        skipped, window = stage.data.skipped, min(256, config.block_size)  # as the run itself evaluates
        name = f"{'validation' if config.val_part == 'val' else 'development'} split of {stage.source.name}"
    if len(tokens) < 2:
        raise BardletError(f"{name}: {len(tokens)} tokens are too few to predict one from another; use a longer text")
    block = options.context or window
    if block > module.config.block_size:
        raise BardletError(f"--context {block}: the model's context window has {module.config.block_size} tokens; "
                           f"use --context {module.config.block_size} or less")
    full = options.protocol == "full"
    batches = windows.validation_windows(tokens, block) if full else windows.random_windows(tokens, block, seed=0)
    loss = _mean_loss(model, batches, options, block)
    score = metrics.score(loss, len(tokens), characters, size, tokenizer.decode([int(tokens[0])], skip_special=True))
    score = replace(score, tokens=sum(batch["target"].numel() for batch in batches))
    return TextEvaluation(name, score, skipped)


def evaluate_completions(model: Model, stage: SFT, record: dict[str, Any],
                         options: EvaluationOptions) -> TextEvaluation:
    """Return the loss on the held-out completions of a run of `bardlet sft`."""
    stage.load(model.tokenizer)
    _warn_changed(stage.source, record)
    held_out, block = stage.parts()[1], stage.config.block_size
    batches = sft.validation_batches(held_out, replace(stage.config, eval_tokens=0), int(model.tokenizer.pad_id or 0))
    mean = _mean_loss(model, batches, options, block, losses.completion_loss)
    return TextEvaluation(f"held-out completions of {record['text']}", sft.score(held_out, model.tokenizer, mean), 0)


def _mean_loss(model: Model, batches: Any, options: EvaluationOptions, block: int, *loss: Any) -> float:
    device = next(model.module.parameters()).device
    rows, dtype = metrics.rows_at_once(model.module.config, block), runtime_device.pick_dtype(options.dtype, device)
    return metrics.mean_loss(model.module, batches, device, dtype, rows, *loss)


def encode_corpus(source: Corpus, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int, int]:
    """Return (tokens, characters, bytes, skipped characters) of a whole corpus."""
    pieces = [np.zeros(0, tokenizer.dtype)]
    characters = size = skipped = 0
    start, separator = (np.array(ids, tokenizer.dtype) for ids in (tokenizer.prefix_ids, [tokenizer.eos_id or 0]))

    def known(blocks: Iterable[str]) -> Iterator[str]:
        nonlocal characters, size, skipped
        for block in blocks:
            text, unseen = tokenizer.drop_unseen(block)
            characters, size, skipped = characters + len(text), size + len(text.encode()), skipped + unseen
            yield text

    for _, blocks in source.blocks():
        pieces += (start, *tokenizer.encode_blocks(known(blocks)))
        if tokenizer.eos_id is not None and source.needs_separator:
            pieces.append(separator)
    return np.concatenate(pieces), characters, size, skipped


def _own_run(folder: Path, material: str, usage: str) -> tuple[Any, dict[str, Any]]:
    """Return the settings and the record of a run; BardletError for a folder that no run wrote."""
    if not (folder / "run.toml").exists():
        raise BardletError(f"{folder}: no run.toml, so its training {material} is unknown; evaluate on your own, with "
                           f"{usage}")
    return run_folder.settings(folder, use_edited=True)


def _warn_changed(source: Any, record: dict[str, Any]) -> None:
    if source.hash != record.get("text_hash"):
        log.warning("%s changed since the run trained on it; the run may have trained on its held-out examples",
                    source.name)


# ------------------------------------------------------------------------ translation


def evaluate_translation(folder: Path, text: Sequence[str], options: EvaluationOptions) -> TranslationEvaluation:
    """Return BLEU and chrF on --source and --target, or on the held-out pairs of the run."""
    options.refuse("field", "protocol", "context", why="needs a text, and this model translates")
    if text:
        raise BardletError(f"{' '.join(text)}: this model translates; name pairs with --source FILE --target FILE")
    if bool(options.source) != bool(options.target):
        raise BardletError("--source and --target go together; name both files")
    model = load(folder, device=options.device, dtype=options.dtype)
    decoding = model.translate_options(options.beam, 1.0, 64)
    device = next(model.module.parameters()).device
    runtime_device.set_threads_and_determinism(None, False, device)
    if options.source and options.target:
        pairs = bitext.read_pairs(Path(options.source), Path(options.target))
        source, reference = [a for a, _ in pairs], [b for _, b in pairs]
        name = f"{options.source} to {options.target}"
    else:
        config, record = _own_run(folder, "set of pairs", "--source FILE --target FILE")
        if not isinstance(config, TranslationConfig):
            raise BardletError(f"{folder}: not trained on sentence pairs; name some with --source FILE --target FILE")
        stage = Translation(config, Dist(0, 1, device))
        stage.source = stage.load_data()
        _warn_changed(stage.source, record)
        stage.data = bitext_batches.tokenize_pairs(stage.source, model.tokenizer)
        source, reference = stage.held_out_lines()
        name = f"held-out pairs of {stage.source.name}"
    if not source:
        raise BardletError(f"{name}: no lines; name files that have some")
    started = time.monotonic()
    translations = translate.translate_lines(model.module, model.tokenizer, source, decoding)
    seconds = time.monotonic() - started
    score = metrics.translation_score(translations, reference, model.tokenizer.lowercase)
    return TranslationEvaluation(name, score, seconds, options.beam)


# ------------------------------------------------------------------------ tasks


def evaluate_tasks(folder: Path, text: Sequence[str], options: EvaluationOptions,
                   progress: Callable[[str, int, int | None], None] | None = None) -> Iterator[TaskEvaluation]:
    """Yield the accuracy on each task, as it is measured."""
    if text:
        raise BardletError(f"{' '.join(text)}: --task brings its own text; drop it")
    options.refuse("field", "source", "target", "beam", "protocol", "context",
                   why="does not go with --task, which brings its own text")  # fmt: skip
    if translates(folder):
        raise BardletError(f"{folder}: this model translates, and --task needs a language model; name pairs with "
                           "--source FILE --target FILE")
    names = tuple(dict.fromkeys(options.task))
    questions = {name: tasks.records(name, options.limit) for name in names}  # a missing file is an error before work
    model = load(folder, device=options.device)
    device = next(model.module.parameters()).device
    runtime_device.set_threads_and_determinism(None, False, device)
    template, dtype = chat_format(model.tokenizer), runtime_device.pick_dtype(options.dtype, device)
    for name, records in questions.items():
        form = CHAT_TEMPLATE if template is not None and tasks.find(name).kind == "number" else PLAIN_TEXT
        started = time.monotonic()
        report = partial(progress, f"{name}: {len(records):,} questions") if progress else None
        evaluator = likelihood.TaskEvaluator(model.module, model.tokenizer, device, dtype, template, report)
        result = evaluator.measure(name, records)
        yield TaskEvaluation(name, result, form, time.monotonic() - started, model.module.config.block_size)


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Return the format that puts a question in bardlet's chat template; None for a tokenizer without it."""
    if chat_template.reason_against(tokenizer) is not None:
        return None

    def ask(text: str) -> list[int]:
        ids, _ = chat_template.encode(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        return [int(i) for i in ids]

    return ChatFormat(ask, answers.stop_ids(tokenizer))
