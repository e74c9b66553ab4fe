"""Checksum manifests: the sha256 of each file in a folder, and of the manifest itself.

To replace a file, the manifest first allows both the old content and the new one, so a kill at any moment leaves a
folder that matches its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError, printable, quoted
from bardlet.runtime import links
from bardlet.runtime.atomic import explain_write_errors, write_atomically

MANIFEST = "manifest.json"
OF_A_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "run.toml", "checkpoints", MANIFEST)
"""Names of which a run folder, or a model folder, has at least one."""


# ---------------------------------------------------------------- reading


MAX_JSON_BYTES = 1 << 22
"""Bytes of the largest JSON file accepted, which takes 100 MB of memory at worst; a large model's index has 100 kB."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raise BardletError with the file, line and column of an error."""
    inside(path.parent, path.name)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise BardletError(f"{path}: damaged: {size:,} bytes are too many for a file of this kind; copy it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BardletError(f"{path}: damaged at line {error.lineno}, column {error.colno}: {error.msg}; "
                           "copy it again, or use another checkpoint") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); change its permissions, "
                           "or copy it again") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: damaged: {error}; copy it again, or use another checkpoint") from None
    if not isinstance(value, dict):
        raise BardletError(f"{path}: damaged: it contains a {type(value).__name__}, not an object; copy it again, "
                           "or use another checkpoint")
    return value


def sha256(path: Path) -> str:
    """Return the sha256 of a file, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------- manifests


def write_manifest(folder: Path, names: Iterable[str], entries: Mapping[str, Any] | None = None, **facts: Any) -> None:
    """Write the manifest of `folder` for its files `names`, and others with known `entries`; `facts` are further ones.
    """
    known = {name: [entry] for name, entry in (entries or {}).items()}
    _write_manifest(folder, {**facts, "files": {**known, **{name: [file_entry(folder / name)] for name in names}}})


def replace_file(folder: Path, name: str, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Call `write_atomically` for a file of `folder`, and record the file in the folder's manifest.

    A kill at any moment leaves the old file or the new one, and a manifest that allows it.
    """
    path = folder / name
    with explain_write_errors(path, needed):
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {"files": {}}
    new: dict[str, Any] = {}

    def write_and_record(temporary: Path) -> None:
        write(temporary)
        new.update(file_entry(temporary))
        old = manifest["files"].get(name, [])
        _write_manifest(folder, {**manifest, "files": {**manifest["files"], name: [*old, new]}})

    write_atomically(path, write_and_record, needed)
    _write_manifest(folder, {**manifest, "files": {**manifest["files"], name: [new]}})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`. Raise BardletError if it is missing or is not, byte for byte, as written."""
    path = inside(folder, MANIFEST)
    manifest = read_json(path)
    digest, files = manifest.pop("digest", None), manifest.get("files")
    whole = digest == _digest(manifest) and path.stat().st_size == len(_as_written(manifest))
    if not whole or not isinstance(files, dict) or not all(isinstance(entry, list) for entry in files.values()):
        raise BardletError(f"{path}: damaged: it does not match its own digest; copy the whole folder again")
    return manifest


def has_manifest(folder: Path) -> bool:
    """Return True if `folder` has an intact manifest."""
    try:
        return bool(read_manifest(folder))
    except BardletError:
        return False


def damaged_files(folder: Path, names: Collection[str] = ()) -> str | None:
    """Describe the first damaged file of a folder with a manifest; return None if all are intact.

    Args:
        folder: the folder.
        names: check only these files; empty: check every file in the manifest.
    """
    try:
        manifest = read_manifest(folder)
        for name, allowed in manifest["files"].items():
            if (not names or name in names) and not _matches(inside(folder, name), allowed):
                if read_manifest(folder) != manifest:  # a run in progress has replaced files meanwhile
                    return damaged_files(folder, names)
                return f"{folder / name}: {DAMAGED}"
    except BardletError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror}); change its permissions"
    return None


def check_folder(folder: Path) -> None:
    """Raise BardletError if `folder` does not exist, or if it cannot be a run or a model by the names in it."""
    if folder.is_file():
        raise BardletError(f"{folder}: a file, not a model; name a run folder or a Hugging Face folder first, then "
                           "the files")
    if not folder.is_dir():
        run = similar_run(folder)
        raise BardletError(f"{folder}: no such folder; " + (
            f"did you mean {quoted(run)}?" if run else "`bardlet train` prints the path of its run folder"))
    try:
        if set(os.listdir(folder)) & set(OF_A_MODEL):
            return
    except OSError:  # the error of the file that is read next is more specific
        return
    rungs = sorted(path.parent for path in folder.glob("*/seed-*/run.toml"))
    if rungs or (folder / "ladder.json").exists():
        example = f", for example {quoted(rungs[0])}" if rungs else ""
        raise BardletError(f"{folder}: a folder of ladder runs; name one of them{example}")
    if runs := sorted(path.parent.name for path in folder.glob("*/run.toml")):
        raise BardletError(f"{folder}: a folder of runs ({', '.join(runs[:9])}); name one of them")
    raise BardletError(f"{folder}: no run.toml, so this is not a run folder; `bardlet runs` lists the runs")


def similar_run(folder: Path) -> Path | None:
    """Return the run that a misspelled path probably means, in runs/ or next to it; None if none is similar."""
    if os.path.exists((run := Path("runs") / folder) / "run.toml"):
        return run
    runs = {path.parent.name.lower(): path.parent
            for parent in (folder.parent, Path("runs")) for path in sorted(parent.glob("*/run.toml"))}
    near = get_close_matches(folder.name.lower(), runs, 1)
    return runs[near[0]] if near else None


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`.

    Raises:
        BardletError: it is missing, not a regular file, or a link that `links.check` refuses. The file is not opened.
    """
    path = folder / plain_name(folder, name)
    if not os.path.lexists(path):
        raise BardletError(f"{path}: no such file, so {folder} is not a complete model folder; "
                           "copy the file there, or name another folder")
    if path.is_symlink():
        links.check(path)
    if not path.is_file():
        raise BardletError(f"{path}: not a regular file; copy it again, or use another checkpoint")
    return path


def plain_name(folder: Path, name: str) -> str:
    """Return the name of a file in `folder`. Raise BardletError if it is a path."""
    if Path(name).name != name or len(name) > 255:
        raise BardletError(f"{folder}: a file in it refers to {printable(name)}, which is not in this folder; "
                           "do not use folders that you do not trust")
    return name


DAMAGED = "damaged: it is not the file that was saved"


def _matches(path: Path, allowed: list[Any]) -> bool:
    """Return True if a file matches an entry that the manifest allows; a file of another size is not read."""
    size = path.stat().st_size
    sizes = [entry.get("bytes") for entry in allowed if isinstance(entry, dict)]
    return size in sizes and file_entry(path) in allowed


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest: its sha256 (hex) and its size in bytes."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    written = _as_written({"version": 1, **manifest})
    write_atomically(folder / MANIFEST, lambda p: p.write_bytes(written), len(written))


def _as_written(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest file: the entries and their digest."""
    return (json.dumps({**manifest, "digest": _digest(manifest)}, indent=2, sort_keys=True) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
