"""Accuracy on benchmark tasks: by the log-likelihood of the answer options, or by generated answers.

The log-likelihood of a continuation is the sum of log p of its tokens. Context and continuation are tokenized together
and split after the context's own number of tokens, as in EleutherAI's lm-evaluation-harness (0.4.13,
`TemplateLM._encode_pair`). Shape suffixes: `models/layers.py`; N scored tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bardlet.errors import BardletError
from bardlet.evaluation import tasks
from bardlet.evaluation.metrics import rows_at_once
from bardlet.evaluation.tasks import Record, Task
from bardlet.inference import generate
from bardlet.inference.drawing import Sampling
from bardlet.inference.sampling import row_seeds
from bardlet.inference.text_generation import prompt_ids
from bardlet.models.base import LectureModel
from bardlet.runtime.device import autocast
from bardlet.tokenizer import Tokenizer

Ids = Sequence[int]
Progress = Callable[[int, int], object]
"""Called with (number done, total)."""
NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?")
ROWS = 32
"""Answers generated at a time."""


@dataclass(frozen=True)
class Result:
    """A model's result on a task. Accuracies are from 0 to 1; None if the metric does not apply to the task.

    acc: accuracy. acc_norm: accuracy with the log p of a choice divided by its length in characters, without the
    leading space, so that short choices have no advantage (the harness's acc_norm). acc_last: accuracy of the last
    number in the answer (its flexible-extract). stderr, stderr_norm, stderr_last: one `standard_error` of each (its
    `mean_stderr`). perplexity: exp of the mean -log p of the last word. chance: accuracy of guessing. always: accuracy
    of the most frequent answer. records: number of questions scored. cut: number of these that lost their beginning
    because they exceed the window. Left out are too_long, questions with an option that alone exceeds the window, and
    unseen, questions with characters that the tokenizer does not know.
    """

    acc: float
    stderr: float | None
    chance: float
    always: float | None
    records: int
    cut: int
    too_long: int
    unseen: int
    acc_norm: float | None = None
    stderr_norm: float | None = None
    acc_last: float | None = None
    stderr_last: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class ChatFormat:
    """The prompt format of a chat model: `ask` returns the ids of a prompt, `stop_ids` end an answer."""

    ask: Callable[[str], Ids]
    stop_ids: Ids


def standard_error(accuracy: float, n: int) -> float | None:
    """Return the standard error of an accuracy over n questions, sqrt(p (1 - p) / (n - 1)); None for n = 1."""
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None


# ---------------------------------------------------------------------------------- likelihood


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Return the ids of a context and of its continuation, both lists, the first never empty.

    White space at the end of the context moves to the continuation: most tokenizers make it part of the next word. An
    empty context becomes the start of a document (`text_generation.prompt_ids`). BardletError for an unseen character.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return prompt_ids(tokenizer, None), tokenizer.encode(continuation).tolist()
    context_ids = tokenizer.encode(stripped).tolist()
    ids = tokenizer.encode(stripped + continuation).tolist()[len(context_ids) :]
    return [*tokenizer.prefix_ids, *context_ids], ids


@torch.no_grad()
def log_likelihoods(model: Any, pairs: Sequence[tuple[Ids, Ids]], device: torch.device, dtype: str = "fp32",
                    progress: Progress | None = None) -> list[tuple[float, bool]]:  # fmt: skip
    """Return (log p of the continuation in nats, True if greedy decoding would produce it) for each pair, in order.

    Args:
        model: decoder-only, on `device`; in eval mode meanwhile.
        pairs: ids of a context, at least one, and of its continuation, at most block_size. The model reads the last
            block_size + 1 ids of both together, the very last as a target only.
        dtype: precision of the matrix products, fp32 or bf16.

    Rows of similar length are batched, padded on the right, which causal attention hides. Pairs that differ only in
    their last token (the letters of a list) share a row. The head is applied at scored positions only.
    """
    window = model.config.block_size
    pairs_of_row: dict[tuple[int, ...], list[int]] = {}  # input ids -> indices of the pairs they score
    for number, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > window:
            raise ValueError(f"pair {number}: {len(context)} and {len(continuation)} tokens, with a window of {window}")
        pairs_of_row.setdefault(tuple([*context, *continuation][-(window + 1) : -1]), []).append(number)
    rows, results, done = sorted(pairs_of_row, key=len, reverse=True), [(0.0, True)] * len(pairs), 0
    with generate.eval_mode(model):
        while rows:
            size = rows_at_once(model.config, len(rows[0]))
            batch, rows = rows[:size], rows[size:]
            targets = [[pairs[number][1] for number in pairs_of_row[row]] for row in batch]
            counts = [max(map(len, continuations)) for continuations in targets]
            with autocast(dtype, device):
                logp = _last_log_probabilities(model, batch, counts, device)
            for row, continuations, row_NV in zip(batch, targets, logp.split(counts), strict=True):
                for number, target in zip(pairs_of_row[row], continuations, strict=True):
                    target_N = torch.tensor(target, dtype=torch.int64, device=device)
                    logp_NV = row_NV[len(row_NV) - len(target) :]
                    total = logp_NV.gather(1, target_N[:, None]).cpu().sum(dtype=torch.float64)
                    results[number] = total.item(), bool((logp_NV.argmax(-1) == target_N).all())
                    done += 1
            if progress is not None:
                progress(done, len(pairs))
    return results


def _last_log_probabilities(model: Any, batch: Sequence[Ids], counts: Sequence[int],
                            device: torch.device) -> torch.Tensor:  # fmt: skip
    """Return log p of the next token at the last `counts` positions of each row, rows concatenated: (N, V) float32."""
    idx_BT, length_B = generate.pad_rows(batch, device)
    time_T, first_B = torch.arange(idx_BT.shape[1], device=device), length_B - torch.tensor(counts, device=device)
    scored_BT = (time_T >= first_B[:, None]) & (time_T < length_B[:, None])
    # a lecture model has no `hidden`
    logits_NV = (model.logits(idx_BT)[scored_BT] if isinstance(model, LectureModel)
                 else model.logits(model.hidden(idx_BT)[scored_BT]))
    return logits_NV.float().log_softmax(-1)


# ---------------------------------------------------------------------------------- generated answers


def generate_answers(model: Any, tokenizer: Tokenizer, prompts: Sequence[Ids], tokens: int, *, dtype: str = "fp32",
                     progress: Progress | None = None, sampling: Sampling | None = None,
                     stop_ids: Ids = ()) -> list[str]:  # fmt: skip
    """Return the completion of each prompt as text without special tokens; decoding is greedy by default.

    A completion has at most `tokens` tokens, or half of the window; prompts that leave too little room are truncated
    on the left.
    """
    window = model.config.block_size
    tokens = min(tokens, max(1, window // 2))
    rows = [list(ids)[-max(1, window - tokens) :] for ids in prompts]
    completions = generate.generate_each(
        model, rows, [tokens] * len(rows), sampling or Sampling(temperature=0.0), seeds=row_seeds(0, len(rows)),
        rows=ROWS, stop_ids=stop_ids, dtype=torch.bfloat16 if dtype == "bf16" else None,
        on_end=lambda done: progress(done, len(rows)) if progress else None)  # fmt: skip
    # ids from vocab_size on are padding
    return [tokenizer.decode([i for i in ids if i < tokenizer.vocab_size], skip_special=True) for ids in completions]


def number_after(text: str, marker: str) -> str | None:
    """Return the number after the first `marker`, or at the start of the text for an empty marker; None without one.

    Commas and dollar signs are removed, so that numbers compare as strings.
    """
    _, matched, rest = text.partition(marker) if marker else ("", "start", text)
    number = NUMBER.match(rest.strip()) if matched else None
    return _plain(number[0]) if number else None


def last_number(text: str) -> str | None:
    """Return the last number in a text, in the format of `number_after`."""
    numbers = NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")


# ---------------------------------------------------------------------------------- tasks


def _has_unseen(tokenizer: Tokenizer, task: Task, record: Record) -> bool:
    """Return True if the model would have to read characters that its tokenizer does not know."""
    if task.kind == "number":
        return tokenizer.drop_unseen(record.options[0][0])[1] > 0
    return any(tokenizer.drop_unseen(context + continuation)[1] for context, continuation in record.options)


Outcomes = tuple[Sequence[Record], int, dict[str, Any]]
"""The scored questions, how many of them lost their beginning, and the metrics of `Result`."""


@dataclass(frozen=True)
class TaskEvaluator:
    """Measures a decoder-only model on tasks.

    model: on `device`. dtype: fp32 or bf16, precision of the matrix products. chat_format: format of the prompts of
    number tasks; None: plain text. All other prompts are plain text.
    """

    model: Any
    tokenizer: Tokenizer
    device: torch.device
    dtype: str = "fp32"
    chat_format: ChatFormat | None = None
    progress: Progress | None = None

    def measure(self, name: str, questions: Sequence[Record]) -> Result:
        """Return the accuracy of the model on questions of the task `name`.

        Raises:
            BardletError: no question is left: all exceed the window or have unseen characters.
        """
        task, window = tasks.find(name), self.model.config.block_size
        readable = [record for record in questions if not _has_unseen(self.tokenizer, task, record)]
        scored, cut, figures = (self._by_number if task.kind == "number" else self._by_likelihood)(task, readable)
        too_long, unseen = len(readable) - len(scored), len(questions) - len(readable)
        if not scored:
            raise BardletError(f"--task {name}: no question is left: {unseen:,} have characters that the tokenizer "
                               f"does not know, {too_long:,} exceed the model's window of {window}; choose another "
                               "task or another model")
        return Result(chance=tasks.chance_accuracy(task.kind, scored),
                      always=tasks.majority_accuracy(task.kind, scored), records=len(scored), cut=cut,
                      too_long=too_long, unseen=unseen, **figures)

    def _by_likelihood(self, task: Task, questions: Sequence[Record]) -> Outcomes:
        """Compare the options of each question, or score its only one."""
        window = self.model.config.block_size
        pairs = [[encode_pair(self.tokenizer, *option) for option in record.options] for record in questions]
        fitting = [(record, options) for record, options in zip(questions, pairs, strict=True)
                   if all(len(continuation) <= window for _, continuation in options)]  # fmt: skip
        cut = sum(any(len(context) + len(continuation) > window + 1 for context, continuation in options)
                  for _, options in fitting)  # fmt: skip
        flat = [pair for _, options in fitting for pair in options]
        likelihoods = iter(log_likelihoods(self.model, flat, self.device, self.dtype, self.progress))
        correct: list[bool] = []
        correct_norm: list[bool] = []
        nats = 0.0
        for record, _ in fitting:
            logp, greedy = zip(*(next(likelihoods) for _ in record.options), strict=True)
            length = [len(continuation.removeprefix(" ")) for _, continuation in record.options]
            correct.append(greedy[0] if task.kind == "last" else _argmax(logp) == record.gold)
            correct_norm.append(_argmax([score / n for score, n in zip(logp, length, strict=True)]) == record.gold)
            nats -= logp[0]
        figures = _accuracy(correct, "acc", "stderr")
        if task.kind == "choice":
            figures |= _accuracy(correct_norm, "acc_norm", "stderr_norm")
        if task.kind == "last" and correct:
            figures["perplexity"] = math.exp(nats / len(correct))
        return [record for record, _ in fitting], cut, figures

    def _by_number(self, task: Task, questions: Sequence[Record]) -> Outcomes:
        """Score questions whose answer is a number that the model generates."""
        window = self.model.config.block_size
        tokens = min(task.tokens, max(1, window // 2))
        if self.chat_format is None:
            stop_ids: Ids = self.tokenizer.stop_ids
            prompted = [(record, encode_pair(self.tokenizer, record.options[0][0], "")[0]) for record in questions]
        else:  # a chat prompt cannot be truncated on the left: it starts with the role
            stop_ids = self.chat_format.stop_ids
            prompted = [(record, self.chat_format.ask(record.question)) for record in questions]
            prompted = [(record, prompt) for record, prompt in prompted if len(prompt) + tokens <= window]
        questions, prompts = [record for record, _ in prompted], [prompt for _, prompt in prompted]
        answers = generate_answers(self.model, self.tokenizer, prompts, tokens, dtype=self.dtype,
                                   progress=self.progress, stop_ids=stop_ids)
        answers = [text.split("Question:")[0] for text in answers]  # a base model may invent the next question
        expected = [record.options[0][1] for record in questions]
        correct = [number_after(text, task.marker) == number for text, number in zip(answers, expected, strict=True)]
        figures = _accuracy(correct, "acc", "stderr")
        if task.marker or self.chat_format is not None:
            correct = [last_number(text) == number for text, number in zip(answers, expected, strict=True)]
            figures |= _accuracy(correct, "acc_last", "stderr_last")
        return questions, sum(len(prompt) + tokens > window for prompt in prompts), figures


def _argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def _accuracy(correct: Sequence[bool], name: str, error: str) -> dict[str, Any]:
    """Return accuracy and standard error, keyed by their names in `Result`."""
    accuracy = sum(correct) / max(1, len(correct))
    return {name: accuracy, error: standard_error(accuracy, len(correct))}
