"""From finished ladders to figures that stay: a line per rung and seed, the normal bands, and what the course shows.

    bardlet ladder --rungs 1-7 --seeds 5 --out runs/lecture
    bardlet ladder --rungs 8-13 --seeds 3 --out runs/scaled
    python benchmarks/ladder.py record runs/lecture runs/scaled      # -> results/ladder.jsonl
    python benchmarks/ladder.py publish runs/lecture runs/scaled     # -> bands.json, docs/measured.json, docs/figures/

Other measured figures of the course (exercises, one setting changed) come from results/course.jsonl: a line is
{"name": ..., "figures": {...}}, written by `python benchmarks/ladder.py note NAME JSON`.
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

ROOT = Path(__file__).resolve().parents[1]
BANDS = ROOT / "src" / "bardlet" / "ladder" / "bands.json"
DOCS = ROOT / "docs"


def outcomes(ladders: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """What outcome.json says of each rung, by its name, in the ladder's order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rung in LADDER:
        for ladder in ladders:
            for path in sorted(ladder.glob(f"{rung.number:02}-{rung.name}/seed-*/outcome.json")):
                outcome = json.loads(path.read_text(encoding="utf-8"))
                found.setdefault(rung.name, []).append({**outcome, "folder": path.parent})
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Mean and deviation, and mean -+ 3 deviations: where 19 of 20 further seeds lie when five are known."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean, "deviation": deviation, "low": mean - 3 * deviation, "high": mean + 3 * deviation}


def describe(rung: Rung, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """A rung over its seeds, as the course shows it."""
    losses = {name: spread([seed[name] for seed in seeds]) for name in ("val_loss", "val_loss_lecture", "train_loss")}
    return {"parameters": seeds[0]["parameters"], "steps": seeds[0]["steps"], "seeds": [seed["seed"] for seed in seeds],
            # the fastest seed's: the others may have had company on the machine
            "seconds": min(seed["seconds"] for seed in seeds), **losses, "sample": seeds[0]["sample"],
            "lecture": rung.lecture}


def write(path: Path, value: Any) -> None:
    """`value` as JSON that a person can read and compare."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def publish(ladders: list[Path]) -> None:
    """The bands of the lecture's rungs, and everything that the course's pages show of the runs."""
    found = outcomes(ladders)
    rungs = {rung.name: describe(rung, found[rung.name]) for rung in LADDER if rung.name in found}
    bands = {name: {"mean": one["val_loss"]["mean"], "deviation": one["val_loss"]["deviation"],
                    "low": one["val_loss"]["low"], "high": one["val_loss"]["high"], "seeds": len(one["seeds"]),
                    "seconds": one["seconds"]}
             for rung in LADDER if not rung.scaled and rung.name in rungs  # the scaled ones depend on the machine
             for name, one in [(rung.name, rungs[rung.name])] if len(one["seeds"]) >= 5}
    lines = [json.loads(line) for line in (record.HERE / "results" / "ladder.jsonl").read_text("utf-8").splitlines()]
    machine = lines[-1]["machine"]
    made_by = "benchmarks/ladder.py publish, from bardlet ladder on Tiny Shakespeare"
    write(BANDS, {"made_by": made_by, "date": lines[-1]["date"], "commit": lines[-1]["commit"], "rungs": bands})
    notes = record.HERE / "results" / "course.jsonl"
    extras = {line["name"]: line["figures"] for line in map(json.loads, notes.read_text("utf-8").splitlines())} \
        if notes.exists() else {}
    write(DOCS / "measured.json", {
        "made_by": made_by, "machine": f"{machine['processor']}, {machine['cores']} cores", "torch": machine["torch"],
        "date": lines[-1]["date"], "commit": lines[-1]["commit"], "rungs": rungs, "extras": extras})
    draw(ladders, found)


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
            figures = {key: value for key, value in seed.items() if key not in ("sample", "folder", "rung")}
            record.append("ladder", {"command": "bardlet ladder", "rung": name, **figures})


if __name__ == "__main__":
    main()
