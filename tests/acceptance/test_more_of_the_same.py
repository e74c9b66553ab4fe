"""Tests of two processes and of the TRL benchmark, for the stages that the quick tests skip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.test_benchmarks import base  # noqa: F401 (a fixture)
from invariants import test_equivalence

from benchmarks import test_benchmarks


def test_two_processes_match_one_in_grpo(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    test_equivalence.test_two_processes_match_one_in_rl("grpo", tmp_path, bardlet)


def test_trl_benchmark_counts_the_same_for_dpo(base: Path, tmp_path: Path) -> None:  # noqa: F811
    test_benchmarks.test_trl_benchmark_counts_the_same_on_both_sides("dpo", base, tmp_path)
