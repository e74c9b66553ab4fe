"""Reinforcement learning: sample completions, score them, update the policy.

PPO and GRPO differ in the advantages and the loss (`stages/ppo.py`, `stages/grpo.py`); this module has the shared part.
A rollout is sampled when a step first asks for one of its batches. The reference is the model of --init.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
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
from bardlet.run import card, hf, hub, plots
from bardlet.run.record import RolloutsRecord
from bardlet.runtime import parallelize
from bardlet.runtime.distributed import Dist
from bardlet.stages import rewards
from bardlet.stages.actor import Actor
from bardlet.stages.finetuning import FineTuning, check_base
from bardlet.stages.rollout import rollout_stats
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

ROLLOUTS = 100
"""Default number of rollouts, without --steps and --minutes."""
LOW_DIVERSITY = 1e-6
"""Rewards count as equal if their standard deviation is at most this fraction of max(1, |mean|)."""
EVAL_PROMPTS = 256
"""Held-out prompts of an evaluation, at most, evenly spread."""
SAMPLES, WATCHED = 4, 5
"""Held-out prompts in the sample of a finished run, and in those of its evaluations."""

C = TypeVar("C", bound=RolloutConfig)


class RL(FineTuning[C, Examples, PromptDataset, RolloutsRecord]):
    """Base class of PPO and GRPO: prompts, rollouts and rewards."""

    material = "prompts"
    unit = "completion tokens"
    template = "rollouts"
    record_class = RolloutsRecord
    loss_is_telling = False
    validation_label = "held-out reward"
    actor: Actor
    """Samples and scores completions."""
    model: Any
    """The trained module, built from the policy by `build_policy`."""

    # ------------------------------------------------------------------------ the algorithm

    @abstractmethod
    def build_policy(self, policy: Any) -> Any:
        """Return the module to train, which contains the policy."""

    @abstractmethod
    def compute_advantages(self, model: Any, batch: Batch, reward_A: torch.Tensor,
                           beta: float) -> dict[str, torch.Tensor]:
        """Return the advantages of a rollout batch, with anything else that the loss needs.

        Args:
            model: the trained module.
            batch: `idx`, `target` (A, T) int64; if needed `old`, `reference` (A, T) float32.
            reward_A: (A,) float32; completions of the same prompt are adjacent.
            beta: KL coefficient, per nat.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, summed over completion tokens."""

    def uses_reference(self) -> bool:
        """Return True if training needs the reference's log-probabilities."""
        return self.config.beta > 0

    def next_beta(self, beta: float, kl: float) -> float:
        """Return the KL coefficient after a rollout with a mean KL of `kl` nats per completion."""
        return beta

    def completions_per_prompt(self) -> int:
        """Return the number of completions that a rollout samples for each prompt."""
        return 1

    # ------------------------------------------------------------------------ the stage

    def load_data(self) -> Examples:
        """Find the prompt files named in the settings."""
        return records.find(self.config.text, "prompts: conversations, or records with `prompt` and an optional "
                            "`answer`", self.config.max_bad)

    def tokenize(self, tokenizer: Tokenizer | None) -> PromptDataset:
        """Tokenize the prompts with the model's tokenizer."""
        if tokenizer is None:
            raise BardletError("reinforcement learning starts from a chat model; name it with --init DIR")
        return prompts.tokenize_prompts(self.source, tokenizer, self.progress)

    def parts(self) -> tuple[Prompts, Prompts]:
        """Return (training, held-out) prompts that leave room for a completion."""
        return prompts.split(self.data, self.config)

    def eval_prompts(self) -> Prompts:
        """Return the held-out prompts of an evaluation."""
        return self.parts()[1].evenly_spread(EVAL_PROMPTS)

    def begin(self, out: str | None, started: float, run: Path | None = None) -> Trainer:
        """Return a trainer before its first step (see `Stage.begin`)."""
        rewards.find_command(self.config)  # fail before the slow part
        return super().begin(out, started, run)

    def new_record(self, tokenizer: Tokenizer) -> RolloutsRecord:
        """Return the record of a new run, with its statistics of the prompts."""
        train, validation = self.parts()
        total = len(self.data.train) + (len(self.data.val) if self.config.val_part == "val" else 0)
        return RolloutsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(train),
            tokens=sum(map(len, train.ids)), minutes=self.config.minutes,
            left_out=total - len(train) - len(validation))

    def describe_loss(self) -> str:
        """Return the mean reward of held-out completions: minus the validation loss."""
        return f"{-self.record.val_loss:z.4f} per completion"

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """Return a `Trainer` at step 0 for the policy `model`, with its reference and scorer.

        See `Stage.build_trainer`.
        """
        config, init = self.config, hub.folder(str(self.config.init))
        check_base(config, self.record, hf.weights_hash(init))
        reference = hf.read_folder(init)[0].to(self.dist.device)
        train, validation = self.parts()
        scorer = rewards.build(config, [*train.questions, *validation.questions], self.dist, self.record)
        if isinstance(scorer, rewards.RewardModelScorer):
            reward_hash = hf.weights_hash(Path(str(config.reward)))
            self.record.reward_hash = self.record.reward_hash or reward_hash
            if self.record.reward_hash != reward_hash:
                raise BardletError(f"{config.reward}: no longer the reward model that this run started with; "
                                   "restore the original weights")
        self.actor = Actor(model, reference, scorer, self.data.tokenizer, config, self.dist, self.record)
        self.model = self.build_policy(model)
        return super().build_trainer(run, self.model, resumed)

    def objective(self, config: C) -> Objective:
        """Return batches of rollouts, the algorithm's loss, and minus the held-out reward as evaluation."""
        train = self.parts()[0]
        self.actor = replace(self.actor, config=config)
        rollouts = Rollouts(self, train)
        validation = self.eval_prompts()
        self.record.batches = max(1, len(train) * rollouts.group * rollouts.period // config.rollout)

        def evaluate(_: Any) -> float:
            with parallelize.whole(self.model):
                # only rank 0 uses the result
                return -float(self.actor.evaluate_policy(validation)[1].mean()) if self.dist.main else 0.0

        return Objective(rollouts.batch, self.loss, losses.count_targets, evaluate, rollouts.describe_batch,
                         rollouts.widest, all_logits=True, metadata=lambda: rollouts.metadata, stage_state=rollouts,
                         period=rollouts.period)

    def plan_default(self, trainer: Trainer) -> None:
        """Plan ROLLOUTS rollouts if neither --steps nor --minutes is given."""
        if trainer.config.steps is None and trainer.config.minutes is None:
            trainer.state.steps = ROLLOUTS * trainer.objective.period
            trainer.config = replace(trainer.config, steps=trainer.state.steps)

    def evaluate_before(self, trainer: Trainer) -> None:
        """Record the rewards before training: mean and deviation on training prompts, mean on held-out prompts."""
        if self.progress:
            self.progress("measuring the reward before training", 0, None)
        train, validation = self.parts()

        def before() -> np.ndarray:
            (rollout, train_A), (_, validation_A) = (
                self.actor.evaluate_policy(part.evenly_spread(EVAL_PROMPTS), temperature)
                for part, temperature in ((train, self.config.temperature), (validation, None)))
            stats = rollout_stats(rollout, train_A)
            low = stats.deviation <= LOW_DIVERSITY * max(1.0, abs(train_A.mean()))  # only rounding errors
            accuracy = math.nan if stats.accuracy is None else stats.accuracy
            return np.array([train_A.mean(), 0.0 if low else stats.deviation, validation_A.mean(), stats.ended,
                             stats.tokens, accuracy], np.float32)

        with parallelize.whole(self.model):
            mean, deviation, held_out, ended, tokens, accuracy = map(float, broadcast_from_main(self.dist, before, 6))
        if not deviation:
            log.warning("all completions of %s get the same reward, %g; the model learns nothing until a completion "
                        "gets another one; fine-tune it first, or raise --answer-tokens", self.config.init, mean or 0.0)
        self.record.update(
            reward_mean=mean, reward_deviation=deviation or 1.0, reward_before=round(held_out, 4), ended_before=ended,
            answer_length_before=tokens, accuracy_before=None if math.isnan(accuracy) else accuracy)

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""
        r, c, validation = self.record, self.config, self.parts()[1]
        group = self.completions_per_prompt()
        per_prompt = f", {group} per prompt" if group > 1 else ""
        lines = [f"prompts: {r.text}, {r.documents:,} for training, {len(validation):,} held out",
                 f"reward: {c.reward}; {c.init} gets {r.reward_before:z.4f} on average on held-out prompts",
                 f"rollouts: {c.rollout} completions of up to {c.answer_tokens} tokens{per_prompt}; "
                 f"{trainer.objective.period} steps per rollout"]
        if r.left_out:
            lines.append(f"left out, no room for a completion in the context window of {c.block_size} tokens: "
                         f"{r.left_out:,}")
        return lines, trainer.state.steps / r.batches

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        r = self.record
        advice = "; the reward fell: try a lower --lr and --muon-lr, more --steps or a larger --rollout"
        return [f"reward on {len(self.eval_prompts()):,} held-out prompts: {r.reward_before:z.4f} before, "
                f"{r.reward_after:z.4f} after" + advice * (r.reward_after < r.reward_before),
                f"held-out completions: estimated KL {r.kl:z.2f} nats from {self.config.init}; {r.ended:.0%} end with "
                f"a stop token; {r.different:.0%} are distinct, {r.different_before:.0%} before"]

    def sample(self, trainer: Trainer, tokens: int) -> str:
        """Return the policy's answers to the same few held-out prompts, each with its reward and its KL."""
        watched, actor = self.parts()[1].evenly_spread(WATCHED), self.actor
        rollout, reward_A = actor.evaluate_policy(watched)
        kl_A = actor.kl_of_each(rollout)
        return "\n\n".join(
            f"{self.data.tokenizer.decode(ids.tolist())}\n  -> {completion.text}\n"
            f"     (reward {reward:z.3g}, KL {kl:z.2f})"
            for ids, completion, reward, kl in zip(watched.ids, rollout.completions, reward_A, kl_A, strict=True))

    def measure(self, trainer: Trainer) -> str:
        """Record statistics of held-out completions before and after, draw the curves and return some of them."""
        plots.reward_curve(trainer.run, card.title(trainer.run, self.record))
        validation = self.eval_prompts()
        alone = Dist(0, 1, trainer.dist.device)  # the other ranks have exited
        policy = hf.read_folder(trainer.run)[0].to(trainer.dist.device)
        before, after = (replace(self.actor, policy=model, dist=alone) for model in (self.actor.reference, policy))
        completions = []
        for suffix, actor in (("_before", before), ("", after)):  # sampled: greedy completions show no diversity
            rollout, reward_A = actor.evaluate_policy(validation, self.config.temperature)
            stats = rollout_stats(rollout, reward_A)
            self.record.update(**{f"different{suffix}": round(stats.different, 4),
                                  f"distinct{suffix}": round(stats.distinct, 4),
                                  f"sampled{suffix or '_after'}": round(stats.reward, 4)})
            completions.append(rollout.completions)
        self.record.update(reward_after=round(-self.record.val_loss, 4), kl=round(after.kl(rollout), 4),
                           ended=round(stats.ended, 4), answer_length=round(stats.tokens, 2))
        every = max(1, len(validation) // SAMPLES)
        decode = self.data.tokenizer.decode
        return "\n\n".join(f"{decode(ids.tolist())}\n  before: {old.text}\n  after:  {new.text}"
                           for ids, old, new in list(zip(validation.ids, *completions, strict=True))[::every][:SAMPLES])


def broadcast_from_main(dist: Dist, compute: Callable[[], np.ndarray], size: int) -> np.ndarray:
    """Run `compute` on rank 0 and return its `size` numbers on every rank: (size,) float32."""
    values = torch.from_numpy(compute()) if dist.main else torch.zeros(size, dtype=torch.float32)
    return dist.sum(values.to(dist.device)).cpu().numpy()


class Rollouts:
    """The rollouts of a run, in batches. Checkpoints save it as a `StageState`."""

    def __init__(self, stage: RL[Any], train: Prompts) -> None:
        config = stage.config
        self.stage, self.actor, self.prompts, self.config = stage, stage.actor, train, config
        self.updates = config.rollout // (config.batch_size * config.grad_accum)  # per pass
        self.period = self.updates * config.passes  # steps per rollout
        self.group = stage.completions_per_prompt()
        self.load({})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the current rollout, its metadata and beta."""
        metadata = {f"fact/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.metadata.items()}
        number, beta = torch.tensor(self.number), torch.tensor(self.beta, dtype=torch.float64)
        return {**self.rows, **metadata, "number": number, "beta": beta}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state that `tensors` returned; an empty dict is the initial state."""
        rest = dict(tensors)
        self.number = int(rest.pop("number", torch.tensor(-1)))
        self.beta = float(rest.pop("beta", torch.tensor(self.config.beta, dtype=torch.float64)))
        self.metadata = {name[5:]: float(rest.pop(name)) for name in tensors if name.startswith("fact/")}
        self.rows = rest

    def batch(self, step: int) -> Batch:
        """Return the batch of a step; each pass has every completion once. Samples a new rollout when one is due."""
        number, within = divmod(step, self.period)
        if number != self.number:
            with parallelize.whole(self.stage.model):
                self.number, self.rows = number, self.sample(number)
        pass_number, update = divmod(within, self.updates)
        random = np.random.default_rng([self.config.seed % 2**64, number, pass_number])
        indices = random.permutation(self.config.rollout).reshape(self.updates, -1)[update]
        return {name: x[torch.from_numpy(indices)] for name, x in self.rows.items()}

    def sample(self, number: int) -> Batch:
        """Sample rollout `number`, from 0 on, and return its batch with rewards and advantages."""
        config, actor = self.config, self.actor
        indices = prompts.sample_prompts(number, config.rollout // self.group, len(self.prompts), config.seed)
        rollout = actor.sample(self.prompts, indices.repeat(self.group), number, config.temperature, actor.dist)
        # rank 0 scores for all: a command may be slow, and all ranks need the same rewards
        reward_A = broadcast_from_main(actor.dist, lambda: actor.score(rollout), len(rollout.completions))
        batch = {"idx": rollout.idx_AT, "target": rollout.target_AT}
        uses_reference = self.stage.uses_reference()
        if uses_reference or self.period > 1:  # with one step per rollout, the policy is the one that sampled it
            batch["old"] = actor.log_probability(actor.policy, rollout)
        if uses_reference:
            batch["reference"] = actor.log_probability(actor.reference, rollout)
            kl = (batch["old"] - batch["reference"]).sum(1).mean().item()
        else:  # only logged, so one completion per prompt is enough
            kl = actor.kl(rollout.part(slice(None, None, self.group)))
        stats = rollout_stats(rollout, reward_A, self.group)
        self.beta = self.stage.next_beta(self.beta, kl)
        self.metadata = {"rollout": number, "reward": stats.reward, "kl": kl, "answer_tokens": stats.tokens,
                         "ended": stats.ended, "different": stats.different, "deviation": stats.deviation,
                         "beta": self.beta}
        if stats.accuracy is not None and config.reward != EXACT:
            self.metadata["accuracy"] = stats.accuracy
        normalized_A = torch.from_numpy(actor.normalize_rewards(rollout, reward_A))
        return {**batch, **self.stage.compute_advantages(self.stage.model, batch, normalized_A, self.beta)}

    def widest(self) -> Batch:
        """Return a batch of the largest possible size: a target at every position."""
        size = (self.config.batch_size * self.config.grad_accum, self.config.block_size)
        ids, ones = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
        return {"idx": ids, "target": ids, **dict.fromkeys(("old", "reference", "advantage", "value", "return"), ones)}

    def describe_batch(self, step: int) -> str:
        """Return the rollout and update number of a step, as text."""
        number, within = divmod(step, self.period)
        return f"update {within + 1} of rollout {number + 1}"
