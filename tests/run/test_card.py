"""The metadata of model cards, as the Hugging Face Hub reads it."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard


@pytest.mark.parametrize(("model", "library"), [("qwen3", "transformers"), ("bigram", "bardlet")])
def test_the_hub_reads_the_card_of_a_run(model: str, library: str, tmp_path: Path,
                                         bardlet: Callable[..., dict[str, Any]]) -> None:
    text = tmp_path / "my text.txt"
    text.write_text("To be, or not to be, that is the question:\n" * 60, encoding="utf-8")
    done = bardlet("train", text, "--model", model, "--steps", "3", "--block-size", "16", "--batch-size", "4",
                   "--compile", "off", "--out", tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
    assert card.data.datasets is None and card.data.tags == ["bardlet"] and card.data.license == "unknown"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["nats_per_char"] == done["nats_per_char"] and set(results) == {"nats_per_char", "bits_per_byte"}
    description, settings_block = card.text.split("```toml\n")
    assert description.lstrip().startswith("# run\n") and "trained by bardlet on `my_text` (2,580 char" in description
    assert "path/to/run" in description and str(tmp_path) not in description
    settings = tomllib.loads(settings_block.split("```")[0])
    assert settings["steps"] == 3 and settings["text"] == [str(text)]
