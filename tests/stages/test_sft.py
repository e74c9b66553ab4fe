"""Supervised fine-tuning: training, parity with transformers, exact resume, and error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run
from processes import power_cut
from safetensors.torch import load_file

from bardlet.cli import main
from bardlet.data import chat_template
from bardlet.inference import answers as inference_answers
from bardlet.run import folder as run_folder
from bardlet.run import hf
from bardlet.run.record import ConversationsRecord
from bardlet.stages import finetuning
from bardlet.stages.sft import SFT

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "48", "--dtype", "fp32", "--warmup-steps",
        "2", "--compile", "off"]  # fmt: skip
FINE = ["--dtype", "fp32", "--compile", "off", "--log-every", "1", "--batch-size", "4"]
NAMES = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text("".join(f"{name} is {n}.\n" for n, name in enumerate(NAMES)) * 60, encoding="utf-8")
    assert main(["train", str(text), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "30", "--debug",
                 "--out", str(folder / "run")]) == 0  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """German number words with their digits as answers; one prompt is too long, two conversations have no answer."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    numbers = [(n + n // 10) % 10 for n in range(150)]
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": NAMES[n]},
                                                {"role": "assistant", "content": str(n)}]} for n in numbers]
    rows.append({"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]})
    rows.append({"messages": [{"role": "user", "content": "and?"}]})
    rows.append({"instruction": "drei", "input": "", "output": "3"})
    rows[39:39] = [{"messages": [{"role": "user", "content": "and?"}]}]  # the fourth held-out one
    rows += [{"instruction": "acht", "input": "", "output": "8"}] * 9
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    assert main(["sft", str(base), str(chats), *FINE, "--steps", "150", "--lr", "5e-3", "--muon-lr", "5e-2",
                 "--out", str(out), "--debug"]) == 0  # fmt: skip
    return out


def test_it_learns_to_answer_and_to_stop(run: Path) -> None:
    """Six seeds on each of two machine classes: loss at most 0.0192 nats, from 5.80, and all answers ended."""
    record = run_folder.settings(run)[1]
    assert record["val_loss"] < 0.5 * record["val_loss_before"]
    assert (record["cut"], record["left_out"], record["unanswered"]) == (0, 1, 0)
    assert record["ended"] == 1.0
    model, tokenizer = hf.read_folder(run)
    prompts = [chat_template.encode(tokenizer, [{"role": "user", "content": name}], add_generation_prompt=True)[0]
               for name in NAMES]
    answers = inference_answers.generate_answers(model, tokenizer, prompts, 10)
    assert all(ended for _, ended in answers)
    assert sum(text == str(n) for n, (text, _) in enumerate(answers)) >= 8


def test_of_a_wide_context_rows_use_what_the_longest_conversation_needs(base: Path, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a context is wide from 8 tokens on, and the base has one of 48; --block-size is left alone."""
    monkeypatch.setattr(finetuning, "WIDE", 8)
    records = [{"prompt": NAMES[n % 10], "answer": str(n % 10)} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    _, tokenizer = hf.read_folder(base)
    tokenizer = chat_template.with_special_tokens(tokenizer, ())
    tokenizer.chat_template = chat_template.TEMPLATE
    longest = max(len(chat_template.encode(tokenizer, [{"role": "user", "content": name},
                                                       {"role": "assistant", "content": "1"}])[0]) for name in NAMES)
    for options, expected in (([], 2 ** math.ceil(math.log2(longest))), (["--block-size", "40"], 40)):
        out = tmp_path / f"run{len(options)}"
        assert main(["sft", str(base), str(tmp_path / "chats.jsonl"), *FINE, "--steps", "2", "--out", str(out),
                     *options]) == 0  # fmt: skip
        assert run_folder.settings(out)[0].block_size == expected < 48


def test_transformers_loads_the_run_as_a_chat_model(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, our_tokenizer = hf.read_folder(run)
    messages = [{"role": "user", "content": "sieben"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    our_ids = chat_template.encode(our_tokenizer, messages, add_generation_prompt=True)[0]
    assert ids["input_ids"][0].tolist() == our_ids.tolist()
    torch.testing.assert_close(theirs(**ids).logits, ours(torch.from_numpy(our_ids)[None]), rtol=1e-5, atol=1e-5)
    generated = theirs.generate(**ids, max_new_tokens=12, do_sample=False)[0, len(our_ids) :]
    [(text, ended)] = inference_answers.generate_answers(ours, our_tokenizer, [our_ids], 12)
    assert ended and int(generated[-1]) == chat_template.special_id(our_tokenizer, "end"), "both stop by themselves"
    assert tokenizer.decode(generated, skip_special_tokens=True).strip() == text
    assert (run / "README.md").read_text(encoding="utf-8").count("held-out") >= 3


def test_eval_and_doctor_accept_the_run(run: Path, bardlet: Callable[..., dict[str, Any]],
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    record = run_folder.settings(run)[1]
    measured = bardlet("eval", run)
    assert measured["loss"] == pytest.approx(record["val_loss"], abs=1e-5)
    assert measured["tokens"] == record["val_tokens_of"]
    assert main(["eval", str(run), "--context", "8"]) == 1
    assert "trained on conversations" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0
    assert "unchanged since the run started" in capsys.readouterr().out
    assert main(["doctor", str(run), "--memorised", "--tokens", "20"]) == 0
    assert "generated characters occur in the answers it was trained on" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [["--dropout", "0.1", "--grad-accum", "2"], ["--no-pack", "--keep", "average"]])
def test_resume_is_bit_exact(base: Path, chats: Path, settings: list[str], bardlet: Callable[..., dict[str, Any]],
                             tmp_path: Path) -> None:  # fmt: skip
    """Killed at step 7, the run resumes from the checkpoint of step 5, not from the start."""
    command = ["sft", str(base), str(chats), *FINE, *settings, "--steps", "12", "--save-every", "5"]
    bardlet(*command, "--out", tmp_path / "whole")
    power_cut([*command, "--out", tmp_path / "resumed"])
    assert bardlet("resume", tmp_path / "resumed")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 12)


def test_run_toml_repeats_the_run(run: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for command in ("sft", "train"):
        bardlet(command, "--config", run / "run.toml", "--out", tmp_path / command)
        whole, repeated = load_file(run / "model.safetensors"), load_file(tmp_path / command / "model.safetensors")
        assert all(torch.equal(tensor, repeated[key]) for key, tensor in whole.items())


def test_the_default_is_three_epochs(base: Path, chats: Path, tmp_path: Path,
                                     bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    plan = bardlet("sft", base, chats, *FINE, "--plan", "--out", tmp_path / "run")
    unpacked = bardlet("sft", base, chats, *FINE, "--plan", "--no-pack", "--out", tmp_path / "run")
    rows = 163 - 2 - 16 - 1  # 2 without an answer, 16 held out, one too long
    assert plan["steps"] % 3 == 0 and unpacked["steps"] == 3 * -(-rows // 4)
    assert plan["steps"] < unpacked["steps"] / 2, "packing puts several conversations in a row"
    assert not (tmp_path / "run").exists()


def test_a_run_of_few_steps_is_not_sent_to_a_chat(base: Path, chats: Path, run: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Its completions do not end yet; the command that the end prints trains it longer."""
    out = tmp_path / "out"
    assert main(["sft", str(base), str(chats), *FINE, "--steps", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "end with a stop token; the model does not answer yet, train it longer\n" in said
    assert f"saved to {out}; try `bardlet resume {out} --steps 200 --allow-change`" in said
    _, record = run_folder.read_run(run)
    stage = SFT.__new__(SFT)
    for changes, unready in (({}, False), ({"ended": 0.1}, True), ({"ended": 0.1, "saved": 200}, False)):
        stage.record = ConversationsRecord.of(record | changes)
        assert stage.unready() == unready


def test_user_errors_are_one_line(base: Path, chats: Path, run: Path, capsys: pytest.CaptureFixture[str],
                                  tmp_path: Path) -> None:  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("abc " * 500, encoding="utf-8")
    long = tmp_path / "long.jsonl"
    record = {"instruction": "x" * 900, "output": "y"}
    long.write_text((json.dumps(record) + "\n") * 30, encoding="utf-8")
    capsys.readouterr()
    for arguments, message in (
        ([], "name the model"), ([str(base)], "no training data"), ([str(tmp_path / "x"), str(chats)], "x"),
        ([str(base), str(text)], "is not JSON"),
        ([str(base), str(long)], "no conversation has a completion that ends within the context window of 48 tokens"),
        ([str(base), str(chats), "--pair", "de-en"], "--pair"), ([str(base), str(chats), "--prefix-lm"], "--prefix-lm"),
    ):
        assert main(["sft", *arguments, "--out", str(tmp_path / "never")]) != 0
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("bardlet: ") and message in error, error
        assert not (tmp_path / "never").exists()
