"""Reinforcement learning: a model writes answers, hears what they are worth, and learns from them.

PPO and GRPO differ in what they make of the rewards (`stages/ppo.py`, `stages/grpo.py`). Here is what they share: the
rollouts, which are made when the batch of a step asks for them. The reference is the model that the run begins with.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bardlet.config.finetuning import EXACT, RolloutConfig
from bardlet.data import prompts, records
from bardlet.data.batch import Batch
from bardlet.data.prompts import PromptDataset, Prompts
from bardlet.data.records import Examples
from bardlet.errors import BardletError
from bardlet.run import card, hf, plots
from bardlet.run.record import RolloutsRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import rewards, rollout
from bardlet.stages.base import FineTuning, check_base
from bardlet.stages.rewards import Scorer
from bardlet.stages.rollout import Rollout
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

ROLLOUTS = 100
"""Rollouts of a run where neither --steps nor --minutes says how many."""
MISSING_EOS_PENALTY = 1.0
"""What an answer loses, in deviations of the rewards, that a reward model judges and that did not end by itself."""
LOW_DIVERSITY = 1e-6
"""Rewards that differ by less, as a share of their size, are the same."""
EVAL_PROMPTS = 256
"""Held-out questions that are asked at most, evenly spread."""
SAMPLES = 4
"""Of them on its card."""

C = TypeVar("C", bound=RolloutConfig)


class RL(FineTuning[C, Examples, PromptDataset, RolloutsRecord]):
    """What PPO and GRPO share: questions, rollouts and rewards."""

    material = "questions"
    unit = "answer tokens"
    template = "rollouts"
    record_class = RolloutsRecord
    loss_is_telling = False
    actor: Actor
    """Who writes the answers."""
    model: Any
    """What is trained, as `actor` made it of the policy."""

    # ------------------------------------------------------------------------ the algorithm

    @abstractmethod
    def build_policy(self, policy: Any) -> Any:
        """What is trained, of the policy."""

    @abstractmethod
    def compute_advantages(self, model: Any, batch: Batch, reward_A: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
        """What a batch of a rollout has besides its tokens and their probabilities.

        Args:
            model: what is trained.
            batch: `idx`, `target` (A, T) int64; where they are needed `old`, `reference` (A, T) float32.
            reward_A: (A,) float32; the answers to one question stand behind each other.
            beta: what each nat between policy and reference costs.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, summed over the tokens of the answers."""

    def compares_with_reference(self) -> bool:
        """Whether the reference's log p is part of what is learned."""
        return self.config.beta > 0

    def next_beta(self, beta: float, kl: float) -> float:
        """beta after a rollout whose answers are so far from the reference, in nats of an answer."""
        return beta

    def answers_to_each(self) -> int:
        """How many answers to one question a rollout has."""
        return 1

    # ------------------------------------------------------------------------ the stage

    def load_data(self) -> Examples:
        """Find the questions that the settings name."""
        return records.find(self.config.text, "questions, .jsonl or .json: conversations, or records with `prompt` and "
                                              "perhaps `answer`")

    def tokenize(self, tokenizer: Tokenizer | None) -> PromptDataset:
        """Make tokens of the questions by the tokenizer of the model."""
        if tokenizer is None:
            raise BardletError("a model that answers already learns from its own answers: name it with --init DIR")
        return prompts.tokenize_prompts(self.source, tokenizer, self.progress)

    def parts(self) -> tuple[Prompts, Prompts]:
        """(training, held-out) questions that leave room for an answer."""
        return prompts.split(self.data, self.config)

    def begin(self, out: str | None, begun: float, run: Path | None = None) -> Trainer:
        """A run before its first step (`Stage.begin`)."""
        rewards.named(self.config)  # before the long part
        return super().begin(out, begun, run)

    def new_record(self, tokenizer: Tokenizer) -> RolloutsRecord:
        """What run.toml says of the questions."""
        learned, held = self.parts()
        there = len(self.data.train) + (len(self.data.val) if self.config.val_part == "val" else 0)
        return RolloutsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(learned),
            tokens=sum(map(len, learned.ids)), minutes=self.config.minutes,
            left_out=there - len(learned) - len(held))

    def describe_loss(self) -> str:
        """The validation loss with its units."""
        return f"{self.record.val_loss:.4f}, which is minus the mean reward of held-out answers"

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """A `Trainer` at step 0 (`Stage.build_trainer`) of the policy `model`, beside its reference and the reward."""
        config, init = self.config, Path(str(self.config.init))
        check_base(config, self.record, hf.weights_hash(init))
        reference = hf.read_folder(init)[0].to(self.dist.device)
        learned, held = self.parts()
        reward = rewards.build(config, [*learned.questions, *held.questions], self.dist)
        if isinstance(reward, rewards.RewardModelScorer):
            known = hf.weights_hash(Path(str(config.reward)))
            self.record.reward_hash = self.record.reward_hash or known
            if self.record.reward_hash != known:
                raise BardletError(f"{config.reward}: is not the reward model any more that the run began with; "
                                   "put it back")
        self.actor = Actor(model, reference, reward, self.data.tokenizer, config, self.dist, self.record)
        self.model = self.build_policy(model)
        return super().build_trainer(run, self.model, resumed)

    def objective(self, config: C) -> Objective:
        """Batches of the policy's own answers, what the algorithm makes of them, and minus the held-out reward."""
        learned, held = self.parts()
        self.actor = replace(self.actor, config=config)
        rollouts = Rollouts(self, learned)
        looked_at = held.evenly_spread(EVAL_PROMPTS)
        self.record.batches = max(1, len(learned) * rollouts.answers * rollouts.period // config.rollout)

        def evaluate(_: Any) -> float:
            if not self.dist.main:  # only rank 0 makes use of it
                return 0.0
            return -float(self.actor.evaluate_policy(looked_at)[1].mean())

        return Objective(rollouts.batch, self.loss, losses.count_targets, evaluate, rollouts.place, rollouts.widest,
                         all_logits=True, metadata=lambda: rollouts.facts, stage_state=rollouts, period=rollouts.period)

    def plan_default(self, trainer: Trainer) -> None:
        """Plan ROLLOUTS rollouts, where neither --steps nor --minutes says something else."""
        if trainer.config.steps is None and trainer.config.minutes is None:
            trainer.state.steps = ROLLOUTS * trainer.objective.period
            trainer.config = replace(trainer.config, steps=trainer.state.steps)

    def evaluate_before(self, trainer: Trainer) -> None:
        """Put on record what the answers of the model are worth before it learns."""
        if self.progress:
            self.progress("what its answers are worth before", 0, None)
        learned, held = self.parts()

        def before() -> np.ndarray:
            worth_A, held_A = (self.actor.evaluate_policy(asked.evenly_spread(EVAL_PROMPTS), heat)[1] for asked, heat in
                               ((learned, self.config.temperature), (held, None)))
            deviation = worth_A.std(dtype=np.float64)
            if deviation <= LOW_DIVERSITY * max(1.0, abs(worth_A.mean())):  # what is left is rounding
                deviation = 0.0
            return np.array([worth_A.mean(), deviation, held_A.mean()], np.float32)

        mean, deviation, held_mean = map(float, from_main(self.dist, before, 3))
        if not deviation:
            log.warning("all answers of %s are worth the same, %g: there is nothing to learn from comparing them; "
                        "fine-tune it first, or give it more --answer-tokens", self.config.init, mean)
        self.record.update(reward_mean=mean, reward_deviation=deviation or 1.0, reward_before=round(held_mean, 4))

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """What a plan says of the questions, and how often the planned steps ask them."""
        r, c, held = self.record, self.config, len(self.parts()[1])
        number = self.answers_to_each()
        each = f"{number} answers to each question, " if number > 1 else ""
        lines = [f"questions: {r.text}, {r.documents:,} to learn from, {held:,} held out",
                 f"reward: {c.reward}; {r.reward_before:.4f} on average for held-out answers of {c.init}",
                 f"rollouts: of {c.rollout} answers of up to {c.answer_tokens} tokens, {each}"
                 f"{trainer.objective.period} steps each"]
        if r.left_out:
            lines.append(f"left out, too long for the window of {c.block_size} tokens with an answer: "
                         f"{r.left_out:,}")
        return lines, trainer.state.steps / r.batches

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        worse = "; less than before: a lower --lr and --muon-lr, more --steps or a larger --rollout may help"
        r = self.record
        return [f"held-out questions: a mean reward of {r.reward_before:.4f} before, {r.reward_after:.4f} after; "
                f"answers are {r.kl:.2f} nats from the model that it began with, {r.ended:.0%} end by themselves, "
                f"{r.different:.0%} are different ({r.different_before:.0%} before)"
                + worse * (r.reward_after < r.reward_before)]

    def measure(self, trainer: Trainer) -> str:
        """Put on record what held-out answers show, before and after, and draw the curves; return some of them."""
        plots.reward_curve(trainer.run, card.title(trainer.run, self.record))
        asked = self.parts()[1].evenly_spread(EVAL_PROMPTS)
        alone = Dist(0, 1, trainer.dist.device)  # the other processes have left
        policy = hf.read_folder(trainer.run)[0].to(trainer.dist.device)
        before, after = (replace(self.actor, policy=model, dist=alone) for model in (self.actor.reference, policy))
        answers = []
        for when, player in (("_before", before), ("", after)):  # drawn: the likeliest answers say nothing of these
            made, worth_A = player.evaluate_policy(asked, self.config.temperature)
            found = rollout.rollout_stats(made, worth_A)
            self.record.update(**{f"different{when}": round(found.different, 4),
                                  f"distinct{when}": round(found.distinct, 4),
                                  f"sampled{when or '_after'}": round(found.reward, 4)})
            answers.append(made.answers)
        self.record.update(reward_after=round(-self.record.val_loss, 4), kl=round(after.kl(made), 4),
                           ended=round(found.ended, 4), answer_length=round(found.tokens, 2))
        every = max(1, len(asked) // SAMPLES)
        decode = self.data.tokenizer.decode
        return "\n\n".join(f"{decode(ids.tolist())}\n  before: {one.text}\n  after:  {other.text}"
                           for ids, one, other in list(zip(asked.ids, *answers, strict=True))[::every][:SAMPLES])


@dataclass(frozen=True)
class Actor:
    """A policy, its reference, and what answers are worth: it writes answers and says what they show."""

    policy: Any
    reference: Any
    reward: Scorer
    tokenizer: Tokenizer
    config: RolloutConfig
    dist: Dist
    record: RolloutsRecord

    def sample(self, asked: Prompts, which: np.ndarray, number: int, temperature: float, dist: Dist) -> Rollout:
        """Answers to the prompts `which`, a function of (seed, number); each process of `dist` writes its share."""
        seeds = [_seed(self.config.seed, number, i) for i in range(len(which))]
        return rollout.sample_rollout(self.policy, self.tokenizer, asked, which.tolist(), seeds, self.config, dist, temperature)

    def score(self, made: Rollout) -> np.ndarray:
        """What the answers are worth, (A,) float32, as the reward says it."""
        return self.reward(made.questions, made.answers)

    def normalize_rewards(self, made: Rollout, worth_A: np.ndarray) -> np.ndarray:
        """The rewards that are learned from, (A,) float32: in deviations of those of the reference's answers, and from
        their mean; less UNENDED where a reward model judges and an answer did not end. `exact` stays 0 and 1."""
        if self.config.reward == EXACT:
            return worth_A
        found_A = (worth_A - self.record.reward_mean) / self.record.reward_deviation
        if isinstance(self.reward, rewards.RewardModelScorer):
            found_A = found_A - MISSING_EOS_PENALTY * np.array([not answer.ended for answer in made.answers])
        return found_A.astype(np.float32)

    def log_probability(self, model: Any, made: Rollout) -> torch.Tensor:
        """log p of what was written, by the policy or the reference: (A, T) float32."""
        return rollout.log_probability(model, made, self.config, self.dist)

    def kl(self, made: Rollout) -> float:
        """Nats of an answer by which the policy left its reference, as these answers tell it."""
        one_AT, other_AT = (self.log_probability(model, made) for model in (self.policy, self.reference))
        return (one_AT - other_AT).sum(1).mean().item()

    def evaluate_policy(self, held: Prompts, temperature: float | None = None) -> tuple[Rollout, np.ndarray]:
        """(an answer to each of the held-out prompts, what they are worth (A,)), always by the same random numbers.

        With --reward exact the likeliest answers, where no temperature is given. By this process alone: others may not
        be there.
        """
        if temperature is None:
            temperature = 0.0 if self.config.reward == EXACT else self.config.temperature
        made = self.sample(held, np.arange(len(held)), -1, temperature, Dist(0, 1, self.dist.device))
        return made, self.score(made)


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

    def __init__(self, stage: RL[Any], learned: Prompts) -> None:
        config = stage.config
        self.stage, self.actor, self.learned, self.config = stage, stage.actor, learned, config
        self.updates = config.rollout // (config.batch_size * config.grad_accum)  # of a pass
        self.period = self.updates * config.passes  # steps that learn from one rollout
        self.answers = stage.answers_to_each()
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

    def batch(self, step: int) -> Batch:
        """The batch of a step: some answers of its rollout, each once in a pass. A rollout's first batch makes it."""
        number, within = divmod(step, self.period)
        if number != self.number:
            self.number, self.rows = number, self.rolled_out(number)
        a_pass, place = divmod(within, self.updates)
        random = np.random.default_rng([self.config.seed % 2**64, number, a_pass])
        which = random.permutation(self.config.rollout).reshape(self.updates, -1)[place]
        return {name: x[torch.from_numpy(which)] for name, x in self.rows.items()}

    def rolled_out(self, number: int) -> Batch:
        """The answers of rollout `number` from 0 on, with all that is learned from them: rows of a batch."""
        config, actor = self.config, self.actor
        questions = prompts.sample_prompts(number, config.rollout // self.answers, len(self.learned), config.seed)
        made = actor.sample(self.learned, questions.repeat(self.answers), number, config.temperature, actor.dist)
        # one process asks: a program may be dear, and all have to hear the same
        worth_A = from_main(actor.dist, lambda: actor.score(made), len(made.answers))
        batch = {"idx": made.idx_AT, "target": made.target_AT}
        compared = self.stage.compares_with_reference()
        if compared or self.period > 1:  # who learns once from a rollout is still the one that wrote it
            batch["old"] = actor.log_probability(actor.policy, made)
        if compared:
            batch["reference"] = actor.log_probability(actor.reference, made)
            kl = (batch["old"] - batch["reference"]).sum(1).mean().item()
        else:  # it is told, and no more: one answer to each question is enough
            kl = actor.kl(made.part(slice(None, None, self.answers)))
        found = rollout.rollout_stats(made, worth_A)
        self.beta = self.stage.next_beta(self.beta, kl)
        self.facts = {"reward": found.reward, "kl": kl, "answer_tokens": found.tokens, "ended": found.ended,
                      "different": found.different, "beta": self.beta}
        reward_A = torch.from_numpy(actor.normalize_rewards(made, worth_A))
        return {**batch, **self.stage.compute_advantages(self.stage.model, batch, reward_A, self.beta)}

    def widest(self) -> Batch:
        """A batch as large as any could be: an answer in every place."""
        size = (self.config.batch_size * self.config.grad_accum, self.config.block_size)
        ids, ones = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
        return {"idx": ids, "target": ids, **dict.fromkeys(("old", "reference", "advantage", "value", "return"), ones)}

    def place(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        number, within = divmod(step, self.period)
        return f"update {within + 1} of rollout {number + 1}"
