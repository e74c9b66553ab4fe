"""KTO: the loss by the paper, the data, resuming."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_run
from processes import power_cut

from bardlet.cli import main
from bardlet.data import records
from bardlet.data.forms import Fields, Unusable
from bardlet.evaluation.metrics import auc
from bardlet.stages import kto
from bardlet.training import losses


def feedback_file(path: Path) -> Path:
    """Write 60 prompts with two completions each: the liked one ends with `yes`, the disliked one with `no`."""
    rows = [{"prompt": f"say {number}", "completion": f"{number} {word}", "label": word == "yes"}
            for number in range(60) for word in ("yes", "no")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model with a bpe tokenizer."""
    folder = tmp_path_factory.mktemp("kto")
    text = folder / "base.txt"
    text.write_text("".join(f"say {n} {word}.\n" for n in range(200) for word in ("yes", "no")), encoding="utf-8")
    assert main(["train", str(text), "--tokenizer", "bpe", "--vocab-size", "280", "--n-layer", "1", "--n-head", "2",
                 "--n-embd", "32", "--block-size", "32", "--batch-size", "8", "--steps", "20", "--compile", "off",
                 "--out", str(folder / "base")]) == 0
    return folder / "base"


@pytest.mark.parametrize("kl", [0.0, 0.7, -3.0])
def test_the_loss_is_that_of_the_paper(kl: float) -> None:
    """Equation 8, row by row in plain Python, in float64: weight (1 - sigmoid(+-beta (log ratio - max(kl, 0))))."""
    generator = torch.Generator().manual_seed(3)
    ratio_B = torch.randn(16, generator=generator, dtype=torch.float64) * 5
    liked_B = torch.rand(16, generator=generator) < 0.5
    expected = 0.0
    for ratio, liked in zip(ratio_B.tolist(), liked_B.tolist(), strict=True):
        distance = 0.3 * (ratio - max(kl, 0.0)) * (1 if liked else -1)
        expected += (1.4 if liked else 0.6) * (1 - 1 / (1 + math.exp(-distance)))
    loss = losses.kto_loss(ratio_B, torch.tensor(kl, dtype=torch.float64), liked_B, 0.3, 1.4, 0.6)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, abs=1e-12)


def test_an_untrained_policy_has_a_loss_of_half_the_weights() -> None:
    liked_B = torch.tensor([True, False, False])
    loss = losses.kto_loss(torch.zeros(3), torch.tensor(0.0), liked_B, 0.1, 1.0, 3.0)
    assert loss.item() == pytest.approx(0.5 * (1 + 3 + 3))


def test_the_kl_gets_no_gradient() -> None:
    ratio_B, kl = torch.zeros(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    losses.kto_loss(ratio_B, kl, torch.tensor([True, False]), 1.0).backward()
    assert kl.grad is None and ratio_B.grad is not None
    assert ratio_B.grad[0] < 0 < ratio_B.grad[1]  # liked up, disliked down


@pytest.mark.parametrize(("record", "expected"), [
    ({"prompt": "a", "completion": "b", "label": True}, ("b", True)),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": 0}, ("b", False)),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": False},
     ("b", False)),
])
def test_feedback_is_read_in_both_forms(record: dict[str, Any], expected: tuple[str, bool]) -> None:
    row, label = kto.feedback(Fields(record))
    assert (row.chosen, label) == expected and row.prompt[-1]["content"] == "a"


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "a", "completion": "b"}, '"label" is None'),
    ({"prompt": "a", "completion": "b", "label": "good"}, '"label" is \'good\''),
    ({"messages": [{"role": "user", "content": "a"}], "label": True}, "has no answer"),
])
def test_other_records_are_unusable(record: dict[str, Any], message: str) -> None:
    with pytest.raises(Unusable) as error:
        kto.feedback(Fields(record))
    assert message in str(error.value)


def test_rows_are_split_by_prompt_and_mismatched_with_another_prompt(tmp_path: Path) -> None:
    source = kto.Feedback("f", (feedback_file(tmp_path / "f.jsonl"),))
    train, held_out = source.parts
    prompts = [{records.as_text(row.prompt) for row, _ in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(train) + len(held_out) == 120
    for part in (train, held_out):
        completion_of = {row.chosen: row.prompt for row, _ in part}
        assert all(completion_of[row.rejected] != row.prompt for row, _ in part)
    assert source.hash != records.Examples("f", source.files).hash  # a cache entry of its own


def test_alternating_labels_leave_both_kinds_in_both_splits(tmp_path: Path) -> None:
    """Every tenth record would have the same label: the split goes by a hash of the prompt."""
    rows = [{"prompt": f"say {n}", "completion": f"{n}", "label": n % 2 == 0} for n in range(200)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for part in kto.Feedback("f", (tmp_path / "f.jsonl",)).parts:
        assert {label for _, label in part} == {True, False}


def test_few_prompts_leave_both_kinds_in_both_splits(tmp_path: Path) -> None:
    """The split does not depend on the order of the file. One liked completion is not enough for both, two are."""
    rows = [{"prompt": f"say {n % 4}", "completion": f"{n}", "label": n // 4 % 2 == 1} for n in range(40)]
    splits = []
    for name, part in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
        train, held_out = kto.Feedback("f", (tmp_path / name,)).parts
        assert sorted(label for _, label in held_out) == [False, False, True, True] and len(train) == 36
        assert all(row.chosen != row.rejected for row, _ in (*train, *held_out))
        splits.append({row.chosen for row, _ in held_out})
    assert splits[0] == splits[1]
    for liked in (1, 2):
        few = [{**row, "label": n < liked} for n, row in enumerate(rows)]
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, few)), encoding="utf-8")
        train, held_out = kto.Feedback("f", (tmp_path / "c.jsonl",)).parts
        assert [sum(label for _, label in part) for part in (train, held_out)] == [liked - 1, 1]


def test_the_auc_counts_ties_half() -> None:
    label = np.array([True, True, False, False])
    assert auc(np.array([3.0, 2.0, 1.0, 0.0]), label) == 1.0
    assert auc(np.array([1.0, 1.0, 1.0, 1.0]), label) == 0.5
    assert auc(np.array([0.0, 3.0, 1.0, 2.0]), label) == 0.5


def test_it_learns_what_is_liked_and_resumes_bit_for_bit(base: Path, tmp_path: Path,
                                                         bardlet: Callable[..., dict[str, Any]]) -> None:
    data = feedback_file(tmp_path / "f.jsonl")
    words = ["kto", str(base), str(data), "--steps", "40", "--lr", "2e-3", "--muon-lr", "1e-2", "--save-every", "5",
             "--compile", "off"]
    done = bardlet(*words, "--out", tmp_path / "whole")
    assert done["accuracy"] > 0.9 and done["margin"] > 0 and done["val_loss"] < 0.5
    power_cut([*words, "--out", tmp_path / "again"], step=12)
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 10
    assert_same_run(tmp_path / "whole", tmp_path / "again", 40)
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "Kahneman-Tversky" in card and "% of the pairs of 6 liked and 6 disliked completions |" in card
    assert "in which the liked one has the higher reward" in " ".join(card.split())


def test_completions_of_one_kind_are_an_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say {number}", "completion": "yes", "label": True} for number in range(40)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main(["kto", str(base), str(tmp_path / "f.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert ("f: of the training completions that fit the context window of 32 tokens, 36 are liked and 0 disliked; "
            "add records of the missing label" in capsys.readouterr().err)
