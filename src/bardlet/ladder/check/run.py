"""Start a check in a process of its own, wait for it within the limits, and read its report with care."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import site
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.data import named
from bardlet.errors import BardletError, neutral, quoted
from bardlet.ladder.check.mistakes import DETAIL, MISTAKES, Finding
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.check.source import read

MOST_REPORT = 1 << 20
"""Bytes of a report; a longer one was not written by check."""
MOST_TEXT = 300_000
"""Characters of the text on which models train."""
MARK, SWEEPS = "BARDLET_CHECK", 20
"""The variable that marks the process and what it starts, and how often they are looked for at the end."""
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "SYSTEMDRIVE", "VIRTUAL_ENV", "LANG", "LC_ALL", "TEMP",
        "TMP", "TMPDIR", "PYTHONUTF8", "CONDA_PREFIX")
"""Environment variables that the process gets: no keys, no tokens."""
SET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0",
       "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


@dataclass(frozen=True)
class Verdict:
    """The report on a file. ended: why the process did not finish; empty if it did."""

    rung: int
    guessed: bool
    findings: tuple[Finding, ...]
    passed: dict[str, list[str]]
    notes: tuple[str, ...]
    untested: dict[str, str]
    ended: str = ""


class NotChecked(BardletError):
    """A file that cannot be checked."""

    exit_code = 2


def split(target: str) -> tuple[Path, str | None]:
    """Return the file and the class of FILE or FILE:NAME."""
    path, colon, name = target.rpartition(":")
    if colon and name.isidentifier() and not Path(target).exists():
        return Path(path), name
    return Path(target), None


def corpus() -> str:
    """Return the text on which models train: Tiny Shakespeare if it is on this machine, else Python's documentation."""
    folder = named.locate(named.DEFAULT)
    if folder is None:
        return named.python_docs()[:MOST_TEXT]
    return (folder / named.NAMED[named.DEFAULT].train[0]).read_text(encoding="utf-8")[:MOST_TEXT]


def plain(text: str) -> str:
    """Return a text of at most as many different characters as check's vocabulary has."""
    most = [character for character, _ in Counter(text).most_common(int(SIZES["vocab_size"]))]
    kept = set(most)
    return "".join(character for character in text if character in kept)


def check(path: Path, name: str | None = None, rung: int | None = None, seconds: float = 30.0,
          exercise: str | None = None) -> Verdict:
    """Run a check and return its verdict. exercise: test the file as that exercise of the course.

    Raises:
        NotChecked: the file cannot be read, has no class to test, or ended the process before any result.
    """
    try:
        read(path)  # most errors are known before a process starts
    except BardletError as error:
        raise NotChecked(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="bardlet-check-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        request = {"file": str(path.resolve()), "name": name, "rung": rung, "seconds": seconds, "exercise": exercise}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (folder / "text.txt").write_text(plain(corpus()), encoding="utf-8")
        (folder / "cwd").mkdir()
        ended = _run(folder, seconds)
        return _verdict(_read(folder / "report.json"), ended, path, rung, may_be_empty=exercise is not None)


def _run(folder: Path, seconds: float) -> str:
    """Run the worker; return why it did not finish, or an empty string."""
    environment = {name: value for name in KEPT if (value := os.environ.get(name))} | SET
    mark = secrets.token_hex(16)
    environment |= {"HOME": str(folder / "cwd"), "USERPROFILE": str(folder / "cwd"), MARK: mark,
                    "PYTHONUSERBASE": site.getuserbase()}  # packages that pip installed for this user
    if path := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    command = [sys.executable, "-P", "-m", "bardlet.ladder.check.worker", str(folder)]
    process = subprocess.Popen(command, cwd=folder / "cwd", env=environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it did not finish within {seconds:g} s"
    finally:
        _end(process, mark)
    if code < 0:
        return f"it was ended by signal {-code}"
    return "" if code == 0 else f"it ended the process with exit code {code}"


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the process, its group and, on Linux, what else has its mark in the environment."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(OSError):
        process.kill()
    process.wait()
    for _ in range(SWEEPS):  # one that is ended may just have started another
        if not (left := _marked(mark)):
            break
        for number in left:
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Return the processes of this user with the mark; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


# ---------------------------------------------------------------------------------- a report is data


def _read(path: Path) -> dict[str, Any]:
    """Return what the process wrote; empty if it is no report."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # it may be a pipe, or a link
    try:
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return {}
            data = file.read(MOST_REPORT + 1)
        value = json.loads(data) if len(data) <= MOST_REPORT else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _line(value: object, most: int = 200) -> str:
    """Return a text of the process on one line, without control characters."""
    text = neutral(" ".join(str(value).split())) if isinstance(value, str) else ""
    return text if len(text) <= most else f"{text[:most - 3]}..."


def _lines(value: object) -> list[str]:
    return [line for each in value[:50] if (line := _line(each))] if isinstance(value, list) else []


def _finding(value: object) -> Finding | None:
    if not isinstance(value, dict) or value.get("name") not in MISTAKES:
        return None
    where, detail = _line(value.get("where"), 60), _line(value.get("detail"), 160)
    where = where if re.fullmatch(r"[\w .]+", where) else "the file"
    return Finding(value["name"], where, detail if DETAIL.fullmatch(detail) else "")


def _verdict(report: dict[str, Any], ended: str, path: Path, rung: int | None, may_be_empty: bool = False) -> Verdict:
    """Return the verdict of a report. may_be_empty: accept one whose parts are all untested.

    Raises:
        NotChecked: it has no result.
    """
    name, doing = quoted(path), _line(report.get("doing")) or "loading the file"
    error = _line(report.get("error"))
    passed = {_line(key, 60): _lines(value) for key, value in _items(report.get("passed"))}
    untested = {_line(key, 60): _line(value) for key, value in _items(report.get("untested"))}
    values = report.get("findings")
    findings = [each for each in map(_finding, values[:100] if isinstance(values, list) else []) if each]
    if not ended and not error and report.get("done") is not True:
        ended = "it ended the process"
    reason = f"{error or ended} ({doing})" if error and ended else error or (f"{ended} ({doing})" if ended else "")
    if not findings and not passed and reason:
        raise NotChecked(f"{name}: {reason}; nothing could be tested")
    if not findings and not passed and not (may_be_empty and untested):
        first = next(iter(untested.items()), ("", "no test fits its classes"))
        raise NotChecked(f"{name}: {': '.join(each for each in first if each)}; nothing could be tested")
    number = report.get("rung")
    known = number if isinstance(number, int) and 1 <= number <= 13 else rung or 8
    return Verdict(known, report.get("guessed") is True, tuple(findings), passed, tuple(_lines(report.get("notes"))),
                   untested, reason)


def _items(value: object) -> list[tuple[object, object]]:
    return list(value.items())[:50] if isinstance(value, dict) else []
