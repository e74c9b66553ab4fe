"""The model card of a run: README.md in its folder, rendered from the template of its stage."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.config.model import ModelConfig
from bardlet.config.settings import Settings
from bardlet.config.toml import non_default
from bardlet.run.record import Record

TEMPLATES = Path(__file__).parent / "templates"


def title(run: Path, record: Record) -> str:
    """Return the run's title: its folder's name, or its rung's name in a ladder, where folders are named by seed."""
    return str(getattr(record, "rung", None) or run.name)


@dataclass(frozen=True)
class Card:
    """The contents of a model card."""

    run: Path
    config: Settings
    model: ModelConfig
    record: dict[str, Any]
    sample: str
    loss: str
    """The validation loss as text."""
    title: str

    def write(self, template: str) -> None:
        """Write README.md from templates/`template`.md.jinja."""
        import jinja2

        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True,
                                         autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        settings = {name: value for name, value in non_default(self.config).items() if name != "replans"}
        text = environment.get_template(f"{template}.md.jinja").render(
            title=self.title, run=self.run, config=self.config, model=self.model,
            r=defaultdict(lambda: None, self.record), sample=self.sample.replace("```", "'''"), settings=settings,
            loss=self.loss, weights=_selected(self.record))
        (self.run / "README.md").write_text(text, encoding="utf-8")


def _selected(record: dict[str, Any]) -> str:
    """Return which weights the run kept, and by what rule, as text."""
    by, step = record["selected_by"], record["selected_step"]
    weights = f"of step {step:,}" if not record.get("averaged") else "mean over the last fifth of the steps"
    if by == "best":
        return f"{weights}, **selected by the validation loss above**, which is therefore slightly optimistic"
    return f"of the last step, {step:,}" if by == "last" else f"{weights}, a fixed rule"
