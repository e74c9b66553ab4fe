"""Links in model folders: those of the Hugging Face Hub's cache are followed, all others out of a folder are refused.

The cache is a folder of links: https://github.com/huggingface/huggingface_hub/issues/4487. Its newest layout shares
blobs between models, so that a file is two links away.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_model

from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.run import hf
from bardlet.runtime import links, manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(model: Path, hub: Path, name: str = "models--me--gpt") -> Path:
    """Copy a model folder into a cache as huggingface_hub lays it out, and return its snapshot folder."""
    snapshot, blobs = hub / name / "snapshots" / COMMIT, hub / name / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        blob = blobs / manifest.sha256(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def share(hub: Path, snapshot: Path, name: str) -> Path:
    """Move the blob of a cached file to the shared blobs, as huggingface_hub 2.4 does, and return it."""
    from huggingface_hub.utils import _shared_blobs as hub_blobs

    blob = (snapshot / name).resolve()
    hashed = blob.name[::-1]  # any 64 hexadecimal digits: the real name is a hash of another kind
    assert hub_blobs.publish_blob_to_shared_store(blob_path=str(blob), xet_hash=hashed, cache_dir=str(hub),
                                                  expected_size=blob.stat().st_size)
    return hub_blobs.shared_blob_path(hub, hashed)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt2 folder."""
    return write_model(tmp_path_factory.mktemp("model") / "gpt")


@pytest.mark.parametrize("place", ["hub", "elsewhere/with space", ".cache/huggingface/hub"])
def test_a_folder_of_the_cache_is_read(place: str, model: Path, tmp_path: Path, text: Path,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """Wherever the cache is: the commands give the same as for a folder of files."""
    snapshot = cached(model, tmp_path / place)
    own, theirs = hf.read_folder(model)[0], hf.read_folder(snapshot)[0]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), theirs.parameters(), strict=True))
    assert hf.weights_hash(model) == hf.weights_hash(snapshot)
    if place == "hub":
        assert bardlet("sample", snapshot, "--tokens", "3")["completions"]
        assert bardlet("doctor", snapshot)["damaged"] == 0
        assert bardlet("eval", snapshot, text)["tokens"]


def test_a_link_to_a_folder_of_the_cache_is_read(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "hub")
    (tmp_path / "short").symlink_to(snapshot)
    (tmp_path / "moved").symlink_to(tmp_path / "hub")
    for folder in (tmp_path / "short", tmp_path / "moved" / snapshot.relative_to(tmp_path / "hub")):
        assert hf.read_folder(folder)[0].config.model == "gpt2"


def test_blobs_that_models_share_are_read(model: Path, tmp_path: Path) -> None:
    """A link of the snapshot leads to a blob, and that to the blobs beside the models."""
    snapshot = cached(model, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert share(tmp_path, snapshot, name).is_file()
        assert (snapshot / name).resolve().parents[1] == tmp_path / "blobs"
    assert hf.read_folder(snapshot)[0].config.model == "gpt2"
    (tmp_path / "blobs" / links.SHARED_MARKER).unlink()  # not huggingface_hub's folder then
    with pytest.raises(BardletError, match="is a link to another folder"):
        hf.read_folder(snapshot)


# ---------------------------------------------------------------- refused


def relink(path: Path, target: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def outside(snapshot: Path) -> Path:
    """Return a readable config.json outside the cache."""
    target = snapshot.parents[3] / "private" / "config.json"
    target.parent.mkdir()
    shutil.copy(snapshot / "config.json", target)
    return target


def absolute(snapshot: Path) -> None:
    relink(snapshot / "config.json", outside(snapshot))


def relative(snapshot: Path) -> None:
    outside(snapshot)
    relink(snapshot / "config.json", "../../../../private/config.json")


def chain_from_a_blob(snapshot: Path) -> None:
    target = outside(snapshot)
    relink((snapshot / "config.json").resolve(), target)


def chain_that_returns(snapshot: Path) -> None:
    """A step of the chain is in a folder that another user may write to."""
    target, blob = outside(snapshot), (snapshot / "config.json").resolve()
    relink(target, blob)
    relink(snapshot / "config.json", target)


def sibling_model(snapshot: Path) -> None:
    blob = (snapshot / "config.json").resolve()
    other = snapshot.parents[2] / "models--me--other" / "blobs" / blob.name
    other.parent.mkdir(parents=True)
    blob.rename(other)
    relink(snapshot / "config.json", f"../../../{'/'.join(other.parts[-3:])}")


def sibling_with_the_same_beginning(snapshot: Path) -> None:
    blob = (snapshot / "config.json").resolve()
    other = snapshot.parents[2] / f"{snapshot.parents[1].name}-2" / blob.name
    other.parent.mkdir()
    blob.rename(other)
    relink(snapshot / "config.json", other)


def blobs_are_a_link(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(snapshot.parents[3] / "private")
    blobs.symlink_to(snapshot.parents[3] / "private")


def folder_inside_is_a_link(snapshot: Path) -> None:
    target = outside(snapshot)
    (snapshot.parents[1] / "more").symlink_to(target.parent)
    relink(snapshot / "config.json", "../../more/config.json")


def dots_after_a_link(snapshot: Path) -> None:
    """`link/..` is the parent of the link's target, not the folder that the link is in."""
    target = outside(snapshot)
    (target.parent / "deep").mkdir()
    (snapshot.parents[1] / "more").symlink_to(target.parent / "deep")
    relink(snapshot / "config.json", "../../more/../config.json")


def shared_blob_without_a_blob(snapshot: Path) -> None:
    """Only a blob of the model may lead to the shared blobs."""
    shared = share(snapshot.parents[2], snapshot, "config.json")
    relink(snapshot / "config.json", shared)


def shared_blob_that_is_a_link(snapshot: Path) -> None:
    shared = share(snapshot.parents[2], snapshot, "config.json")
    relink(shared, outside(snapshot))


def file_beside_the_shared_blobs(snapshot: Path) -> None:
    shared = share(snapshot.parents[2], snapshot, "config.json")
    other = shared.rename(shared.with_name("config.json"))
    blob = snapshot.parents[1] / "blobs" / Path((snapshot / "config.json").readlink()).name
    relink(blob, other)


def shared_blobs_are_a_link(snapshot: Path) -> None:
    share(snapshot.parents[2], snapshot, "config.json")
    store = snapshot.parents[2] / "blobs"
    store.rename(snapshot.parents[3] / "private")
    store.symlink_to(snapshot.parents[3] / "private")


def snapshots_are_a_link(snapshot: Path) -> None:
    """The real folder is no folder of the cache, whatever the link to it is called."""
    private = snapshot.parents[3] / "private"
    snapshot.parent.rename(private)
    snapshot.parent.symlink_to(private)
    relink(private / COMMIT / "config.json", snapshot.parents[1] / "blobs" / manifest.sha256(
        snapshot.parents[1] / "blobs" / Path((private / COMMIT / "config.json").readlink()).name))


ATTACKS = (absolute, relative, chain_from_a_blob, chain_that_returns, sibling_model, sibling_with_the_same_beginning,
           blobs_are_a_link, folder_inside_is_a_link, dots_after_a_link, shared_blob_without_a_blob,
           shared_blob_that_is_a_link, file_beside_the_shared_blobs, shared_blobs_are_a_link, snapshots_are_a_link)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_other_links_in_the_cache_are_refused(attack: Callable[[Path], None], model: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Links to files that exist and could be read, outside the model's own folder: one line, and what to run."""
    snapshot = cached(model, tmp_path / "hub")
    attack(snapshot)
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "gpt2"
    assert main(["sample", str(snapshot), "--tokens", "3"]) == 1
    err = capsys.readouterr().err
    assert f"{snapshot / 'config.json'}: is a link to another folder;" in err and err.count("\n") == 1
    if attack is not snapshots_are_a_link:
        assert "`hf download me/gpt --local-dir gpt`" in err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
                                  "chat_template.jinja", "vocab.json"])
def test_links_out_of_an_ordinary_folder_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    """Also those that look like the cache's, and those of a chat template and of gpt2's two files."""
    for depth, folder in enumerate((tmp_path / "gpt", tmp_path / "snapshots" / "abc", tmp_path / "models--x" / "abc")):
        shutil.copytree(model, folder)
        target = tmp_path / f"blobs-{depth}" / name
        target.parent.mkdir()
        target.write_text("{}")
        if (folder / name).exists():
            shutil.copy(folder / name, target)
        relink(folder / name, target)
        if name == "vocab.json":
            for other in ("tokenizer.json", "tokenizer_config.json"):
                (folder / other).unlink()
            (folder / "merges.txt").write_text("")
        with pytest.raises(BardletError, match=r"is a link to another folder; .*`hf download [^`]* --local-dir "):
            hf.read_folder(folder)


def test_links_within_a_folder_and_broken_links(model: Path, tmp_path: Path) -> None:
    """A snapshot that was copied without its blobs has only broken links."""
    folder = shutil.copytree(model, tmp_path / "gpt")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    assert hf.read_folder(folder)[0].config.model == "gpt2"
    (folder / "real.json").unlink()
    with pytest.raises(BardletError, match=r"config.json: is a link to a file that does not exist; "):
        hf.read_folder(folder)
    copied = tmp_path / "copy" / "models--my--odd.name" / "snapshots" / COMMIT
    shutil.copytree(cached(model, tmp_path / "hub"), copied, symlinks=True)
    with pytest.raises(BardletError, match=r"does not exist; run `hf download my/odd.name --local-dir odd.name`"):
        hf.read_folder(copied)
    relink(copied / "config.json", "config.json")
    with pytest.raises(BardletError, match="does not exist"):
        hf.read_folder(copied)


def test_a_run_in_the_cache_is_as_the_run_wrote_it(model: Path, tmp_path: Path, text: Path,
                                                   bardlet: Callable[..., dict[str, Any]],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """run.toml and manifest.json are links there, too."""
    bardlet("train", text, "--init", model, "--steps", "2", "--batch-size", "2", "--block-size", "8", "--out",
            tmp_path / "run", "--compile", "off", "--dtype", "fp32")
    files = tmp_path / "files"
    shutil.copytree(tmp_path / "run", files, ignore=shutil.ignore_patterns("checkpoints", ".lock*"))
    snapshot = cached(files, tmp_path / "hub")
    assert main(shlex.split(f"sample {snapshot} --tokens 3")) == 0
    assert "edited" not in capsys.readouterr().err
    config = snapshot / "config.json"
    config.resolve().write_text(json.dumps(json.loads(config.read_text()) | {"x": 1}))
    with pytest.raises(BardletError, match=r"config.json: damaged"):
        hf.read_folder(snapshot)


def test_the_shape_of_the_model(model: Path) -> None:
    assert hf.read_model_config(model) == ModelConfig(
        "gpt2", 300, block_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, head_dim=8, n_inner=64)
