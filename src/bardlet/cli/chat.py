"""`bardlet chat DIR`: talk to a model in the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bardlet import console
from bardlet.cli.options import Sampling, parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.inference.chat_session import ChatSession

log = logging.getLogger("bardlet")

HELP = """/again       another answer to the last question
/system TEXT what the model is told before the conversation; begins a new one
/new         begin a new conversation
/save FILE   add the conversation to a file that `bardlet sft` reads
/quit        end (Ctrl-D does it, too); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class Command(Sampling):
    """Talk to a model. Lines come from standard input; /help lists what else can be said."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder of `bardlet sft`; of another gpt2 or qwen3 model too, which goes on with the text."""
    system: str = ""
    """What the model is told before the conversation."""
    tokens: int = 256
    """The longest answer; at most half of the model's window."""
    temperature: float = 0.7
    """Below 1 more careful, above 1 wilder; 0: always the likeliest token."""
    seed: int | None = None
    """The same seed gives the same answers; none: others each time."""
    json: bool = False
    """Print one JSON object on one line, last: the conversation."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "chat")
    console.show_notices()
    from bardlet.inference.chat_session import ChatSession
    from bardlet.run import folder as run_folder
    from bardlet.run import hf
    from bardlet.runtime import device

    device.tune_malloc()
    folder = Path(command.run)
    model, tokenizer = hf.read_folder(folder)
    if model.config.model == "encdec":
        raise BardletError(f"{folder}: an encoder-decoder translates: `bardlet translate {folder} < LINES`")
    documents = 2
    if (folder / "run.toml").exists():
        documents = run_folder.settings(folder, changed=True)[1].get("documents", 2)
    talk = ChatSession(model, tokenizer, command.system, command.tokens, documents=documents, **command.prepared(model))
    if not talk.answers:
        why = "answers by another template than bardlet's" if tokenizer.chat_template else "has not learned to answer"
        log.warning("%s %s: it goes on with what you write; `bardlet sft %s DATA` teaches it to answer", folder, why,
                    folder)
    if sys.stdin.isatty():
        console.say("/help lists what can be said besides; Ctrl-D ends.")
    try:
        for line in typed_lines():
            try:
                if line.strip() and not handle_command(talk, line):
                    break
            except BardletError as error:
                if not sys.stdin.isatty():
                    raise
                console.say(f"({error})")
    finally:
        if command.json:
            console.say_json({"messages": talk.transcript()})
    return 0


def typed_lines() -> Iterator[str]:
    """What a person writes, line by line; from a pipe the lines that are in it."""
    from bardlet.data.text import decoded_lines

    if not sys.stdin.isatty():
        yield from decoded_lines(sys.stdin.buffer, "standard input")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (the arrow keys work)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def handle_command(talk: ChatSession, line: str) -> bool:
    """Do what a line says, or answer it; False: it was the last."""
    word, _, rest = line.strip().partition(" ")
    if word == "/quit":
        return False
    if word == "/help":
        console.say(HELP)
    elif word == "/again":
        stream_answer(talk, talk.regenerate)
    elif word == "/new":
        talk.clear()
    elif word == "/system":
        talk.clear()
        talk.system = rest
    elif word == "/save":
        if not rest:
            raise BardletError("/save FILE: name the file")
        talk.save(Path(rest).expanduser())
        console.say(f"(added to {rest})")
    elif word.startswith("/"):
        raise BardletError(f"{word}: there is no such command; /help lists them")
    else:
        stream_answer(talk, lambda: talk.ask(line))
    return True


def stream_answer(talk: ChatSession, answer: Callable[[], Iterator[str]]) -> None:
    """Print an answer as it comes; Ctrl-C ends it there."""
    before = talk.forgotten
    pieces = answer()
    if talk.forgotten > before:
        log.warning("the first %d messages do not fit into the model's window any more", talk.forgotten)
    with closing(pieces):  # type: ignore[type-var]
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
    print(flush=True)
