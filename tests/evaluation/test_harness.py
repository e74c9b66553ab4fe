"""The adapter for lm-evaluation-harness: what the harness' own model for transformers gives, from the same folder."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, settings_of

from bardlet.cli import main
from bardlet.errors import BardletError

SHAPE = [*TINY, "--steps", "10", "--block-size", "32"]


def test_without_the_harness_it_is_one_line() -> None:
    """Also where lm_eval is installed: here it is hidden."""
    hidden = ("import sys, runpy\nsys.modules['lm_eval'] = None\n"
              "runpy.run_module('bardlet.harness', run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "bardlet: lm-evaluation-harness is not installed; pip install 'lm_eval>=0.4.13'\n"


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A gpt2 on byte pairs, and a rung on characters, which transformers cannot load."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("runs")
    for name, *more in (("gpt2", "--tokenizer", "bpe", "--vocab-size", "300"), ("one-head", "--tokenizer", "char")):
        assert main(["train", str(text), "--out", str(folder / name), "--model", name, *settings_of(name, SHAPE),
                     *more]) == 0  # fmt: skip
    return {name: folder / name for name in ("gpt2", "one-head")}


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as the harness makes them of its tasks."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


PAIRS = [("the 3 little", " bards sang"), ("the 3 little ", "bards"), ("the 3 little bards sang " * 9, " 9 songs"),
         ("the", " songs"), ("", "the 7")]  # fmt: skip


def test_it_gives_what_the_model_for_transformers_gives(runs: dict[str, Path]) -> None:
    """log p and greedy of pairs, one longer than the window, and of whole texts; what is written, up to a text."""
    from lm_eval.models.huggingface import HFLM

    from bardlet.evaluation.harness import Bardlet

    ours = Bardlet(str(runs["gpt2"]), batch_size=1, device="cpu")
    theirs = HFLM(pretrained=str(runs["gpt2"]), dtype="float32", device="cpu", batch_size=2, max_length=32)
    for found, want in zip(ours.loglikelihood(requests("loglikelihood", *PAIRS)),
                           theirs.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True):  # fmt: skip
        assert found[0] == pytest.approx(want[0], abs=1e-4) and found[1] == want[1]

    texts = [(text * 8,) for text in ("the 4 little bards sang 16 songs\n", "songs ")] + [("the",)]
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)), abs=1e-3)  # fmt: skip

    how = {"until": ["\n", "ab"], "max_gen_toks": 12, "do_sample": False}
    asked = [(context, how) for context, _ in PAIRS[:4]]
    assert ours.generate_until(requests("generate_until", *asked)) == theirs.generate_until(
        requests("generate_until", *asked))  # fmt: skip


def test_a_rung_is_a_model_too(runs: dict[str, Path]) -> None:
    """Characters that it has never seen: left out of a context; a continuation with one has probability 0."""
    from bardlet.evaluation.harness import Bardlet

    ours = Bardlet(str(runs["one-head"]))
    seen, unseen, context = ours.loglikelihood(requests("loglikelihood", ("the", " songs"), ("the", " söngs"),
                                                        ("thöe", " songs")))  # fmt: skip
    assert math.isfinite(seen[0]) and unseen == (-math.inf, False) and context == seen
    [text] = ours.generate_until(requests("generate_until", ("the 3", {"until": "s", "max_gen_toks": 8})))
    assert "s" not in text and len(text) <= 8
    with pytest.raises(BardletError, match="window"):
        ours.loglikelihood(requests("loglikelihood", ("the", " songs" * 30)))


def test_the_harness_counts_what_eval_counts(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             bardlet: Callable[..., dict[str, Any]]) -> None:
    """A task over a file of ours, through lm-eval's own command, by a rung: the accuracies of `bardlet eval --task`."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = [{"query": f"the {n} little", "choices": ["bards", "songs", "sang a"], "gold": n % 3} for n in range(30)]
    lines = "".join(json.dumps(one) + "\n" for one in asked)
    (tmp_path / "eval-gauntlet").mkdir()
    (tmp_path / "eval-gauntlet" / "openbook_qa.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "asked.jsonl").write_text(lines, encoding="utf-8")
    task = {"task": "asked", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}}, "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "asked.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "bardlet.harness", "run", "--model", "bardlet", "--model_args",
         f"run={runs['one-head']}", "--include_path", str(tmp_path / "tasks"), "--tasks", "asked",
         "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(results.read_text(encoding="utf-8"))["results"]["asked"]
    ours = bardlet("eval", runs["one-head"], "--task", "openbookqa")["tasks"]["openbookqa"]
    for name, error in (("acc", "stderr"), ("acc_norm", "stderr_norm")):
        assert ours[name] == theirs[f"{name},none"]
        assert ours[error] == pytest.approx(theirs[f"{name}_stderr,none"])
