"""Follow a run's settings from the command line to the token shards, and count the calls that pass them upwards.

    python tools/config_walk.py [FOLDER] [--list]    # a checkout whose package lies in rooms; default: this one

The command is `bardlet train TEXT --minutes 1 --plan`, with an empty cache. A call passes the settings on if an
argument is one (an instance of a class with the field `val_part`), or is an object that has one as its attribute
`config`. It goes up if the room of the function that is called stands above that of its caller. The settings' own
methods do not count. The walk ends where the text is handed to `shards.prepare`.
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
    """The settings have come to the shards."""


def rooms_of(root: Path) -> tuple[str, ...]:
    """The order of the rooms, from the top, as tests/test_imports.py has it."""
    tree = ast.parse((root / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            return tuple(ast.literal_eval(node.value))
    raise SystemExit(f"{root}: tests/test_imports.py has no ROOMS")


def is_config(value: Any) -> bool:
    """Whether a value is a run's settings, or carries them."""
    kinds = type(value), type(getattr(value, "config", None))
    return any("val_part" in getattr(kind, "__dataclass_fields__", {}) for kind in kinds)


class Walk:
    """The calls that pass the settings on."""

    def __init__(self, root: Path) -> None:
        self.source, self.rooms = root / "src" / "bardlet", rooms_of(root)
        self.passed: list[tuple[str, str]] = []
        self.up: list[tuple[str, str]] = []

    def name(self, frame: FrameType) -> str | None:
        """ROOM/FILE:FUNCTION of a frame of the package's; None of another one's."""
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(self.source):
            return None
        return f"{path.relative_to(self.source).with_suffix('').as_posix()}:{frame.f_code.co_qualname}"

    def level(self, name: str) -> int:
        """The place of a function's room, from the top; entrances stand above all."""
        room = name.partition(":")[0].partition("/")[0]
        return self.rooms.index(room) if room in self.rooms else -1

    def see(self, frame: FrameType, event: str, _: object) -> None:
        """A profiler that looks at calls."""
        me = self.name(frame) if event == "call" else None
        if me is None:
            return
        values = [frame.f_locals[name] for name in frame.f_code.co_varnames[:count(frame)] if name in frame.f_locals]
        if not me.startswith("config/") and any(map(is_config, values)):
            before, caller = frame.f_back, None
            while before is not None and (caller := self.name(before)) is None:
                before = before.f_back
            if caller is not None:
                self.passed.append((caller, me))
                if self.level(me) < self.level(caller):
                    self.up.append((caller, me))
        if me == "data/shards:prepare":
            sys.setprofile(None)
            raise Arrived


def count(frame: FrameType) -> int:
    """How many arguments a function has, with those that were gathered by * and **."""
    code = frame.f_code
    return code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)


def main() -> None:
    """See the top of this file."""
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
        from bardlet import runner  # noqa: F401  before the profiler, with all that is imported
        from bardlet.cli import train

        walk = Walk(root)
        sys.setprofile(walk.see)
        try:
            train.main([str(text), "--minutes", "1", "--plan", "--out", f"{scratch}/run"])
        except Arrived:
            pass
        finally:
            sys.setprofile(None)
    functions = {name for call in walk.passed for name in call}
    stops = [walk.level(callee) for _, callee in walk.passed]
    turns = sum(after < before for before, after in itertools.pairwise(stops))
    files = {name.partition(":")[0] for name in functions}
    print(f"{len(walk.passed)} calls pass the settings, through {len(functions)} functions in {len(files)} files; "
          f"{len(walk.up)} of them to a room above; {turns} times the next call is in a room above the last one's")
    for caller, callee in walk.passed if args.list else walk.up:
        print(f"  {caller} -> {callee}")


if __name__ == "__main__":
    main()
