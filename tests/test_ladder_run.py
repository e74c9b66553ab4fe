"""`bardlet ladder`: rungs are trained as the lecture does, what is finished stays, and the figures are measured."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet import checkpoint, hf
from bardlet.cli import main
from bardlet.dist import Dist
from bardlet.errors import BardletError
from bardlet.ladder import run
from bardlet.ladder.run import Ladder, Plan
from bardlet.ladder.rungs import LADDER, bands, select

HERE = Dist(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rungs of a few steps; the number of threads stays what it was."""
    monkeypatch.setattr(run, "SMALL", {**run.SMALL, "steps": 12})
    monkeypatch.setattr(run, "CPU", {**run.CPU, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
                                     "batch_size": 4})
    for rung in LADDER[:1]:
        monkeypatch.setitem(rung.settings, "steps", 9)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def nothing(*told: Any) -> None:
    """A watch that looks away."""


def all_outcomes(ladder: Ladder) -> list[run.Outcome]:
    ladder.plan_steps(nothing)
    return list(ladder.climb(nothing))


# ---------------------------------------------------------------------------- which rungs


@pytest.mark.parametrize("words, numbers", [
    ("1-7", [1, 2, 3, 4, 5, 6, 7]), ("3", [3]), ("5,3, 4", [3, 4, 5]), ("bigram,12-13", [1, 12, 13]),
    ("one-head", [3]), ("layer-norm,7", [7]),
])  # fmt: skip
def test_rungs_are_named_by_number_range_and_name(words: str, numbers: list[int]) -> None:
    assert [rung.number for rung in select(words)] == numbers


@pytest.mark.parametrize("words", ["", "0", "14", "7-1", "1-99", "two", "1,,2", "-3", "3-"])
def test_what_names_no_rung_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BardletError, match="names no rung"):
        select(words)
    assert main(["ladder", f"--rungs={words}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rungs_have_the_lecture_s_settings(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    ladder = Ladder(Plan(LADDER, tmp_path / "out", (str(text),)), HERE)
    for rung in LADDER[:7]:
        c = ladder.config(rung, 1337)
        assert (c.batch_size, c.block_size, c.n_embd, c.n_head, c.n_layer) == (32, 8, 32, 4, 3)
        assert (c.steps, c.lr) == ((3000, 1e-2) if rung.name == "bigram" else (5000, 1e-3))
        assert (c.optimizer, c.schedule, c.grad_clip, c.keep, c.dropout, c.dtype) == (
            "adamw", "constant", 0.0, "last", 0.0, "fp32")
    scaled = [ladder.config(rung, 1337, 100) for rung in LADDER[7:]]
    assert [c.optimizer for c in scaled] == ["adamw"] * 4 + ["muon"] * 2
    assert [c.keep for c in scaled] == ["last"] * 5 + ["average"]
    changes = {"model": 0, "optimizer": 0, "muon_lr": 0, "keep": 0}
    for c in scaled:  # but for its one change each trains as the others do
        assert {**vars(c), **changes} == {**vars(scaled[0]), **changes}


# ---------------------------------------------------------------------------- the command


def test_the_command_ends_with_its_report(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    said = bardlet("ladder", text, "--rungs", "1-13", "--minutes", "0.002", "--out", tmp_path / "l", "--seeds", "1")
    assert Path(said["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [line["rung"] for line in said["rungs"]] == list(range(1, 14))
    for line, rung in zip(said["rungs"], LADDER, strict=True):
        assert line.keys() >= {"rung", "name", "parameters", "seconds", "val_loss", "lecture"}
        assert (line["name"], line["lecture"]) == (rung.name, None), "the lecture has another text"
        folder = tmp_path / "l" / f"{rung.number:02}-{rung.name}" / "seed-1337"
        model, _ = hf.read_folder(folder)
        assert line["parameters"] == sum(p.numel() for p in model.parameters())
        left = {path.name for path in folder.iterdir()}
        assert {"outcome.json", "metrics.jsonl", "run.toml", "README.md", "loss.png"} <= left
    weights = [hf.read_weights(tmp_path / "l" / f"{n}" / "seed-1337") for n in ("11-qk-norm", "12-muon")]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "Muon is another training"


def test_measured_as_eval_measures(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    """The ladder's validation loss is protocol (b), as `bardlet eval` computes it from the folder alone."""
    said = bardlet("ladder", text, "--rungs", "3,7", "--out", tmp_path / "l")
    for line in said["rungs"]:
        folder = tmp_path / "l" / f"{line['rung']:02}-{line['name']}" / "seed-1337"
        assert bardlet("eval", folder)["loss"] == pytest.approx(line["val_loss"], abs=1e-6)
        assert bardlet("sample", folder, "--tokens", "20", "--seed", "1")["completions"][0]


def test_what_is_finished_stays(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(select("1,3,8"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001)
    first = all_outcomes(Ladder(plan, HERE))
    assert [(o.rung.number, o.seed) for o in first] == [(n, seed) for seed in (1337, 1338) for n in (1, 3, 8)]
    kept = {o.folder: hf.read_weights(o.folder) for o in first}
    lost = first[4]
    (lost.folder / "outcome.json").unlink()

    trained: list[tuple[str, int]] = []
    real = Ladder.train
    monkeypatch.setattr(Ladder, "train", lambda self, rung, seed, watch: (trained.append((rung.name, seed)),
                                                                           real(self, rung, seed, watch))[1])
    again = all_outcomes(Ladder(plan, HERE))
    assert trained == [("one-head", 1338)], "only what is not finished is trained"
    for a, b in zip(first, again, strict=True):
        for name in ("val_loss", "val_loss_lecture", "train_loss", "steps", "sample"):
            assert getattr(a, name) == getattr(b, name)
        weights = hf.read_weights(b.folder)
        assert all(torch.equal(weights[name], kept[a.folder][name]) for name in weights)
    assert first[0].val_loss != first[3].val_loss, "another seed is another run"


def test_the_folder_is_called_as_the_text_is(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ladder = Ladder(Plan(select("1"), text=(str(text.parent / "*.txt"),)), HERE)
    assert ladder.out == Path("runs") / f"ladder-{ladder.found.name}" and "*" not in ladder.found.name
    before = torch.get_num_threads()
    assert len(all_outcomes(ladder)) == 1 and torch.get_num_threads() == before


def test_a_damaged_outcome_is_trained_again(text: Path, tmp_path: Path) -> None:
    plan = Plan(select("1"), tmp_path / "l", (str(text),))
    [first] = all_outcomes(Ladder(plan, HERE))
    (first.folder / "outcome.json").write_text("{", encoding="utf-8")
    [again] = all_outcomes(Ladder(plan, HERE))
    assert again.val_loss == first.val_loss


def test_other_questions_need_another_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "l")]) == 0
    capsys.readouterr()
    assert main(["ladder", str(text), "--rungs", "1", "--tokenizer", "byte", "--out", str(tmp_path / "l")]) == 1
    assert "begun with another tokenizer (char, now byte); name another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary", encoding="utf-8")
    assert main(["ladder", str(text), "--rungs", "1", "--out", str(tmp_path / "mine")]) == 1
    assert "is not empty and holds no ladder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"], "nothing is lost or left"


def test_a_text_too_short_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("hello world", encoding="utf-8")
    assert main(["ladder", str(tmp_path / "short.txt"), "--rungs", "1,8", "--out", str(tmp_path / "l")]) == 1
    said = capsys.readouterr().err
    assert "short: 9 tokens to train on and 2 to validate are too few for the windows of 8 of rung 1, bigram" in said
    assert said.count("\n") == 1 and not (tmp_path / "l").exists()


def test_ctrl_c_keeps_the_rungs_before(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(select("1,3"), tmp_path / "l", (str(text),))
    ladder = Ladder(plan, HERE)

    def interrupt(rung: Any, seed: int, line: dict[str, Any]) -> None:
        if rung.name == "one-head" and line["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    ladder.plan_steps(nothing)
    with pytest.raises(BardletError, match="stopped in rung 3, one-head; the rungs before it are kept") as stopped:
        list(ladder.climb(interrupt))
    assert stopped.value.exit_code == 130  # type: ignore[attr-defined]
    assert [path.parent.parent.name for path in (tmp_path / "l").glob("*/*/outcome.json")] == ["01-bigram"]
    assert len(all_outcomes(Ladder(plan, HERE))) == 2


def test_seeds_of_a_scaled_rung_make_the_same_steps(text: Path, tmp_path: Path) -> None:
    ladder = Ladder(Plan(select("8,11"), tmp_path / "l", (str(text),), seeds=2, minutes=0.001), HERE)
    outcomes = all_outcomes(ladder)
    planned = json.loads((tmp_path / "l" / "ladder.json").read_text(encoding="utf-8"))["steps"]
    assert [o.steps for o in outcomes] == [planned["dropout"], planned["qk-norm"]] * 2
    lines = checkpoint.read_metrics(outcomes[0].folder)
    assert lines[-1]["step"] == outcomes[0].steps


def test_bands_hold_their_means() -> None:
    assert list(bands()) == [rung.name for rung in LADDER[:7]], "the lecture's rungs have bands, the others none"
    for name, band in bands().items():
        assert band["low"] < band["mean"] < band["high"] and band["seeds"] >= 5, name
        assert band["high"] - band["mean"] == pytest.approx(3 * band["deviation"])


def test_explain_needs_no_text(bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    said = bardlet("ladder", "--explain", "--out", tmp_path / "p")
    assert said["experiments"]["variance"] and list((tmp_path / "p").glob("*-dark.png"))
