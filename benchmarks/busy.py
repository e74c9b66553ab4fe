"""Timed runs on a busy machine: what share of the minutes is spent in training steps, and when does the run end?

    python benchmarks/busy.py run tinyshakespeare names --minutes 1 2 [--loads quiet one eight]
    python benchmarks/busy.py table

`run` starts `bardlet train TEXT --minutes M` as a user would, with an empty cache, beside no other program (quiet), one
endless loop on a core of its own (one), or eight loops of normal priority (eight), and appends a line per run to
results/busy.jsonl: seconds in training steps as a share of the minutes, wall time of the command from start to exit,
steps, replans, predicted and final loss. The loops are children of the benchmark, as the run is, so that the scheduler
treats them as equals. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record

from bardlet.run import folder

LOADS = {"quiet": 0, "one": 1, "eight": 8}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train beside each load")
    run.add_argument("texts", nargs="+")
    run.add_argument("--minutes", type=float, nargs="+", required=True)
    run.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    commands.add_parser("table", help="print the runs")
    args = parser.parse_args()
    if args.command == "table":
        table()
        return
    for minutes in args.minutes:
        for text in args.texts:
            for load in args.loads:
                figures = measure(text, minutes, load)
                record.append("busy", figures)
                print(describe(figures), flush=True)


def measure(text: str, minutes: float, load: str) -> dict[str, Any]:
    """Train once beside a load and return the figures."""
    with tempfile.TemporaryDirectory() as temporary, beside(LOADS[load]):
        run = Path(temporary) / "run"
        command = [sys.executable, "-m", "bardlet", "train", text, "--minutes", f"{minutes:g}", "--out", str(run)]
        environment = {**os.environ, "BARDLET_CACHE": str(Path(temporary) / "cache")}
        started = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        wall = time.monotonic() - started
        if done.returncode:
            raise SystemExit(done.stderr)
        config, facts = folder.read_run(run)
    return {"text": Path(text).name, "minutes": minutes, "load": load,
            "share": round(facts["seconds"] / (60 * minutes), 4), "wall": round(wall, 1), "steps": facts["steps"],
            "replans": list(config.replans), "capped": facts["steps"] == facts.get("most_steps"),
            "compiled": config.compile == "on", "predicted": facts.get("expected"), "drift": facts.get("drift"),
            "nats_per_char": facts["nats_per_char"]}


@contextmanager
def beside(loops: int) -> Iterator[None]:
    """Run endless loops for as long as the context lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def describe(figures: dict[str, Any]) -> str:
    """Return a run as a line."""
    late = figures["wall"] - 60 * figures["minutes"]
    predicted = f"{figures['predicted']:.2f}" if figures["predicted"] else "none"
    return (f"{figures['text']:20} {figures['minutes']:g} min  {figures['load']:5}  share {figures['share']:4.0%}  "
            f"end {late:+5.1f} s  {figures['steps']:5} steps{' (all that help)' * figures['capped']}  "
            f"predicted {predicted}, got {figures['nats_per_char']:.2f}")


def table() -> None:
    """Print the newest run of each text, time and load."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for figures in record.read("busy"):
        newest[figures["text"], figures["minutes"], figures["load"]] = figures
    for _, figures in sorted(newest.items()):
        print(describe(figures))


if __name__ == "__main__":
    main()
