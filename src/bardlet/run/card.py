"""The model card of a run: README.md in its folder, rendered from the template of its stage."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet.config.model import RUNGS, ModelConfig
from bardlet.config.pretraining import TranslationConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import NAMED_PAIRS
from bardlet.config.toml import non_default
from bardlet.data import named
from bardlet.errors import neutral, quoted
from bardlet.run.record import Record

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


METRICS = {"nats_per_char": "nats per character", "bits_per_byte": "bits per byte", "bleu": "BLEU", "chrf": "chrF",
           "accuracy": "held-out pairs in which the preferred completion has the higher reward",
           "reward_after": "mean held-out reward"}
"""Entries of a record that the card's metadata lists as results, with their names there."""

PATHS = ("text", "source", "target", "replay_text", "init", "reward")
"""Settings that may hold paths; a reward may also be a command."""
FOLDERS, FOLDERS_OF_WORDS = r".*[/\\](?=[^/\\])", r"""[^\s"'=]*[/\\](?=[^\s"'/\\])"""
"""Patterns of the folders before the name of a path, and before the name of each path in a command."""

ONNX_USE = """onnx/model.onnx is the model for onnxruntime and transformers.js, with the names of Hugging Face's
Optimum: `input_ids`, `attention_mask`, `position_ids` and `past_key_values.*` in, `logits` and `present.*` out.
"""
"""Instructions for an ONNX folder, in its card."""

KTO_ACCURACY = "held-out pairs of a liked and a disliked completion in which the liked one has the higher reward"


def title(run: Path, record: Record) -> str:
    """Return the run's title: its folder's name, or its rung's name in a ladder, where folders are named by seed."""
    return str(getattr(record, "rung", None) or run.name)


def escaped(name: str) -> str:
    """Return a name for Markdown: what would begin a tag, a link, code or bold text shows as itself."""
    line = " ".join(name.splitlines())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code(value: str) -> str:
    """Return a value as Markdown's code, between more backticks than it has in a row."""
    value = " ".join(value.splitlines())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{fence}{value}{fence}" if len(fence) == 1 else f"{fence} {value} {fence}"


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
        import tomli_w

        settings = {name: value for name, value in non_default(self.config).items() if name != "replans"}
        folder = json.dumps(f"path/to/{self.run.name}", ensure_ascii=False).replace("`", r"\u0060")
        text = _environment().get_template(f"{template}.md.jinja").render(
            title=self.title, run=quoted(f"path/to/{self.run.name}"), folder=folder, config=self.config,
            model=self.model, r=defaultdict(lambda: None, self.record), sample=self.sample.replace("```", "'''"),
            settings=tomli_w.dumps(settings).strip().replace("```", r"\u0060``"), loss=self.loss,
            weights=_selected(self.record))
        card = f"---\n{self.metadata(template)}\n---\n\n{neutral(text)}"  # of the sample, and of the names in it
        (self.run / "README.md").write_text(card, encoding="utf-8")

    def metadata(self, template: str) -> str:
        """Return the card's YAML front matter, which the Hugging Face Hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        task = {"pairs": "translation", "reward_model": "text-classification"}.get(template, "text-generation")
        text = re.sub(r"[^\w.-]+", "-", str(self.record["text"])).strip("-.") or "text"
        corpora = [name for name in self.config.text if name in (*named.NAMED, *NAMED_PAIRS)]
        labels = METRICS | ({"accuracy": KTO_ACCURACY} if template == "kto" else {})
        results = [EvalResult(task_type=task, dataset_type=text, dataset_name=f"{self.record['text']}, held-out split",
                              metric_type=name, metric_value=self.record[name], metric_name=label)
                   for name, label in labels.items() if self.record.get(name) is not None]
        own_code = self.model.model in RUNGS  # transformers has no rungs of the lecture
        return ModelCardData(
            model_name=self.title, library_name="bardlet" if own_code else "transformers", pipeline_tag=task,
            license="unknown",  # the owner of the text decides
            tags=["bardlet", *([self.config.command] if self.config.stage != "pretrain" else [])],
            base_model=str(self.config.init).partition("@")[0] if self.record.get("base_revision") else None,
            datasets=corpora or None, eval_results=results or None).to_yaml()


@cache
def _environment() -> jinja2.Environment:
    """Return the environment of the templates, which keeps them compiled."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, autoescape=False,
                                     undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(escaped=escaped, code=code)
    return environment


def for_export(text: str, config: Settings, record: Mapping[str, Any], onnx: bool = False) -> str:
    """Return the text of a card for others: of local files it keeps the names, not the folders.

    onnx: the export has the model as an ONNX graph.
    """
    for name in PATHS:
        value = getattr(config, name, None) or ()
        if name == "init" and record.get("base_revision"):  # OWNER/NAME on the Hub
            continue
        for path in (value,) if isinstance(value, str) else value:
            short = re.sub(FOLDERS_OF_WORDS if name == "reward" else FOLDERS, "", path)
            for old, new in zip(_as_quoted(path), _as_quoted(short), strict=True):
                text = text.replace(old, new)
    text = text.replace(" (run.toml has all of them)", "")
    if onnx:
        text = text.replace("library_name: transformers\n", "library_name: transformers.js\n", 1)
        use = ONNX_USE
        if isinstance(config, TranslationConfig):
            use += "Write the source and then `<|endoftext|>`: the translation follows, up to the next one.\n"
        parts = text.split("```\n", 2)  # the sample has no fence of its own
        if len(parts) < 3:  # its owner wrote another card
            return f"{text.rstrip()}\n\n{use}"
        settings = parts[2].partition("\nSettings that differ")
        text = "```\n".join((*parts[:2], f"\n{use}{''.join(settings[1:])}"))
    return text


def _as_quoted(value: str) -> tuple[str, str]:
    """Return a value as the sentences of a card quote it, and as its settings do."""
    import tomli_w

    return code(value), tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _selected(record: dict[str, Any]) -> str:
    """Describe the weights that the run kept, and the rule that selected them."""
    by, step = record["selected_by"], record["selected_step"]
    weights = f"of step {step:,}" if not record.get("averaged") else "mean over the last fifth of the steps"
    if by == "best":
        figure = "validation loss" if record.get("reward_after") is None else "held-out reward"
        others = ", as is the accuracy on the same data" if record.get("accuracy") is not None else ""
        return f"{weights}, **selected by the {figure} above**, which is therefore slightly optimistic{others}"
    return f"of the last step, {step:,}" if by == "last" else f"{weights}, a fixed rule"
