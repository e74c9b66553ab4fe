"""The lecture's exercise: pretrain on a big text, then fine-tune on Shakespeare. Does it lower the loss?

    python docs/exercises/finetune.py [--pretrain-steps 1500] [--finetune-steps 500] [--seeds 1] [--out runs/finetune]
                                      [--big TEXT] [--lr LR --muon-lr LR] [--dev] [--json] [settings of `bardlet train`]

Four rows, trained by the bardlet command line with the same model shape, batch size and recipe:

    scratch      Shakespeare alone, for as many steps as the fine-tuning
    pretrained   a big text (99 English novels, eltec-eng), without a line of Shakespeare
    finetuned    the pretrained weights, then Shakespeare
    same steps   Shakespeare alone, for as many steps as pretraining and fine-tuning together

The loss is that of the last step's weights (no checkpoint is selected), in nats per character. The two tokenizers have
different alphabets; both must know every character of the validation text, or the script stops. The validation part is
evaluated after all training. To choose a setting, such as --lr of the fine-tuning, use --dev, which evaluates on text
cut from the end of the training part.

A finished run in --out is not trained again; an interrupted run continues. Unknown options are passed to every
`bardlet train` (--n-layer 2).
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
"""The rows of the table, in order."""


@dataclass(frozen=True)
class Result:
    """A trained model and its loss on Shakespeare."""

    name: str
    """One of NAMES."""
    seed: int
    steps: int
    """Optimizer steps, including those of the pretrained weights."""
    seconds: float
    """Time of these steps."""
    loss: float
    """Nats per character on held-out Shakespeare."""


# ---------------------------------------------------------------- training


def bardlet(*argv: str) -> dict[str, Any]:
    """Run `bardlet ARGV --json` in a subprocess, echo its output, and return the JSON object of its last line.

    Raises BardletError if it fails.
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
        raise BardletError(f"`bardlet {' '.join(argv)}` failed; see its message above")
    return json.loads(last)


def train(run: Path, text: str, steps: int, seed: int, settings: Sequence[str]) -> None:
    """Train the run folder `run`: skip it if it is finished, resume it if it was interrupted."""
    if (run / "run.toml").exists() and folder.read_run(run)[1].get("finished"):
        print(f"\n{run} is already finished", flush=True)
    elif checkpoint.steps_saved(run):
        bardlet("resume", str(run))
    else:
        # keep the last weights, and do not evaluate on the validation part before the end
        bardlet("train", text, "--out", str(run), "--tokenizer", "char", "--steps", str(steps), "--seed", str(seed),
                "--keep", "last", "--eval-every", "0", *settings)


def seconds_of(run: Path) -> float:
    """Return the time of the run's training steps, from its run.toml."""
    return float(folder.read_run(run)[1]["seconds"])


def loss_of(run: Path, text: Path) -> float:
    """Return the nats per character of the text, over every character except the first.

    Raises BardletError if the tokenizer does not know all characters: a loss over fewer characters is not comparable.
    """
    measured = bardlet("eval", str(run), str(text))
    if measured["skipped_characters"]:
        raise BardletError(f"{run}: its tokenizer does not know {measured['skipped_characters']} characters of {text}, "
                           "so its loss is not comparable; pretrain on a text that contains them")
    return float(measured["nats_per_char"])


def validation_text(dev: bool) -> str:
    """Return the Shakespeare that no run trains on: the validation part, or the last tenth of the training part."""
    shakespeare = corpus.find([SMALL])
    if not dev:
        return "".join(shakespeare.documents("val"))
    text = "".join(shakespeare.documents("train"))
    return text[int(0.9 * len(text)) :]


def four_rows(args: argparse.Namespace, seed: int, text: Path) -> list[Result]:
    """Train the four rows with one seed, and measure them on the file `text`."""
    pretrain, finetune = args.pretrain_steps, args.finetune_steps
    settings = [*args.settings, *(["--val-part", "dev"] if args.dev else [])]
    rates = [word for flag, rate in (("--lr", args.lr), ("--muon-lr", args.muon_lr)) if rate
             for word in (flag, str(rate))]
    runs = {name: args.out / f"{name.replace(' ', '-')}-seed{seed}" for name in NAMES}
    train(runs["scratch"], SMALL, finetune, seed, settings)
    train(runs["pretrained"], args.big, pretrain, seed, settings)
    train(runs["finetuned"], SMALL, finetune, seed, [*settings, "--init", str(runs["pretrained"]), *rates])
    train(runs["same steps"], SMALL, pretrain + finetune, seed, settings)
    steps = dict(zip(NAMES, (finetune, pretrain, pretrain + finetune, pretrain + finetune), strict=True))
    seconds = {name: seconds_of(run) for name, run in runs.items()}
    seconds["finetuned"] += seconds["pretrained"]
    return [Result(name, seed, steps[name], seconds[name], loss_of(runs[name], text)) for name in NAMES]


# ---------------------------------------------------------------- the table


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean and, for several values, the standard deviation."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(results: Sequence[Result]) -> str:
    """Format the results: one line per row, then the gain of fine-tuning over the others, seed by seed."""
    lines = [f"{'':12}{'steps':>8}{'seconds':>9}   nats per character"]
    for name in NAMES:
        rows = [r for r in results if r.name == name]
        if rows:
            lines.append(f"{name:12}{rows[0].steps:8,}{statistics.mean(r.seconds for r in rows):9,.0f}   "
                         f"{mean_and_deviation([r.loss for r in rows])}")
    loss = {(r.name, r.seed): r.loss for r in results}
    for other in ("scratch", "same steps"):
        gains = [loss[other, r.seed] - r.loss for r in results if r.name == "finetuned" and (other, r.seed) in loss]
        if gains:
            lines.append(f"{other} minus finetuned: {mean_and_deviation(gains)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line described at the top of this file; unknown options go to `settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--big", default=BIG, metavar="TEXT", help=f"big text: corpus name, file or folder ({BIG})")
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="steps on the big text (1500)")
    parser.add_argument("--finetune-steps", type=int, default=500, help=f"steps on {SMALL} afterwards (500)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds to repeat everything with (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for the runs (runs/finetune)")
    parser.add_argument("--lr", type=float, help="AdamW's peak learning rate in fine-tuning (default: train's)")
    parser.add_argument("--muon-lr", type=float, help="Muon's peak learning rate in fine-tuning (default: train's)")
    parser.add_argument("--dev", action="store_true", help="evaluate on text cut from the training part")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line, last")
    args, settings = parser.parse_known_args(argv)
    args.settings = settings
    for name in ("pretrain_steps", "finetune_steps", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def save_settings(args: argparse.Namespace) -> None:
    """Save the settings of the runs in --out; raise BardletError if existing runs used other settings."""
    now = {key: value for key, value in vars(args).items() if key not in ("out", "seeds", "json")}
    file = args.out / "settings.json"
    started = any(args.out.glob("*/run.toml"))  # without any run, the saved settings do not matter
    if started and file.exists() and json.loads(file.read_text(encoding="utf-8")) != now:
        raise BardletError(f"{file}: the runs in this folder used other settings; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parse_arguments(argv)
    try:
        save_settings(args)
        text = args.out / "held-out.txt"
        text.write_text(validation_text(args.dev), encoding="utf-8")
        results = [row for seed in range(1, args.seeds + 1) for row in four_rows(args, seed, text)]
    except BardletError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    part = "a tenth of the training part" if args.dev else "the validation part"
    print(f"\n{SMALL}, {part}, {args.seeds} seed{'s' if args.seeds > 1 else ''}\n{table(results)}")
    if args.json:
        print(json.dumps({"results": [asdict(row) for row in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
