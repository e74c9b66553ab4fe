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
    choices = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()
    for name, summary in commands.items():
        used = len(typed) > 1 and typed[1] == name
        choices.add_parser(name, help=summary, parents=[command_parser(name)] if used else [], add_help=False)
    argcomplete.autocomplete(parser, append_space=True)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with every setting; a RUN argument completes to the folders below runs/."""
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
    for action in parser._actions:
        if not action.option_strings and action.dest == "run":
            action.completer = run_folders  # type: ignore[attr-defined]
    return parser


def run_folders(prefix: str, **_: Any) -> list[str]:
    """Return the run folders below runs/ that begin with `prefix`."""
    return [str(path.parent) for path in sorted(Path("runs").glob("*/run.toml")) if str(path).startswith(prefix)]
