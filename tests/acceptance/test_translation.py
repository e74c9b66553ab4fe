"""Translation on real pairs: parity over 100 lines, exact resume, one compilation for all lengths, strange lines."""

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
    """The lines of a file of multi30k."""
    return gzip.open(DATA / f"{part}.{language}.gz", "rt", encoding="utf-8").read().split("\n")[:-1]


def command(*argv: str | Path) -> list[str]:
    """`bardlet ARGV` for a process of its own."""
    return [sys.executable, "-m", "bardlet", *map(str, argv)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of half a minute, which translates badly, but not at random."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", *SMALL, "--n-embd", "128", "--steps", "150", "--compile", "off", "--out", str(out)]) == 0
    return out


def test_a_hundred_lines_are_translated_as_transformers_does(run: Path, tmp_path: Path) -> None:
    """Greedy, both ways: our folder there, and one that transformers wrote here."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    theirs, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    given = lines("test_2016_flickr", "de")[:100]
    model, words = hf.read_folder(run)
    ours = translate.translate_lines(model, words, given)
    again = translate.translate_lines(*hf.read_folder(tmp_path / "theirs"), given)
    wanted = []
    for line in given:
        ids = tokenizer(line, return_tensors="pt")
        most = 2 * ids.input_ids.shape[1] + 20  # where bardlet cuts what does not end
        made = theirs.generate(**ids, do_sample=False, num_beams=1, max_new_tokens=most)
        wanted.append(" ".join(tokenizer.decode(made[0], skip_special_tokens=True).split()))
    assert ours == again == wanted
    assert len(set(ours)) > 80


@pytest.mark.parametrize("mode", [["--dtype", "fp32", "--compile", "off"], ["--dtype", "bf16", "--compile", "on"]],
                         ids=lambda mode: " ".join(mode[1::2]))  # fmt: skip
@pytest.mark.parametrize("model", ["encdec", "gpt2"])
def test_a_run_goes_on_bit_for_bit(model: str, mode: list[str], tmp_path: Path) -> None:
    """Twelve steps are seven and five, in fresh processes, each with its own compiler."""
    words = [*SMALL, "--model", model, *mode, "--steps", "12", "--save-every", "7", "--keep-checkpoints", "9",
             "--eval-every", "5", "--batch-tokens", "1024"]  # fmt: skip
    for name in ("whole", "broken"):
        subprocess.run(command("train", *words, "--out", tmp_path / name), check=True, capture_output=True)
    # what was done after step 7 is taken away, the marks of its end among it
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-00000012")
    done = subprocess.run(command("resume", tmp_path / "broken", "--json"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 7
    assert fingerprint(tmp_path / "broken", 12) == fingerprint(tmp_path / "whole", 12)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")
    assert manifest.sha256(tmp_path / "broken" / "model.safetensors") == manifest.sha256(
        tmp_path / "whole" / "model.safetensors")  # fmt: skip


def test_one_compilation_serves_all_lengths(tmp_path: Path) -> None:
    """A block of the encoder and one of the decoder, forward and backward; batches of an epoch's many shapes."""
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


def test_strange_lines_are_translated_or_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    strange = [*lines("test_2016_flickr", "de")[:3], "", "ein wort " * 5_000, "я читаю", "一只狗在跑", "\u200b",
               "a" * 10_000]  # fmt: skip
    for beam in ("1", "4"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(strange).encode())))
        assert main(["translate", str(run), "--beam", beam]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == len(strange)
    (tmp_path / "de").write_text("eins\nzwei\n", encoding="utf-8")
    (tmp_path / "en").write_text("one\n", encoding="utf-8")
    assert main(["eval", str(run), "--source", str(tmp_path / "de"), "--target", str(tmp_path / "en")]) == 1
    err = capsys.readouterr().err
    assert "2 lines" in err and err.count("\n") == 1
