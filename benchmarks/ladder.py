"""Record finished ladders: a line per rung and seed, the normal bands, and the figures of the course.

    bardlet ladder --rungs 1-7 --seeds 5 --out runs/lecture
    bardlet ladder --rungs 8-13 --seeds 3 --out runs/scaled
    python benchmarks/ladder.py record runs/lecture runs/scaled      # -> results/ladder.jsonl
    python benchmarks/ladder.py publish runs/lecture runs/scaled     # -> bands.json, docs/measured.json, docs/figures/

The course's other figures (exercises, one changed setting) come from results/course.jsonl. A line is
{"name": ..., "figures": {...}}, with date, commit and machine, written by `python benchmarks/ladder.py note NAME JSON`.
The last line of a name counts. If the name starts with a rung's name, as in "dropout 0", the figures belong to that
rung with one setting changed. The unchanged rung with the same steps is published next to them, from ladder.jsonl.

A rung records its own date, versions and machine: `made` in outcome.json, or, without the date, run.toml if
outcome.json is older. It does not know the commit, so `record` adds the current one as `recorded_commit`. In older
lines of ladder.jsonl, and in course.jsonl, `date` and `commit` belong to the recording.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import record

from bardlet.ladder import pictures
from bardlet.ladder.run import Outcome
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.run import folder as run_folder

ROOT = Path(__file__).resolve().parents[1]
BANDS = ROOT / "src" / "bardlet" / "ladder" / "bands.json"
DOCS = ROOT / "docs"
MADE_BY = "benchmarks/ladder.py publish, from bardlet ladder on Tiny Shakespeare"


def outcomes(ladders: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the contents of outcome.json for each rung, by name, in the ladder's order; `made` is always set."""
    by_rung: dict[str, list[dict[str, Any]]] = {}
    for rung in LADDER:
        for ladder in ladders:
            for path in sorted(ladder.glob(f"{rung.number:02}-{rung.name}/seed-*/outcome.json")):
                outcome = json.loads(path.read_text(encoding="utf-8"))
                made = outcome.get("made") or _provenance(path.parent)
                by_rung.setdefault(rung.name, []).append({**outcome, "made": made, "folder": path.parent})
    return by_rung


def _provenance(folder: Path) -> dict[str, Any]:
    """Return the versions and machine from the run folder of an older bardlet."""
    machine = run_folder.read_run(folder)[1]["machine"]
    return {name: machine[name] for name in ("torch", "threads", "dtype", "compiled", "processor", "device")}


def recorded(rung: str, seeds: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return {date, commit} of the last line in ladder.jsonl that matches one of these runs by seed and exact loss."""
    runs = {(seed["seed"], seed["val_loss"]) for seed in seeds}
    matches = [line for line in lines if line["rung"] == rung and (line["seed"], line["val_loss"]) in runs]
    return {"date": matches[-1].get("recorded", matches[-1].get("date")),
            "commit": matches[-1].get("recorded_commit", matches[-1].get("commit"))} if matches else None


def spread(values: list[float]) -> dict[str, float]:
    """Return mean, standard deviation and mean -+ 3 deviations: with five seeds, it covers 19 of 20 further seeds."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean, "deviation": deviation, "low": mean - 3 * deviation, "high": mean + 3 * deviation}


def describe(rung: Rung, seeds: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a rung's figures over its seeds, for the course.

    `made`: the provenance of the training runs, a list if the seeds differ (older bardlets recorded no date).
    `recorded`: the date and commit at which they were added to ladder.jsonl.
    """
    losses = {name: spread([seed[name] for seed in seeds]) for name in ("val_loss", "val_loss_lecture", "train_loss")}
    made = list({json.dumps(seed["made"], sort_keys=True): seed["made"] for seed in seeds}.values())
    return {"parameters": seeds[0]["parameters"], "steps": seeds[0]["steps"], "seeds": [seed["seed"] for seed in seeds],
            # of the fastest seed: other jobs may have slowed the others down
            "seconds": min(seed["seconds"] for seed in seeds), **losses,
            "losses": {str(seed["seed"]): seed["val_loss"] for seed in seeds},
            "made": made[0] if len(made) == 1 else made, "recorded": recorded(rung.name, seeds, lines),
            "sample": seeds[0]["sample"], "lecture": rung.lecture}


def write(path: Path, value: Any) -> None:
    """Write `value` as readable JSON that diffs well."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def publish(ladders: list[Path]) -> None:
    """Write the bands of the lecture's rungs, and all figures and pictures that the course shows."""
    by_rung = outcomes(ladders)
    lines = record.read("ladder")
    rungs = {rung.name: describe(rung, by_rung[rung.name], lines) for rung in LADDER if rung.name in by_rung}
    bands = {name: {"mean": figures["val_loss"]["mean"], "deviation": figures["val_loss"]["deviation"],
                    "low": figures["val_loss"]["low"], "high": figures["val_loss"]["high"],
                    "seeds": len(figures["seeds"]), "seconds": figures["seconds"]}
             for rung in LADDER if not rung.scaled and rung.name in rungs  # the scaled ones depend on the machine
             for name, figures in [(rung.name, rungs[rung.name])] if len(figures["seeds"]) >= 5}
    small = {name: seeds for name, seeds in by_rung.items() if name in bands}
    if bands:  # fewer seeds give no band: keep the file
        write(BANDS, {"made_by": MADE_BY, **origin(small, rungs), "rungs": bands})
    extras = {line["name"]: extra(line, lines) for line in record.read("course")}
    write(DOCS / "measured.json", {"made_by": MADE_BY, **origin(by_rung, rungs), "rungs": rungs, "extras": extras})
    draw(ladders, by_rung)


def extra(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of course.jsonl for the course: its figures, date, commit and machine.

    If the figures belong to a rung with one setting changed, `rung` has the figures of the unchanged rung with the same
    steps and seeds, from the `lines` of ladder.jsonl.
    """
    result = {name: line.get(name) for name in ("date", "commit", "machine", "figures")}
    figures, rung = line["figures"], line["name"].split()[0]
    if isinstance(figures, dict) and {"steps", "seeds"} <= figures.keys():
        by_seed = {run["seed"]: run for run in lines if run["rung"] == rung and run["steps"] == figures["steps"]
                   and run["seed"] in figures["seeds"]}  # the last line of each seed
        if sorted(by_seed) == sorted(figures["seeds"]):
            losses = {name: spread([run[name] for run in by_seed.values()]) for name in ("train_loss", "val_loss")}
            result["rung"] = {**losses, "seconds": min(run["seconds"] for run in by_seed.values()),
                              "steps": figures["steps"], "seeds": figures["seeds"]}
    return result


def origin(by_rung: dict[str, list[dict[str, Any]]], rungs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the machine, torch version and date of these training runs, and the commit at which they were recorded.

    date: of the last training run, or of the last recording if no run has a date.
    """
    made = [seed["made"] for seeds in by_rung.values() for seed in seeds]
    recordings = [rungs[name]["recorded"] for name in by_rung if rungs[name]["recorded"]]
    dates = [run["date"] for run in made if "date" in run] or [recording["date"] for recording in recordings]
    threads = max(run["threads"] for run in made)
    return {"machine": f"{made[-1]['processor']}, {threads} thread{'s' * (threads > 1)}", "torch": made[-1]["torch"],
            "date": max(dates, default=None),
            "commit": max(recordings, key=lambda recording: recording["date"], default={}).get("commit")}


def draw(ladders: list[Path], by_rung: dict[str, list[dict[str, Any]]]) -> None:
    """Copy the pictures of the reports, and draw the loss curves of all, of the small and of the scaled rungs."""
    figures = DOCS / "figures"
    figures.mkdir(exist_ok=True)
    for path in sorted(path for ladder in ladders for path in (ladder / "figures").glob("*.png")):
        if not path.name.startswith("loss-curves"):
            shutil.copyfile(path, figures / path.name)
    everything = [Outcome(**{**seed, "rung": rung}) for rung in LADDER for seed in by_rung.get(rung.name, [])]
    for suffix, selected in (("", everything), ("-small", [o for o in everything if not o.rung.scaled]),
                             ("-scaled", [o for o in everything if o.rung.scaled])):
        if selected:
            pictures.draw(figures, f"loss-curves{suffix}", pictures.loss_curves(selected))
    print(*(path.relative_to(ROOT) for path in sorted(figures.glob("*.png"))), sep="\n")


def main() -> None:
    """Record, publish or note measured figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "publish", "note"))
    parser.add_argument("arguments", nargs="+", help="ladder folders; note: a name and its figures as JSON")
    args = parser.parse_args()
    if args.action == "note":
        record.append("course", {"name": args.arguments[0], "figures": json.loads(args.arguments[1])})
        return
    ladders = [Path(folder) for folder in args.arguments]
    if args.action == "publish":
        publish(ladders)
        return
    for name, seeds in outcomes(ladders).items():
        for seed in seeds:
            figures = {key: value for key, value in seed.items() if key not in ("sample", "folder", "rung", "settings")}
            record.append_earlier("ladder", {"command": "bardlet ladder", "rung": name, **figures})


if __name__ == "__main__":
    main()
