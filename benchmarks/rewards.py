"""Gains from reinforcement learning: two-digit sums with an exact reward, and positive film reviews.

    python benchmarks/rewards.py sums [--seeds 3] [--first-seed 1337] [--out DIR] [--no-save]
    python benchmarks/rewards.py reviews [--seeds 3] [--first-seed 1337] [--out DIR] [--no-save]

`sums`: the 10,000 sums of two numbers from 00 to 99, in a fixed random order, with every tenth held out from all
stages. A base is pretrained on the others as lines of text, and fine-tuned on 80 of them as questions and answers. GRPO
and PPO both start from this fine-tuned model. The score is the share of the 1,000 held-out sums whose greedy answer is
right, before and after.

`reviews` (after Ziegler et al. 2019, *Fine-Tuning Language Models from Human Preferences*): rt-polarity's sentences
are split into two halves. A base is pretrained on movie_reviews and the first half, and fine-tuned to write a sentence
of that half when asked for a review. A reward model is trained on pairs of a positive and a negative sentence. Every
tenth pair is held out from all stages. PPO with this reward model, and DPO on the same pairs, start from the fine-tuned
model. A separate classifier decides whether a sample is positive: scikit-learn's logistic regression on words and word
pairs, trained on the second half. The results include its accuracy on the first half. Needs `sentiment` in
$BARDLET_DATA.

Each seed appends a line per stage to results/rewards.jsonl; --out keeps the runs as DIR/KIND-SEED/STAGE.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import record

PROMPT = "Write a sentence of a film review."
SFT_SUMS = 80
"""Number of sums for supervised fine-tuning."""
SUMS = {
    "base": ["--tokenizer", "bpe", "--vocab-size", "262", "--n-layer", "3", "--n-head", "4", "--n-embd", "128",
             "--block-size", "64", "--steps", "800"],
    "sft": ["--no-pack", "--batch-size", "64", "--steps", "400"],
    "grpo": ["--group", "4"],
    "ppo": ["--beta", "0.01"],
}  # fmt: skip
"""Settings of the stages; the others have bardlet's defaults."""
RL = ["--reward", "exact", "--rollout", "512", "--batch-size", "128", "--passes", "2", "--steps", "1600",
            "--schedule", "linear", "--eval-every", "200", "--save-every", "400"]  # fmt: skip
"""Settings of both GRPO and PPO: 200 rollouts with eight updates each."""
REVIEWS = {
    "base": ["--tokenizer", "bpe", "--vocab-size", "4096", "--n-layer", "4", "--n-embd", "192", "--block-size", "128",
             "--steps", "1000"],
    "sft": ["--steps", "90", "--keep", "last"],
    "reward": ["--steps", "150", "--keep", "last"],
    "ppo": ["--rollout", "128", "--batch-size", "64", "--passes", "2", "--steps", "320", "--answer-tokens", "64",
            "--beta", "0.25", "--target-kl", "8"],
    "dpo": ["--steps", "230", "--lr", "1e-4", "--muon-lr", "1e-3", "--beta", "0.3", "--keep", "last"],
}  # fmt: skip
"""Chosen on pairs of the training split, and from samples of one seed. PPO: 80 rollouts."""


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sums", "reviews"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs in this folder")
    parser.add_argument("--stage", choices=("grpo", "ppo", "dpo"), help="run only this one of the last stages")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args, settings = parser.parse_known_args()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = (args.out or Path(scratch)) / f"{args.kind}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            lines = {"sums": sums, "reviews": reviews}[args.kind](folder, seed, args.stage, settings)
        for line in lines:
            print(json.dumps(line))
            if not args.no_save:
                record.append("rewards", line)


def bardlet(folder: Path, stage: str, *arguments: str | Path) -> None:
    """Run `bardlet ARGUMENTS` with the run folder folder/stage, unless it already contains a finished run."""
    out = folder / stage
    if (out / "README.md").exists():
        return
    command = [sys.executable, "-m", "bardlet", *map(str, arguments), "--out", str(out)]
    if (code := subprocess.run(command, stdout=sys.stderr).returncode) != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")


def rl_figures(folder: Path, stage: str, seed: int) -> dict[str, Any]:
    """Return the figures of a PPO or GRPO run, with its curve: (step, validation reward) of each evaluation."""
    from bardlet.run import folder as run_folder
    from bardlet.run import metrics

    run_record = run_folder.settings(folder / stage, use_edited=True)[1]
    names = ("reward_before", "reward_after", "sampled_before", "sampled_after", "kl", "answer_length",
             "different_before", "different", "distinct_before", "distinct")  # fmt: skip
    curve = [(line["step"], round(-line["val_loss"], 4)) for line in metrics.read_metrics(folder / stage)
             if "val_loss" in line]  # fmt: skip
    return {"stage": stage, "seed": seed, "parameters": run_record["parameters"], "steps": run_record["steps"],
            "seconds": run_record["seconds"], **{name: run_record[name] for name in names}, "curve": curve}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write one JSON record per line; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------- sums


def sums(folder: Path, seed: int, only: str | None, settings: list[str]) -> list[dict[str, Any]]:
    """Run one seed: base and fine-tuned model, then GRPO and PPO. Return lines of results."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(1).shuffle(pairs)  # the same for all seeds; the learning rates were chosen with another order
    records = [{"prompt": f"{a:02}+{b:02}=", "answer": str(a + b)} for a, b in pairs]
    train = [row for i, row in enumerate(records) if i % 10 != 9]  # the RL stages also hold out every tenth
    text = folder / "sums.txt"
    text.write_text("".join(f"{row['prompt']}{row['answer']}\n" for row in train), encoding="utf-8")
    questions, few = write(folder / "sums.jsonl", records), write(folder / "few.jsonl", train[:SFT_SUMS])
    bardlet(folder, "base", "train", text, *SUMS["base"], "--seed", str(seed))
    bardlet(folder, "sft", "sft", folder / "base", few, *SUMS["sft"], "--seed", str(seed))
    lines, validation = [], [pair for i, pair in enumerate(pairs) if i % 10 == 9]
    before = sums_accuracy(folder / "sft", validation, "before")
    for stage in ("grpo", "ppo"):
        if only in (None, stage):
            options = [*RL, *SUMS[stage], "--seed", str(seed), *settings]
            bardlet(folder, stage, stage, folder / "sft", questions, *options)
            figures = {**before, **sums_accuracy(folder / stage, validation, "after")}
            lines.append({"kind": "sums", **figures, **rl_figures(folder, stage, seed)})
    return lines


def sums_accuracy(run: Path, validation: list[tuple[int, int]], when: str) -> dict[str, float]:
    """Return the share of the held-out sums a + b with a greedy answer that is right and ends.

    `right_twin`: the same over the sums for which b + a is held out, too.
    """
    from bardlet.data import chat_template
    from bardlet.inference import answers
    from bardlet.run import hf

    model, tokenizer = hf.read_folder(run)
    prompts = [chat_template.encode(tokenizer, [{"role": "user", "content": f"{a:02}+{b:02}="}],
                                    add_generation_prompt=True)[0]
               for a, b in validation]
    completions = answers.generate_answers(model, tokenizer, prompts, tokens=8)
    right = [ended and text == str(a + b) for (text, ended), (a, b) in zip(completions, validation, strict=True)]
    held_out = {*validation}
    twin = [ok for ok, (a, b) in zip(right, validation, strict=True) if (b, a) in held_out]
    return {f"right_{when}": sum(right) / len(right), f"right_twin_{when}": round(sum(twin) / len(twin), 4)}


# ---------------------------------------------------------------- reviews


def reviews(folder: Path, seed: int, only: str | None, settings: list[str]) -> list[dict[str, Any]]:
    """Run one seed: base, model of reviews, reward model, then PPO and DPO. Return lines of results."""
    data = Path(os.environ["BARDLET_DATA"]) / "sentiment"
    sentences = {side: _halves(data / f"rt-polarity.{side}") for side in ("pos", "neg")}
    pairs = [{"prompt": PROMPT, "chosen": good, "rejected": bad}
             for good, bad in zip(sentences["pos"][0], sentences["neg"][0], strict=True)]
    train_pairs = [pair for i, pair in enumerate(pairs) if i % 10 != 9]  # `bardlet reward` also holds out every tenth
    train = [pair[side] for pair in train_pairs for side in ("chosen", "rejected")]
    with lzma.open(data / "movie_reviews.jsonl.xz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    text = write(folder / "reviews.jsonl", [{"text": document} for document in [*documents, *train]])
    chats = write(folder / "sentences.jsonl", [{"prompt": PROMPT, "answer": sentence} for sentence in train])
    preferences = write(folder / "pairs.jsonl", pairs)
    classifier = train_classifier(*(sentences[side][1] for side in ("pos", "neg")))
    bardlet(folder, "base", "train", text, *REVIEWS["base"], "--seed", str(seed))
    bardlet(folder, "sft", "sft", folder / "base", chats, *REVIEWS["sft"], "--seed", str(seed))
    bardlet(folder, "reward", "reward", folder / "sft", preferences, *REVIEWS["reward"], "--seed", str(seed))
    good, bad = (classifier.predict(sentences[side][0]).mean() for side in ("pos", "neg"))  # not its training half
    lines, accuracy = [], {"judge_accuracy": round(float(good + 1 - bad) / 2, 4)}
    for stage in ("ppo", "dpo"):
        if only in (None, stage):
            options = [*REVIEWS[stage], *settings, "--seed", str(seed)]
            reward = ["--reward", folder / "reward"] if stage == "ppo" else []
            bardlet(folder, stage, stage, folder / "sft", chats if stage == "ppo" else preferences, *reward, *options)
            figures = review_figures(folder, stage, classifier)
            lines.append({"kind": "reviews", "stage": stage, "seed": seed, **accuracy, **figures})
    return lines


def _halves(path: Path) -> tuple[list[str], list[str]]:
    """Return the distinct sentences of a file, in a fixed random order, as two halves."""
    lines = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()})
    random.Random(0).shuffle(lines)
    half = 2600
    return lines[:half], lines[half : 2 * half]


def train_classifier(good: list[str], bad: list[str]) -> Any:
    """Train a classifier on sentences that no bardlet model was trained on."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise SystemExit("`reviews` needs scikit-learn: pip install scikit-learn") from None
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
                             LogisticRegression(C=10))
    return pipeline.fit([*good, *bad], [1] * len(good) + [0] * len(bad))


def review_figures(folder: Path, stage: str, classifier: Any, number: int = 1000) -> dict[str, Any]:
    """Return the share of positive samples, their KL (nats per sample) and diversity, before and after a stage."""
    import torch

    from bardlet.config.finetuning import PPOConfig
    from bardlet.data import chat_template, prompts
    from bardlet.data.forms import Question
    from bardlet.evaluation.metrics import distinct_ngrams
    from bardlet.run import folder as run_folder
    from bardlet.run import hf
    from bardlet.runtime.distributed import Dist
    from bardlet.stages import rollout

    dist = Dist(0, 1, torch.device("cpu"))
    run_record = run_folder.settings(folder / stage, use_edited=True)[1]
    reference, tokenizer = hf.read_folder(folder / "sft")
    config = PPOConfig(answer_tokens=64, dtype="fp32", rollout=32)
    question = Question([{"role": "user", "content": PROMPT}], None)
    ids = chat_template.encode(tokenizer, question.prompt, add_generation_prompt=True)[0]
    one_prompt = prompts.Prompts([question], [ids])
    judge_record = run_folder.settings(folder / "reward", use_edited=True)[1]
    figures: dict[str, Any] = {"parameters": run_record["parameters"], "seconds": run_record["seconds"],
                               "reward_accuracy": judge_record["accuracy"]}
    for when, model in (("before", reference), ("after", hf.read_folder(folder / stage)[0])):
        samples = rollout.sample_rollout(model, tokenizer, one_prompt, [0] * number, range(number), config, dist, 1.0)
        texts = [completion.text for completion in samples.completions]
        logp, reference_logp = (rollout.log_probability(m, samples, config, dist).sum(1) for m in (model, reference))
        figures |= {f"positive_{when}": round(float(classifier.predict(texts).mean()), 4),
                    f"different_{when}": round(len(set(texts)) / number, 4),
                    f"same_opening_{when}": round(most_common_opening(texts) / number, 4),
                    **{f"distinct{n}_{when}": round(distinct_ngrams(texts, n), 4) for n in (1, 2, 3)},
                    f"ended_{when}": round(sum(completion.ended for completion in samples.completions) / number, 4),
                    f"kl_{when}": round((logp - reference_logp).mean().item(), 3), f"samples_{when}": texts[:8]}
    return figures


def most_common_opening(texts: list[str], words: int = 3) -> int:
    """Return the number of texts that begin with the most common first `words` words."""
    return Counter(" ".join(text.split()[:words]) for text in texts).most_common(1)[0][1]


if __name__ == "__main__":
    main()
