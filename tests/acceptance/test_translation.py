"""Translation on real pairs: parity on 100 lines, exact resume, one compilation for all lengths, unusual lines."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from invariants.test_resume import fingerprint, without_times

from bardlet.cli import main
from bardlet.inference import translate
from bardlet.run import hf
from bardlet.runtime import manifest

DATA = Path(os.environ.get("BARDLET_DATA", "nowhere")) / "multi30k"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs multi30k in $BARDLET_DATA")

SMALL = ["--pair", "de-en", "--n-layer", "2", "--n-head", "4", "--n-embd", "64", "--dropout", "0.1", "--log-every", "2",
         "--threads", "2"]  # fmt: skip


def lines(part: str, language: str) -> list[str]:
    """Return the lines of a file of multi30k."""
    return gzip.open(DATA / f"{part}.{language}.gz", "rt", encoding="utf-8").read().split("\n")[:-1]


def command(*argv: str | Path) -> list[str]:
    """Return the command that runs `bardlet ARGV` in a new process."""
    return [sys.executable, "-m", "bardlet", *map(str, argv)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for half a minute: bad translations, but not random ones."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", *SMALL, "--n-embd", "128", "--steps", "150", "--compile", "off", "--out", str(out)]) == 0
    return out


def test_a_hundred_lines_match_transformers(run: Path, tmp_path: Path) -> None:
    """Greedy translations are equal, for bardlet's folder and for one saved by transformers."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    theirs, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    sources = lines("test_2016_flickr", "de")[:100]
    ours = translate.translate_lines(*hf.read_folder(run), sources)
    again = translate.translate_lines(*hf.read_folder(tmp_path / "theirs"), sources)
    expected = []
    for line in sources:
        ids = tokenizer(line, return_tensors="pt")
        max_tokens = 2 * ids.input_ids.shape[1] + 20  # bardlet's limit for a translation that does not end
        out = theirs.generate(**ids, do_sample=False, num_beams=1, max_new_tokens=max_tokens)
        expected.append(" ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()))
    assert ours == again == expected
    assert len(set(ours)) > 80


@pytest.mark.parametrize("mode", [["--dtype", "fp32", "--compile", "off"], ["--dtype", "bf16", "--compile", "on"]],
                         ids=lambda mode: " ".join(mode[1::2]))  # fmt: skip
@pytest.mark.parametrize("model", ["encdec", "gpt2"])
def test_resume_is_exact(model: str, mode: list[str], tmp_path: Path) -> None:
    """Twelve steps equal seven and five, in fresh processes, each with its own compiler."""
    arguments = [*SMALL, "--model", model, *mode, "--steps", "12", "--save-every", "7", "--keep-checkpoints", "9",
             "--eval-every", "5", "--batch-tokens", "1024"]  # fmt: skip
    for name in ("whole", "resumed"):
        subprocess.run(command("train", *arguments, "--out", tmp_path / name), check=True, capture_output=True)
    # remove everything after step 7, including the mark that the run is finished
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000012")
    done = subprocess.run(command("resume", tmp_path / "resumed", "--json"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 7
    assert fingerprint(tmp_path / "resumed", 12) == fingerprint(tmp_path / "whole", 12)
    assert without_times(tmp_path / "resumed") == without_times(tmp_path / "whole")
    assert manifest.sha256(tmp_path / "resumed" / "model.safetensors") == manifest.sha256(
        tmp_path / "whole" / "model.safetensors")  # fmt: skip


def test_one_compilation_serves_all_lengths(tmp_path: Path) -> None:
    """Batches of many shapes need two graphs: an encoder block and a decoder block."""
    script = f"""
import torch
from torch._dynamo.utils import counters
from bardlet.cli import main
assert main(["train", *{SMALL!r}, "--steps", "60", "--batch-tokens", "1024", "--eval-every", "0", "--save-every", "0",
             "--compile", "on", "--out", {str(tmp_path / "run")!r}]) == 0
print("graphs", counters["stats"]["unique_graphs"])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "graphs 2"


def test_unusual_lines_are_translated_or_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    unusual = [*lines("test_2016_flickr", "de")[:3], "", "ein wort " * 5_000, "я читаю", "一只狗在跑", "\u200b",
               "a" * 10_000]  # fmt: skip
    for beam in ("1", "4"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(unusual).encode())))
        assert main(["translate", str(run), "--beam", beam]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == len(unusual)
    (tmp_path / "de").write_text("eins\nzwei\n", encoding="utf-8")
    (tmp_path / "en").write_text("one\n", encoding="utf-8")
    assert main(["eval", str(run), "--source", str(tmp_path / "de"), "--target", str(tmp_path / "en")]) == 1
    err = capsys.readouterr().err
    assert "2 lines" in err and err.count("\n") == 1
