"""What an answer is worth: compared with the one that the data have, judged by a reward model, or by a command.

Each of these is called with the questions and the answers to them, and gives a number for each answer.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bardlet.config.finetuning import EXACT, RolloutConfig, is_command
from bardlet.data import chat_template
from bardlet.data.records import Question
from bardlet.errors import BardletError
from bardlet.evaluation.metrics import rows_at_once
from bardlet.inference.generate import pad_rows
from bardlet.run import hf
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer

RESULT = "####"
LINES = 3
"""Of what a program that failed has said, the last ones that are told."""
AT_ONCE = 64
"""Answers that a reward model reads at once, at most."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its text, and whether it ended by itself."""

    text: str
    ended: bool


class Scorer(Protocol):
    """What the answers to some questions are worth: (N,) float32."""

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> np.ndarray: ...


def exact(questions: Sequence[Question], answers: Sequence[Answer]) -> np.ndarray:
    """1 for an answer that ended and is the one that the data have, else 0; white space around it does not count.

    Where that of the data ends with `#### RESULT`, as in GSM8K, only what stands behind `####` counts, without commas.
    """
    right = []
    for question, answer in zip(questions, answers, strict=True):
        wanted, got = (question.answer or "").strip(), answer.text.strip()
        if RESULT in wanted:
            wanted, got = (text.rpartition(RESULT)[2].strip().replace(",", "") for text in (wanted, got))
        right.append(answer.ended and got == wanted)
    return np.array(right, np.float32)


class RewardModelScorer:
    """A reward model, with its own tokenizer."""

    def __init__(self, model: Any, tokenizer: Tokenizer, dist: Dist, dtype: str) -> None:
        self.model, self.words, self.dist, self.dtype = model.to(dist.device), tokenizer, dist, dtype
        self.marks = chat_template.special_tokens(tokenizer)

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> np.ndarray:
        """The rewards; of a conversation that is longer than the model's window its end is read."""
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            talk = [*question.prompt, {"role": "assistant", "content": answer.text}]
            ids = chat_template.encode(self.words, talk, marks=self.marks)[0]
            rows.append(ids[-self.model.config.block_size :].tolist())
        made = np.zeros(len(rows), np.float32)
        order = np.argsort([len(row) for row in rows], kind="stable")
        size = min(AT_ONCE, rows_at_once(self.model.config, max(map(len, rows))))
        for first in range(0, len(order), size):
            which = order[first : first + size]
            with autocast(self.dtype, self.dist.device):
                reward_B = self.model(*pad_rows([rows[i] for i in which], self.dist.device))
            made[which] = reward_B.cpu().numpy()
        return made


class CommandScorer:
    """A program of the user's: it reads a line of JSON for each answer, with `messages`, `answer`, `ended` and, where
    the data have one, `reference`, and prints a number for each, in their order."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.again = f"; `bardlet resume RUN --reward '{command}'` goes on from the last checkpoint, if there is one"

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> np.ndarray:
        """The numbers. BardletError where the program fails, or prints something else."""
        lines = [json.dumps({"messages": question.prompt, "answer": answer.text, "ended": answer.ended,
                             "reference": question.answer}, ensure_ascii=False)
                 for question, answer in zip(questions, answers, strict=True)]
        # a session of its own: Ctrl-C is for the run, which ends when this is done
        done = subprocess.run(shlex.split(self.command), input="\n".join(lines) + "\n", capture_output=True,
                              encoding="utf-8", errors="replace", start_new_session=True)
        if done.returncode:
            said = " / ".join(done.stderr.strip().splitlines()[-LINES:])[-400:] or "nothing"
            raise BardletError(f"--reward '{self.command}': ended with {done.returncode} and said: {said}{self.again}")
        words = done.stdout.split()
        try:
            made = np.array([float(word) for word in words], np.float32)
        except ValueError as error:
            raise BardletError(f"--reward '{self.command}': printed what is no number ({error}){self.again}") from None
        if len(made) != len(lines) or not np.isfinite(made).all():
            what = f"{len(made)} numbers" if len(made) != len(lines) else "a number that is not finite"
            raise BardletError(f"--reward '{self.command}': printed {what} for {len(lines)} answers; print one for "
                               f"each line that it reads{self.again}")
        return made


def named(config: RolloutConfig) -> str | None:
    """The program that --reward names, if it names one. BardletError for a reward that is not there."""
    if config.reward is None:
        raise BardletError("say what an answer is worth: --reward exact, a run folder of `bardlet reward`, or a "
                           "command")
    if not is_command(config.reward):
        return None
    try:
        program = (shlex.split(config.reward) or [""])[0]
    except ValueError as error:
        raise BardletError(f"--reward {config.reward}: {str(error).lower()}; close what was opened") from None
    if shutil.which(program) is None:
        if Path(program).is_file():
            raise BardletError(f"--reward {config.reward}: is a file, and no program; if it is one of Python, say "
                               f"--reward 'python {config.reward}'")
        raise BardletError(f"--reward {config.reward}: there is no such folder, and no program {program or 'named'}; "
                           "say exact, a run folder of `bardlet reward`, or a command")
    return config.reward


def build(config: RolloutConfig, questions: Sequence[Question], dist: Dist) -> Scorer:
    """The reward that --reward names. BardletError for one that is not there, or that these questions do not have."""
    if program := named(config):
        return CommandScorer(program)
    if config.reward == EXACT:
        if without := sum(question.answer is None for question in questions):
            raise BardletError(f"--reward exact: {without:,} of {len(questions):,} questions have no answer to compare "
                               "with; name another reward, or leave these questions out")
        return exact
    return RewardModelScorer(*hf.read_folder(Path(str(config.reward)), scores=True), dist, config.dtype)
