"""Symbolic links in a model folder: only those of the Hugging Face Hub's cache lead out of it.

    hub/models--me--gpt/snapshots/COMMIT/config.json -> ../../blobs/SHA      a blob of the same model
    hub/models--me--gpt/blobs/SHA -> ../../blobs/PR/HASH                     a blob that several models share

A folder from a stranger may have a link to any file of its reader. So every step of a chain of links must stay in the
model's own folder, with real paths compared; only a blob may go on, to the shared blobs beside the models.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from bardlet.errors import BardletError

MODEL = re.compile(r"models--[\w.-]+")
"""The folder of a model in the cache: models--OWNER--NAME."""
BLOB = re.compile(r"[0-9a-f]{64}")
"""A file of the weights, which the cache names by its sha256; the shared blobs are named by a hash as long."""
SHARED_MARKER = ".huggingface-shared-blobs"
"""The file by which huggingface_hub marks the folder of shared blobs (huggingface_hub/utils/_shared_blobs.py)."""
MAX_LINKS = 8
"""Longest chain of links that is followed; the cache has chains of two."""


def check(path: Path) -> None:
    """Raise BardletError unless the link `path` leads to a file in its own folder, or in the Hub's cache of its model.
    """
    folder = Path(os.path.realpath(path.parent))
    if Path(os.path.realpath(path)).parent != folder and not _stays_in_cache(folder / path.name, folder):
        raise BardletError(f"{path}: is a link to another folder; {_advice(folder)}")
    if not path.exists():
        raise BardletError(f"{path}: is a link to a file that does not exist; {_advice(folder)}")


def _stays_in_cache(path: Path, folder: Path) -> bool:
    """Return True if every step of a chain of links stays in the cached model of `folder`, a real path."""
    if folder.parent.name != "snapshots" or not MODEL.fullmatch(folder.parent.parent.name):
        return False
    model, may_be_shared = folder.parent.parent, False
    for _ in range(MAX_LINKS):
        if not path.is_symlink():
            return True
        step = os.path.join(path.parent, os.readlink(path))
        parent = Path(os.path.realpath(os.path.dirname(step)))  # the folders on the way may be links, too
        path = parent / os.path.basename(step)
        if path.name in ("", ".", ".."):
            return False
        if not path.is_relative_to(model):
            return may_be_shared and _is_shared_blob(path, model.parent / "blobs")
        may_be_shared = parent == model / "blobs" and bool(BLOB.fullmatch(path.name))
    return False


def _is_shared_blob(path: Path, store: Path) -> bool:
    """Return True if `path` is a regular file among the shared blobs: STORE/PR/HASH, where HASH begins with PR."""
    marker = store / SHARED_MARKER
    return (bool(BLOB.fullmatch(path.name)) and path.parent == store / path.name[:2]
            and not path.is_symlink() and path.is_file() and not marker.is_symlink() and marker.is_file())


def _advice(folder: Path) -> str:
    """Return how to get a folder of real files instead of `folder`, a folder of links."""
    models = [part for part in folder.parts if MODEL.fullmatch(part)]
    name = models[-1].removeprefix("models--").replace("--", "/", 1) if models else ""
    if not name:
        return ("replace it with a copy of the file (cp -L), or get the model's folder without links: "
                "`hf download NAME --local-dir DIR`")
    return (f"run `hf download {shlex.quote(name)} --local-dir {shlex.quote(name.rpartition('/')[2])}`, and use that "
            "folder")
