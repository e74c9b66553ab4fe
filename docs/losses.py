"""The directives that show what was measured: measured.json, answers.json and figures/."""

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


FEW = 5
"""Fewer seeds than these say too little of what is normal."""
CHARACTERS = 1_003_854
"""Of Tiny Shakespeare's training part."""


def _pm(figures: dict[str, float] | float | None) -> str:
    """Mean and deviation over seeds, or a single figure."""
    if not isinstance(figures, dict):
        return "-" if figures is None else f"{figures:.3f}"
    deviation = figures.get("deviation")
    return f"{figures['mean']:.3f}" + (f" ± {deviation:.3f}" if deviation else "")


def _lecture(rung: Rung, found: dict[str, Any]) -> str:
    """The lecture's figure, where it quotes one."""
    figure = found.get("lecture", rung.lecture)
    return "-" if figure is None else f"{figure:.{_digits(rung)}f}"


def _digits(rung: Rung) -> int:
    """To how many digits the lecture gives its figure: "about 2.5" for the bigram."""
    return 1 if rung.number == 1 else 2


def losses(course: Course, argument: str, page: str) -> str:
    """What is normal for a rung: the lecture's figure, ours, the band over seeds, and what guessing would give."""
    rung = one_rung(argument)
    found = course.of(rung)
    low, high, seeds = found["val_loss"].get("low"), found["val_loss"].get("high"), len(found["seeds"])
    rows = [["the lecture" + (" (10.8 M parameters, on a GPU)" if rung.scaled else ""), _lecture(rung, found)],
            ["validation, measured as in the lecture", _pm(found["val_loss_lecture"])],
            ["validation, every character once", _pm(found["val_loss"])]]
    if rows[0][1] == "-":
        del rows[0]
    if low is not None and high is not None and seeds >= FEW and not rung.scaled:  # those depend on the machine
        normal = f"[**normal**]({link(page, 'index.md')}#how-a-loss-is-read) for a single seed"
        rows.append([f"... {normal}", f"**{low:.3f} to {high:.3f}**"])
    rows += [["training, measured as in the lecture", _pm(found["train_loss"])],
             ["uniform guessing, ln 65", f"{math.log(65):.3f}"]]
    text = (table_of(["loss, nats per character", f"mean ± deviation of {seeds} seeds"], rows)
            + f"\n\n{found['parameters']:,} parameters, {found['steps']:,} steps, {found['seconds']:.0f} seconds of "
              f"training (the fastest seed) on {machine([found])}; {recorded([found])}.")
    if rung.lecture is not None and not rung.scaled:
        digits = _digits(rung)
        ours = round(found["val_loss_lecture"]["mean"], digits)
        above = round(ours - rung.lecture, digits)
        agrees = "agrees with" if not above else f"is {abs(above):.{digits}f} {'above' if above > 0 else 'below'}"
        text += f" Measured and rounded as in the lecture, {ours:.{digits}f}, it {agrees} its figure."
    return text


def machine(found: Iterable[dict[str, Any]]) -> str:
    """What rungs were trained on, by their own account (`made`): "a processor, 1 or 2 threads"."""
    threads: dict[str, set[int]] = {}
    for made in (made for one in found for made in (one["made"] if isinstance(one["made"], list) else [one["made"]])):
        threads.setdefault(made["processor"], set()).add(made["threads"])
    return "; ".join(f"{name}, {' or '.join(map(str, sorted(several)))} thread{'s' * (max(several) > 1)}"
                     for name, several in threads.items())


def recorded(found: Iterable[dict[str, Any]]) -> str:
    """On which days, and at which commits of the code, figures of rungs were recorded."""
    notes = dict.fromkeys((one["recorded"]["date"], one["recorded"]["commit"]) for one in found if one.get("recorded"))
    return "recorded " + " and ".join(f"{date} at commit `{commit}`" for date, commit in notes) if notes \
        else "not yet recorded with a commit"


def verdict(course: Course, argument: str, page: str) -> str:
    """A sentence: did a rung lower the loss of the one before, by more than chance over the seeds allows?

    It did where the 95 % interval of the difference, see `difference`, lies on one side of 0.
    """
    rung = one_rung(argument)
    before = rungs.before(rung)
    if before is None:
        raise BardletError("nothing stands before the first rung")
    old, new = course.of(before), course.of(rung)
    # four digits: a reader who subtracts them gets the difference that stands behind them
    said = f"Measured against rung {before.number}: from {old['val_loss']['mean']:.4f} to {new['val_loss']['mean']:.4f}"
    paired = same_run(before, rung)
    fall, half, freedom = difference(old, new, paired)
    if not half:
        return f"{said}, from one seed each: too few to tell it from chance."
    word, low, high = ("fall", fall - half, fall + half) if fall > 0 else ("rise", -fall - half, half - fall)
    said += (f", a {word} of {abs(fall):.4f} with a [95 % interval]({link(page, 'index.md')}#how-a-loss-is-read) of "
             f"{low:.4f} to {high:.4f} ({'seed by seed, ' if paired else ''}{round(freedom, 1):g} degrees of "
             "freedom).").replace(" -", " −")
    if abs(fall) <= half:
        return f"{said} 0 lies in it: **no difference was seen**."
    return f"{said} **It helped.**" if fall > 0 else f"{said} **It did not help**: it is worse."


def same_run(before: Rung, rung: Rung) -> bool:
    """Whether two rungs are one and the same training, of which only other weights are kept: rungs 12 and 13."""
    one, other = ({**sources.settings(r), "keep": None} for r in (before, rung))
    return before.model == rung.model and one == other


def difference(old: dict[str, Any], new: dict[str, Any], paired: bool) -> tuple[float, float, float]:
    """(how far the mean loss falls, half its 95 % interval or 0 where that is unknown, degrees of freedom).

    Rungs that were trained apart: Welch's standard error and degrees of freedom, which ask for no equal deviations.
    One training looked at twice: Student's t of the differences of each seed. Raises Missing where these are unknown.
    """
    fall = old["val_loss"]["mean"] - new["val_loss"]["mean"]
    if min(len(one["seeds"]) for one in (old, new)) < 2:
        return fall, 0.0, 0.0
    if paired:
        if not all("losses" in one and one["seeds"] == old["seeds"] for one in (old, new)):
            raise Missing("docs/measured.json has no losses by seed: run python benchmarks/ladder.py publish")
        falls = [old["losses"][str(seed)] - new["losses"][str(seed)] for seed in old["seeds"]]
        error, freedom = statistics.stdev(falls) / math.sqrt(len(falls)), len(falls) - 1.0
    else:
        parts = [(one["val_loss"]["deviation"] ** 2 / len(one["seeds"]), len(one["seeds"]) - 1) for one in (old, new)]
        error = math.sqrt(sum(square for square, _ in parts))
        freedom = error**4 / sum(square**2 / less for square, less in parts) if error else 1.0
    return fall, reach(freedom) * error, freedom


def reach(freedom: float, share: float = 0.95) -> float:
    """How many standard errors to both sides hold `share` of Student's t, by its degrees of freedom (1 or more).

    With t = √f · tan(a) its density is that of cos(a)^(f - 1): Simpson's rule up to an angle gives the share within
    it, and halving the interval finds the angle.
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
    """How often a rung went over Tiny Shakespeare in its training, in words for a sentence."""
    rung = one_rung(argument)
    return _times(rung, course.of(rung)["steps"])


def _times(rung: Rung, steps: int) -> str:
    sizes = rungs.CPU if rung.scaled else rungs.SMALL
    return f"{steps * sizes['batch_size'] * sizes['block_size'] / CHARACTERS:.1f} times"


def compare(course: Course, argument: str, page: str) -> str:
    """`dropout 0 with rung 8`: a rung with one setting changed beside the rung as it is, both with the same steps.

    Both are of one measurement, which may have other steps than the rung's own table.
    """
    name, _, which = argument.partition(" with ")
    rung, extra = one_rung(which), _at(course, f"extras/{name}")
    own, other = _at(course, f"extras/{name}/rung"), extra["figures"]
    rows = [[called, _pm(figures["train_loss"]), _pm(figures["val_loss"]), f"{seconds:.0f} s"]
            for called, figures, seconds in ((f"rung {rung.number}", own, own["seconds"]),
                                             (name, other, other["seconds"]["mean"]))]
    gap = own["val_loss"]["mean"] - other["val_loss"]["mean"]
    return (table_of(["", "training", "validation, every character once", "time"], rows)
            + f"\n\n{own['steps']:,} steps each, which see the text {_times(rung, own['steps'])}, and "
              f"{len(own['seeds'])} seeds. Validation loss of rung {rung.number} is {abs(gap):.3f} "
              f"{'higher' if gap > 0 else 'lower'} than with {name}. {_noted(extra)}")


def _noted(extra: dict[str, Any]) -> str:
    """When, where and at which commit something beside the ladder was recorded, as a sentence."""
    return f"Recorded {extra['date']} at commit `{extra['commit']}`, on {extra['machine']['processor']}."


def table(course: Course, argument: str, page: str) -> str:
    """The rungs of a range, a row each."""
    rows = []
    for rung in rungs.select(argument):
        found = course.of(rung)
        here = link(page, f"rungs/{rung.number:02}-{rung.name}.md")
        rows.append([f"[{rung.number}. {rung.title}]({here})", _lecture(rung, found), _pm(found["val_loss"]),
                     _pm(found["val_loss_lecture"]), f"{found['parameters']:,}", f"{found['steps']:,}",
                     f"{found['seconds']:,.0f} s"])
    seeds = sorted({len(course.of(rung)["seeds"]) for rung in rungs.select(argument)})
    head = ["rung", "lecture", "every character once", "lecture's way", "parameters", "steps", "time, fastest seed"]
    all_of_them = [course.of(rung) for rung in rungs.select(argument)]
    return (f"{table_of(head, rows)}\n\nValidation loss, mean ± deviation of {' or '.join(map(str, seeds))} seeds, on "
            f"{machine(all_of_them)}; {recorded(all_of_them)}.")


def settings(course: Course, argument: str, page: str) -> str:
    """What the rungs train with, side by side: the lecture's small ones, the larger ones on a CPU and on a GPU."""
    kinds = [{**sizes, **rungs.LECTURE} for sizes in (rungs.SMALL, rungs.CPU, rungs.GPU)]
    names = list(dict.fromkeys(name for kind in kinds for name in kind))
    rows = [[f"`{name}`{MEANS.get(name, '')}", *(_setting(kind, name) for kind in kinds)] for name in names]
    own = [f"rung {rung.number}: " + ", ".join(f"`{name} = {value!r}`" for name, value in rung.settings.items())
           for rung in rungs.LADDER if rung.settings]
    return (table_of(["", "rungs 1 to 7", "rungs from 8 on, CPU", "rungs from 8 on, GPU"], rows)
            + f"\n\nOn their own: {'; '.join(own)}.")


MEANS = {"n_embd": ", C", "n_head": ", H", "block_size": ", T", "batch_size": ", B", "n_layer": ", blocks"}
"""The letters of the settings in the code."""


def _setting(sizes: dict[str, Any], name: str) -> str:
    if name not in sizes:
        return "by the clock" if name == "steps" else "-"
    return f"{sizes[name]:,}" if isinstance(sizes[name], int) else str(sizes[name])


def sample(course: Course, argument: str, page: str) -> str:
    """What a rung wrote."""
    rung = one_rung(argument)
    return fence("text", course.of(rung)["sample"], f"rung {rung.number} writes")


def figure(course: Course, argument: str, page: str) -> str:
    """A picture of docs/figures: `NAME | what it shows`."""
    name, _, shows = (part.strip() for part in argument.partition("|"))
    for suffix in ("", "-dark"):
        if not (course.docs / "figures" / f"{name}{suffix}.png").exists():
            raise Missing(f"docs/figures/{name}{suffix}.png is missing: run python benchmarks/ladder.py publish")
    return picture(page, f"figures/{name}", shows or name.replace("-", " "))


def measured(course: Course, argument: str, page: str) -> str:
    """A part of measured.json by its path, as in `extras/addition`: a value, a list of rows or named values.

    In a list of rows a name stands for the row that begins with it.
    """
    found = _at(course, argument)
    if isinstance(found, dict) and "figures" in found:  # an extra as a whole
        return f"{_shown(found['figures'])}\n\n{_noted(found)}"
    return _shown(found)


def _at(course: Course, path: str) -> Any:
    """What stands at a path of measured.json. Raises Missing."""
    found: Any = course.measured
    for key in path.split("/"):
        if isinstance(found, list):
            found = {next(iter(row.values())): row for row in found}
        if not isinstance(found, dict) or key not in found:
            raise Missing(f"docs/measured.json has no '{path}': run python benchmarks/ladder.py publish")
        found = found[key]
    return found


def answer(course: Course, argument: str, page: str) -> str:
    """A part of answers.json: what an exercise's answer gave."""
    if argument not in course.answers:
        raise Missing(f"docs/answers.json has no '{argument}': run python docs/answers.py '{argument}'")
    found = course.answers[argument]
    seeds = f"mean of {found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    whole = {name: int(x) if x == int(x) and x < 1e9 else x for name, x in found["figures"].items()}
    return table_of(["", seeds], [[name, _shown(x)] for name, x in whole.items()])


def _shown(value: Any) -> str:
    """A figure as text, rows or named figures as a table."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        head = list(value[0])
        return table_of(head, [[_shown(row.get(key, "-")) for key in head] for row in value])
    if isinstance(value, dict) and "mean" in value and isinstance(value["mean"], float):
        return _pm(value)
    if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()) \
            and not any("mean" in inner for inner in value.values()):
        head = list(next(iter(value.values())))
        return table_of(["", *head], [[name, *(_shown(inner.get(key, "-")) for key in head)]
                                    for name, inner in value.items()])
    if isinstance(value, dict):
        return table_of(["", ""], [[name.replace("_", " "), _shown(inner)] for name, inner in value.items()])
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
