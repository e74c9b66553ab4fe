"""The command line. Each command is a file of this folder, imported only when it runs.

`bardlet --help` answers in milliseconds: no command's dependencies are imported before it is called. A user-facing
error is one line on standard error; `--debug` shows its traceback.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
from contextlib import suppress
from difflib import get_close_matches

from bardlet import __version__
from bardlet.config.stages import FINE_TUNING
from bardlet.errors import BardletError, is_out_of_memory, neutral
from bardlet.runtime import contention
from bardlet.runtime.atomic import REMEDIES

COMMANDS = {
    "train": "train a GPT on a text, or a translator on sentence pairs",
    "resume": "continue a run exactly where it stopped",
    "sample": "generate text",
    "chat": "chat with a model in the terminal",
    "translate": "translate text, one sentence per line",
    "eval": "loss on a text, BLEU of a translator, accuracy on tasks",
    "export": "one HTML page, a GGUF file, ONNX, or a clean Hugging Face folder",
    **{kind.command: kind.summary for kind in FINE_TUNING},
    "ladder": "train every rung of the lecture and write a report",
    "check": "test your own code of the lecture",
    "runs": "list, compare and delete runs",
    "doctor": "check this machine, or a run",
    "serve": "train and use models in the browser, and serve them by the API of OpenAI",
    "data": "list and download named corpora",
}

SYNONYMS = {"list": "runs", "ls": "runs", "compare": "runs", "generate": "sample", "write": "sample", "infer": "sample",
            "evaluate": "eval", "test": "eval", "benchmark": "eval", "finetune": "sft", "fine-tune": "sft",
            "pretrain": "train", "rlhf": "ppo", "rm": "reward", "continue": "resume",
            "status": "doctor", "convert": "export", "save": "export",
            "publish": "export", "server": "serve", "api": "serve", "host": "serve",
            "corpora": "data", "download": "data", "lecture": "ladder", "talk": "chat",
            **dict.fromkeys(("delete", "remove", "rm"), "runs RUN --delete")}
"""Words that other tools use for a command."""

SPINS = {"serve": (20_000,)}
"""Arguments of `choose_waiting`: a server's threads wait shortly and often (LOG.md)."""

WITHOUT_TORCH = ("runs", "data", "check")
"""Commands that compute nothing, or in another process."""

FLAGS = ("--help", "--version", "--print-completion", "--debug")

HELP = f"""bardlet {__version__}: a text goes in, a GPT that you trained, understood and can run anywhere comes out.

  bardlet train my.txt --minutes 5     train on a file (no file: Tiny Shakespeare)
  bardlet sample runs/my-qwen3         generate text with the result

Commands:
{chr(10).join(f"  {name:9} {summary}" for name, summary in COMMANDS.items())}

`bardlet COMMAND --help` shows the settings of a command; for train and the
fine-tuning commands the main ones, and --help-all shows every setting.
--version shows the version, --debug the traceback of an error. For tab completion,
run `eval "$(bardlet --print-completion bash)"` (also zsh and fish).
"""


def main(argv: list[str] | None = None) -> int:
    """Run `bardlet ARGV` and return its exit code: 0 only if the work was done."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        # arguments were decoded as ASCII (LC_ALL=C with PYTHONUTF8=0): only a restart decodes them as UTF-8
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "bardlet", *sys.argv[1:]])
    if argv is None:  # at exit Python would search everything that PyTorch made for cycles: half a second
        atexit.register(gc.freeze)
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # text is UTF-8 whatever the locale
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    with suppress(ValueError):  # not the main thread: it gets no signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # `bardlet sample ... | head`
        _discard_output()
        return 0 if argv[0] == "sample" else 141  # elsewhere the work was cut short
    except (BardletError, OSError, MemoryError, KeyboardInterrupt) as error:
        if debug:
            raise
        if not _is_repeated(error):
            print(f"bardlet: {neutral(_describe(error))}", file=sys.stderr)
        return getattr(error, "exit_code", 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            print(f"bardlet: {_describe(MemoryError())}", file=sys.stderr)
            return 1
        message = neutral(" ".join(str(error).split())[:300])
        print(f"bardlet: internal error: {type(error).__name__}: {message}; "
              "rerun with --debug and report the traceback", file=sys.stderr)
        return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""

    number = signal.SIGTERM
    exit_code = 128 + signal.SIGTERM


def _terminated(number: int, frame: object) -> None:
    raise Terminated


def _dispatch(argv: list[str]) -> int:
    """Run the command that the first word names."""
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("bardlet.cli.completion").complete(COMMANDS)
    if len(argv) > 1 and argv[0] in ("-h", "--help", "help") and argv[1] in COMMANDS:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command, rest = argv[0], argv[1:]
    if command in ("-V", "--version"):
        print(f"bardlet {__version__}")
        return 0
    if command.partition("=")[0] == "--print-completion":
        return importlib.import_module("bardlet.cli.completion").main([*command.split("=")[1:], *rest])
    if command not in COMMANDS:
        near = [SYNONYMS[command]] if command in SYNONYMS else get_close_matches(command, (*COMMANDS, *FLAGS), 1)
        hint = f"did you mean `bardlet {near[0]}`?" if near else "`bardlet --help` lists the commands"
        raise BardletError(f"unknown command '{command}'; {hint}")
    if command not in WITHOUT_TORCH:
        contention.choose_waiting(*SPINS.get(command, ()))
    if command in {kind.command for kind in FINE_TUNING}:
        return int(importlib.import_module("bardlet.cli.stage").main(command, rest))
    return int(importlib.import_module(f"bardlet.cli.{command}").main(rest))


def _is_repeated(error: BaseException) -> bool:
    """Return True for an error of the command line in a process of torchrun whose first process prints it, too.

    Each process has the same command line, so each finds the error, before the module that trains is imported.
    """
    return (isinstance(error, BardletError) and os.environ.get("LOCAL_RANK", "0") != "0"
            and "bardlet.runner" not in sys.modules)


def _discard_output() -> None:
    """Point standard output at the null device, so that its buffer does not complain at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _describe(error: BaseException) -> str:
    """Return one line for the user: what is wrong, where, what to do."""
    if isinstance(error, BardletError):
        return " ".join(line.strip() for line in str(error).splitlines())  # a name may have two spaces
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, MemoryError):
        return ("out of memory; use a smaller --batch-size (in training with more --grad-accum), or a smaller model "
                "(--n-embd, --n-layer)")
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "check the path and the disk")
    return f"{where}{(error.strerror or str(error)).lower()}; {remedy}"
