"""Trace a run's settings from the command line to the token shards, and count the calls that pass them upwards.

    python tools/config_walk.py [FOLDER] [--list]    # a checkout whose package has rooms; default: this one

The command is `bardlet train TEXT --minutes 1 --plan`, with an empty cache. A call passes the settings if an argument
is a settings object (its class has the field `val_part`), or has one as its attribute `config`. It goes up if the
callee's room is above the caller's. The settings' own methods do not count. The walk ends at the call of
`shards.tokenize_corpus`.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any


class Arrived(BaseException):
    """The settings reached the shards."""


def rooms_of(root: Path) -> tuple[str, ...]:
    """Return the rooms from top to bottom, as listed in tests/test_imports.py."""
    tree = ast.parse((root / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            return tuple(ast.literal_eval(node.value))
    raise SystemExit(f"{root}: tests/test_imports.py has no ROOMS")


def is_config(value: Any) -> bool:
    """Return True if a value is a run's settings, or has them as its attribute `config`."""
    classes = type(value), type(getattr(value, "config", None))
    return any("val_part" in getattr(cls, "__dataclass_fields__", {}) for cls in classes)


class Walk:
    """The calls that pass the settings, recorded by a profiler."""

    def __init__(self, root: Path) -> None:
        self.source, self.rooms = root / "src" / "bardlet", rooms_of(root)
        self.passed: list[tuple[str, str]] = []
        self.up: list[tuple[str, str]] = []

    def name(self, frame: FrameType) -> str | None:
        """Return ROOM/FILE:FUNCTION of a frame of the package; None for other frames."""
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(self.source):
            return None
        return f"{path.relative_to(self.source).with_suffix('').as_posix()}:{frame.f_code.co_qualname}"

    def level(self, name: str) -> int:
        """Return the index of a function's room, from the top; -1 for the entrances above all rooms."""
        room = name.partition(":")[0].partition("/")[0]
        return self.rooms.index(room) if room in self.rooms else -1

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Record a call; a profile function for `sys.setprofile`."""
        callee = self.name(frame) if event == "call" else None
        if callee is None:
            return
        n_arguments = argument_count(frame)
        values = [frame.f_locals[name] for name in frame.f_code.co_varnames[:n_arguments] if name in frame.f_locals]
        if not callee.startswith("config/") and any(map(is_config, values)):
            outer, caller = frame.f_back, None
            while outer is not None and (caller := self.name(outer)) is None:
                outer = outer.f_back
            if caller is not None:
                self.passed.append((caller, callee))
                if self.level(callee) < self.level(caller):
                    self.up.append((caller, callee))
        if callee in ("data/shards:tokenize_corpus", "data/shards:prepare"):  # the second: in older checkouts
            sys.setprofile(None)
            raise Arrived


def argument_count(frame: FrameType) -> int:
    """Return a function's number of arguments; *args and **kwargs count as one each."""
    code = frame.f_code
    return code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--list", action="store_true", help="print every call")
    args = parser.parse_args()
    root = args.folder.resolve()
    sys.path.insert(0, str(root / "src"))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["BARDLET_CACHE"] = f"{scratch}/cache"
        text = Path(scratch) / "text.txt"
        text.write_text("To be, or not to be, that is the question:\n" * 400, encoding="utf-8")
        from bardlet import runner  # noqa: F401  so that the profiler does not trace imports
        from bardlet.cli import train

        walk = Walk(root)
        sys.setprofile(walk.profile)
        try:
            train.main([str(text), "--minutes", "1", "--plan", "--out", f"{scratch}/run"])
        except Arrived:
            pass
        finally:
            sys.setprofile(None)
    functions = {name for call in walk.passed for name in call}
    levels = [walk.level(callee) for _, callee in walk.passed]
    turns = sum(after < before for before, after in itertools.pairwise(levels))
    files = {name.partition(":")[0] for name in functions}
    print(f"{len(walk.passed)} calls pass the settings, through {len(functions)} functions in {len(files)} files; "
          f"{len(walk.up)} of them go to a room above; {turns} times the next call is in a room above the previous one")
    for caller, callee in walk.passed if args.list else walk.up:
        print(f"  {caller} -> {callee}")


if __name__ == "__main__":
    main()
