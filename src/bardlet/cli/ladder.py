"""`bardlet ladder`: every rung of the lecture on the same text, and the report; `--explain`: the maths, tried out."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.ladder.run import Ladder, Outcome


@dataclass(frozen=True)
class Command:
    """Train every rung of the lecture on the same text, and make a page that shows each beside the one before.

    A ladder that was stopped goes on where it was: the same command, the same --out.
    """

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora, files, folders or globs; none: Tiny Shakespeare."""
    rungs: str = "1-13"
    """Which rungs are trained: numbers, ranges and names, as in 1-7 or bigram,8-13. The report shows all in --out."""
    seeds: int = 1
    """How often each is trained, every time from another seed."""
    out: str | None = None
    """The folder of the ladder; none: runs/ladder-NAME. Rungs that are finished there are not trained again."""
    sentence: str = "To be, or not to be, that is the question"
    """The sentence whose attention the report shows."""
    minutes: float | None = None
    """Training time of each rung from 8 on; none: 2 on a CPU, the lecture's 5,000 steps on a GPU."""
    tokenizer: Literal["auto", "char", "byte", "bpe"] = "char"
    """The lecture's characters, or another."""
    field: str = "text"
    """The field of a .jsonl record that holds its text."""
    explain: bool = False
    """Train nothing; run the maths of the lecture as small experiments and say what comes out."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes an NVIDIA GPU where there is one."""
    threads: int | None = None
    """CPU threads of the scaled rungs; none: all cores (the small ones need only one)."""
    json: bool = False
    """Print one JSON object on one line, last."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BardletError(f"--seeds {self.seeds}: it must be at least 1")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise BardletError(f"--minutes {self.minutes}: it must be more than 0, and finite")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise BardletError(f"--threads {self.threads}: it must be from 1 to 1024")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    # the parser would suggest --seeds
    if any(len(word) > 3 and "--steps".startswith(word) for word in (word.partition("=")[0] for word in argv)):
        raise BardletError("there is no setting --steps (did you mean --minutes, the training time of each rung from 8 "
                           "on? The others make the lecture's steps); `bardlet ladder --help` lists the settings")
    command = parse(Command, argv, "ladder")
    console.show_notices()
    from bardlet.ladder.rungs import select

    rungs = select(command.rungs)
    if command.explain:
        return explain(command)
    from bardlet.ladder import report, run
    from bardlet.run import lock
    from bardlet.runtime import distributed

    plan = run.LadderPlan(rungs, Path(command.out) if command.out else None, command.text, command.field, command.tokenizer,
                    command.seeds, command.minutes, command.device, command.threads)
    with distributed.connect(command.device) as dist:
        with console.preparation_progress() as progress:
            ladder = run.Ladder(plan, dist, progress)
        out = ladder.out
        out.mkdir(parents=True, exist_ok=True)
        with lock.locked(out):
            console.say(f"text: {ladder.corpus.name}, {ladder.dataset.train_chars + ladder.dataset.val_chars:,} characters; "
                        f"{console.count(len(rungs), 'rung')}, {console.count(command.seeds, 'seed')}")
            ladder.plan_steps(console.say)
            outcomes = train_rungs(ladder)
            finished = ladder.finished()
            facts = report.facts(ladder, finished) | {"command": shlex.join(["bardlet", "ladder", *argv])}
            page = report.write(out, finished, command.sentence, facts)
    more = len(finished) - len(outcomes)
    also = f" (it shows {console.count(more, 'model')} of earlier calls, too)" if more else ""
    console.say(f"\nthe report is {page}{also}: open it in a browser; the models lie beside it (`bardlet sample "
                f"{outcomes[-1].folder}`)")
    if command.json:
        console.say_json({"report": str(page), "rungs": summary(outcomes, ladder.comparable)})
    return 0


def train_rungs(ladder: Ladder) -> list[Outcome]:
    """Train what is missing, with a line for each rung that is done."""
    outcomes: list[Outcome] = []
    say = console.say
    with console.ladder_progress(expected_seconds(ladder)) as watch:
        for done in ladder.climb(lambda rung, seed, line: watch(f"{rung.number} {rung.name}", (rung.name, seed), line)):
            outcomes.append(done)
            named = done.rung.lecture and ladder.comparable and not (done.rung.scaled and ladder.minutes)
            lecture = f"   the lecture: {done.rung.lecture:.2f}" if named else ""
            say(f"{done.rung.number:>2} {done.rung.name:<13} seed {done.seed}  {done.parameters:>10,} parameters  "
                f"{done.seconds:>6.1f} s  validation loss {done.val_loss:.4f}{lecture}")
    return outcomes


def expected_seconds(ladder: Ladder) -> dict[tuple[str, int], float]:
    """About how many seconds each job that is left will take, for the bar."""
    from bardlet.ladder.run import MINUTES
    from bardlet.ladder.rungs import bands

    usual = {name: band["seconds"] for name, band in bands().items()}
    scaled = 60 * (ladder.minutes or MINUTES)
    return {(rung.name, seed): scaled if rung.scaled else usual.get(rung.name, 30.0)
            for rung, seed in ladder.jobs() if ladder.outcome(rung, seed) is None}


def summary(outcomes: Sequence[Outcome], comparable: bool) -> list[dict[str, Any]]:
    """A line per rung for --json: means over the seeds; the lecture's figure where it is `comparable`."""
    lines = []
    for rung in dict.fromkeys(outcome.rung.name for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.rung.name == rung]
        losses = [outcome.val_loss for outcome in mine]
        lines.append({
            "rung": mine[0].rung.number, "name": rung, "parameters": mine[0].parameters,
            "seconds": round(statistics.mean(outcome.seconds for outcome in mine), 3),
            "val_loss": statistics.mean(losses), "lecture": mine[0].rung.lecture if comparable else None,
            "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "val_loss_lecture_way": statistics.mean(outcome.val_loss_lecture for outcome in mine),
            "seeds": [outcome.seed for outcome in mine], "steps": mine[0].steps,
        })
    return lines


def explain(command: Command) -> int:
    """Print the experiments; with --out their pictures go there, too."""
    from bardlet.ladder import experiments

    done = []
    for name in experiments.EXPERIMENTS:
        done += experiments.run([name])
        console.say(experiments.text(done[-1]) + "\n")
    if command.out:
        Path(command.out).mkdir(parents=True, exist_ok=True)
        names = experiments.pictures(Path(command.out), done)
        console.say(f"{len(names)} pictures are in {command.out}")
    if command.json:
        console.say_json({"experiments": {one.name: one.figures for one in done}})
    return 0
