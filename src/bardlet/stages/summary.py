"""Lines that a run prints, and the values of --json: the plan before training, the results after it."""

from __future__ import annotations

import math
from typing import Any

from bardlet import console
from bardlet.config.model import ModelConfig
from bardlet.errors import quoted
from bardlet.planning import scaling_law
from bardlet.planning.plan import short_number
from bardlet.runtime import contention, parallelize
from bardlet.stages.base import AnyStage
from bardlet.training.state import Trainer

SHORT_TIMED_RUN = 200
"""Steps of a timed run, below which its end asks for more time."""

HEADINGS = {"sample": "sample of the model:", "": "completions and their rewards:"}
"""Headings of the sample at the end of a run, by `Stage.use`."""


def _end(trainer: Trainer, steps: int, estimate: float | None) -> str:
    """Return the end of the plan line: the time budget, and why a run will not use all of it.

    estimate: seconds that the run will take.
    """
    if not trainer.record.minutes:
        return ""
    minutes = _minutes(trainer.record.minutes)
    if steps + 1 >= (trainer.record.most_steps or math.inf):  # the estimate is rounded, the maximum rounded up
        ends = f"less than {minutes}"
        if estimate and estimate < 0.9 * 60 * trainer.record.minutes:
            ends = f"{console.duration(estimate)} instead of {minutes}"
        return f", ends in {ends}: more steps would only memorize the text"
    return f", ends in {minutes} or less"


def say_plan(trainer: Trainer, stage: AnyStage) -> dict[str, Any]:
    """Print data, model and plan, and return what --json prints of the plan."""
    c, tokens, model = trainer.config, trainer.config.tokens_per_step, trainer.model.config
    lines, epochs = stage.describe(trainer)
    steps = c.replans[-1][1] if c.replans else trainer.state.steps  # a repeated run knows the clock's last decision
    for line in lines:
        console.say(line)
    unit = "characters" if stage.data.tokenizer.kind == "char" else "tokens"
    console.say(f"model: {model.model}, {_shape(model)}, context {c.block_size} {unit}, "
                f"{trainer.record.parameters:,} parameters"
                + (f"; LoRA of rank {c.lora}: {trainer.record.trainable:,} trainable" if c.lora else ""))
    for reason in trainer.record.reasons or []:
        console.say(f"  {reason}")
    optimizer = "muon" if len(trainer.optimizers) > 1 else "adamw"  # the bigram table has no matrices for Muon
    size = f"{'' if stage.material == 'text' else 'up to '}{tokens:,} tokens"
    about = "about " * (trainer.record.minutes is not None and not c.replans)
    console.say(f"plan: {about}{console.count(steps, 'step')} of {size} "
                f"({_epochs(epochs * steps / trainer.state.steps)} of the {stage.material}), {optimizer}, "
                f"{c.dtype}{', compiled' if trainer.machine['compiled'] else ''}"
                f"{', activations computed again' if c.recompute == 'on' else ''}, "
                f"{console.count(trainer.machine['threads'], 'thread')}{_processes(trainer)}"
                + _end(trainer, steps, stage.estimate))
    if expected := stage.prediction():
        console.say(f"predicted validation loss: {expected}" if trainer.record.expected else expected)
    return {"steps": steps, "tokens_per_step": tokens, "parameters": trainer.record.parameters, "model": model.model,
            "tokenizer": stage.data.tokenizer.kind, "compiled": trainer.machine["compiled"],
            "expected": trainer.record.expected, "reasons": trainer.record.reasons or []}


def _processes(trainer: Trainer) -> str:
    """Return how many processes there are, if several, and whether each has a copy of the model or a share of it."""
    if trainer.dist.world == 1:
        return ""
    how = "a share" if parallelize.is_sharded(trainer.model) else "a copy"
    return f", {trainer.dist.world} processes with {how} of the model each"


def _epochs(epochs: float) -> str:
    number = short_number(epochs)
    return f"{number} epoch" + "s" * (number != "1")


def _minutes(minutes: float) -> str:
    return "a minute" if minutes == 1 else f"{minutes:g} minutes"


def _shape(model: ModelConfig) -> str:
    """Return the shape of a model in words. A rung of the ladder counts 1 of each part it lacks."""
    if model.model == "bigram":
        return "a table"
    counts = ((model.n_layer, "layer"), (model.n_head, "head"), (model.n_embd, "channel"))
    encoder = f"{model.n_encoder_layer} and " if model.n_encoder_layer else ""
    return encoder + ", ".join(console.count(number, noun) for number, noun in counts)


def say_result(trainer: Trainer, stage: AnyStage, resumed_from: int | None) -> dict[str, Any]:
    """Finish the run, print its results and where they are, and return what --json prints."""
    facts, sample = stage.finish(trainer)
    console.say(f"\n{HEADINGS.get(stage.use, 'samples of the model:')}\n\n{console.shown(sample)}\n")
    mean = f", mean of the last {facts['averaged']:,} steps" if facts.get("averaged") else ""
    console.say(f"{stage.validation_label} {stage.describe_loss()} ({facts['selected_by']} weights, "
                f"step {facts['selected_step']:,}{mean}); {console.count(facts['steps'], 'step')} in "
                f"{console.clock_time(facts['seconds'])}")
    _say_prediction(trainer, stage, facts)
    for line in stage.results():
        console.say(line)
    curves = "loss curve" if stage.loss_is_telling else "curves"  # of rewards
    console.say(f"saved to {trainer.run}; try `bardlet {_next_command(trainer, stage)}`; "
                f"{curves}: {trainer.run / 'loss.png'}")
    return {"run": str(trainer.run), "steps": trainer.state.step, "resumed_from": resumed_from,
            "seconds": round(trainer.state.seconds, 3), "train_loss": facts.get("train_loss"),
            "val_loss": facts["val_loss"], "nats_per_char": facts.get("nats_per_char"),
            "expected": facts.get("expected"), "selected_by": facts["selected_by"],
            "tokens_per_second": facts["tokens_per_second"], "parameters": facts["parameters"],
            **stage.record.for_json()}


def _say_prediction(trainer: Trainer, stage: AnyStage, facts: dict[str, Any]) -> None:
    """Compare the loss with the one that was predicted for the steps of the last plan; say why steps were missing."""
    minutes, steps = trainer.record.minutes, trainer.state.step
    if minutes and steps < SHORT_TIMED_RUN and steps < (trainer.record.most_steps or math.inf):
        busy = contention.slowdown()
        reason = f"; the machine is busy: {contention.describe(busy)}" if busy > 1 else ""
        console.say(f"only {console.count(steps, 'step')} fit into {_minutes(minutes)}{reason}; for a better model "
                    f"give more time, as in --minutes {_more_minutes(minutes, steps)}")
    if not (expected := facts.get("expected")):
        planned = [steps for _, steps in trainer.state.replans]
        if minutes and facts.get("counting") and steps < scaling_law.MIN_STEPS <= max(planned, default=0):
            console.say(f"no prediction to compare with: a plan had {scaling_law.MIN_STEPS:,} steps or more, but only "
                        f"{console.count(steps, 'step')} fit into {_minutes(minutes)}")
        return
    loss, drift = facts["nats_per_char"], facts.get("drift") or 0.0
    low, high = scaling_law.band(expected, drift)
    verdict = "" if low <= loss <= high else ", outside the predicted range"
    console.say(f"predicted: {scaling_law.describe(expected, drift)}; got {loss:.4f}{verdict}")


def _more_minutes(minutes: float, steps: int) -> str:
    """Return minutes for SHORT_TIMED_RUN steps at the pace of a run, as people say them."""
    needed = minutes * SHORT_TIMED_RUN / max(1, steps)
    return f"{next((n for n in (1, 2, 3, 5, 10, 20, 30, 60, 120) if n >= needed), 240)}"


def _next_command(trainer: Trainer, stage: AnyStage) -> str:
    """Return the command that uses the finished model, without `bardlet`."""
    run = quoted(trainer.run)
    if stage.unready():
        return f"resume {run} --steps {max(stage.longer(trainer), 2 * trainer.state.step)} --allow-change"
    if stage.use:
        return f"{stage.use} {run}"
    return f"ppo {quoted(getattr(trainer.config, 'init', 'MODEL'))} chats.jsonl --reward {run}"
