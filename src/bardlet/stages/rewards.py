"""Scorers of completions: exact match with a reference answer, a reward model, or a user's command.

A scorer is called with prompts and their completions, and returns a reward for each completion.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bardlet.config.finetuning import EXACT, RolloutConfig, is_command
from bardlet.data import chat_template
from bardlet.data.forms import Question
from bardlet.errors import BardletError
from bardlet.evaluation.metrics import rows_at_once
from bardlet.inference.generate import pad_rows
from bardlet.run import hf
from bardlet.run.record import Record
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer

RESULT = "####"
STDERR_LINES = 3
"""Last lines of stderr that an error message quotes when a command fails."""
TIMEOUT = 600
"""Seconds in which a command must score the completions of a rollout."""
MAX_ROWS = 64
"""Completions per batch of a reward model, at most."""


@dataclass(frozen=True)
class Completion:
    """A completion: its text, and whether it ended with a stop token."""

    text: str
    ended: bool


class Scorer(Protocol):
    """A function that returns the rewards of completions, (N,) float32."""

    def __call__(self, questions: Sequence[Question], completions: Sequence[Completion]) -> np.ndarray: ...


def exact(questions: Sequence[Question], completions: Sequence[Completion]) -> np.ndarray:
    """Return 1 for a completion that ended and equals the reference answer up to outer white space, else 0.

    If the reference ends with `#### RESULT`, as in GSM8K, only the text after `####` is compared, without commas.
    """
    correct = []
    for question, completion in zip(questions, completions, strict=True):
        expected, actual = (question.answer or "").strip(), completion.text.strip()
        if RESULT in expected:
            expected, actual = (text.rpartition(RESULT)[2].strip().replace(",", "") for text in (expected, actual))
        correct.append(completion.ended and actual == expected)
    return np.array(correct, np.float32)


class RewardModelScorer:
    """A reward model with its own tokenizer."""

    def __init__(self, model: Any, tokenizer: Tokenizer, dist: Dist, dtype: str) -> None:
        self.model, self.tokenizer, self.dist, self.dtype = model.to(dist.device), tokenizer, dist, dtype
        self.special_tokens = chat_template.special_tokens(tokenizer)

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], completions: Sequence[Completion]) -> np.ndarray:
        """Return the rewards; a conversation longer than the context window loses its beginning."""
        rows = []
        for question, completion in zip(questions, completions, strict=True):
            messages = [*question.prompt, {"role": "assistant", "content": completion.text}]
            ids = chat_template.encode(self.tokenizer, messages, special=self.special_tokens)[0]
            rows.append(ids[-self.model.config.block_size :].tolist())
        rewards = np.zeros(len(rows), np.float32)
        order = np.argsort([len(row) for row in rows], kind="stable")
        size = min(MAX_ROWS, rows_at_once(self.model.config, max(map(len, rows))))
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            with autocast(self.dtype, self.dist.device):
                reward_B = self.model(*pad_rows([rows[i] for i in indices], self.dist.device))
            rewards[indices] = reward_B.cpu().numpy()
        return rewards


def _run(command: Sequence[str], text: str) -> tuple[int, str, str]:
    """Run a command on a text; return (exit code, stdout, stderr). subprocess.TimeoutExpired after TIMEOUT seconds.

    It has its own session, so that Ctrl-C reaches only the run, which stops after this call, and so that whatever the
    command started ends with it.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding="utf-8", errors="replace", start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(text, TIMEOUT)
        except BaseException:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    return process.returncode, stdout, stderr


class CommandScorer:
    """A user's command: it reads a line of JSON per completion and prints a number for each, in the same order.

    Each line has `messages`, `answer`, `ended` and `reference`, which is null if the data have no reference answer.
    """

    def __init__(self, command: str, record: Record | None = None) -> None:
        """record: of the run that uses the scorer, for messages."""
        self.command, self.record = command, record

    def __call__(self, questions: Sequence[Question], completions: Sequence[Completion]) -> np.ndarray:
        """Return the printed numbers. Raise BardletError if the command fails or prints anything else."""
        lines = [json.dumps({"messages": question.prompt, "answer": completion.text, "ended": completion.ended,
                             "reference": question.answer}, ensure_ascii=False)
                 for question, completion in zip(questions, completions, strict=True)]
        try:
            code, stdout, stderr = _run(shlex.split(self.command), "\n".join(lines) + "\n")
        except subprocess.TimeoutExpired:
            raise self._error(f"did not finish within {TIMEOUT} seconds for {len(lines)} completions") from None
        if code:
            stderr = " / ".join(stderr.strip().splitlines()[-STDERR_LINES:])[-400:] or "(empty)"
            raise self._error(f"failed with exit code {code}, stderr: {stderr}")
        try:
            rewards = np.array([float(text) for text in stdout.split()], np.float32)
        except ValueError as error:
            raise self._error(f"printed something other than numbers ({error})") from None
        if len(rewards) != len(lines) or not np.isfinite(rewards).all():
            count = f"{len(rewards)} numbers" if len(rewards) != len(lines) else "a number that is not finite"
            raise self._error(f"printed {count} for {len(lines)} completions, instead of a number for each line")
        return rewards

    def _error(self, message: str) -> BardletError:
        command = shlex.quote(self.command)
        saved = self.record is not None and self.record.saved is not None  # else there is no run to continue
        again = f"continue the run: `bardlet resume RUN --reward {command}`" if saved else "run the command again"
        return BardletError(f"--reward {command}: {message}; fix it, then {again}")


def find_command(config: RolloutConfig) -> str | None:
    """Return the command of --reward, or None for another kind of reward. Raise BardletError if it does not exist."""
    if config.reward is None:
        raise BardletError("choose a reward: --reward exact, a run folder of `bardlet reward`, or a command")
    if not is_command(config.reward):
        return None
    try:
        program = (shlex.split(config.reward) or [""])[0]
    except ValueError as error:
        raise BardletError(f"--reward {config.reward}: {str(error).lower()}; fix the quoting") from None
    if shutil.which(program) is None:
        if Path(program).is_file():
            command = shlex.quote(f"python {config.reward}")
            raise BardletError(f"--reward {config.reward}: the file is not executable; for a Python script use "
                               f"--reward {command}")
        raise BardletError(f"--reward {config.reward}: no such folder, and no such program{program and f' {program}'}; "
                           "use exact, a run folder of `bardlet reward`, or a command")
    return config.reward


def build(config: RolloutConfig, questions: Sequence[Question], dist: Dist, record: Record | None = None) -> Scorer:
    """Return the scorer for --reward. Raise BardletError if it does not exist, or if reference answers are missing."""
    if command := find_command(config):
        return CommandScorer(command, record)
    if config.reward == EXACT:
        if without := sum(question.answer is None for question in questions):
            raise BardletError(f"--reward exact: {without:,} of {len(questions):,} prompts have no reference answer; "
                               "use another reward, or remove these prompts")
        return exact
    return RewardModelScorer(*hf.read_folder(Path(str(config.reward)), scores=True), dist, config.dtype)
