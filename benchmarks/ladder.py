"""From finished ladders to figures that stay: a line per rung and seed, the normal bands, and what the course shows.

    bardlet ladder --rungs 1-7 --seeds 5 --out runs/lecture
    bardlet ladder --rungs 8-13 --seeds 3 --out runs/scaled
    python benchmarks/ladder.py record runs/lecture runs/scaled      # -> results/ladder.jsonl
    python benchmarks/ladder.py publish runs/lecture runs/scaled     # -> bands.json, docs/measured.json, docs/figures/

Other measured figures of the course (exercises, one setting changed) come from results/course.jsonl: a line is
{"name": ..., "figures": {...}}, with date, commit and machine, written by `python benchmarks/ladder.py note NAME JSON`.
The last line of a name counts. Where the name begins with that of a rung, as in "dropout 0", the figures are those of
the rung with one setting changed, and the rung itself with as many steps is published beside them, from ladder.jsonl.

When and by what a rung was trained it says itself: `made` in outcome.json, or, but for the date, run.toml where
outcome.json is older. The commit is not known to it: `record` adds the one of its own moment as `recorded_commit`. In
older lines of ladder.jsonl, and in course.jsonl, that is what `date` and `commit` mean.
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
    """What outcome.json says of each rung, by its name, in the ladder's order; `made` is always there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rung in LADDER:
        for ladder in ladders:
            for path in sorted(ladder.glob(f"{rung.number:02}-{rung.name}/seed-*/outcome.json")):
                outcome = json.loads(path.read_text(encoding="utf-8"))
                made = outcome.get("made") or _made(path.parent)
                found.setdefault(rung.name, []).append({**outcome, "made": made, "folder": path.parent})
    return found


def _made(folder: Path) -> dict[str, Any]:
    """What the run folder of an older bardlet says of its making."""
    machine = run_folder.read_run(folder)[1]["machine"]
    return {name: machine[name] for name in ("torch", "threads", "dtype", "compiled", "processor", "device")}


def recorded(rung: str, seeds: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{date, commit} of the last line of ladder.jsonl that holds one of these runs, the same loss to the last digit."""
    of = {(seed["seed"], seed["val_loss"]) for seed in seeds}
    mine = [line for line in lines if line["rung"] == rung and (line["seed"], line["val_loss"]) in of]
    return {"date": mine[-1].get("recorded", mine[-1].get("date")),
            "commit": mine[-1].get("recorded_commit", mine[-1].get("commit"))} if mine else None


def spread(values: list[float]) -> dict[str, float]:
    """Mean and deviation, and mean -+ 3 deviations: where 19 of 20 further seeds lie when five are known."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean, "deviation": deviation, "low": mean - 3 * deviation, "high": mean + 3 * deviation}


def describe(rung: Rung, seeds: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A rung over its seeds, as the course shows it.

    `made`: what the seeds' trainings were made with, a list where they differ (a date is missing in those of an older
    bardlet). `recorded`: when, and at which commit, they were put into ladder.jsonl.
    """
    losses = {name: spread([seed[name] for seed in seeds]) for name in ("val_loss", "val_loss_lecture", "train_loss")}
    made = list({json.dumps(seed["made"], sort_keys=True): seed["made"] for seed in seeds}.values())
    return {"parameters": seeds[0]["parameters"], "steps": seeds[0]["steps"], "seeds": [seed["seed"] for seed in seeds],
            # the fastest seed's: the others may have had company on the machine
            "seconds": min(seed["seconds"] for seed in seeds), **losses,
            "losses": {str(seed["seed"]): seed["val_loss"] for seed in seeds},
            "made": made[0] if len(made) == 1 else made, "recorded": recorded(rung.name, seeds, lines),
            "sample": seeds[0]["sample"], "lecture": rung.lecture}


def write(path: Path, value: Any) -> None:
    """`value` as JSON that a person can read and compare."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def publish(ladders: list[Path]) -> None:
    """The bands of the lecture's rungs, and everything that the course's pages show of the runs."""
    found = outcomes(ladders)
    lines = [json.loads(line) for line in (record.HERE / "results" / "ladder.jsonl").read_text("utf-8").splitlines()]
    rungs = {rung.name: describe(rung, found[rung.name], lines) for rung in LADDER if rung.name in found}
    bands = {name: {"mean": one["val_loss"]["mean"], "deviation": one["val_loss"]["deviation"],
                    "low": one["val_loss"]["low"], "high": one["val_loss"]["high"], "seeds": len(one["seeds"]),
                    "seconds": one["seconds"]}
             for rung in LADDER if not rung.scaled and rung.name in rungs  # the scaled ones depend on the machine
             for name, one in [(rung.name, rungs[rung.name])] if len(one["seeds"]) >= 5}
    of_small = {name: seeds for name, seeds in found.items() if name in bands}
    if bands:  # fewer seeds say nothing of what is normal: what was known before stays
        write(BANDS, {"made_by": MADE_BY, **origin(of_small, rungs), "rungs": bands})
    notes = record.HERE / "results" / "course.jsonl"
    noted = [json.loads(line) for line in notes.read_text("utf-8").splitlines()] if notes.exists() else []
    extras = {line["name"]: extra(line, lines) for line in noted}
    write(DOCS / "measured.json", {"made_by": MADE_BY, **origin(found, rungs), "rungs": rungs, "extras": extras})
    draw(ladders, found)


def extra(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of course.jsonl as the course shows it: figures, when and where they were measured and, of a rung with
    one setting changed, `rung`: the rung as it is, with the same steps and seeds, from the `lines` of ladder.jsonl."""
    kept = {name: line.get(name) for name in ("date", "commit", "machine", "figures")}
    figures, rung = line["figures"], line["name"].split()[0]
    if isinstance(figures, dict) and {"steps", "seeds"} <= figures.keys():
        alike = {one["seed"]: one for one in lines if one["rung"] == rung and one["steps"] == figures["steps"]
                 and one["seed"] in figures["seeds"]}  # the last line of each seed
        if sorted(alike) == sorted(figures["seeds"]):
            own = {name: spread([one[name] for one in alike.values()]) for name in ("train_loss", "val_loss")}
            kept["rung"] = {**own, "seconds": min(one["seconds"] for one in alike.values()),
                            "steps": figures["steps"], "seeds": figures["seeds"]}
    return kept


def origin(found: dict[str, list[dict[str, Any]]], rungs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Where, when and with which torch these runs were trained, and the commit at which they were recorded.

    date: of the last training, or of the last recording where no run says when it was trained.
    """
    made = [seed["made"] for seeds in found.values() for seed in seeds]
    put = [rungs[name]["recorded"] for name in found if rungs[name]["recorded"]]
    dates = [one["date"] for one in made if "date" in one] or [one["date"] for one in put]
    threads = max(one["threads"] for one in made)
    return {"machine": f"{made[-1]['processor']}, {threads} thread{'s' * (threads > 1)}", "torch": made[-1]["torch"],
            "date": max(dates, default=None), "commit": max(put, key=lambda one: one["date"], default={}).get("commit")}


def draw(ladders: list[Path], found: dict[str, list[dict[str, Any]]]) -> None:
    """The pictures: those of the ladders' reports, and the loss curves of all, of the small and of the scaled rungs."""
    figures = DOCS / "figures"
    figures.mkdir(exist_ok=True)
    for path in sorted(path for ladder in ladders for path in (ladder / "figures").glob("*.png")):
        if not path.name.startswith("loss-curves"):
            shutil.copyfile(path, figures / path.name)
    everything = [Outcome(**{**seed, "rung": rung}) for rung in LADDER for seed in found.get(rung.name, [])]
    for name, chosen in (("", everything), ("-small", [one for one in everything if not one.rung.scaled]),
                         ("-scaled", [one for one in everything if one.rung.scaled])):
        if chosen:
            pictures.draw(figures, f"loss-curves{name}", pictures.loss_curves(chosen))
    print(*(path.relative_to(ROOT) for path in sorted(figures.glob("*.png"))), sep="\n")


def main() -> None:
    """Record what was measured, or publish it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "publish", "note"))
    parser.add_argument("words", nargs="+", help="folders of ladders; note: a name and its figures as JSON")
    asked = parser.parse_args()
    if asked.what == "note":
        record.append("course", {"name": asked.words[0], "figures": json.loads(asked.words[1])})
        return
    ladders = [Path(word) for word in asked.words]
    if asked.what == "publish":
        publish(ladders)
        return
    for name, seeds in outcomes(ladders).items():
        for seed in seeds:
            figures = {key: value for key, value in seed.items() if key not in ("sample", "folder", "rung", "settings")}
            record.append_earlier("ladder", {"command": "bardlet ladder", "rung": name, **figures})


if __name__ == "__main__":
    main()
