"""`bardlet data`: the named corpora and where they are; `bardlet data get NAME` fetches one."""

from __future__ import annotations

import json

from bardlet.errors import BardletError

HELP = """usage: bardlet data [--json]            the named corpora, and where each was found
       bardlet data get NAME [--json]   download NAME, check its sha256 and keep it in the cache

Corpora are looked up in the folders of $BARDLET_DATA, then in the cache ($BARDLET_CACHE, or the user's
cache folder). `bardlet train NAME` trains on one; `bardlet train FILE` on any text of your own."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code. BardletError for what cannot be had."""
    as_json = "--json" in argv
    words = [word for word in argv if word != "--json"]
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    if not words:
        return _table(as_json)
    if words[0] == "get" and len(words) == 2 and not words[1].startswith("-"):
        return _get(words[1], as_json)
    raise BardletError(f"data {' '.join(words)}: cannot be read; it is `bardlet data`, or `bardlet data get NAME` "
                       "with one of the names that it lists")


def _table(as_json: bool) -> int:
    from bardlet.data import bitext
    from bardlet.data.corpus import EMBEDDED, NAMED, locate

    found = {name: str(locate(name) or "") for name in NAMED}
    translated = {name: str(bitext.locate(name) or "") for name in bitext.NAMED}
    found[EMBEDDED] = "in Python itself"
    if as_json:
        rows = [{"name": n, "what": c.what, "found": found[n] or None, "url": c.url} for n, c in NAMED.items()]
        rows += [{"name": n, "what": c.what, "found": translated[n] or None, "url": None}
                 for n, c in bitext.NAMED.items()]
        print(json.dumps({"corpora": rows}))
        return 0
    for name, named in NAMED.items():
        missing = f"not here: bardlet data get {name}" if named.url else "not here: put it into $BARDLET_DATA"
        print(f"{name:18} {named.what:58} {found[name] or missing}")
    for name, pairs in bitext.NAMED.items():
        print(f"{name:18} {pairs.what:58} {translated[name] or 'not here: put it into $BARDLET_DATA'}")
    return 0


def _get(name: str, as_json: bool) -> int:
    from bardlet.data.corpus import EMBEDDED, get

    shown = -1

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 0
        if percent // 10 > shown and not as_json:
            shown = percent // 10
            print(f"{what}: {done / 1e6:.1f} MB{f' of {total / 1e6:.1f} MB' if total else ''}", flush=True)

    where = "in Python itself" if name == EMBEDDED else str(get(name, progress))
    print(json.dumps({"name": name, "found": where}) if as_json else f"{name}: {where}")
    return 0
