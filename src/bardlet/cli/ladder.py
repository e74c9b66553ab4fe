"""`bardlet ladder`: train every rung of the lecture on one text and write a report."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError, quoted

if TYPE_CHECKING:
    from bardlet.ladder.run import Ladder, Outcome

USAGE = Usage(
    "ladder", "[TEXT ...] [OPTIONS]",
    "Train every rung of the lecture on the same text, and write a report that compares each with the one before. "
    "Repeat the command with the same --out to continue an interrupted ladder.",
    (("bardlet ladder --rungs 1-7", "the lecture's rungs, on Tiny Shakespeare"),
     ("bardlet ladder --seeds 5 --rungs bigram,one-head", "is my loss normal?"),
     ("bardlet ladder --explain", "the lecture's math as small experiments")),
    (Group("data", ("tokenizer", "field")),
     Group("training", ("rungs", "seeds", "minutes", "explain")), Group("machine", ("device", "threads")),
     Group("output", ("out", "sentence", "json"))),
    positionals={"text": "TEXT"}, metavars={"rungs": "RUNGS", "field": "NAME", "sentence": "TEXT"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    text: tuple[str, ...] = ()
    """Files, folders, globs or named corpora (default: Tiny Shakespeare)."""
    rungs: str = "1-13"
    """Rungs to train: numbers, ranges and names, as in 1-7 or bigram,8-13. The report shows all rungs in --out."""
    seeds: int = 1
    """Number of seeds per rung."""
    out: str | None = None
    """Folder of the ladder (default: runs/ladder-NAME). Finished rungs in it are kept."""
    sentence: str = "To be, or not to be, that is the question"
    """Sentence whose attention the report shows."""
    minutes: float | None = None
    """Training time of each rung from 8 on (default: 2 on a CPU). On a GPU: the lecture's 5,000 steps."""
    tokenizer: Literal["auto", "char", "byte", "bpe"] = "char"
    """The lecture's characters, or another tokenizer."""
    field: str = "text"
    """Field of a .jsonl record that holds the text."""
    explain: bool = False
    """Train nothing: run the lecture's math as small experiments."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    threads: int | None = None
    """CPU threads of the rungs from 8 on (default: all cores). The small rungs use one."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if not self.sentence.strip():
            raise BardletError("--sentence: is empty; write a sentence, whose attention the report shows")
        if not 1 <= self.seeds <= 1000:
            raise BardletError(f"--seeds {self.seeds}: must be at {'least 1' if self.seeds < 1 else 'most 1000'}")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise BardletError(f"--minutes {self.minutes:g}: must be more than 0, and finite")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise BardletError(f"--threads {self.threads}: must be from 1 to 1024")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE, explain=lambda name: (
        "small rungs train for the lecture's steps; did you mean --minutes, the training time of each rung from 8 on?"
        if len(name) > 1 and "steps".startswith(name) else ""))
    console.show_notices()
    from bardlet.ladder.rungs import select

    rungs = select(command.rungs)
    if command.text == ("explain",) and not Path("explain").exists():
        raise BardletError("explain: no such text; did you mean `bardlet ladder --explain`?")
    if command.explain:
        return explain(command)
    from bardlet.ladder import report, run
    from bardlet.run import lock
    from bardlet.runtime import distributed

    out = Path(command.out) if command.out else None
    plan = run.LadderPlan(rungs, out, command.text, command.field, command.tokenizer, command.seeds,
                          command.minutes, command.device, command.threads)
    with distributed.connect(command.device) as dist:
        with console.preparation_progress() as progress:
            ladder = run.Ladder(plan, dist, progress)
        out = ladder.out
        out.mkdir(parents=True, exist_ok=True)
        with lock.locked(out):
            characters = ladder.dataset.train_chars + ladder.dataset.val_chars
            console.say(f"text: {ladder.corpus.name}, {characters:,} characters; "
                        f"{console.count(len(rungs), 'rung')}, {console.count(command.seeds, 'seed')}")
            ladder.plan_steps(console.say)
            outcomes = train_rungs(ladder)
            finished = ladder.finished()
            facts = report.facts(ladder, finished) | {"command": shlex.join(["bardlet", "ladder", *argv])}
            page = report.write(out, finished, command.sentence, facts)
    more = len(finished) - len(outcomes)
    also = f" (with {console.count(more, 'model')} from earlier calls)" if more else ""
    console.say(f"\nreport: {page}{also}; open it in a browser. The models are next to it: `bardlet sample "
                f"{quoted(outcomes[-1].folder)}`")
    without = [rung.name for rung in rungs if not rung.attends]
    if without and command.sentence != Command.sentence:
        verb = "has" if len(without) == 1 else "have"
        console.say(f"--sentence: {' and '.join(without)} {verb} no attention heads, so the report shows the sentence "
                    "only for rungs from one-head on")
    if command.json:
        console.say_json({"report": str(page), "rungs": summary(outcomes, ladder.comparable)})
    return 0


def train_rungs(ladder: Ladder) -> list[Outcome]:
    """Train the missing rungs and print a line for each."""
    outcomes: list[Outcome] = []
    say, unit = console.say, "character" if ladder.dataset.tokenizer.kind == "char" else "token"
    with console.ladder_progress(expected_seconds(ladder)) as watch:
        for done in ladder.train_all(
                lambda rung, seed, line: watch(f"{rung.number} {rung.name}", (rung.name, seed), line)):
            outcomes.append(done)
            has_figure = done.rung.lecture and ladder.comparable and not (done.rung.scaled and ladder.minutes)
            lecture = f"   the lecture: {done.rung.lecture:.2f}" if has_figure else ""
            say(f"{done.rung.number:>2} {done.rung.name:<13} seed {done.seed}  {done.parameters:>10,} parameters  "
                f"{done.seconds:>6.1f} s  validation loss {done.val_loss:.4f} nats per {unit}{lecture}")
    return outcomes


def expected_seconds(ladder: Ladder) -> dict[tuple[str, int], float]:
    """Return the estimated seconds of each remaining job, for the progress bar."""
    from bardlet.ladder.run import MINUTES
    from bardlet.ladder.rungs import bands

    usual = {name: band["seconds"] for name, band in bands().items()}
    scaled = 60 * (ladder.minutes or MINUTES)
    return {(rung.name, seed): scaled if rung.scaled else usual.get(rung.name, 30.0)
            for rung, seed in ladder.jobs() if ladder.outcome(rung, seed) is None}


def summary(outcomes: Sequence[Outcome], comparable: bool) -> list[dict[str, Any]]:
    """Return what --json prints of each rung: means over the seeds, and the lecture's loss if `comparable`."""
    lines = []
    for rung in dict.fromkeys(outcome.rung.name for outcome in outcomes):
        of_rung = [outcome for outcome in outcomes if outcome.rung.name == rung]
        losses = [outcome.val_loss for outcome in of_rung]
        lines.append({
            "rung": of_rung[0].rung.number, "name": rung, "parameters": of_rung[0].parameters,
            "seconds": round(statistics.mean(outcome.seconds for outcome in of_rung), 3),
            "val_loss": statistics.mean(losses), "lecture": of_rung[0].rung.lecture if comparable else None,
            "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "val_loss_lecture_way": statistics.mean(outcome.val_loss_lecture for outcome in of_rung),
            "seeds": [outcome.seed for outcome in of_rung], "steps": of_rung[0].steps,
        })
    return lines


def explain(command: Command) -> int:
    """Print the experiments; with --out, save their pictures there."""
    from bardlet.ladder import experiments

    console.say(experiments.INTRODUCTION + "\n")
    done = []
    for name in experiments.EXPERIMENTS:
        done += experiments.run([name])
        console.say(experiments.text(done[-1]) + "\n")
    if command.out:
        Path(command.out).mkdir(parents=True, exist_ok=True)
        names = experiments.pictures(Path(command.out), done)
        console.say(f"{len(names)} pictures are in {command.out}")
    if command.json:
        console.say_json({"experiments": {experiment.name: experiment.figures for experiment in done}})
    return 0
