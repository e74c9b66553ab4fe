"""The exercises of the course: addition never trains on a test sum, finetuning compares fairly."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from bardlet.data import batch as data_batch
from bardlet.errors import BardletError
from bardlet.models.base import LectureModel
from bardlet.runtime.distributed import Dist
from bardlet.training import losses

EXERCISES = Path(__file__).parents[2] / "docs" / "exercises"
CPU = Dist(0, 1, torch.device("cpu"))


def load(name: str) -> ModuleType:
    """Load a script of docs/exercises as a module."""
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", EXERCISES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


addition, finetune = load("addition"), load("finetune")
TASKS = [addition.Task(*options) for options in product((1, 2, 3), (True, False), (True, False))]

# ---------------------------------------------------------------- addition: sums as text


def test_sum_has_the_format_of_the_exercise() -> None:
    """The example of the lecture's exercise, reversed and in normal order."""
    assert addition.Task().write(123, 456) == "123+456=9750"
    assert addition.Task(reverse=False).write(123, 456) == "123+456=0579"
    assert addition.Task(digits=2).write(7, 95) == "07+95=201"


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_sums_round_trip(task: Any) -> None:
    """Text to ids and back, and reading the answer, for random pairs and the largest."""
    largest = 10**task.digits - 1
    pairs = [(0, 0), (largest, largest), *np.random.default_rng(0).integers(largest + 1, size=(300, 2)).tolist()]
    for a, b in pairs:
        text = task.write(a, b)
        assert addition.decode(addition.encode(text)) == text
        assert len(text) == task.question + task.answer
        assert text[: task.question] == f"{a:0{task.digits}d}+{b:0{task.digits}d}="
        assert task.read(text[task.question :]) == a + b
    assert task.read("+" * task.answer) is None


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_loss_covers_the_answer(task: Any) -> None:
    """Masked: IGNORE exactly where the target is a character of the question. Unmasked: no IGNORE."""
    pairs = np.random.default_rng(1).integers(10**task.digits, size=(50, 2))
    batch = addition.to_batch(pairs, task)
    for (a, b), idx, target in zip(pairs.tolist(), batch["idx"].tolist(), batch["target"].tolist(), strict=True):
        ids = addition.encode(task.write(a, b))
        assert idx == ids[:-1]
        ignored = task.question - 1 if task.mask else 0
        assert target == [losses.IGNORE] * ignored + ids[1 + ignored :]
        assert addition.decode(target[-task.answer :]) == task.write(a, b)[task.question :]
    assert losses.count_targets(batch) == 50 * (task.answer if task.mask else task.question + task.answer - 1)


# ---------------------------------------------------------------- addition: data


def codes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a number for each {a, b}: the same for a+b and b+a."""
    return np.minimum(first, second) * 1000 + np.maximum(first, second)


def operands(batch: data_batch.Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return (a, b) from the text of a batch; the id of a digit is the digit."""
    ids, powers = batch["idx"].numpy(), np.array([100, 10, 1])
    return ids[:, 0:3] @ powers, ids[:, 4:7] @ powers


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_every_pair_is_in_exactly_one_part(digits: int) -> None:
    """Test, development and training parts together contain each {a, b} once; the split is always the same."""
    parts = addition.split(digits)
    pairs = np.sort(np.concatenate([codes(*part.T) for part in parts]))
    assert (pairs == np.sort([a * 1000 + b for b in range(10**digits) for a in range(b + 1)])).all()
    assert all((part == again).all() for part, again in zip(parts, addition.split(digits), strict=True))
    if digits == 3:
        assert [len(part) for part in parts] == [1000, 1000, 498_500]


def test_training_never_sees_a_test_sum() -> None:
    """1,000 batches contain no test or development pair in either order, but training pairs in both orders."""
    test, development, _ = addition.split(3)
    objective = addition.addition_objective(addition.Task(), 5, 128, CPU.device)
    batches = [operands(objective.batch(step)) for step in range(1000)]
    a, b = (np.concatenate(column) for column in zip(*batches, strict=True))
    assert not np.isin(codes(a, b), np.concatenate([codes(*test.T), codes(*development.T)])).any()
    assert len(np.unique(codes(a, b))) > 100_000
    ordered = len(np.unique(a * 1000 + b))
    assert ordered > 1.03 * len(np.unique(codes(a, b)))  # many pairs occur as a+b and as b+a


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    """Another objective and another order of calls give the same batch; another seed or step gives another."""
    def build(seed: int) -> Any:
        return addition.addition_objective(addition.Task(), seed, 64, CPU.device)

    first, second = build(1), build(1)
    second.batch(0)
    for name in ("idx", "target"):
        assert torch.equal(first.batch(7)[name], second.batch(7)[name])
    assert not torch.equal(first.batch(7)["idx"], first.batch(8)["idx"])
    assert not torch.equal(first.batch(7)["idx"], build(2).batch(7)["idx"])


# ---------------------------------------------------------------- addition: training and evaluation


def test_thirty_steps_lower_the_loss() -> None:
    """Thirty updates of a smaller model by train_step: clearly better than uniform guessing."""
    config = replace(addition.settings(seed=3, steps=30), n_embd=64, batch_size=64, dtype="fp32")
    objective, model = addition.addition_objective(addition.Task(), 3, 64, CPU.device), addition.new_model(config, CPU)
    history: list[float] = []
    addition.train(model, objective, config, CPU, lambda step, loss: history.append(loss))
    assert len(history) == 30
    assert abs(history[0] - math.log(len(addition.ALPHABET))) < 0.2
    assert history[-1] < history[0] - 0.4
    assert objective.evaluate(model.eval()) < history[0] - 0.4


class Calculator(LectureModel):
    """A stand-in for a model: adds correctly, or forgets the carry of the units, and writes in reverse."""

    def __init__(self, task: Any, forgets: bool) -> None:
        super().__init__(replace(addition.settings(0), block_size=16).model_config(len(addition.ALPHABET)))
        self.task, self.forgets = task, forgets
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        B, T = idx.shape
        logits_BTV = torch.zeros(B, T, len(addition.ALPHABET))
        for row, ids in enumerate(idx.tolist()):
            a, b = addition.decode(ids[: self.task.question - 1]).split("+")
            total = int(a) + int(b) - (10 if self.forgets and int(a[-1]) + int(b[-1]) > 9 else 0)
            digits = addition.encode(f"{total:0{self.task.answer}d}"[::-1])
            for i, digit in enumerate(digits[: T - self.task.question + 1]):
                logits_BTV[row, self.task.question - 1 + i, digit] = 1.0
        return logits_BTV


def test_evaluation_counts_whole_sums(capsys: pytest.CaptureFixture[str]) -> None:
    """A calculator gets every sum right; one that forgets the carry of the units, exactly the sums without it."""
    task, test = addition.Task(), addition.split(3)[0][:200]
    assert addition.count_exact(addition.predict_sums(Calculator(task, False), test, task), test) == 200
    answers = addition.predict_sums(Calculator(task, True), test, task)
    assert addition.count_exact(answers, test) == ((test % 10).sum(axis=1) < 10).sum()
    addition.print_examples(answers, test, task)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["right"] * 5 + ["wrong"] * 5


# ---------------------------------------------------------------- finetuning


def test_finetuning_table() -> None:
    """Means over seeds, and differences seed by seed: their deviation is not that of the rows."""
    def row(name: str, seed: int, steps: int, loss: float) -> Any:
        return finetune.Result(name, seed, steps, 10.0 * seed, loss)

    rows = [row("scratch", 1, 500, 1.7), row("finetuned", 1, 2000, 1.5), row("same steps", 1, 2000, 1.45),
            row("scratch", 2, 500, 1.9), row("finetuned", 2, 2000, 1.7), row("same steps", 2, 2000, 1.65)]
    lines = finetune.table(rows).splitlines()
    assert lines[1].split() == ["scratch", "500", "15", "1.8000", "±", "0.1414"]
    assert lines[2].split()[0] == "finetuned" and lines[3].split()[:3] == ["same", "steps", "2,000"]
    assert lines[4:] == ["scratch minus finetuned: 0.2000 ± 0.0000", "same steps minus finetuned: -0.0500 ± 0.0000"]
    assert finetune.table(rows[:2]).splitlines()[-1] == "scratch minus finetuned: 0.2000"


def test_finetuning_trains_once_and_compares_on_the_same_text(
        text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Four runs on small texts; a second call trains nothing; other settings and unknown characters are errors."""
    calls: list[tuple[str, ...]] = []

    def run_in_process(*argv: str) -> dict[str, Any]:
        calls.append(argv)
        return bardlet(*argv)

    whole = text.read_text(encoding="utf-8")
    big = tmp_path / "big.txt"
    big.write_text(whole[::-1] + "é", encoding="utf-8")
    for name, value in (("SMALL", str(text)), ("bardlet", run_in_process)):
        monkeypatch.setattr(finetune, name, value)
    out = tmp_path / "out"
    argv = ["--big", str(big), "--pretrain-steps", "3", "--finetune-steps", "2", "--out", str(out), "--lr", "0.001",
            *TINY]
    assert finetune.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[:2] == ["scratch", "2"]
    assert [call[0] for call in calls] == ["train"] * 4 + ["eval"] * 4
    assert str(big) in calls[1] and str(big) not in calls[2]
    assert "--init" in calls[2] and "--lr" in calls[2] and "--lr" not in calls[3]
    assert (out / "held-out.txt").read_text(encoding="utf-8") == whole[int(0.9 * len(whole)) :]
    own = bardlet("eval", out / "scratch-seed1")
    assert finetune.loss_of(out / "scratch-seed1", out / "held-out.txt") == own["nats_per_char"]

    calls.clear()
    assert finetune.main(argv) == 0
    assert [call[0] for call in calls] == ["eval"] * 4
    assert finetune.main([*argv, "--dev"]) == 1
    assert "choose another --out" in capsys.readouterr().err and not calls[4:]
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("the 1 little § bard sang", encoding="utf-8")
    with pytest.raises(BardletError, match="does not know 1 characters"):
        finetune.loss_of(out / "scratch-seed1", foreign)


def test_development_text_is_cut_from_the_training_part(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --dev, the last tenth of the first nine tenths is held out, and nothing of the validation part is used."""
    monkeypatch.setattr(finetune, "SMALL", str(text))
    whole = text.read_text(encoding="utf-8")
    train = whole[: int(0.9 * len(whole))]
    assert finetune.validation_text(dev=True) == train[int(0.9 * len(train)) :]
    assert finetune.validation_text(dev=False) == whole[len(train) :]
