"""Reward models: parity with transformers, training, calibration, exact resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_run
from processes import power_cut

from bardlet import models
from bardlet.cli import main
from bardlet.config.finetuning import RewardConfig
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.data import preferences as data_preferences
from bardlet.errors import BardletError
from bardlet.models import reward as heads
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.run.record import RewardRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import reward_model
from bardlet.training import logprobs, optim

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "48", "--dtype", "fp32", "--compile",
        "off"]  # fmt: skip
FINE = ["--dtype", "fp32", "--compile", "off", "--log-every", "1", "--batch-size", "4", "--warmup-steps", "2"]
SHAPE = ModelConfig("qwen3", vocab_size=50, block_size=24, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8,
                    n_inner=64, activation="silu")  # fmt: skip
SHAPES = {"qwen3": SHAPE, "gpt2": replace(SHAPE, model="gpt2", n_kv_head=4, activation="gelu_new")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"Number {n} is good.\nNumber {n} is bad.\n" for n in range(90)))
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "10",
                 "--out", str(folder / "run"), "--debug"]) == 0  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences for `good` over `bad`, where every second rejected completion is longer by three words."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is number {n}?", "chosen": f"Number {n} is good.",
                                        "rejected": f"Number {n} is bad{' and so on' * (n % 2)}."}) + "\n"
                            for n in range(120)), encoding="utf-8")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "run"
    assert main(["reward", str(model), str(pairs), *FINE, "--steps", "60", "--lr", "2e-3", "--muon-lr", "1e-2", "--out",
                 str(out), "--debug"]) == 0  # fmt: skip
    return out


@pytest.mark.parametrize("family", SHAPES)
def test_transformers_computes_the_same_rewards(family: str, tmp_path: Path, model: Path) -> None:
    """Its class loads the folder without missing or unexpected keys, and reads the last token before the padding."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = hf.read_folder(model)[1]
    torch.manual_seed(3)
    scorer = heads.with_scalar_head(models.build(replace(SHAPES[family], vocab_size=tokenizer.vocab_size))).eval()
    hf.write_folder(tmp_path, scorer, tokenizer)
    hf.write_weights(tmp_path, scorer.hf_state_dict())
    theirs, loading_info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    assert type(theirs).__name__.startswith({"qwen3": "Qwen3For", "gpt2": "GPT2For"}[family])
    idx_BT, length_B = torch.randint(10, tokenizer.vocab_size, (5, 20)), torch.tensor([20, 7, 1, 13, 20])
    idx_BT[torch.arange(20) >= length_B[:, None]] = tokenizer.pad_id
    reward_B = scorer(idx_BT, length_B)
    torch.testing.assert_close(theirs(input_ids=idx_BT).logits[:, 0], reward_B, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scorer.values(idx_BT)[torch.arange(5), length_B - 1], reward_B)
    reloaded = hf.read_folder(tmp_path, scores=True)[0]
    assert torch.equal(reloaded(idx_BT, length_B), reward_B)
    with pytest.raises(BardletError, match="cannot generate text"):
        hf.read_folder(tmp_path)
    with pytest.raises(BardletError, match="not a reward model"):
        hf.read_folder(model, scores=True)


def test_tokens_after_the_length_change_nothing() -> None:
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    idx_BT, length_B = torch.randint(50, (4, 24)), torch.tensor([24, 5, 1, 12])
    other = torch.where(torch.arange(24) < length_B[:, None], idx_BT, (idx_BT + 7) % 50)
    assert torch.equal(scorer(idx_BT, length_B), scorer(other, length_B))


def test_rewards_stay_fp32_under_bf16_autocast() -> None:
    """In bf16, a hundred conversations would share a dozen rewards."""
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        reward_B = scorer(torch.randint(50, (100, 24)), torch.full((100,), 24))
        value_BT = scorer.values(torch.randint(50, (4, 24)))
    assert reward_B.dtype == value_BT.dtype == torch.float32
    assert not torch.equal(reward_B, reward_B.bfloat16().float()) and len(reward_B.unique()) > 95


def test_muon_does_not_train_the_head() -> None:
    scorer = heads.with_scalar_head(models.build(replace(SHAPE, tie_embeddings=False)))
    groups = optim.parameter_groups(scorer, muon=True)
    assert [name for name, _ in groups["decay"]] == ["model.embed_tokens.weight", "score.weight"]
    assert "lm_head.weight" not in scorer.hf_state_dict()


def test_the_objective_has_all_logits(model: Path, pairs: Path) -> None:
    config = RewardConfig(init=str(model), text=(str(pairs),), dtype="fp32", steps=1)
    stage = reward_model.RewardModeling(config, Dist(0, 1, torch.device("cpu")))
    assert stage.begin(str(model.parent / "never"), 0.0).objective.all_logits


def test_a_classifier_of_several_labels_is_a_one_line_error(tmp_path: Path, model: Path) -> None:
    for name in hf.TOKENIZER_AND_CONFIG:
        (tmp_path / name).write_bytes((model / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BardletError, match="only one label"):
        hf.read_model_config(tmp_path)


def test_padding_pairs_do_not_count() -> None:
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    batch = {"idx": torch.randint(50, (4, 2, 24)), "length": torch.tensor([[24, 5], [9, 9], [1, 12], [0, 0]])}
    reward_B2 = logprobs.pair_rewards(scorer, batch)
    expected = -sum((reward_B2[i, 0] - reward_B2[i, 1]).sigmoid().log() for i in range(3))
    torch.testing.assert_close(logprobs.preference_loss(scorer, batch), expected)
    assert data_preferences.count_pairs(batch) == 3


def test_calibration_matches_a_hand_computed_example() -> None:
    """Two pairs at p = 3/4, one of them right; two ties at p = 1/2; one right pair at p close to 1."""
    margin = np.log(3)
    evaluation = reward_model.RewardEvaluation(np.array([margin, -margin, 0.0, 0.0, 50.0]), np.array([2, 0, 0, -1, 5]))
    p, right, counts = evaluation.calibration()
    assert p == pytest.approx([0.5, 0.75, 1.0]) and right == pytest.approx([0.5, 0.5, 1.0])
    assert counts.tolist() == [2, 2, 1]
    assert evaluation.calibration_error() == pytest.approx(2 / 5 * 0.25)
    assert evaluation.accuracy_where(evaluation.longer > 0) == 1
    assert evaluation.accuracy_where(evaluation.longer < 0) == 0.5
    assert evaluation.accuracy_where(evaluation.longer > 9) is None
    assert evaluation.length_correlation() == pytest.approx(np.corrcoef(evaluation.margins, evaluation.longer)[0, 1])
    assert reward_model.RewardEvaluation(np.ones(3), np.arange(3)).length_correlation() == 0


def test_a_reward_that_follows_the_length_is_a_warning() -> None:
    assert reward_model.length_warning(0.7) == reward_model.length_warning(-0.2) == ""
    assert "it gives longer completions" in reward_model.length_warning(0.98)
    assert "chosen completion is the longer one" in reward_model.length_warning(-0.98)


def test_it_learns_the_preference(run: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Six seeds on each of two machine classes: loss at most 3e-5, all pairs right."""
    record = run_folder.settings(run)[1]
    assert record["accuracy"] > 0.95 and record["val_loss"] < 0.3 and record["longer"] < 0.5
    assert record["accuracy_shorter"] > 0.9 and "accuracy_longer" not in record
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card and "is good." in card and (run / "margins.png").exists()
    stage = reward_model.RewardModeling(RewardConfig(), Dist(0, 1, torch.device("cpu")))
    stage.record = RewardRecord.of(record)
    monkeypatch.setattr(reward_model.RewardModeling, "length_differences", lambda self: np.array([0, -3] * 6))
    assert any(re.search(r"is shorter: .* of 6 pairs \(", line) for line in stage.results())
    assert re.search(r"completion is shorter \| \d+ of \d+ pairs \(\d+ %", card)
    assert main(["doctor", str(run)]) == 0
    for command in ("sample", "chat", "eval"):
        assert main([command, str(run)]) == 1
        assert "a reward model, which cannot generate text" in capsys.readouterr().err


def test_the_code_on_the_card_computes_the_reward(run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, our_tokenizer = hf.read_folder(run, scores=True)
    for completion in ("Number 3 is good.", "Number 3 is bad."):
        messages = [{"role": "user", "content": "What is number 3?"}, {"role": "assistant", "content": completion}]
        their = theirs(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)).logits.item()
        ids = torch.from_numpy(chat_template.encode(our_tokenizer, messages)[0])[None]
        assert their == pytest.approx(ours(ids, torch.tensor([ids.shape[1]])).item(), abs=1e-5)


def test_resume_is_bit_exact(model: Path, pairs: Path, bardlet: Callable[..., dict[str, Any]],
                             tmp_path: Path) -> None:  # fmt: skip
    command = ["reward", model, pairs, *FINE, "--steps", "12", "--save-every", "5", "--grad-accum", "2", "--keep",
               "average"]  # fmt: skip
    bardlet(*command, "--out", tmp_path / "whole")
    power_cut([*command, "--out", tmp_path / "resumed"])
    assert bardlet("resume", tmp_path / "resumed")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 12)


def test_with_a_single_prompt_the_split_is_by_pairs(model: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"prompt": "Number?", "chosen": f"{n} good", "rejected": f"{n} bad"}) + "\n"
                            for n in range(60)), encoding="utf-8")  # fmt: skip
    main(["reward", str(model), str(same), *FINE, "--steps", "1", "--plan"])
    printed = capsys.readouterr()
    assert "54 for training, 6 held out" in printed.out and "too few different prompts (1)" in printed.err
