"""The course's diagrams, and the directive that shows one. Running this file writes them to docs/diagrams/.

    python docs/diagrams.py

A page contains the SVG itself, so that it takes the colors of the page, in light and dark: lines and words have the
color of the text, and what matters has the accent color.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from course import Course

from bardlet.errors import BardletError

FOLDER = Path(__file__).parent / "diagrams"
WIDTH = 420
"""Units of width; on a phone, a unit is a little less than a pixel."""
ACCENT = "var(--live-accent, #b3470a)"


def diagram(course: Course, argument: str, page: str) -> str:
    """Show a diagram: `NAME | alternative text`."""
    name, _, description = (part.strip() for part in argument.partition("|"))
    if name not in DIAGRAMS:
        raise BardletError(f"no such diagram; choose from {', '.join(DIAGRAMS)}")
    if not description:
        raise BardletError("describe the diagram for readers who do not see it, after a |")
    drawn = (FOLDER / f"{name}.svg").read_text(encoding="utf-8").rstrip()
    return (f'<div class="diagram" role="img" aria-label="{escape(description)}">\n'
            + drawn.replace("<svg ", '<svg aria-hidden="true" ', 1) + "\n</div>")


# ---------------------------------------------------------------------------- pieces


def text(x: float, y: float, words: str, anchor: str = "middle", style: str = "") -> str:
    """Return a line of text around or beside x, centered on y."""
    return (f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central"{style and " " + style}>'
            f"{escape(words)}</text>")


def box(x: float, y: float, width: float, lines: Iterable[str], kind: str = "part") -> str:
    """Return a box with lines of text, 26 high for one line. kind: part, or data (dashed)."""
    lines = list(lines)
    height = 10 + 18 * len(lines)
    look = {"part": f'fill="{ACCENT}" fill-opacity="0.14" stroke="{ACCENT}"',
            "data": 'fill="none" stroke="currentColor" stroke-dasharray="4 3"'}[kind]
    words = [text(x + width / 2, y + 14 + 18 * n, line) for n, line in enumerate(lines)]
    return "\n".join([f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" {look}/>', *words])


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through points, with a head at the last."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="currentColor" marker-end="url(#NAME-head)"/>'


def plus(x: float, y: float) -> str:
    """Return a plus in a circle."""
    return (f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="none" stroke="{ACCENT}" stroke-width="2"/>'
            f'<path d="M{x - 6:g} {y:g}h12M{x:g} {y - 6:g}v12" stroke="{ACCENT}" stroke-width="2"/>')


def drawing(name: str, height: float, *pieces: str) -> str:
    """Return an SVG file."""
    head = ('<defs><marker id="NAME-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>')
    inside = "\n".join([head, *pieces]).replace("NAME", name)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="inherit" '
            f'font-size="14" fill="currentColor" stroke-width="1.4">\n{inside}\n</svg>\n')


# ---------------------------------------------------------------------------- the diagrams


def block() -> str:
    """A Transformer block with its norms before the sublayers."""
    stream, left, width = 60, 130, 260
    center = left + width / 2

    def sublayer(top: float, parts: list[list[str]]) -> tuple[list[str], float]:
        """Return a branch off the residual stream, and the height of its sum."""
        pieces, y = [arrow((stream, top), (center, top), (center, top + 18))], top + 20
        for n, lines in enumerate(parts):
            if n:
                pieces.append(arrow((center, y - 22), (center, y - 2)))
            pieces.append(box(left, y, width, lines))
            y += 10 + 18 * len(lines) + 22
        pieces += [arrow((center, y - 22), (center, y), (stream + 13, y)), plus(stream, y)]
        return pieces, y

    first, middle = sublayer(50, [["LayerNorm"], ["Self-attention: H heads,", "positions communicate"], ["Projection"]])
    second, end = sublayer(middle + 40, [["LayerNorm"],
                                         ["Feed-forward: C → 4C, ReLU, 4C → C,", "each position on its own"]])
    return drawing("block", end + 62, text(12, 14, "x: T positions of C channels", "start"),
                   arrow((stream, 28), (stream, middle - 13)), *first,
                   text(stream + 22, middle + 20, "x + attention", "start"),
                   arrow((stream, middle + 11), (stream, end - 13)), *second,
                   text(stream + 22, end + 22, "x + attention + feed-forward", "start"),
                   arrow((stream, end + 11), (stream, end + 40)), text(12, end + 52, "x, for the next block", "start"))


def masks() -> str:
    """The masks of an encoder, of a decoder, and of the cross-attention between them."""
    cell, pieces = 18, []
    kinds: list[tuple[str, list[str], int, int, Callable[[int, int], bool]]] = [
        ("Encoder", ["sees the whole", "source"], 6, 6, lambda t, s: True),
        ("Decoder", ["sees only what", "is written so far"], 6, 6, lambda t, s: s <= t),
        ("Cross-attention", ["the target sees", "the whole source"], 4, 6, lambda t, s: True)]
    for n, (title, caption, rows, columns, visible) in enumerate(kinds):
        left = 17 + n * 139
        pieces.append(text(left + columns * cell / 2, 14, title, style='font-weight="bold"'))
        for t in range(rows):
            for s in range(columns):
                look = f'fill="{ACCENT}" fill-opacity="0.75"' if visible(t, s) else 'fill="none"'
                pieces.append(f'<rect x="{left + s * cell}" y="{32 + t * cell}" width="{cell}" height="{cell}" '
                              f'stroke="currentColor" stroke-opacity="0.5" stroke-width="1" {look}/>')
        pieces += [text(left + columns * cell / 2, 50 + rows * cell + 18 * i, line) for i, line in enumerate(caption)]
    return drawing("masks", 32 + 6 * cell + 54, *pieces)


def pipeline() -> str:
    """From pretraining to PPO: the data of each stage, and the stages that build on it."""
    stages = [("Texts", "Pretraining", "continues texts"), ("Conversations", "Fine-tuning (SFT)", "answers questions"),
              ("Pairs: better, worse", "Reward model", "scores answers"),
              ("Prompts", "PPO", "writes, is scored, improves")]
    left, width, step, pieces = 185, 170, 84, []
    for n, (data, stage, result) in enumerate(stages):
        y = 6 + n * step
        pieces += [box(2, y + 9, 146, [data], "data"), arrow((148, y + 23), (left - 2, y + 23)),
                   box(left, y, width + (0 if n < 3 else 40), [stage, result])]
        if n < 3:
            pieces.append(arrow((left + width / 2, y + 46), (left + width / 2, y + step - 2)))
    pieces += [arrow((left + width, 6 + step + 23), (390, 6 + step + 23), (390, 6 + 3 * step - 2)),
               text(404, 2 * step + 18, "start, and KL penalty", style=f'transform="rotate(90 404 {2 * step + 18})"')]
    return drawing("pipeline", 6 + 3 * step + 54, *pieces)


DIAGRAMS = {"block": block, "masks": masks, "pipeline": pipeline}


if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
