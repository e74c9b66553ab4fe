"""Translation: training, losses and masks, the translate command, and error messages."""

from __future__ import annotations

import io
import json
import os
import re
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
from bardlet.models.llama import Llama
from bardlet.planning import calibrate, memory
from bardlet.planning.plan import Machine, PairStatistics, plan_pairs
from bardlet.run import hf, plots
from bardlet.runtime import threads as runtime_threads
from bardlet.training import losses

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--batch-tokens", "128",
        "--log-every", "1", "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off", "--vocab-size",
        "300"]
"""Settings of a translator that trains in milliseconds."""
WORDS = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments `--source F --target F`: numbers as German words, and as digits."""
    folder = tmp_path_factory.mktemp("numbers")
    digits = [str(10_000_000 + 7919 * n * n % 1_000_000) for n in range(400)]
    (folder / "words").write_text("".join(" ".join(WORDS[int(d)] for d in n) + "\n" for n in digits), encoding="utf-8")
    (folder / "digits").write_text("".join(" ".join(n) + "\n" for n in digits), encoding="utf-8")
    return ["--source", str(folder / "words"), "--target", str(folder / "digits")]


@pytest.fixture(scope="module")
def run(numbers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for a few steps."""
    out = tmp_path_factory.mktemp("run") / "encdec"
    assert main(["train", *numbers, *TINY, "--steps", "60", "--dropout", "0.1", "--label-smoothing", "0.1",
                 "--save-every", "20", "--eval-every", "30", "--out", str(out), "--debug"]) == 0  # fmt: skip
    return out


# ---------------------------------------------------------------- training


def test_transformers_loads_the_run(run: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    theirs, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    line = "sieben acht neun"
    translated = theirs.generate(**tokenizer(line, return_tensors="pt"), do_sample=False, max_new_tokens=20)
    ours, our_tokenizer = hf.read_folder(run)
    expected = tokenizer.decode(translated[0], skip_special_tokens=True).strip()
    assert translate.translate_lines(ours, our_tokenizer, [line]) == [expected]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "BLEU" in card and "AutoModelForSeq2SeqLM" in card
    row = next(line for line in card.splitlines() if line.startswith("| sacreBLEU signature"))
    assert row.replace("\\|", "").count("|") == 3  # two cells, since the signature's bars are escaped
    code = card.split("```python\n")[1].split("```")[0].replace("a line", line).replace("path/to/", "")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run.parent)
    assert translate.translate_lines(ours, our_tokenizer, [line])[0] in " ".join(output.stdout.split()), output.stderr
    assert "batch_tokens" in (run / "run.toml").read_text() and "batch_size" not in (run / "run.toml").read_text()


def test_it_learns_to_translate(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Six seeds on each of two machine classes: BLEU at least 96.6."""
    done = bardlet("train", *numbers, *TINY, "--steps", 300, "--out", tmp_path / "run", "--eval-every", 0)
    assert done["bleu"] > 90


def test_resume_and_repeat_are_bit_exact(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                         tmp_path: Path) -> None:  # fmt: skip
    options = [*numbers, *TINY, "--dropout", "0.1", "--label-smoothing", "0.1", "--save-every", "7"]
    bardlet("train", *options, "--steps", 20, "--out", tmp_path / "whole")
    # the same run, in the state after a kill at step 7
    bardlet("train", *options, "--steps", 20, "--out", tmp_path / "resumed", "--keep-checkpoints", "9")
    import shutil

    for step in (14, 20):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step:08}")
    done = bardlet("resume", tmp_path / "resumed", "--allow-change")
    assert done["resumed_from"] == 7
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    repeated = bardlet("train", "--config", tmp_path / "whole" / "run.toml", "--out", tmp_path / "repeated")
    assert repeated["val_loss"] == done["val_loss"]


def test_a_run_without_a_checkpoint_restarts(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                             tmp_path: Path) -> None:  # fmt: skip
    """It restarts with its own settings, not with the defaults for pairs."""
    options = [*numbers, *TINY, "--steps", 6, "--save-every", 3, "--lr", "1e-3", "--muon-lr", "1e-2",
               "--label-smoothing", "0"]  # fmt: skip
    bardlet("train", *options, "--out", tmp_path / "whole")
    power_cut(["train", *map(str, options), "--out", tmp_path / "restarted"], step=2)
    bardlet("resume", tmp_path / "restarted")
    whole, restarted = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "restarted"))
    assert all(torch.equal(tensor, restarted[name]) for name, tensor in whole.items())


def test_micro_batches_change_nothing(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                      tmp_path: Path) -> None:  # fmt: skip
    for model in ("encdec", "gpt2"):
        values = [bardlet("train", *numbers, *TINY, "--model", model, "--steps", 6, "--batch-tokens", tokens,
                          "--grad-accum", micro_batches, "--out", tmp_path / f"{model}{micro_batches}")["val_loss"]
                  for tokens, micro_batches in ((240, 1), (80, 3), (40, 6))]  # fmt: skip
        assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-4)  # Muon and AdamW amplify rounding errors


def test_micro_batches_shrink_to_fit_into_memory(numbers: list[str], bardlet: Callable[..., dict[str, Any]],
                                                 tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    options = [*numbers, *TINY, "--batch-tokens", "1920", "--steps", "4"]
    whole = bardlet("train", *options, "--out", tmp_path / "whole")
    monkeypatch.setattr(memory, "LATER", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000_000)
    split = bardlet("train", *options, "--out", tmp_path / "split")
    config, _ = read_toml(tmp_path / "split" / "run.toml")
    assert config.grad_accum > 1 and config.batch_tokens * config.grad_accum == 1920
    assert split["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_more_time_plans_a_larger_model(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ein hund rennt durch den wald .\n" * 20_000, encoding="utf-8")
    (tmp_path / "b").write_text("a dog runs through the woods .\n" * 20_000, encoding="utf-8")
    config = TranslationConfig(source=str(tmp_path / "a"), target=str(tmp_path / "b"))
    dataset = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    speed = calibrate.Speed(((1e6, 1e-5), (1e8, 1e-3)))
    source, target = (float(side.lengths.sum()) for side in dataset.train)
    pairs = PairStatistics(source, target, dataset.tokenizer.vocab_size)
    sizes = []
    for seconds in (10, 100, 1000, 10_000):
        plan = plan_pairs(pairs, Machine(seconds, speed), config)
        decoder_only = plan_pairs(pairs, Machine(seconds, speed), replace(config, model="gpt2"))
        sizes.append(calibrate.block_weights(plan.config))
        assert not re.search("epochs|blocks|per weight", " ".join(plan.reasons)), "the plan line has the epochs"
        assert 0.5 < calibrate.block_weights(decoder_only.config) / sizes[-1] < 1.5
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] <= 15 * dataset.train[1].lengths.sum()
    small = plan_pairs(pairs, Machine(10_000, speed, max_parameters=sizes[0]), config)
    assert calibrate.block_weights(small.config) <= sizes[0], "limited by memory"
    partly_set = plan_pairs(pairs, Machine(1000, speed), replace(config, n_embd=64, dropout=0.4)).config
    assert (partly_set.n_embd, partly_set.dropout) == (64, 0.4)
    deep = plan_pairs(pairs, Machine(1000, speed), replace(config, n_encoder_layer=5)).config
    assert deep.n_encoder_layer == 5


def test_pairs_select_an_encoder_decoder_by_default(tmp_path: Path) -> None:
    from bardlet.cli.train import read

    (tmp_path / "pairs.toml").write_text('pair = "de-en"\n', encoding="utf-8")
    (tmp_path / "gpt2.toml").write_text('pair = "de-en"\nmodel = "gpt2"\n', encoding="utf-8")
    for arguments, model in (
        ("--pair de-en", "encdec"), ("multi30k", "encdec"), ("--source=a --target=b", "encdec"),
        ("--pair de-en --model gpt2 --prefix-lm", "gpt2"), (f"--config {tmp_path / 'pairs.toml'}", "encdec"),
        (f"--config {tmp_path / 'gpt2.toml'}", "gpt2"), ("my.txt --out multi30k", "qwen3"), ("my.txt", "qwen3"),
    ):
        assert read(arguments.split())[1].model == model, arguments


@pytest.mark.parametrize("options", [["--model", "qwen3"], ["--model", "gpt2", "--prefix-lm"]], ids=" ".join)
def test_a_decoder_only_model_translates_too(options: list[str], numbers: list[str], tmp_path: Path,
                                             bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """Six seeds on each of two machine classes: BLEU at least 57."""
    done = bardlet("train", *numbers, *TINY, *options, "--n-layer", 2, "--steps", 300, "--out", tmp_path / "run",
                   "--eval-every", 0)  # fmt: skip
    assert done["bleu"] > 40
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert ("AutoModelForCausalLM" in card) != ("--prefix-lm" in options)  # transformers has no such mask
    assert bardlet("eval", tmp_path / "run")["bleu"] == pytest.approx(done["bleu"], abs=0.01)


def test_a_timed_run_ends_on_time(numbers: list[str], bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                  clock: Clock) -> None:  # fmt: skip
    clock.per_step, started = 0.06, clock.now
    done = bardlet("train", *numbers, "--minutes", "0.02", "--compile", "off", "--out", tmp_path / "run")
    assert done["steps"] > 10 and "bleu" in done
    assert 0.8 * 1.2 < clock.now - started <= 1.2, "seconds"


# ---------------------------------------------------------------- losses and masks


def test_the_loss_covers_the_targets_alone() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelConfig("gpt2", vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16, n_inner=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    idx = torch.randint(11, (3, 8))
    target = torch.randint(11, (3, 8))
    target[:, :3] = losses.IGNORE
    target[2] = losses.IGNORE
    batch = {"idx": idx, "target": target, "prefix": torch.tensor([4, 4, 4])}
    logits = model(idx).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, target.flatten(), ignore_index=losses.IGNORE, reduction="sum")
    torch.testing.assert_close(losses.translation_loss(model, batch), expected)
    logp = logits[target.flatten() != losses.IGNORE].log_softmax(-1)
    kept = target[target != losses.IGNORE]
    smoothed = -(0.9 * logp.gather(1, kept[:, None])[:, 0] + 0.1 * logp.mean(-1)).sum()
    torch.testing.assert_close(losses.translation_loss(model, batch, smoothing=0.1), smoothed)
    assert not torch.allclose(losses.translation_loss(model, batch, prefix=True), expected)
    batch["prefix"] = torch.ones_like(batch["prefix"])  # the first token sees itself in any case
    torch.testing.assert_close(losses.translation_loss(model, batch, prefix=True), expected)
    gradients = []
    for prefix in (True, False):
        model.zero_grad()
        losses.translation_loss(model, batch, prefix=prefix).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", [GPT2, Llama])
@pytest.mark.parametrize("prefix_lm", [False, True])
@torch.no_grad()
def test_the_prefix_reader_matches_the_model(family: Any, prefix_lm: bool) -> None:
    from bardlet.inference import beam_search

    torch.manual_seed(0)
    name = "gpt2" if family is GPT2 else "qwen3"
    model = family(ModelConfig(name, vocab_size=29, block_size=96, n_layer=2, n_head=2, n_kv_head=2, n_embd=32,
                               head_dim=16, n_inner=48, activation="gelu" if family is GPT2 else "silu")).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    sources = [[5, 9, 3, 0], [7, 0], [11, 12, 13, 14, 15, 16, 0]]
    translations = translate.translate(model, sources, 0, 1, TranslateOptions(prefix_lm=prefix_lm))
    for source, tokens in zip(sources, translations, strict=True):
        prefix = torch.tensor([len(source)]) if prefix_lm else None
        for n, token in enumerate([*tokens, 0] if len(tokens) < 2 * len(source) + 20 else tokens):
            logits = model(torch.tensor([source + tokens[:n]]), prefix_B=prefix)[0, -1]
            assert int(logits.argmax()) == token
    max_tokens = [2 * len(source) + 20 for source in sources]
    reader = translate.PrefixReader(model, decoders.decoder(model), sources, max(max_tokens), prefix_lm)
    assert beam_search.beam(reader, 0, max_tokens, 1) == translations
    batched = translate.translate(model, sources, 0, 1, TranslateOptions(beams=3, prefix_lm=prefix_lm))
    for source, tokens in zip(sources, batched, strict=True):
        assert translate.translate(model, [source], 0, 1, TranslateOptions(beams=3, prefix_lm=prefix_lm)) == [tokens]
    assert generate.generate(model, sources, 3, temperature=0)  # the model still works


# ---------------------------------------------------------------- commands


def pipe(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Replace standard input with these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def run_translate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str], str]:
    """Return (exit code, lines of standard output, standard error) of `bardlet translate`."""
    code = main(["translate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out.split("\n")[:-1], printed.err


def test_output_lines_match_input_lines(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    lines = ["eins zwei drei", "", "vier", "  ", "neun " * 9, "null", "eins zwei drei"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, _ = run_translate(capsys, run, tmp_path / "in.txt", "--batch-size", "2")
    assert code == 0 and len(out) == len(lines) and out[1] == out[3] == "" and out[0] == out[6] != ""
    pipe(monkeypatch, "\n".join(lines).encode())
    assert run_translate(capsys, run)[:2] == (0, out)
    for number, line in enumerate(lines):
        (tmp_path / "one.txt").write_text(line + "\n", encoding="utf-8")
        assert run_translate(capsys, run, tmp_path / "one.txt")[:2] == (0, [out[number]])
    pipe(monkeypatch, "\n".join(lines).encode())
    assert main(["translate", str(run), "--beam", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["translations"]) == len(lines)


@pytest.mark.parametrize("beams", [1, 3])
def test_parallel_batches_match_sequential_ones(run: Path, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = hf.read_folder(run)
    sources = [" ".join(WORDS[i * k % 10] for k in range(1, 2 + i % 7)) for i in range(30)]
    options = TranslateOptions(beams=beams, batch_size=4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        parallel = translate.translate_lines(model, tokenizer, sources, options)
        assert len({len(line) for line in parallel}) > 3  # of different lengths, ended by themselves
        assert max(len(tokenizer.encode(line)) for line in parallel) < model.config.block_size - 1
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(translate, "THREADS", 1)
        assert translate.translate_lines(model.train(), tokenizer, sources, options) == parallel
        assert model.training, "its mode is restored"
        assert translate.translate_lines(model, tokenizer, sources, replace(options, batch_size=1)) == parallel
    finally:
        torch.set_num_threads(threads)


def test_parallel_work_shares_the_cores() -> None:
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    barrier = threading.Barrier(2, timeout=600)  # fails unless two run at a time

    def work(item: int) -> tuple[int, int]:
        barrier.wait()
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
        in_new_thread: list[int] = []
        later = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 4 and in_new_thread == [4]  # new threads have all cores, too
    finally:
        torch.set_num_threads(threads)


def test_bad_input_gives_an_error_line_or_a_translation(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    strange = ["新年快乐", "\u202ertl", "a\u2028b\x85c", "\U0001f600 \ud7ff", "word " * 10_000, "x" * 50_000, "\ufffd"]
    pipe(monkeypatch, "\n".join(strange).encode())
    code, out, err = run_translate(capsys, run)
    assert code == 0 and len(out) == len(strange)
    assert "only its beginning is translated" in err
    for raw, message in ((b"", "standard input is empty"), (b"eins\n\xff\n", "byte 5 (line 2)"), (b"a\0b\n", "NUL")):
        pipe(monkeypatch, raw)
        code, out, err = run_translate(capsys, run)
        assert code == 1 and message in err and err.count("\n") == 1
    for arguments, message in ((("--beam", "0"), "--beam 0"), (("--beam", "400"), "--beam 400"),
                               ((tmp_path / "no",), "no such"), (("--batch-size", "0"), "--batch-size 0")):  # fmt: skip
        pipe(monkeypatch, b"eins\n")
        code, _, err = run_translate(capsys, run, *arguments)
        assert code == 1 and message in err and err.count("\n") == 1


def test_a_language_model_cannot_translate(text: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    bardlet("train", text, "--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 8, "--steps", 1, "--compile",
            "off", "--out", tmp_path / "lm")  # fmt: skip
    code, _, err = run_translate(capsys, tmp_path / "lm")
    assert code == 1 and "was not trained to translate" in err


def test_a_translation_model_cannot_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run)]) == 1
    assert "bardlet translate" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--model", "encdec"], "name sentence pairs"), (["--pair", "de"], "write source-target"),
    (["multi30k"], "--pair de-en"), (["--source", "x"], "go together"),
    (["--pair", "de-en", "--batch-size", "3"], "--batch-tokens"),
    (["--label-smoothing", "0.1"], "is a setting of translation"), (["--pair", "de-en", "--tokenizer", "char"], "bpe"),
    (["--pair", "de-en", "--prefix-lm"], "bidirectional already"), (["--pair", "de-en", "--model", "bigram"], "rung"),
    (["--pair", "de-en", "--model", "gpt2", "--n-encoder-layer", "2"], "no encoder"),
])  # fmt: skip
def test_bad_settings_are_a_one_line_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    assert main(["train", *arguments, "--steps", "1", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_files_that_do_not_match_are_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("eins\nzwei\n", encoding="utf-8")
    (tmp_path / "b").write_text("one\ntwo\nthree\n", encoding="utf-8")
    for target, message in (("b", "2 lines"), ("c", "no such file"), (".", "folder")):
        assert main(["train", "--source", str(tmp_path / "a"), "--target", str(tmp_path / target), "--steps", "1",
                     "--out", str(tmp_path / "run")]) == 1  # fmt: skip
        err = capsys.readouterr().err
        assert message in err.lower() and err.count("\n") == 1, err


def test_eval_reports_bleu_and_chrf_with_signatures(run: Path, numbers: list[str],
                                                    bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    held_out, named = bardlet("eval", run), bardlet("eval", run, *numbers, "--beam", 2)
    assert held_out["lines"] == 40 and named["lines"] == 400
    assert "tok:13a" in held_out["bleu_signature"] and held_out["chrf_signature"].startswith("nrefs:1")
    assert main(["eval", str(run), "--context", "8"]) == 1
    record = (run / "run.toml").read_text(encoding="utf-8")
    assert f"bleu = {round(held_out['bleu'], 2)}" in record


def test_scores_match_sacrebleu() -> None:
    import sacrebleu

    translations, references = ["The cat sat on a mat .", "it rains"], ["the cat sat on the mat .", "It rains today"]
    for lowercase in (False, True):
        score = translation_score(translations, references, lowercase)
        assert score.bleu == sacrebleu.corpus_bleu(translations, [references], lowercase=lowercase).score
        assert f"case:{'lc' if lowercase else 'mixed'}" in score.bleu_signature
    assert translation_score(references, references).bleu == pytest.approx(100)


def test_attention_maps_are_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pipe(monkeypatch, b"\neins $zwei$ drei\n")
    code, out, err = run_translate(capsys, run, "--attention", tmp_path / "map.png")
    assert code == 0 and len(out) == 2 and "map.png" in err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    for name, message in (("map.gif", ".png file"), ("nowhere/map.png", "nowhere")):
        pipe(monkeypatch, b"eins\n")
        code, _, err = run_translate(capsys, run, "--attention", tmp_path / name)
        assert code == 1 and message in err.splitlines()[-1]
    monkeypatch.setattr(plots, "MAX_PIXELS", 10_000)
    pipe(monkeypatch, b"eins\n")
    code, out, err = run_translate(capsys, run, "--attention", tmp_path / "map.png")
    assert code == 1 and len(out) == 1 and "shorten the first line" in err.splitlines()[-1]


def test_a_terminal_gets_each_translation_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, each line is translated before the next one is read."""
    events: list[str] = []

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

        def __next__(self) -> bytes:
            events.append("line")
            return super().__next__()

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Terminal(b"eins\nzwei\n")))
    monkeypatch.setattr("bardlet.console.say", lambda text: events.append(text))
    assert main(["translate", str(run)]) == 0
    assert [event == "line" for event in events] == [True, False, True, False, True]


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE")
def test_a_closed_pipe_prints_no_error(run: Path) -> None:
    command = [sys.executable, "-m", "bardlet", "translate", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"eins zwei\n" * 10)
        process.stdin.close()
        assert process.wait(600) == 141 and process.stderr.read() == b""  # 128 + SIGPIPE
