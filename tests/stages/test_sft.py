"""A base learns to answer: the folder, the same run twice, and what people get wrong."""

from __future__ import annotations

import json
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
    """Numbers by their names; one question is too long for the window, one record has no answer."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    numbers = [(n + n // 10) % 10 for n in range(150)]
    made: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": NAMES[n]},
                                                {"role": "assistant", "content": str(n)}]} for n in numbers]
    made.append({"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]})
    made.append({"messages": [{"role": "user", "content": "and?"}]})
    made.append({"instruction": "drei", "input": "", "output": "3"})
    made[39:39] = [{"messages": [{"role": "user", "content": "and?"}]}]  # the fourth that is held out
    made += [{"instruction": "acht", "input": "", "output": "8"}] * 9
    path.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    assert main(["sft", str(base), str(chats), *FINE, "--steps", "150", "--lr", "5e-3", "--muon-lr", "5e-2",
                 "--out", str(out), "--debug"]) == 0  # fmt: skip
    return out


def test_it_learns_to_answer_and_to_end(run: Path) -> None:
    """Six seeds on each of two classes ended at 0.0192 nats at most, from 5.80, and all answers ended."""
    record = run_folder.settings(run)[1]
    assert record["val_loss"] < 0.5 * record["val_loss_before"]
    assert (record["cut"], record["left_out"], record["unanswered"]) == (0, 1, 1)
    assert record["ended"] == 1.0
    model, tokenizer = hf.read_folder(run)
    asked = [chat_template.encode(tokenizer, [{"role": "user", "content": name}], ask=True)[0] for name in NAMES]
    answers = inference_answers.generate_answers(model, tokenizer, asked, 10)
    assert all(ended for _, ended in answers)
    assert sum(text == str(n) for n, (text, _) in enumerate(answers)) >= 8


def test_the_folder_is_a_chat_model_of_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, own_words = hf.read_folder(run)
    messages = [{"role": "user", "content": "sieben"}]
    ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    own = chat_template.encode(own_words, messages, ask=True)[0]
    assert ids["input_ids"][0].tolist() == own.tolist()
    torch.testing.assert_close(model(**ids).logits, ours(torch.from_numpy(own)[None]), rtol=1e-5, atol=1e-5)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, len(own) :]
    [(text, ended)] = inference_answers.generate_answers(ours, own_words, [own], 12)
    assert ended and int(written[-1]) == chat_template.special_id(own_words, "end")  # it stops by itself there, too
    assert words.decode(written, skip_special_tokens=True).strip() == text
    assert (run / "README.md").read_text(encoding="utf-8").count("held-out") >= 3


def test_eval_and_doctor_know_the_run(run: Path, bardlet: Callable[..., dict[str, Any]],
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    record = run_folder.settings(run)[1]
    measured = bardlet("eval", run)
    assert measured["loss"] == pytest.approx(record["val_loss"], abs=1e-5)
    assert measured["tokens"] == record["val_tokens_of"]
    assert main(["eval", str(run), "--context", "8"]) == 1
    assert "this run learned conversations" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0
    assert "the one that the run began with" in capsys.readouterr().out
    assert main(["doctor", str(run), "--memorised"]) == 1


@pytest.mark.parametrize("settings", [["--dropout", "0.1", "--grad-accum", "2"], ["--no-pack", "--keep", "average"]])
def test_a_run_goes_on_bit_for_bit(base: Path, chats: Path, settings: list[str], bardlet: Callable[..., dict[str, Any]],
                                   tmp_path: Path) -> None:  # fmt: skip
    """Its process ends at step 7; resumed it goes on from the checkpoint of step 5, and has not begun again."""
    words = ["sft", str(base), str(chats), *FINE, *settings, "--steps", "12", "--save-every", "5"]
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 12)


def test_a_run_is_repeated_from_its_run_toml(run: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for command in ("sft", "train"):
        bardlet(command, "--config", run / "run.toml", "--out", tmp_path / command)
        whole, again = load_file(run / "model.safetensors"), load_file(tmp_path / command / "model.safetensors")
        assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_without_steps_and_minutes_it_is_three_times_all(base: Path, chats: Path, tmp_path: Path,
                                                         bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    plan = bardlet("sft", base, chats, *FINE, "--plan", "--out", tmp_path / "run")
    one = bardlet("sft", base, chats, *FINE, "--plan", "--no-pack", "--out", tmp_path / "run")
    assert plan["steps"] % 3 == 0 and one["steps"] == 3 * -(-(163 - 16 - 2) // 4)  # 16 held out, 2 without an answer
    assert plan["steps"] < one["steps"] / 2, "a row holds several"
    assert not (tmp_path / "run").exists()


def test_what_people_get_wrong_is_one_line(base: Path, chats: Path, run: Path, capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    letters = tmp_path / "letters"
    text = tmp_path / "text.txt"
    text.write_text("abc " * 500, encoding="utf-8")
    assert main(["train", str(text), *TINY, "--tokenizer", "char", "--steps", "2", "--out", str(letters)]) == 0
    long = tmp_path / "long.jsonl"
    record = {"instruction": "x" * 900, "output": "y"}
    long.write_text((json.dumps(record) + "\n") * 30, encoding="utf-8")
    capsys.readouterr()
    for words, what in (
        ([], "name the model"), ([str(base)], "nothing to learn from"), ([str(tmp_path / "x"), str(chats)], "x"),
        ([str(letters), str(chats)], "no token <|system|>"), ([str(base), str(text)], "is not JSON"),
        ([str(base), str(long)], "no conversation has an answer that ends within the window of 48 tokens"),
        ([str(base), str(chats), "--pair", "de-en"], "--pair"), ([str(base), str(chats), "--prefix-lm"], "--prefix-lm"),
    ):
        assert main(["sft", *words, "--out", str(tmp_path / "never")]) != 0
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("bardlet: ") and what in said, said
        assert not (tmp_path / "never").exists()
