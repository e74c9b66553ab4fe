"""KTO beside supervised fine-tuning on the liked completions alone, from the same model and the same training prompts.

    python benchmarks/kto.py RUN FEEDBACK [--seeds 3] [--save]

RUN is a chat model of `bardlet sft`, FEEDBACK a file of labelled completions. Held-out prompts are the same for both.
For each model: AUC, the probability that a liked held-out completion has a higher reward log(model / RUN) than a
disliked one, and the mean change of log p of liked and of disliked completions, in nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import record
import torch

import bardlet
from bardlet.config.kto import KTOConfig
from bardlet.evaluation.metrics import auc
from bardlet.run import hf
from bardlet.runtime.distributed import Dist
from bardlet.stages.kto import KTO, Feedback


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("feedback", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--save", action="store_true", help="append a line per run to results/kto.jsonl")
    args = parser.parse_args()
    stage = KTO(KTOConfig(init=str(args.model), text=(str(args.feedback),)), Dist(0, 1, torch.device("cpu")))
    model, tokenizer = hf.read_folder(args.model)
    stage.config = stage.resolve_machine().as_model(model.config)
    stage.load(tokenizer)
    rows: dict[str, list[dict[str, float]]] = {"KTO": [], "SFT on liked": []}
    with tempfile.TemporaryDirectory() as scratch:
        liked = Path(scratch) / "liked.jsonl"
        source = stage.source
        assert isinstance(source, Feedback)
        with liked.open("w", encoding="utf-8") as file:
            for row, label in source.parts[0]:
                if label:
                    answer = {"role": "assistant", "content": row.chosen}
                    file.write(json.dumps({"messages": [*row.prompt, answer]}) + "\n")
        for seed in range(args.seeds):
            options = {"seed": seed, "steps": args.steps, "keep": "last"}  # held-out rows select nothing
            kto = bardlet.kto(args.model, args.feedback, out=f"{scratch}/kto-{seed}", **options)
            sft = bardlet.sft(args.model, liked, out=f"{scratch}/sft-{seed}", **options)
            rows["KTO"].append(measure(stage, kto.folder))
            rows["SFT on liked"].append(measure(stage, sft.folder))
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for name, runs in rows.items()}
    for name, values in medians.items():
        print(f"{name:14}" + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if args.save:
        for method, runs in (("kto", rows["KTO"]), ("sft", rows["SFT on liked"])):
            for seed, figures in enumerate(runs):
                record.append("kto", {"feedback": args.feedback.name, "method": method, "seed": seed,
                                      "steps": args.steps, **figures})


def measure(stage: KTO, folder: Path) -> dict[str, float]:
    """Return the held-out figures of a model, by the stage whose reference is the starting model."""
    model, _ = hf.read_folder(folder)
    reward_N2, label_N = stage.held_out_rewards(model)
    ratio_N = reward_N2[:, 0] / stage.config.beta
    return {"auc": auc(ratio_N.numpy(), label_N.numpy()), "liked": ratio_N[label_N].mean().item(),
            "disliked": ratio_N[~label_N].mean().item(), "held_out": len(label_N)}


if __name__ == "__main__":
    main()
