"""Reinforcement learning as a stage: a model writes answers, hears what they are worth, and learns from them.

PPO and GRPO differ in what they make of the rewards (`stages/ppo.py`, `stages/grpo.py`). Here is what they share: the
rollouts, which are made when the batch of a step asks for them, and the names of `stages/pretrain.py`. The reference is
the model that the run begins with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.config.settings import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.data import prompts, records
from bardlet.data.prompts import PreparedPrompts, Prompts
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.run import card, hf, plots
from bardlet.runtime.distributed import Dist
from bardlet.stages import base, grpo, ppo, rewards, rollout
from bardlet.stages.rewards import EXACT, Reward
from bardlet.stages.rollout import Rollout
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

ALGORITHMS = {"ppo": ppo, "grpo": grpo}
ROLLOUTS = 100
"""Rollouts of a run where neither --steps nor --minutes says how many."""
UNENDED = 1.0
"""What an answer loses, in deviations of the rewards, that a reward model judges and that did not end by itself."""
ALIKE = 1e-6
"""Rewards that differ by less, as a share of their size, are the same."""
LOOKED_AT = 256
"""Held-out questions that are asked at most, evenly spread."""
SHOWN = 4
"""Of them on its card."""


def find(config: TrainConfig) -> Examples:
    """The questions that the settings name."""
    return records.find(config)


def prepare(found: Examples, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: Progress | None = None) -> PreparedPrompts:
    """The questions as tokens by the tokenizer of the model."""
    if words is None:
        raise BardletError("a model that answers already learns from its own answers: name it with --init DIR")
    return prompts.prepare(found, words, progress)


class Player:
    """A policy, its reference, and what answers are worth: it writes answers and says what they show."""

    def __init__(self, policy: Any, reference: Any, reward: Reward, words: Tokenizer, config: TrainConfig, dist: Dist,
                 record: dict[str, Any]) -> None:
        self.policy, self.reference, self.reward, self.words = policy, reference, reward, words
        self.config, self.dist, self.record = config, dist, record

    def write(self, asked: Prompts, which: np.ndarray, number: int, temperature: float, dist: Dist) -> Rollout:
        """Answers to the prompts `which`, a function of (seed, number); each process of `dist` writes its share."""
        seeds = [_seed(self.config.seed, number, i) for i in range(len(which))]
        return rollout.write(self.policy, self.words, asked, which.tolist(), seeds, self.config, dist, temperature)

    def worth(self, made: Rollout) -> np.ndarray:
        """What the answers are worth, (A,) float32, as the reward says it."""
        return self.reward(made.questions, made.answers)

    def learned_from(self, made: Rollout, worth_A: np.ndarray) -> np.ndarray:
        """The rewards that are learned from, (A,) float32: in deviations of those of the reference's answers, and from
        their mean; less UNENDED where a reward model judges and an answer did not end. `exact` stays 0 and 1."""
        if self.config.reward == EXACT:
            return worth_A
        found_A = (worth_A - self.record["reward_mean"]) / self.record["reward_deviation"]
        if isinstance(self.reward, rewards.Judge):
            found_A = found_A - UNENDED * np.array([not answer.ended for answer in made.answers])
        return found_A.astype(np.float32)

    def log_probability(self, model: Any, made: Rollout) -> torch.Tensor:
        """log p of what was written, by the policy or the reference: (A, T) float32."""
        return rollout.log_probability(model, made, self.config, self.dist)

    def kl(self, made: Rollout) -> float:
        """Nats of an answer by which the policy left its reference, as these answers tell it."""
        one_AT, other_AT = (self.log_probability(model, made) for model in (self.policy, self.reference))
        return (one_AT - other_AT).sum(1).mean().item()

    def look(self, held: Prompts, temperature: float | None = None) -> tuple[Rollout, np.ndarray]:
        """(an answer to each of the held-out prompts, what they are worth (A,)), always by the same random numbers.

        With --reward exact the likeliest answers, where no temperature is given. By this process alone: others may not
        be there.
        """
        if temperature is None:
            temperature = 0.0 if self.config.reward == EXACT else self.config.temperature
        made = self.write(held, np.arange(len(held)), -1, temperature, Dist(0, 1, self.dist.device))
        return made, self.worth(made)


def _seed(seed: int, number: int, row: int) -> int:
    """That of an answer: far from all others."""
    words = np.random.SeedSequence([seed, number + 1, row]).generate_state(1, np.uint64)
    return int(words[0] >> 1)


def from_main(dist: Dist, what: Callable[[], np.ndarray], size: int) -> np.ndarray:
    """What rank 0 finds, `size` numbers, in each process: (size,) float32."""
    found = torch.from_numpy(what()) if dist.main else torch.zeros(size)
    return dist.sum(found.to(dist.device)).cpu().numpy()


class Rollouts:
    """The rollouts of a run as batches, one after the other; a checkpoint keeps what `StageState` asks for."""

    def __init__(self, model: Any, player: Player, learned: Prompts, config: TrainConfig) -> None:
        """model: what is trained, as `actor` made it of the player's policy."""
        self.model, self.player, self.learned, self.config = model, player, learned, config
        self.algorithm: Any = ALGORITHMS[config.stage]
        self.updates = config.rollout // (config.batch_size * config.grad_accum)  # of a pass
        self.period = self.updates * config.passes  # steps that learn from one rollout
        self.answers = config.group if config.stage == "grpo" else 1  # to each question
        self.load({})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The rollout that is being learned from, and beta."""
        facts = {f"fact/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.facts.items()}
        number, beta = torch.tensor(self.number), torch.tensor(self.beta, dtype=torch.float64)
        return {**self.rows, **facts, "number": number, "beta": beta}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on with what `tensors` gave; from nothing, begin."""
        rest = dict(tensors)
        self.number = int(rest.pop("number", torch.tensor(-1)))
        self.beta = float(rest.pop("beta", torch.tensor(self.config.beta, dtype=torch.float64)))
        self.facts = {name[5:]: float(rest.pop(name)) for name in tensors if name.startswith("fact/")}
        self.rows = rest

    def batch(self, step: int) -> data_batch.Batch:
        """The batch of a step: some answers of its rollout, each once in a pass. A rollout's first batch makes it."""
        number, within = divmod(step, self.period)
        if number != self.number:
            self.number, self.rows = number, self.rolled_out(number)
        a_pass, place = divmod(within, self.updates)
        random = np.random.default_rng([self.config.seed % 2**64, number, a_pass])
        which = random.permutation(self.config.rollout).reshape(self.updates, -1)[place]
        return {name: x[torch.from_numpy(which)] for name, x in self.rows.items()}

    def rolled_out(self, number: int) -> data_batch.Batch:
        """The answers of rollout `number` from 0 on, with all that is learned from them: rows of a batch."""
        config, player = self.config, self.player
        questions = prompts.asked(number, config.rollout // self.answers, len(self.learned), config.seed)
        made = player.write(self.learned, questions.repeat(self.answers), number, config.temperature, player.dist)
        # one process asks: a program may be dear, and all have to hear the same
        worth_A = from_main(player.dist, lambda: player.worth(made), len(made.answers))
        batch = {"idx": made.idx_AT, "target": made.target_AT}
        compared = config.stage == "ppo" or config.beta > 0  # with the reference, in what is learned
        if compared or self.period > 1:  # who learns once from a rollout is still the one that wrote it
            batch["old"] = player.log_probability(player.policy, made)
        if compared:
            batch["reference"] = player.log_probability(player.reference, made)
            kl = (batch["old"] - batch["reference"]).sum(1).mean().item()
        else:  # it is told, and no more: one answer to each question is enough
            kl = player.kl(made.part(slice(None, None, self.answers)))
        found = rollout.shown(made, worth_A)
        if config.stage == "ppo":
            self.beta = ppo.adapted(self.beta, kl, config.target_kl)
        self.facts = {"reward": found.reward, "kl": kl, "answer_tokens": found.tokens, "ended": found.ended,
                      "different": found.different, "beta": self.beta}
        reward_A = torch.from_numpy(player.learned_from(made, worth_A))
        return {**batch, **self.algorithm.learnable(self.model, batch, reward_A, self.beta, config)}

    def widest(self) -> data_batch.Batch:
        """A batch as large as any could be: an answer in every place."""
        size = (self.config.batch_size * self.config.grad_accum, self.config.block_size)
        ids, ones = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
        return {"idx": ids, "target": ids, **dict.fromkeys(("old", "reference", "advantage", "value", "return"), ones)}

    def place(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        number, within = divmod(step, self.period)
        return f"update {within + 1} of rollout {number + 1}"


def reward_objective(model: Any, policy: Any, reference: Any, reward: Reward, ready: PreparedPrompts,
                     config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Batches of the policy's own answers, what the algorithm makes of them, and minus the held-out reward.

    model: what is trained, as `actor` made it of the policy.
    """
    learned, held = prompts.parts(ready, config)
    player = Player(policy, reference, reward, ready.tokenizer, config, dist, record)
    batches = Rollouts(model, player, learned, config)
    looked_at = held.some(LOOKED_AT)
    record["batches"] = max(1, len(learned) * batches.answers * batches.period // config.rollout)

    def evaluate(_: Any) -> float:
        return -float(player.look(looked_at)[1].mean()) if dist.main else 0.0  # only rank 0 makes use of it

    return Objective(batches.batch, partial(batches.algorithm.learn, config=config), losses.count_targets, evaluate,
                 batches.place, batches.widest, lambda: batches.facts, batches, batches.period)


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, PreparedPrompts]:
    """A model that answers, questions, rewards and optimizers: a run that has not begun. Arguments: `pretrain`'s."""
    if rewards.is_command(config.reward) and "reward" not in given and run is None:
        raise BardletError(f"--reward '{config.reward}': a program is not run because a file names it; say it again: "
                           f"`bardlet {config.stage} --config ... --reward ...`")
    model, words, config = base.begin(config, dist, out, given, in_file, run)
    rewards.named(config)  # before the long part
    if run is None and "answer_tokens" not in {*given, *in_file}:  # the other half is for the question
        config = replace(config, answer_tokens=min(config.answer_tokens, config.block_size // 2))
    found = find(config)
    ready = prepare(found, config, words, dist, progress)
    learned, held = prompts.parts(ready, config)
    record: dict[str, Any] = {
        "text": found.name, "text_hash": found.hash, "tokenizer": words.kind, "documents": len(learned),
        "tokens": sum(map(len, learned.ids)), "minutes": config.minutes,
        "left_out": len(ready.train) + (len(ready.val) if config.val_part == "val" else 0) - len(learned) - len(held)}
    t = assemble(base.folder(run, out, f"{found.name}-{config.stage}"), model, ready, config, dist, record)
    if progress:
        progress("what its answers are worth before", 0, None)
    player = _player(t)

    def before() -> np.ndarray:
        worth_A, held_A = (player.look(asked.some(LOOKED_AT), heat)[1] for asked, heat in
                           ((learned, config.temperature), (held, None)))
        deviation = worth_A.std(dtype=np.float64)
        if deviation <= ALIKE * max(1.0, abs(worth_A.mean())):  # what is left is rounding
            deviation = 0.0
        return np.array([worth_A.mean(), deviation, held_A.mean()], np.float32)

    mean, deviation, held_mean = map(float, from_main(dist, before, 3))
    if not deviation:
        log.warning("all answers of %s are worth the same, %g: there is nothing to learn from comparing them; "
                    "fine-tune it first, or give it more --answer-tokens", config.init, mean)
    record |= {"reward_mean": mean, "reward_deviation": deviation or 1.0, "reward_before": round(held_mean, 4)}
    if config.steps is None and config.minutes is None:
        t.state.steps = ROLLOUTS * t.objective.period
        t.config = replace(t.config, steps=t.state.steps)
    return t, ready


def assemble(run: Path, model: Any, ready: PreparedPrompts, config: TrainConfig, dist: Dist, record: dict[str, Any],
             resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns from its own answers. Arguments: `pretrain`'s."""
    folder = Path(str(config.init))
    base.same(config, record, hf.weights_hash(folder))
    reference = hf.read_folder(folder)[0].to(dist.device)
    learned, held = prompts.parts(ready, config)
    reward = rewards.build(config, [*learned.questions, *held.questions], dist)
    if isinstance(reward, rewards.Judge):
        known = hf.weights_hash(Path(str(config.reward)))
        if record.setdefault("reward_hash", known) != known:
            raise BardletError(f"{config.reward}: is not the reward model any more that the run began with; "
                               "put it back")
    actor = ALGORITHMS[config.stage].actor(model)
    make = partial(reward_objective, actor, model, reference, reward, ready, dist=dist, record=record)
    return base.trainer(run, actor, make, config, dist, record, resumed)


def _player(t: Trainer) -> Player:
    """Who writes the answers of a run."""
    assert isinstance(t.objective.memory, Rollouts)
    return t.objective.memory.player


def said(t: Trainer, ready: PreparedPrompts) -> tuple[list[str], float]:
    """What a plan says of the questions, in lines, and how often the planned steps ask them."""
    r, c, held = t.record, t.config, len(prompts.parts(ready, t.config)[1])
    each = f"{c.group} answers to each question, " if c.stage == "grpo" else ""
    lines = [f"questions: {r['text']}, {r['documents']:,} to learn from, {held:,} held out",
             f"reward: {c.reward}; {r['reward_before']:.4f} on average for held-out answers of {c.init}",
             f"rollouts: of {c.rollout} answers of up to {c.answer_tokens} tokens, {each}{t.objective.period} steps "
             "each"]
    if r["left_out"]:
        lines.append(f"left out, too long for the window of {c.block_size} tokens with an answer: {r['left_out']:,}")
    return lines, t.state.steps / r["batches"]


def expect(t: Trainer, ready: PreparedPrompts) -> None:
    """Nobody knows what reward to expect."""


def results(facts: dict[str, Any]) -> list[str]:
    """What a finished run has come to, in lines."""
    worse = "; less than before: a lower --lr and --muon-lr, more --steps or a larger --rollout may help"
    return [f"held-out questions: a mean reward of {facts['reward_before']:.4f} before, {facts['reward_after']:.4f} "
            f"after; answers are {facts['kl']:.2f} nats from the model that it began with, {facts['ended']:.0%} end by "
            f"themselves, {facts['different']:.0%} are different ({facts['different_before']:.0%} before)"
            + worse * (facts["reward_after"] < facts["reward_before"])]


def conclude(t: Trainer, ready: PreparedPrompts) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curves, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with what held-out answers show; some of them.
    """
    plots.reward_curve(t.run, card.title(t.run, t.record))
    asked = prompts.parts(ready, t.config)[1].some(LOOKED_AT)
    after, alone = _player(t), Dist(0, 1, t.dist.device)  # the other processes have left
    policy = hf.read_folder(t.run)[0].to(t.dist.device)
    before, after = (Player(model, after.reference, after.reward, after.words, t.config, alone, t.record)
                     for model in (after.reference, policy))
    answers = []
    for when, player in (("_before", before), ("", after)):  # drawn: the likeliest answers say nothing of these
        made, worth_A = player.look(asked, t.config.temperature)
        found = rollout.shown(made, worth_A)
        t.record |= {f"different{when}": round(found.different, 4), f"distinct{when}": round(found.distinct, 4),
                     f"sampled{when or '_after'}": round(found.reward, 4)}
        answers.append(made.answers)
    t.record |= {"reward_after": round(-t.record["val_loss"], 4), "kl": round(after.kl(made), 4),
                 "ended": round(found.ended, 4), "answer_length": round(found.tokens, 2)}
    every = max(1, len(asked) // SHOWN)
    sample = "\n\n".join(f"{ready.tokenizer.decode(ids.tolist())}\n  before: {one.text}\n  after:  {other.text}"
                         for ids, one, other in list(zip(asked.ids, *answers, strict=True))[::every][:SHOWN])
    t.record["finished"] = True
    facts = checkpointing.write_run(t)
    card.policy_card(t.run, t.config, facts, sample)
    return facts, sample
