"""`bardlet chat DIR`: chat with a model in the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.cli.sample import SAMPLING
from bardlet.config.inference import SamplingOptions
from bardlet.config.paths import given
from bardlet.errors import BardletError, quoted

if TYPE_CHECKING:
    from bardlet.inference.chat_session import ChatSession

log = logging.getLogger("bardlet")

HELP = """/again       another answer to the last message
/system TEXT set the system prompt; starts a new conversation
/new         start a new conversation
/save FILE   append the conversation to a file that `bardlet sft` reads
/quit        leave, as does Ctrl-D; Ctrl-C stops an answer"""

USAGE = Usage(
    "chat", "RUN [OPTIONS]", "Chat with a model in the terminal. Messages come from standard input; /help lists the "
    "commands of the chat.",
    (("bardlet chat runs/chats-sft", "chat with a fine-tuned model"),
     ("echo \"Hi\" | bardlet chat runs/chats-sft", "one message")),
    (Group("conversation", ("system",)), SAMPLING, Group("machine", ("device", "dtype")), Group("output", ("json",))),
    positionals={"run": "RUN"}, metavars={"system": "TEXT"})


@dataclass(frozen=True, kw_only=True)
class Command(SamplingOptions):
    """The command line."""

    run: str
    """A run of `bardlet sft`, or of a stage after it. A model that was not fine-tuned continues the text instead."""
    system: str = ""
    """System prompt."""
    tokens: int = 256
    """Maximum number of tokens of an answer. At most half of the context window."""
    temperature: float = 0.7
    """Sampling temperature: below 1 is more careful, above 1 wilder. 0: always the likeliest token."""
    seed: int | None = None
    """The same seed gives the same answers (default: a new seed each time)."""
    json: bool = False
    """Print one JSON object on the last line: the conversation."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    from bardlet.api.models import load

    model = load(command.run, device=command.device, dtype=command.dtype)
    session = model.session(system=command.system, **command.sampling)
    if not session.uses_template:
        why = "uses another chat template" if model.tokenizer.chat_template else "was not fine-tuned to answer"
        log.warning("%s %s: it continues your text; `bardlet sft %s DATA` teaches it to answer", command.run, why,
                    quoted(command.run))
    failed = False
    if sys.stdin.isatty():
        console.say("/help lists the commands; Ctrl-D leaves. The model reads the last "
                    f"{model.module.config.block_size:,} tokens of the conversation and forgets older messages.")
    try:
        for line in typed_lines():
            try:
                if line.strip() and not handle_command(session, line):
                    break
            except BardletError as error:
                failed = True
                if sys.stdin.isatty():
                    console.say(f"({error})")
                else:
                    log.warning("%s", error)
    finally:
        if command.json:
            console.say_json({"messages": session.transcript()})
    return int(failed and not sys.stdin.isatty())


def typed_lines() -> Iterator[str]:
    """Yield the lines that the user types, or those of a pipe."""
    from bardlet.data.text import decoded_lines

    if not sys.stdin.isatty():
        yield from decoded_lines(sys.stdin.buffer, "standard input")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def handle_command(session: ChatSession, line: str) -> bool:
    """Run a /command or answer a message; return False for /quit."""
    word, _, rest = line.strip().partition(" ")
    if word == "/quit":
        return False
    if word == "/help":
        console.say(HELP)
    elif word == "/again":
        stream_answer(session, session.regenerate)
    elif word == "/new":
        session.clear()
    elif word == "/system":
        session.clear()
        session.system = rest
    elif word == "/save":
        if not rest:
            raise BardletError("/save FILE: name the file")
        session.save(Path(given(rest)))
        console.say(f"(saved to {rest})")
    elif word.startswith("/"):
        raise BardletError(f"{word}: no such command; /help lists them")
    else:
        stream_answer(session, lambda: session.ask(line))
    return True


def stream_answer(session: ChatSession, answer: Callable[[], Iterator[str]]) -> None:
    """Print an answer as it is generated; Ctrl-C stops it."""
    before = session.forgotten
    pieces = answer()
    if session.forgotten > before:
        log.warning("dropped the first %d messages, which no longer fit in the context window", session.forgotten)
    with closing(pieces):  # type: ignore[type-var]
        try:
            for piece in pieces:
                print(console.shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
    print(flush=True)
