"""The doctor: one line per finding, with a remedy unless it is ok, and exit code 1 for damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY

from bardlet import doctor
from bardlet.cli import main
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.runtime import compiler, manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints, next to its text."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "rhyme.txt").write_text("".join(f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200)))
    options = [*TINY, "--steps", "4", "--save-every", "2"]
    assert main(["train", str(folder / "rhyme.txt"), "--out", str(folder / "run"), *options]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def verdicts(run: Path) -> dict[str, list[str]]:
    """Return the findings about a run, by verdict."""
    lines: dict[str, list[str]] = {"ok": [], "warning": [], "damaged": []}
    for finding in doctor.health(run):
        lines[finding.verdict].append(f"{finding.about}: {finding.message}")
    return lines


def test_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything a run depends on is named; a warning is no failure; the last line is JSON."""
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    subjects = {line.split()[1].rstrip(":") for line in out[:-1]}
    assert subjects >= {"versions", "processor", "device", "precision", "compiler", "memory", "disk", "cache", "data"}
    assert torch.__version__ in out[0]
    assert len(json.loads(out[-1])["findings"]) == len(out) - 1


def test_each_problem_of_a_machine_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, one thread, little memory and disk space, no data."""
    monkeypatch.setattr(compiler, "compiler_missing", lambda device: "no C++ compiler (g++) on this machine")
    monkeypatch.setattr(doctor.memory, "free_bytes", lambda device: 2**29)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(doctor.atomic, "free_bytes", lambda path: 10**8)
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path / "gone"))
    warnings = {finding.about: finding.message for finding in doctor.machine() if finding.verdict == "warning"}
    assert "apt install g++ python3-dev" in warnings["compiler"] and "--threads" in warnings["processor"]
    assert "close other programs" in warnings["memory"] and "free some space" in warnings["disk"]
    assert "no such folder" in warnings["data"]


def test_a_healthy_run(run: Path) -> None:
    found = verdicts(run)
    assert found["damaged"] == []
    assert [line.split(":")[0] for line in found["warning"]] == ["loss", "quality"], "it is high after four steps"
    assert any("step-00000002, step-00000004: intact" in line for line in found["ok"])
    assert any("the same as at the start of the run" in line for line in found["ok"])
    assert any("finished after 4 steps" in line for line in found["ok"])
    assert not any("continues bit for bit" in line or " s)" in line for line in found["ok"]), "the run is finished"


def flip_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json", "run.toml",
                                  "metrics.jsonl", "checkpoints/step-00000004/trainer.safetensors",
                                  "checkpoints/step-00000002/manifest.json"])
def test_damage_is_named_and_the_exit_code_is_1(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flip one bit of any file of a run. The check itself changes nothing on disk."""
    if name == "metrics.jsonl":
        (run / name).write_text((run / name).read_text().replace('"step": 2', '"step": 3', 1))
    else:
        flip_bit(run / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["doctor", str(run)]) == 1
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert out and all(Path(name).name in line for line in out), out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_weights_that_are_not_finite(run: Path) -> None:
    weights = hf.read_tensors(run / "model.safetensors")
    name = next(iter(weights))
    hf.write_weights(run, {**weights, name: weights[name] * float("nan")})
    assert any("not a finite number" in line for line in verdicts(run)["damaged"])


def test_obstacles_to_a_resume_are_warnings(run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text, another machine, a full disk, partial files of a killed process, an unfinished run."""
    config, record = run_folder.read_run(run)
    run_folder.write_run(run, config, {**record, "text_hash": "0" * 64, "finished": False, "steps": 2,
                                       "machine": {**record["machine"], "processor": "a faster one"}})
    (run / "checkpoints" / ".step-00000006.77.tmp").mkdir()
    monkeypatch.setattr(doctor.atomic, "free_bytes", lambda path: 100)
    found = verdicts(run)
    assert found["damaged"] == []
    for beginning in ("text: ", "machine: processor was a faster one", "disk: ", "left over: .step-00000006.77.tmp",
                      "run: 4 of 4 steps are saved; `bardlet resume"):
        assert any(line.startswith(beginning) for line in found["warning"]), (beginning, found["warning"])


def test_a_hugging_face_folder(run: Path) -> None:
    """A model without a run: only its shapes are checked."""
    for name in ("run.toml", "manifest.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    found = verdicts(run)
    assert len(found["ok"]) == 1 and "no manifest, so only its shapes were checked" in found["ok"][0]
    assert found["warning"] == found["damaged"] == []


def test_a_folder_of_runs(trained: Path) -> None:
    with pytest.raises(doctor.BardletError, match=r"a folder of runs \(run\); name one of them"):
        list(doctor.health(trained))


def test_a_folder_of_a_ladder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is explained, with a command for one of its runs, and not reported as damage."""
    ladder = tmp_path / "my ladder"
    rung = ladder / "01-bigram" / "seed-1337"
    shutil.copytree(trained / "run", rung)
    (ladder / "ladder.json").write_text("{}")
    assert main(["doctor", str(ladder)]) == 1
    out, err = capsys.readouterr()
    example = f"'{rung}'"
    assert not out and f"{ladder}: a folder of ladder runs; name one of them, for example {example}" in err
    assert main(["doctor", str(ladder / "01-bigram")]) == 1
    assert "a folder of runs (seed-1337); name one of them" in capsys.readouterr().err
    assert main(["doctor", str(rung)]) == 0


def test_a_folder_that_is_no_run_is_not_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("notes")
    assert main(["doctor", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out and f"{tmp_path}: no run.toml, so this is not a run folder; `bardlet runs` lists the runs" in err


def test_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "gone"]) == 1
    assert "gone: no such folder" in capsys.readouterr().err
    assert main(["doctor", "--memorised"]) == 1
    assert "name a run" in capsys.readouterr().err


def test_memorization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that has seen one sentence a thousand times generates it; an untrained one does not.

    After 250 steps, 3 of 3 seeds copied everything.
    """
    path = tmp_path / "loop.txt"
    path.write_text("the sun is up, the sky is blue, it is beautiful and so are you, dear prudence\n" * 60)
    settings = ["--n-layer", "2", "--n-embd", "32", "--n-head", "2", "--block-size", "64", "--batch-size", "8",
                "--compile", "off", "--dtype", "fp32", "--optimizer", "adamw", "--lr", "0.01", "--eval-every", "0"]
    shares = []
    for steps in ("1", "250"):
        assert main(["train", str(path), "--out", str(tmp_path / steps), *settings, "--steps", steps]) == 0
        assert main(["doctor", str(tmp_path / steps), "--memorised", "--tokens", "1000", "--json"]) == 0
        out = capsys.readouterr().out
        shares.append(json.loads(out.splitlines()[-1])["memorised"])
        assert "do: no sign of memorization\n" in out, "a validation text of the same sentence"
    assert shares[0]["copied"] < 0.01 and shares[1]["copied"] > 0.9
    assert shares[1]["copied_of_validation"] > 0.9
    assert shares[1]["longest"] in path.read_text() * 2 and len(shares[1]["longest"]) > 64


def test_damaged_tokens_in_the_cache(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are only a warning: the next run rebuilds them."""
    import os

    cache = shutil.copytree(os.environ["BARDLET_CACHE"], tmp_path / "cache")
    monkeypatch.setenv("BARDLET_CACHE", str(cache))
    shard = next((cache / "tokens").glob("*/train.npy"))
    assert manifest.damaged_files(shard.parent) is None
    flip_bit(shard)
    warnings = [finding.message for finding in doctor.machine()
                if finding.about == "cache" and finding.verdict == "warning"]
    assert len(warnings) == 1 and str(shard) in warnings[0] and "will rebuild them" in warnings[0]
