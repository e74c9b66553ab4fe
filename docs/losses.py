"""The directives that show results: measured.json, answers.json and figures/."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from course import Course, Missing, fence, link, one_rung, picture, table_of

from bardlet.errors import BardletError
from bardlet.ladder import rungs, sources
from bardlet.ladder.rungs import Rung

# ---------------------------------------------------------------------------- losses


MIN_SEEDS = 5
"""Seeds that a band of normal losses needs."""
TRAIN_CHARACTERS = 1_003_854
"""Characters in the training part of Tiny Shakespeare."""
LECTURE_PARAMETERS = 10_800_000
"""Parameters of the lecture's large model, whose loss it quotes for rung 8."""


def _plus_minus(figures: dict[str, float] | float | None) -> str:
    """Format a mean and its deviation over seeds, or a single figure."""
    if not isinstance(figures, dict):
        return "-" if figures is None else f"{figures:.3f}"
    deviation = figures.get("deviation")
    return f"{figures['mean']:.3f}" + (f" ± {deviation:.3f}" if deviation else "")


def _lecture_loss(rung: Rung, measured: dict[str, Any]) -> str:
    """Format the lecture's loss, if it quotes one."""
    figure = measured.get("lecture", rung.lecture)
    return "-" if figure is None else f"{figure:.{_digits(rung)}f}"


def _digits(rung: Rung) -> int:
    """Return the number of decimals of the lecture's loss: "about 2.5" for the bigram."""
    return 1 if rung.number == 1 else 2


def losses(course: Course, argument: str, page: str) -> str:
    """Show the losses of a rung: the lecture's, ours, the normal band over seeds, and uniform guessing."""
    rung = one_rung(argument)
    measured = course.of(rung)
    val_loss, seeds = measured["val_loss"], len(measured["seeds"])
    low, high = val_loss.get("low"), val_loss.get("high")
    name, ours = "the lecture", ""
    if rung.scaled:
        name = f"the lecture's large model ({_millions(LECTURE_PARAMETERS)} M parameters)"
        ours = f"our model ({_millions(measured['parameters'])} M parameters): "
    rows = [[name, _lecture_loss(rung, measured)],
            [f"{ours}validation, measured as in the lecture", _plus_minus(measured["val_loss_lecture"])],
            [f"{ours}validation, every character once", _plus_minus(val_loss)]]
    if rows[0][1] == "-":
        del rows[0]
    if low is not None and high is not None and seeds >= MIN_SEEDS and not rung.scaled:
        # scaled rungs have no band: their losses depend on the machine
        normal = f"[**normal**]({link(page, 'index.md')}#how-to-read-a-loss) for a single seed"
        rows.append([f"... {normal}", f"**{low:.3f} to {high:.3f}**"])
    rows += [[f"{ours}training, measured as in the lecture", _plus_minus(measured["train_loss"])],
             ["uniform guessing, ln 65", f"{math.log(65):.3f}"]]
    text = (table_of(["loss, nats per character", f"mean ± deviation of {seeds} seeds"], rows) + _larger(rung, measured)
            + f"\n\n{measured['parameters']:,} parameters, {measured['steps']:,} steps, {measured['seconds']:.0f} "
              f"seconds of training (the fastest seed) on {machine([measured])}; {recorded([measured])}.")
    if rung.lecture is not None and not rung.scaled:
        digits = _digits(rung)
        ours = round(measured["val_loss_lecture"]["mean"], digits)
        above = round(ours - rung.lecture, digits)
        agrees = "agrees with" if not above else f"is {abs(above):.{digits}f} {'above' if above > 0 else 'below'}"
        text += f" Measured and rounded as in the lecture, our {ours:.{digits}f} {agrees} its number."
    return text


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}"


def _larger(rung: Rung, measured: dict[str, Any]) -> str:
    """Say, right below a table, that the lecture's loss of a scaled rung belongs to a much larger model."""
    times = LECTURE_PARAMETERS / measured["parameters"]
    if not rung.scaled or rung.lecture is None or times < 1.5:
        return ""
    return (f"\n\n**Two sizes in one table**: the lecture's number for rung {rung.number} belongs to a model with "
            f"{times:.0f} times the parameters, trained on a GPU. It is no target for the small model measured here.")


def machine(measured: Iterable[dict[str, Any]]) -> str:
    """Return the machines that trained these rungs, from their key `made`: "a processor, 1 or 2 threads"."""
    threads: dict[str, set[int]] = {}
    for rung in measured:
        for host in rung["made"] if isinstance(rung["made"], list) else [rung["made"]]:
            threads.setdefault(host["processor"], set()).add(host["threads"])
    return "; ".join(f"{name}, {' or '.join(map(str, sorted(numbers)))} thread{'s' * (max(numbers) > 1)}"
                     for name, numbers in threads.items())


def recorded(measured: Iterable[dict[str, Any]]) -> str:
    """Return the dates and commits at which these rungs were recorded."""
    records = [rung["recorded"] for rung in measured if rung.get("recorded")]
    notes = dict.fromkeys((record["date"], record["commit"]) for record in records)
    return "recorded " + " and ".join(f"{date} at commit `{commit}`" for date, commit in notes) if notes \
        else "not yet recorded with a commit"


def verdict(course: Course, argument: str, page: str) -> str:
    """Say whether a rung lowered the loss of the one before by more than chance.

    It did if the 95 % interval of the difference (see `difference`) excludes 0.
    """
    rung = one_rung(argument)
    before = rungs.predecessor(rung)
    if before is None:
        raise BardletError("the first rung has no rung before it")
    old, new = course.of(before), course.of(rung)
    # four digits, so that the two losses differ by the difference printed after them
    text = f"Compared with rung {before.number}: from {old['val_loss']['mean']:.4f} to {new['val_loss']['mean']:.4f}"
    paired = same_run(before, rung)
    fall, half, freedom = difference(old, new, paired)
    if not half:
        return f"{text}, with one seed each: too few to tell from chance."
    direction, low, high = ("fall", fall - half, fall + half) if fall > 0 else ("rise", -fall - half, half - fall)
    text += (f", a {direction} of {abs(fall):.4f} with a [95 % interval]({link(page, 'index.md')}#how-to-read-a-loss) "
             f"of {low:.4f} to {high:.4f} ({'seed by seed, ' if paired else ''}{round(freedom, 1):g} degrees of "
             "freedom).").replace(" -", " −")
    if abs(fall) <= half:
        return f"{text} The interval contains 0: **no difference detected**."
    return f"{text} **It helped.**" if fall > 0 else f"{text} **It did not help**: it is worse."


def same_run(before: Rung, rung: Rung) -> bool:
    """Return True if two rungs are the same training run and only keep different weights: rungs 12 and 13."""
    old, new = ({**sources.settings(r), "keep": None} for r in (before, rung))
    return before.model == rung.model and old == new


def difference(old: dict[str, Any], new: dict[str, Any], paired: bool) -> tuple[float, float, float]:
    """Return (fall of the mean loss, half width of its 95 % interval or 0 if unknown, degrees of freedom).

    Separate training runs: Welch's standard error and degrees of freedom, which do not assume equal deviations.
    paired: Student's t of the differences, seed by seed. Raises Missing if the losses per seed are missing.
    """
    fall = old["val_loss"]["mean"] - new["val_loss"]["mean"]
    if min(len(old["seeds"]), len(new["seeds"])) < 2:
        return fall, 0.0, 0.0
    if paired:
        if not all("losses" in rung and rung["seeds"] == old["seeds"] for rung in (old, new)):
            raise Missing("docs/measured.json has no losses by seed: run python benchmarks/ladder.py publish")
        falls = [old["losses"][str(seed)] - new["losses"][str(seed)] for seed in old["seeds"]]
        error, freedom = statistics.stdev(falls) / math.sqrt(len(falls)), len(falls) - 1.0
    else:
        terms = [(rung["val_loss"]["deviation"] ** 2 / len(rung["seeds"]), len(rung["seeds"]) - 1)
                 for rung in (old, new)]
        error = math.sqrt(sum(square for square, _ in terms))
        freedom = error**4 / sum(square**2 / less for square, less in terms) if error else 1.0
    return fall, t_quantile(freedom) * error, freedom


def t_quantile(freedom: float, share: float = 0.95) -> float:
    """Return the t for which Student's distribution has `share` between -t and t; freedom: at least 1.

    With t = √f · tan(a), its density is that of cos(a)^(f - 1): Simpson's rule up to an angle gives the share inside
    it, and bisection finds the angle.
    """
    scale = 2 * math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))

    def within(angle: float) -> float:
        step = angle / 400
        values = [math.cos(i * step) ** (freedom - 1) for i in range(401)]
        return scale * step / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])

    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def seen(course: Course, argument: str, page: str) -> str:
    """Show the epochs of a rung over Tiny Shakespeare: "2.2 times"."""
    rung = one_rung(argument)
    return _epochs(rung, course.of(rung)["steps"])


def _epochs(rung: Rung, steps: int) -> str:
    sizes = rungs.CPU if rung.scaled else rungs.SMALL
    return f"{steps * sizes['batch_size'] * sizes['block_size'] / TRAIN_CHARACTERS:.1f} times"


def compare(course: Course, argument: str, page: str) -> str:
    """Show `dropout 0 with rung 8`: a rung with one setting changed, next to the unchanged rung.

    Both come from one measurement with the same number of steps, which may differ from that of the rung's own table.
    """
    name, _, rung_name = argument.partition(" with ")
    rung, extra = one_rung(rung_name), _at(course, f"extras/{name}")
    own, other = _at(course, f"extras/{name}/rung"), extra["figures"]
    rows = [[label, _plus_minus(figures["train_loss"]), _plus_minus(figures["val_loss"]), f"{seconds:.0f} s"]
            for label, figures, seconds in ((f"rung {rung.number}", own, own["seconds"]),
                                             (name, other, other["seconds"]["mean"]))]
    gap = own["val_loss"]["mean"] - other["val_loss"]["mean"]
    return (table_of(["", "training", "validation, every character once", "time"], rows)
            + f"\n\n{own['steps']:,} steps each, which see the text {_epochs(rung, own['steps'])}, and "
              f"{len(own['seeds'])} seeds. The validation loss of rung {rung.number} is {abs(gap):.3f} "
              f"{'higher' if gap > 0 else 'lower'} than with {name}. {_provenance(extra)}")


def _provenance(extra: dict[str, Any]) -> str:
    """Return a sentence with the date, commit and machine of a measurement outside the ladder."""
    return f"Recorded {extra['date']} at commit `{extra['commit']}`, on {extra['machine']['processor']}."


def table(course: Course, argument: str, page: str) -> str:
    """Show a range of rungs, one row each."""
    rows, selected = [], rungs.select(argument)
    for rung in selected:
        measured = course.of(rung)
        address = link(page, f"rungs/{rung.number:02}-{rung.name}.md")
        lecture = _lecture_loss(rung, measured)
        if _larger(rung, measured):
            lecture += f" with {_millions(LECTURE_PARAMETERS)} M parameters"
        rows.append([f"[{rung.number}. {rung.title}]({address})", lecture,
                     _plus_minus(measured["val_loss"]), _plus_minus(measured["val_loss_lecture"]),
                     f"{measured['parameters']:,}", f"{measured['steps']:,}", f"{measured['seconds']:,.0f} s"])
    everything = [course.of(rung) for rung in selected]
    seeds = sorted({len(measured["seeds"]) for measured in everything})
    head = ["rung", "loss in the lecture, nats", "our loss, nats", "our loss, lecture's way", "parameters", "steps",
            "training time"]
    explained = f"[how to read a loss]({link(page, 'index.md')}#how-to-read-a-loss)"
    larger = "".join(_larger(rung, measured) for rung, measured in zip(selected, everything, strict=True))
    return (f"{table_of(head, rows)}{larger}\n\nLosses are validation losses in nats per character, mean ± deviation "
            f"of {' or '.join(map(str, seeds))} seeds: see {explained}. *Our loss* covers every character of the "
            "validation split once; the *lecture's way* is an estimate from 200 random batches. The time is that of "
            f"the fastest seed, on {machine(everything)}; {recorded(everything)}.")


def settings(course: Course, argument: str, page: str) -> str:
    """Show the settings of the rungs side by side: the lecture's small rungs, the larger ones on a CPU and on a GPU."""
    columns = [{**sizes, **rungs.LECTURE} for sizes in (rungs.SMALL, rungs.CPU, rungs.GPU)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[f"`{name}`{MEANS.get(name, '')}", *(_setting(column, name) for column in columns)] for name in names]
    own = [f"rung {rung.number}: " + ", ".join(f"`{name} = {value!r}`" for name, value in rung.settings.items())
           for rung in rungs.LADDER if rung.settings]
    return (table_of(["", "rungs 1 to 7", "rungs 8 and up, CPU", "rungs 8 and up, GPU"], rows)
            + f"\n\nExceptions: {'; '.join(own)}.")


MEANS = {"n_embd": ", C", "n_head": ", H", "block_size": ", T", "batch_size": ", B", "n_layer": ", blocks"}
"""The letters that stand for settings in the code."""


def _setting(sizes: dict[str, Any], name: str) -> str:
    if name not in sizes:
        return "set by time" if name == "steps" else "-"
    return f"{sizes[name]:,}" if isinstance(sizes[name], int) else str(sizes[name])


def sample(course: Course, argument: str, page: str) -> str:
    """Show a sample of a rung."""
    rung = one_rung(argument)
    return fence("text", course.of(rung)["sample"], f"sample of rung {rung.number}")


def figure(course: Course, argument: str, page: str) -> str:
    """Show a picture of docs/figures: `NAME | alternative text`. A note on how to read them follows loss curves."""
    name, _, description = (part.strip() for part in argument.partition("|"))
    for suffix in ("", "-dark"):
        if not (course.docs / "figures" / f"{name}{suffix}.png").exists():
            raise Missing(f"docs/figures/{name}{suffix}.png is missing: run python benchmarks/ladder.py publish")
    shown = picture(page, f"figures/{name}", description or name.replace("-", " "))
    return f"{shown}\n\n{_about_curves(name)}" if name.startswith("loss-curves") else shown


def _about_curves(name: str) -> str:
    """Return a note on a picture of loss curves: where its numbers and its bands come from."""
    text = ("To save time, the curves use part of the validation split. So a curve ends slightly off the number in the "
            "legend, which covers every character.")
    if not name.endswith("small"):
        text += (" Rung 13 ends far above its number: its curve shows the weights during training, and its number "
                 "belongs to their average, which exists only at the end.")
    return f"{text} Bands span the lowest to the highest seed."


def measured(course: Course, argument: str, page: str) -> str:
    """Show a part of measured.json by its path, as in `extras/addition`: a value, a list of rows or named values.

    In a list of rows, a name selects the row whose first cell it is.
    """
    value = _at(course, argument)
    if isinstance(value, dict) and "figures" in value:  # an extra as a whole
        return f"{_as_text(value['figures'])}\n\n{_provenance(value)}"
    return _as_text(value)


def _at(course: Course, path: str) -> Any:
    """Return the value at a path of measured.json. Raises Missing."""
    value: Any = course.measured
    for key in path.split("/"):
        if isinstance(value, list):
            value = {next(iter(row.values())): row for row in value}
        if not isinstance(value, dict) or key not in value:
            raise Missing(f"docs/measured.json has no '{path}': run python benchmarks/ladder.py publish")
        value = value[key]
    return value


def answer(course: Course, argument: str, page: str) -> str:
    """Show the results of an exercise's answer, from answers.json."""
    if argument not in course.answers:
        raise Missing(f"docs/answers.json has no '{argument}': run python docs/answers.py '{argument}'")
    entry = course.answers[argument]
    figures = {name: int(x) if x == int(x) and x < 1e9 else x for name, x in entry["figures"].items()}
    text = table_of(["", entry["measures"]], [[name, _as_text(x)] for name, x in figures.items()])
    if all(isinstance(x, int) for x in figures.values()):
        return text  # counts, which no seed changes
    return f"{text}\n\n" + (f"Mean of {entry['seeds']} seeds." if entry["seeds"] > 1 else "One seed.")


def _as_text(value: Any) -> str:
    """Format a figure as text, rows or named figures as a table."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        head = list(value[0])
        return table_of(head, [[_as_text(row.get(key, "-")) for key in head] for row in value])
    if isinstance(value, dict) and "mean" in value and isinstance(value["mean"], float):
        return _plus_minus(value)
    if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()) \
            and not any("mean" in inner for inner in value.values()):
        head = list(next(iter(value.values())))
        return table_of(["", *head], [[name, *(_as_text(inner.get(key, "-")) for key in head)]
                                    for name, inner in value.items()])
    if isinstance(value, dict):
        return table_of(["", ""], [[name.replace("_", " "), _as_text(inner)] for name, inner in value.items()])
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
