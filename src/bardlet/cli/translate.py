"""`bardlet translate DIR`: lines of one language in, lines of the other out, in the same order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.api.models import Model
    from bardlet.inference.translate import TranslateOptions

log = logging.getLogger("bardlet")

CHUNK = 2048
"""Lines read before the first is translated: enough to batch lines of similar length."""

USAGE = Usage(
    "translate", "RUN [FILE ...] [OPTIONS]",
    "Translate standard input, or files, one sentence per line. The output has one line for each line of the input.",
    (("bardlet translate runs/de-en < new.de > new.en", "translate a file"),
     ("bardlet translate runs/de-en new.de --beam 5", "with beam search")),
    (Group("search", ("beam", "length_penalty", "batch_size")), Group("machine", ("device", "dtype")),
     Group("output", ("attention", "json"))),
    positionals={"run": "RUN", "files": "FILE"}, metavars={"attention": "FILE"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    run: str
    """A run trained on sentence pairs, or a Hugging Face folder with a pegasus model."""
    files: tuple[str, ...] = ()
    """Files to translate, one after the other (default: standard input)."""
    beam: int = 1
    """Beam width. 1: greedy, always the likeliest token."""
    length_penalty: float = 1.0
    """Length penalty of beam search: above 1 longer, below 1 shorter. A hypothesis scores the sum of log p divided by
    length to this power."""
    batch_size: int = 64
    """Lines per batch."""
    attention: str | None = None
    """Draw the cross-attention of the first line to this PNG file."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights."""
    json: bool = False
    """Print one JSON object on the last line instead of the lines."""

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("beam", self.beam >= 1, "at least 1"), ("batch-size", self.batch_size >= 1, "at least 1"),
            ("length-penalty", abs(self.length_penalty) <= 10, "from -10 to 10"),
        ):
            if not valid:
                raise BardletError(f"--{name} {getattr(self, name.replace('-', '_'))}: must be {requirement}")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    console.show_notices()
    from bardlet.api.models import load

    model = load(command.run, device=command.device, dtype=command.dtype)
    options = model.translate_options(command.beam, command.length_penalty, command.batch_size)
    if command.attention and not hasattr(model.module, "cross_attention"):
        raise BardletError(f"--attention: {model.module.config.model} has no cross-attention to draw; drop it")
    if command.attention and not command.attention.lower().endswith(".png"):
        raise BardletError(f"--attention {command.attention}: must name a .png file")
    lines, first = read(command.files), None
    translations: list[str] = []
    interactive = not command.files and sys.stdin.isatty()  # translate each line at once
    while chunk := list(islice(lines, 1 if interactive else CHUNK)):
        done = in_order(model, chunk, options, len(translations), None if command.json else console.say)
        first = first or next((source for source, text in zip(chunk, done, strict=True) if text), None)
        translations += done
    if not translations:
        raise BardletError("standard input is empty; name a file, or pipe lines in" if not command.files else
                           f"{', '.join(command.files)}: no lines to translate")
    if command.attention:
        draw_attention(Path(command.attention), model, first, options)
    if command.json:
        console.say_json({"translations": translations})
    return 0


def read(files: Sequence[str]) -> Iterator[str]:
    """Return the lines of files, or of standard input. Raise BardletError if they are not UTF-8 text."""
    from bardlet.data import bitext
    from bardlet.data.text import decoded_lines

    if not files:
        return decoded_lines(sys.stdin.buffer, "standard input")
    return iter([line for file in files for line in bitext.read_lines(Path(file))])


def in_order(model: Model, lines: Sequence[str], options: TranslateOptions, before: int,
             say: Callable[[str], None] | None) -> list[str]:
    """Return the translations of lines; pass each to `say` as soon as all before it are done.

    before: number of lines translated earlier, which error messages count.
    """
    from bardlet.inference import translate

    done: dict[int, str] = {}
    printed = 0
    for index, text in translate.stream(model.module, model.tokenizer, lines, options, before):
        done[index] = text
        while say and printed in done:
            say(done[printed])
            printed += 1
    return [done[i] for i in range(len(lines))]


def draw_attention(path: Path, model: Model, line: str | None, options: TranslateOptions) -> None:
    """Draw the cross-attention between a sentence and its translation."""
    from bardlet.inference import translate
    from bardlet.run import plots

    if line is None:
        raise BardletError("--attention: no line has a translation to draw; drop it")
    maps, source, target = translate.cross_attention(model.module, model.tokenizer, line, options)
    plots.attention_maps(path, maps.numpy(), source, target)
    log.info("the cross-attention of the first line is in %s", path)
