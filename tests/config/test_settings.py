"""Settings: what is accepted, what is refused and how, and that run.toml says it all."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from bardlet.config.finetuning import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import CONFIGS, config_class
from bardlet.config.toml import as_mapping, from_mapping, non_default, read_toml, settings_in, to_toml
from bardlet.errors import BardletError

MODEL = ModelConfig("qwen3", vocab_size=300, block_size=64)


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
    assert non_default(replace(TrainConfig(), n_layer=9).resolved()) == {"n_layer": 9}


def test_widths_of_the_feed_forward_layer() -> None:
    """4 n_embd in gpt2; in qwen3 8/3 n_embd rounded up to 32: three matrices instead of two, the same cost."""
    gpt2 = TrainConfig(model="gpt2", n_embd=384, n_head=6).model_config(65)
    qwen3 = TrainConfig(model="qwen3", n_embd=384, n_head=6).model_config(65)
    assert (gpt2.n_inner, qwen3.n_inner) == (1536, 1024)
    assert isinstance(gpt2, ModelConfig) and gpt2.n_kv_head == 6 and gpt2.head_dim == 64


# ---------------------------------------------------------------- a class for each stage


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_settings_come_back_as_those_of_their_stage(kind: type[Settings], tmp_path: Path) -> None:
    """From run.toml and from a checkpoint, resolved or not."""
    named = {"source": "a", "target": "b"} if kind is TranslationConfig else {"text": ("a.jsonl",)}
    for config in (kind(**named, init="base"), kind(**named, init="base").resolved(block_size=64)):
        (tmp_path / "run.toml").write_text(to_toml(config, {}, MODEL), encoding="utf-8")
        assert read_toml(tmp_path / "run.toml") == (config, {})
        assert from_mapping(as_mapping(config), "trainer.json") == config
        assert config_class(settings_in(tmp_path / "run.toml")) is kind


BEFORE = {
    "text": [], "field": "text", "source": None, "target": None, "pair": None, "lowercase": None, "val_part": "val",
    "tokenizer": "auto", "vocab_size": None, "model": "qwen3", "init": None, "lora": None, "n_layer": 2,
    "n_encoder_layer": None, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_inner": 96, "block_size": 32, "dropout": 0.1,
    "prefix_lm": False, "label_smoothing": 0.0, "pack": True, "beta": 0.1, "reward": None, "rollout": 128, "passes": 1,
    "group": 8, "answer_tokens": 64, "temperature": 1.0, "clip": 0.2, "target_kl": None, "tie_embeddings": True,
    "activation": None, "steps": 40, "minutes": None, "batch_size": 4, "batch_tokens": 4096, "grad_accum": 1,
    "optimizer": "muon", "weight_decay": 0.1, "lr": 2e-3, "muon_lr": 2e-2, "eval_tokens": 131_072, "seed": 7,
    "replans": []}
"""Settings as checkpoints of bardlet 0.2 before the rooms have them: all names in one class."""


@pytest.mark.parametrize(("values", "kind"), [
    ({}, TrainConfig), ({"model": "bigram"}, TrainConfig), ({"pair": "de-en", "model": "encdec"}, TranslationConfig),
    ({"text": ["multi30k"], "model": "gpt2", "prefix_lm": True}, TranslationConfig),
    ({"stage": "sft", "init": "base", "pack": False}, SFTConfig), ({"stage": "reward", "init": "base"}, RewardConfig),
    ({"stage": "dpo", "init": "base"}, DPOConfig), ({"stage": "ppo", "init": "base", "reward": "exact"}, PPOConfig),
    ({"stage": "grpo", "init": "base", "reward": "exact", "beta": 0.0}, GRPOConfig),
], ids=str)
def test_settings_of_the_version_before_are_read(values: dict[str, object], kind: type[Settings]) -> None:
    """What a stage has keeps its value; what it does not have is left out."""
    config = from_mapping({"stage": "pretrain", **BEFORE, **values}, "trainer.json")
    assert type(config) is kind and (config.seed, config.steps, config.block_size, config.dropout) == (7, 40, 32, 0.1)
    for name, value in values.items():
        if name not in ("stage", "text"):
            assert getattr(config, name) == value
    assert not [name for name in config.auto_defaults if getattr(config, name) is None]


def test_what_is_open_is_resolved_by_what_was_chosen_then_by_the_plain_value() -> None:
    config = TrainConfig(n_layer=9)
    assert config.block_size is None and config.set_by_user == {"n_layer"}
    done = config.resolved(dropout=0.3)
    assert (done.n_layer, done.dropout, done.block_size, done.n_embd) == (9, 0.3, 128, 192)
    assert done.resolved(dropout=0.5) == done, "what is set stays"
    assert config.resolved("n_embd").block_size is None


def test_a_rung_is_told_what_it_does_not_have() -> None:
    TrainConfig(model="bigram").resolved().model_config(65)
    TrainConfig(model="multi-head", n_kv_head=4)
    TrainConfig(model="bigram").refuse_unused()
    for settings in ({"dropout": 0.1}, {"n_layer": 2}, {"muon_lr": 1.0}):
        with pytest.raises(BardletError, match="bigram does not have that"):
            TrainConfig(model="bigram", **settings).refuse_unused()  # type: ignore[arg-type]
    with pytest.raises(BardletError, match="--optimizer muon: bigram"):
        TrainConfig(model="bigram").refuse_unused({"optimizer"})


@pytest.mark.parametrize("text", [5, True, {"a": 1}, [], [3]])
def test_a_text_that_is_no_list_of_names_is_one_line(text: object) -> None:
    if text != []:
        with pytest.raises(BardletError, match=r"x\.toml: text"):
            from_mapping({"text": text}, "x.toml")
