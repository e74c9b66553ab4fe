from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from processes import power_cut
from safetensors.torch import load_file

from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TranslationConfig
from bardlet.config.toml import read_toml
from bardlet.data import bitext, bitext_batches
from bardlet.errors import BardletError
from bardlet.evaluation.metrics import translation_score
from bardlet.inference import decoders, generate, translate
from bardlet.inference.translate import TranslateOptions
from bardlet.models.gpt2 import GPT2
from bardlet.models.qwen3 import Qwen3
from bardlet.planning import calibrate, memory
from bardlet.planning.plan import Machine, PairStatistics, plan_pairs
from bardlet.run import hf, plots
from bardlet.runtime import threads as runtime_threads
from bardlet.training import losses as loss

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--batch-tokens", "128",
        "--log-every", "1", "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off", "--vocab-size",
        "300"]
"""Settings of a translator that trains in milliseconds."""
WORDS = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words like `--source F --target F`: numbers in words, and in digits."""
    folder = tmp_path_factory.mktemp("numbers")
    digits = [str(10_000_000 + 7919 * n * n % 1_000_000) for n in range(400)]
    (folder / "words").write_text("".join(" ".join(WORDS[int(d)] for d in n) + "\n" for n in digits), encoding="utf-8")
    (folder / "digits").write_text("".join(" ".join(n) + "\n" for n in digits), encoding="utf-8")
    return ["--source", str(folder / "words"), "--target", str(folder / "digits")]


@pytest.fixture(scope="module")
def run(numbers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned a little of it."""
    out = tmp_path_factory.mktemp("run") / "encdec"
    assert main(["train", *numbers, *TINY, "--steps", "60", "--dropout", "0.1", "--label-smoothing", "0.1",
                 "--save-every", "20", "--eval-every", "30", "--out", str(out), "--debug"]) == 0  # fmt: skip
    return out


# ---------------------------------------------------------------- training


def test_a_run_is_a_folder_that_transformers_loads(run: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    theirs, words = AutoModelForSeq2SeqLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    line = "sieben acht neun"
    made = theirs.generate(**words(line, return_tensors="pt"), do_sample=False, max_new_tokens=20)
    ours, own = hf.read_folder(run)
    assert translate.translate_lines(ours, own, [line]) == [words.decode(made[0], skip_special_tokens=True).strip()]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "BLEU" in card and "AutoModelForSeq2SeqLM" in card
    row = next(line for line in card.splitlines() if line.startswith("| sacreBLEU's signature"))
    assert row.replace("\\|", "").count("|") == 3  # two cells: its own bars are escaped
    code = card.split("```python\n")[1].split("```")[0].replace("a line", line)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run.parent)
    assert translate.translate_lines(ours, own, [line])[0] in " ".join(said.stdout.split()), said.stderr
    assert "batch_tokens" in (run / "run.toml").read_text() and "batch_size" not in (run / "run.toml").read_text()


def test_it_learns(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Six seeds on each of two classes: BLEU 96.6 at least."""
    done = bardlet("train", *numbers, *TINY, "--steps", 300, "--out", tmp_path / "run", "--eval-every", 0)
    assert done["bleu"] > 90


def test_a_run_goes_on_bit_for_bit(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    words = [*numbers, *TINY, "--dropout", "0.1", "--label-smoothing", "0.1", "--save-every", "7"]
    bardlet("train", *words, "--steps", 20, "--out", tmp_path / "whole")
    # the same run, as a kill after step 7 would leave it
    bardlet("train", *words, "--steps", 20, "--out", tmp_path / "parts", "--keep-checkpoints", "9")
    import shutil

    for step in (14, 20):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{step:08}")
    done = bardlet("resume", tmp_path / "parts", "--allow-change")
    assert done["resumed_from"] == 7
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    again = bardlet("train", "--config", tmp_path / "whole" / "run.toml", "--out", tmp_path / "again")
    assert again["val_loss"] == done["val_loss"]


def test_a_run_that_was_never_saved_begins_again_as_it_was(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                                           tmp_path: Path) -> None:  # fmt: skip
    """With its own settings, and not with those of the recipe for pairs."""
    words = [*numbers, *TINY, "--steps", 6, "--save-every", 3, "--lr", "1e-3", "--muon-lr", "1e-2", "--label-smoothing",
             "0"]  # fmt: skip
    bardlet("train", *words, "--out", tmp_path / "whole")
    power_cut(["train", *map(str, words), "--out", tmp_path / "again"], step=2)
    bardlet("resume", tmp_path / "again")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_micro_batches_change_nothing(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                      tmp_path: Path) -> None:  # fmt: skip
    for model in ("encdec", "gpt2"):
        losses = [bardlet("train", *numbers, *TINY, "--model", model, "--steps", 6, "--batch-tokens", tokens,
                          "--grad-accum", pieces, "--out", tmp_path / f"{model}{pieces}")["val_loss"]
                  for tokens, pieces in ((240, 1), (80, 3), (40, 6))]  # fmt: skip
        assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)  # Muon and AdamW turn rounding into signs


def test_a_step_is_cut_to_the_memory(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    words = [*numbers, *TINY, "--batch-tokens", "1920", "--steps", "4"]
    whole = bardlet("train", *words, "--out", tmp_path / "whole")
    monkeypatch.setattr(memory, "LATER", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000_000)
    cut = bardlet("train", *words, "--out", tmp_path / "cut")
    config, _ = read_toml(tmp_path / "cut" / "run.toml")
    assert config.grad_accum > 1 and config.batch_tokens * config.grad_accum == 1920
    assert cut["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_more_minutes_choose_a_larger_model(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ein hund rennt durch den wald .\n" * 20_000, encoding="utf-8")
    (tmp_path / "b").write_text("a dog runs through the woods .\n" * 20_000, encoding="utf-8")
    config = TranslationConfig(source=str(tmp_path / "a"), target=str(tmp_path / "b"))
    ready = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    speed = calibrate.Speed(((1e6, 1e-5), (1e8, 1e-3)))
    source, target = (float(side.lengths.sum()) for side in ready.train)
    pairs = PairStatistics(source, target, ready.tokenizer.vocab_size)
    sizes = []
    for seconds in (10, 100, 1000, 10_000):
        chosen = plan_pairs(pairs, Machine(seconds, speed), config)
        alone = plan_pairs(pairs, Machine(seconds, speed), replace(config, model="gpt2"))
        sizes.append(calibrate.weights(chosen.config))
        assert 0.5 < calibrate.weights(alone.config) / sizes[-1] < 1.5
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] <= 15 * ready.train[1].lengths.sum()
    small = plan_pairs(pairs, Machine(10_000, speed, most_parameters=sizes[0]), config)
    assert calibrate.weights(small.config) <= sizes[0], "what the memory can take"
    kept = plan_pairs(pairs, Machine(1000, speed), replace(config, n_embd=64, dropout=0.4)).config
    assert (kept.n_embd, kept.dropout) == (64, 0.4)
    deep = plan_pairs(pairs, Machine(1000, speed), replace(config, n_encoder_layer=5)).config
    assert deep.n_encoder_layer == 5


def test_pairs_are_learned_by_an_encoder_decoder_unless_somebody_says_so(tmp_path: Path) -> None:
    from bardlet.cli.train import read

    (tmp_path / "pairs.toml").write_text('pair = "de-en"\n', encoding="utf-8")
    (tmp_path / "gpt2.toml").write_text('pair = "de-en"\nmodel = "gpt2"\n', encoding="utf-8")
    for words, model in (
        ("--pair de-en", "encdec"), ("multi30k", "encdec"), ("--source=a --target=b", "encdec"),
        ("--pair de-en --model gpt2 --prefix-lm", "gpt2"), (f"--config {tmp_path / 'pairs.toml'}", "encdec"),
        (f"--config {tmp_path / 'gpt2.toml'}", "gpt2"), ("my.txt --out multi30k", "qwen3"), ("my.txt", "qwen3"),
    ):
        assert read(words.split()).model == model, words


@pytest.mark.parametrize("how", [["--model", "qwen3"], ["--model", "gpt2", "--prefix-lm"]], ids=" ".join)
def test_a_decoder_alone_learns_it_too(how: list[str], numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                       tmp_path: Path) -> None:  # fmt: skip
    """Six seeds on each of two classes: BLEU 57 at least."""
    done = bardlet("train", *numbers, *TINY, *how, "--n-layer", 2, "--steps", 300, "--out", tmp_path / "run",
                   "--eval-every", 0)  # fmt: skip
    assert done["bleu"] > 40
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert ("AutoModelForCausalLM" in card) != ("--prefix-lm" in how)  # transformers has no such mask
    assert bardlet("eval", tmp_path / "run")["bleu"] == pytest.approx(done["bleu"], abs=0.01)


def test_minutes_work(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path, clock: Clock) -> None:
    clock.per_step, begun = 0.06, clock.now
    done = bardlet("train", *numbers, "--minutes", "0.02", "--compile", "off", "--out", tmp_path / "run")
    assert done["steps"] > 10 and "bleu" in done
    assert 0.8 * 1.2 < clock.now - begun <= 1.2, "seconds"


# ---------------------------------------------------------------- losses and masks


def test_the_loss_is_that_of_the_targets_alone() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelConfig("gpt2", vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16, n_inner=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    idx = torch.randint(11, (3, 8))
    target = torch.randint(11, (3, 8))
    target[:, :3] = loss.IGNORE
    target[2] = loss.IGNORE
    batch = {"idx": idx, "target": target, "prefix": torch.tensor([4, 4, 4])}
    logits = model(idx).flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, target.flatten(), ignore_index=loss.IGNORE, reduction="sum")
    torch.testing.assert_close(loss.translation_loss(model, batch), want)
    rows = logits[target.flatten() != loss.IGNORE].log_softmax(-1)
    kept = target[target != loss.IGNORE]
    smoothed = -(0.9 * rows.gather(1, kept[:, None])[:, 0] + 0.1 * rows.mean(-1)).sum()
    torch.testing.assert_close(loss.translation_loss(model, batch, smoothing=0.1), smoothed)
    assert not torch.allclose(loss.translation_loss(model, batch, prefix=True), want)
    batch["prefix"] = torch.ones_like(batch["prefix"])  # a first token sees itself in any case
    torch.testing.assert_close(loss.translation_loss(model, batch, prefix=True), want)
    gradients = []
    for prefix in (True, False):
        model.zero_grad()
        loss.translation_loss(model, batch, prefix=prefix).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", [GPT2, Qwen3])
@pytest.mark.parametrize("prefix_lm", [False, True])
@torch.no_grad()
def test_a_prompted_reader_is_the_model_itself(family: Any, prefix_lm: bool) -> None:
    from bardlet.inference import beam_search

    torch.manual_seed(0)
    name = "gpt2" if family is GPT2 else "qwen3"
    model = family(ModelConfig(name, vocab_size=29, block_size=96, n_layer=2, n_head=2, n_kv_head=2, n_embd=32,
                               head_dim=16, n_inner=48, activation="gelu" if family is GPT2 else "silu")).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    sources = [[5, 9, 3, 0], [7, 0], [11, 12, 13, 14, 15, 16, 0]]
    made = translate.translate(model, sources, 0, 1, TranslateOptions(prefix_lm=prefix_lm))
    for source, tokens in zip(sources, made, strict=True):
        prefix = torch.tensor([len(source)]) if prefix_lm else None
        for n, token in enumerate([*tokens, 0] if len(tokens) < 2 * len(source) + 20 else tokens):
            logits = model(torch.tensor([source + tokens[:n]]), prefix_B=prefix)[0, -1]
            assert int(logits.argmax()) == token
    most = [2 * len(source) + 20 for source in sources]
    reader = translate.PrefixReader(model, decoders.decoder(model), sources, max(most), prefix_lm)
    assert beam_search.beam(reader, 0, most, 1) == made
    together = translate.translate(model, sources, 0, 1, TranslateOptions(beams=3, prefix_lm=prefix_lm))
    for source, tokens in zip(sources, together, strict=True):
        assert translate.translate(model, [source], 0, 1, TranslateOptions(beams=3, prefix_lm=prefix_lm)) == [tokens]
    assert generate.generate(model, sources, 3, temperature=0)  # the model is as it was


# ---------------------------------------------------------------- commands


def piped(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Have standard input give these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def translated(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str], str]:
    """(exit code, lines of standard output, standard error) of `bardlet translate`."""
    code = main(["translate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out.split("\n")[:-1], said.err


def test_lines_come_out_in_their_order(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    lines = ["eins zwei drei", "", "vier", "  ", "neun " * 9, "null", "eins zwei drei"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, _ = translated(capsys, run, tmp_path / "in.txt", "--batch-size", "2")
    assert code == 0 and len(out) == len(lines) and out[1] == out[3] == "" and out[0] == out[6] != ""
    piped(monkeypatch, "\n".join(lines).encode())
    assert translated(capsys, run)[:2] == (0, out)
    for number, line in enumerate(lines):
        (tmp_path / "one.txt").write_text(line + "\n", encoding="utf-8")
        assert translated(capsys, run, tmp_path / "one.txt")[:2] == (0, [out[number]])
    piped(monkeypatch, "\n".join(lines).encode())
    assert main(["translate", str(run), "--beam", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["translations"]) == len(lines)


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_side_by_side_are_batches_in_turn(run: Path, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = hf.read_folder(run)
    given = [" ".join(WORDS[i * k % 10] for k in range(1, 2 + i % 7)) for i in range(30)]
    how = TranslateOptions(beams=beams, batch_size=4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        side_by_side = translate.translate_lines(model, tokenizer, given, how)
        assert len({len(line) for line in side_by_side}) > 3  # they end at different places, and by themselves
        assert max(len(tokenizer.encode(line)) for line in side_by_side) < model.config.block_size - 1
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(translate, "THREADS", 1)
        assert translate.translate_lines(model.train(), tokenizer, given, how) == side_by_side  # in eval mode meanwhile
        assert model.training
        assert translate.translate_lines(model, tokenizer, given, replace(how, batch_size=1)) == side_by_side
    finally:
        torch.set_num_threads(threads)


def test_work_side_by_side_shares_the_cores() -> None:
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    together = threading.Barrier(2, timeout=600)  # two at a time, or this fails

    def work(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads()

    def fails(item: int) -> int:
        raise BardletError(f"item {item}")

    try:
        torch.set_num_threads(4)
        assert list(runtime_threads.run_in_threads(work, [5, 6], cpu)) == [(5, 2), (6, 2)]
        torch.set_num_threads(3)
        assert sorted(n for _, n in runtime_threads.run_in_threads(work, [5, 6], cpu)) == [1, 2]
        torch.set_num_threads(4)
        with pytest.raises(BardletError, match="item 5"):
            list(runtime_threads.run_in_threads(fails, [5, 6, 7], cpu))
        for _ in runtime_threads.run_in_threads(lambda item: item, range(9), cpu):
            break
        made: list[int] = []
        later = threading.Thread(target=lambda: made.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 4 and made == [4]  # of a thread made later, too
    finally:
        torch.set_num_threads(threads)


def test_bad_input_is_one_line_or_a_translation(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    strange = ["新年快乐", "\u202ertl", "a\u2028b\x85c", "\U0001f600 \ud7ff", "word " * 10_000, "x" * 50_000, "\ufffd"]
    piped(monkeypatch, "\n".join(strange).encode())
    code, out, err = translated(capsys, run)
    assert code == 0 and len(out) == len(strange)
    assert "only its beginning is translated" in err
    for raw, what in ((b"", "standard input is empty"), (b"eins\n\xff\n", "byte 5 (line 2)"), (b"a\0b\n", "NUL")):
        piped(monkeypatch, raw)
        code, out, err = translated(capsys, run)
        assert code == 1 and what in err and err.count("\n") == 1
    for words, what in ((("--beam", "0"), "--beam 0"), (("--beam", "400"), "--beam 400"),
                        ((tmp_path / "no",), "no such"), (("--batch-size", "0"), "--batch-size 0")):  # fmt: skip
        piped(monkeypatch, b"eins\n")
        code, _, err = translated(capsys, run, *words)
        assert code == 1 and what in err and err.count("\n") == 1


def test_a_language_model_does_not_translate(text: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    bardlet("train", text, "--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 8, "--steps", 1, "--compile",
            "off", "--out", tmp_path / "lm")  # fmt: skip
    code, _, err = translated(capsys, tmp_path / "lm")
    assert code == 1 and "was not trained to translate" in err


def test_a_translator_does_not_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run)]) == 1
    assert "bardlet translate" in capsys.readouterr().err


@pytest.mark.parametrize("words, what", [
    (["--model", "encdec"], "name its pairs"), (["--pair", "de"], "write from-to"), (["multi30k"], "--pair de-en"),
    (["--source", "x"], "belong together"), (["--pair", "de-en", "--batch-size", "3"], "--batch-tokens"),
    (["--label-smoothing", "0.1"], "is for translation"), (["--pair", "de-en", "--tokenizer", "char"], "bpe"),
    (["--pair", "de-en", "--prefix-lm"], "both ways already"), (["--pair", "de-en", "--model", "bigram"], "rung"),
    (["--pair", "de-en", "--model", "gpt2", "--n-encoder-layer", "2"], "no encoder"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_one_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str],
                                                  tmp_path: Path) -> None:  # fmt: skip
    assert main(["train", *words, "--steps", "1", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert what in err and err.count("\n") == 1


def test_files_that_do_not_belong_together_are_not_learned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("eins\nzwei\n", encoding="utf-8")
    (tmp_path / "b").write_text("one\ntwo\nthree\n", encoding="utf-8")
    for target, what in (("b", "2 lines"), ("c", "no such file"), (".", "folder")):
        assert main(["train", "--source", str(tmp_path / "a"), "--target", str(tmp_path / target), "--steps", "1",
                     "--out", str(tmp_path / "run")]) == 1  # fmt: skip
        err = capsys.readouterr().err
        assert what in err.lower() and err.count("\n") == 1, err


def test_eval_gives_bleu_and_chrf_with_their_signatures(run: Path, numbers: list[str],
                                                        bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    held, given = bardlet("eval", run), bardlet("eval", run, *numbers, "--beam", 2)
    assert held["lines"] == 40 and given["lines"] == 400
    assert "tok:13a" in held["bleu_signature"] and held["chrf_signature"].startswith("nrefs:1")
    assert main(["eval", str(run), "--context", "8"]) == 1
    record = (run / "run.toml").read_text(encoding="utf-8")
    assert f"bleu = {round(held['bleu'], 2)}" in record


def test_scores_are_sacrebleus() -> None:
    import sacrebleu

    made, want = ["The cat sat on a mat .", "it rains"], ["the cat sat on the mat .", "It rains today"]
    for lowercase in (False, True):
        score = translation_score(made, want, lowercase)
        assert score.bleu == sacrebleu.corpus_bleu(made, [want], lowercase=lowercase).score
        assert f"case:{'lc' if lowercase else 'mixed'}" in score.bleu_signature
    assert translation_score(want, want).bleu == pytest.approx(100)


def test_the_attention_of_a_sentence_is_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    piped(monkeypatch, b"\neins $zwei$ drei\n")
    code, out, err = translated(capsys, run, "--attention", tmp_path / "map.png")
    assert code == 0 and len(out) == 2 and "map.png" in err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    for name, what in (("map.gif", "PNG"), ("nowhere/map.png", "nowhere")):
        piped(monkeypatch, b"eins\n")
        code, _, err = translated(capsys, run, "--attention", tmp_path / name)
        assert code == 1 and what in err.splitlines()[-1]
    monkeypatch.setattr(plots, "MOST_PIXELS", 10_000)
    piped(monkeypatch, b"eins\n")
    code, out, err = translated(capsys, run, "--attention", tmp_path / "map.png")
    assert code == 1 and len(out) == 1 and "shorter first line" in err.splitlines()[-1]


def test_a_person_is_answered_line_by_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a terminal each line is translated before the next one is read."""
    asked: list[str] = []

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

        def __next__(self) -> bytes:
            asked.append("line")
            return super().__next__()

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Terminal(b"eins\nzwei\n")))
    monkeypatch.setattr("bardlet.console.say", lambda text: asked.append(text))
    assert main(["translate", str(run)]) == 0
    assert [said == "line" for said in asked] == [True, False, True, False, True]


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE")
def test_a_reader_that_leaves_is_no_complaint(run: Path) -> None:
    command = [sys.executable, "-m", "bardlet", "translate", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"eins zwei\n" * 10)
        process.stdin.close()
        assert process.wait(600) == 141 and process.stderr.read() == b""  # as of a process that SIGPIPE ended
