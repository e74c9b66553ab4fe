"""The doctor: a line for each thing, what to do where it is not ok, and 1 where something is damaged."""

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
    """A run of four steps that three were saved of, beside its text."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "rhyme.txt").write_text("".join(f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200)))
    words = [*TINY, "--steps", "4", "--save-every", "2"]
    assert main(["train", str(folder / "rhyme.txt"), "--out", str(folder / "run"), *words]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def verdicts(run: Path) -> dict[str, list[str]]:
    """What is said of a run, by verdict."""
    found: dict[str, list[str]] = {"ok": [], "warning": [], "damaged": []}
    for one in doctor.health(run):
        found[one.verdict].append(f"{one.about}: {one.message}")
    return found


def test_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """All that a run depends on is named; a warning is no failure; the last line is JSON."""
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    about = {line.split()[1].rstrip(":") for line in out[:-1]}
    assert about >= {"versions", "processor", "device", "precision", "compiler", "memory", "disk", "cache", "data"}
    assert torch.__version__ in out[0]
    assert len(json.loads(out[-1])["findings"]) == len(out) - 1


def test_a_machine_without_a_compiler_with_one_thread_and_no_data(monkeypatch: pytest.MonkeyPatch,
                                                                  tmp_path: Path) -> None:
    """Each has its remedy."""
    monkeypatch.setattr(compiler, "compiler_missing", lambda device: "no C++ compiler (g++) on this machine")
    monkeypatch.setattr(doctor.memory, "free_bytes", lambda device: 2**29)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(doctor.atomic, "free_bytes", lambda path: 10**8)
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path / "gone"))
    said = {one.about: one.message for one in doctor.machine() if one.verdict == "warning"}
    assert "apt install g++ python3-dev" in said["compiler"] and "--threads" in said["processor"]
    assert "close other programs" in said["memory"] and "make room" in said["disk"]
    assert "there is no such folder" in said["data"]


def test_a_healthy_run(run: Path) -> None:
    found = verdicts(run)
    assert found["damaged"] == []
    assert [line.split(":")[0] for line in found["warning"]] == ["loss"], "four steps are few"
    assert any("step-00000002, step-00000004: whole" in line for line in found["ok"])
    assert any("goes on bit for bit" in line for line in found["ok"])
    assert any("finished after 4 steps" in line for line in found["ok"])


def bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json", "run.toml",
                                  "metrics.jsonl", "checkpoints/step-00000004/trainer.safetensors",
                                  "checkpoints/step-00000002/manifest.json"])
def test_damage_is_named_and_the_code_is_1(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of any file of a run; nothing on disk is changed by looking."""
    if name == "metrics.jsonl":
        (run / name).write_text((run / name).read_text().replace('"step": 2', '"step": 3', 1))
    else:
        bit(run / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["doctor", str(run)]) == 1
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert out and all(Path(name).name in line for line in out), out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_weights_that_are_no_numbers(run: Path) -> None:
    weights = hf.read_tensors(run / "model.safetensors")
    name = next(iter(weights))
    hf.write_weights(run, {**weights, name: weights[name] * float("nan")})
    assert any("not a finite number" in line for line in verdicts(run)["damaged"])


def test_what_is_not_damaged_but_in_the_way(run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text, another machine, no room, a killed process's files, a run that is not finished."""
    config, record = run_folder.read_run(run)
    run_folder.write_run(run, config, {**record, "text_hash": "0" * 64, "finished": False, "steps": 2,
                                       "machine": {**record["machine"], "processor": "a better one"}})
    (run / "checkpoints" / ".step-00000006.77.tmp").mkdir()
    monkeypatch.setattr(doctor.atomic, "free_bytes", lambda path: 100)
    found = verdicts(run)
    assert found["damaged"] == []
    for words in ("text: ", "machine: processor was a better one", "disk: ", "left over: .step-00000006.77.tmp",
                  "run: 4 of 4 steps are saved; `bardlet resume"):
        assert any(line.startswith(words) for line in found["warning"]), (words, found["warning"])


def test_a_folder_from_elsewhere(run: Path) -> None:
    """A model without a run: its shapes are checked, and nothing else is asked of it."""
    for name in ("run.toml", "manifest.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    found = verdicts(run)
    assert len(found["ok"]) == 1 and "no manifest, so only its shapes were checked" in found["ok"][0]
    assert found["warning"] == found["damaged"] == []


def test_a_folder_of_runs(trained: Path) -> None:
    with pytest.raises(doctor.BardletError, match=r"has runs in it \(run\); name one of them"):
        list(doctor.health(trained))


def test_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "gone"]) == 1
    assert "gone: there is no such folder" in capsys.readouterr().err
    assert main(["doctor", "--memorised"]) == 1
    assert "of which run" in capsys.readouterr().err


def test_what_a_model_has_memorised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that has seen one sentence a thousand times writes it; one that has seen nothing does not.

    After 300 steps 3 of 8 seeds copied less than 0.9 (0.81 at least); after 600 four of four more, on two classes.
    """
    path = tmp_path / "loop.txt"
    path.write_text("the sun is up, the sky is blue, it is beautiful and so are you, dear prudence\n" * 60)
    settings = ["--n-layer", "2", "--n-embd", "64", "--n-head", "2", "--block-size", "64", "--batch-size", "16",
                "--compile", "off", "--dtype", "fp32"]
    shares = []
    for steps in ("1", "600"):
        assert main(["train", str(path), "--out", str(tmp_path / steps), *settings, "--steps", steps]) == 0
        assert main(["doctor", str(tmp_path / steps), "--memorised", "--tokens", "1000", "--json"]) == 0
        shares.append(json.loads(capsys.readouterr().out.splitlines()[-1])["memorised"])
    assert shares[0]["copied"] < 0.01 and shares[1]["copied"] > 0.9
    assert shares[1]["copied_of_validation"] > 0.9
    assert shares[1]["longest"] in path.read_text() * 2 and len(shares[1]["longest"]) > 64


def test_looking_at_damaged_tokens_in_the_cache(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are named, and are not the run's damage: they will be built again."""
    import os

    cache = shutil.copytree(os.environ["BARDLET_CACHE"], tmp_path / "cache")
    monkeypatch.setenv("BARDLET_CACHE", str(cache))
    shard = next((cache / "tokens").glob("*/train.npy"))
    assert manifest.damaged_files(shard.parent) is None
    bit(shard)
    said = [one.message for one in doctor.machine() if one.about == "cache" and one.verdict == "warning"]
    assert len(said) == 1 and str(shard) in said[0] and "built again" in said[0]
