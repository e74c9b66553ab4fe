"""`bardlet train`: a text goes in, a run folder comes out. `bardlet resume` starts from the same parts."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from bardlet.cli import console
from bardlet.cli.options import parse
from bardlet.config import ModelConfig, TrainConfig, read_toml
from bardlet.errors import BardletError

if TYPE_CHECKING:
    import numpy as np

    from bardlet.data import Prepared
    from bardlet.dist import Dist
    from bardlet.tokenizer import Tokenizer
    from bardlet.train import Stage, State, Trainer

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class Command(TrainConfig):
    """Train a model on a text. The result is a Hugging Face model folder, and a run that can be resumed."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora (`bardlet data` lists them), files, folders or globs; none: Tiny Shakespeare."""
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
    command = parse(Command, argv, "train", _defaults(argv))
    config = TrainConfig(**{f.name: getattr(command, f.name) for f in fields(TrainConfig)})
    if config.steps is None and config.minutes is None:
        config = replace(config, minutes=5.0)
    from bardlet import dist as distributed

    begun = time.monotonic()
    with distributed.connect(config.device) as dist:
        console.show_notices(dist.main)
        trainer, data = new_trainer(config, dist, command.out, console.say if dist.main else _silent)
        trainer.state.elapsed = trainer.state.prepared = time.monotonic() - begun
        if config.minutes is not None:
            plan_steps(trainer, config.minutes * 60, begun)
        else:
            choose_compile(trainer, None)
        if dist.main:
            _say_plan(trainer, data)
        if command.plan:
            return 0
        trainer.state.elapsed = trainer.state.prepared = time.monotonic() - begun
        summary = run_to_end(trainer, data, resumed_from=None)
        if command.json and dist.main:
            console.say_json(summary)
    return 0


def _silent(text: str = "") -> None:
    """What all ranks but the first say."""


def _defaults(argv: Sequence[str]) -> Command | None:
    """The settings of `--config FILE`, which the rest of the command line goes before."""
    words = [word.partition("=") for word in argv]
    files = [value or argv[i + 1] for i, (word, _, value) in enumerate(words)
             if word == "--config" and (value or i + 1 < len(argv))]
    if not files:
        return None
    settings, _ = read_toml(Path(files[-1]))
    replans = () if any(word in ("--steps", "--minutes") for word, _, _ in words) else settings.replans
    values = {f.name: getattr(settings, f.name) for f in fields(settings)} | {"replans": replans}
    if any(word == "--minutes" for word, _, _ in words):
        values["steps"] = None
    if any(word == "--steps" for word, _, _ in words):
        values["minutes"] = None
    return Command(**values)


# ---------------------------------------------------------------- the parts of a run


def new_trainer(config: TrainConfig, dist: Dist, out: str | None,
                say: Callable[[str], None]) -> tuple[Trainer, Prepared]:
    """Text, tokenizer, model and optimizers for `config`: a run that has not begun. Nothing is written."""
    import torch

    from bardlet import checkpoint, corpus, hf, models

    if out is not None:
        checkpoint.new_folder(Path(out), "")  # before the long part
    base = hf.read_folder(Path(config.init), config.dropout) if config.init else None
    found = corpus.find(config.text, config.field)
    data = prepare(found, config, base[1] if base else None, dist)
    say(f"text: {found.name}, {data.train_chars + data.val_chars:,} characters in {data.documents:,} "
        f"document{'s' if data.documents != 1 else ''}")
    say(f"tokenizer: {data.reason}")
    train_tokens, _ = parts(data, config)
    torch.manual_seed(config.seed)
    if base:
        model = base[0]
        config = _as_model(config, model.config)
    else:
        model = models.build(config.model_config(data.tokenizer.vocab_size))
    config = replace(config, text=config.text or (found.name,))
    run = checkpoint.new_folder(Path(out) if out else None, f"{found.name}-{config.model}")
    record: dict[str, Any] = {"text": found.name, "text_hash": found.hash, "tokenizer": data.tokenizer.kind,
                              "tokens": len(train_tokens), "minutes": config.minutes}
    return assemble(run, model, data, config, dist, record), data


def prepare(found: Any, config: TrainConfig, words: Tokenizer | None, dist: Dist) -> Prepared:
    """The text as tokens; rank 0 builds them, the others read what it built."""
    from bardlet import data

    with console.preparing() if dist.main else _no_progress() as progress:
        if not dist.main:
            dist.from_main(0)
        ready = data.prepare(found, words or config.tokenizer, config.vocab_size, progress)
        if dist.main:
            dist.from_main(0)
    return ready


@contextmanager
def _no_progress() -> Iterator[None]:
    yield None


def parts(data: Prepared, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) tokens. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return data.train, data.val
    cut = int(0.9 * len(data.train))
    return data.train[:cut], data.train[cut:]


def held_out(data: Prepared, config: TrainConfig) -> tuple[np.ndarray, int, int]:
    """(tokens, characters, bytes) of what this run does not learn from."""
    tokens = parts(data, config)[1]
    if config.val_part == "val":
        return tokens, data.val_chars, data.val_bytes
    text = data.tokenizer.decode(tokens.tolist(), skip_special=True)
    return tokens, len(text), len(text.encode())


def _as_model(config: TrainConfig, shape: ModelConfig) -> TrainConfig:
    """`config` with the shape of the weights that training starts from; its context may be cut for the training."""
    given = ("model", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "tokenizer", "vocab_size")
    ignored = ["--" + name.replace("_", "-") for name in given if getattr(config, name) != getattr(TrainConfig, name)]
    if ignored:
        log.warning("%s: not used, --init %s decides it", ", ".join(ignored), config.init)
    default = TrainConfig.block_size
    block = min(shape.block_size, config.block_size) if config.block_size != default else shape.block_size
    return replace(config, model=cast(Any, shape.model), n_layer=shape.n_layer, n_head=shape.n_head,
                   n_kv_head=shape.n_kv_head, n_embd=shape.n_embd, n_inner=shape.n_inner,
                   block_size=block, tie_embeddings=shape.tie_embeddings)


def assemble(run: Path, model: Any, data: Prepared, config: TrainConfig, dist: Dist,
             record: dict[str, Any]) -> Trainer:
    """A `Trainer` at step 0, settings resolved: device, precision, threads, optimizers, stage."""
    from bardlet import dist as distributed
    from bardlet import optim
    from bardlet.train import State, Trainer

    if config.batch_size % dist.world:
        raise BardletError(f"--batch-size {config.batch_size} cannot be shared by {dist.world} processes: "
                           f"take a multiple of {dist.world}")
    dtype = distributed.pick_dtype(config.dtype, dist.device)
    threads = distributed.settle(config.threads, config.deterministic, dist.device)
    config = replace(config, dtype=cast(Any, dtype), device=dist.device.type, threads=threads)
    model.to(dist.device)
    stage = next_token_stage(data, config, dist)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    return Trainer(run, model, optim.build(model, config), stage, config, dist,
                   distributed.machine(dist, dtype, config.compile == "on", threads), record,
                   State(steps=config.steps or 0, replans=list(config.replans[:1])))


def next_token_stage(data: Prepared, config: TrainConfig, dist: Dist) -> Stage:
    """Pretraining: windows of the text, next-token loss, and the loss on the held-out text as evaluation."""
    import torch

    from bardlet import evaluate, loss
    from bardlet.data import Windows, validation_windows
    from bardlet.train import Stage

    train_tokens, val_tokens = parts(data, config)
    windows = Windows(train_tokens, config.block_size, config.batch_size * config.grad_accum, config.seed)
    looked_at = validation_windows(val_tokens, min(256, config.block_size))
    if config.eval_tokens:  # every k-th window of a long text: enough to see the curve
        k = -(-len(val_tokens) // config.eval_tokens)
        looked_at = [(idx[::k], target[::k]) for idx, target in looked_at]

    def batch(step: int) -> loss.Batch:
        idx, target = windows.batch(step)
        return {"idx": idx, "target": target}

    def validation_loss(model: torch.nn.Module) -> float:
        return evaluate.mean_loss(model, ({"idx": i, "target": t} for i, t in looked_at), dist.device, config.dtype)

    return Stage(batch, loss.next_token, loss.count_targets, validation_loss)


# ---------------------------------------------------------------- how many steps, and compiled or not


def plan_steps(t: Trainer, seconds: float, begun: float) -> None:
    """Decide the number of steps and whether to compile, from a few timed steps; what is said is said in run.toml."""
    from bardlet import budget
    from bardlet.train import evaluate

    choose_compile(t, seconds)
    per_step = budget.seconds_per_step(t)
    clock = time.monotonic()
    evaluate(t)
    per_evaluation = time.monotonic() - clock
    left = max(0.0, seconds - (time.monotonic() - begun))
    evaluations = budget.evaluations_for(left, per_evaluation)
    steps = t.dist.from_main(budget.steps_for(left, per_step, evaluations * per_evaluation))
    t.state.steps, t.state.replans = steps, [(0, steps)]
    if t.config.eval_every is None:
        t.config = replace(t.config, eval_every=t.dist.from_main(max(1, steps // evaluations)))


def choose_compile(t: Trainer, seconds: float | None, worth: float = 100.0) -> None:
    """Resolve --compile: auto compiles a run of more than `worth` seconds where a compiler is found.

    Args:
        seconds: how long the run will be; None: measure a few eager steps to find out.
    """
    from bardlet import dist as distributed
    from bardlet.budget import seconds_per_step

    missing = distributed.compiler_missing(t.dist.device)
    on = t.config.compile == "on" and t.config.model != "bigram"
    if on and missing:
        log.warning("--compile on: %s; going on without compilation, which computes the same, slower", missing)
        on = False
    if t.config.compile == "auto" and not missing and t.config.model != "bigram":
        seconds = seconds_per_step(t, 2) * (t.config.steps or 1) if seconds is None else seconds
        on = bool(t.dist.from_main(int(seconds > worth or (t.dist.device.type == "cuda" and seconds > 30))))
    if on:
        on = compile_model(t)
    t.config = replace(t.config, compile="on" if on else "off")
    t.machine["compiled"] = on


def compile_model(t: Trainer) -> bool:
    """Compile the blocks and try them once; where that fails, say so and go on without. Returns whether it worked."""
    from bardlet import dist as distributed
    from bardlet.budget import seconds_per_step

    console.say("compiling (the first time on a machine takes up to a minute)") if t.dist.main else None
    distributed.compile_blocks(t.model)
    try:
        seconds_per_step(t, 1)
    except Exception as error:
        distributed.compile_blocks(t.model, on=False)
        log.warning("torch.compile failed here (%s: %s); going on without compilation",
                    type(error).__name__, str(error).strip().splitlines()[0][:150] if str(error) else "no message")
        return False
    return True


def _say_plan(t: Trainer, data: Prepared) -> None:
    c, tokens = t.config, t.config.batch_size * t.config.grad_accum * t.config.block_size
    shape = "a table" if c.model == "bigram" else f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels"
    console.say(f"model: {c.model}, {shape}, context {c.block_size}, {t.record['parameters']:,} parameters")
    epochs = t.state.steps * tokens / max(1, len(parts(data, c)[0]))
    console.say(f"plan: {t.state.steps:,} steps of {tokens:,} tokens ({epochs:.1f} times the text), {c.optimizer}, "
                f"{c.dtype}{', compiled' if t.machine['compiled'] else ''}, {t.machine['threads']} threads"
                + (f", to end within {t.record['minutes']:g} minutes" if t.record.get("minutes") else ""))


# ---------------------------------------------------------------- to the end


def run_to_end(t: Trainer, data: Prepared, resumed_from: int | None) -> dict[str, Any]:
    """Train, then leave the model card and the curve, and print where everything lies. Returns what --json prints."""
    from bardlet import checkpoint

    t.config = replace(t.config,
                       eval_every=max(1, t.state.steps // 20) if t.config.eval_every is None else t.config.eval_every,
                       save_every=max(1, t.state.steps // 10) if t.config.save_every is None else t.config.save_every)
    if not t.dist.main:
        _fit(t)
        return {}
    t.run.mkdir(parents=True, exist_ok=True)
    # a run that goes on is locked already, since before its checkpoint was read
    with checkpoint.locked(t.run) if resumed_from is None else nullcontext():
        if resumed_from is None:
            checkpoint.new_folder(t.run, "")  # another process may have been first, and be done
        try:
            _fit(t, data)
        except BaseException:
            # nothing was saved yet: what lies there is of no use to anybody
            if not checkpoint.steps_saved(t.run):
                shutil.rmtree(t.run, ignore_errors=True)
            raise
        return _summary(t, data, resumed_from)


def _fit(t: Trainer, data: Prepared | None = None) -> None:
    from bardlet import budget, hf, report
    from bardlet.train import fit, write_run

    def no_clock(state: State) -> None:
        return None

    replan = budget.clock(t.record["minutes"] * 60) if t.record.get("minutes") else no_clock
    if data is None:
        return fit(t, replan)
    hf.write_folder(t.run, t.model, data.tokenizer)
    write_run(t)
    tell = report.trackers(t.config, t.run)
    with console.training() as watch:

        def see(line: dict[str, Any]) -> None:
            watch(line)
            if tell and line["step"] % t.config.log_every == 0:
                values = {name: line[name] for name in ("train_loss", "val_loss", "lr") if line[name] is not None}
                for tracker in tell:
                    tracker(line["step"], values)

        fit(t, replan, see)
    return None


def _summary(t: Trainer, data: Prepared, resumed_from: int | None) -> dict[str, Any]:
    from bardlet import checkpoint, evaluate, hf, report
    from bardlet.cli.sample import write

    config, record = checkpoint.read_run(t.run)
    tokens, characters, size = held_out(data, t.config)
    first = data.tokenizer.decode([int(tokens[0])], skip_special=True)
    in_units = evaluate.score(record["val_loss"], len(tokens), characters, size, first)
    record["bits_per_byte"] = t.record["bits_per_byte"] = in_units.bits_per_byte
    checkpoint.write_run(t.run, config, record)
    report.loss_curve(t.run, t.run.name)
    model, words = hf.read_folder(t.run)
    sample = write(model, words, None, tokens=400, temperature=0.8, top_k=50, seed=0)
    report.model_card(t.run, config, record, sample)

    console.say(f"\n{sample}\n")
    console.say(f"validation loss {record['val_loss']:.4f} nats per token, {in_units.bits_per_byte:.4f} bits per byte "
                f"({record['selected_by']} weights, step {record['selected_step']:,}); "
                f"{record['steps']:,} steps in {console.clock_time(record['seconds'])}")
    console.say(f"the run is in {t.run}: sample with `bardlet sample {t.run}`, see {t.run / 'loss.png'}")
    return {"run": str(t.run), "steps": t.state.step, "resumed_from": resumed_from,
            "seconds": round(t.state.seconds, 3), "train_loss": record.get("train_loss"),
            "val_loss": record["val_loss"], "selected_by": record["selected_by"],
            "tokens_per_second": record["tokens_per_second"], "parameters": record["parameters"]}


