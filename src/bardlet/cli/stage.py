"""The commands of the fine-tuning stages: `bardlet sft BASE DATA`, `bardlet dpo MODEL DATA` and the like.

All are one function: a stage's settings class has the name, the help and an example of its command.
"""

from __future__ import annotations

from collections.abc import Sequence

from bardlet import console
from bardlet.cli import training
from bardlet.cli.parser import Group, Usage, typed
from bardlet.config import combine
from bardlet.config.finetuning import FineTuneConfig, RolloutConfig, is_command
from bardlet.config.stages import FINE_TUNING, classes_with, config_class
from bardlet.config.toml import settings_in, why_not
from bardlet.errors import BardletError, quoted

NOT_TYPED = (*training.NOT_TYPED, "init")
"""Settings that only files can hold; the model is the first word of the command line."""


def usage(kind: type[FineTuneConfig]) -> Usage:
    """Return the help of a stage's command."""
    return Usage(
        kind.command, "MODEL DATA [DATA ...] [OPTIONS]", kind.about,
        ((kind.example, ""), (f"{kind.example} --minutes 5 --lora 16", "five minutes, LoRA factors only")),
        (Group("model", ("lora", "block_size"), ("dropout",)),
         Group("data", (), ("max_bad", "val_part")),
         Group("reward", ("reward", "rollout", "answer_tokens", "group", "passes", "clip", "target_kl",
                          "watch")),
         Group("training", ("beta", "desirable_weight", "undesirable_weight", "minutes", "steps", "batch_size", "lr",
                            "muon_lr", "temperature", "keep", "seed"),
               ("pack", "grad_accum", *training.OPTIMIZER, *training.CHECKPOINTS)),
         training.MACHINE, training.OUTPUT),
        positionals={"text": "MODEL DATA"})


def main(name: str, argv: Sequence[str]) -> int:
    """Run the command `name` and return its exit code."""
    return run(next(kind for kind in FINE_TUNING if kind.command == name), argv)


def run(kind: type[FineTuneConfig], argv: Sequence[str], names_model: bool = True) -> int:
    """Parse the command line of a stage and train.

    Args:
        kind: the settings class of the stage.
        names_model: True if the first word of `argv` is the model; else a settings file names it.
    """
    console.show_notices(console.main_rank())
    file = training.config_file(argv)
    if file and (stage := settings_in(file).get("stage", kind.stage)) != kind.stage:
        other = config_class({"stage": stage}).command
        raise BardletError(f"{file}: has settings of `bardlet {other}`; run "
                           f"`bardlet {other} --config {quoted(file)}`")

    def explain(name: str) -> str:
        if name == "init":
            return f"name the model first, without a flag; for example: {kind.example}"
        return why_not(name, kind) if classes_with(name) and name not in NOT_TYPED else ""

    values = typed((training.RunOptions, kind), argv, usage(kind), NOT_TYPED, explain)
    options, settings, started = training.split(values)
    defaults = combine.file_settings(file, kind, settings)
    if names_model and settings.get("text"):
        model, *data = settings["text"]
        settings |= {"init": model, "text": tuple(data) or defaults.get("text", ())}
    config = kind(**defaults | settings)
    if config.init is None:
        raise BardletError(f"name the model to train, a run folder, and then a file: {kind.example}")
    if isinstance(config, RolloutConfig) and is_command(config.reward) and "reward" not in settings:
        raise BardletError(f"--reward '{config.reward}': bardlet never runs a command that only a file names; type it: "
                           f"`bardlet {kind.command} --config ... --reward ...`")
    return training.start(config, options, started)
