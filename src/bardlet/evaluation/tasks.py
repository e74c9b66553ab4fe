"""Benchmark tasks: questions with known answers, from files under $BARDLET_DATA. Text only: no model, no tokenizer.

    choice     one context, several continuations, one correct
    label      the same with fixed continuations (yes and no, the letters of a list) for every question
    context    several contexts, one correct, and one continuation (Trinh and Le 2018, *A Simple Method for Commonsense
               Reasoning*, section 3.2: partial scoring)
    last       one context and its actual last word
    number     a question, and the number that answers it

Prompts are zero-shot and formatted as in EleutherAI's lm-evaluation-harness (0.4.13, `lm_eval/tasks`) for the tasks it
has, with a space before each continuation. commonsense-qa and siqa are as in the files, a list with letters (MosaicML's
llm-foundry, `eval/local_data`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from bardlet.data import named
from bardlet.data import records as data_records
from bardlet.data.blocks import read_text
from bardlet.data.forms import Unusable
from bardlet.data.text import Source
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

Kind = Literal["choice", "label", "context", "last", "number"]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Record:
    """A question with its answer.

    options: (context, continuation) of each possible answer, or of the correct one alone if there is no choice.
    gold: index of the correct option. question: for a number task, the question as a chat message.
    """

    options: tuple[tuple[str, str], ...]
    gold: int = 0
    question: str = ""


@dataclass(frozen=True)
class Task:
    """The file of a task, and a function that parses its records.

    file: folder and name under $BARDLET_DATA. For number tasks: tokens is the maximum length of an answer, marker the
    text before the number in an answer; empty: the answer starts with the number.
    """

    description: str
    kind: Kind
    file: str
    read: Callable[[Mapping[str, Any]], Record]
    tokens: int = 0
    marker: str = ""


def find(name: str) -> Task:
    """Return the task called `name`. BardletError for an unknown name, with the closest one and the full list."""
    if name not in TASKS:
        near = get_close_matches(name.lower().replace("_", "-"), TASKS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BardletError(f"--task {name}: no such task{hint}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def records(name: str, limit: int | None = None) -> list[Record]:
    """Return the questions of a task in file order; `limit`: at most this many, evenly spread.

    Raises:
        BardletError: unknown task, missing file, or an invalid record, with its position.
    """
    task = find(name)
    folder, file = task.file.split("/")
    directory = named.folder_with(folder, [file])
    if directory is None:
        raise BardletError(f"--task {name}: its questions are not on this machine; put {file} into "
                           f"$BARDLET_DATA/{folder}")
    questions = []
    for location, value in (_hellaswag_records if ".txt" in file else data_records.rows_of)(directory / file):
        if isinstance(value, Unusable):
            raise BardletError(f"{location}: {value}; download the file again")
        try:
            questions.append(task.read(value))
        except (KeyError, TypeError, ValueError) as error:
            raise BardletError(f"{location}: not a valid {name} question ({type(error).__name__}: {error}); "
                               "download the file again") from None
    if not questions:
        raise BardletError(f"{directory / file}: contains no questions; download the file again")
    count = min(limit or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def chance_accuracy(kind: Kind, questions: Sequence[Record]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of options; 0 if there is no choice."""
    if kind in ("last", "number"):
        return 0.0
    return sum(1 / len(record.options) for record in questions) / len(questions)


def majority_accuracy(kind: Kind, questions: Sequence[Record]) -> float | None:
    """Return the accuracy of always giving the most frequent answer; None for tasks other than label tasks."""
    if kind != "label":
        return None
    golds = [record.gold for record in questions]
    return max(map(golds.count, set(golds))) / len(golds)


# ------------------------------------------------------------------------------- parsing


def _hellaswag_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, record) from HellaSwag's text file: context, index of the correct ending, four endings."""
    [(_, text)] = read_text(Source(path, path.name), lambda source, note: log.warning("%s: %s", source.path, note))
    lines = text.rstrip("\n").split("\n")
    for start in range(0, len(lines), 6):
        location = f"{path}, line {start + 1}"
        query, gold, *endings = (*lines[start : start + 6], "", "")[:6]
        if not gold.isdecimal() or not all(endings):
            raise BardletError(f"{location}: expected a context, a number and four endings; download the file again")
        yield location, {"query": query, "gold": int(gold), "choices": endings}


def _text(record: Mapping[str, Any], key: str) -> str:
    """Return a string field. Raises KeyError or TypeError."""
    if not isinstance(record[key], str):
        raise TypeError(f"{key} is not a string")
    return record[key]


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of two or more non-empty strings. Raises KeyError, TypeError or ValueError."""
    values = record[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{key} is not a list of strings")
    if len(values) < 2 or not all(values):
        raise ValueError(f"{key} has fewer than two strings, or an empty one")
    return values


def _gold(record: Mapping[str, Any], options: int) -> int:
    """Return the index of the correct option. Raises KeyError, TypeError or ValueError."""
    if type(record["gold"]) is not int:
        raise TypeError("gold is not an integer")
    if not 0 <= record["gold"] < options:
        raise ValueError(f"gold is {record['gold']}, but there are {options} options")
    return int(record["gold"])


def _choices(suffix: str = "") -> Callable[[Mapping[str, Any]], Record]:
    """Return a parser of `query`, `choices` and `gold` that appends `suffix` to the query."""

    def read(record: Mapping[str, Any]) -> Record:
        query, choices = _text(record, "query") + suffix, _texts(record, "choices")
        return Record(tuple((query, f" {choice}") for choice in choices), _gold(record, len(choices)))

    return read


def _contexts(record: Mapping[str, Any]) -> Record:
    contexts, end = _texts(record, "context_options"), _text(record, "continuation")
    return Record(tuple((context, f" {end}") for context in contexts), _gold(record, len(contexts)))


def _mmlu(record: Mapping[str, Any]) -> Record:
    choices = _texts(record, "choices")
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    subject, question = _text(record, "subject").replace("_", " "), _text(record, "question").strip()
    query = (f"The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n{listed}"
             "Answer:")  # fmt: skip
    return Record(tuple((query, f" {letter}") for letter in LETTERS), LETTERS.index(_text(record, "answer")))


def _last_word(record: Mapping[str, Any]) -> Record:
    return Record(((_text(record, "context"), f" {_text(record, 'continuation').strip()}"),))


def _arithmetic(record: Mapping[str, Any]) -> Record:
    question = _text(record, "context")
    return Record(((question, _text(record, "continuation").strip()),), question=question)


def _gsm8k(record: Mapping[str, Any]) -> Record:
    question, marker, number = _text(record, "question"), *_text(record, "answer").rpartition("####")[1:]
    if not marker:
        raise ValueError("no #### in the answer")
    return Record(((f"Question: {question}\nAnswer:", number.strip().replace(",", "")),), question=question)


GAUNTLET = "eval-gauntlet"
TASKS = {
    "hellaswag": Task("what happens next in a scene", "choice", "hellaswag/hellaswag_val_full.txt.xz", _choices()),
    "arc-easy": Task("grade-school science", "choice", f"{GAUNTLET}/arc_easy.jsonl.gz", _choices("\nAnswer:")),
    "arc-challenge": Task("grade-school science, harder", "choice", f"{GAUNTLET}/arc_challenge.jsonl.gz",
                          _choices("\nAnswer:")),
    "openbookqa": Task("elementary science", "choice", f"{GAUNTLET}/openbook_qa.jsonl.gz", _choices()),
    # piqa's queries end in a line break
    "piqa": Task("physical common sense", "choice", f"{GAUNTLET}/piqa.jsonl.gz", _choices("Answer:")),
    "copa": Task("cause and effect", "choice", f"{GAUNTLET}/copa.jsonl.gz", _choices()),
    "winogrande": Task("pronoun resolution", "context", f"{GAUNTLET}/winogrande.jsonl.gz", _contexts),
    "winograd": Task("pronoun resolution, original schemas", "context", f"{GAUNTLET}/winograd_wsc.jsonl.gz", _contexts),
    "boolq": Task("yes or no, from a passage", "label", f"{GAUNTLET}/boolq.jsonl.gz", _choices("\nAnswer:")),
    "commonsense-qa": Task("common sense, by letter", "label", f"{GAUNTLET}/commonsense_qa.jsonl.gz", _choices()),
    "siqa": Task("social situations, by letter", "label", f"{GAUNTLET}/siqa.jsonl.gz", _choices()),
    "mmlu": Task("57 subjects, by letter", "label", "mmlu/test.jsonl.gz", _mmlu),
    "lambada": Task("the last word of a passage", "last", f"{GAUNTLET}/lambada_openai.jsonl.gz", _last_word),
    "arithmetic": Task("arithmetic", "number", f"{GAUNTLET}/simple_arithmetic_nospaces.jsonl.gz", _arithmetic, 16),
    "gsm8k": Task("math word problems", "number", "gsm8k/test.jsonl.gz", _gsm8k, 256, marker="####"),
}
