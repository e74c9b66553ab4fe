"""Reinforcement learning that goes wrong, each time on purpose: the run says so within a fifth of its steps.

Each problem has a run beside it that goes well, and says nothing.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import TINY

from bardlet.cli import main
from bardlet.run import folder as run_folder
from bardlet.run import metrics, rollout_diagnosis

STEPS = 200
COMMON = ["--dtype", "fp32", "--rollout", "64", "--batch-size", "32", "--passes", "1", "--answer-tokens", "12",
          "--steps", str(STEPS), "--debug"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run, a chat model that adds two digits and is often wrong, and sums.jsonl, its questions."""
    folder, rng = tmp_path_factory.mktemp("sums"), random.Random(7)
    questions = [(a, b) for a in range(10) for b in range(10)] * 4
    rng.shuffle(questions)

    def said(a: int, b: int) -> int:
        return a + b if rng.random() < 0.5 else rng.randrange(19)

    (folder / "text.txt").write_text("".join(f"{a}+{b}={said(a, b)}\n" for a, b in questions * 3))
    for name, answer in (("guesses", said), ("sums", lambda a, b: a + b)):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"{a}+{b}=", "answer": str(answer(a, b))}) + "\n" for a, b in questions))
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps",
                 "200", "--block-size", "32", "--out", str(folder / "base"), "--debug"]) == 0
    assert main(["sft", str(folder / "base"), str(folder / "guesses.jsonl"), "--dtype", "fp32", "--compile", "off",
                 "--steps", "400", "--lr", "5e-3", "--muon-lr", "2e-2", "--no-pack", "--batch-size", "16", "--out",
                 str(folder / "run"), "--debug"]) == 0
    (folder / "longest.py").write_text("import json, sys\nfor line in sys.stdin:\n"
                                       "    print(len(json.loads(line)['answer']))\n")
    (folder / "same.py").write_text("import sys\nfor line in sys.stdin:\n    print(0.5)\n")
    return folder


def train(kind: str, sums: Path, out: Path, reward: str, *more: str) -> list[str]:
    """Train; return the warnings that the first fifth of the run's metrics gives."""
    command = reward if reward == "exact" else f"{sys.executable} {sums / reward}"
    assert main([kind, str(sums / "run"), str(sums / "sums.jsonl"), "--reward", command, *COMMON, *more, "--out",
                 str(out)]) == 0
    config, record = run_folder.settings(out)
    lines = [line for line in metrics.read_metrics(out) if line["step"] <= STEPS // 5]
    findings = rollout_diagnosis.of_rollouts(lines, config, STEPS, record)  # type: ignore[arg-type]
    return [finding.message for finding in findings if finding.verdict == "warning"]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize(("reward", "settings", "expected"), [
    ("same.py", [], "no signal"),
    ("exact", ["--lr", "0.05", "--muon-lr", "0.3"], "the policy collapsed"),
    ("longest.py", ["--lr", "1e-3", "--muon-lr", "1e-2", "--beta", "0.01"], "the reward is gamed"),
    ("exact", [], None)])
def test_a_problem_is_named_early(kind: str, reward: str, settings: list[str], expected: str | None, sums: Path,
                                  tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = train(kind, sums, tmp_path / "run", reward, *settings)
    during = [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines()]
    assert main(["doctor", str(tmp_path / "run")]) == 0
    doctor = capsys.readouterr().out
    assert "begins near 0 and stays small" in doctor
    if expected is None:
        assert not early
        late = [message for message in during if re.match("no signal|the policy|the reward", message)]
        assert all(message.startswith("the reward rises on the training prompts only") for message in late), late
    else:
        assert [message for message in early if message.startswith(expected)], early
        assert any(message.startswith(expected) for message in during), during


def test_answers_are_watched(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("grpo", sums, tmp_path / "run", "exact", "--watch", "--eval-every", "50")
    printed = capsys.readouterr().out
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 50, 100, 150, 200]
    for sample in samples:
        title = f"after step {sample['step']}" if sample["step"] else "before training"
        assert f"{title}\n\n{sample['text']}\n" in printed
        assert len(re.findall(r"\(reward [01], KL -?[\d.]+\)", sample["text"])) == 5
    asked = [re.findall(r"\d\+\d=", sample["text"]) for sample in samples]
    assert asked[0] == asked[-1] and len(set(asked[0])) > 1
    assert samples[0]["text"] != samples[-1]["text"]
