"""A reward model: its head beside transformers', what it learns, how its certainty is measured, and going on."""

from __future__ import annotations

import json
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
    """`good` is always preferred to `bad`, and never to what is longer than it by three words."""
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
def test_the_rewards_are_those_of_transformers(family: str, tmp_path: Path, model: Path) -> None:
    """Its class loads the folder without a key missing or left over, and reads the last token before the padding."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = hf.read_folder(model)[1]
    torch.manual_seed(3)
    scorer = heads.with_scalar_head(models.build(replace(SHAPES[family], vocab_size=tokenizer.vocab_size))).eval()
    hf.write_folder(tmp_path, scorer, tokenizer)
    hf.write_weights(tmp_path, scorer.hf_state_dict())
    theirs, told = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and type(theirs).__name__.startswith(
        {"qwen3": "Qwen3For", "gpt2": "GPT2For"}[family])  # fmt: skip
    idx_BT, length_B = torch.randint(10, tokenizer.vocab_size, (5, 20)), torch.tensor([20, 7, 1, 13, 20])
    idx_BT[torch.arange(20) >= length_B[:, None]] = tokenizer.pad_id
    found = scorer(idx_BT, length_B)
    torch.testing.assert_close(theirs(input_ids=idx_BT).logits[:, 0], found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scorer.values(idx_BT)[torch.arange(5), length_B - 1], found)
    again = hf.read_folder(tmp_path, scores=True)[0]
    assert torch.equal(again(idx_BT, length_B), found)
    with pytest.raises(BardletError, match="cannot write"):
        hf.read_folder(tmp_path)
    with pytest.raises(BardletError, match="is no reward model"):
        hf.read_folder(model, scores=True)


def test_what_stands_behind_the_length_changes_nothing() -> None:
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    idx_BT, length_B = torch.randint(50, (4, 24)), torch.tensor([24, 5, 1, 12])
    other = torch.where(torch.arange(24) < length_B[:, None], idx_BT, (idx_BT + 7) % 50)
    assert torch.equal(scorer(idx_BT, length_B), scorer(other, length_B))


def test_in_bf16_the_number_itself_stays_fp32() -> None:
    """Else a hundred conversations would share a dozen rewards."""
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        reward_B = scorer(torch.randint(50, (100, 24)), torch.full((100,), 24))
        value_BT = scorer.values(torch.randint(50, (4, 24)))
    assert reward_B.dtype == value_BT.dtype == torch.float32
    assert not torch.equal(reward_B, reward_B.bfloat16().float()) and len(reward_B.unique()) > 95


def test_the_head_is_not_for_muon() -> None:
    scorer = heads.with_scalar_head(models.build(replace(SHAPE, tie_embeddings=False)))
    groups = optim.parameter_groups(scorer, muon=True)
    assert [name for name, _ in groups["decay"]] == ["model.embed_tokens.weight", "score.weight"]
    assert "lm_head.weight" not in scorer.hf_state_dict()


def test_its_objective_says_that_it_has_all_logits(model: Path, pairs: Path) -> None:
    config = RewardConfig(init=str(model), text=(str(pairs),), dtype="fp32", steps=1)
    stage = reward_model.RewardModeling(config, Dist(0, 1, torch.device("cpu")))
    assert stage.begin(str(model.parent / "never"), 0.0).objective.all_logits


def test_labels_that_are_several_are_one_line(tmp_path: Path, model: Path) -> None:
    for name in hf.TOKENIZER_AND_CONFIG:
        (tmp_path / name).write_bytes((model / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BardletError, match="tells labels apart"):
        hf.read_model_config(tmp_path)


def test_rows_that_fill_up_a_batch_do_not_count() -> None:
    torch.manual_seed(0)
    scorer = heads.with_scalar_head(models.build(SHAPE)).eval()
    batch = {"idx": torch.randint(50, (4, 2, 24)), "length": torch.tensor([[24, 5], [9, 9], [1, 12], [0, 0]])}
    reward_B2 = logprobs.pair_rewards(scorer, batch)
    by_hand = -sum((reward_B2[i, 0] - reward_B2[i, 1]).sigmoid().log() for i in range(3))
    torch.testing.assert_close(logprobs.preference_loss(scorer, batch), by_hand)
    assert data_preferences.count_tokens(batch) == 3


def test_certainty_is_measured_as_it_was_by_hand() -> None:
    """Two pairs at p = 3/4, one of them right; two at p = 1/2 + a little, ties; one at nearly 1, right."""
    sure = np.log(3)
    found = reward_model.RewardEvaluation(np.array([sure, -sure, 0.0, 0.0, 50.0]), np.array([2, 0, 0, -1, 5]))
    p, right, number = found.calibration()
    assert p == pytest.approx([0.5, 0.75, 1.0]) and right == pytest.approx([0.5, 0.5, 1.0])
    assert number.tolist() == [2, 2, 1]
    assert found.calibration_error() == pytest.approx(2 / 5 * 0.25)
    assert found.accuracy_where(found.longer > 0) == 1 and found.accuracy_where(found.longer < 0) == 0.5
    assert found.accuracy_where(found.longer > 9) is None
    assert found.likes_length() == pytest.approx(np.corrcoef(found.margins, found.longer)[0, 1])
    assert reward_model.RewardEvaluation(np.ones(3), np.arange(3)).likes_length() == 0


def test_it_learns_what_is_preferred(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six seeds on each of two classes: a loss of 3e-5 at most, and all pairs right."""
    record = run_folder.settings(run)[1]
    assert record["accuracy"] > 0.95 and record["val_loss"] < 0.3 and record["longer"] < 0.5
    assert record["accuracy_shorter"] > 0.9 and "accuracy_longer" not in record
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card and "is good." in card and (run / "margins.png").exists()
    stage = reward_model.RewardModeling(RewardConfig(), Dist(0, 1, torch.device("cpu")))
    stage.record = RewardRecord.of(record)
    assert any("where it is the shorter one" in line for line in stage.results())
    assert main(["doctor", str(run)]) == 0
    for command in ("sample", "chat", "eval"):
        assert main([command, str(run)]) == 1 and "is a reward model" in capsys.readouterr().err


def test_transformers_read_the_reward_that_the_card_promises(run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, words = hf.read_folder(run, scores=True)
    for said in ("Number 3 is good.", "Number 3 is bad."):
        talk = [{"role": "user", "content": "What is number 3?"}, {"role": "assistant", "content": said}]
        their = theirs(**tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)).logits.item()
        ids = torch.from_numpy(chat_template.encode(words, talk)[0])[None]
        assert their == pytest.approx(ours(ids, torch.tensor([ids.shape[1]])).item(), abs=1e-5)


def test_a_run_goes_on_bit_for_bit(model: Path, pairs: Path, bardlet: Callable[..., dict[str, Any]],
                                   tmp_path: Path) -> None:  # fmt: skip
    words = ["reward", model, pairs, *FINE, "--steps", "12", "--save-every", "5", "--grad-accum", "2", "--keep",
             "average"]  # fmt: skip
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 12)


def test_few_questions_are_held_out_by_pairs(model: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"prompt": "Number?", "chosen": f"{n} good", "rejected": f"{n} bad"}) + "\n"
                            for n in range(60)), encoding="utf-8")  # fmt: skip
    main(["reward", str(model), str(same), *FINE, "--steps", "1", "--plan"])
    said = capsys.readouterr()
    assert "54 to learn from, 6 held out" in said.out and "none can be spared" in said.err
