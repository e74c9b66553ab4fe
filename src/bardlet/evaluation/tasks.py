"""Named tasks: questions whose answer is known, from files under $BARDLET_DATA. No model and no token here.

    choice     one context, several continuations, one of them right
    label      the same where the continuations are names (yes and no, the letters of a list) in every question
    context    several contexts, one continuation, which belongs to one of them (Trinh and Le 2018, *A Simple Method for
               Commonsense Reasoning*, section 3.2: partial scoring)
    last       one context and what really came next
    number     a question, and the number that answers it

The texts are put together as EleutherAI's lm-evaluation-harness (0.4.13) has them in `lm_eval/tasks`, where it has the
task, without examples in front: a space stands before each continuation. commonsense-qa and siqa are as in the files,
a list with letters (MosaicML's llm-foundry, `eval/local_data`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from bardlet.data import corpus
from bardlet.data import records as data_records
from bardlet.data.text import Source, read_text
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

Kind = Literal["choice", "label", "context", "last", "number"]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Record:
    """A question with its answer.

    options: (context, continuation) of each text that could be right; where there is nothing to choose, of the one that
    is. gold: which is right. question: of a number, as one asks somebody who answers questions.
    """

    options: tuple[tuple[str, str], ...]
    gold: int = 0
    question: str = ""


@dataclass(frozen=True)
class Task:
    """Where the questions of a task are, and how a record of the file becomes one.

    file: folder and name under $BARDLET_DATA. tokens: of a number, the longest answer. behind: of a number, what stands
    before it in an answer; empty: the answer begins with it.
    """

    what: str
    kind: Kind
    file: str
    read: Callable[[Mapping[str, Any]], Record]
    tokens: int = 0
    behind: str = ""


def find(name: str) -> Task:
    """The task of that name. BardletError for one that there is not, with the nearest, or all of them."""
    if name not in TASKS:
        near = get_close_matches(name.lower().replace("_", "-"), TASKS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BardletError(f"--task {name}: there is no such task{hint}; choose among {', '.join(TASKS)}")
    return TASKS[name]


def records(name: str, limit: int | None = None) -> list[Record]:
    """The questions of a task in the order of its file; with `limit` so many, evenly spread.

    Raises:
        BardletError: no such task; its file is nowhere, or holds something else, and where.
    """
    task = find(name)
    folder, file = task.file.split("/")
    where = corpus.folder_with(folder, [file])
    if where is None:
        raise BardletError(f"--task {name}: its questions are not on this machine: put {file} into the folder {folder} "
                           "of $BARDLET_DATA")
    found = []
    for place, value in (_sixes if ".txt" in file else data_records.records)(where / file):
        try:
            found.append(task.read(value))
        except (KeyError, TypeError, ValueError) as error:
            raise BardletError(f"{place}: is no question of {name} ({type(error).__name__}: {error}); "
                               "get the file again") from None
    if not found:
        raise BardletError(f"{where / file}: there is no question in it; get the file again")
    count = min(limit or len(found), len(found))
    return [found[i * len(found) // count] for i in range(count)]


def chance_accuracy(kind: Kind, questions: Sequence[Record]) -> float:
    """The share that guessing gets right: the mean of 1 / number of options; 0 where there is nothing to choose."""
    if kind in ("last", "number"):
        return 0.0
    return sum(1 / len(one.options) for one in questions) / len(questions)


def majority_accuracy(kind: Kind, questions: Sequence[Record]) -> float | None:
    """The share that the most frequent answer, given to each question, gets right; None where that is no answer."""
    if kind != "label":
        return None
    golds = [one.gold for one in questions]
    return max(map(golds.count, set(golds))) / len(golds)


# ------------------------------------------------------------------------------- a record of a file


def _sixes(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of the text file that HellaSwag comes in: context, number of the right ending, four endings."""
    [(_, text)] = read_text(Source(path, path.name), lambda source, what: log.warning("%s: %s", source.path, what))
    lines = text.rstrip("\n").split("\n")
    for start in range(0, len(lines), 6):
        place = f"{path}, line {start + 1}"
        query, gold, *endings = (*lines[start : start + 6], "", "")[:6]
        if not gold.isdecimal() or not all(endings):
            raise BardletError(f"{place}: is no context with a number and four endings below it; get the file again")
        yield place, {"query": query, "gold": int(gold), "choices": endings}


def _text(record: Mapping[str, Any], key: str) -> str:
    """The text in a field. KeyError, TypeError."""
    if not isinstance(record[key], str):
        raise TypeError(f"{key} is not a text")
    return record[key]


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    """The texts in a field, two or more, none of them empty. KeyError, TypeError, ValueError."""
    values = record[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{key} is not a list of texts")
    if len(values) < 2 or not all(values):
        raise ValueError(f"{key} has fewer than two texts, or an empty one")
    return values


def _gold(record: Mapping[str, Any], options: int) -> int:
    """The number of the right option. KeyError, TypeError, ValueError."""
    if type(record["gold"]) is not int:
        raise TypeError("gold is not a whole number")
    if not 0 <= record["gold"] < options:
        raise ValueError(f"gold is {record['gold']}, but there are {options} options")
    return int(record["gold"])


def _choices(behind: str = "") -> Callable[[Mapping[str, Any]], Record]:
    """A reader of `query`, `choices` and `gold`; `behind` is written after the query."""

    def read(record: Mapping[str, Any]) -> Record:
        query, choices = _text(record, "query") + behind, _texts(record, "choices")
        return Record(tuple((query, f" {choice}") for choice in choices), _gold(record, len(choices)))

    return read


def _contexts(record: Mapping[str, Any]) -> Record:
    contexts, end = _texts(record, "context_options"), _text(record, "continuation")
    return Record(tuple((context, f" {end}") for context in contexts), _gold(record, len(contexts)))


def _mmlu(record: Mapping[str, Any]) -> Record:
    choices = _texts(record, "choices")
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    subject, asked = _text(record, "subject").replace("_", " "), _text(record, "question").strip()
    query = (f"The following are multiple choice questions (with answers) about {subject}.\n\n{asked}\n{listed}"
             "Answer:")  # fmt: skip
    return Record(tuple((query, f" {letter}") for letter in LETTERS), LETTERS.index(_text(record, "answer")))


def _last_word(record: Mapping[str, Any]) -> Record:
    return Record(((_text(record, "context"), f" {_text(record, 'continuation').strip()}"),))


def _sum(record: Mapping[str, Any]) -> Record:
    asked = _text(record, "context")
    return Record(((asked, _text(record, "continuation").strip()),), question=asked)


def _gsm8k(record: Mapping[str, Any]) -> Record:
    asked, mark, number = _text(record, "question"), *_text(record, "answer").rpartition("####")[1:]
    if not mark:
        raise ValueError("no #### in the answer")
    return Record(((f"Question: {asked}\nAnswer:", number.strip().replace(",", "")),), question=asked)


GAUNTLET = "eval-gauntlet"
TASKS = {
    "hellaswag": Task("how a scene goes on", "choice", "hellaswag/hellaswag_val_full.txt.xz", _choices()),
    "arc-easy": Task("science at school", "choice", f"{GAUNTLET}/arc_easy.jsonl.gz", _choices("\nAnswer:")),
    "arc-challenge": Task("... the harder questions", "choice", f"{GAUNTLET}/arc_challenge.jsonl.gz",
                          _choices("\nAnswer:")),
    "openbookqa": Task("elementary science", "choice", f"{GAUNTLET}/openbook_qa.jsonl.gz", _choices()),
    "piqa": Task("how to do things", "choice", f"{GAUNTLET}/piqa.jsonl.gz", _choices("Answer:")),  # behind a line end
    "copa": Task("cause and effect", "choice", f"{GAUNTLET}/copa.jsonl.gz", _choices()),
    "winogrande": Task("whom a sentence means", "context", f"{GAUNTLET}/winogrande.jsonl.gz", _contexts),
    "winograd": Task("... the original schemas", "context", f"{GAUNTLET}/winograd_wsc.jsonl.gz", _contexts),
    "boolq": Task("yes or no, from a passage", "label", f"{GAUNTLET}/boolq.jsonl.gz", _choices("\nAnswer:")),
    "commonsense-qa": Task("common sense, by letters", "label", f"{GAUNTLET}/commonsense_qa.jsonl.gz", _choices()),
    "siqa": Task("what people feel and do, by letters", "label", f"{GAUNTLET}/siqa.jsonl.gz", _choices()),
    "mmlu": Task("57 subjects, by letters", "label", "mmlu/test.jsonl.gz", _mmlu),
    "lambada": Task("the last word of a passage", "last", f"{GAUNTLET}/lambada_openai.jsonl.gz", _last_word),
    "arithmetic": Task("sums and products", "number", f"{GAUNTLET}/simple_arithmetic_nospaces.jsonl.gz", _sum, 16),
    "gsm8k": Task("word problems", "number", "gsm8k/test.jsonl.gz", _gsm8k, 256, behind="####"),
}
