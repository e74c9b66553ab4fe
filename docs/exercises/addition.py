"""The lecture's exercise: a GPT that adds two numbers. An objective is batches + a loss; this file defines a new one.

    python docs/exercises/addition.py [--steps N | --minutes M] [--seed S] [--digits 3] [--no-mask] [--forward] [--json]

A sum is a text of fixed length, `123+456=9750`: the four digits of 0579 in reverse order, the order of adding by hand.
In this order a digit needs only two digits of the question and the carry from the digit before. In normal order
(--forward) the first digit can depend on the last digits of a and b. The loss covers only the answer: the question is
random and cannot be predicted (--no-mask tries to).

1,000 sums are held out for the test and used once, at the end. Another 1,000, the development set, show progress during
training. The model trains on neither set, nor on b+a for any a+b in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.evaluation import metrics
from bardlet.inference import generate
from bardlet.planning import clock
from bardlet.run.record import Record
from bardlet.runtime import device as runtime_device
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, optim
from bardlet.training.state import Objective, Trainer
from bardlet.training.trainer import train_step

ALPHABET = "0123456789+="
"""The vocabulary: a token is a character, its id the index in this string."""

SPLIT_SEED = 20
"""Selects the held-out sums. Independent of --seed, so that every run takes the same test."""

# ---------------------------------------------------------------- sums as text


@dataclass(frozen=True)
class Task:
    """The format of a sum, and the part of it that is learned."""

    digits: int = 3
    """Digits of a and of b; the answer has one more."""
    reverse: bool = True
    """Write the answer with its last digit first."""
    mask: bool = True
    """Take no loss on the question."""

    @property
    def question(self) -> int:
        """Number of characters of `abc+def=`."""
        return 2 * self.digits + 2

    @property
    def answer(self) -> int:
        """Number of characters of the answer."""
        return self.digits + 1

    def write(self, a: int, b: int) -> str:
        """Return a + b as text: `123+456=9750`."""
        total = f"{a + b:0{self.answer}d}"
        return f"{a:0{self.digits}d}+{b:0{self.digits}d}=" + (total[::-1] if self.reverse else total)

    def read(self, answer: str) -> int | None:
        """Return the number in an answer; None unless all its characters are digits."""
        return int(answer[::-1] if self.reverse else answer) if answer.isdecimal() else None


def encode(text: str) -> list[int]:
    """Return the ids of a text."""
    return [ALPHABET.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """Return the text of ids."""
    return "".join(ALPHABET[i] for i in ids)


# ---------------------------------------------------------------- data


def split(digits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (test, development, training) pairs, each (N, 2) int64.

    Every {a, b} occurs once, in one of the three parts: no other part contains it or its mirror b+a.
    """
    pairs = np.stack(np.triu_indices(10**digits), axis=1)  # a <= b
    random = np.random.default_rng(SPLIT_SEED)
    pairs = random.permuted(random.permutation(pairs), axis=1)  # shuffle the rows, and a and b in each row
    n = min(1000, len(pairs) // 10)
    return pairs[:n], pairs[n : 2 * n], pairs[2 * n :]


def to_batch(pairs: np.ndarray, task: Task) -> data_batch.Batch:
    """Return `idx` and `target`, both (B, T) int64: target is idx one character later, or IGNORE for no loss."""
    ids_BL = torch.tensor([encode(task.write(a, b)) for a, b in pairs.tolist()])
    idx_BT, target_BT = ids_BL[:, :-1], ids_BL[:, 1:].clone()
    if task.mask:
        # the last character of the question predicts the first digit of the answer: keep that target
        target_BT[:, : task.question - 1] = losses.IGNORE
    return {"idx": idx_BT, "target": target_BT}


def addition_objective(task: Task, seed: int, batch_size: int, device: torch.device) -> Objective:
    """Return the objective of addition: batches, loss, evaluation. A batch is a pure function of (seed, step)."""
    _, development, training = split(task.digits)
    development_batch = to_batch(development, task)

    def batch(step: int) -> data_batch.Batch:
        random = np.random.default_rng([seed, step])
        pairs = training[random.integers(len(training), size=batch_size)]
        return to_batch(random.permuted(pairs, axis=1), task)  # a+b or b+a

    def development_loss(model: torch.nn.Module) -> float:
        return metrics.mean_loss(model, [development_batch], device)

    return Objective(batch, losses.next_token_loss, losses.count_targets, development_loss)


# ---------------------------------------------------------------- training


def settings(seed: int, steps: int = 500) -> TrainConfig:
    """Return the settings of a small GPT-2 and its training, chosen on the development set."""
    config = TrainConfig(model="gpt2", n_layer=2, n_head=4, n_embd=128, block_size=16, activation="relu",
                         batch_size=256, steps=steps, optimizer="muon", lr=2e-3, muon_lr=2e-2,
                         schedule="stable-decay", seed=seed)
    return config.resolved()


def new_model(config: TrainConfig, dist: Dist) -> Any:
    """Return an untrained model, the same for the same seed."""
    torch.manual_seed(config.seed)
    return models.build(config.model_config(len(ALPHABET))).to(dist.device)


def train(model: Any, objective: Objective, config: TrainConfig, dist: Dist,
          after_step: Callable[[int, float], None] = lambda step, loss: None) -> None:
    """Run `config.steps` of bardlet's own `train_step`; call `after_step`(steps done, loss) after each."""
    assert config.steps is not None
    optimizers = optim.build(model, config)
    for step in range(config.steps):
        model.train()
        optim.set_learning_rate(optimizers, optim.learning_rate(step, config.steps, config))
        loss, _ = train_step(model, optimizers, objective.batch(step), objective, config, dist, config.dtype)
        after_step(step + 1, loss)


def steps_in(seconds: float, model: Any, objective: Objective, config: TrainConfig, dist: Dist) -> int:
    """Return the number of steps that fit into `seconds`. Times a few steps, then restores the weights."""
    trial = Trainer(Path(), model, [], objective, config, dist, machine={"dtype": config.dtype}, record=Record())
    return clock.steps_for(seconds, clock.seconds_per_step(trial), evaluating=0.1 * seconds)


# ---------------------------------------------------------------- evaluation


def predict_sums(model: Any, pairs: np.ndarray, task: Task) -> list[int | None]:
    """Return the model's answer to each a+b, by greedy decoding of all pairs in one batch."""
    prompts = [encode(task.write(a, b)[: task.question]) for a, b in pairs.tolist()]
    return [task.read(decode(ids)) for ids in generate.generate(model, prompts, task.answer, temperature=0)]


def count_exact(answers: Sequence[int | None], pairs: np.ndarray) -> int:
    """Return the number of answers that are right in every digit."""
    return sum(answer == total for answer, total in zip(answers, pairs.sum(axis=1).tolist(), strict=True))


def print_examples(answers: Sequence[int | None], pairs: np.ndarray, task: Task, limit: int = 5) -> None:
    """Print up to `limit` right and `limit` wrong answers."""
    rows = list(zip(answers, pairs.tolist(), strict=True))
    for answer, (a, b) in [row for row in rows if row[0] == sum(row[1])][:limit]:
        print(f"  right  {task.write(a, b)}   {a} + {b} = {answer}")
    for answer, (a, b) in [row for row in rows if row[0] != sum(row[1])][:limit]:
        print(f"  wrong  {task.write(a, b)}   {a} + {b} = {a + b}, but the model says {answer}")


# ---------------------------------------------------------------- the command line


def run(task: Task, config: TrainConfig, minutes: float | None = None) -> dict[str, Any]:
    """Train with progress lines, then run the test. Returns the figures that --json prints."""
    dist = Dist(0, 1, runtime_device.pick_device("auto"))
    config = replace(config, dtype=cast(Any, runtime_device.pick_dtype("auto", dist.device)),
                     threads=runtime_device.set_threads_and_determinism(None, False, dist.device))
    objective, model = addition_objective(task, config.seed, config.batch_size, dist.device), new_model(config, dist)
    if minutes is not None:
        config = replace(config, steps=steps_in(60 * minutes, model, objective, config, dist))
    assert config.steps is not None
    test, development, training = split(task.digits)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(training):,} training pairs, {len(development):,} development pairs, {len(test):,} test pairs, "
          f"such as {task.write(*test[0].tolist())}\n{parameters:,} parameters, {config.steps:,} steps of "
          f"{config.batch_size} sums, {config.dtype}, {config.threads} threads")
    started, steps, every = time.monotonic(), config.steps, max(1, config.steps // 10)

    def print_progress(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            right = count_exact(predict_sums(model, development, task), development)
            model.eval()
            with torch.no_grad():
                development_loss = objective.evaluate(model)
            print(f"step {step:5,}: loss {loss:.4f}, development {development_loss:.4f}, "
                  f"{right / len(development):6.1%} of {len(development):,} sums exact, "
                  f"{time.monotonic() - started:.0f} s", flush=True)

    train(model, objective, config, dist, print_progress)
    seconds = time.monotonic() - started
    answers = predict_sums(model, test, task)
    right = count_exact(answers, test)
    print(f"test: {right:,} of {len(test):,} sums exact, after {seconds:.0f} s")
    print_examples(answers, test, task)
    return {"accuracy": right / len(test), "exact": right, "of": len(test), "steps": steps,
            "seconds": round(seconds, 1), "parameters": parameters, "seed": config.seed, **asdict(task)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line described at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), default=500, help="training steps (500)")
    length.add_argument("--minutes", type=positive(float), help="train for as many steps as fit into this time")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the weights and the batches (1337)")
    parser.add_argument("--digits", type=int, choices=(1, 2, 3), default=3, help="digits of each number (3)")
    parser.add_argument("--no-mask", action="store_true", help="also take the loss on the question")
    parser.add_argument("--forward", action="store_true", help="write the answer with its first digit first")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line, last")
    args = parser.parse_args(argv)
    task = Task(args.digits, reverse=not args.forward, mask=not args.no_mask)
    figures = run(task, settings(args.seed, args.steps), args.minutes)
    if args.json:
        print(json.dumps(figures))


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a parser of positive numbers, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} must be more than 0")
        return value

    return number


if __name__ == "__main__":
    main()
