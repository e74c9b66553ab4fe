"""Train the rungs one after another, each in its own run folder. An interrupted ladder keeps the finished rungs and
continues the current one.

    OUT/ladder.json                     the ladder's options, and the steps of the scaled rungs
    OUT/03-one-head/seed-1337/          a run folder; outcome.json is written last
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from bardlet import __version__, models
from bardlet.config.pretraining import TrainConfig
from bardlet.config.toml import read_toml
from bardlet.data import corpus, shards, windows
from bardlet.data.batch import Batch
from bardlet.data.shards import TextDataset
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.ladder import interrupted
from bardlet.ladder.rungs import CPU, GPU, LADDER, LECTURE, SMALL, Rung
from bardlet.planning import clock, compilation
from bardlet.run import folder as run_folder
from bardlet.run import hf, lock
from bardlet.run.record import TextRecord
from bardlet.runtime import atomic, manifest
from bardlet.runtime.distributed import Dist
from bardlet.runtime.seeds import torch_seed
from bardlet.runtime.signals import Stopped, signals
from bardlet.stages.pretrain import Pretraining
from bardlet.training import checkpointing
from bardlet.training.state import Trainer
from bardlet.training.trainer import fit

log = logging.getLogger("bardlet")

FIRST_SEED = 1337
"""The lecture's seed; further seeds count up from it."""
TIMING_ROUNDS = 4
"""Number of times each scaled rung is timed."""
MINUTES = 2.0
"""Default training time of a scaled rung on a CPU."""
IRRELEVANT_SETTINGS = ("text", "field", "minutes", "eval_every", "eval_tokens", "save_every", "keep_checkpoints",
                       "log_every", "device", "dtype", "compile", "threads", "deterministic", "tensorboard", "wandb",
                       "replans")
"""Settings that do not make an outcome outdated: the name of the text (ladder.json has its hash), logging and saving,
and the machine, which outcome.json records."""
OF_OTHER_MODELS = ("scale_embedding", "rope_scaling", "layers_without_positions", "attention_bias")
"""Parts of a shape that no rung has; outcomes of older versions lack them."""


@dataclass(frozen=True)
class Outcome:
    """A trained and evaluated rung."""

    rung: Rung
    seed: int
    folder: Path
    """The run folder."""
    parameters: int
    steps: int
    seconds: float
    """Time spent in training steps."""
    train_loss: float
    """Nats per token on the training split, measured the lecture's way: 200 batches of random windows."""
    val_loss_lecture: float
    """The same on the validation split."""
    val_loss: float
    """Nats per token with every validation token predicted once, protocol (b)."""
    sample: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that determine the result; empty in outcomes of an older bardlet."""
    made: dict[str, Any] = field(default_factory=dict)
    """Provenance: date, bardlet, torch, threads, dtype, compiled, processor, device; empty in older outcomes."""


@dataclass(frozen=True)
class LadderPlan:
    """The options of a ladder."""

    rungs: tuple[Rung, ...]
    out: Path | None = None
    """The output folder; None: runs/ladder-NAME, where NAME is the name of the text."""
    text: tuple[str, ...] = ()
    field: str = "text"
    tokenizer: str = "char"
    seeds: int = 1
    minutes: float | None = None
    """Training time of a scaled rung; None: 2 on a CPU, the lecture's 5,000 steps on a GPU."""
    device: str = "auto"
    threads: int | None = None


Watch = Callable[[Rung, int, dict[str, Any]], None]
"""Called after each step with the rung, its seed, and the progress line from `fit`."""


class Ladder:
    """A tokenized text and the rungs to train on it."""

    def __init__(self, plan: LadderPlan, dist: Dist, progress: shards.Progress | None = None) -> None:
        if dist.world > 1:
            raise BardletError("bardlet ladder runs in a single process; start it without torchrun")
        self.plan, self.dist = plan, dist
        self.corpus = corpus.find(plan.text, plan.field)
        self.out = plan.out or Path(f"runs/ladder-{self.corpus.name}")
        config = TrainConfig(text=plan.text or (self.corpus.name,), tokenizer=plan.tokenizer)  # type: ignore[arg-type]
        stage = Pretraining(config, dist, progress)
        stage.source = self.corpus
        self.dataset: TextDataset = stage.tokenize(None)
        self.corpus.release()
        self.threads = plan.threads or torch.get_num_threads()
        gpu = dist.device.type == "cuda"
        self.minutes = plan.minutes if plan.minutes is not None else None if gpu else MINUTES
        self.scale = GPU if gpu else CPU
        self.fixed_options = {"text": self.corpus.hash, "tokenizer": plan.tokenizer, "minutes": self.minutes,
                              "device": dist.device.type}
        for rung in plan.rungs:
            self._check_length(rung)
        self._check_folder()
        self.steps: dict[str, int] = {}
        """Planned steps of the scaled rungs, by name; set by `plan_steps`."""
        self.timed_with: int | None = None
        """Number of threads used for timing them; None if they were not timed or it is unknown."""
        self.compiled: dict[tuple[str, str | None], bool] = {}
        """The compile decision for each kind of scaled rung, once made."""

    @property
    def comparable(self) -> bool:
        """True if the lecture's figures apply: same text (under any file name) and same tokens."""
        shakespeare = (self.dataset.train_chars, self.dataset.val_chars) == (1_003_854, 111_540)
        return shakespeare and self.dataset.tokenizer.kind == "char" and self.dataset.tokenizer.vocab_size == 65

    @property
    def seeds(self) -> range:
        """One seed per repetition."""
        return range(FIRST_SEED, FIRST_SEED + self.plan.seeds)

    def _check_length(self, rung: Rung) -> None:
        """Raise BardletError if the text is too short for a rung's windows."""
        block, train, val = self.config(rung, FIRST_SEED).block_size, len(self.dataset.train), len(self.dataset.val)
        if train < 2 * block or val < block + 1:
            raise BardletError(f"{self.corpus.name}: {train} training and {val} validation tokens are too few for the "
                               f"windows of {block} tokens in rung {rung.number}, {rung.name}; use a longer text")

    def _check_folder(self) -> None:
        """Raise BardletError if the folder cannot be created, or contains something other than a ladder."""
        if not self.out.is_dir():
            run_folder.new_folder(self.out, "")
        elif not (self.out / "ladder.json").exists() and any(
                path.name not in lock.FILES for path in self.out.iterdir()):
            raise BardletError(f"{self.out}: not empty and contains no ladder; choose another --out")

    def _read_plan(self) -> None:
        """Read the plan of an earlier call. Raises BardletError if that call had different options."""
        path = self.out / "ladder.json"
        if not path.exists():
            return
        before = manifest.read_json(path)
        options = before.get("asked", {})
        changed = next((name for name, value in self.fixed_options.items() if options.get(name) != value), None)
        if changed:
            raise BardletError(f"{path}: this ladder was started with a different {changed} ({options.get(changed)}, "
                               f"now {self.fixed_options[changed]}); choose another --out")
        self.steps = {str(name): int(steps) for name, steps in before.get("steps", {}).items()}
        self.timed_with = before.get("threads")

    # ------------------------------------------------------------------------ one rung

    def config(self, rung: Rung, seed: int, steps: int | None = None) -> TrainConfig:
        """Return all settings of a rung: the lecture's sizes, or the sizes of the scaled rungs on this machine."""
        sizes = {**(self.scale if rung.scaled else SMALL), **LECTURE, **rung.settings}
        steps = steps or sizes.pop("steps", None) or 1
        every = max(1, steps // 25)
        # tensors of a few thousand numbers: a second thread costs more than it saves
        small: dict[str, Any] = {} if rung.scaled else {"dtype": "fp32", "compile": "off", "threads": 1}
        text = self.plan.text or (self.corpus.name,)
        return TrainConfig(**{"threads": self.threads, **sizes, **small, "text": text, "field": self.plan.field,
                              "model": rung.model, "tokenizer": self.plan.tokenizer, "steps": steps, "seed": seed,
                              "eval_every": every, "eval_tokens": 32_768 if rung.scaled else 8_192, "save_every": 0,
                              "log_every": every, "device": self.plan.device}).resolved()

    def stage(self, config: TrainConfig) -> Pretraining:
        """Return the stage of a rung, with the text already loaded and tokenized."""
        stage = Pretraining(config, self.dist)
        stage.source, stage.data = self.corpus, self.dataset
        return stage

    def trainer(self, rung: Rung, seed: int, steps: int | None = None) -> Trainer:
        """Return a rung's trainer before its first step. Writes nothing."""
        config = self.config(rung, seed, steps)
        torch.manual_seed(torch_seed(seed))
        model = models.build(config.model_config(self.dataset.tokenizer.vocab_size))
        stage = self.stage(config)
        stage.record = TextRecord(text=self.corpus.name, text_hash=self.corpus.hash,
                                  tokenizer=self.dataset.tokenizer.kind, documents=self.dataset.documents,
                                  tokens=len(self.dataset.train), rung=rung.name)
        return stage.build_trainer(self.folder(rung, seed), model)

    def folder(self, rung: Rung, seed: int) -> Path:
        """Return the run folder of a rung and seed."""
        return self.out / f"{rung.number:02}-{rung.name}" / f"seed-{seed}"

    def plan_steps(self, say: Callable[[str], None]) -> None:
        """Time a few steps of each scaled rung and plan its steps, so that all of them train for the same minutes.

        All rungs are timed before any is trained, in rounds, and the fastest round counts: another job slows down only
        the rounds that it overlaps. ladder.json keeps the steps, so that every seed trains equally long. Call this
        before the other methods, while holding the folder's lock: otherwise another process may change ladder.json.
        """
        self._read_plan()
        for rung in LADDER:  # a step of rung 13 is a step of rung 12: averaging happens outside the step
            twin = next((other.name for other in LADDER if _kind(other) == _kind(rung) and other.name in self.steps),
                        None)
            if rung in self.plan.rungs and twin:
                self.steps.setdefault(rung.name, self.steps[twin])
        todo = [rung for rung in self.plan.rungs if rung.scaled and rung.name not in self.steps]
        if self.minutes is None:
            self.steps |= {rung.name: int(self.scale["steps"]) for rung in todo}
        elif todo:
            kinds = {_kind(rung): rung for rung in todo}
            with torch._dynamo.config.patch(recompile_limit=64):  # for the graphs of all rungs
                trainers = {kind: self._compiled(rung, FIRST_SEED, None) for kind, rung in kinds.items()}
                rounds = [{kind: clock.seconds_per_step(trainer, 10, patience=4.0)
                           for kind, trainer in trainers.items()} for _ in range(TIMING_ROUNDS)]
            self.timed_with = self.timed_with or self.threads
            for rung in todo:
                per_step = min(seconds[_kind(rung)] for seconds in rounds)
                self.steps[rung.name] = max(1, int(self.minutes * 60 / per_step))
                say(f"rung {rung.number}, {rung.name}: {1000 * per_step:.1f} ms per step, "
                    f"{self.steps[rung.name]:,} steps in {self.minutes:g} minutes")
        self.out.mkdir(parents=True, exist_ok=True)
        timed = {"threads": self.timed_with} if self.timed_with else {}
        atomic.write_json(self.out / "ladder.json", {"asked": self.fixed_options, **timed, "steps": self.steps})
        left = any(rung.scaled and self.outcome(rung, seed) is None for rung, seed in self.jobs())
        if left and self.timed_with not in (None, self.threads):
            log.warning("%s: the scaled rungs were timed with --threads %d, not %d, so their minutes no longer match; "
                        "use --threads %d", self.out, self.timed_with, self.threads, self.timed_with)

    def _compiled(self, rung: Rung, seed: int, steps: int | None) -> Trainer:
        """Return a scaled rung's trainer, compiled if that pays off: decided once, so that all seeds train alike."""
        trainer = self.trainer(rung, seed, steps)
        if (known := self.compiled.get(_kind(rung))) is not None:
            trainer.config = replace(trainer.config, compile="on" if known else "off")
        compilation.choose_compile(trainer, 60 * self.minutes if self.minutes is not None else None)
        self.compiled[_kind(rung)] = trainer.machine["compiled"]
        return trainer

    def train(self, rung: Rung, seed: int, watch: Watch, late_signal: list[int]) -> Outcome:
        """Train a rung, from its checkpoint if it was interrupted, evaluate it, and write its outcome to disk.

        Args:
            late_signal: a list of one number. A signal during the last step or the evaluation does not discard the
                trained rung; its number is stored here, and the caller must stop.

        Raises Stopped for an earlier signal. Before the first step, during compilation, signals act at once.
        """
        folder = self.folder(rung, seed)
        settings = self._training_settings(self.config(rung, seed, self.steps.get(rung.name)))
        saved = interrupted.find_checkpoint(folder, self.corpus.hash,
                                            lambda config: self._training_settings(config) == settings)
        if rung.scaled:
            if saved:  # compiled or not, as it was
                self.compiled.setdefault(_kind(rung), bool(interrupted.machine_of(saved).get("compiled")))
            torch.compiler.reset()  # drop the previous rung's graphs: the compiler keeps only a few
            trainer = self._compiled(rung, seed, self.steps[rung.name])
        else:
            trainer = self.trainer(rung, seed)
        if not (saved and interrupted.continue_from(trainer, saved)):
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
            folder.mkdir(parents=True)
            hf.write_folder(folder, trainer.model, self.dataset.tokenizer)
            checkpointing.write_run(trainer)
        with signals() as stop_request:
            fit(trainer, watch=lambda line: watch(rung, seed, line), stop_request=stop_request)
            outcome = self._measure(trainer, rung, seed)
            shutil.rmtree(folder / "checkpoints")  # a finished rung needs none
            atomic.write_json(folder / "outcome.json", {**asdict(outcome), "rung": rung.name, "folder": None})
        late_signal[:] = [stop_request.number]
        return outcome

    def _measure(self, trainer: Trainer, rung: Rung, seed: int) -> Outcome:
        """Evaluate the weights in the run folder, the lecture's way and by protocol (b)."""
        model = hf.read_folder(trainer.run)[0].to(self.dist.device)
        config = cast(TrainConfig, trainer.config)
        block, rows = config.block_size, config.batch_size * config.grad_accum
        rows_at_once = metrics.rows_at_once(trainer.model.config, block)

        def loss(batches: Sequence[Batch]) -> float:
            # fp32, like `bardlet eval`: 400 batches of a scaled rung take 19 s on one CPU core; bf16 takes 7 s but is
            # off by 2e-5
            return metrics.mean_loss(model, batches, self.dist.device, "fp32", rows_at_once)

        stage = self.stage(config)
        stage.record = cast(TextRecord, trainer.record)
        train, val = stage.parts()
        full = windows.validation_windows(val, min(256, block))
        trainer.record.update(val_loss=loss(full), val_tokens=len(val) - 1, val_tokens_of=len(val) - 1)
        facts, sample = stage.finish(trainer)
        return Outcome(rung, seed, trainer.run, facts["parameters"], trainer.state.step,
                       round(trainer.state.seconds, 3),
                       loss(windows.random_windows(train, block, 200, rows, seed=1)),
                       loss(windows.random_windows(val, block, 200, rows, seed=2)), facts["val_loss"], sample,
                       self._training_settings(config), self._provenance(trainer))

    def _training_settings(self, config: Any) -> dict[str, Any]:
        """Return the settings that determine the result, with the model's resolved shape and merged micro-batches."""
        whole = replace(config, batch_size=config.batch_size * config.grad_accum, grad_accum=1)
        settings = {name: value for name, value in asdict(whole).items() if name not in IRRELEVANT_SETTINGS}
        shape = asdict(config.model_config(self.dataset.tokenizer.vocab_size))
        return settings | {name: value for name, value in shape.items() if name not in OF_OTHER_MODELS}

    def _provenance(self, trainer: Trainer) -> dict[str, Any]:
        """Return the date, versions and machine of a training run."""
        names = ("torch", "threads", "dtype", "compiled", "processor", "device")
        machine = {name: trainer.machine[name] for name in names}
        return {"date": time.strftime("%Y-%m-%d"), "bardlet": __version__, **machine}

    def outcome(self, rung: Rung, seed: int, say: Callable[[str], None] = lambda why: None) -> Outcome | None:
        """Return the outcome of a finished rung from disk; None if there is none, or none that can be reused.

        Args:
            say: called with the reason why an outcome cannot be reused: it is damaged, or its settings differ.
        """
        path = self.folder(rung, seed) / "outcome.json"
        if not path.exists() or not path.with_name("model.safetensors").exists():
            return None
        if rung.scaled and rung.name not in self.steps:
            return None
        try:
            outcome = Outcome(**{**json.loads(path.read_text(encoding="utf-8")), "rung": rung, "folder": path.parent})
            before = outcome.settings or self._training_settings(read_toml(path.with_name("run.toml"), TrainConfig)[0])
        except (ValueError, TypeError, BardletError) as error:
            say(f"{path}: damaged ({error}); training this rung again")
            return None
        now = self._training_settings(self.config(rung, seed, self.steps.get(rung.name)))
        changed = next((name for name in now if before.get(name, getattr(TrainConfig, name, None)) != now[name]), None)
        if changed:
            say(f"{path.parent}: trained with a different {changed} ({before.get(changed)}, now {now[changed]}); "
                "training this rung again")
            return None
        return outcome

    def finished(self) -> list[Outcome]:
        """Return all outcomes of this ladder in the folder, including rungs and seeds that this call did not select."""
        seeds = [(rung, path.name.removeprefix("seed-")) for rung in LADDER
                 for path in sorted(self.out.glob(f"{rung.number:02}-{rung.name}/seed-*"))]
        outcomes = (self.outcome(rung, int(seed)) for rung, seed in seeds if seed.isdecimal())
        return [outcome for outcome in outcomes if outcome]

    # ------------------------------------------------------------------------ all rungs

    def jobs(self) -> list[tuple[Rung, int]]:
        """Return (rung, seed) of every training run of this ladder, in training order."""
        return [(rung, seed) for seed in self.seeds for rung in self.plan.rungs]

    def train_all(self, watch: Watch) -> Iterator[Outcome]:
        """Train the unfinished rungs, yielding the outcome of every rung, including those of earlier calls.

        Raises BardletError after a signal: all steps are saved, and the same call continues.
        """
        for rung, seed in self.jobs():
            outcome, late_signal = self.outcome(rung, seed, log.warning), [0]
            if outcome is None:
                try:
                    outcome = self.train(rung, seed, watch, late_signal)
                except (Stopped, KeyboardInterrupt) as stop:
                    raise self._stopped(f"in rung {rung.number}, {rung.name}",
                                        getattr(stop, "exit_code", 130)) from None
                finally:
                    torch.set_num_threads(self.threads)  # small rungs set it to 1
            yield outcome
            if late_signal[0]:
                raise self._stopped(f"after rung {rung.number}, {rung.name}", 128 + late_signal[0])

    def _stopped(self, where: str, exit_code: int) -> BardletError:
        """Return the error to raise after a signal."""
        error = BardletError(f"stopped {where}; all steps are saved in {self.out}: run the same command to continue")
        error.exit_code = exit_code  # type: ignore[attr-defined]
        return error


def _kind(rung: Rung) -> tuple[str, str | None]:
    """Return (model, optimizer), on which the time of a step depends."""
    return rung.model, rung.settings.get("optimizer")
