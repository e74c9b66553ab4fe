"""DPO: pairs, reference model, training, exact resume, and error messages."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_run
from processes import power_cut

from bardlet.cli import main
from bardlet.config.finetuning import DPOConfig
from bardlet.data import chat_template, forms, records
from bardlet.data import preferences as data_preferences
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.run.record import PreferencesRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import preference
from bardlet.stages.dpo import DPO
from bardlet.training import logprobs

DIST = Dist(0, 1, torch.device("cpu"))
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "48", "--dtype", "fp32", "--compile",
        "off"]  # fmt: skip
FINE = ["--dtype", "fp32", "--compile", "off", "--log-every", "1", "--batch-size", "4", "--warmup-steps", "2"]
COLORS = ["red", "blue", "green", "black", "white", "grey"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model trained on the sentences of the completions."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"The {c} one is good.\nThe {c} one is bad.\n" for c in COLORS) * 30)
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "20",
                 "--out", str(folder / "run"), "--debug"]) == 0  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences for `good` over `bad`; five pairs are too long for the window of 48 tokens."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows: list[dict[str, Any]] = []
    for n in range(120):
        color = f"{COLORS[n % 6]} {n // 2}"
        good, bad = f"The {COLORS[n % 6]} one is good.", f"The {COLORS[n % 6]} one is bad."
        messages = [{"role": "user", "content": color}]
        rows.append({"prompt": color, "chosen": good, "rejected": bad} if n % 3 else
                    {"prompt": messages, "chosen": [*messages, {"role": "assistant", "content": good}],
                     "rejected": [{"role": "assistant", "content": bad}]})  # fmt: skip
    rows += [{"prompt": f"long {n}", "chosen": "good " * 60, "rejected": "bad"} for n in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dpo") / "run"
    assert main(["dpo", str(model), str(pairs), *FINE, "--steps", "40", "--lr", "1e-3", "--muon-lr", "1e-2", "--out",
                 str(out), "--debug"]) == 0  # fmt: skip
    return out


def config_of(model: Path, pairs: Path, **changes: Any) -> DPOConfig:
    return DPOConfig(init=str(model), text=(str(pairs),), block_size=48, dtype="fp32", lr=2e-3, batch_size=4,
                     **changes)  # fmt: skip


def test_the_split_is_by_prompt_and_keeps_all_pairs(pairs: Path) -> None:
    train, validation = records.find([str(pairs)]).preferences()
    prompts = [{json.dumps(pair.prompt) for pair in part} for part in (train, validation)]
    assert not prompts[0] & prompts[1] and len(train) + len(validation) == 125
    assert len(prompts[1]) == (len(prompts[0]) + len(prompts[1])) // 10
    assert all(pair.chosen != pair.rejected and pair.prompt[-1]["role"] == "user" for pair in train)


def test_both_completions_follow_the_chat_template(model: Path, pairs: Path) -> None:
    tokenizer = hf.read_folder(model)[1]
    pair = forms.preference(forms.Fields({"prompt": "red <|end|>", "chosen": "good", "rejected": "bad"}))
    for side in data_preferences.SIDES:
        chats = data_preferences.encode_side(tokenizer, [pair], side)
        messages = [*pair.prompt, {"role": "assistant", "content": getattr(pair, side)}]
        ids, answer = chat_template.encode(tokenizer, messages)
        assert chats.tokens.tolist() == ids.tolist() and chats.answer.tolist() == answer.tolist()


def test_log_p_of_a_pair_is_the_sum_over_its_completion(model: Path, pairs: Path) -> None:
    """Compared with single, unpadded completions; a padding pair has log p 0."""
    policy, tokenizer = hf.read_folder(model)
    dataset = data_preferences.tokenize_preferences(records.find([str(pairs)]), tokenizer, DIST)
    batches = data_preferences.PreferenceBatches(dataset.train, 48, 3, 0, 1, multiple=2)
    batch = batches.of(batches.kept[:3])
    logp_B2 = logprobs.pair_log_probability(policy, batch)
    assert logp_B2.shape == (4, 2) and logp_B2[3].tolist() == [0, 0] and data_preferences.count_pairs(batch) == 3
    for b, i in enumerate(batches.kept[:3]):
        for s, side in enumerate(dataset.train.sides):
            span = slice(int(side.starts[i]), int(side.ends[i]))
            ids, answer = torch.from_numpy(side.tokens[span].astype(np.int64)), side.answer[span]
            logp = policy(ids[None, :-1])[0].log_softmax(-1)
            expected = torch.stack([logp[t, ids[t + 1]] for t in range(len(ids) - 1) if answer[t + 1]]).sum()
            assert logp_B2[b, s].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_initial_loss_is_log_2(model: Path, pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(model, pairs, steps=1, grad_accum=2)
    stage = DPO(config, DIST)
    trainer = stage.begin(str(model.parent / "never"), 0.0)
    assert f"{model} is a base model; run `bardlet sft` on it first" in caplog.text
    objective = trainer.objective
    assert objective.evaluate(trainer.model) == pytest.approx(math.log(2), abs=1e-6) and objective.all_logits
    batches = [objective.batch(step) for step in range(trainer.record.batches)]
    total = sum(objective.loss(trainer.model, batch).item() for batch in batches)
    count = sum(map(objective.count, batches))
    assert total / count == pytest.approx(math.log(2), abs=1e-6)
    assert count + trainer.record.left_out == len(stage.data.pairs.train) and trainer.record.left_out > 0


def test_it_learns_the_preference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six seeds on each of two machine classes: loss at most 0.333, all pairs right, margin at least 0.929."""
    record = run_folder.settings(run)[1]
    assert record["val_loss"] < 0.5 and record["accuracy"] > 0.9 and record["margin"] > 0.3
    assert record["longer"] == 0.5  # both completions have as many tokens
    monkeypatch.setattr(DPO, "length_differences", lambda self: np.zeros(11, np.int64))
    stage = DPO(DPOConfig(), DIST)
    for accuracy, verdict in ((1.0, "; the model is better"), (0.7, ""), (0.5, ""), (0.0, "; the model is worse")):
        stage.record = PreferencesRecord.of({**record, "accuracy": accuracy})
        first, second = stage.results()
        assert "11 pairs" in first and second.endswith(f"0 of 11 pairs (0 %), 11 of equal length{verdict}")
    monkeypatch.setattr(DPO, "length_differences", lambda self: np.array([3, 0, 1, 0]))
    assert "in 2 of 4 pairs (50 % ± 29), 2 of equal length; ± is one standard error" in stage.length_baseline()
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "higher reward" in card and re.search(r"0 of (\d+) pairs \(0 %\), \1 of equal length", card)


@pytest.mark.parametrize(("share", "pairs", "text"), [
    (0.6, 5, "3 of 5 pairs (60 % ± 24)"), (1.0, 4, "4 of 4 pairs (100 %)"), (0.0, 4, "0 of 4 pairs (0 %)"),
    (1.0, 1, "1 of 1 pairs (100 %)"), (0.5, 1, "0.5 of 1 pairs (50 %)"),
    (0.5, 2, "1 of 2 pairs (50 % ± 50)"), (0.5261, 6000, "52.6 % ± 0.6 of 6,000 pairs"),
    (0.4667, 15, "7 of 15 pairs (47 % ± 13)"),
])  # fmt: skip
def test_accuracies_have_a_count_and_a_standard_error(share: float, pairs: int, text: str) -> None:
    assert preference.format_share(share, pairs) == text


def test_transformers_loads_the_run_as_a_chat_model(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)  # fmt: skip
    ours = hf.read_folder(run)[0]
    torch.testing.assert_close(theirs(**ids).logits, ours(ids["input_ids"]), rtol=1e-5, atol=1e-5)


def test_resume_is_bit_exact(model: Path, pairs: Path, bardlet: Callable[..., dict[str, Any]],
                             tmp_path: Path) -> None:  # fmt: skip
    """Killed at step 7, the run resumes from the checkpoint of step 5, but only with the same reference."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    command = ["dpo", str(base), str(pairs), *FINE, "--steps", "12", "--save-every", "5", "--grad-accum", "2"]
    bardlet(*command, "--out", tmp_path / "whole")
    power_cut([*command, "--out", tmp_path / "resumed"])
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert main(["resume", str(tmp_path / "resumed")]) == 1  # another reference
    (base / "model.safetensors").write_bytes(weights)
    assert bardlet("resume", tmp_path / "resumed")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 12)


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "x", "chosen": "y"}, "has no rejected"), ({"prompt": 3, "chosen": "y", "rejected": "z"}, "is a number"),
    ({"prompt": "x", "chosen": [], "rejected": "z"}, "is empty"),
    ({"prompt": "x", "chosen": [{"role": "user", "content": "y"}], "rejected": "z"}, "ends with a user message"),
    ({"prompt": [{"role": "assistant", "content": "y"}], "chosen": "y", "rejected": "z"},
     "ends with an assistant message"),
])  # fmt: skip
def test_a_bad_preference_is_a_one_line_error(record: dict[str, Any], message: str) -> None:
    with pytest.raises(forms.Unusable) as error:
        forms.preference(forms.Fields(record))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_user_errors_are_one_line(model: Path, pairs: Path, run: Path, capsys: pytest.CaptureFixture[str],
                                  tmp_path: Path) -> None:  # fmt: skip
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": f"{n} " * 90, "chosen": "y", "rejected": "z"}) + "\n"
                            for n in range(30)), encoding="utf-8")  # fmt: skip
    for arguments, message in (
        ([], "name the model"), ([str(model)], "no training data"),
        ([str(model), str(long)], "no pair fits into the model's context window of 48 tokens"),
        ([str(model), str(pairs), "--no-pack"], "--no-pack"), ([str(model), str(pairs), "--beta", "0"], "--beta"),
    ):
        assert main(["dpo", *arguments, "--out", str(tmp_path / "never")]) != 0
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("bardlet: ") and message in error, error
        assert not (tmp_path / "never").exists()
    assert main(["eval", str(run)]) == 1 and "trained by dpo" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0
