"""Named tasks: the questions of each as its file has them, and what is said where a file is none."""

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
    """Puts records, or a text, where the file of a task is looked for."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path))

    def write(name: str, *values: object) -> None:
        path = tmp_path / tasks.TASKS[name].file
        path.parent.mkdir(exist_ok=True)
        text = "".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values)
        path.write_bytes((lzma if path.suffix == ".xz" else gzip).compress(text.encode()))

    return write


ASKED = {"query": "Question: what?", "choices": ["a", "b c", "d"], "gold": 1}


def test_the_texts_are_those_of_the_harness(put: Put) -> None:
    """What lm_eval/tasks writes for the same question, a space before each continuation."""
    put("hellaswag", "A: He sits. he\n1\nruns.\nsits.\nflies.\nsings.\n")
    assert tasks.records("hellaswag") == [
        Record(tuple(("A: He sits. he", f" {end}") for end in ("runs.", "sits.", "flies.", "sings.")), 1)]
    put("arc-easy", ASKED)
    asked = "Question: what?\nAnswer:"
    assert tasks.records("arc-easy") == [Record(((asked, " a"), (asked, " b c"), (asked, " d")), 1)]
    put("piqa", {**ASKED, "query": "Question: what?\n"})
    assert tasks.records("piqa")[0].options[0] == (asked, " a")
    put("copa", ASKED)
    assert tasks.records("copa")[0].options[2] == ("Question: what?", " d")
    put("winogrande", {"context_options": ["Ann and Bo, so Ann", "Ann and Bo, so Bo"], "continuation": "left.",
                       "gold": 0})  # fmt: skip
    assert tasks.records("winogrande") == [Record((("Ann and Bo, so Ann", " left."), ("Ann and Bo, so Bo", " left.")))]
    put("mmlu", {"subject": "high_school_physics", "question": "What? ", "choices": list("wxyz"), "answer": "C"})
    [one] = tasks.records("mmlu")
    assert one.options[one.gold] == ("The following are multiple choice questions (with answers) about high school "
                                     "physics.\n\nWhat?\nA. w\nB. x\nC. y\nD. z\nAnswer:", " C")  # fmt: skip
    put("lambada", {"context": "He said", "continuation": "\n\nyes"})
    assert tasks.records("lambada") == [Record((("He said", " yes"),))]
    put("arithmetic", {"context": "25-759=", "continuation": "-734"})
    assert tasks.records("arithmetic") == [Record((("25-759=", "-734"),), question="25-759=")]
    put("gsm8k", {"question": "How many?", "answer": "2 and <<2+2=4>>4\n#### 1,004"})
    assert tasks.records("gsm8k") == [Record((("Question: How many?\nAnswer:", "1004"),), question="How many?")]


def test_a_limit_is_spread_evenly(put: Put) -> None:
    put("copa", *({**ASKED, "query": str(n)} for n in range(10)))
    queries = [[one.options[0][0] for one in tasks.records("copa", limit)] for limit in (None, 3, 99)]
    assert queries == [list("0123456789"), ["0", "3", "6"], list("0123456789")]


def test_chance_and_the_most_frequent_answer() -> None:
    """The mean of 1 / options; only names that every question has can be answered always the same."""
    two, four = (Record((("a", " b"),) * n, gold) for n, gold in ((2, 1), (4, 3)))
    assert tasks.chance_accuracy("choice", [two, four]) == (1 / 2 + 1 / 4) / 2
    assert tasks.chance_accuracy("last", [two]) == tasks.chance_accuracy("number", [two]) == 0
    assert tasks.majority_accuracy("label", [two, two, four]) == 2 / 3 and tasks.majority_accuracy("choice", [two, four]) is None


@pytest.mark.parametrize(("name", "values", "said"), [
    ("copa", ["{"], "line 1: is not JSON"),
    ("copa", [ASKED, {"query": "x", "gold": 1}], "line 2: is no question of copa (KeyError: 'choices')"),
    ("copa", [{**ASKED, "gold": 3}], "gold is 3, but there are 3 options"),
    ("copa", [{**ASKED, "gold": True}], "gold is not a whole number"),
    ("copa", [{**ASKED, "choices": ["a", 2]}], "choices is not a list of texts"),
    ("copa", [{**ASKED, "choices": ["a", ""]}], "choices has fewer than two texts, or an empty one"),
    ("copa", [{**ASKED, "query": None}], "query is not a text"),
    ("copa", [""], "there is no question in it"),
    ("mmlu", [{"subject": "s", "question": "q", "choices": ["a", "b"], "answer": "A"}], "is no question of mmlu"),
    ("gsm8k", [{"question": "q", "answer": "4"}], "no #### in the answer"),
    ("hellaswag", ["context\n1\na\nb\nc\n"], "line 1: is no context with a number and four endings"),
    ("hellaswag", ["context\n7\na\nb\nc\nd\n"], "gold is 7"),
])  # fmt: skip
def test_a_file_that_is_none_is_one_line(name: str, values: list[object], said: str, put: Put) -> None:
    put(name, *values)
    with pytest.raises(BardletError) as error:
        tasks.records(name)
    assert said in str(error.value) and "\n" not in str(error.value) and Path(tasks.TASKS[name].file).name in str(
        error.value)  # fmt: skip


def test_help_names_every_task() -> None:
    """The names stand in the source, so that help needs no task: the same, in the same order."""
    text = (Path(tasks.__file__).parents[1] / "cli" / "eval.py").read_text(encoding="utf-8")
    listed = text.split("from $BARDLET_DATA: ")[1].split('."""')[0]
    assert " ".join(listed.split()).split(", ") == list(tasks.TASKS)


COUNTS = {"hellaswag": 10_042, "arc-easy": 2_376, "arc-challenge": 1_172, "openbookqa": 500, "piqa": 1_838, "copa": 100,
          "winogrande": 1_267, "winograd": 273, "boolq": 3_270, "commonsense-qa": 1_221, "siqa": 1_954, "mmlu": 14_042,
          "lambada": 5_153, "arithmetic": 1_000, "gsm8k": 1_319}  # fmt: skip
CHANCE = {"hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "boolq": 0.5, "commonsense-qa": 0.25, "siqa": 0.5,
          "lambada": 0.0, "arithmetic": 0.0, "gsm8k": 0.0}  # fmt: skip


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_real_files(name: str) -> None:
    """As many questions as $BARDLET_DATA's README says, and the chance level that is known of each."""
    data = os.environ.get("BARDLET_DATA")
    if not data or not (Path(data) / tasks.TASKS[name].file).exists():
        pytest.skip(f"needs BARDLET_DATA, with {tasks.TASKS[name].file} in it")
    questions = tasks.records(name)
    assert len(questions) == COUNTS[name]
    assert tasks.chance_accuracy(tasks.TASKS[name].kind, questions) == CHANCE.get(name, len(questions[0].options) ** -1)
    assert all(context.strip() and continuation.strip() for one in questions for context, continuation in one.options)
    if name == "boolq":
        assert tasks.majority_accuracy("label", questions) == pytest.approx(2_033 / 3_270)
