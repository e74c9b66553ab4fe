"""The verdict of `bardlet check`, printed or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bardlet import console

if TYPE_CHECKING:
    from bardlet.ladder.check.run import Verdict


def as_json(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as JSON values."""
    return {"rung": verdict.rung, "guessed": verdict.guessed, "ended": verdict.ended,
            "findings": [{"name": finding.name, "where": finding.where, "said": finding.sentence()}
                         for finding in verdict.findings],
            "passed": verdict.passed, "untested": verdict.untested, "notes": list(verdict.notes)}


def show(verdict: Verdict) -> None:
    """Print a line for each finding, and one for what holds in each class."""
    for where, what in verdict.passed.items():
        if what:
            console.say(f"ok       {where}: {', '.join(what)}")
    for finding in verdict.findings:
        console.say(f"finding  {finding.sentence()}")
    for where, reason in verdict.untested.items():
        console.say(f"untested {where}: {reason}")
    for note in verdict.notes:
        console.say(f"note     {note}")
    if verdict.ended:
        console.say(f"ended    {verdict.ended}")
    count = console.count(len(verdict.findings), "finding")
    console.say(count if verdict.findings else "no findings")
