"""`bardlet --print-completion SHELL`: completion of commands, settings and run folders, by argcomplete."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError

SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str]) -> int:
    """Print the shell code that turns completion on; return the exit code."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise BardletError(f"--print-completion {' '.join(argv)}".rstrip() + f": name a shell, {', '.join(SHELLS)}")
    import argcomplete

    print(argcomplete.shellcode(["bardlet"], shell=argv[0]))
    return 0


def complete(commands: dict[str, str]) -> None:
    """Answer a request for completions, which the shell makes through `_ARGCOMPLETE`, and exit."""
    import argcomplete

    parser = argparse.ArgumentParser(prog="bardlet", allow_abbrev=False)
    for flag in ("--version", "--debug", "--print-completion"):
        parser.add_argument(flag, action="store_true")
    choices = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()
    for name, summary in commands.items():
        used = len(typed) > 1 and typed[1] == name
        choices.add_parser(name, help=summary, parents=[command_parser(name)] if used else [], add_help=False)
    argcomplete.autocomplete(parser, append_space=True, always_complete_options=False)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with every setting, and completers of the values that have names."""
    from bardlet.cli import parser as cli_parser
    from bardlet.cli import stage, train, training
    from bardlet.config.pretraining import TrainConfig, TranslationConfig
    from bardlet.config.stages import FINE_TUNING

    tuned = {kind.command: kind for kind in FINE_TUNING}
    if name in tuned:
        kinds: tuple[type, ...] = (training.RunOptions, tuned[name])
        parser = cli_parser.build(kinds, stage.usage(tuned[name]), stage.NOT_TYPED, everything=True)
    elif name == "train":
        parser = cli_parser.build((training.RunOptions, TrainConfig, TranslationConfig), train.USAGE,
                                  training.NOT_TYPED, everything=True)
    else:
        module: Any = importlib.import_module(f"bardlet.cli.{name}")
        parser = cli_parser.build((module.Command,), module.USAGE, everything=True)
    completers = {"run": run_folders, "task": tasks, "rungs": rungs, "words": corpora}
    if name in tuned:
        completers |= {"text": model_then_files}
    for action in parser._actions:
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
    return parser


def run_folders(prefix: str, **_: Any) -> list[str]:
    """Return the run folders below runs/ that begin with `prefix`."""
    return [str(path.parent) for path in sorted(Path("runs").glob("*/run.toml")) if str(path).startswith(prefix)]


def model_then_files(prefix: str, parsed_args: Any = None, **_: Any) -> list[str]:
    """Return the run folders for the first word of a fine-tuning command, and files for the others."""
    from argcomplete.completers import FilesCompleter

    found = [] if getattr(parsed_args, "text", None) else run_folders(prefix)
    return found or list(FilesCompleter()(prefix))


def tasks(**_: Any) -> list[str]:
    """Return the names of the tasks of `bardlet eval`."""
    from bardlet.evaluation.tasks import TASKS

    return list(TASKS)


def rungs(**_: Any) -> list[str]:
    """Return the names of the ladder's rungs."""
    from bardlet.ladder.rungs import LADDER

    return [rung.name for rung in LADDER]


def corpora(parsed_args: Any = None, **_: Any) -> list[str]:
    """Return what can follow `bardlet data`: get, and after it the corpora that can be downloaded."""
    from bardlet.data.named import NAMED

    return [name for name, corpus in NAMED.items() if corpus.url] if getattr(parsed_args, "words", None) else ["get"]
