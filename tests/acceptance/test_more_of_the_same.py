"""Tests of two processes, of the TRL benchmark and of packing, for what the quick tests skip."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.test_benchmarks import ROOT, base, trl  # noqa: F401 (fixtures)
from data import test_packing
from invariants import test_equivalence

from benchmarks import test_benchmarks


def test_two_processes_match_one_in_grpo(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    test_equivalence.test_two_processes_match_one_in_rl("grpo", tmp_path, bardlet)


def test_trl_benchmark_counts_the_same_for_dpo(base: Path, tmp_path: Path, trl: Callable[..., None],  # noqa: F811
                                               capsys: pytest.CaptureFixture[str]) -> None:
    test_benchmarks.test_trl_benchmark_counts_the_same_on_both_sides("dpo", base, tmp_path, trl, capsys)


def test_trl_benchmark_runs_a_side_in_its_own_process(base: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"instruction": f"sing {n}", "output": "the little bards"} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "benchmarks" / "vs_trl.py"), "sft", str(base), str(tmp_path / "data.jsonl"),
               "--peer-python", "none", "--only", "bardlet, eager", "--repeats", "1", "--threads", "1", "--rows", "4",
               "--block-size", "48"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('{"bardlet, eager": '), done.stdout + done.stderr


def test_1000_random_mixtures_lose_nothing() -> None:
    test_packing.check_mixtures(range(1000))
