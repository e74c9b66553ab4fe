"""The model card of a run: README.md of its folder, from the template of its stage."""

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
    """What a run is called: by its folder, or by its rung of the ladder, whose folders are called by their seeds."""
    return str(getattr(record, "rung", None) or run.name)


@dataclass(frozen=True)
class Card:
    """What a model card tells: of which run, by which settings, what came of it."""

    run: Path
    config: Settings
    model: ModelConfig
    record: dict[str, Any]
    sample: str
    loss: str
    """The validation loss in words."""
    title: str

    def write(self, template: str) -> None:
        """Write README.md by templates/`template`.md.jinja."""
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
    by, step = record["selected_by"], record["selected_step"]
    which = f"of step {step:,}" if not record.get("averaged") else "mean over the last fifth of the steps"
    if by == "best":
        return f"{which}, **selected by the validation loss above**, which is therefore a little optimistic"
    return f"of the last step, {step:,}" if by == "last" else f"{which}, a fixed rule"
