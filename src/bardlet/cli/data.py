"""`bardlet data`: list the named corpora, download one (`get NAME`), or show what a training reads (`show FILE`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.paths import shown
from bardlet.errors import BardletError

USAGE = Usage(
    "data", "[get NAME | show FILE ...] [OPTIONS]",
    "List the named corpora and where each one is, download one, or show what a training reads from files and what "
    "it leaves out. bardlet looks in $BARDLET_DATA/NAME, then in its cache ($BARDLET_CACHE, or your cache folder). "
    "`bardlet train NAME` trains on a named corpus.",
    (("bardlet data", "list the named corpora"),
     ("bardlet data get tinyshakespeare", "download one, check its sha256 and keep it in the cache"),
     ("bardlet data show my.jsonl --kind conversations", "check a file before `bardlet sft`")),
    (Group("files", ("kind",)), Group("output", ("json",))), positionals={"words": "get NAME"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    words: tuple[str, ...] = ()
    """Download a corpus, or show files (default: list all corpora)."""
    kind: Literal["text", "pairs", "conversations", "preferences"] = "text"
    """Content of the files of `show`; pairs are two files: the sentences, and the translation of each line."""
    json: bool = False
    """Print one JSON object on the last line."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    if not command.words:
        return _table(command.json)
    if command.words[0] == "get" and len(command.words) == 2:
        return _get(command.words[1], command.json)
    if command.words[0] == "show" and len(command.words) > 1:
        return _show(command.kind, command.words[1:], command.json)
    raise BardletError(f"data {' '.join(command.words)}: use `bardlet data`, `bardlet data get NAME` with a name from "
                       "its list, or `bardlet data show FILE`")


def _table(as_json: bool) -> int:
    from bardlet.data import bitext
    from bardlet.data.named import EMBEDDED, NAMED, locate

    paths = {name: locate(name) for name in NAMED} | {name: bitext.locate(name) for name in bitext.NAMED}
    where = {name: str(path or "") for name, path in paths.items()} | {EMBEDDED: "part of Python"}
    files = {name: ", ".join(corpus.train + corpus.val) for name, corpus in NAMED.items()}
    files |= {name: f"{pairs.train}, {pairs.val}".replace("{}", "LANGUAGE") for name, pairs in bitext.NAMED.items()}
    named = {**{name: (corpus.description, corpus.url) for name, corpus in NAMED.items()},
             **{name: (pairs.description, None) for name, pairs in bitext.NAMED.items()}}
    if as_json:
        console.say_json({"corpora": [{"name": name, "what": description, "found": where[name] or None, "url": url}
                                      for name, (description, url) in named.items()]})
        return 0
    width, column = shutil.get_terminal_size((100, 24)).columns, max(map(len, named))
    for name, (description, url) in named.items():
        remedy = f"bardlet data get {name}" if url else f"put {files[name]} into $BARDLET_DATA/{name}"
        path = "installed" if name == EMBEDDED else shown(where[name])
        location = path or f"missing: {remedy}"
        line = f"{name:{column}}  {description:58} {location}"
        console.say(line if len(line) <= width else f"{name:{column}}  {description}\n{'':{column}}  {location}")
    if not all(where.values()):
        console.say("\n$BARDLET_DATA is a folder of your choice; to set it: export BARDLET_DATA=\"$HOME/texts\"")
    return 0


def _get(name: str, as_json: bool) -> int:
    from bardlet.data.named import EMBEDDED, get

    shown = -1

    def progress(task: str, done: int, total: int | None) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 0
        if percent // 10 > shown and not as_json:
            shown = percent // 10
            console.say(f"{task}: {done / 1e6:.1f} MB{f' of {total / 1e6:.1f} MB' if total else ''}")

    where = "part of Python" if name == EMBEDDED else str(get(name, progress))
    if as_json:
        console.say_json({"name": name, "found": where})
    else:
        console.say(f"{name}: {where}")
    return 0


def _show(kind: Literal["text", "pairs", "conversations", "preferences"], files: Sequence[str], as_json: bool) -> int:
    from bardlet.data.preview import preview

    console.show_notices()
    found = preview(kind, files)
    if as_json:
        console.say_json(asdict(found))
        return 0
    letters = "" if found.alphabet is None else f", {found.alphabet:,} different ones"
    left_out = f"; {found.left_out:,} left out" if found.left_out else ""
    console.say(f"{console.count(found.count, found.unit)}, {found.characters:,} characters{letters}{left_out}")
    for number, parts in enumerate(found.first, 1):
        console.say(f"\n{found.unit} {number}")
        for name, text in parts:
            console.say(f"{name}: {text}" if name else text)
    return 0
