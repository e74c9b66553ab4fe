"""The command line: the first word picks a file of this folder, which is imported only then.

`bardlet --help` answers in a few milliseconds because nothing heavy is imported before a command needs it. Errors that
are written for people end as one line on standard error; `--debug` shows where they came from.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from difflib import get_close_matches

from bardlet import __version__
from bardlet.errors import BardletError, is_out_of_memory
from bardlet.runtime.atomic import REMEDIES

COMMANDS = {
    "train": "train a model on a text",
    "sft": "teach a model to answer, from conversations",
    "reward": "a model that says how good an answer is, from preferences",
    "dpo": "teach a model which answers are preferred",
    "ppo": "a model learns from rewards for its own answers, with a critic",
    "grpo": "the same, from groups of answers to one question",
    "resume": "go on exactly where a run stopped",
    "sample": "let a model write",
    "chat": "talk to a model",
    "translate": "lines in, translations out",
    "eval": "the loss of a model on a text, how well it translates, what it knows",
    "ladder": "every rung of the lecture on the same text, and a report",
    "doctor": "what is wrong with this machine, or with a run",
    "data": "the named corpora: where they are, and getting them",
}

HELP = f"""bardlet {__version__}: a text goes in, a GPT that you trained, understood and can run anywhere comes out.

  bardlet train my.txt --minutes 5     train on a file (no file: Tiny Shakespeare)
  bardlet sample runs/my-qwen3         let it write

Commands:
{chr(10).join(f"  {name:9} {what}" for name, what in COMMANDS.items())}

`bardlet COMMAND --help` lists the settings of a command; --debug shows the traceback of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `bardlet ARGV` and return its exit code: 0 only if the work was done."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        # prompts and file names came in as ASCII (LC_ALL=C with PYTHONUTF8=0): only a new start reads them as they are
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "bardlet", *sys.argv[1:]])
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # text is UTF-8 here, whatever the locale says
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # OpenMP's threads wait for each other by spinning; on a core that somebody else uses, too, without a bound, that
    # costs ten times what it saves (LOG.md). GNU's OpenMP reads this when torch is imported, which is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"bardlet {__version__}")
        return 0
    with suppress(ValueError):  # called in a thread, which hears no signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return _dispatch(argv[0], argv[1:])
    except BrokenPipeError:  # `bardlet sample ... | head`
        _hush()
        # what was cut short elsewhere is work that was not done
        return 0 if argv[0] == "sample" else 141
    except (BardletError, OSError, MemoryError, KeyboardInterrupt) as error:
        if debug:
            raise
        print(f"bardlet: {_in_words(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            print(f"bardlet: {_in_words(MemoryError())}", file=sys.stderr)
            return 1
        print(f"bardlet: this should not have happened: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
              "run it again with --debug and report what it shows", file=sys.stderr)
        return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, what is under way is left in order."""

    number = signal.SIGTERM
    exit_code = 128 + signal.SIGTERM


def _terminated(number: int, frame: object) -> None:
    raise Terminated


def _dispatch(command: str, rest: list[str]) -> int:
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean `bardlet {near[0]}`?" if near else "`bardlet --help` lists them"
        raise BardletError(f"there is no command '{command}'; {hint}")
    return importlib.import_module(f"bardlet.cli.{command}").main(rest)


def _hush() -> None:
    """Nobody reads standard output any more: what is still in its buffer goes nowhere, without a complaint at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _in_words(error: BaseException) -> str:
    """One line for a person: what is wrong, where, what to do."""
    if isinstance(error, BardletError):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return ("out of memory; take a smaller --batch-size, in training with more --grad-accum, or a smaller model "
                "(--n-embd, --n-layer)")
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "check the path and the disk")
    return f"{where}{(error.strerror or str(error)).lower()}; {remedy}"


