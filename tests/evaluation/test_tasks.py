"""Benchmark tasks: the prompts of each, and the errors for invalid files."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bardlet.errors import BardletError
from bardlet.evaluation import tasks
from bardlet.evaluation.tasks import Record

Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Return a function that writes records, or text, to the file of a task."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path))

    def write(name: str, *values: object) -> None:
        path = tmp_path / tasks.TASKS[name].file
        path.parent.mkdir(exist_ok=True)
        text = "".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values)
        path.write_bytes((lzma if path.suffix == ".xz" else gzip).compress(text.encode()))

    return write


RECORD = {"query": "Question: what?", "choices": ["a", "b c", "d"], "gold": 1}


def test_prompts_match_the_harness(put: Put) -> None:
    """The prompts of lm_eval/tasks for the same questions, with a space before each continuation."""
    put("hellaswag", "A: He sits. he\n1\nruns.\nsits.\nflies.\nsings.\n")
    assert tasks.records("hellaswag") == [
        Record(tuple(("A: He sits. he", f" {end}") for end in ("runs.", "sits.", "flies.", "sings.")), 1)]
    put("arc-easy", RECORD)
    prompt = "Question: what?\nAnswer:"
    assert tasks.records("arc-easy") == [Record(((prompt, " a"), (prompt, " b c"), (prompt, " d")), 1)]
    put("piqa", {**RECORD, "query": "Question: what?\n"})
    assert tasks.records("piqa")[0].options[0] == (prompt, " a")
    put("copa", RECORD)
    assert tasks.records("copa")[0].options[2] == ("Question: what?", " d")
    put("winogrande", {"context_options": ["Ann and Bo, so Ann", "Ann and Bo, so Bo"], "continuation": "left.",
                       "gold": 0})  # fmt: skip
    assert tasks.records("winogrande") == [Record((("Ann and Bo, so Ann", " left."), ("Ann and Bo, so Bo", " left.")))]
    put("mmlu", {"subject": "high_school_physics", "question": "What? ", "choices": list("wxyz"), "answer": "C"})
    [record] = tasks.records("mmlu")
    prompt = ("The following are multiple choice questions (with answers) about high school physics.\n\nWhat?\n"
              "A. w\nB. x\nC. y\nD. z\nAnswer:")  # fmt: skip
    assert record.options[record.gold] == (prompt, " C")
    put("lambada", {"context": "He said", "continuation": "\n\nyes"})
    assert tasks.records("lambada") == [Record((("He said", " yes"),))]
    put("arithmetic", {"context": "25-759=", "continuation": "-734"})
    assert tasks.records("arithmetic") == [Record((("25-759=", "-734"),), question="25-759=")]
    put("gsm8k", {"question": "How many?", "answer": "2 and <<2+2=4>>4\n#### 1,004"})
    assert tasks.records("gsm8k") == [Record((("Question: How many?\nAnswer:", "1004"),), question="How many?")]


def test_limited_questions_are_spread_evenly(put: Put) -> None:
    put("copa", *({**RECORD, "query": str(n)} for n in range(10)))
    queries = [[record.options[0][0] for record in tasks.records("copa", limit)] for limit in (None, 3, 99)]
    assert queries == [list("0123456789"), ["0", "3", "6"], list("0123456789")]


def test_chance_and_majority_accuracy() -> None:
    """Chance is the mean of 1 / options; only label tasks have a majority answer."""
    two, four = (Record((("a", " b"),) * n, gold) for n, gold in ((2, 1), (4, 3)))
    assert tasks.chance_accuracy("choice", [two, four]) == (1 / 2 + 1 / 4) / 2
    assert tasks.chance_accuracy("last", [two]) == tasks.chance_accuracy("number", [two]) == 0
    assert tasks.majority_accuracy("label", [two, two, four]) == 2 / 3
    assert tasks.majority_accuracy("choice", [two, four]) is None


@pytest.mark.parametrize(("name", "values", "message"), [
    ("copa", ["{"], "line 1: is not JSON"),
    ("copa", [RECORD, {"query": "x", "gold": 1}], "line 2: not a valid copa question (KeyError: 'choices')"),
    ("copa", [{**RECORD, "gold": 3}], "gold is 3, but there are 3 options"),
    ("copa", [{**RECORD, "gold": True}], "gold is not an integer"),
    ("copa", [{**RECORD, "choices": ["a", 2]}], "choices is not a list of strings"),
    ("copa", [{**RECORD, "choices": ["a", ""]}], "choices has fewer than two strings, or an empty one"),
    ("copa", [{**RECORD, "query": None}], "query is not a string"),
    ("copa", [""], "contains no questions"),
    ("mmlu", [{"subject": "s", "question": "q", "choices": ["a", "b"], "answer": "A"}], "not a valid mmlu question"),
    ("gsm8k", [{"question": "q", "answer": "4"}], "no #### in the answer"),
    ("hellaswag", ["context\n1\na\nb\nc\n"], "line 1: expected a context, a number and four endings"),
    ("hellaswag", ["context\n7\na\nb\nc\nd\n"], "gold is 7"),
])  # fmt: skip
def test_an_invalid_file_is_a_one_line_error(name: str, values: list[object], message: str, put: Put) -> None:
    put(name, *values)
    with pytest.raises(BardletError) as error:
        tasks.records(name)
    assert message in str(error.value) and "\n" not in str(error.value) and Path(tasks.TASKS[name].file).name in str(
        error.value)  # fmt: skip


def test_help_names_every_task() -> None:
    """The names are literals in the source, so that --help does not import the tasks: same names, same order."""
    source = (Path(tasks.__file__).parents[1] / "config" / "inference.py").read_text(encoding="utf-8")
    listed = source.split("from $BARDLET_DATA. ")[1].split('."""')[0]
    assert " ".join(listed.split()).split(", ") == list(tasks.TASKS)


COUNTS = {"hellaswag": 10_042, "arc-easy": 2_376, "arc-challenge": 1_172, "openbookqa": 500, "piqa": 1_838, "copa": 100,
          "winogrande": 1_267, "winograd": 273, "boolq": 3_270, "commonsense-qa": 1_221, "siqa": 1_954, "mmlu": 14_042,
          "lambada": 5_153, "arithmetic": 1_000, "gsm8k": 1_319}  # fmt: skip
CHANCE = {"hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "boolq": 0.5, "commonsense-qa": 0.25, "siqa": 0.5,
          "lambada": 0.0, "arithmetic": 0.0, "gsm8k": 0.0}  # fmt: skip


@pytest.mark.parametrize("name", tasks.TASKS)
def test_real_files_are_complete(name: str) -> None:
    """Number of questions as in $BARDLET_DATA's README, and the known chance level."""
    data = os.environ.get("BARDLET_DATA")
    if not data or not (Path(data) / tasks.TASKS[name].file).exists():
        pytest.skip(f"needs BARDLET_DATA with {tasks.TASKS[name].file}")
    questions = tasks.records(name)
    assert len(questions) == COUNTS[name]
    assert tasks.chance_accuracy(tasks.TASKS[name].kind, questions) == CHANCE.get(name, len(questions[0].options) ** -1)
    assert all(context.strip() and continuation.strip() for record in questions
               for context, continuation in record.options)  # fmt: skip
    if name == "boolq":
        assert tasks.majority_accuracy("label", questions) == pytest.approx(2_033 / 3_270)
