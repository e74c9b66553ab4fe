"""Two processes are one, and the benchmark beside TRL counts alike, for the stages that the quick tests leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.test_benchmarks import base  # noqa: F401 (a fixture)
from invariants import test_equivalence

from benchmarks import test_benchmarks


def test_two_processes_learn_by_grpo_as_one(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    test_equivalence.test_two_processes_learn_from_their_answers_as_one("grpo", tmp_path, bardlet)


def test_the_benchmark_beside_trl_counts_the_same_for_dpo(base: Path, tmp_path: Path) -> None:  # noqa: F811
    test_benchmarks.test_the_benchmark_beside_trl_counts_the_same_on_both_sides("dpo", base, tmp_path)
