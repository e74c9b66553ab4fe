"""`bardlet train`: a text goes in, a run folder comes out. `bardlet resume` starts from the same parts."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.config.model import ModelConfig
from bardlet.config.settings import OF_REWARDS, PARALLEL, StageName, TrainConfig, option
from bardlet.config.toml import read_toml, settings_in
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.training.state import State, Trainer

log = logging.getLogger("bardlet")

Kind = TypeVar("Kind", bound="Command")
RESULTS = ("bleu", "chrf", "val_loss_before", "ended", "accuracy", "longer", "margin", "accuracy_longer",
           "accuracy_shorter", "likes_length", "calibration_error", "reward_before", "reward_after", "sampled_before",
           "sampled_after", "kl", "answer_length", "different_before", "different", "distinct_before", "distinct")
"""What --json prints of the results of some stages."""


UNITS = {"sft": "answer tokens", "reward": "pairs", "dpo": "pairs", "ppo": "answer tokens", "grpo": "answer tokens"}
"""What the steps of some stages count."""


@dataclass(frozen=True)
class Command(TrainConfig):
    """Train a model on a text. The result is a Hugging Face model folder, and a run that can be resumed."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora (`bardlet data` lists them), files, folders or globs; none: Tiny Shakespeare."""
    stage: tyro.conf.Suppress[StageName] = "pretrain"
    pack: tyro.conf.Suppress[bool] = True
    beta: tyro.conf.Suppress[float] = 0.1
    reward: tyro.conf.Suppress[str | None] = None
    rollout: tyro.conf.Suppress[int] = 128
    passes: tyro.conf.Suppress[int] = 1
    group: tyro.conf.Suppress[int] = 8
    answer_tokens: tyro.conf.Suppress[int] = 64
    temperature: tyro.conf.Suppress[float] = 1.0
    clip: tyro.conf.Suppress[float] = 0.2
    target_kl: tyro.conf.Suppress[float | None] = None
    replans: tyro.conf.Suppress[tuple[tuple[int, int], ...]] = ()
    out: str | None = None
    """The run folder to make; none: runs/NAME."""
    config: str | None = None
    """Take the settings of this TOML file; what else is given here goes before them."""
    plan: bool = False
    """Print the plan and stop."""
    json: bool = False
    """Print one JSON object on one line, last."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return start(_read(argv), argv)


def start(command: Command, argv: Sequence[str]) -> int:
    """Begin a run and bring it to its end; returns the exit code. argv: what of the settings was typed."""
    config = TrainConfig(**{f.name: getattr(command, f.name) for f in fields(TrainConfig)})
    if config.steps is None and config.minutes is None and config.stage == "pretrain":
        config = replace(config, minutes=5.0)
    begun = time.monotonic()  # to load torch takes part of the minutes
    from bardlet.cli import resume
    from bardlet.planning import compilation
    from bardlet.run import diagnosis
    from bardlet.runtime import distributed
    from bardlet.stages import pretrain

    stage = stage_of(config)
    if _started_again(command):
        typed = ["--reward", str(command.reward)] if any(word.startswith("--reward") for word in argv) else []
        return resume.main([str(command.out), *typed, *(["--json"] if command.json else [])])
    with distributed.connect(config.device) as dist:
        console.show_notices(dist.main)
        given = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
                 for word in argv if word.startswith("--")}
        in_file = settings_in(Path(command.config)) if command.config else set()
        with console.preparing(dist.main) as progress:
            trainer, data = stage.new_trainer(config, dist, command.out, given, progress, begun, in_file)
        estimated = command.plan and "reasons" in trainer.record  # by the machine's speed, not by this model's steps
        if config.minutes is None:
            compilation.choose_compile(trainer)
        elif not estimated:
            pretrain.plan_steps(trainer, config.minutes * 60, begun, {*given, *in_file})
        stage.expect(trainer, data)
        for found in diagnosis.of_text(trainer.record):
            log.warning(found.said)
        if dist.main:
            plan = _say_plan(trainer, data)
            if command.plan and command.json:
                console.say_json(plan)
        if command.plan:
            return 0
        summary = run_to_end(trainer, data, resumed_from=None, begun=begun)
        if command.json and dist.main:
            console.say_json(summary)
    return 0


def stage_of(config: TrainConfig) -> Any:
    """What these settings train: a file with the names of stages/pretrain.py."""
    from bardlet.stages import pretrain, translation

    if config.stage != "pretrain":
        from bardlet.stages import dpo, reward_model, rl, sft

        return {"sft": sft, "reward": reward_model, "dpo": dpo, "ppo": rl, "grpo": rl}[config.stage]
    return translation if config.parallel else pretrain


def _started_again(command: Command) -> bool:
    """Whether torchrun starts this command again (--max-restarts), and it had begun its run."""
    from bardlet.run import folder
    from bardlet.runtime import heartbeat

    if command.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise BardletError("--max-restarts: processes that are started again must find their run; name it with --out")
    if heartbeat.attempt() == "0" or command.out is None or not (Path(command.out) / "run.toml").exists():
        return False
    return folder.settings(Path(command.out))[1].get("launch") == heartbeat.launch()


def _read(argv: Sequence[str]) -> Command:
    """The command line as settings. Pairs are learned by an encoder-decoder where nobody named another model."""
    typed = {word.partition("=")[0] for word in argv}
    pairs = {"--pair", "--source", "--target", *PARALLEL} & typed and not {"--model", "--init"} & typed
    command = parse(Command, argv, "train", defaults(argv, Command, bool(pairs)))
    if pairs and not command.parallel:  # what looked like the name of pairs was another option's value
        return parse(Command, argv, "train", defaults(argv, Command))
    return command


def defaults(argv: Sequence[str], kind: type[Kind], pairs: bool = False) -> Kind | None:
    """The settings of `--config FILE`, before which the rest of the command line goes; encdec for pairs."""
    words = [word.partition("=") for word in argv]
    files = [value or argv[i + 1] for i, (word, _, value) in enumerate(words)
             if word == "--config" and (value or i + 1 < len(argv))]
    if not files:
        return kind(model="encdec") if pairs else None
    settings, _ = read_toml(Path(files[-1]))
    replans = () if any(word in ("--steps", "--minutes") for word, _, _ in words) else settings.replans
    values = {f.name: getattr(settings, f.name) for f in fields(settings)} | {"replans": replans}
    if (pairs or settings.parallel) and "model" not in settings_in(Path(files[-1])):
        values["model"] = "encdec"
    if any(word == "--minutes" for word, _, _ in words):
        values["steps"] = None
    if any(word == "--steps" for word, _, _ in words):
        values["minutes"] = None
    return kind(**values)


def _say_plan(t: Trainer, data: Any) -> dict[str, Any]:
    """Print text, tokenizer, model and plan, and return the plan's figures."""
    from bardlet.planning.plan import short

    c, tokens = t.config, t.config.tokens_per_step
    what, epochs = stage_of(c).said(t, data)
    steps = c.replans[-1][1] if c.replans else t.state.steps  # a run that is repeated knows what its clock decided
    for line in what:
        console.say(line)
    console.say(f"model: {c.model}, {_shape(t.model.config)}, context {c.block_size}, "
                f"{t.record['parameters']:,} parameters"
                + (f"; LoRA of rank {c.lora}: {t.record['trainable']:,} learn" if c.lora else ""))
    for reason in t.record.get("reasons", []):
        console.say(f"  {reason}")
    optimizer = "muon" if len(t.optimizers) > 1 else "adamw"  # a table has no matrices for Muon
    of_stage = {"sft": "conversations", "reward": "preferences", "dpo": "preferences", "ppo": "questions",
                "grpo": "questions"}
    material = of_stage.get(c.stage, "pairs" if c.parallel else "text")
    console.say(f"plan: {steps:,} steps of {'' if material == 'text' else 'up to '}{tokens:,} tokens "
                f"({short(epochs * steps / t.state.steps)} times the {material}), {optimizer}, "
                f"{c.dtype}{', compiled' if t.machine['compiled'] else ''}, "
                f"{console.count(t.machine['threads'], 'thread')}"
                + (f", to end within {_minutes(t.record['minutes'])}" if t.record.get("minutes") else ""))
    if expected := t.record.get("expected"):
        console.say(f"expected: a validation loss of {_band(expected)} nats per character")
    elif own := t.record.get("untold"):
        what = ", ".join(map(option, own)) if len(own) < 4 else "model, batch and rates"
        console.say(f"expected: nobody knows; a loss is foretold where bardlet chooses {what}, too")
    elif "most_steps" in t.record:
        console.say("expected: nobody knows; the text is too short to tell, or its end is unlike the rest")
    return {"steps": steps, "tokens_per_step": tokens, "parameters": t.record["parameters"], "model": c.model,
            "tokenizer": data.tokenizer.kind, "compiled": t.machine["compiled"], "expected": t.record.get("expected"),
            "reasons": t.record.get("reasons", [])}


def _band(expected: float) -> str:
    """An expected loss with the band that nearly all runs fall into."""
    from bardlet.planning.scaling_law import BAND

    return f"{expected:.2f} ({expected * (1 - BAND):.2f} to {expected * (1 + BAND):.2f})"


def _minutes(minutes: float) -> str:
    return "a minute" if minutes == 1 else f"{minutes:g} minutes"


def _shape(model: ModelConfig) -> str:
    """The size of a model in words; a rung of the ladder counts 1 of what it does not have yet."""
    if model.model == "bigram":
        return "a table"
    counts = ((model.n_layer, "layer"), (model.n_head, "head"), (model.n_embd, "channel"))
    encoder = f"{model.n_encoder_layer} and " if model.n_encoder_layer else ""
    return encoder + ", ".join(console.count(number, what) for number, what in counts)


# ---------------------------------------------------------------- to the end


def run_to_end(t: Trainer, data: Any, resumed_from: int | None, begun: float) -> dict[str, Any]:
    """Train, then leave the model card and the curve, and print where everything lies. Returns what --json prints.

    begun: when this command did (of time.monotonic): what was spent until the first step is part of the run's time.
    """
    from bardlet.run import checkpoint, folder, lock
    from bardlet.runtime import atomic, heartbeat
    from bardlet.runtime.signals import Stopped

    t.config = replace(t.config,
                       eval_every=_eval_every(t) if t.config.eval_every is None else t.config.eval_every,
                       save_every=max(1, t.state.steps // 10) if t.config.save_every is None else t.config.save_every)
    if not t.dist.main:
        _fit(t, data, begun)
        return {}
    if resumed_from is None:
        t.run.mkdir(parents=True, exist_ok=True)
        atomic.sync_folder(t.run.parent)
    # a run that goes on is locked already, since before its checkpoint was read
    with lock.locked(t.run) if resumed_from is None else nullcontext():
        if resumed_from is None:
            folder.new_folder(t.run, "", held=True)  # another process may have been first, and be done
            folder.sweep(t.run)
            if t.dist.world > 1:
                t.record["launch"] = heartbeat.launch()
        try:
            _fit(t, data, begun)
            return _summary(t, data, resumed_from)
        except BaseException as error:
            # nothing was saved yet: what lies there is of no use to anybody
            if resumed_from is None and "saved" not in t.record and not checkpoint.steps_saved(t.run):
                shutil.rmtree(t.run, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise Stopped(t.run, t.state.step, getattr(error, "number", signal.SIGINT)) from None
            raise


def _eval_every(t: Trainer) -> int:
    """Steps between evaluations: about 20 in a run, or so many that they do not take longer than the training.

    A token that is looked at takes about a third of one that is learned from.
    """
    from bardlet.planning import clock

    learned, looked_at = t.state.steps * t.config.tokens_per_step, t.record.get("val_tokens")
    number = clock.evaluations_for(3 * learned, looked_at, share=1) if looked_at else clock.EVALUATIONS
    return -(-t.state.steps // number)


def _fit(t: Trainer, data: Any, begun: float) -> None:
    from bardlet.planning import clock
    from bardlet.run import diagnosis, hf, trackers
    from bardlet.training.checkpointing import write_run
    from bardlet.training.trainer import fit

    def no_clock(state: State) -> None:
        return None

    minutes = t.record.get("minutes")
    replan = clock.replanner(60 * minutes, t.record.get("most_steps")) if minutes else no_clock
    if not t.dist.main:
        _time_spent(t.state, begun)
        fit(t, replan)
        return
    write_run(t)
    if t.state.step == 0:
        for name in ("metrics.jsonl", "model.safetensors"):  # of a process that ended before its first checkpoint
            (t.run / name).unlink(missing_ok=True)
        hf.write_folder(t.run, t.model, data.tokenizer)
    tell = trackers.trackers(t.config, t.run)
    told: set[str] = set()
    with console.training(UNITS.get(t.config.stage, "tokens")) as watch:

        def see(line: dict[str, Any]) -> None:
            watch(line)
            if line["step"] % max(1, t.state.steps // diagnosis.LOOKS) == 0 or line["step"] == t.state.steps:
                _diagnose(t, told)
            if tell and line["step"] % t.config.log_every == 0:
                values = {name: line[name] for name in ("train_loss", "val_loss", "lr") if line[name] is not None}
                for tracker in tell:
                    tracker(line["step"], values)

        _time_spent(t.state, begun)
        try:
            fit(t, replan, see)
        except BardletError:  # why, perhaps
            _diagnose(t, told)
            raise


def _time_spent(state: State, begun: float) -> None:
    """What was spent since `begun`, none of it in a step, is time of the run."""
    spent = time.monotonic() - begun
    state.elapsed += spent
    state.prepared += spent


def _diagnose(t: Trainer, told: set[str]) -> None:
    """Say what the losses tell, each thing once; those of answers that a model wrote itself tell nothing."""
    if t.config.stage in OF_REWARDS:
        return
    from bardlet.run import diagnosis, metrics

    for found in diagnosis.of_losses(metrics.read_metrics(t.run), t.config, t.state.steps, t.record):
        if found.about not in told:
            told.add(found.about)
            log.warning(found.said)


def _summary(t: Trainer, data: Any, resumed_from: int | None) -> dict[str, Any]:
    from bardlet.planning.scaling_law import BAND
    from bardlet.run import card

    facts, sample = stage_of(t.config).conclude(t, data)
    console.say(f"\n{sample}\n")
    mean = f", mean of the last {facts['averaged']:,} steps" if facts.get("averaged") else ""
    console.say(f"validation loss {card.loss_in_words(facts)} ({facts['selected_by']} weights, "
                f"step {facts['selected_step']:,}{mean}); {facts['steps']:,} steps in "
                f"{console.clock_time(facts['seconds'])}")
    if expected := facts.get("expected"):
        came, outside = facts["nats_per_char"], abs(facts["nats_per_char"] / expected - 1) > BAND
        console.say(f"expected: {_band(expected)} nats per character; came: {came:.4f}"
                    + (", which few texts do" if outside else ""))
    if t.config.parallel:
        console.say(f"held-out pairs: BLEU {facts['bleu']:.1f}, chrF {facts['chrf']:.1f} ({facts['bleu_signature']})")
    for line in getattr(stage_of(t.config), "results", lambda facts: [])(facts):
        console.say(line)
    use = {"pretrain": "translate" if t.config.parallel else "sample", "reward": ""}.get(t.config.stage, "chat")
    console.say(f"the run is in {t.run}: " + (f"`bardlet {use} {t.run}`, see " if use else "see ")
                + f"{t.run / 'loss.png'}")
    return {"run": str(t.run), "steps": t.state.step, "resumed_from": resumed_from,
            "seconds": round(t.state.seconds, 3), "train_loss": facts.get("train_loss"),
            "val_loss": facts["val_loss"], "nats_per_char": facts.get("nats_per_char"),
            "expected": facts.get("expected"), "selected_by": facts["selected_by"],
            "tokens_per_second": facts["tokens_per_second"], "parameters": facts["parameters"],
            **{name: facts[name] for name in RESULTS if name in facts}}
