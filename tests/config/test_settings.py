"""Settings: what is accepted, what is refused and how, and that run.toml says it all."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.config.toml import changed, from_mapping, read_toml, to_toml
from bardlet.errors import BardletError


def test_toml_brings_back_every_setting(tmp_path: Path) -> None:
    """Written and read, a config is the same; so is the record behind it."""
    config = TrainConfig(text=("a.txt", "ü b"), steps=7, lr=3e-4, n_kv_head=2, keep="average", replans=((0, 9), (4, 7)))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config, {"val_loss": 1.5, "nothing": None}), encoding="utf-8")
    assert read_toml(path) == (config, {"val_loss": 1.5})


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig) if getattr(TrainConfig(), f.name) is not None])
def test_every_setting_can_stand_in_a_file(name: str) -> None:
    """A file that spells out a default is the default."""
    default = getattr(TrainConfig(), name)
    value = list(default) if isinstance(default, tuple) else default
    assert from_mapping({name: value}, "x.toml") == TrainConfig()


@pytest.mark.parametrize("values, words", [
    ({"n_layers": 3}, ["x.toml", "n_layers", "did you mean 'n_layer'"]),
    ({"n_layer": "3"}, ["x.toml: n_layer", "whole number"]),
    ({"n_layer": True}, ["x.toml: n_layer", "whole number"]),
    ({"n_layer": 3.5}, ["x.toml: n_layer", "whole number"]),
    ({"keep": "first"}, ["x.toml: keep", "best, last, average"]),
    ({"text": "a.txt"}, ["x.toml: text", "list"]),
    ({"steps": 3, "minutes": 1}, ["--steps and --minutes"]),
    ({"n_embd": 100, "n_head": 3}, ["--n-embd 100", "--n-head 3", "take --n-head 2 or --n-embd 102"]),
    ({"n_embd": 12, "n_head": 4}, ["heads of 3 channels", "even"]),
    ({"n_head": 6, "n_embd": 384, "n_kv_head": 4}, ["--n-kv-head 4"]),
    ({"model": "gpt2", "n_kv_head": 2}, ["--n-kv-head 2", "qwen3"]),
    ({"steps": 0}, ["--steps 0"]), ({"dropout": 1.0}, ["--dropout 1.0"]), ({"lr": 0.0}, ["--lr 0.0"]),
])
def test_what_cannot_be_is_refused_in_one_line(values: dict[str, object], words: list[str]) -> None:
    """The line names the setting, the place and the remedy."""
    with pytest.raises(BardletError) as caught:
        from_mapping(values, "x.toml")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_int_serves_as_a_float() -> None:
    """TOML tells 1 from 1.0; people do not."""
    assert from_mapping({"lr": 1}, "x.toml").lr == 1.0


def test_changed_lists_what_differs() -> None:
    """The model card names the settings that somebody chose."""
    assert changed(replace(TrainConfig(), n_layer=9).resolved()) == {"n_layer": 9}


def test_widths_of_the_feed_forward_layer() -> None:
    """4 n_embd in gpt2; in qwen3 8/3 n_embd rounded up to 32: three matrices instead of two, the same cost."""
    gpt2 = TrainConfig(model="gpt2", n_embd=384, n_head=6).model_config(65)
    qwen3 = TrainConfig(model="qwen3", n_embd=384, n_head=6).model_config(65)
    assert (gpt2.n_inner, qwen3.n_inner) == (1536, 1024)
    assert isinstance(gpt2, ModelConfig) and gpt2.n_kv_head == 6 and gpt2.head_dim == 64
