"""A model learns which of two answers is preferred: pairs, reference, the run, and what people get wrong."""

from __future__ import annotations

import json
import math
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
from bardlet.data import chat_template, records
from bardlet.data import preferences as data_preferences
from bardlet.errors import BardletError
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.run.record import PreferencesRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages.dpo import DPO
from bardlet.training import logprobs

HERE = Dist(0, 1, torch.device("cpu"))
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "48", "--dtype", "fp32", "--compile",
        "off"]  # fmt: skip
FINE = ["--dtype", "fp32", "--compile", "off", "--log-every", "1", "--batch-size", "4", "--warmup-steps", "2"]
COLOURS = ["red", "blue", "green", "black", "white", "grey"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has read what the answers are made of."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("".join(f"The {c} one is good.\nThe {c} one is bad.\n" for c in COLOURS) * 30)
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "20",
                 "--out", str(folder / "run"), "--debug"]) == 0  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` is always preferred to `bad`; of some pairs an answer is too long for the window of 48."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    made: list[dict[str, Any]] = []
    for n in range(120):
        colour = f"{COLOURS[n % 6]} {n // 2}"
        good, bad = f"The {COLOURS[n % 6]} one is good.", f"The {COLOURS[n % 6]} one is bad."
        messages = [{"role": "user", "content": colour}]
        made.append({"prompt": colour, "chosen": good, "rejected": bad} if n % 3 else
                    {"prompt": messages, "chosen": [*messages, {"role": "assistant", "content": good}],
                     "rejected": [{"role": "assistant", "content": bad}]})  # fmt: skip
    made += [{"prompt": f"long {n}", "chosen": "good " * 60, "rejected": "bad"} for n in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
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


def test_no_prompt_is_in_both_parts_and_no_pair_is_lost(pairs: Path) -> None:
    learned, held = records.find([str(pairs)]).preferences()
    asked = [{json.dumps(one.prompt) for one in part} for part in (learned, held)]
    assert not asked[0] & asked[1] and len(learned) + len(held) == 125
    assert len(asked[1]) == (len(asked[0]) + len(asked[1])) // 10
    assert all(one.chosen != one.rejected and one.prompt[-1]["role"] == "user" for one in learned)


def test_both_answers_are_what_the_template_writes(model: Path, pairs: Path) -> None:
    tokenizer = hf.read_folder(model)[1]
    [one] = [records.preference({"prompt": "red <|end|>", "chosen": "good", "rejected": "bad"}, "here")]
    for side in data_preferences.SIDES:
        chats = data_preferences.encode_side(tokenizer, [one], side)
        messages = [*one.prompt, {"role": "assistant", "content": getattr(one, side)}]
        ids, answer = chat_template.encode(tokenizer, messages)
        assert chats.tokens.tolist() == ids.tolist() and chats.answer.tolist() == answer.tolist()


def test_log_p_of_a_pair_is_the_sum_over_its_answer(model: Path, pairs: Path) -> None:
    """By hand, one answer at a time and without padding; and 0 for a pair that fills a batch up."""
    gpt, tokenizer = hf.read_folder(model)
    ready = data_preferences.tokenize_preferences(records.find([str(pairs)]), tokenizer, HERE)
    batches = data_preferences.PreferenceBatches(ready.train, 48, 3, 0, 1, multiple=2)
    batch = batches.of(batches.kept[:3])
    found = logprobs.pair_log_probability(gpt, batch)
    assert found.shape == (4, 2) and found[3].tolist() == [0, 0] and data_preferences.count_tokens(batch) == 3
    for b, i in enumerate(batches.kept[:3]):
        for s, side in enumerate(ready.train.sides):
            here = slice(int(side.starts[i]), int(side.ends[i]))
            ids, answer = torch.from_numpy(side.tokens[here].astype(np.int64)), side.answer[here]
            logp = gpt(ids[None, :-1])[0].log_softmax(-1)
            by_hand = torch.stack([logp[t, ids[t + 1]] for t in range(len(ids) - 1) if answer[t + 1]]).sum()
            assert found[b, s].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_at_the_reference_the_loss_is_log_2(model: Path, pairs: Path) -> None:
    config = config_of(model, pairs, steps=1, grad_accum=2)
    stage = DPO(config, HERE)
    trainer = stage.begin(str(model.parent / "never"), 0.0)
    assert trainer.objective.evaluate(trainer.model) == pytest.approx(math.log(2), abs=1e-6) and trainer.objective.all_logits
    total = sum(trainer.objective.loss(trainer.model, trainer.objective.batch(step)).item() for step in range(trainer.record.batches))
    count = sum(trainer.objective.count(trainer.objective.batch(step)) for step in range(trainer.record.batches))
    assert total / count == pytest.approx(math.log(2), abs=1e-6)
    assert count + trainer.record.left_out == len(stage.data.pairs.train) and trainer.record.left_out > 0


def test_it_learns_what_is_preferred(run: Path) -> None:
    """Six seeds on each of two classes: a loss of 0.333 at most, all pairs right, a margin of 0.929 at least."""
    record = run_folder.settings(run)[1]
    assert record["val_loss"] < 0.5 and record["accuracy"] > 0.9 and record["margin"] > 0.3
    assert record["longer"] == 0.5  # both are as many tokens
    stage = DPO(DPOConfig(), HERE)
    for accuracy, verdict in ((record["accuracy"], ", better than"), (0.5, ", no better than")):
        stage.record = PreferencesRecord.of({**record, "accuracy": accuracy})
        assert verdict in stage.results()[0]
    assert "greater reward" in (run / "README.md").read_text(encoding="utf-8")


def test_the_folder_is_a_chat_model_of_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, words = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = words.apply_chat_template([{"role": "user", "content": "red"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)  # fmt: skip
    ours = hf.read_folder(run)[0]
    torch.testing.assert_close(theirs(**ids).logits, ours(ids["input_ids"]), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_bit_for_bit(model: Path, pairs: Path, bardlet: Callable[..., dict[str, Any]],
                                   tmp_path: Path) -> None:  # fmt: skip
    """Its process ends at step 7; resumed it goes on from the checkpoint of step 5, with the same reference."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    words = ["dpo", str(base), str(pairs), *FINE, "--steps", "12", "--save-every", "5", "--grad-accum", "2"]
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert main(["resume", str(tmp_path / "again")]) == 1  # the reference is another one
    (base / "model.safetensors").write_bytes(weights)
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 12)


@pytest.mark.parametrize(("record", "what"), [
    ({"prompt": "x", "chosen": "y"}, "has no rejected"), ({"prompt": 3, "chosen": "y", "rejected": "z"}, "is a number"),
    ({"prompt": "x", "chosen": [], "rejected": "z"}, "without a message"),
    ({"prompt": "x", "chosen": [{"role": "user", "content": "y"}], "rejected": "z"}, "ends with a message of the user"),
    ({"prompt": [{"role": "assistant", "content": "y"}], "chosen": "y", "rejected": "z"}, "ends with an answer"),
])  # fmt: skip
def test_what_is_no_preference_is_one_line(record: dict[str, Any], what: str) -> None:
    with pytest.raises(BardletError) as error:
        records.preference(record, "a.jsonl, line 7")
    assert what in str(error.value) and str(error.value).startswith("a.jsonl, line 7") and "\n" not in str(error.value)


def test_what_people_get_wrong_is_one_line(model: Path, pairs: Path, run: Path, capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": f"{n} " * 90, "chosen": "y", "rejected": "z"}) + "\n"
                            for n in range(30)), encoding="utf-8")  # fmt: skip
    for words, what in (
        ([], "name the model"), ([str(model)], "nothing to learn from"),
        ([str(model), str(long)], "no pair of answers fits into the model's window of 48 tokens"),
        ([str(model), str(pairs), "--no-pack"], "--no-pack"), ([str(model), str(pairs), "--beta", "0"], "--beta"),
    ):
        assert main(["dpo", *words, "--out", str(tmp_path / "never")]) != 0
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("bardlet: ") and what in said, said
        assert not (tmp_path / "never").exists()
    assert main(["eval", str(run)]) == 1 and "it learned by dpo" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0
