"""`bardlet runs`: list, compare and delete runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.api.runs import RunSummary

USAGE = Usage(
    "runs", "[RUN ...] [OPTIONS]",
    "List the runs below runs/, or compare the named ones: settings that differ, and results. --delete asks before it "
    "deletes the named runs. The result is the validation loss (nats per character after train, per token after "
    "fine-tuning), BLEU of a translator, the accuracy on held-out pairs (reward, dpo), the AUC (kto), or the held-out "
    "reward (ppo, grpo).",
    (("bardlet runs", "list all runs, the newest first"),
     ("bardlet runs runs/a runs/b", "compare two runs"),
     ("bardlet runs runs/a --delete", "delete a run, after confirmation")),
    (Group("selection", ("root", "delete", "yes")), Group("output", ("json",))), positionals={"run": "RUN"},
    metavars={"root": "DIR"})


WORDS = {"ls": "", "list": "", "compare": "", "delete": "--delete", "remove": "--delete", "rm": "--delete"}
"""Words that users type after `bardlet runs`, and the flag that they mean."""


@dataclass(frozen=True)
class Command:
    """The command line."""

    run: tuple[str, ...] = ()
    """Run folders to compare or delete (default: list all runs)."""
    root: str = "runs"
    """Folder whose runs are listed."""
    delete: bool = False
    """Delete the named runs, after confirmation."""
    yes: bool = False
    """Delete without confirmation."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.delete and not self.run:
            raise BardletError("--delete: name the runs to delete, as in `bardlet runs runs/a --delete`")
        if self.yes and not self.delete:
            raise BardletError("--yes: only confirms --delete; add --delete, or drop --yes")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    from bardlet.api import runs

    if command.delete:
        return delete(command)
    if command.run:
        if command.run[0] in WORDS and not Path(command.run[0]).exists():
            words = shlex.join(["bardlet", "runs", *command.run[1:], *WORDS[command.run[0]].split()])
            raise BardletError(f"{command.run[0]}: not a run folder; did you mean `{words}`?")
        for folder in command.run:
            if not (Path(folder) / "run.toml").is_file():
                raise BardletError(f"{folder}: not a run folder; `bardlet runs` lists them")
        summaries = [runs.summarize(Path(folder)) for folder in command.run]
    else:
        summaries = runs.runs(command.root)
    print_table(summaries)
    if len(command.run) > 1:
        print_differences(summaries)
        if len({run.text for run in summaries if run.val_loss is not None}) > 1:
            console.say("\nlosses on different texts are not comparable")
    if command.json:
        console.say_json({"runs": [asdict(run) for run in summaries]})
    return 0


def print_table(summaries: Sequence[RunSummary]) -> None:
    """Print a line per run."""
    if not summaries:
        console.say("no runs yet; `bardlet train my.txt --minutes 5` creates one")
        return
    rows = [("run", "command", "text", "model", "parameters", "state", "steps", "minutes", "MB", "result")]
    for run in summaries:
        weights = "" if run.parameters is None else f"{run.parameters / 1e6:.2f} M"
        rows.append((run.folder, run.command, run.text or "", run.model or "", weights, run.state,
                     "" if run.steps is None else f"{run.steps:,}",
                     "" if run.minutes is None else rounded(run.minutes, 1), rounded(run.megabytes, 0), run.result))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {4, 6, 7, 8}
    for row in rows:
        cells = (cell.rjust(width) if i in right else cell.ljust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        console.say("  ".join(cells).rstrip())
    units = {run.result.split()[-1] for run in summaries if "nats/" in run.result}
    if len(units) > 1:
        console.say(f"\nresults in {' and '.join(sorted(units))} are not comparable")


def rounded(value: float, digits: int) -> str:
    """Return a rounded number; for one that rounds to 0, an upper bound: <0.1."""
    smallest = 10.0**-digits
    return f"<{smallest:.{digits}f}" if value < smallest / 2 else f"{value:.{digits}f}"


def print_differences(runs: Sequence[RunSummary]) -> None:
    """Print the settings in which runs differ, as in their run.toml, and the steps that are done."""
    from bardlet.config.toml import settings_in

    settings = [settings_in(Path(run.folder) / "run.toml") for run in runs]
    for values, run in zip(settings, runs, strict=True):
        planned = (values.get("replans") or [[0, values.get("steps")]])[-1][1]
        left = f" ({run.steps or 0} done, {run.state})" if planned != run.steps else ""
        values["steps"] = f"{planned}{left}"
    names = dict.fromkeys(name for values in settings for name in values if name != "replans")
    rows = [(name, *(written(values.get(name, "-")) for values in settings)) for name in names
            if len({written(values.get(name)) for values in settings}) > 1]
    if not rows:
        console.say("\nthe settings are the same")
        return
    console.say("\nsettings that differ:")
    rows = [("setting", *(run.folder for run in runs)), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def written(value: object) -> str:
    """Return a setting as in run.toml, but text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def ask(question: str) -> str:
    """Return the user's answer in lower case; empty at the end of input (Ctrl-D)."""
    try:
        return input(question).strip().lower()
    except EOFError:
        console.say()
        return ""


def delete(command: Command) -> int:
    """Delete the named runs after confirmation; return the exit code."""
    from bardlet.api import runs

    folders = [runs.check_deletable(folder) for folder in dict.fromkeys(command.run)]  # all of them, before any is gone
    deleted = []
    for folder in folders:
        if not command.yes:
            if not sys.stdin.isatty():
                raise BardletError(f"{folder}: standard input is not a terminal to confirm on; add --yes to delete it")
            summary = runs.summarize(folder)
            size = f"{rounded(summary.megabytes, 0)} MB"
            about = ", ".join(filter(None, (summary.state, size, summary.result)))
            if ask(f"delete {folder} ({about})? [y/N] ") not in ("y", "yes"):
                console.say(f"{folder}: kept")
                continue
        runs.delete(folder)
        deleted.append(str(folder))
        console.say(f"{folder}: deleted")
    if command.json:
        console.say_json({"deleted": deleted})
    return 0
