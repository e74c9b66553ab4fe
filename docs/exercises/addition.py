"""The lecture's exercise: a GPT that adds two numbers. An objective is batches + a loss, and here is a new one.

    python docs/exercises/addition.py [--steps N | --minutes M] [--seed S] [--digits 3] [--no-mask] [--forward] [--json]

A sum is a text of fixed length, `123+456=9750`: the four digits of 0579 in reverse order, as one adds by hand. Written
so, a digit needs two digits of the question and a carry from what was just written; the first digit of a sum in normal
order (--forward) can hang on the last digits of a and b. The loss is taken on the answer alone: the question is random,
and nobody can predict it (--no-mask tries to).

1,000 sums are held out for the test and are looked at once, at the end. Another 1,000, the development set, are
watched on the way. The model trains on neither, and not on b+a where a+b is one of them.
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
"""The vocabulary: a token is a character, its id the place here."""

SPLIT_SEED = 20
"""Which sums are held out. Not --seed: every run answers the same test."""

# ---------------------------------------------------------------- sums as text


@dataclass(frozen=True)
class Task:
    """How a sum is written, and what of it is learned."""

    digits: int = 3
    """Digits of a and of b; the sum has one more."""
    reverse: bool = True
    """The answer begins with its last digit."""
    mask: bool = True
    """No loss on the question."""

    @property
    def question(self) -> int:
        """Characters of `abc+def=`."""
        return 2 * self.digits + 2

    @property
    def answer(self) -> int:
        """Characters of the sum."""
        return self.digits + 1

    def write(self, a: int, b: int) -> str:
        """a + b as text: `123+456=9750`."""
        total = f"{a + b:0{self.answer}d}"
        return f"{a:0{self.digits}d}+{b:0{self.digits}d}=" + (total[::-1] if self.reverse else total)

    def read(self, answer: str) -> int | None:
        """The number that an answer says; None where it is not made of digits alone."""
        return int(answer[::-1] if self.reverse else answer) if answer.isdecimal() else None


def encode(text: str) -> list[int]:
    """The ids of a text."""
    return [ALPHABET.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """The text of ids."""
    return "".join(ALPHABET[i] for i in ids)


# ---------------------------------------------------------------- which sums, and when


def split(digits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(test, development, training) pairs, each (N, 2) int64.

    Every {a, b} stands in one of the three, and once: what a part holds is in no other part, nor is its mirror b+a.
    """
    pairs = np.stack(np.triu_indices(10**digits), axis=1)  # a <= b
    random = np.random.default_rng(SPLIT_SEED)
    pairs = random.permuted(random.permutation(pairs), axis=1)  # the rows in any order, and either number in front
    n = min(1000, len(pairs) // 10)
    return pairs[:n], pairs[n : 2 * n], pairs[2 * n :]


def to_batch(pairs: np.ndarray, task: Task) -> data_batch.Batch:
    """`idx` and `target`, both (B, T) int64: target is idx one character later, IGNORE where nothing is learned."""
    ids_BL = torch.tensor([encode(task.write(a, b)) for a, b in pairs.tolist()])
    idx_BT, target_BT = ids_BL[:, :-1], ids_BL[:, 1:].clone()
    if task.mask:
        # the last character of the question predicts the first of the answer: that target stays
        target_BT[:, : task.question - 1] = losses.IGNORE
    return {"idx": idx_BT, "target": target_BT}


def addition_objective(task: Task, seed: int, batch_size: int, device: torch.device) -> Objective:
    """All that training must know of addition. The batch is a pure function of (seed, step)."""
    _, development, training = split(task.digits)
    held_out = to_batch(development, task)

    def batch(step: int) -> data_batch.Batch:
        random = np.random.default_rng([seed, step])
        pairs = training[random.integers(len(training), size=batch_size)]
        return to_batch(random.permuted(pairs, axis=1), task)  # a+b or b+a

    def development_loss(model: torch.nn.Module) -> float:
        return metrics.mean_loss(model, [held_out], device)

    return Objective(batch, losses.next_token_loss, losses.count_targets, development_loss)


# ---------------------------------------------------------------- training


def settings(seed: int, steps: int = 500) -> TrainConfig:
    """A small GPT-2 and how it is trained; chosen on the development set."""
    config = TrainConfig(model="gpt2", n_layer=2, n_head=4, n_embd=128, block_size=16, activation="relu",
                         batch_size=256, steps=steps, optimizer="muon", lr=2e-3, muon_lr=2e-2,
                         schedule="stable-decay", seed=seed)
    return config.resolved()


def new_model(config: TrainConfig, where: Dist) -> Any:
    """An untrained model, the same for the same seed."""
    torch.manual_seed(config.seed)
    return models.build(config.model_config(len(ALPHABET))).to(where.device)


def learn(model: Any, objective: Objective, config: TrainConfig, where: Dist,
          watch: Callable[[int, float], None] = lambda step, value: None) -> None:
    """`config.steps` updates, each by bardlet's own `train_step`. `watch` gets (steps done, loss) after each."""
    assert config.steps is not None
    optimizers = optim.build(model, config)
    for step in range(config.steps):
        model.train()
        optim.set_learning_rate(optimizers, optim.learning_rate(step, config.steps, config))
        value, _ = train_step(model, optimizers, objective.batch(step), objective, config, where, config.dtype)
        watch(step + 1, value)


def steps_in(seconds: float, model: Any, objective: Objective, config: TrainConfig, where: Dist) -> int:
    """How many steps fit into `seconds`, by timing a few; the weights are put back."""
    trial = Trainer(Path(), model, [], objective, config, where, machine={"dtype": config.dtype}, record=Record())
    return clock.steps_for(seconds, clock.seconds_per_step(trial), evaluating=0.1 * seconds)


# ---------------------------------------------------------------- examination


def answers(model: Any, pairs: np.ndarray, task: Task) -> list[int | None]:
    """What the model says each a+b is: the likeliest digit, again and again, all pairs in one batch."""
    prompts = [encode(task.write(a, b)[: task.question]) for a, b in pairs.tolist()]
    return [task.read(decode(ids)) for ids in generate.generate(model, prompts, task.answer, temperature=0)]


def exact(said: Sequence[int | None], pairs: np.ndarray) -> int:
    """How many answers are the sum, every digit of it."""
    return sum(answer == total for answer, total in zip(said, pairs.sum(axis=1).tolist(), strict=True))


def show(said: Sequence[int | None], pairs: np.ndarray, task: Task, most: int = 5) -> None:
    """Print some sums that are right and some that are wrong, if there are any."""
    rows = list(zip(said, pairs.tolist(), strict=True))
    for answer, (a, b) in [row for row in rows if row[0] == sum(row[1])][:most]:
        print(f"  right  {task.write(a, b)}   {a} + {b} = {answer}")
    for answer, (a, b) in [row for row in rows if row[0] != sum(row[1])][:most]:
        print(f"  wrong  {task.write(a, b)}   {a} + {b} = {a + b}, but it says {answer}")


# ---------------------------------------------------------------- the command line


def run(task: Task, config: TrainConfig, minutes: float | None = None) -> dict[str, Any]:
    """Train, print how it goes, take the test. Returns the figures that --json prints."""
    where = Dist(0, 1, runtime_device.pick_device("auto"))
    config = replace(config, dtype=cast(Any, runtime_device.pick_dtype("auto", where.device)),
                     threads=runtime_device.set_threads_and_determinism(None, False, where.device))
    objective, model = addition_objective(task, config.seed, config.batch_size, where.device), new_model(config, where)
    if minutes is not None:
        config = replace(config, steps=steps_in(60 * minutes, model, objective, config, where))
    assert config.steps is not None
    test, development, training = split(task.digits)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(training):,} pairs to learn from, {len(development):,} to watch, {len(test):,} for the test; written "
          f"like {task.write(*test[0].tolist())}\n{parameters:,} parameters, {config.steps:,} steps of "
          f"{config.batch_size} sums, {config.dtype}, {config.threads} threads")
    begun, steps, every = time.monotonic(), config.steps, max(1, config.steps // 10)

    def watch(step: int, value: float) -> None:
        if step % every == 0 or step == steps:
            right = exact(answers(model, development, task), development)
            model.eval()
            with torch.no_grad():
                held_out = objective.evaluate(model)
            print(f"step {step:5,}: loss {value:.4f}, development {held_out:.4f}, {right / len(development):6.1%} "
                  f"of {len(development):,} sums exact, {time.monotonic() - begun:.0f} s", flush=True)

    learn(model, objective, config, where, watch)
    seconds = time.monotonic() - begun
    said = answers(model, test, task)
    right = exact(said, test)
    print(f"test: {right:,} of {len(test):,} sums exact, after {seconds:.0f} s")
    show(said, test, task)
    return {"accuracy": right / len(test), "exact": right, "of": len(test), "steps": steps,
            "seconds": round(seconds, 1), "parameters": parameters, "seed": config.seed, **asdict(task)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), default=500, help="training steps (500)")
    length.add_argument("--minutes", type=positive(float), help="as many steps as fit into this time")
    parser.add_argument("--seed", type=int, default=1337, help="of the weights and the batches (1337)")
    parser.add_argument("--digits", type=int, choices=(1, 2, 3), default=3, help="of each number (3)")
    parser.add_argument("--no-mask", action="store_true", help="learn to predict the question, too")
    parser.add_argument("--forward", action="store_true", help="write the sum with its first digit in front")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line, last")
    args = parser.parse_args(argv)
    task = Task(args.digits, reverse=not args.forward, mask=not args.no_mask)
    figures = run(task, settings(args.seed, args.steps), args.minutes)
    if args.json:
        print(json.dumps(figures))


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A reader of numbers above 0, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value

    return number


if __name__ == "__main__":
    main()
