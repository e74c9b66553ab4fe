"""`bardlet doctor [DIR]`: check this machine, or a run folder, one line per finding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.config.inference import MAX_TOKENS
from bardlet.errors import BardletError

USAGE = Usage(
    "doctor", "[RUN] [OPTIONS]",
    "Check this machine, or a run: files, checkpoints, text and losses. Each line is ok, a warning with what to do, or "
    "damaged. The exit code is 1 if something is damaged.",
    (("bardlet doctor", "processor, precision, compiler, memory, disk, data"),
     ("bardlet doctor runs/my-qwen3", "the health of a run"),
     ("bardlet doctor runs/my-qwen3 --memorised", "how much of its output is copied from the training text")),
    (Group("memorization", ("memorised", "tokens", "temperature", "seed")), Group("output", ("json",))),
    positionals={"run": "RUN"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    run: str | None = None
    """A run folder, or a model of Hugging Face: its folder, or OWNER/NAME on the Hub (default: check the machine)."""
    memorised: bool = False
    """Measure how much of the model's output is copied from its training text."""
    tokens: int = 10_000
    """Number of tokens to generate for that."""
    temperature: float = 0.8
    """Sampling temperature: below 1 is more careful, above 1 wilder."""
    seed: int = 0
    """The same seed gives the same texts."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise BardletError(f"--tokens {self.tokens}: must be at least 1")
        if self.tokens > MAX_TOKENS:
            raise BardletError(f"--tokens {self.tokens}: must be at most {MAX_TOKENS}")
        if not 0 <= self.temperature < float("inf"):
            raise BardletError(f"--temperature {self.temperature:g}: must be 0 or more, and finite")
        if self.memorised and self.run is None:
            raise BardletError("--memorised: name a run, `bardlet doctor RUN --memorised`")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    from bardlet import doctor
    from bardlet.run import hub

    logging.getLogger("bardlet").addHandler(logging.NullHandler())  # the findings repeat every log message
    logging.getLogger("bardlet").propagate = False
    findings = []
    run = hub.folder(command.run) if command.run is not None else None
    for finding in doctor.machine() if run is None else doctor.health(run):
        findings.append(finding)
        console.say(f"{finding.verdict:8} {finding.about}: {finding.message}")
    warnings, damaged = (sum(finding.verdict == verdict for finding in findings) for verdict in ("warning", "damaged"))
    copied: dict[str, Any] = {}
    if run and command.memorised and not any(f.verdict == "damaged" and f.about == "model" for f in findings):
        copied = print_memorization(run, command)
    if command.json:
        entries = [{"about": f.about, "verdict": f.verdict, "said": f.message} for f in findings]
        console.say_json({"findings": entries, "warnings": warnings, "damaged": damaged,
                          **({"memorised": copied} if copied else {})})
    return 1 if damaged else 0


def print_memorization(run: Path, command: Command) -> dict[str, Any]:
    """Print how much of the model's output is copied, and return the figures."""
    from bardlet.evaluation import memorization

    measured = memorization.measure(run, command.tokens, command.temperature, command.seed)
    own, chance = measured.own, measured.chance
    console.say(f"memorization: {measured}")
    if own.longest:
        console.say(f"the longest passage, {len(own.longest)} characters: {own.longest!r}")
    if len(measured.held_out) > 1:
        console.say(f"{own.whole} of {len(measured.written)} generated texts are in the {measured.source} as a whole, "
                    f"and {chance.whole} of {len(measured.held_out)} held-out ones")
    return {"characters": sum(map(len, measured.written)), "copied": own.share, "copied_of_validation": chance.share,
            "longest": own.longest, "texts": len(measured.written), "whole_documents": own.whole}
