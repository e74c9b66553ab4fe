"""The ladder's page: one HTML file with everything in it, which opens without a network and runs no script."""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bardlet import __version__
from bardlet.ladder import pictures, rungs, sources
from bardlet.ladder.rungs import Rung
from bardlet.run import hf
from bardlet.runtime import atomic
from bardlet.runtime.device import processor

if TYPE_CHECKING:
    from torch import nn

    from bardlet.ladder.run import Ladder, Outcome
    from bardlet.tokenizer import Tokenizer

SENTENCE = "To be, or not to be: that is the question"
"""What the attention maps show where the user's sentence has no character that the model knows."""


@dataclass(frozen=True)
class Picture:
    """A picture of the page, in both themes."""

    kind: str
    """curves, table, positions, attention or last: what it shows."""
    light: str
    """A data URI."""
    dark: str
    width: int
    height: int
    alt: str
    """What is to be seen, for those who do not see it."""
    caption: str
    wide: bool = False
    """Whether its details need more than a phone's width: it then scrolls in its box."""


@dataclass(frozen=True)
class RungRow:
    """A rung's line of the table: its figures over all seeds, as text, empty where there is none."""

    rung: Rung
    seeds: int
    parameters: str
    steps: str
    seconds: str
    """Of the fastest seed: the others may have had company on the machine."""
    val_loss: str
    lecture_way: str
    lecture: str
    band: str
    word: str
    """normal, or how it is not; empty where nothing is known to compare with."""


@dataclass(frozen=True)
class CodeRow:
    """A row of a comparison as HTML; None where a side has no line."""

    kind: str
    left_number: int | None
    left: str | None
    right_number: int | None
    right: str | None
    left_indent: int
    """How far the code is indented: a line too long for its column goes on a little further in."""
    right_indent: int


@dataclass(frozen=True)
class Comparison:
    """Code or settings of a rung, beside those of the rung before where there is one to compare with."""

    what: str
    """code or settings."""
    before: Rung | None
    rows: list[CodeRow]


@dataclass(frozen=True)
class Section:
    """What the page says of one rung."""

    line: RungRow
    compared: list[Comparison]
    sample: str
    pictures: list[Picture]
    note: str
    """What was left out of the sentence; empty where nothing was."""


def write(out: Path, outcomes: Sequence[Outcome], sentence: str, facts: Mapping[str, Any]) -> Path:
    """Make out/report.html, whose pictures also lie in out/figures, and give back its path.

    Args:
        out: a folder; it is made where it is missing.
        outcomes: trained rungs, at least one, of one or several seeds, in any order. Samples and pictures are those of
            the first seed.
        sentence: what the attention maps are drawn for. Characters that the model never saw are left out, and the page
            says so.
        facts: what is said of the ladder as a whole: text; machine, date and versions of the trainings; comparable
            (whether the lecture's figures apply: its text, in characters); command, the last one, where it is known.
    """
    outcomes = sorted(outcomes, key=lambda o: (o.rung.number, o.seed))
    first = {o.rung.number: o for o in reversed(outcomes)}
    lines = {number: line(number, outcomes, bool(facts.get("comparable"))) for number in sorted(first)}
    curves = picture(out, "loss-curves", "curves", pictures.loss_curves(outcomes),
                     "Validation loss of each rung while it trains. " + "; ".join(
                         f"rung {n}, {row.rung.name}, ends at {row.val_loss}" for n, row in lines.items()) + ".",
                     curves_caption(outcomes))
    parts = [section(out, first[number], row, sentence) for number, row in lines.items()]
    page = _template().render(sections=parts, curves=curves, facts=facts, lines=list(lines.values()),
                              time=duration(sum(o.seconds for o in outcomes)), css=_file("page.css"))
    path = out / "report.html"
    atomic.write_text(path, page)
    return path


def curves_caption(outcomes: Sequence[Outcome]) -> str:
    """What the loss curves show, as far as these rungs need it said."""
    words = ["Measured now and then on a part of the validation text; the numbers beside the names are over all of it, "
             "at the end."]
    if any(o.rung.scaled for o in outcomes):
        words.append("The scaled rungs have a panel of their own, over time.")
    if len({o.seed for o in outcomes}) > 1:
        words.append("Lines are means over seeds, bands reach from the lowest to the highest.")
    if any(o.rung.settings.get("keep") == "average" for o in outcomes):
        words.append("The average of weights is made at the end: while it trains, that rung's curve is of its weights "
                     "as they are.")
    return " ".join(words)


# ---------------------------------------------------------------------------- figures


def duration(seconds: float) -> str:
    """A time in words, to the second, from an hour on to the minute."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def line(number: int, outcomes: Sequence[Outcome], comparable: bool) -> RungRow:
    """The table's line of a rung: means over its seeds, with the deviation (n - 1) where there are several.

    The lecture's figure and the normal band are only given where the text is the lecture's (`comparable`).
    """
    mine = [o for o in outcomes if o.rung.number == number]
    rung = mine[0].rung
    loss = statistics.fmean(o.val_loss for o in mine)
    band = rungs.bands().get(rung.name) if comparable else None
    low, high = (float(band["low"]), float(band["high"])) if band else (0.0, 0.0)
    word = ("lower than normal" if loss < low else "higher than normal" if loss > high else "normal") if band else ""
    return RungRow(
        rung, len(mine), f"{mine[0].parameters:,}", f"{statistics.fmean(o.steps for o in mine):,.0f}",
        f"{min(o.seconds for o in mine):,.0f}", mean([o.val_loss for o in mine]),
        mean([o.val_loss_lecture for o in mine]),
        f"{rung.lecture:.2f}" if comparable and rung.lecture is not None else "",
        f"{low:.3f} to {high:.3f}" if band else "", word)  # fmt: skip


def mean(values: Sequence[float]) -> str:
    """The mean with three decimals, and the standard deviation (n - 1) where there are several values."""
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


# ---------------------------------------------------------------------------- sections


def section(out: Path, outcome: Outcome, row: RungRow, sentence: str) -> Section:
    """A rung's code beside the one before, its sample, and its pictures, which are drawn into out/figures."""
    rung = outcome.rung
    model, tokenizer = hf.read_folder(outcome.folder)
    shown, note = fit_sentence(tokenizer, sentence, outcome.sample)
    found = rung_pictures(out, rung, model, tokenizer, shown)
    has_maps = any(p.kind == "attention" for p in found)
    return Section(row, compared(rung), outcome.sample, found, note if has_maps else "")


def compared(rung: Rung) -> list[Comparison]:
    """The rung's code beside that of the rung before, and before it the settings where they are what differs."""
    found = []
    if earlier := sources.retrained(rung):
        found.append(Comparison("settings", earlier, code_rows(*sources.settings_beside(earlier, rung))))
    before = sources.before(rung)
    old = sources.source_before(before, rung) if before else ""
    return [*found, Comparison("code", before, code_rows(old, sources.source(rung)))]


def code_rows(old: str, new: str) -> list[CodeRow]:
    """Two pieces of code line by line as HTML."""
    left, right = sources.highlighted(old), sources.highlighted(new)

    def indent(text: str | None) -> int:
        return len(text) - len(text.lstrip()) if text else 0

    return [CodeRow(row.kind, row.left_number, None if row.left_number is None else left[row.left_number - 1],
                    row.right_number, None if row.right_number is None else right[row.right_number - 1],
                    indent(row.left), indent(row.right))
            for row in sources.beside(old, new)]  # fmt: skip


def fit_sentence(tokenizer: Tokenizer, sentence: str, sample: str) -> tuple[str, str]:
    """(a sentence that the tokenizer can write, what was left out of the user's, as a sentence or "").

    Where nothing is left of it, one of Hamlet's, and where the model knows no letter of that, its own sample.
    """
    kept, dropped = tokenizer.drop_unseen(sentence)
    if len(tokenizer.encode(kept)):
        unseen = dict.fromkeys(c for c in sentence if not tokenizer.drop_unseen(c)[0]) if dropped else ()
        named = ", ".join(pictures.printable(c) for c in unseen)
        return kept, f"Left out of the sentence, because the model never saw them: {named}." if dropped else ""
    why = "The model knows no character of the sentence that was asked for" if sentence else "No sentence was given"
    for other, name in ((SENTENCE, "one of Hamlet's"), (sample, "the start of its own sample")):
        kept = tokenizer.drop_unseen(other)[0][: len(SENTENCE)]
        if len(tokenizer.encode(kept)):
            return kept, f"{why}: this is {name}."
    return tokenizer.decode(range(min(8, tokenizer.vocab_size))), f"{why}: these are its first characters."


def rung_pictures(out: Path, rung: Rung, model: nn.Module, tokenizer: Tokenizer, sentence: str) -> list[Picture]:
    """What there is to be seen in a trained rung: the bigram's table, the positions, the attention maps."""
    name, unit = f"{rung.number:02}-{rung.name}", token_unit(tokenizer)
    found: list[Picture] = []
    tables: dict[str, torch.Tensor] = dict(model.named_parameters())
    if rung.model == "bigram":
        probability = tables["token_embedding_table.weight"].detach().softmax(-1)
        letters = [tokenizer.decode([i]) for i in range(len(probability))]
        many = f" Of {len(letters):,}, the {pictures.MOST} that it writes most often." if len(letters) > 100 else ""
        found.append(picture(out, f"{name}-table", "table", pictures.bigram_table(probability, letters),
                             f"The bigram's table: a square for each pair of {unit}s, the stronger its colour, the "
                             f"likelier the second after the first. {likeliest(probability, letters)}",
                             f"How likely each {unit} (columns) is after each (rows). ↵ is a line break, ␣ a space."
                             + many,
                             wide=True))
    if "position_embedding_table.weight" in tables:
        found.append(picture(out, f"{name}-positions", "positions",
                             pictures.position_embeddings(tables["position_embedding_table.weight"].detach()),
                             "Two pictures of the position embeddings: the table itself, a row for each position, and "
                             "how alike the rows are, with 1 along the diagonal.",
                             "The table of positions, and the cosine between the rows of each two."))
    return found + attention_pictures(out, name, model, tokenizer, sentence)


def attention_pictures(out: Path, name: str, model: nn.Module, tokenizer: Tokenizer, sentence: str) -> list[Picture]:
    """The attention maps of a sentence, and of a longer one its last rows enlarged; [] for a rung without attention."""
    ids = tokenizer.encode(sentence)
    maps = pictures.attention(model, torch.from_numpy(ids))
    if not maps:
        return []
    T, unit = maps[0][1].shape[-1], token_unit(tokenizer)
    letters = [tokenizer.decode([int(i)]) for i in ids[-T:]]
    heads = sum(len(weights) for _, weights in maps)
    several = f"{heads} heads" if heads > 1 else "one head"
    what = f"“{tokenizer.decode(ids[-T:])}”"
    cut = f", the last {T} {unit}s of the sentence: no more fit in this context" if len(ids) > T else ""
    found = [picture(out, f"{name}-attention", "attention", pictures.attention_maps(maps, letters),
                     f"Attention maps of {several} for {what}, each a triangle: a row for each {unit}, and in it "
                     "how much it takes from itself and from each before it.",
                     f"Who looks at whom in {what}{cut}. A row looks, a column is looked at, and the weights of a row "
                     "add up to 1.", wide=heads > 1)]  # fmt: skip
    if T > pictures.NAMED:
        found.append(picture(out, f"{name}-last", "last", pictures.last_row_of_attention(maps, letters),
                             f"Attention of the last {unit} of {what}: a row for each head, and in it how much the "
                             f"last {unit} takes from each {unit} of the sentence.",
                             "The last rows of the maps above, enlarged: what each head takes in before the next "
                             f"{unit} is guessed.", wide=True))
    return found


def token_unit(tokenizer: Tokenizer) -> str:
    """What a token is called on the page."""
    return "character" if tokenizer.kind == "char" else "token"


def likeliest(probability: torch.Tensor, letters: Sequence[str]) -> str:
    """The three surest pairs of the bigram's table, in words."""
    values, places = probability.flatten().topk(min(3, probability.numel()))
    pairs = (f"{pictures.printable(letters[place // len(letters)])} then "
             f"{pictures.printable(letters[place % len(letters)])} ({100 * value:.0f} %)"
             for value, place in zip(values.tolist(), places.tolist(), strict=True))
    return "The surest: " + ", ".join(pairs) + "."


def picture(out: Path, name: str, kind: str, paint: pictures.Paint, alt: str, caption: str,
            wide: bool = False) -> Picture:
    """Draw a picture into out/figures, and take it up for the page. `kind`: see Picture."""
    folder = out / "figures"
    pictures.draw(folder, name, paint)
    light, dark = ((folder / f"{name}{suffix}.png").read_bytes() for suffix in ("", "-dark"))
    width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))  # of a PNG's first chunk
    return Picture(kind, _data_uri(light), _data_uri(dark), width, height, alt, caption, wide)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def facts(ladder: Ladder, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the report says of the ladder as a whole: machine, date and versions are those of the trainings.

    Args:
        outcomes: what the report shows. Where none of them says what it was made by (those of an older bardlet do not),
            this machine and this day stand in.
    """
    made = [outcome.made for outcome in outcomes if outcome.made]
    if not made:
        device = ladder.dist.device
        made = [{"date": time.strftime("%Y-%m-%d"), "bardlet": __version__, "torch": torch.__version__,
                 "threads": ladder.threads,
                 "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor()}]
    return {"text": ladder.corpus.name, "comparable": ladder.comparable, **summary(made)}


def summary(made: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """machine, date and versions of trainings (`Outcome.made`, at least one) in words, each once."""
    threads: dict[str, set[int]] = {}
    for one in made:
        threads.setdefault(one["processor"], set()).add(one["threads"])
    machine = "; ".join(f"{name}, {' or '.join(map(str, sorted(several)))} thread{'s' * (max(several) > 1)}"
                        for name, several in threads.items())
    dates = sorted({one["date"] for one in made if "date" in one})
    return {"machine": machine, "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
            "versions": "; ".join(dict.fromkeys(f"bardlet {one['bardlet']}, torch {one['torch']}" for one in made))}


# ---------------------------------------------------------------------------- the template


def _file(name: str) -> str:
    return resources.files("bardlet.ladder").joinpath(name).read_text(encoding="utf-8")


def _template() -> Any:
    """page.html.jinja: whatever is put in is escaped, but for the code, which Pygments has escaped, and the CSS."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    return environment.from_string(_file("page.html.jinja"))
