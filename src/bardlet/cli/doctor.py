"""`bardlet doctor [DIR]`: this machine, and the health of a run folder, a line for each thing: ok, or what to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.errors import BardletError


@dataclass(frozen=True)
class Command:
    """What is wrong with this machine, or with a run. The exit code is 1 when something is damaged."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run folder, or a Hugging Face folder; none: the machine alone."""
    memorised: bool = False
    """Measure how much of what the model writes is copied from its training text."""
    tokens: int = 10_000
    """How many tokens it writes for that."""
    temperature: float = 0.8
    """How it writes them: below 1 more careful, above 1 wilder."""
    seed: int = 0
    """The same seed gives the same texts."""
    json: bool = False
    """Print one JSON object on one line, last."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise BardletError(f"--tokens {self.tokens}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise BardletError(f"--temperature {self.temperature}: it must be 0 or more, and finite")
        if self.memorised and self.run is None:
            raise BardletError("--memorised: of which run? `bardlet doctor DIR --memorised`")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "doctor")
    from bardlet import doctor

    logging.getLogger("bardlet").addHandler(logging.NullHandler())  # each line says all there is to say
    logging.getLogger("bardlet").propagate = False
    looks = doctor.machine() if command.run is None else doctor.health(Path(command.run))
    findings = []
    for found in looks:
        findings.append(found)
        console.say(f"{found.verdict:8} {found.about}: {found.message}")
    worst = [sum(found.verdict == verdict for found in findings) for verdict in ("warning", "damaged")]
    copied: dict[str, Any] = {}
    if command.memorised and not any(f.verdict == "damaged" and f.about == "model" for f in findings):
        copied = _memorised(Path(command.run or ""), command)
    if command.json:
        console.say_json({"findings": [{"about": f.about, "verdict": f.verdict, "said": f.message} for f in findings], "warnings": worst[0], "damaged": worst[1],
                          **({"memorised": copied} if copied else {})})
    return 1 if worst[1] else 0


def _memorised(run: Path, command: Command) -> dict[str, Any]:
    """Print how much of what the model writes is a copy, and return the figures."""
    from bardlet import doctor

    texts, held, own, chance = doctor.measure_memorization(run, command.tokens, command.temperature, command.seed)
    characters = sum(map(len, texts))
    console.say(f"memorised: {own.share:.1%} of {characters:,} characters that the model wrote stand in its training "
                f"text, in passages of 32 characters or more; of the validation text it is {chance.share:.1%}")
    if own.longest:
        console.say(f"the longest passage, {len(own.longest)} characters: {own.longest!r}")
    if len(held) > 1:
        console.say(f"{own.whole} of {len(texts)} texts that it wrote are documents of the training text, from "
                    f"beginning to end; of the validation text's {len(held)} it is {chance.whole}")
    return {"characters": characters, "copied": own.share, "copied_of_validation": chance.share,
            "longest": own.longest, "texts": len(texts), "whole_documents": own.whole}
