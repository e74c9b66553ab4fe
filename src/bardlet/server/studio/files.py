"""Texts that people hand to the studio: stored below the folder of runs, under a name that a shell can show."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.server.errors import Refusal

HEAD = 4096
"""Bytes at the beginning of a file that tell what it holds."""
NAME = 80
"""Characters of a stored name."""
CONVERSATION, PREFERENCE, LABEL = {"messages", "conversations", "conversation"}, {"chosen", "rejected"}, {"label"}
"""Fields that tell what the lines of a .jsonl file are."""


@dataclass(frozen=True)
class File:
    """A stored file. kind: "text", "conversations" or "preferences"."""

    id: str
    bytes: int
    kind: str


class Files:
    """The files in a folder. Two with the same content are one."""

    def __init__(self, folder: Path, most: int) -> None:
        """most: bytes of a file."""
        self.folder, self.most = folder, most

    async def receive(self, name: str, body: AsyncIterator[bytes]) -> File:
        """Store the body of a request, and return the file.

        Raises:
            Refusal: it is empty, or has more bytes than a file may.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, digest, size = self.folder / f".{secrets.token_hex(8)}.partial", hashlib.sha256(), 0
        try:
            with open(partial, "wb") as target:
                async for part in body:
                    size += len(part)
                    if size > self.most:
                        raise Refusal(413, f"The file has more than {self.most:,} bytes; put it next to the models, "
                                      "and train in a terminal.", code="body_too_large")
                    digest.update(part)
                    target.write(part)
            if not size:
                raise Refusal(400, "The file is empty.", code="empty_file")
            refuse_documents(partial, name)
            return self.describe(await asyncio.to_thread(self._keep, partial, stored_name(name), digest.hexdigest()))
        finally:
            with suppress(OSError):
                partial.unlink()

    def path(self, name: str) -> Path:
        """Return the path of a stored file. Refuse a name that none has."""
        path = self.folder / name
        if name != stored_name(name) or not path.is_file() or path.is_symlink():
            raise Refusal(404, "There is no such file; upload it again.", param="file", code="file_not_found")
        return path

    def all(self) -> list[File]:
        """Return the stored files, the newest first."""
        with suppress(OSError):
            entries = [entry for entry in os.scandir(self.folder) if entry.is_file(follow_symlinks=False)
                       and not entry.name.startswith(".")]
            entries.sort(key=lambda entry: -entry.stat().st_mtime)
            return [self.describe(Path(entry.path)) for entry in entries[:100]]
        return []

    def describe(self, path: Path) -> File:
        """Return what a file is, judged by its beginning."""
        head = b""
        with suppress(OSError, EOFError), gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            head = file.read(HEAD)
        return File(path.name, path.stat().st_size, kind_of(path, decoded(head)))

    def _keep(self, partial: Path, name: str, digest: str) -> Path:
        """Move a received file to its name; a number keeps it apart from another one of that name."""
        stem, dot, ending = name.partition(".")
        for number in range(1, 10_000):
            path = self.folder / (name if number == 1 else f"{stem}-{number}{dot}{ending}")
            try:
                os.link(partial, path)  # unlike a rename, this does not replace a file
            except FileExistsError:
                if not (path.is_file() and path.stat().st_size == partial.stat().st_size
                        and sha256(path) == digest):
                    continue
            except OSError:  # a file system without links
                if path.exists():
                    continue
                os.replace(partial, path)
            return path
        raise Refusal(409, "There are too many files of this name; rename it.", code="name_taken")


def stored_name(name: str) -> str:
    """Return a name without folders, blanks and control characters, which no shell and no file system misreads."""
    last = re.split(r"[\\/]", name)[-1]
    kept = re.sub(r"[^\w.\-]+", "-", last, flags=re.UNICODE).strip("-. ")
    stem, dot, ending = kept.rpartition(".")
    if not dot:
        stem, ending = kept, ""
    kept = f"{stem[:NAME - len(ending[:12]) - 1]}{dot}{ending[:12]}"
    return kept.strip("-.") or "text.txt"


DOCUMENTS = {b"PK\x03\x04": (".docx", ".odt", ".epub", ".pages"), b"%PDF": (".pdf",), b"\xd0\xcf\x11\xe0": (".doc",),
             b"{\\rtf": (".rtf",)}
"""First bytes of documents, and how their names end."""


def refuse_documents(path: Path, name: str) -> None:
    """Refuse a document of a word processor, from which only that program makes a text."""
    with open(path, "rb") as file:
        head = file.read(8)
    for start, endings in DOCUMENTS.items():
        if head.startswith(start) and name.lower().endswith(endings):
            raise Refusal(400, "This is a document, not a plain text. Open it in its own program, save it as plain "
                          "text (.txt), and choose that file.", code="not_a_text")


def decoded(head: bytes) -> str:
    """Return the beginning of a file as text; half a character at its end is left out."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with suppress(UnicodeDecodeError):
        return head.decode(encoding)
    for cut in range(1, 4):
        with suppress(UnicodeDecodeError):
            return head[:-cut].decode(encoding)
    return head.decode("latin-1")


def kind_of(path: Path, text: str) -> str:
    """Return what a file holds, by its name and its first line."""
    if not path.name.lower().endswith((".jsonl", ".json", ".jsonl.gz")):
        return "text"
    fields = set(first_row(text))
    if fields & PREFERENCE or (fields & LABEL and fields & {"completion", "prompt"}):
        return "preferences"
    return "conversations" if fields & CONVERSATION else "text"


def first_row(text: str) -> dict[str, Any]:
    """Return the first object of a .jsonl file, or of a list in a .json file; empty if there is none."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # it is longer than the preview: its names may tell
        return dict.fromkeys(re.findall(r'"(\w+)"\s*:', text[start:]))
    return value if isinstance(value, dict) else {}


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
