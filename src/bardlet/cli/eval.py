"""`bardlet eval DIR [TEXT ...]`: the loss of a model on a text, in units that compare across tokenizers.

With --task, questions whose answer is known: eval_tasks.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    import numpy as np

    from bardlet.data.corpus import Corpus
    from bardlet.evaluation.metrics import Score
    from bardlet.stages.sft import SFT
    from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class Command:
    """The loss of a model on the validation part of its own text, or on another text; BLEU of one that translates; with
    --task, how many questions it answers."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder, or a Hugging Face folder with a gpt2, qwen3 or pegasus model."""
    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora, files, folders or globs, read whole; none: the validation part of the run's text."""
    field: str = "text"
    """The field of a .jsonl record that holds its text."""
    source: str | None = None
    """Of a model that translates: the file to translate. None: the pairs that were held out."""
    target: str | None = None
    """The file with the translations of --source, line by line: BLEU and chrF are measured against it."""
    beam: int = 1
    """Of a model that translates: how many hypotheses are followed side by side."""
    protocol: Literal["full", "random"] = "full"
    """full: every token once, in windows side by side; random: 200 batches of 64 random windows, as nanoGPT does."""
    context: int | None = None
    """Length of a window; none: the block size, at most 256."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Questions whose answer is known, from $BARDLET_DATA: hellaswag, arc-easy, arc-challenge, openbookqa, piqa, copa,
    winogrande, winograd, boolq, commonsense-qa, siqa, mmlu, lambada, arithmetic, gsm8k."""
    limit: int | None = None
    """Of each --task so many questions, evenly spread; none: all."""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products."""
    json: bool = False
    """Print one JSON object on one line, last."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 1:
            raise BardletError(f"--context {self.context}: it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise BardletError(f"--limit {self.limit}: it must be at least 1")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "eval")
    console.show_notices()
    from bardlet.run import hf
    from bardlet.runtime import device as runtime_device

    folder = Path(command.run)
    if command.task:
        from bardlet.cli import eval_tasks

        refuse(command, "text", "field", "source", "target", "beam", "protocol", "context",
               why="does not go with --task, which brings its own text")  # fmt: skip
        if _translates(folder):
            raise BardletError(f"{folder}: this model translates, and --task is for models that go on with a text; "
                               "name pairs with --source F --target F")
        return eval_tasks.run(folder, command.task, command.limit, command.device, command.dtype, command.json)
    if "--task" in argv:  # the parser takes no name for none asked
        raise BardletError("--task needs a value: a name, as in --task arc-easy; `bardlet eval --help` has them")
    refuse(command, "limit", why="is for --task")
    if command.source or command.target or _translates(folder):
        return evaluate_translation(command, folder)
    refuse(command, "beam", why="is for a model that translates")
    model, tokenizer = hf.read_folder(folder)
    device = runtime_device.pick_device(command.device)
    runtime_device.set_threads_and_determinism(None, False, device)
    model.to(device)
    result, skipped, what = evaluate_text(command, folder, model, tokenizer, device)
    if skipped:
        console.say(f"note: {skipped:,} characters that the tokenizer has never seen were left out")
    console.say(f"{what}: {result.loss:.4f} nats per token, {result.nats_per_char:.4f} nats per character, "
                f"{result.bits_per_byte:.4f} bits per byte, over {result.tokens:,} tokens")
    if command.json:
        console.say_json({**asdict(result), "skipped_characters": skipped})
    return 0


def refuse(command: Command, *names: str, why: str) -> None:
    """BardletError for an option, or TEXT, that somebody gave and that would do nothing."""
    for name in names:
        if (given := getattr(command, name)) != getattr(Command, name):
            raise BardletError(f"{' '.join(given) if name == 'text' else f'--{name}'}: {why}; leave it out")


def _translates(folder: Path) -> bool:
    """Whether a folder holds a model that was trained on pairs."""
    from bardlet.config.pretraining import TranslationConfig
    from bardlet.run import folder as run_folder
    from bardlet.run import hf

    if (folder / "run.toml").exists():
        return isinstance(run_folder.settings(folder, changed=True)[0], TranslationConfig)
    return folder.is_dir() and hf.read_model_config(folder).model == "encdec"


def evaluate_translation(command: Command, folder: Path) -> int:
    """BLEU and chrF of a model that translates; returns the exit code."""
    from bardlet.cli.translate import load
    from bardlet.config.pretraining import TranslationConfig
    from bardlet.data import bitext, bitext_batches
    from bardlet.evaluation import metrics
    from bardlet.inference import translate
    from bardlet.run import folder as run_folder
    from bardlet.runtime import device as runtime_device
    from bardlet.runtime.distributed import Dist
    from bardlet.stages.translation import Translation

    refuse(command, "field", "protocol", "context", why="is for the loss on a text, and this model translates")
    if command.text:
        raise BardletError(f"{' '.join(command.text)}: this model translates; name pairs with --source F --target F")
    if bool(command.source) != bool(command.target):
        raise BardletError("--source and --target belong together: name both files")
    model, tokenizer, how = load(folder, command.beam, 1.0, 64)
    model_device = runtime_device.place(model, command.device, command.dtype)
    runtime_device.set_threads_and_determinism(None, False, model_device)
    if command.source and command.target:
        read = bitext.read_pairs(Path(command.source), Path(command.target))
        source, reference, what = [a for a, _ in read], [b for _, b in read], f"{command.source} to {command.target}"
    else:
        if not (folder / "run.toml").exists():
            raise BardletError(f"{folder}: no run.toml in it, so its pairs are not known; name some with --source F "
                               "--target F")
        config, record = run_folder.settings(folder, changed=True)
        if not isinstance(config, TranslationConfig):
            raise BardletError(f"{folder}: its run learned no pairs; name some with --source F --target F")
        stage = Translation(config, Dist(0, 1, model_device))
        found = stage.source = stage.load_data()
        if found.hash != record.get("text_hash"):
            log.warning("the pairs of %s are not those that the run trained on any more; what is held out of them may "
                        "have been learned from", found.name)
        stage.data = bitext_batches.tokenize_pairs(found, tokenizer)
        source, reference = stage.held_out_lines()
        what = f"pairs of {found.name} that were held out"
    if not source:
        raise BardletError(f"{what}: there is no line in it")
    begun = time.monotonic()
    made = translate.translate_lines(model, tokenizer, source, how)
    seconds = time.monotonic() - begun
    score = metrics.translation_score(made, reference, tokenizer.lowercase)
    console.say(f"{what}: BLEU {score.bleu:.2f}, chrF {score.chrf:.2f}, over {score.lines:,} lines "
                f"({score.lines / seconds:.0f} a second, {'greedy' if command.beam == 1 else f'beam {command.beam}'})")
    console.say(f"sacreBLEU: {score.bleu_signature}; {score.chrf_signature}")
    if command.json:
        console.say_json({**asdict(score), "seconds": round(seconds, 3), "beam": command.beam})
    return 0


def evaluate_text(command: Command, folder: Path, model: Any, tokenizer: Tokenizer, device: Any) -> tuple[Score, int, str]:
    """(score, characters left out, what was measured)."""
    from bardlet.data import corpus, shards, windows
    from bardlet.evaluation import metrics
    from bardlet.run import folder as run_folder
    from bardlet.runtime import device as runtime_device
    from bardlet.runtime import distributed
    from bardlet.stages import stage_of
    from bardlet.stages.pretrain import Pretraining
    from bardlet.stages.sft import SFT

    skipped, window = 0, min(256, model.config.block_size)
    if command.text:
        found = corpus.find(command.text, command.field)
        tokens, characters, size, skipped = encode_corpus(found, tokenizer)
        what = found.name
    else:
        if not (folder / "run.toml").exists():
            raise BardletError(f"{folder}: no run.toml in it, so its text is not known; name a text to measure on")
        config, record = run_folder.settings(folder, changed=True)
        stage = stage_of(config)(config, distributed.Dist(0, 1, device))
        if isinstance(stage, SFT):
            refuse(command, "field", "protocol", "context", why="is for the loss on a text, and this run learned "
                    "conversations")  # fmt: skip
            return evaluate_answers(command, stage, record, model, tokenizer), 0, f"held-out answers of {record['text']}"
        if not isinstance(stage, Pretraining):
            raise BardletError(f"{folder}: it learned by {config.stage}, and its README.md says how well; name a text "
                               "to measure on, or a --task")
        found = stage.source = stage.load_data()
        if found.hash != record.get("text_hash"):
            log.warning("%s is not the text that the run trained on any more; what is held out of it may have been "
                        "learned from", found.name)
        stage.data = shards.tokenize_corpus(found, tokenizer, skip_unseen=True)
        tokens, characters, size = stage.held_out()
        skipped, window = stage.data.skipped, min(256, config.block_size)  # as the run itself evaluates
        what = f"{'validation part' if config.val_part == 'val' else 'development split'} of {found.name}"
    if len(tokens) < 2:
        raise BardletError(f"{what}: {len(tokens)} tokens are too few to predict one from another; take a longer text")
    block = command.context or window
    if block > model.config.block_size:
        raise BardletError(f"--context {block} is more than the model's window of {model.config.block_size}: "
                           f"take --context {model.config.block_size} or less")
    full = command.protocol == "full"
    batches = windows.validation_windows(tokens, block) if full else windows.random_windows(tokens, block, seed=0)
    dtype = runtime_device.pick_dtype(command.dtype, device)
    loss = metrics.mean_loss(model, batches, device, dtype, metrics.rows_at_once(model.config, block))
    result = metrics.score(loss, len(tokens), characters, size, tokenizer.decode([int(tokens[0])], skip_special=True))
    return replace(result, tokens=sum(batch["target"].numel() for batch in batches)), skipped, what


def evaluate_answers(command: Command, stage: SFT, record: dict[str, Any], model: Any, tokenizer: Tokenizer) -> Score:
    """The loss on the answers that a run of `bardlet sft` did not learn from."""
    from bardlet.evaluation import metrics
    from bardlet.runtime import device as runtime_device
    from bardlet.stages import sft
    from bardlet.training import losses

    stage.load(tokenizer)
    if stage.source.hash != record.get("text_hash"):
        log.warning("%s is not what the run trained on any more; what is held out of it may have been learned from",
                    stage.source.name)
    device, block = stage.dist.device, stage.config.block_size
    held = stage.parts()[1]
    batches = sft.validation_batches(held, replace(stage.config, eval_tokens=0), int(tokenizer.pad_id or 0))
    dtype = runtime_device.pick_dtype(command.dtype, device)
    mean = metrics.mean_loss(model, batches, device, dtype, metrics.rows_at_once(model.config, block), losses.completion_loss)
    return sft.score(held, tokenizer, mean)


def encode_corpus(found: Corpus, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int, int]:
    """All of a text: (tokens, characters, bytes, characters left out since the tokenizer does not know them)."""
    import numpy as np

    pieces, characters, size, skipped = [], 0, 0, 0
    for document in found.documents():
        text, unseen = tokenizer.drop_unseen(document)
        pieces.append(tokenizer.encode(text))
        if tokenizer.eos_id is not None and found.several:
            pieces.append(np.array([tokenizer.eos_id], pieces[-1].dtype))
        characters, size, skipped = characters + len(text), size + len(text.encode()), skipped + unseen
    return np.concatenate(pieces), characters, size, skipped
