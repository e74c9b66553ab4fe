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
    console.say(summary(verdict))


def summary(verdict: Verdict) -> str:
    """Return the number of findings, and how much could not be tested."""
    if verdict.findings:
        return console.count(len(verdict.findings), "finding")
    if not is_partial(verdict):
        return "no findings"
    return "no findings in what could be tested" + f"; {len(verdict.untested)} untested" * bool(verdict.untested)


def is_partial(verdict: Verdict) -> bool:
    """Return True if the check ended early, or could not test a class."""
    return bool(verdict.ended or verdict.untested)


def exit_code(verdict: Verdict) -> int:
    """Return 1 with findings, 2 without if not everything could be tested, else 0."""
    return 1 if verdict.findings else 2 if is_partial(verdict) else 0
