"""The adapter for lm-evaluation-harness, compared with the harness's own transformers model on the same folder."""

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


def test_a_missing_harness_is_a_one_line_error() -> None:
    """Hides lm_eval if it is installed."""
    hidden = ("import sys, runpy\nsys.modules['lm_eval'] = None\n"
              "runpy.run_module('bardlet.harness', run_name='__main__')")  # fmt: skip
    process = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == ("bardlet: lm-evaluation-harness is not installed; "
                              "run `pip install '.[harness]'` in bardlet's folder, or "
                              "`pip install 'lm_eval>=0.4.13'`\n")
    asking = subprocess.run([sys.executable, "-c", hidden, "--help"], capture_output=True, text=True)
    assert asking.returncode == 0 and asking.stdout.startswith("usage: python -m bardlet.harness run ")


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A gpt2 on byte pairs, and a lecture model on characters, which transformers cannot load."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("runs")
    for name, *more in (("gpt2", "--tokenizer", "bpe", "--vocab-size", "300"), ("one-head", "--tokenizer", "char")):
        assert main(["train", str(text), "--out", str(folder / name), "--model", name, *settings_of(name, SHAPE),
                     *more]) == 0  # fmt: skip
    return {name: folder / name for name in ("gpt2", "one-head")}


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """Build requests like the harness does."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


PAIRS = [("the 3 little", " bards sang"), ("the 3 little ", "bards"), ("the 3 little bards sang " * 9, " 9 songs"),
         ("the", " songs"), ("", "the 7")]  # fmt: skip


def test_it_matches_the_transformers_model(runs: dict[str, Path]) -> None:
    """Likelihoods of pairs (one longer than the window) and of whole texts, and completions up to a stop string."""
    from lm_eval.models.huggingface import HFLM

    from bardlet.evaluation.harness import Bardlet

    ours = Bardlet(str(runs["gpt2"]), batch_size=1, device="cpu")
    theirs = HFLM(pretrained=str(runs["gpt2"]), dtype="float32", device="cpu", batch_size=2, max_length=32)
    for result, expected in zip(ours.loglikelihood(requests("loglikelihood", *PAIRS)),
                           theirs.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True):  # fmt: skip
        assert result[0] == pytest.approx(expected[0], abs=1e-4) and result[1] == expected[1]

    texts = [(text * 8,) for text in ("the 4 little bards sang 16 songs\n", "songs ")] + [("the",)]
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)), abs=1e-3)  # fmt: skip

    options = {"until": ["\n", "ab"], "max_gen_toks": 12, "do_sample": False}
    contexts = [(context, options) for context, _ in PAIRS[:4]]
    assert ours.generate_until(requests("generate_until", *contexts)) == theirs.generate_until(
        requests("generate_until", *contexts))  # fmt: skip


def test_it_runs_lecture_models(runs: dict[str, Path]) -> None:
    """Unseen characters are dropped from a context; a continuation with one has probability 0."""
    from bardlet.evaluation.harness import Bardlet

    ours = Bardlet(str(runs["one-head"]))
    seen, unseen, context = ours.loglikelihood(requests("loglikelihood", ("the", " songs"), ("the", " söngs"),
                                                        ("thöe", " songs")))  # fmt: skip
    assert math.isfinite(seen[0]) and unseen == (-math.inf, False) and context == seen
    [text] = ours.generate_until(requests("generate_until", ("the 3", {"until": "s", "max_gen_toks": 8})))
    assert "s" not in text and len(text) <= 8
    with pytest.raises(BardletError, match="window"):
        ours.loglikelihood(requests("loglikelihood", ("the", " songs" * 30)))


def test_accuracies_match_bardlet_eval(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """lm-eval's command with a lecture model and a task of our own gives the accuracies of `bardlet eval --task`."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = [{"query": f"the {n} little", "choices": ["bards", "songs", "sang a"], "gold": n % 3} for n in range(30)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "eval-gauntlet").mkdir()
    (tmp_path / "eval-gauntlet" / "openbook_qa.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "asked.jsonl").write_text(lines, encoding="utf-8")
    task = {"task": "asked", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}}, "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "asked.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    process = subprocess.run(
        [sys.executable, "-m", "bardlet.harness", "run", "--model", "bardlet", "--model_args",
         f"run={runs['one-head']}", "--include_path", str(tmp_path / "tasks"), "--tasks", "asked",
         "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True)  # fmt: skip
    assert process.returncode == 0, process.stderr
    [results] = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(results.read_text(encoding="utf-8"))["results"]["asked"]
    ours = bardlet("eval", runs["one-head"], "--task", "openbookqa")["tasks"]["openbookqa"]
    for name, error in (("acc", "stderr"), ("acc_norm", "stderr_norm")):
        assert ours[name] == theirs[f"{name},none"]
        assert ours[error] == pytest.approx(theirs[f"{name}_stderr,none"])
