"""What learning from rewards gives: two-digit sums with the exact reward, and film reviews that people would call good.

    python benchmarks/rewards.py sums [--seeds 3] [--first-seed 1337] [--out DIR] [--no-save]
    python benchmarks/rewards.py reviews [--seeds 3] [--first-seed 1337] [--out DIR] [--no-save]

`sums`: the 10,000 sums of two numbers of two digits, 00 to 99, in a fixed random order, of which every tenth is held
out from every stage. A base reads the others as lines of text, is fine-tuned on 80 of them as questions and answers,
and then learns from its own answers by GRPO and by PPO, each from the same fine-tuned model. The share of the 1,000
held-out sums whose likeliest answer is right is said before and after.

`reviews` (after Ziegler et al. 2019, *Fine-Tuning Language Models from Human Preferences*): rt-polarity's sentences
are cut into two halves. A base reads movie_reviews and the first half, is fine-tuned to write a sentence of it when
asked for a review, and a reward model learns from pairs of a positive and a negative one; every tenth pair is held out
from all of this. PPO, with the reward model, and DPO, on the same pairs, begin with the fine-tuned model. Whether a
sample is positive is for a judge of its own to say: scikit-learn's logistic regression over words and pairs of words,
trained on the second half; how good that one is on the first half stands beside. $BARDLET_DATA has to hold `sentiment`.

Each seed appends a line to results/rewards.jsonl; --out keeps the runs, as DIR/KIND-SEED/STAGE.
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

ASKED = "Write a sentence of a film review."
FEW = 80
"""Sums that the fine-tuned model has seen as questions."""
SUMS = {
    "base": ["--tokenizer", "bpe", "--vocab-size", "262", "--n-layer", "3", "--n-head", "4", "--n-embd", "128",
             "--block-size", "64", "--steps", "800"],
    "sft": ["--no-pack", "--batch-size", "64", "--steps", "400"],
    "grpo": ["--group", "4"],
    "ppo": ["--beta", "0.01"],
}  # fmt: skip
"""Settings of the stages; what is not said is bardlet's default."""
LEARNING = ["--reward", "exact", "--rollout", "512", "--batch-size", "128", "--passes", "2", "--steps", "1600",
            "--schedule", "linear", "--eval-every", "200", "--save-every", "400"]  # fmt: skip
"""Of GRPO and PPO alike: 200 rollouts, eight updates from each."""
REVIEWS = {
    "base": ["--tokenizer", "bpe", "--vocab-size", "4096", "--n-layer", "4", "--n-embd", "192", "--block-size", "128",
             "--steps", "1000"],
    "sft": ["--steps", "90", "--keep", "last"],
    "reward": ["--steps", "150", "--keep", "last"],
    "ppo": ["--rollout", "128", "--batch-size", "64", "--passes", "2", "--steps", "320", "--answer-tokens", "64",
            "--beta", "0.25", "--target-kl", "8"],
    "dpo": ["--steps", "230", "--lr", "1e-4", "--muon-lr", "1e-3", "--beta", "0.3", "--keep", "last"],
}  # fmt: skip
"""Chosen on pairs of the training part, and by looking at samples of one seed. PPO: 80 rollouts."""


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sums", "reviews"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    parser.add_argument("--stage", choices=("grpo", "ppo", "dpo"), help="of the last stages this one only")
    parser.add_argument("--no-save", action="store_true")
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


def bardlet(folder: Path, stage: str, *words: str | Path) -> None:
    """`bardlet ...` of a stage, whose run goes to folder/stage; nothing where one lies there already."""
    out = folder / stage
    if (out / "README.md").exists():
        return
    command = [sys.executable, "-m", "bardlet", *map(str, words), "--out", str(out)]
    if (code := subprocess.run(command, stdout=sys.stderr).returncode) != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}")


def learned_from_rewards(folder: Path, stage: str, seed: int) -> dict[str, Any]:
    """The figures of a run of PPO or GRPO, with its curve: (step, held-out reward) of each evaluation."""
    from bardlet.run import folder as run_folder
    from bardlet.run import metrics

    done = run_folder.settings(folder / stage, changed=True)[1]
    names = ("reward_before", "reward_after", "sampled_before", "sampled_after", "kl", "answer_length",
             "different_before", "different", "distinct_before", "distinct")  # fmt: skip
    curve = [(line["step"], round(-line["val_loss"], 4)) for line in metrics.read_metrics(folder / stage)
             if "val_loss" in line]  # fmt: skip
    return {"stage": stage, "seed": seed, "parameters": done["parameters"], "steps": done["steps"],
            "seconds": done["seconds"], **{name: done[name] for name in names}, "curve": curve}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records of JSON, a line each."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------- sums


def sums(folder: Path, seed: int, only: str | None, settings: list[str]) -> list[dict[str, Any]]:
    """The lines of one seed: base and fine-tuned model, then GRPO and PPO."""
    every = [(a, b) for a in range(100) for b in range(100)]
    random.Random(1).shuffle(every)  # the same for all seeds; the rates were chosen with another order
    records = [{"prompt": f"{a:02}+{b:02}=", "answer": str(a + b)} for a, b in every]
    learned = [one for i, one in enumerate(records) if i % 10 != 9]  # the stages hold out every tenth themselves
    text = folder / "sums.txt"
    text.write_text("".join(f"{one['prompt']}{one['answer']}\n" for one in learned), encoding="utf-8")
    questions, few = write(folder / "sums.jsonl", records), write(folder / "few.jsonl", learned[:FEW])
    bardlet(folder, "base", "train", text, *SUMS["base"], "--seed", str(seed))
    bardlet(folder, "sft", "sft", folder / "base", few, *SUMS["sft"], "--seed", str(seed))
    lines, held = [], [pair for i, pair in enumerate(every) if i % 10 == 9]
    before = right(folder / "sft", held, "before")
    for stage in ("grpo", "ppo"):
        if only in (None, stage):
            words = [*LEARNING, *SUMS[stage], "--seed", str(seed), *settings]
            bardlet(folder, stage, stage, folder / "sft", questions, *words)
            figures = {**before, **right(folder / stage, held, "after")}
            lines.append({"kind": "sums", **figures, **learned_from_rewards(folder, stage, seed)})
    return lines


def right(run: Path, held: list[tuple[int, int]], when: str) -> dict[str, float]:
    """The share of the held-out sums whose likeliest answer is right, and ends; and of those whose twin, b + a, is held
    out, too."""
    from bardlet.data import chat_template
    from bardlet.inference import answers
    from bardlet.run import hf

    model, tokenizer = hf.read_folder(run)
    asked = [chat_template.encode(tokenizer, [{"role": "user", "content": f"{a:02}+{b:02}="}], ask=True)[0]
             for a, b in held]
    made = answers.generate_answers(model, tokenizer, asked, tokens=8)
    found = [ended and text == str(a + b) for (text, ended), (a, b) in zip(made, held, strict=True)]
    known = {*held}
    alone = [one for one, (a, b) in zip(found, held, strict=True) if (b, a) in known]
    return {f"right_{when}": sum(found) / len(found), f"right_twin_{when}": round(sum(alone) / len(alone), 4)}


# ---------------------------------------------------------------- reviews


def reviews(folder: Path, seed: int, only: str | None, settings: list[str]) -> list[dict[str, Any]]:
    """The lines of one seed: a base, a model that writes reviews, a reward model, then PPO and DPO."""
    data = Path(os.environ["BARDLET_DATA"]) / "sentiment"
    sentences = {side: _halves(data / f"rt-polarity.{side}") for side in ("pos", "neg")}
    pairs = [{"prompt": ASKED, "chosen": good, "rejected": bad}
             for good, bad in zip(sentences["pos"][0], sentences["neg"][0], strict=True)]
    kept = [pair for i, pair in enumerate(pairs) if i % 10 != 9]  # as `bardlet reward` holds out every tenth
    own = [pair[side] for pair in kept for side in ("chosen", "rejected")]
    with lzma.open(data / "movie_reviews.jsonl.xz", "rt", encoding="utf-8") as file:
        whole = [json.loads(line)["text"] for line in file]
    text = write(folder / "reviews.jsonl", [{"text": one} for one in [*whole, *own]])
    written = write(folder / "sentences.jsonl", [{"prompt": ASKED, "answer": one} for one in own])
    preferences = write(folder / "pairs.jsonl", pairs)
    judge = trained_judge(*(sentences[side][1] for side in ("pos", "neg")))
    bardlet(folder, "base", "train", text, *REVIEWS["base"], "--seed", str(seed))
    bardlet(folder, "sft", "sft", folder / "base", written, *REVIEWS["sft"], "--seed", str(seed))
    bardlet(folder, "reward", "reward", folder / "sft", preferences, *REVIEWS["reward"], "--seed", str(seed))
    good, bad = (judge.predict(sentences[side][0]).mean() for side in ("pos", "neg"))  # it has never seen these
    lines, known = [], {"judge_accuracy": round(float(good + 1 - bad) / 2, 4)}
    for stage in ("ppo", "dpo"):
        if only in (None, stage):
            words = [*REVIEWS[stage], *settings, "--seed", str(seed)]
            reward = ["--reward", folder / "reward"] if stage == "ppo" else []
            material = written if stage == "ppo" else preferences
            bardlet(folder, stage, stage, folder / "sft", material, *reward, *words)
            lines.append({"kind": "reviews", "stage": stage, "seed": seed, **known, **judged(folder, stage, judge)})
    return lines


def _halves(path: Path) -> tuple[list[str], list[str]]:
    """The sentences of a file in a fixed random order, as two halves; what occurs twice is taken once."""
    lines = sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()})
    random.Random(0).shuffle(lines)
    half = 2600
    return lines[:half], lines[half : 2 * half]


def trained_judge(good: list[str], bad: list[str]) -> Any:
    """A classifier of sentences that bardlet has never seen."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise SystemExit("the judge of the reviews is scikit-learn's: pip install scikit-learn") from None
    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10))
    return judge.fit([*good, *bad], [1] * len(good) + [0] * len(bad))


def judged(folder: Path, stage: str, judge: Any, number: int = 1000) -> dict[str, Any]:
    """The share of positive samples before and after, how far they are (KL, nats of a sample), what they are like."""
    import torch

    from bardlet.config.finetuning import PPOConfig
    from bardlet.data import chat_template, prompts
    from bardlet.data.records import Question
    from bardlet.evaluation.metrics import distinct_ngrams
    from bardlet.run import folder as run_folder
    from bardlet.run import hf
    from bardlet.runtime.distributed import Dist
    from bardlet.stages import rollout

    here = Dist(0, 1, torch.device("cpu"))
    known, (reference, tokenizer) = run_folder.settings(folder / stage, changed=True)[1], hf.read_folder(folder / "sft")
    config = PPOConfig(answer_tokens=64, dtype="fp32", rollout=32)
    question = Question([{"role": "user", "content": ASKED}], None)
    asked = prompts.Prompts([question], [chat_template.encode(tokenizer, question.prompt, ask=True)[0]])
    figures: dict[str, Any] = {"parameters": known["parameters"], "seconds": known["seconds"],
                               "reward_accuracy": run_folder.settings(folder / "reward", changed=True)[1]["accuracy"]}
    for when, model in (("before", reference), ("after", hf.read_folder(folder / stage)[0])):
        made = rollout.sample_rollout(model, tokenizer, asked, [0] * number, range(number), config, here, 1.0)
        texts = [answer.text for answer in made.answers]
        far = [rollout.log_probability(one, made, config, here).sum(1) for one in (model, reference)]
        figures |= {f"positive_{when}": round(float(judge.predict(texts).mean()), 4),
                    f"different_{when}": round(len(set(texts)) / number, 4),
                    f"same_opening_{when}": round(commonest_opening(texts) / number, 4),
                    **{f"distinct{n}_{when}": round(distinct_ngrams(texts, n), 4) for n in (1, 2, 3)},
                    f"ended_{when}": round(sum(answer.ended for answer in made.answers) / number, 4),
                    f"kl_{when}": round((far[0] - far[1]).mean().item(), 3), f"samples_{when}": texts[:8]}
    return figures


def commonest_opening(texts: list[str], words: int = 3) -> int:
    """How many texts begin with the words with which most of them begin."""
    return Counter(" ".join(text.split()[:words]) for text in texts).most_common(1)[0][1]


if __name__ == "__main__":
    main()
