"""Settings: validation and its messages, defaults, and the round trip through run.toml."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from bardlet.config.finetuning import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import CONFIGS, config_class
from bardlet.config.toml import (
    DIGEST_LINE,
    OLD_DIGEST_LINE,
    as_mapping,
    from_mapping,
    is_untouched,
    non_default,
    read_toml,
    settings_in,
    to_toml,
)
from bardlet.errors import BardletError

MODEL = ModelConfig("qwen3", vocab_size=300, block_size=64)


def test_toml_round_trip(tmp_path: Path) -> None:
    """Settings and record are the same after writing and reading; a None entry is left out."""
    config = TrainConfig(text=("a.txt", "ü b"), steps=7, lr=3e-4, n_kv_head=2, keep="average", replans=((0, 9), (4, 7)))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config, {"val_loss": 1.5, "nothing": None}), encoding="utf-8")
    assert read_toml(path) == (config, {"val_loss": 1.5})


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig) if getattr(TrainConfig(), f.name) is not None])
def test_every_setting_is_accepted_in_a_file(name: str) -> None:
    """A file that states a default changes nothing."""
    default = getattr(TrainConfig(), name)
    value = list(default) if isinstance(default, tuple) else default
    assert from_mapping({name: value}, "x.toml") == TrainConfig()


@pytest.mark.parametrize("values, fragments", [
    ({"n_layers": 3}, ["x.toml", "n_layers", "did you mean 'n_layer'"]),
    ({"n_layer": "3"}, ["x.toml: n_layer", "whole number"]),
    ({"n_layer": True}, ["x.toml: n_layer", "whole number"]),
    ({"n_layer": 3.5}, ["x.toml: n_layer", "whole number"]),
    ({"keep": "first"}, ["x.toml: keep", "best, last, average"]),
    ({"text": 5}, ["x.toml: text", "list"]), ({"replans": "5"}, ["x.toml: replans", "list"]),
    ({"steps": 3, "minutes": 1}, ["--steps and --minutes"]),
    ({"n_embd": 100, "n_head": 3}, ["--n-embd 100", "--n-head 3", "use --n-head 2 or --n-embd 102"]),
    ({"n_embd": 12, "n_head": 4}, ["heads of 3 channels", "even"]),
    ({"n_head": 6, "n_embd": 384, "n_kv_head": 4}, ["--n-kv-head 4 does not divide --n-head 6", "use --n-kv-head 3"]),
    ({"model": "gpt2", "n_kv_head": 2}, ["--n-kv-head 2", "qwen3"]),
    ({"steps": 0}, ["--steps 0"]), ({"dropout": 1.0}, ["--dropout 1: must be"]), ({"lr": 0.0}, ["--lr 0: must be"]),
])
def test_an_invalid_setting_is_one_line(values: dict[str, object], fragments: list[str]) -> None:
    """The line names the setting, the file and the remedy."""
    with pytest.raises(BardletError) as caught:
        from_mapping(values, "x.toml")
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_int_is_accepted_as_a_float() -> None:
    """TOML distinguishes 1 from 1.0; users do not."""
    assert from_mapping({"lr": 1}, "x.toml").lr == 1.0


def test_a_string_is_accepted_as_a_list_of_one() -> None:
    assert from_mapping({"text": "poem.txt"}, "x.toml").text == ("poem.txt",)


def test_non_default_settings() -> None:
    """The model card lists the settings that the user chose."""
    assert non_default(replace(TrainConfig(), n_layer=9).resolved()) == {"n_layer": 9}


def test_widths_of_the_feed_forward_layer() -> None:
    """4 n_embd in gpt2; in qwen3 8/3 n_embd, rounded up to a multiple of 32: three matrices for the same cost."""
    gpt2 = TrainConfig(model="gpt2", n_embd=384, n_head=6).model_config(65)
    qwen3 = TrainConfig(model="qwen3", n_embd=384, n_head=6).model_config(65)
    assert (gpt2.n_inner, qwen3.n_inner) == (1536, 1024)
    assert isinstance(gpt2, ModelConfig) and gpt2.n_kv_head == 6 and gpt2.head_dim == 64


# ---------------------------------------------------------------- a class for each stage


@pytest.mark.parametrize("line", [DIGEST_LINE, OLD_DIGEST_LINE])
def test_an_edit_of_run_toml_is_detected(line: str, tmp_path: Path) -> None:
    """Also in a run.toml of an older version, whose digest had another comment."""
    path, text = tmp_path / "run.toml", to_toml(TrainConfig(), {}).replace(DIGEST_LINE, line)
    path.write_text(text, encoding="utf-8")
    assert is_untouched(path) and line in text
    path.write_text(text.replace("seed = 1337", "seed = 1338"), encoding="utf-8")
    assert not is_untouched(path)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_settings_are_read_as_the_class_of_their_stage(kind: type[Settings], tmp_path: Path) -> None:
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
"""Settings in checkpoints of an early bardlet 0.2, in which one class had the settings of all stages."""


@pytest.mark.parametrize(("values", "kind"), [
    ({}, TrainConfig), ({"model": "bigram"}, TrainConfig), ({"pair": "de-en", "model": "encdec"}, TranslationConfig),
    ({"text": ["multi30k"], "model": "gpt2", "prefix_lm": True}, TranslationConfig),
    ({"stage": "sft", "init": "base", "pack": False}, SFTConfig), ({"stage": "reward", "init": "base"}, RewardConfig),
    ({"stage": "dpo", "init": "base"}, DPOConfig), ({"stage": "ppo", "init": "base", "reward": "exact"}, PPOConfig),
    ({"stage": "grpo", "init": "base", "reward": "exact", "beta": 0.0}, GRPOConfig),
], ids=str)
def test_settings_of_an_older_version_are_read(values: dict[str, object], kind: type[Settings]) -> None:
    """Settings of the stage keep their values; the others are dropped."""
    config = from_mapping({"stage": "pretrain", **BEFORE, **values}, "trainer.json")
    assert type(config) is kind and (config.seed, config.steps, config.block_size, config.dropout) == (7, 40, 32, 0.1)
    for name, value in values.items():
        if name not in ("stage", "text"):
            assert getattr(config, name) == value
    assert not [name for name in config.auto_defaults if getattr(config, name) is None]


def test_resolved_sets_open_settings_only() -> None:
    """From the chosen values, else from the defaults."""
    config = TrainConfig(n_layer=9)
    assert config.block_size is None and config.set_by_user == {"n_layer"}
    done = config.resolved(dropout=0.3)
    assert (done.n_layer, done.dropout, done.block_size, done.n_embd) == (9, 0.3, 128, 192)
    assert done.resolved(dropout=0.5) == done, "a setting with a value is kept"
    assert config.resolved("n_embd").block_size is None


def test_settings_that_a_rung_lacks_are_refused() -> None:
    TrainConfig(model="bigram").resolved().model_config(65)
    TrainConfig(model="multi-head", n_kv_head=4)
    TrainConfig(model="bigram").refuse_unused()
    for settings in ({"dropout": 0.1}, {"n_layer": 2}, {"muon_lr": 1.0}):
        with pytest.raises(BardletError, match=r"^--\S+ \S+: does not apply to bigram; drop it, or use --model "):
            TrainConfig(model="bigram", **settings).refuse_unused()  # type: ignore[arg-type]
    with pytest.raises(BardletError, match="--optimizer muon: does not apply to bigram"):
        TrainConfig(model="bigram").refuse_unused({"optimizer"})


@pytest.mark.parametrize("text", [5, True, {"a": 1}, [3]])
def test_a_text_that_is_not_a_list_of_names_is_one_line(text: object) -> None:
    with pytest.raises(BardletError, match=r"x\.toml: text"):
        from_mapping({"text": text}, "x.toml")
