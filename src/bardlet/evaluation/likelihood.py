"""How many questions of a task a model answers: by the likelihood of texts, or by what it writes itself.

A text is likely or not by its tokens: log p of each, given those before, added up. What a choice is given is encoded
together with the choice, and cut apart behind its own number of tokens, as EleutherAI's lm-evaluation-harness does
(0.4.13, `TemplateLM._encode_pair`). Shape suffixes: those of `models/layers.py`; N tokens whose log p is asked for.
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
from bardlet.inference.text_generation import prompt_ids
from bardlet.models.base import LectureModel
from bardlet.runtime.device import autocast
from bardlet.tokenizer import Tokenizer

Ids = Sequence[int]
Progress = Callable[[int, int], object]
"""Is told how many are done, and of how many."""
NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?")
ROWS = 32
"""Answers that are written at once."""


@dataclass(frozen=True)
class Result:
    """How well a model does a task. Shares are from 0 to 1; None where a task has no such figure.

    acc: the share that is right; acc_norm: the same where log p of a choice is divided by its length in characters,
    without the space in front, so that short choices have no advantage (acc_norm of the harness); acc_last: the share
    in which the last number that was written is the right one (its flexible-extract). stderr, stderr_norm,
    stderr_last: one `standard_error` of each, as the harness has it (`mean_stderr`). perplexity: exp of the
    mean -log p of a last word. chance: what guessing gets right; always: what the most frequent answer gets right.
    records: how many were asked. Of them cut: how many are longer than the window, and lost their beginning. Left out
    are too_long, with an option that alone is longer than the window, and unseen, with characters that the tokenizer
    does not know.
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
    """How a model that answers is asked: `ask` gives the ids up to where the answer to a question begins, `stop_ids`
    are where an answer is over."""

    ask: Callable[[str], Ids]
    stop_ids: Ids


def standard_error(share: float, of: int) -> float | None:
    """Of the share of `of` questions that is right, sqrt(p (1 - p) / (n - 1)); None for a single question."""
    return math.sqrt(share * (1 - share) / (of - 1)) if of > 1 else None


# ---------------------------------------------------------------------------------- likelihood


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Ids, Ids]:
    """The ids of a context and of what follows it, both lists, the first never empty.

    White space at the context's end belongs to what follows: in most tokenizers it is part of a word's token. Where no
    context is left, it is what a text begins with (`text_generation.prompt_ids`). BardletError for an unseen character.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        return prompt_ids(tokenizer, None), tokenizer.encode(continuation).tolist()
    before = tokenizer.encode(kept).tolist()
    return before, tokenizer.encode(kept + continuation).tolist()[len(before) :]


@torch.no_grad()
def log_likelihoods(model: Any, pairs: Sequence[tuple[Ids, Ids]], device: torch.device, dtype: str = "fp32",
                    progress: Progress | None = None) -> list[tuple[float, bool]]:  # fmt: skip
    """(log p of the continuation in nats, whether each of its tokens is the likeliest) of each pair, in their order.

    Args:
        model: decoder-only, on `device`; in eval mode meanwhile.
        pairs: ids of a context, at least one, and of its continuation, at most block_size of them. Of both together
            the model reads the last block_size + 1, the very last as a target only.
        dtype: precision of the matrix products, fp32 or bf16.

    Rows of similar lengths go through the model together, padded on the right, which causality hides. Pairs that differ
    in their last token alone (the letters of a list) are one row. The head is computed only where a target is.
    """
    window = model.config.block_size
    asked: dict[tuple[int, ...], list[int]] = {}  # what the model reads, and the pairs that it is read for
    for number, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > window:
            raise ValueError(f"pair {number}: {len(context)} and {len(continuation)} tokens, in a window of {window}")
        asked.setdefault(tuple([*context, *continuation][-(window + 1) : -1]), []).append(number)
    rows, made, done = sorted(asked, key=len, reverse=True), [(0.0, True)] * len(pairs), 0
    with generate.eval_mode(model):
        while rows:
            size = rows_at_once(model.config, len(rows[0]))
            batch, rows = rows[:size], rows[size:]
            targets = [[pairs[number][1] for number in asked[row]] for row in batch]
            counts = [max(map(len, several)) for several in targets]
            with autocast(dtype, device):
                logp = _last_log_probabilities(model, batch, counts, device)
            for row, several, logp_NV in zip(batch, targets, logp.split(counts), strict=True):
                for number, target in zip(asked[row], several, strict=True):
                    target_N = torch.tensor(target, dtype=torch.int64, device=device)
                    mine_NV = logp_NV[len(logp_NV) - len(target) :]
                    found = mine_NV.gather(1, target_N[:, None]).cpu().sum(dtype=torch.float64)
                    made[number] = found.item(), bool((mine_NV.argmax(-1) == target_N).all())
                    done += 1
            if progress is not None:
                progress(done, len(pairs))
    return made


def _last_log_probabilities(model: Any, batch: Sequence[Ids], counts: Sequence[int],
                            device: torch.device) -> torch.Tensor:  # fmt: skip
    """log p of each token behind the last `counts` places of each row, one row after the other: (N, V) float32."""
    idx_BT, length_B = generate.pad_rows(batch, device)
    time_T, first_B = torch.arange(idx_BT.shape[1], device=device), length_B - torch.tensor(counts, device=device)
    scored_BT = (time_T >= first_B[:, None]) & (time_T < length_B[:, None])
    # a rung of the ladder has no more than the lecture's logits
    logits_NV = (model.logits(idx_BT)[scored_BT] if isinstance(model, LectureModel)
                 else model.logits(model.hidden(idx_BT)[scored_BT]))
    return logits_NV.float().log_softmax(-1)


# ---------------------------------------------------------------------------------- what it writes


def generate_answers(model: Any, tokenizer: Tokenizer, prompts: Sequence[Ids], tokens: int, *, dtype: str = "fp32",
          progress: Progress | None = None, **options: Any) -> list[str]:
    """What a model writes behind each prompt, by default always its likeliest token: texts, without special tokens.

    At most `tokens` of them, or half of the window; of a prompt that leaves no room for them the last ids are read.
    options: those of `generate.generate`.
    """
    window = model.config.block_size
    tokens = min(tokens, max(1, window // 2))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    options = {"temperature": 0.0, **options, "dtype": torch.bfloat16 if dtype == "bf16" else None}
    made = [""] * len(prompts)
    for first in range(0, len(order), ROWS):
        these = order[first : first + ROWS]
        asked = [list(prompts[i])[-max(1, window - tokens) :] for i in these]
        for i, ids in zip(these, generate.generate(model, asked, tokens, **options), strict=True):
            made[i] = tokenizer.decode((token for token in ids if token < tokenizer.vocab_size), skip_special=True)
        if progress is not None:
            progress(first + len(these), len(order))
    return made


def number_after(text: str, mark: str) -> str | None:
    """The number that follows the first `mark` in a text, or where there is no mark to look for, begins it.

    Without commas and dollars, so that numbers compare as texts; None where there is none.
    """
    _, found, rest = text.partition(mark) if mark else ("", "found", text)
    number = NUMBER.match(rest.strip()) if found else None
    return _plain(number[0]) if number else None


def last_number(text: str) -> str | None:
    """The last number in a text, as `number_after` gives it."""
    numbers = NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")


# ---------------------------------------------------------------------------------- a task


def _has_unseen(tokenizer: Tokenizer, task: Task, one: Record) -> bool:
    """Whether a question has characters that the tokenizer does not know; what is written itself may be anything."""
    if task.kind == "number":
        return tokenizer.drop_unseen(one.options[0][0])[1] > 0
    return any(tokenizer.drop_unseen(context + continuation)[1] for context, continuation in one.options)


Outcomes = tuple[Sequence[Record], int, dict[str, Any]]
"""The questions that were asked, how many of them lost their beginning, and the figures of `Result`."""


@dataclass(frozen=True)
class TaskEvaluator:
    """A decoder-only model that is asked the questions of tasks.

    model: on `device`. dtype: fp32 or bf16, of its matrix products. talker: how it is asked for a number; None: as a
    text to go on with. All else is asked as a text.
    """

    model: Any
    tokenizer: Tokenizer
    device: torch.device
    dtype: str = "fp32"
    talker: ChatFormat | None = None
    progress: Progress | None = None

    def measure(self, name: str, questions: Sequence[Record]) -> Result:
        """How many of the questions of the task `name` the model answers.

        Raises:
            BardletError: no question is left, since none fits into the window, or all have unseen characters.
        """
        task, window = tasks.find(name), self.model.config.block_size
        seen = [one for one in questions if not _has_unseen(self.tokenizer, task, one)]
        asked, cut, figures = (self._by_number if task.kind == "number" else self._by_likelihood)(task, seen)
        too_long, unseen = len(seen) - len(asked), len(questions) - len(seen)
        if not asked:
            raise BardletError(f"--task {name}: no question is left: {unseen:,} have characters that the model's "
                               f"tokenizer has never seen, {too_long:,} do not fit into its window of {window}; take "
                               "another task, or another model")
        return Result(chance=tasks.chance_accuracy(task.kind, asked), always=tasks.majority_accuracy(task.kind, asked), records=len(asked),
                      cut=cut, too_long=too_long, unseen=unseen, **figures)

    def _by_likelihood(self, task: Task, questions: Sequence[Record]) -> Outcomes:
        """Questions whose options are compared, or whose one option is looked at."""
        window = self.model.config.block_size
        pairs = [[encode_pair(self.tokenizer, *option) for option in one.options] for one in questions]
        fitting = [(one, options) for one, options in zip(questions, pairs, strict=True)
                   if all(len(continuation) <= window for _, continuation in options)]  # fmt: skip
        cut = sum(any(len(context) + len(continuation) > window + 1 for context, continuation in options)
                  for _, options in fitting)  # fmt: skip
        alone = [pair for _, options in fitting for pair in options]
        found = iter(log_likelihoods(self.model, alone, self.device, self.dtype, self.progress))
        right: list[bool] = []
        right_norm: list[bool] = []
        nats = 0.0
        for one, _ in fitting:
            logp, likeliest = zip(*(next(found) for _ in one.options), strict=True)
            length = [len(continuation.removeprefix(" ")) for _, continuation in one.options]
            right.append(likeliest[0] if task.kind == "last" else _largest(logp) == one.gold)
            right_norm.append(_largest([score / n for score, n in zip(logp, length, strict=True)]) == one.gold)
            nats -= logp[0]
        figures = _share(right, "acc", "stderr")
        if task.kind == "choice":
            figures |= _share(right_norm, "acc_norm", "stderr_norm")
        if task.kind == "last" and right:
            figures["perplexity"] = math.exp(nats / len(right))
        return [one for one, _ in fitting], cut, figures

    def _by_number(self, task: Task, questions: Sequence[Record]) -> Outcomes:
        """Questions whose answer is a number that the model writes."""
        window = self.model.config.block_size
        tokens = min(task.tokens, max(1, window // 2))
        if self.talker is None:
            stop_ids: Ids = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
            asked = [(one, encode_pair(self.tokenizer, one.options[0][0], "")[0]) for one in questions]
        else:  # the beginning of a conversation says who speaks, and cannot be cut off
            stop_ids = self.talker.stop_ids
            asked = [(one, self.talker.ask(one.question)) for one in questions]
            asked = [(one, prompt) for one, prompt in asked if len(prompt) + tokens <= window]
        questions, prompts = [one for one, _ in asked], [prompt for _, prompt in asked]
        made = generate_answers(self.model, self.tokenizer, prompts, tokens, dtype=self.dtype, progress=self.progress,
                     stop_ids=stop_ids)
        made = [text.split("Question:")[0] for text in made]  # where the next question would begin
        wanted = [one.options[0][1] for one in questions]
        right = [number_after(text, task.behind) == number for text, number in zip(made, wanted, strict=True)]
        figures = _share(right, "acc", "stderr")
        if task.behind or self.talker is not None:
            right = [last_number(text) == number for text, number in zip(made, wanted, strict=True)]
            figures |= _share(right, "acc_last", "stderr_last")
        return questions, sum(len(prompt) + tokens > window for prompt in prompts), figures


def _largest(values: Sequence[float]) -> int:
    """The place of the largest value, of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def _share(right: Sequence[bool], name: str, error: str) -> dict[str, Any]:
    """The share that is right, and its standard error, by the names that they have in `Result`."""
    share = sum(right) / max(1, len(right))
    return {name: share, error: standard_error(share, len(right))}
