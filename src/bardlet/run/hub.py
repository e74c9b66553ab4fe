"""Models of the Hugging Face Hub: fetch OWNER/NAME into the Hub's cache, and verify every file.

Only JSON, the tokenizer and safetensors are fetched, never a pickle or code. huggingface_hub checks sizes only. The
sha256 is checked here, each time that a model is used, and a file that does not match is removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bardlet.config.settings import Settings
from bardlet.errors import BardletError, one_line, printable, quoted
from bardlet.run import foreign, hf
from bardlet.runtime import manifest
from bardlet.runtime.atomic import REMEDIES, write_atomically

log = logging.getLogger("bardlet")

S = TypeVar("S", bound=Settings)

NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._/-]+)?")
"""OWNER/NAME or OWNER/NAME@REVISION: a branch, a tag or a commit."""
COMMIT = re.compile(r"[0-9a-f]{40}")
OWN_FOLDERS = ("runs",)
"""Folders that are never looked up as an owner on the Hub: `bardlet train` writes its runs there."""
TWO_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
"""The tokenizer of gpt2 in models without a tokenizer.json."""
SMALL_FILES = (*hf.TOKENIZER_AND_CONFIG, "chat_template.jinja", "chat_template.json", *TWO_FILES)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TIMEOUT = 10.0
"""Seconds until a server that does not answer counts as unreachable."""

_verified: set[tuple[str, int, int]] = set()
"""Files whose sha256 this process has checked: path, size, time of change."""


def is_name(model: str) -> bool:
    """Return True if `model` is the name of a model of the Hub.

    A path is not, if it exists, or if the folder that it would be in exists: a mistyped path is not sent to a server.
    """
    owner = model.partition("/")[0]
    return bool(NAME.fullmatch(model)) and owner not in OWN_FOLDERS and not os.path.lexists(owner)


def folder(model: str) -> Path:
    """Return the folder of a model: of a name of the Hub its folder in the cache, after fetching it.

    Raises:
        BardletError: the model cannot be fetched, is damaged, or is not in a form that bardlet reads.
    """
    if is_name(model):
        return _fetch(model)
    owner = model.partition("/")[0]
    if NAME.fullmatch(model) and owner not in OWN_FOLDERS and not os.path.lexists(model):
        if run := manifest.similar_run(Path(model)):
            raise BardletError(f"{model}: no such folder; did you mean {quoted(run)}?")
        raise BardletError(f"{model}: no such folder; {owner} exists here, so this is not looked up on the Hub; check "
                           f"the path, or run `hf download {model.partition('@')[0]} --local-dir DIR`")
    return Path(model)


def pinned(config: S) -> S:
    """Return the settings with --init as OWNER/NAME@COMMIT if it is a name of the Hub: a run must be repeatable."""
    if config.init is None or not is_name(config.init):
        return config
    return replace(config, init=f"{config.init.partition('@')[0]}@{_fetch(config.init).name}")


def revision(model: str | None) -> str | None:
    """Return the commit in a name of the Hub; None for a path, and for a name without a commit."""
    commit = model.partition("@")[2] if model is not None and is_name(model) else ""
    return commit if COMMIT.fullmatch(commit) else None


# ---------------------------------------------------------------- fetching


def _fetch(model: str) -> Path:
    """Return the folder of a model in the cache, complete and verified."""
    try:
        import huggingface_hub
    except ImportError:
        raise BardletError(f"{model}: no such folder; to fetch a model of that name from the Hub, run "
                           "`pip install huggingface-hub`") from None
    repo, _, wanted = model.partition("@")
    if COMMIT.fullmatch(wanted) and (snapshot := _in_cache(repo, wanted)):
        return _verify(model, snapshot, {})
    with _quiet(), _explained(model):
        try:
            info = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(
                repo, revision=wanted or None, files_metadata=True, timeout=TIMEOUT)
        except Exception as error:
            if not _is_unreachable(error) or not (snapshot := _in_cache(repo, wanted or "main")):
                raise
            log.warning("%s: the Hub cannot be reached; using the copy of %s in the cache", model, snapshot.name[:12])
            return _verify(model, snapshot, {})
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"its commit is {printable(info.sha)}")
        entries = {entry.rfilename: entry for entry in info.siblings or []}
        snapshot = _download(model, str(info.sha), entries)
    return _verify(model, snapshot, entries)


def _download(model: str, commit: str, entries: dict[str, Any]) -> Path:
    """Fetch the files of a commit that are not in the cache yet, the weights last. Return the folder in the cache.

    entries: the Hub's list of files.
    """
    import huggingface_hub

    repo, _, wanted = model.partition("@")
    snapshot = _cached_model(repo) / "snapshots" / commit

    def get(name: str) -> None:
        huggingface_hub.hf_hub_download(repo, name, revision=commit, etag_timeout=TIMEOUT,
                                        endpoint=os.environ.get("HF_ENDPOINT") or None)

    for name in SMALL_FILES:
        if name in entries and not (name in TWO_FILES and "tokenizer.json" in entries):
            get(name)
    _check_form(model, set(entries), snapshot)
    weights = [WEIGHTS]
    if WEIGHTS not in entries:
        get(INDEX)
        weights = hf.shard_names(snapshot)
    if missing := [name for name in weights if not (snapshot / name).exists()]:
        size = sum(entries[name].size or 0 for name in missing if name in entries)
        log.info("fetching %s (%s, %.1f MB) into the cache of the Hub", repo, commit[:12], size / 1e6)
    for name in missing:
        get(name)
    if not COMMIT.fullmatch(wanted):  # by this, the name leads to this commit also without a network
        ref = _cached_model(repo) / "refs" / (wanted or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(ref, lambda path: path.write_text(commit, encoding="utf-8"), len(commit))
    return snapshot


def _cached_model(repo: str) -> Path:
    """Return the folder of a model in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _check_form(model: str, names: set[str], snapshot: Path) -> None:
    """Raise BardletError if bardlet cannot read a model with these files, before its weights are fetched."""
    repo, _, wanted = model.partition("@")
    target, options = repo.rpartition("/")[2], {"revision": wanted} if wanted else {}
    convert = foreign.convert_command(repo, target, **options)
    if "adapter_config.json" in names and WEIGHTS not in names:
        raise BardletError(f"{model}: an adapter, not a model; merge it into the model (pip install peft): "
                           f"{foreign.merge_command(repo, repo, target)}")
    gguf = sorted(name for name in names if name.endswith(".gguf") and "/" not in name)
    if gguf and not names & {WEIGHTS, INDEX}:
        convert = foreign.convert_command(repo, target, gguf_file=gguf[0], **options)
        raise BardletError(f"{model}: in GGUF, which bardlet does not read; convert it (pip install transformers gguf "
                           f"accelerate): {convert}")
    if "config.json" not in names:
        raise BardletError(f"{model}: no config.json, so not a model that bardlet reads; use another")
    hf.read_model_config(snapshot)
    if not names & {WEIGHTS, INDEX}:
        raise BardletError(f"{model}: no weights in safetensors, and bardlet never opens a pickle; convert it (pip "
                           f"install transformers): {convert}")
    if "tokenizer.json" not in names and not set(TWO_FILES[:2]) <= names:
        raise BardletError(f"{model}: no tokenizer.json, which bardlet needs; write one (pip install transformers): "
                           f"{convert}")


def _in_cache(repo: str, wanted: str) -> Path | None:
    """Return the folder of a commit, branch or tag in the cache if it is complete."""
    model = _cached_model(repo)
    try:
        commit = wanted if COMMIT.fullmatch(wanted) else (model / "refs" / wanted).read_text(encoding="utf-8").strip()
        snapshot = model / "snapshots" / commit
        if COMMIT.fullmatch(commit) and (snapshot / "config.json").exists():
            foreign.check_folder(snapshot)
            whole = all(path.exists() for path in hf.weight_files(snapshot))
            return snapshot if whole and any((snapshot / name).exists() for name in ("tokenizer.json", "merges.txt")) \
                else None
    except (OSError, ValueError, BardletError):  # not in the cache, or not all of it
        pass
    return None


# ---------------------------------------------------------------- verifying


def _verify(model: str, snapshot: Path, entries: dict[str, Any]) -> Path:
    """Check the files of a snapshot; remove one that is damaged and raise BardletError.

    entries: the Hub's list of files. Weights have a sha256 there, and are named by it in the cache, too; other files
    have git's hash.
    """
    used = {path.name for path in hf.weight_files(snapshot)} | {*SMALL_FILES, INDEX}
    for path in sorted(path for path in snapshot.iterdir() if path.name in used):
        real, blob = Path(os.path.realpath(manifest.inside(snapshot, path.name))), path
        if path.is_symlink():
            blob = snapshot / os.readlink(path)
            blob = Path(os.path.realpath(blob.parent)) / blob.name
        entry = entries.get(path.name)
        large = getattr(entry, "lfs", None)
        expected = {large.sha256} if large else set()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            expected.add(blob.name)
        key = (str(real), real.stat().st_size, real.stat().st_mtime_ns)
        if key not in _verified and not _matches(real, expected, None if large else getattr(entry, "blob_id", None)):
            for file in dict.fromkeys((path, blob, real)):
                file.unlink(missing_ok=True)
            raise BardletError(f"{model}: {path.name} is damaged: its hash is not the one that the Hub lists; it was "
                               "removed from the cache, so run the command again")
        _verified.add(key)
    return snapshot


def _matches(path: Path, sha256: set[str], git: str | None) -> bool:
    """Return True if a file has each given sha256, and git's hash if that is given."""
    if sha256 and sha256 != {manifest.sha256(path)}:
        return False
    if git is None or not COMMIT.fullmatch(git):
        return True
    contents = path.read_bytes()
    header = f"blob {len(contents)}\0".encode()
    return hashlib.sha1(header + contents, usedforsecurity=False).hexdigest() == git


# ---------------------------------------------------------------- errors


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from printing: its warnings, and its progress bars unless they are on a terminal."""
    from huggingface_hub import utils

    before, bars_off = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(before)
        if not bars_off and not sys.stderr.isatty():
            utils.enable_progress_bars()


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the network into one line."""
    try:
        yield
    except BardletError:
        raise
    except Exception as error:  # the network's errors are those of a library that changes with huggingface_hub
        raise BardletError(f"{model}: {_explanation(model, error)}") from None


def _is_unreachable(error: Exception) -> bool:
    """Return True if an error means that no server answers, or that its answer is its own failure."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, errors.HTTPError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError)


def _explanation(model: str, error: Exception) -> str:
    """Return what an error of the download means, and what to do."""
    from huggingface_hub import constants, errors

    repo, _, wanted = model.partition("@")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    copy = f"`hf download {repo} --local-dir DIR`"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its terms at {endpoint}/{repo}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has no revision {wanted} of this model; name a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return ("no such folder here, and no such model on the Hub; check the name, or, if the model is private, run "
                "`hf auth login`")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE is set; unset it, or name a folder"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"{endpoint} answers with an error ({error.response.status_code}); try again later"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"cannot be written to the cache ({error.strerror}); free some space, or set HF_HOME to another folder"
    if "Consistency check failed" in str(error) or type(error).__name__ in ("RemoteProtocolError", "ReadError"):
        return "the transfer was cut; run the command again"
    if _is_unreachable(error) or isinstance(error, errors.LocalEntryNotFoundError):
        return (f"no such folder here, and {endpoint} cannot be reached ({one_line(error)}); check the network, or run "
                f"{copy} where there is one")
    if isinstance(error, errors.HFValidationError):
        return f"no such folder here, and not a name of the Hub ({one_line(error)}); check the name"
    return f"{endpoint} does not answer as the Hub does ({type(error).__name__}: {one_line(error)}); check HF_ENDPOINT"
