"""Pretraining on a text: its Unicode form and the development split, in a run, in resume and in evaluation."""

from __future__ import annotations

import random
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import bardlet
from bardlet import tokenizer as tk
from bardlet.config.toml import read_toml
from bardlet.data import corpus, statistics
from bardlet.errors import BardletError
from bardlet.run.record import TextRecord
from bardlet.stages import prediction, summary

TINY: dict[str, Any] = {"model": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 2,
                        "dtype": "fp32", "compile": "off", "threads": 1, "steps": 4, "save_every": 2, "eval_every": 4}
TEXT = "Über den Wölken é muß die Freiheit grenzenlos sein, à la carte. "


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "lied.txt"
    path.write_text("".join(f"{n} {TEXT}" for n in range(120)), encoding="utf-8")
    return path


def test_normalize_is_recorded_and_prompts_follow_it(text: Path, tmp_path: Path) -> None:
    plain = bardlet.train(text, out=tmp_path / "plain", tokenizer="char", **TINY)
    text.write_text(unicodedata.normalize("NFD", text.read_text(encoding="utf-8")), encoding="utf-8")
    run = bardlet.train(text, out=tmp_path / "nfc", tokenizer="char", normalize="nfc", **TINY)
    assert read_toml(run.folder / "run.toml")[0].normalize == "nfc"
    assert "\nnormalize =" not in (plain.folder / "run.toml").read_text(encoding="utf-8")
    assert run.record.val_loss == plain.record.val_loss and run.record.text_hash != plain.record.text_hash
    prompt = unicodedata.normalize("NFD", "Über Wölken é")
    model = bardlet.load(run.folder)
    assert model.tokenizer.encode(prompt).tolist() == model.tokenizer.encode("Über Wölken é").tolist()
    assert model.generate(prompt, max_new_tokens=5, seed=1) == model.generate("Über Wölken é", max_new_tokens=5, seed=1)
    assert bardlet.evaluate(run.folder, text).skipped_characters == 0  # type: ignore[union-attr]
    short = {name: TINY[name] for name in ("steps", "batch_size")}
    again = bardlet.train(text, out=tmp_path / "again", init=run.folder, **short)
    assert read_toml(again.folder / "run.toml")[0].normalize == "nfc" and bardlet.load(again.folder).tokenizer.nfc
    added = bardlet.train(text, out=tmp_path / "added", init=plain.folder, normalize="nfc", **short)
    assert bardlet.load(added.folder).tokenizer.nfc


@pytest.mark.usefixtures("clock")
def test_a_plan_measures_the_text_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, measure = [], statistics.measure_corpus
    monkeypatch.setattr(statistics, "measure_corpus", lambda *args, **options: (
        calls.append(args), measure(*args, **options))[1])
    bardlet.plan(text, minutes=1)
    assert len(calls) == 1


@pytest.mark.parametrize(("entries", "message"), [
    ({"expected": 1.5}, "1.50 nats per character (1.27 to 1.72)"),
    ({}, "no prediction: bardlet predicts the loss of runs of 400 steps or more; give more --minutes"),
    ({"most_steps": 300}, "no prediction: bardlet predicts the loss of runs of 400 steps or more; this text is too "
                          "short for them")])
def test_the_reason_for_no_prediction(entries: dict[str, Any], message: str) -> None:
    assert prediction.describe(TextRecord(counting=[1.0], **entries), pretrained=False) == message


def test_a_prediction_that_a_slow_machine_made_void_is_named_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Its steps were planned as 592, and 291 fit; a run that never had a prediction says nothing."""
    for planned, facts, told in ((592, {"counting": [1.0]}, True), (300, {"counting": [1.0]}, False), (592, {}, False)):
        trainer = SimpleNamespace(record=SimpleNamespace(minutes=0.5, most_steps=None),
                                  state=SimpleNamespace(step=291, replans=[(0, planned), (59, 291)]))
        summary._say_prediction(trainer, None, facts)  # type: ignore[arg-type]
        message = ("no prediction to compare with: a plan had 400 steps or more, but only 291 steps fit into 0.5 "
                   "minutes\n")
        assert capsys.readouterr().out == message * told


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_run_on_the_development_split_resumes_and_evaluates_the_same_tokens(
    text: Path, tmp_path: Path, kind: str
) -> None:
    run = bardlet.train(text, out=tmp_path / "run", tokenizer=kind, val_part="dev", eval_tokens=0, **TINY)
    loss = bardlet.evaluate(run.folder).score.loss  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "cache")  # the tokens are built again, with the tokenizer of the run
    assert bardlet.evaluate(run.folder).score.loss == loss == pytest.approx(run.record.val_loss, abs=1e-6)  # type: ignore[union-attr]
    resumed = bardlet.resume(run.folder, steps=6, allow_change=True)
    assert resumed.record.tokens == run.record.tokens and resumed.record.val_tokens == run.record.val_tokens
    tokens = len(tk.load(run.folder).encode("".join(corpus.find([str(text)]).documents("train"))))
    assert run.record.tokens + run.record.val_tokens + 1 == tokens
    assert abs(run.record.tokens - int(0.9 * tokens)) < (1 if kind != "bpe" else 0.02 * tokens)


@pytest.mark.parametrize(("url", "command"), [
    ("https://example.org/a/my%20book.txt", "curl -L -o my_book.txt https://example.org/a/my%20book.txt"),
    ("http://example.org/x.jsonl.gz?a=1&b=[2]", "curl -L -o x.jsonl.gz 'http://example.org/x.jsonl.gz?a=1&b=[2]'"),
    ("HTTPS://example.org/", "curl -L -o text.txt HTTPS://example.org/")])
def test_a_url_is_refused_with_the_command_that_downloads_it(url: str, command: str) -> None:
    with pytest.raises(BardletError) as error:
        corpus.find([url])
    assert str(error.value) == f"{url}: is a URL, and bardlet trains on files; download it first: {command}"


@pytest.mark.parametrize(("typed", "meant"), [
    ("leid.txt", "lied.txt"), ("LIED.TXT", "lied.txt"), ("lied.text", "lied.txt"), ("bok", "books")])
def test_a_mistyped_name_is_corrected(text: Path, typed: str, meant: str) -> None:
    (text.parent / "books").mkdir()
    with pytest.raises(BardletError) as error:
        corpus.find([str(text.parent / typed)])
    assert f'no such file, folder or corpus (did you mean "{text.parent / meant}"?)' in str(error.value)


@pytest.mark.parametrize("typed", ["poem.txt", "x", "nowhere/lied.txt"])
def test_another_name_is_not(text: Path, typed: str) -> None:
    with pytest.raises(BardletError, match=r"no such file, folder or corpus; `bardlet data`"):
        corpus.find([str(text.parent / typed)])


def names(path: Path) -> Path:
    """Write a list of 400 names, one a line."""
    path.write_text("".join(f"{'KLMN'[n % 4]}{'aeiou'[n % 5]}{'rst'[n % 3]}{'aeiou'[n // 5 % 5]}{'nm'[n % 2]}\n"
                            for n in range(400)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("text", "starts"), [("names", True), ("stories", True), ("book", False)])
def test_a_prompt_starts_a_document_where_documents_are_short(text: str, starts: bool, tmp_path: Path) -> None:
    """A model of names has hardly seen a name that does not follow the separator; passages of a novel follow anything.
    """
    file = tmp_path / f"{text}.txt"
    if text == "names":
        names(file)
    else:
        sentence = "the cat sat on the mat and the dog ran to the door. "
        file.write_text({"stories": (sentence[:40] + "<|endoftext|>") * 60, "book": sentence * 60}[text])
    run = bardlet.train(file, steps=1, n_layer=1, n_head=2, n_embd=16, block_size=64, compile="off",
                        separator="\n" if text == "names" else "auto", out=tmp_path / text)
    model = bardlet.load(run.folder)
    assert model.starts_documents == starts
    prompt = "K" if text == "names" else "the"
    ids = model.tokenizer.encode(prompt).tolist()
    assert model.prompt_ids(prompt) == ([model.tokenizer.eos_id, *ids] if starts else ids)
    assert model.prompt_ids("") != [] and model.generate(prompt, 5, seed=1) == model.generate(prompt, 5, seed=1)


@pytest.mark.parametrize(("unknown", "refused"), [(1, False), (50, False), (70, True), (200, True)])
def test_many_characters_that_the_base_does_not_know_are_an_error(unknown: int, refused: bool, tmp_path: Path) -> None:
    """Leaving out up to a twentieth is a note with its share; more would be another text than the one given."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "compile": "off", "steps": 1}
    (tmp_path / "a.txt").write_text("ab" * 600)
    base = bardlet.train(tmp_path / "a.txt", tokenizer="char", out=tmp_path / "base", **shape)  # type: ignore[arg-type]
    characters = list("ab" * 600 + "z" * unknown)
    random.Random(0).shuffle(characters)
    (tmp_path / "b.txt").write_text("".join(characters))
    if refused:
        with pytest.raises(BardletError, match=rf"{unknown} characters \(\d+\.\d%\) are not in the vocabulary"):
            bardlet.train(tmp_path / "b.txt", init=base.folder, steps=1, out=tmp_path / "new", compile="off")
    else:
        bardlet.train(tmp_path / "b.txt", init=base.folder, steps=1, out=tmp_path / "new", compile="off")


def test_biases_that_are_not_trained_stay_zero(text: Path, tmp_path: Path) -> None:
    """Also after a resume; the folder is an ordinary one, which has them."""
    runs = [bardlet.train(text, out=tmp_path / str(bias), tokenizer="char", bias=bias, optimizer="adamw", **TINY)
            for bias in (True, False)]
    runs.append(bardlet.resume(runs[1].folder, steps=6, allow_change=True))
    for run, moved in zip(runs, (True, False, False), strict=True):
        weights = load_file(run.folder / "model.safetensors")
        biases = [weights[name] for name in weights if name.endswith(".bias")]
        assert len(biases) == 7 and any(bool(bias.any()) for bias in biases) == moved
    with pytest.raises(BardletError, match="bias=False: only gpt2 can leave out its biases, not llama"):
        bardlet.train(text, out=tmp_path / "llama", bias=False, **{**TINY, "model": "llama"})
