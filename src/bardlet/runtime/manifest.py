"""A manifest that knows every byte of a folder's files.

A manifest holds the sha256 of each file of a folder, and its own. Where a file is
to be replaced in a folder that has one, the manifest first allows both the old content and the new, so that there is
no moment at which a kill would leave a folder that contradicts itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError, printable
from bardlet.runtime.atomic import explain_write_errors, write_atomically

MANIFEST = "manifest.json"


# ---------------------------------------------------------------- reading


MAX_JSON_BYTES = 1 << 22
"""Bytes of the largest JSON file that is read, which takes 100 MB at worst; the index of a large model has 100 kB."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an error names the file, the line and the column."""
    inside(path.parent, path.name)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise BardletError(f"{path}: damaged: {size:,} bytes are too many for a file of this kind; copy it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BardletError(f"{path}: damaged at line {error.lineno}, column {error.colno}: {error.msg}; "
                           "copy it again, or take another checkpoint") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); change its permissions, "
                           "or copy it again") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: damaged: {error}; copy it again, or take another checkpoint") from None
    if not isinstance(value, dict):
        raise BardletError(f"{path}: damaged: it holds a {type(value).__name__}, not an object; copy it again, "
                           "or take another checkpoint")
    return value


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------- manifests


def write_manifest(folder: Path, names: Iterable[str], **facts: Any) -> None:
    """Write the manifest of `folder` for its files `names`; `facts` stand in it, too."""
    _write_manifest(folder, {**facts, "files": {name: [_entry(folder / name)] for name in names}})


def replace_file(folder: Path, name: str, write: Callable[[Path], object], needed: int | None = None) -> None:
    """`write_atomically` for a file of a folder that has a manifest, or gets one with it.

    A kill at any instant leaves the old file or the new one, and a manifest that knows it.
    """
    path = folder / name
    with explain_write_errors(path, needed):
        known = read_manifest(folder) if (folder / MANIFEST).exists() else {"files": {}}
    new: dict[str, Any] = {}

    def noted(temporary: Path) -> None:
        write(temporary)
        new.update(_entry(temporary))
        old = known["files"].get(name, [])
        _write_manifest(folder, {**known, "files": {**known["files"], name: [*old, new]}})

    write_atomically(path, noted, needed)
    _write_manifest(folder, {**known, "files": {**known["files"], name: [new]}})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of `folder` says. BardletError where it is missing, or is not, byte for byte, what was written.
    """
    path = inside(folder, MANIFEST)
    manifest = read_json(path)
    digest, known = manifest.pop("digest", None), manifest.get("files")
    whole = digest == _digest(manifest) and path.stat().st_size == len(_as_written(manifest))
    if not whole or not isinstance(known, dict) or not all(isinstance(entry, list) for entry in known.values()):
        raise BardletError(f"{path}: damaged: it does not match its own digest; copy the whole folder again")
    return manifest


def has_manifest(folder: Path) -> bool:
    """Whether `folder` has a manifest that can be believed."""
    try:
        return bool(read_manifest(folder))
    except BardletError:
        return False


def damaged_files(folder: Path, names: Collection[str] = ()) -> str | None:
    """What is wrong with a folder that has a manifest, in words that name the file; None when it is whole.

    names: look at these files only; none: at all that the manifest knows.
    """
    try:
        manifest = read_manifest(folder)
        for name, allowed in manifest["files"].items():
            if (not names or name in names) and not _is_one_of(inside(folder, name), allowed):
                # a run that is under way may have replaced it since the manifest was read
                return damaged_files(folder, names) if read_manifest(folder) != manifest else f"{folder / name}: {DAMAGED}"
    except BardletError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror}): change its permissions"
    return None


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`, which must be a plain file that lies there, and no link that leaves it.

    Raises BardletError; nothing was opened.
    """
    path = folder / name
    if Path(name).name != name or len(name) > 255:
        raise BardletError(f"{folder}: a file in it names {printable(name)}, which is not a file of this folder; "
                           "do not use a folder that you do not trust")
    if not os.path.lexists(path):
        raise BardletError(f"{path}: there is no such file, so {folder} is not a whole model folder; "
                           "copy it there, or name a run folder")
    if path.is_symlink() and Path(os.path.realpath(path)).parent != folder.resolve():
        raise BardletError(f"{path}: is a link to another folder; put a copy of the file in its place (cp -L)")
    if not path.is_file():
        raise BardletError(f"{path}: is no file; copy it again, or take another checkpoint")
    return path


DAMAGED = "damaged: it is not the file that was saved"


def _is_one_of(path: Path, allowed: list[Any]) -> bool:
    """Whether a file is one of those that a manifest allows; one of another size is not read for that."""
    size = path.stat().st_size
    return any(isinstance(entry, dict) and entry.get("bytes") == size for entry in allowed) and _entry(path) in allowed


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    written = _as_written({"version": 1, **manifest})
    write_atomically(folder / MANIFEST, lambda p: p.write_bytes(written), len(written))


def _as_written(manifest: Mapping[str, Any]) -> bytes:
    """A manifest with the digest of all the rest, as the bytes of its file."""
    return (json.dumps({**manifest, "digest": _digest(manifest)}, indent=2, sort_keys=True) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
