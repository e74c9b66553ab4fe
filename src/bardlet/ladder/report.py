"""The ladder's report: one self-contained HTML file that loads nothing from the network and runs no script."""

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
"""The sentence of the attention maps if the model knows no character of the user's sentence."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page, in both themes."""

    kind: str
    """curves, table, positions, attention or last."""
    light: str
    """A data URI."""
    dark: str
    width: int
    height: int
    alt: str
    """The description for screen readers."""
    caption: str
    wide: bool = False
    """True if the details need more than a phone's width: the picture then scrolls sideways in its box."""


@dataclass(frozen=True)
class RungRow:
    """A row of the table: a rung's figures over all seeds, as text; empty if there is no figure."""

    rung: Rung
    seeds: int
    parameters: str
    steps: str
    seconds: str
    """Training time of the fastest seed: other jobs may have slowed the others down."""
    val_loss: str
    val_loss_lecture: str
    lecture: str
    band: str
    verdict: str
    """normal, lower than normal or higher than normal; empty if there is no band."""


@dataclass(frozen=True)
class CodeRow:
    """A row of a comparison as HTML; None on a side without a line."""

    kind: str
    left_number: int | None
    left: str | None
    right_number: int | None
    right: str | None
    left_indent: int
    """The code's indentation: a line that is too long for its column wraps with a hanging indent."""
    right_indent: int


@dataclass(frozen=True)
class Comparison:
    """A rung's code or settings next to those of the rung before, if there is one to compare with."""

    kind: str
    """code or settings."""
    before: Rung | None
    rows: list[CodeRow]


@dataclass(frozen=True)
class Section:
    """The page's section on one rung."""

    row: RungRow
    comparisons: list[Comparison]
    sample: str
    pictures: list[Picture]
    note: str
    """A note on characters removed from the sentence; empty if none were."""


def write(out: Path, outcomes: Sequence[Outcome], sentence: str, facts: Mapping[str, Any]) -> Path:
    """Write out/report.html, and its pictures to out/figures as well. Returns the path of the page.

    Args:
        out: a folder, created if missing.
        outcomes: trained rungs, at least one, from one or several seeds, in any order. Samples and pictures come from
            the first seed.
        sentence: the sentence for the attention maps. Characters that the model never saw are removed, with a note on
            the page.
        facts: facts about the whole ladder: text; machine, date and versions of the training runs; comparable (True if
            the lecture's figures apply: the same text, in characters); command, the last command, if known.
    """
    outcomes = sorted(outcomes, key=lambda o: (o.rung.number, o.seed))
    first = {o.rung.number: o for o in reversed(outcomes)}
    rows = {number: rung_row(number, outcomes, bool(facts.get("comparable"))) for number in sorted(first)}
    curves = picture(out, "loss-curves", "curves", pictures.loss_curves(outcomes),
                     "Validation loss of each rung during training. " + "; ".join(
                         f"rung {n}, {row.rung.name}, ends at {row.val_loss}" for n, row in rows.items()) + ".",
                     curves_caption(outcomes))
    sections = [section(out, first[number], row, sentence) for number, row in rows.items()]
    page = _template().render(sections=sections, curves=curves, facts=facts, rows=list(rows.values()),
                              time=duration(sum(o.seconds for o in outcomes)), css=_file("page.css"))
    path = out / "report.html"
    atomic.write_text(path, page)
    return path


def curves_caption(outcomes: Sequence[Outcome]) -> str:
    """Return the caption of the loss curves, with only the sentences that apply to these rungs."""
    sentences = ["The curves are measured during training on part of the validation split. The numbers next to the "
                 "names are the final losses on all of it."]
    if any(o.rung.scaled for o in outcomes):
        sentences.append("The scaled rungs have their own panel, over time.")
    if len({o.seed for o in outcomes}) > 1:
        sentences.append("Lines are means over seeds; bands span the lowest to the highest seed.")
    if any(o.rung.settings.get("keep") == "average" for o in outcomes):
        sentences.append("The rung with averaged weights averages them at the end; its curve shows the weights of each "
                         "step.")
    return " ".join(sentences)


# ---------------------------------------------------------------------------- figures


def duration(seconds: float) -> str:
    """Format a duration: in minutes and seconds, or from one hour on in hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def rung_row(number: int, outcomes: Sequence[Outcome], comparable: bool) -> RungRow:
    """Return a rung's row of the table: means over its seeds, with the standard deviation (n - 1) if there are several.

    The lecture's figure and the normal band are included only if the text is the lecture's (`comparable`).
    """
    seeds = [o for o in outcomes if o.rung.number == number]
    rung = seeds[0].rung
    loss = statistics.fmean(o.val_loss for o in seeds)
    band = rungs.bands().get(rung.name) if comparable else None
    low, high = (float(band["low"]), float(band["high"])) if band else (0.0, 0.0)
    verdict = rungs.place(loss, band) if band else ""
    return RungRow(
        rung, len(seeds), f"{seeds[0].parameters:,}", f"{statistics.fmean(o.steps for o in seeds):,.0f}",
        f"{min(o.seconds for o in seeds):,.0f}", mean([o.val_loss for o in seeds]),
        mean([o.val_loss_lecture for o in seeds]),
        f"{rung.lecture:.2f}" if comparable and rung.lecture is not None else "",
        f"{low:.3f} to {high:.3f}" if band else "", verdict)  # fmt: skip


def mean(values: Sequence[float]) -> str:
    """Format the mean with three decimals, and the standard deviation (n - 1) if there are several values."""
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


# ---------------------------------------------------------------------------- sections


def section(out: Path, outcome: Outcome, row: RungRow, sentence: str) -> Section:
    """Return a rung's section: code comparison, sample and pictures. Draws the pictures to out/figures."""
    rung = outcome.rung
    model, tokenizer = hf.read_folder(outcome.folder)
    sentence, note = fit_sentence(tokenizer, sentence, outcome.sample)
    drawn = rung_pictures(out, rung, model, tokenizer, sentence)
    has_maps = any(p.kind == "attention" for p in drawn)
    return Section(row, comparisons(rung), outcome.sample, drawn, note if has_maps else "")


def comparisons(rung: Rung) -> list[Comparison]:
    """Compare a rung's code with the rung before; if only settings differ, compare those first."""
    settings = []
    if earlier := sources.same_model_predecessor(rung):
        settings.append(Comparison("settings", earlier, code_rows(*sources.settings_to_compare(earlier, rung))))
    before = sources.rung_to_compare(rung)
    old = sources.source_to_compare(before, rung) if before else ""
    return [*settings, Comparison("code", before, code_rows(old, sources.source(rung)))]


def code_rows(old: str, new: str) -> list[CodeRow]:
    """Compare two pieces of code line by line, as HTML."""
    left, right = sources.highlighted(old), sources.highlighted(new)

    def indent(text: str | None) -> int:
        return len(text) - len(text.lstrip()) if text else 0

    return [CodeRow(row.kind, row.left_number, None if row.left_number is None else left[row.left_number - 1],
                    row.right_number, None if row.right_number is None else right[row.right_number - 1],
                    indent(row.left), indent(row.right))
            for row in sources.side_by_side(old, new)]  # fmt: skip


def fit_sentence(tokenizer: Tokenizer, sentence: str, sample: str) -> tuple[str, str]:
    """Return (a sentence that the tokenizer can encode, a note on what was removed from the user's sentence, or "").

    If nothing is left, return a line from Hamlet or, if the model knows no character of that, its own sample.
    """
    kept, dropped = tokenizer.drop_unseen(sentence)
    if len(tokenizer.encode(kept)):
        unseen = dict.fromkeys(c for c in sentence if not tokenizer.drop_unseen(c)[0]) if dropped else ()
        labels = ", ".join(pictures.printable(c) for c in unseen)
        return kept, f"Removed from the sentence, because the model never saw them: {labels}." if dropped else ""
    why = "The model knows no character of your sentence" if sentence else "You gave no sentence"
    for text, name in ((SENTENCE, "a line from Hamlet"), (sample, "the start of its own sample")):
        kept = tokenizer.drop_unseen(text)[0][: len(SENTENCE)]
        if len(tokenizer.encode(kept)):
            return kept, f"{why}. The maps show {name}."
    return (tokenizer.decode(range(min(8, tokenizer.vocab_size))),
            f"{why}. The maps show the first characters of its vocabulary.")


def rung_pictures(out: Path, rung: Rung, model: nn.Module, tokenizer: Tokenizer, sentence: str) -> list[Picture]:
    """Draw what a trained rung has learned: the bigram's table, the position embeddings, the attention maps."""
    name, unit = f"{rung.number:02}-{rung.name}", token_unit(tokenizer)
    drawn: list[Picture] = []
    tables: dict[str, torch.Tensor] = dict(model.named_parameters())
    if rung.model == "bigram":
        probability = tables["token_embedding_table.weight"].detach().softmax(-1)
        texts = [tokenizer.decode([i]) for i in range(len(probability))]
        selection = (f" Of {len(texts):,} {unit}s, these are the {pictures.MAX_BIGRAM_TOKENS} that the model generates "
                     "most often." if len(texts) > 100 else "")
        drawn.append(picture(out, f"{name}-table", "table", pictures.bigram_table(probability, texts),
                             f"The bigram's table: a square for each pair of {unit}s. The stronger its color, the more "
                             f"likely the second {unit} follows the first. {likeliest(probability, texts)}",
                             f"The probability of each {unit} (columns) after each {unit} (rows). ↵ is a line break, "
                             f"␣ a space.{selection}",
                             wide=True))
    if "position_embedding_table.weight" in tables:
        drawn.append(picture(out, f"{name}-positions", "positions",
                             pictures.position_embeddings(tables["position_embedding_table.weight"].detach()),
                             "Two maps of the position embeddings: the table with a row per position, and the cosine "
                             "similarity of each pair of rows, with 1 on the diagonal.",
                             "The position embedding table, and the cosine similarity of each pair of rows."))
    return drawn + attention_pictures(out, name, model, tokenizer, sentence)


def attention_pictures(out: Path, name: str, model: nn.Module, tokenizer: Tokenizer, sentence: str) -> list[Picture]:
    """Draw a sentence's attention maps and, if it is long, the last rows enlarged; [] for a rung without attention."""
    ids = tokenizer.encode(sentence)
    maps = pictures.attention(model, torch.from_numpy(ids))
    if not maps:
        return []
    T, unit = maps[0][1].shape[-1], token_unit(tokenizer)
    texts = [tokenizer.decode([int(i)]) for i in ids[-T:]]
    heads = sum(len(weights) for _, weights in maps)
    n_heads = f"{heads} heads" if heads > 1 else "one head"
    quoted = f"“{tokenizer.decode(ids[-T:])}”"
    cut = f", the last {T} {unit}s of the sentence: the context holds no more" if len(ids) > T else ""
    drawn = [picture(out, f"{name}-attention", "attention", pictures.attention_maps(maps, texts),
                     f"Attention maps of {n_heads} for {quoted}, each a triangle: a row for each {unit}, with its "
                     f"weights on itself and on each {unit} before it.",
                     f"The attention weights in {quoted}{cut}. A row is the {unit} that attends, a column the {unit} "
                     "that it attends to. Each row sums to 1.", wide=heads > 1)]  # fmt: skip
    if T > pictures.MAX_MAP_LABELS:
        drawn.append(picture(out, f"{name}-last", "last", pictures.last_row_of_attention(maps, texts),
                             f"Attention of the last {unit} of {quoted}: a row for each head, with the weight of the "
                             f"last {unit} on each {unit} of the sentence.",
                             "The last rows of the maps above, enlarged: each head's weights when the model predicts "
                             f"the next {unit}.", wide=True))
    return drawn


def token_unit(tokenizer: Tokenizer) -> str:
    """Return the page's word for a token."""
    return "character" if tokenizer.kind == "char" else "token"


def likeliest(probability: torch.Tensor, texts: Sequence[str]) -> str:
    """Return the three most probable pairs of the bigram's table as a sentence."""
    values, indices = probability.flatten().topk(min(3, probability.numel()))
    pairs = (f"{pictures.printable(texts[i // len(texts)])} then "
             f"{pictures.printable(texts[i % len(texts)])} ({100 * value:.0f} %)"
             for value, i in zip(values.tolist(), indices.tolist(), strict=True))
    return "The most likely pairs: " + ", ".join(pairs) + "."


def picture(out: Path, name: str, kind: str, paint: pictures.Paint, alt: str, caption: str,
            wide: bool = False) -> Picture:
    """Draw a picture to out/figures and return it for the page. `kind`: see Picture."""
    folder = out / "figures"
    pictures.draw(folder, name, paint)
    light, dark = ((folder / f"{name}{suffix}.png").read_bytes() for suffix in ("", "-dark"))
    width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))  # from the PNG's first chunk
    return Picture(kind, _data_uri(light), _data_uri(dark), width, height, alt, caption, wide)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def facts(ladder: Ladder, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the report's facts about the whole ladder: machine, date and versions of the training runs.

    Args:
        outcomes: the outcomes on the page. If none of them records its machine and date (an older bardlet did not),
            this machine and today's date are used.
    """
    provenance = [outcome.made for outcome in outcomes if outcome.made]
    if not provenance:
        device = ladder.dist.device
        provenance = [{"date": time.strftime("%Y-%m-%d"), "bardlet": __version__, "torch": torch.__version__,
                       "threads": ladder.threads,
                       "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor()}]
    return {"text": ladder.corpus.name, "comparable": ladder.comparable, **summary(provenance)}


def summary(provenance: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return machine, date and versions of training runs (`Outcome.made`, at least one) as text, each once."""
    threads: dict[str, set[int]] = {}
    for run in provenance:
        threads.setdefault(run["processor"], set()).add(run["threads"])
    machine = "; ".join(f"{name}, {' or '.join(map(str, sorted(counts)))} thread{'s' * (max(counts) > 1)}"
                        for name, counts in threads.items())
    dates = sorted({run["date"] for run in provenance if "date" in run})
    return {"machine": machine, "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
            "versions": "; ".join(dict.fromkeys(
                f"bardlet {run['bardlet']}, torch {run['torch']}" for run in provenance))}


# ---------------------------------------------------------------------------- the template


def _file(name: str) -> str:
    return resources.files("bardlet.ladder").joinpath(name).read_text(encoding="utf-8")


def _template() -> Any:
    """Return the template of the page. It escapes everything but the code, which Pygments escapes, and the CSS."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    return environment.from_string(_file("page.html.jinja"))
