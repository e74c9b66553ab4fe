"""`bardlet export` and `bardlet.export_model`: what is written, what is said, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import write_model
from huggingface_hub import ModelCard

import bardlet
from bardlet import tokenizer as tk
from bardlet.cli import main
from bardlet.config.finetuning import GRPOConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.export import export
from bardlet.run import card, hf
from bardlet.run import folder as run_folder

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4", "--steps", "2",
        "--compile", "off"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text of characters."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.txt").write_text("".join(f"the bard number {n} sang a song.\n" for n in range(300)), encoding="utf-8")
    assert main(["train", str(folder / "a.txt"), *TINY, "--out", str(folder / "my-run")]) == 0
    return folder / "my-run"


@pytest.mark.parametrize(("to", "names"), [("html", ["my-run.html"]), ("gguf", ["my-run.gguf", "my-run.Modelfile"]),
                                           ("hf", ["my-run-hf"]), ("onnx", ["my-run-onnx"])])
def test_every_format_has_a_name(to: str, names: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(to) if to in ("gguf", "onnx") else None
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--to", to, "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == {"format": to, "files": names}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert ("memorization: 0.0% of" in said[0]) == (to == "html")


def test_an_export_from_python_has_the_same_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bardlet.export_model(run, to="hf") == [Path("my-run-hf")]
    assert Path("my-run-hf/model.safetensors").is_file()


def test_a_folder_for_the_hub_has_no_checkpoints(run: Path, tmp_path: Path) -> None:
    [out] = bardlet.export_model(run, to="hf", out=tmp_path / "clean")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "loss.png", "manifest.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]
    model, tokenizer = hf.read_folder(out)
    same, _ = hf.read_folder(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["padding_side"] == "left" and config["pad_token"] == tokenizer.padding


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_the_card_of_an_export_has_no_local_paths(to: str, run: Path, tmp_path: Path) -> None:
    """But the names of the files. A graph has a use of its own, and both cards can be read by the Hub."""
    pytest.importorskip("onnx") if to == "onnx" else None
    own = (run / "README.md").read_text(encoding="utf-8")
    [out] = bardlet.export_model(run, to=to, out=tmp_path / "out")  # type: ignore[arg-type]
    text = (out / "README.md").read_text(encoding="utf-8")
    assert str(run.parent) in own and str(run.parent) not in text and '"a.txt"' in text
    assert "run.toml" not in text and (out / "loss.png").is_file()
    assert ("from_pretrained" in text) == (to == "hf") and ("onnx/model.onnx" in text) == (to == "onnx")
    assert text.count("```") == own.count("```") - 2 * (to == "onnx") and "Settings that differ" in text
    assert ModelCard.load(out / "README.md").data.library_name == {"hf": "transformers", "onnx": "transformers.js"}[to]


@pytest.mark.parametrize(("value", "name"), [
    ("a.txt", "a.txt"), ("/home/me/a b.txt", "a b.txt"), ("../data/**/*.md", "*.md"), ("books/", "books/"),
    ("/home/my own/a.txt", "a.txt"), ("..", ".."), ("a", "a")])
def test_a_path_without_its_folders(value: str, name: str) -> None:
    config = TrainConfig(init=value)
    assert card.for_export(f'`{value}`\ninit = "{value}"\n{value}', config, {}) == f'`{name}`\ninit = "{name}"\n{value}'
    assert card.for_export(f"`{value}`", config, {"base_revision": "0123"}) == f"`{value}`", "a name on the Hub"


def test_a_reward_command_without_folders() -> None:
    config = GRPOConfig(reward="python3 ~/s/judge.py --model=runs/judge", init="base")
    assert card.for_export(f"`{config.reward}`", config, {}) == "`python3 judge.py --model=judge`"


def test_an_unfinished_run_is_said_to_be_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "whole")]) == 0
    assert "not finished" not in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "part")
    config, record = run_folder.read_run(tmp_path / "part")
    run_folder.write_run(tmp_path / "part", config, record | {"finished": False, "selected_step": 1})
    assert main(["export", str(tmp_path / "part"), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and "its weights are of step 1 of 2; `bardlet resume " in line


def test_older_tokenizers_replace_unknown_characters_and_keep_their_ids() -> None:
    """In other libraries; bardlet 0.2 named no token for it, and they stopped."""
    new = tk.train_char("abc$\n", False)
    pipeline = json.loads(new.json)
    pipeline["model"]["unk_token"] = "<unk>"
    old = tk.Tokenizer(json.dumps(pipeline))
    mended = tk.with_stand_in(old)
    assert mended.vocab == old.vocab and mended.kind == "char" and mended.padding == "$"
    assert mended.encode("abc").tolist() == old.encode("abc").tolist()
    assert mended.inner.encode("ab?").ids == new.inner.encode("ab$").ids
    assert tk.with_stand_in(mended) is mended


def test_a_model_of_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "gpt")
    assert main(["export", str(folder), "--to", "html", "--out", str(tmp_path / "a.html")]) == 0
    assert "the page contains the model, which may repeat what it was trained on" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--to", "pdf"], "--to pdf"), (["--to", "gguf", "--dtype", "int8"], "must be f32, f16, bf16 or q8_0"),
    (["--to", "html", "--out", "no/where.html"], "mkdir -p no"), (["--to", "html", "--out", "there"], "exists already"),
    ([], "--to")])
def test_what_is_refused_is_one_line(arguments: list[str], message: str, run: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert main(["export", str(run), *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_modelfile_is_never_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.Modelfile").write_text("PARAMETER mine 1\n")
    for name, message in (("m.gguf", "exists already, and an export writes it"),
                          ("z.Modelfile", "name a file like z.gguf")):
        assert main(["export", str(run), "--to", "gguf", "--out", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.Modelfile"]
    assert (tmp_path / "m.Modelfile").read_text() == "PARAMETER mine 1\n"


@pytest.mark.parametrize(("folder", "name"), [
    ("runs/my", "my"), ("hub/models--me--gpt/snapshots/0123abcd", "gpt"),
    ("hub/models--gpt2/snapshots/0123abcd", "gpt2")])
def test_a_model_of_the_hub_has_its_own_name(folder: str, name: str, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a commit; and the folder that a shell is in has one, too."""
    (tmp_path / folder).mkdir(parents=True)
    assert export.name_of(tmp_path / folder) == name
    monkeypatch.chdir(tmp_path / folder)
    assert export.name_of(Path()) == name


def test_a_card_of_its_owner_stays(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    own = shutil.copytree(run, tmp_path / "own")
    (own / "README.md").write_text("# my own card\n", encoding="utf-8")
    [out] = bardlet.export_model(own, to="onnx", out=tmp_path / "out")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# my own card\n\nonnx/model.onnx is the model")


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_a_decoder_that_translates(prefix_lm: bool, tmp_path: Path) -> None:
    """Its prompt ends with the separator; what reads the source in both directions runs nowhere else."""
    pytest.importorskip("gguf"), pytest.importorskip("onnx")
    for name in ("s", "t"):
        (tmp_path / name).write_text("".join(f"{name} the bard {n} sang.\n" for n in range(200)), encoding="utf-8")
    assert main(["train", "--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--model", "gpt2",
                 *TINY[:8], "--steps", "2", "--compile", "off", "--vocab-size", "300", "--lowercase", "false",
                 *(["--prefix-lm"] if prefix_lm else []), "--out", str(tmp_path / "run")]) == 0
    for to in ("gguf", "onnx"):
        if prefix_lm:
            with pytest.raises(BardletError, match="reads its source in both directions"):
                bardlet.export_model(tmp_path / "run", to=to, out=tmp_path / to)  # type: ignore[arg-type]
        else:
            bardlet.export_model(tmp_path / "run", to=to, out=tmp_path / to)  # type: ignore[arg-type]
    if not prefix_lm:
        assert '{{ .Prompt }}<|endoftext|>' in (tmp_path / "gguf.Modelfile").read_text(encoding="utf-8")
        assert "Write the source and then `<|endoftext|>`" in (tmp_path / "onnx/README.md").read_text(encoding="utf-8")


def test_a_failed_folder_is_removed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BardletError("the disk is full")

    monkeypatch.setattr(hf, "write_weights", fail)
    with pytest.raises(BardletError, match="the disk is full"):
        export.export(run, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
