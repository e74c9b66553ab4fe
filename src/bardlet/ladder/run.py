"""Trains the rungs one after another, each into a run folder of its own. What is finished stays, so a ladder that was
stopped goes on with the rung that it was at.

    OUT/ladder.json                     what this ladder was told, and the steps of the scaled rungs
    OUT/03-one-head/seed-1337/          a run folder, with outcome.json written last
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
from bardlet.ladder.rungs import CPU, GPU, LADDER, LECTURE, SMALL, Rung
from bardlet.planning import clock, compilation
from bardlet.run import folder as run_folder
from bardlet.run import hf, lock
from bardlet.run.record import TextRecord
from bardlet.runtime import atomic, manifest
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Stopped, signals
from bardlet.stages.pretrain import Pretraining
from bardlet.training import checkpointing, trainer
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")

FIRST_SEED = 1337
"""The lecture's seed; the others follow it."""
TURNS = 4
"""How often each scaled rung is timed."""
MINUTES = 2.0
"""Training time of a scaled rung on a CPU, where nobody asks for another."""
BAND_MARGIN = ("text", "field", "minutes", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "log_every",
          "device", "dtype", "compile", "threads", "deterministic", "tensorboard", "wandb", "replans")
"""Settings that do not make another training: the text by its name (ladder.json has its hash), what is written on the
way, and the machine, which outcome.json records."""


@dataclass(frozen=True)
class Outcome:
    """One rung, trained and measured."""

    rung: Rung
    seed: int
    folder: Path
    """Its run folder."""
    parameters: int
    steps: int
    seconds: float
    """Time spent in training steps."""
    train_loss: float
    """Nats per token on the training part, the lecture's way: 200 batches of random windows."""
    val_loss_lecture: float
    """The same on the validation part."""
    val_loss: float
    """Nats per token over every validation token once, protocol (b)."""
    sample: str
    settings: dict[str, Any] = field(default_factory=dict)
    """What it was trained with, as far as that makes another training; empty in outcomes of an older bardlet."""
    made: dict[str, Any] = field(default_factory=dict)
    """When and by what: date, bardlet, torch, threads, dtype, compiled, processor, device; empty in older outcomes."""


@dataclass(frozen=True)
class LadderPlan:
    """What a ladder is told to do."""

    rungs: tuple[Rung, ...]
    out: Path | None = None
    """The folder; None: runs/ladder-NAME, by the name of the text."""
    text: tuple[str, ...] = ()
    field: str = "text"
    tokenizer: str = "char"
    seeds: int = 1
    minutes: float | None = None
    """Training time of a scaled rung; None: 2 on a CPU, the lecture's 5,000 steps on a GPU."""
    device: str = "auto"
    threads: int | None = None


Watch = Callable[[Rung, int, dict[str, Any]], None]
"""Called after each step with the rung, its seed, and the line that `fit` shows a person."""


class Ladder:
    """A text, made ready once, and the rungs to be trained on it."""

    def __init__(self, plan: LadderPlan, dist: Dist, progress: shards.Progress | None = None) -> None:
        if dist.world > 1:
            raise BardletError("bardlet ladder trains in one process: start it without torchrun")
        self.plan, self.dist = plan, dist
        self.corpus = corpus.find(plan.text, plan.field)
        self.out = plan.out or Path(f"runs/ladder-{self.corpus.name}")
        config = TrainConfig(text=plan.text or (self.corpus.name,), tokenizer=plan.tokenizer)  # type: ignore[arg-type]
        stage = Pretraining(config, dist, progress)
        stage.source = self.corpus
        self.dataset: TextDataset = stage.tokenize(None)
        self.threads = plan.threads or torch.get_num_threads()
        gpu = dist.device.type == "cuda"
        self.minutes = plan.minutes if plan.minutes is not None else None if gpu else MINUTES
        self.scale = GPU if gpu else CPU
        self.asked = {"text": self.corpus.hash, "tokenizer": plan.tokenizer, "minutes": self.minutes,
                      "device": dist.device.type}
        for rung in plan.rungs:
            self._check_length(rung)
        self._check_folder()
        self.steps: dict[str, int] = {}
        """Planned steps of the scaled rungs, by name, once `plan_steps` has been called."""
        self.timed_with: int | None = None
        """The threads that they were timed with, where they were timed, and that is known."""
        self.compiled: dict[tuple[str, str | None], bool] = {}
        """Whether the scaled rungs of a kind are compiled, once that was decided."""

    @property
    def comparable(self) -> bool:
        """Whether the lecture's figures apply: its text, whatever its file is called, and its tokens."""
        shakespeare = (self.dataset.train_chars, self.dataset.val_chars) == (1_003_854, 111_540)
        return shakespeare and self.dataset.tokenizer.kind == "char" and self.dataset.tokenizer.vocab_size == 65

    @property
    def seeds(self) -> range:
        """The seed of each repetition."""
        return range(FIRST_SEED, FIRST_SEED + self.plan.seeds)

    def _check_length(self, rung: Rung) -> None:
        """Raises BardletError where the text is too short for a rung's windows."""
        block, train, val = self.config(rung, FIRST_SEED).block_size, len(self.dataset.train), len(self.dataset.val)
        if train < 2 * block or val < block + 1:
            raise BardletError(f"{self.corpus.name}: {train} tokens to train on and {val} to validate are too few for "
                               f"the windows of {block} of rung {rung.number}, {rung.name}: give a longer text")

    def _check_folder(self) -> None:
        """Raises BardletError where the folder cannot be made, or holds something else than a ladder."""
        if not self.out.is_dir():
            run_folder.new_folder(self.out, "")
        elif not (self.out / "ladder.json").exists() and any(
                path.name not in lock.FILES for path in self.out.iterdir()):
            raise BardletError(f"{self.out}: is not empty and holds no ladder; name another --out")

    def _read_plan(self) -> None:
        """Take over what an earlier call has planned here. Raises BardletError where it was told something else."""
        path = self.out / "ladder.json"
        if not path.exists():
            return
        before = manifest.read_json(path)
        odd = [name for name, value in self.asked.items() if before.get("asked", {}).get(name) != value]
        if odd:
            raise BardletError(f"{path}: this ladder was begun with another {odd[0]} "
                               f"({before.get('asked', {}).get(odd[0])}, now {self.asked[odd[0]]}); name another --out")
        self.steps = {str(name): int(steps) for name, steps in before.get("steps", {}).items()}
        self.timed_with = before.get("threads")

    # ------------------------------------------------------------------------ one rung

    def config(self, rung: Rung, seed: int, steps: int | None = None) -> TrainConfig:
        """Every setting of a rung: the lecture's small ones, or those of its scaled rungs on this machine."""
        sizes = {**(self.scale if rung.scaled else SMALL), **LECTURE, **rung.settings}
        steps = steps or sizes.pop("steps", None) or 1
        every = max(1, steps // 25)
        # tensors of a few thousand numbers: a second thread costs more than it does
        small: dict[str, Any] = {} if rung.scaled else {"dtype": "fp32", "compile": "off", "threads": 1}
        text = self.plan.text or (self.corpus.name,)
        return TrainConfig(**{"threads": self.threads, **sizes, **small, "text": text, "field": self.plan.field,
                              "model": rung.model, "tokenizer": self.plan.tokenizer, "steps": steps, "seed": seed,
                              "eval_every": every, "eval_tokens": 32_768 if rung.scaled else 8_192, "save_every": 0,
                              "log_every": every, "device": self.plan.device}).resolved()

    def stage(self, config: TrainConfig) -> Pretraining:
        """The stage of a rung: its text is there already."""
        stage = Pretraining(config, self.dist)
        stage.source, stage.data = self.corpus, self.dataset
        return stage

    def trainer(self, rung: Rung, seed: int, steps: int | None = None) -> Trainer:
        """A rung before its first step. Nothing is written."""
        config = self.config(rung, seed, steps)
        torch.manual_seed(seed)
        model = models.build(config.model_config(self.dataset.tokenizer.vocab_size))
        stage = self.stage(config)
        stage.record = TextRecord(text=self.corpus.name, text_hash=self.corpus.hash, tokenizer=self.dataset.tokenizer.kind,
                                  documents=self.dataset.documents, tokens=len(self.dataset.train), rung=rung.name)
        return stage.build_trainer(self.folder(rung, seed), model)

    def folder(self, rung: Rung, seed: int) -> Path:
        """Where a rung of a seed lies."""
        return self.out / f"{rung.number:02}-{rung.name}" / f"seed-{seed}"

    def plan_steps(self, say: Callable[[str], None]) -> None:
        """Time some steps of each scaled rung, so that all of them train for the same minutes.

        All are timed before the first is trained, in turns, and the fastest turn counts: what else the machine does in
        a turn slows only that one. The counts are kept, so another seed makes as many steps. To be called before the
        other methods, by a process that holds the folder: what is in ladder.json is only then its own to go on with.
        """
        self._read_plan()
        for rung in LADDER:  # a step of rung 13 is one of rung 12: the average is made beside it
            twin = next((one.name for one in LADDER if _kind(one) == _kind(rung) and one.name in self.steps), None)
            if rung in self.plan.rungs and twin:
                self.steps.setdefault(rung.name, self.steps[twin])
        todo = [rung for rung in self.plan.rungs if rung.scaled and rung.name not in self.steps]
        if self.minutes is None:
            self.steps |= {rung.name: int(self.scale["steps"]) for rung in todo}
        elif todo:
            kinds = {_kind(rung): rung for rung in todo}
            with torch._dynamo.config.patch(recompile_limit=64):  # the graphs of all rungs at once
                trainers = {kind: self._compiled(rung, FIRST_SEED, None) for kind, rung in kinds.items()}
                turns = [{kind: clock.seconds_per_step(trainer, 10, patience=4.0) for kind, trainer in trainers.items()}
                         for _ in range(TURNS)]
            self.timed_with = self.timed_with or self.threads
            for rung in todo:
                per_step = min(turn[_kind(rung)] for turn in turns)
                self.steps[rung.name] = max(1, int(self.minutes * 60 / per_step))
                say(f"rung {rung.number}, {rung.name}: {1000 * per_step:.1f} ms a step, "
                    f"{self.steps[rung.name]:,} steps in {self.minutes:g} minutes")
        self.out.mkdir(parents=True, exist_ok=True)
        timed = {"threads": self.timed_with} if self.timed_with else {}
        atomic.write_json(self.out / "ladder.json", {"asked": self.asked, **timed, "steps": self.steps})
        left = any(rung.scaled and self.outcome(rung, seed) is None for rung, seed in self.jobs())
        if left and self.timed_with not in (None, self.threads):
            log.warning("%s: its scaled rungs were timed with %d threads, not with %d: a minute is another amount of "
                        "work now; --threads %d goes on as before",
                        self.out, self.timed_with, self.threads, self.timed_with)

    def _compiled(self, rung: Rung, seed: int, steps: int | None) -> Trainer:
        """A scaled rung, its blocks compiled where that pays: decided once, so that all seeds train alike."""
        trainer = self.trainer(rung, seed, steps)
        if (known := self.compiled.get(_kind(rung))) is not None:
            trainer.config = replace(trainer.config, compile="on" if known else "off")
        compilation.choose_compile(trainer, 60 * self.minutes if self.minutes is not None else None)
        self.compiled[_kind(rung)] = trainer.machine["compiled"]
        return trainer

    def train(self, rung: Rung, seed: int, watch: Watch, late: list[int]) -> Outcome:
        """Train a rung from the start, measure it, and put its outcome on disk.

        Args:
            late: its one number becomes that of a signal which came in the last step or in the measurement, when it
                must not cost what was trained any more: the caller has to stop.

        Raises Stopped for an earlier signal; before the first step, while the rung is compiled, signals act at once.
        """
        folder = self.folder(rung, seed)
        shutil.rmtree(folder, ignore_errors=True)  # what a stop left
        if rung.scaled:
            torch.compiler.reset()  # graphs of the rung before: the compiler keeps only a few
            t = self._compiled(rung, seed, self.steps[rung.name])
        else:
            t = self.trainer(rung, seed)
        folder.mkdir(parents=True)
        hf.write_folder(folder, t.model, self.dataset.tokenizer)
        checkpointing.write_run(t)
        with signals() as box:
            trainer.fit(t, watch=lambda line: watch(rung, seed, line), asked=box)
            outcome = self._measure(t, rung, seed)
            shutil.rmtree(folder / "checkpoints")  # the result is the folder; to go on means to begin again
            atomic.write_json(folder / "outcome.json", {**asdict(outcome), "rung": rung.name, "folder": None})
        late[:] = [box.number]
        return outcome

    def _measure(self, trainer: Trainer, rung: Rung, seed: int) -> Outcome:
        """The losses of the weights at the root, by the lecture's way and by protocol (b)."""
        model = hf.read_folder(trainer.run)[0].to(self.dist.device)
        config = cast(TrainConfig, trainer.config)
        block, rows = config.block_size, config.batch_size * config.grad_accum
        at_once = metrics.rows_at_once(trainer.model.config, block)

        def loss(batches: Sequence[Batch]) -> float:
            # as `bardlet eval` does: 400 batches of a scaled rung on a CPU take 19 s of a core, 7 in bf16, which is off
            # by 2e-5
            return metrics.mean_loss(model, batches, self.dist.device, "fp32", at_once)

        stage = self.stage(config)
        stage.record = cast(TextRecord, trainer.record)
        train, val = stage.parts()
        full = windows.validation_windows(val, min(256, block))
        trainer.record.update(val_loss=loss(full), val_tokens=len(val) - 1, val_tokens_of=len(val) - 1)
        facts, sample = stage.finish(trainer)
        return Outcome(rung, seed, trainer.run, facts["parameters"], trainer.state.step, round(trainer.state.seconds, 3),
                       loss(windows.random_windows(train, block, 200, rows, seed=1)),
                       loss(windows.random_windows(val, block, 200, rows, seed=2)), facts["val_loss"], sample,
                       self._decisive(config), self._model_of(trainer))

    def _decisive(self, config: TrainConfig) -> dict[str, Any]:
        """The settings that make another training, the shape as the model has it, a step's micro-batches as one."""
        whole = replace(config, batch_size=config.batch_size * config.grad_accum, grad_accum=1)
        training = {name: value for name, value in asdict(whole).items() if name not in BAND_MARGIN}
        return training | asdict(config.model_config(self.dataset.tokenizer.vocab_size))

    def _model_of(self, trainer: Trainer) -> dict[str, Any]:
        """When and by what a rung was trained."""
        machine = {name: trainer.machine[name] for name in ("torch", "threads", "dtype", "compiled", "processor", "device")}
        return {"date": time.strftime("%Y-%m-%d"), "bardlet": __version__, **machine}

    def outcome(self, rung: Rung, seed: int, say: Callable[[str], None] = lambda why: None) -> Outcome | None:
        """What is on disk of a finished rung; None where there is nothing, or nothing that can be taken over.

        Args:
            say: told why what is there is of no use: it is damaged, or comes from other settings than the rung's.
        """
        path = self.folder(rung, seed) / "outcome.json"
        if not path.exists() or not path.with_name("model.safetensors").exists():
            return None
        if rung.scaled and rung.name not in self.steps:
            return None
        try:
            found = Outcome(**{**json.loads(path.read_text(encoding="utf-8")), "rung": rung, "folder": path.parent})
            before = found.settings or self._decisive(read_toml(path.with_name("run.toml"), TrainConfig)[0])
        except (ValueError, TypeError, BardletError) as error:
            say(f"{path}: damaged ({error}); the rung is trained again")
            return None
        now = self._decisive(self.config(rung, seed, self.steps.get(rung.name)))
        odd = [name for name in now if before.get(name, getattr(TrainConfig, name, None)) != now[name]]
        if odd:
            say(f"{path.parent}: was trained with another {odd[0]} ({before.get(odd[0])}, now {now[odd[0]]}); "
                "the rung is trained again")
            return None
        return found

    def finished(self) -> list[Outcome]:
        """Every outcome in the folder that belongs to this ladder, also of rungs and seeds not asked for now."""
        seeds = [(rung, path.name.removeprefix("seed-")) for rung in LADDER
                 for path in sorted(self.out.glob(f"{rung.number:02}-{rung.name}/seed-*"))]
        corpus = (self.outcome(rung, int(seed)) for rung, seed in seeds if seed.isdecimal())
        return [outcome for outcome in corpus if outcome]

    # ------------------------------------------------------------------------ all of them

    def jobs(self) -> list[tuple[Rung, int]]:
        """(rung, seed) of all that belongs to this ladder, in the order in which it is trained."""
        return [(rung, seed) for seed in self.seeds for rung in self.plan.rungs]

    def climb(self, watch: Watch) -> Iterator[Outcome]:
        """Train what is not finished yet, yielding each outcome, those of earlier calls, too.

        Raises BardletError after a signal: what is finished stays, and the same call goes on.
        """
        for rung, seed in self.jobs():
            done, late = self.outcome(rung, seed, log.warning), [0]
            if done is None:
                try:
                    done = self.train(rung, seed, watch, late)
                except (Stopped, KeyboardInterrupt) as stop:
                    raise self._stopped(f"in rung {rung.number}, {rung.name}; the rungs before it",
                                        getattr(stop, "exit_code", 130)) from None
                finally:
                    torch.set_num_threads(self.threads)  # a small rung takes one
            yield done
            if late[0]:
                raise self._stopped(f"after rung {rung.number}, {rung.name}; the rungs so far", 128 + late[0])

    def _stopped(self, where: str, exit_code: int) -> BardletError:
        """What a person reads after a signal."""
        error = BardletError(f"stopped {where} are kept: the same command goes on from there (in {self.out})")
        error.exit_code = exit_code  # type: ignore[attr-defined]
        return error


def _kind(rung: Rung) -> tuple[str, str | None]:
    """What the time of a step depends on."""
    return rung.model, rung.settings.get("optimizer")
