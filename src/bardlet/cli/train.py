"""`bardlet train`: a text goes in, a run folder comes out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bardlet import console
from bardlet.cli import stage, training
from bardlet.cli.parser import Group, Usage, typed
from bardlet.config import combine
from bardlet.config.pretraining import FromScratch, TrainConfig, TranslationConfig
from bardlet.config.stages import FINE_TUNING, classes_with
from bardlet.config.toml import settings_in, why_not

log = logging.getLogger("bardlet")

USAGE = Usage(
    "train", "[TEXT ...] [--minutes M | --steps N] [OPTIONS]",
    "Train a GPT on a text, or a translator on sentence pairs. The result is a Hugging Face model folder, and a run "
    "that `bardlet resume` can continue.",
    (("bardlet train my.txt --minutes 10", "the best model for ten minutes of this machine"),
     ("bardlet train books/ \"*.md\" --plan", "show the plan, its reasons and the predicted loss"),
     ("bardlet train my.txt --init runs/base", "start from trained weights"),
     ("bardlet train --source my.de --target my.en", "learn to translate")),
    (Group("data", ("tokenizer", "vocab_size", "source", "target", "pair"),
           ("field", "separator", "normalize", "val_part", "lowercase")),
     Group("model", ("model", "n_layer", "n_head", "n_embd", "block_size", "init", "replay"),
           ("replay_text", "lora", "n_encoder_layer", "n_kv_head", "n_inner", "tie_embeddings", "activation", "bias",
            "prefix_lm")),
     Group("training", ("minutes", "steps", "batch_size", "lr", "muon_lr", "dropout", "keep", "seed"),
           ("batch_tokens", "grad_accum", "label_smoothing", *training.OPTIMIZER, *training.CHECKPOINTS)),
     training.MACHINE, training.OUTPUT),
    positionals={"text": "TEXT"}, metavars={"elastic": "N", "model": "NAME", "replay": "SHARE", "replay_text": "TEXT"})


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code. A settings file of another stage runs that stage's command."""
    console.show_notices(console.main_rank())
    file = training.config_file(argv)
    name = settings_in(file).get("stage") if file else None
    fine_tuning = {kind.stage: kind for kind in FINE_TUNING}
    if name in fine_tuning:
        return stage.run(fine_tuning[name], argv, names_model=False)
    options, config, started = read(argv)
    if not console.main_rank():
        return training.start(config, options, started)
    if names := _inputs(config):  # at once: importing PyTorch takes seconds
        console.say(f"reading {console.listing(names)}")
        if isinstance(config, TrainConfig) and not config.init:
            from bardlet.data import prefetch

            with prefetch.reading(config.text, config.field, config.separator, config.normalize):
                return training.start(config, options, started)
    else:
        minutes = config.steps is None and (config.minutes or config.default_minutes)
        length = console.minutes(minutes) if minutes else f"{config.steps:,} steps"
        console.say(f"no text named: {'planning for' if options.plan else 'training on'} the default, Tiny "
                    f"Shakespeare, for {length}{'' if options.plan else '; Ctrl-C saves and stops'}. Loading PyTorch "
                    "and timing this machine takes a few seconds")
    return training.start(config, options, started)


def _inputs(config: FromScratch) -> tuple[str, ...]:
    """Return the names of the texts or sentence pairs, as they were given, or of the model of --init."""
    pairs: tuple[str, ...] = ()
    if isinstance(config, TranslationConfig):
        pairs = tuple(name for name in (config.pair, config.source, config.target) if name)
    return config.text or pairs or ((config.init,) if config.init else ())


def read(argv: Sequence[str]) -> tuple[training.RunOptions, FromScratch, float]:
    """Return (options, settings, start time) of a command line."""
    values = typed((training.RunOptions, TrainConfig, TranslationConfig), argv, USAGE, training.NOT_TYPED,
                   lambda name: why_not(name, TrainConfig)
                   if classes_with(name) and name not in training.NOT_TYPED else "")
    options, settings, started = training.split(values)
    return options, combine.configure(settings, training.config_file(argv)), started
