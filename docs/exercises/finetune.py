"""The lecture's exercise: pretrain on a big text, then finetune on Shakespeare. Does it lower the loss?

    python docs/exercises/finetune.py [--pretrain-steps 1500] [--finetune-steps 500] [--seeds 1] [--out runs/finetune]
                                      [--big TEXT] [--lr LR --muon-lr LR] [--dev] [--json] [settings of `bardlet train`]

Four rows, all by the command line of bardlet, with one shape, batch and recipe:

    scratch      Shakespeare alone, as many steps as the finetuning has
    pretrained   a big text (99 English novels, eltec-eng), and not a line of Shakespeare
    finetuned    those weights, then Shakespeare
    same steps   Shakespeare alone, as many steps as pretraining and finetuning have together

The loss is that of the last step's weights (nothing is selected by it), in nats per character: the two tokenizers have
different alphabets, and both know every character of what is measured, else the script says so and stops. That is the
validation part, looked at when all is trained. What is to be chosen, such as --lr of the finetuning, is chosen with
--dev, on text cut from the end of the training part.

A run that is finished in --out is not trained again, one that was stopped goes on. Words that the script does not know
go to every `bardlet train` (--n-layer 2).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bardlet.data import corpus
from bardlet.errors import BardletError
from bardlet.run import checkpoint, folder

BIG, SMALL = "eltec-eng", "tinyshakespeare"

NAMES = ("scratch", "pretrained", "finetuned", "same steps")
"""The rows of the table, in its order."""


@dataclass(frozen=True)
class Result:
    """A trained model, and how well it knows Shakespeare."""

    name: str
    """One of NAMES."""
    seed: int
    steps: int
    """Optimizer steps behind its weights, those of the run that it started from among them."""
    seconds: float
    """Time of these steps."""
    loss: float
    """Nats per character of the held-out Shakespeare."""


# ---------------------------------------------------------------- what runs


def bardlet(*argv: str) -> dict[str, Any]:
    """`bardlet ARGV --json` in a process of its own, shown as it goes; returns the object of its last line.

    Raises BardletError when it fails.
    """
    print(f"\n$ bardlet {' '.join(argv)}", flush=True)
    last = ""
    with subprocess.Popen([sys.executable, "-m", "bardlet", *argv, "--json"], stdout=subprocess.PIPE, text=True,
                          encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print("  " + line, end="", flush=True)
            last = line
    if process.returncode:
        raise BardletError(f"`bardlet {' '.join(argv)}` failed; what it says above has the remedy")
    return json.loads(last)


def train(run: Path, text: str, steps: int, seed: int, settings: Sequence[str]) -> None:
    """Make the run folder `run`: nothing where it is finished, resume where it was stopped."""
    if (run / "run.toml").exists() and folder.read_run(run)[1].get("finished"):
        print(f"\n{run} is there already", flush=True)
    elif checkpoint.steps_saved(run):
        bardlet("resume", str(run))
    else:
        # the last weights, and no look at the validation part before the end
        bardlet("train", text, "--out", str(run), "--tokenizer", "char", "--steps", str(steps), "--seed", str(seed),
                "--keep", "last", "--eval-every", "0", *settings)


def seconds_of(run: Path) -> float:
    """Time of the run's training steps, as its run.toml says."""
    return float(folder.read_run(run)[1]["seconds"])


def loss_of(run: Path, text: Path) -> float:
    """Nats per character of the text, every character but the first once (protocol b).

    Raises BardletError where the tokenizer does not know each of them: fewer characters would not compare.
    """
    measured = bardlet("eval", str(run), str(text))
    if measured["skipped_characters"]:
        raise BardletError(f"{run}: its tokenizer does not know {measured['skipped_characters']} characters of {text}, "
                           "so its loss does not compare; pretrain on a text that has them")
    return float(measured["nats_per_char"])


def held_out(dev: bool) -> str:
    """The Shakespeare that no run learns from: the validation part, or the last tenth of the training part."""
    found = corpus.find([SMALL])
    if not dev:
        return "".join(found.documents("val"))
    text = "".join(found.documents("train"))
    return text[int(0.9 * len(text)) :]


def four_rows(args: argparse.Namespace, seed: int, text: Path) -> list[Result]:
    """Train and measure the four rows for one seed. `text` is what they are measured on."""
    first, then = args.pretrain_steps, args.finetune_steps
    both = [*args.settings, *(["--val-part", "dev"] if args.dev else [])]
    rates = [word for name, rate in (("--lr", args.lr), ("--muon-lr", args.muon_lr)) if rate
             for word in (name, str(rate))]
    runs = {name: args.out / f"{name.replace(' ', '-')}-seed{seed}" for name in NAMES}
    train(runs["scratch"], SMALL, then, seed, both)
    train(runs["pretrained"], args.big, first, seed, both)
    train(runs["finetuned"], SMALL, then, seed, [*both, "--init", str(runs["pretrained"]), *rates])
    train(runs["same steps"], SMALL, first + then, seed, both)
    steps = dict(zip(NAMES, (then, first, first + then, first + then), strict=True))
    seconds = {name: seconds_of(run) for name, run in runs.items()}
    seconds["finetuned"] += seconds["pretrained"]
    return [Result(name, seed, steps[name], seconds[name], loss_of(runs[name], text)) for name in NAMES]


# ---------------------------------------------------------------- what is said


def spread(values: Sequence[float]) -> str:
    """The mean, and where there are several values their standard deviation."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(results: Sequence[Result]) -> str:
    """The results as text: a line for each row, then how far finetuning is below the others, seed by seed."""
    lines = [f"{'':12}{'steps':>8}{'seconds':>9}   nats per character"]
    for name in NAMES:
        rows = [r for r in results if r.name == name]
        if rows:
            lines.append(f"{name:12}{rows[0].steps:8,}{statistics.mean(r.seconds for r in rows):9,.0f}   "
                         f"{spread([r.loss for r in rows])}")
    loss = {(r.name, r.seed): r.loss for r in results}
    for other in ("scratch", "same steps"):
        below = [loss[other, r.seed] - r.loss for r in results if r.name == "finetuned" and (other, r.seed) in loss]
        if below:
            lines.append(f"{other} minus finetuned: {spread(below)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the top of this file. What it does not know is in `settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--big", default=BIG, metavar="TEXT", help=f"the big text: a name, file or folder ({BIG})")
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="steps on the big text (1500)")
    parser.add_argument("--finetune-steps", type=int, default=500, help=f"steps on {SMALL} after them (500)")
    parser.add_argument("--seeds", type=int, default=1, help="how many times everything is done (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (runs/finetune)")
    parser.add_argument("--lr", type=float, help="AdamW's peak learning rate in finetuning; none: as everywhere")
    parser.add_argument("--muon-lr", type=float, help="Muon's peak learning rate in finetuning; none: as everywhere")
    parser.add_argument("--dev", action="store_true", help="hold out and measure on text of the training part")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line, last")
    args, settings = parser.parse_known_args(argv)
    args.settings = settings
    for name in ("pretrain_steps", "finetune_steps", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    return args


def keep_settings(args: argparse.Namespace) -> None:
    """Write down what the runs in --out are made with, or raise BardletError where they were made otherwise."""
    now = {key: value for key, value in vars(args).items() if key not in ("out", "seeds", "json")}
    file = args.out / "settings.json"
    begun = any(args.out.glob("*/run.toml"))  # where no run came of it, the settings were a mistake
    if begun and file.exists() and json.loads(file.read_text(encoding="utf-8")) != now:
        raise BardletError(f"{file}: the runs there were made with other settings; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = arguments(argv)
    try:
        keep_settings(args)
        text = args.out / "held-out.txt"
        text.write_text(held_out(args.dev), encoding="utf-8")
        results = [row for seed in range(1, args.seeds + 1) for row in four_rows(args, seed, text)]
    except BardletError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    part = "a tenth of the training part" if args.dev else "the validation part"
    print(f"\n{SMALL}, {part}, {args.seeds} seed{'s' if args.seeds > 1 else ''}\n{table(results)}")
    if args.json:
        print(json.dumps({"results": [asdict(row) for row in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
