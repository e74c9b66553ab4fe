"""The Python API: train, fine-tune, resume, load, evaluate, list runs."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same_run

import bardlet
from bardlet.api.arguments import names_keywords
from bardlet.cli import COMMANDS
from bardlet.config.stages import FINE_TUNING
from bardlet.errors import BardletError
from bardlet.run import checkpoint
from bardlet.run.record import ConversationsRecord, TextRecord
from bardlet.runtime import manifest
from bardlet.runtime.signals import Stopped
from bardlet.training import trainer

TINY: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 48, "batch_size": 4, "warmup_steps": 2,
                        "dtype": "fp32", "compile": "off", "log_every": 1}
FINE: dict[str, Any] = {"batch_size": 4, "dtype": "fp32", "compile": "off", "log_every": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> bardlet.Run:
    """A run of a few steps with a bpe tokenizer."""
    return bardlet.train(text, out=tmp_path_factory.mktemp("base") / "run", steps=6, save_every=3, tokenizer="bpe",
                         vocab_size=300, **TINY)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"bard {n}"}, {"role": "assistant", "content": f"song {n}"}]}
            for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, run: bardlet.Run, chats: Path) -> bardlet.Run:
    return bardlet.sft(run.folder, chats, out=tmp_path_factory.mktemp("sft") / "run", steps=4, **FINE)


# ---------------------------------------------------------------------------------- the package


def test_import_bardlet_imports_nothing_heavy() -> None:
    """Nor do `dir` and the functions that need no model."""
    code = ("import sys, bardlet; dir(bardlet); bardlet.BardletError; "
            "print({'torch', 'numpy', 'tokenizers', 'transformers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_dir_lists_every_stage() -> None:
    """Each is a function with a docstring, named like its command."""
    names = {"train", "plan", "resume", "load", "evaluate", "runs", "delete", "open_run",
             "Run", "Model", "BardletError", "export_model"}  # fmt: skip
    stages = {kind.command for kind in FINE_TUNING}
    assert set(bardlet.__all__) == names | stages and stages <= set(COMMANDS)
    assert set(dir(bardlet)) == {*bardlet.__all__, "__version__"}
    for stage in stages:
        function = getattr(bardlet, stage)
        assert function.__name__ == stage and f"`bardlet {stage}`" in function.__doc__
        assert not re.search("--|DATA", function.__doc__) and max(map(len, function.__doc__.splitlines())) <= 120
        assert list(inspect.signature(function).parameters) == ["model", "data", "out", "config", "settings"]


@pytest.mark.parametrize("name", sorted(set(bardlet.__all__) - {"BardletError", "Model", "Run"}))
def test_every_function_is_documented(name: str) -> None:
    """Its docstring names each argument, the result, and the errors. It can be pickled."""
    function = getattr(bardlet, name)
    headings = ["Args:", "Raises:"] if name == "delete" else ["Args:", "Returns:", "Raises:"]
    assert all(heading in function.__doc__ for heading in headings)
    assert all(f" {argument}: " in function.__doc__ for argument in inspect.signature(function).parameters)
    assert pickle.loads(pickle.dumps(function)) is function


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bardlet' has no attribute 'trian'"):
        bardlet.trian  # noqa: B018


# ---------------------------------------------------------------------------------- train and generate


def test_train_returns_the_run(run: bardlet.Run, text: Path) -> None:
    """Its settings, its record, and what `--json` prints."""
    assert isinstance(run.record, TextRecord) and run.record.finished
    assert (run.record.text, run.record.steps, run.record.tokenizer) == ("rhyme", 6, "bpe")
    assert run.record.val_loss == run.summary["val_loss"] > 0
    assert run.summary["steps"] == 6 and run.summary["run"] == str(run.folder)
    assert (run.config.text, run.config.steps, run.config.block_size) == ((str(text),), 6, 48)
    assert repr(run) == f"Run({str(run.folder)!r})"


def test_a_seed_repeats_the_text(run: bardlet.Run) -> None:
    """Other seeds give other texts; the prompt is not repeated; streaming gives the same text."""
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 7}
    text = run.model.generate("the ", **options)
    assert isinstance(text, str) and text and not text.startswith("the the")
    assert run.model.generate("the ", **options) == text
    pieces = list(run.model.stream("the ", **options))
    assert "".join(pieces) == text and all(pieces)
    assert len({run.model.generate("the ", 20, temperature=1.0, seed=seed) for seed in range(5)}) > 1


def test_greedy_generation_needs_no_seed(run: bardlet.Run) -> None:
    assert run.model.generate("the ", 10, temperature=0) == run.model.generate("the ", 10, temperature=0, seed=3)


def test_complete_generates_a_batch(run: bardlet.Run) -> None:
    texts, tokens = run.model.complete(["the ", "the ", "bards"], 8, seed=1)
    assert len(texts) == 3 and 0 < tokens <= 24
    assert run.model.complete(["the ", "the ", "bards"], 8, seed=1) == (texts, tokens)


def test_load_gives_the_model_of_the_run(run: bardlet.Run) -> None:
    """Also from a Hugging Face folder without a run.toml."""
    expected = run.model.generate("the ", 20, seed=7)
    model = bardlet.load(run.folder, device="cpu")
    assert isinstance(model, bardlet.Model) and model.generate("the ", 20, seed=7) == expected
    assert not model.translates and not model.answers
    assert repr(model) == f"Model({str(run.folder)!r})"
    assert bardlet.load(str(run.folder), device="cpu", dtype="int8").generate("the ", 5, seed=7)


def test_open_run_reads_the_folder(run: bardlet.Run) -> None:
    again = bardlet.open_run(run.folder)
    assert again.record == run.record and again.config == run.config and again.summary == {}


def test_train_on_several_texts(text: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("more songs of the bards\n" * 60, encoding="utf-8")
    texts = [text, str(tmp_path / "more.txt")]
    plan = bardlet.plan(texts, steps=2, tokenizer="byte", **TINY)
    run = bardlet.train(texts, out=tmp_path / "run", steps=2, tokenizer="byte", **TINY)
    assert plan["steps"] == 2 and plan["parameters"] == run.record.parameters
    assert run.config.text == (str(text), str(tmp_path / "more.txt")) and run.record.documents == 2


def test_train_on_pairs(tmp_path: Path) -> None:
    """`source` and `target` make it a translation."""
    for name, word in (("source", "bard"), ("target", "song")):
        (tmp_path / name).write_text("".join(f"{word} {n} and {n % 7}\n" for n in range(300)), encoding="utf-8")
    settings = {**TINY, "block_size": 32}
    del settings["batch_size"]
    run = bardlet.train(source=tmp_path / "source", target=tmp_path / "target", out=tmp_path / "run", steps=3,
                        vocab_size=300, batch_tokens=256, **settings)
    assert run.config.model == "encdec" and run.model.translates
    [line] = run.model.translate(["bard 3 and 4"])
    assert isinstance(line, str) and run.model.translate("bard 3 and 4") == [line]
    for lines, options, message in ((5, {}, "lines = 5: must be a list"), ([5], {}, "lines = 5: must be a string"),
                                    ("bard", {"beam": "2"}, "beam = '2': must be a whole number"),
                                    ("bard", {"beam": 0}, "beam=0: must be from 1")):
        with pytest.raises(BardletError) as error:
            run.model.translate(lines, **options)  # type: ignore[arg-type]
        assert message in str(error.value) and "--" not in str(error.value)
    result = bardlet.evaluate(run.folder)
    assert result.score.lines > 0 and result.beam == 1
    with pytest.raises(BardletError, match="an encoder-decoder translates"):
        run.model.generate("bard")


# ---------------------------------------------------------------------------------- resume


def test_resume_continues_a_stopped_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of an uninterrupted run, bit for bit."""
    settings = {**TINY, "steps": 8, "save_every": 3, "keep": "last"}
    whole = bardlet.train(text, out=tmp_path / "whole", **settings)
    original, calls = trainer.train_step, []

    def train_step(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", train_step)
        with pytest.raises(Stopped):
            bardlet.train(text, out=tmp_path / "stopped", **settings)
    states = {Path(summary.folder).name: summary.state for summary in bardlet.runs(tmp_path)}
    assert states == {"whole": "finished", "stopped": "stopped"}
    resumed = bardlet.resume(tmp_path / "stopped")
    assert resumed.summary["resumed_from"] == 3 and resumed.record.finished
    assert resumed.record.val_loss == whole.record.val_loss
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 8)


def test_resume_with_more_steps(text: Path, tmp_path: Path) -> None:
    bardlet.train(text, out=tmp_path / "run", steps=3, **TINY)
    with pytest.raises(BardletError, match="finished, all 3 steps are done"):
        bardlet.resume(tmp_path / "run")
    assert bardlet.resume(tmp_path / "run", steps=5, allow_change=True).record.steps == 5


def test_resume_for_more_minutes(text: Path, tmp_path: Path) -> None:
    """As many steps as fit at the pace so far: 2 s a step, and 1 s of evaluations."""
    bardlet.train(text, out=tmp_path / "run", steps=4, **TINY)
    [path] = (tmp_path / "run" / "checkpoints").glob("*4/trainer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 8.0, "prepared": 5.0, "elapsed": 17.0}))
    manifest.write_manifest(path.parent, checkpoint.FILES, **{
        key: manifest.read_manifest(path.parent)[key] for key in ("step", "root")})
    for keywords, message in (
            ({"minutes": 0.1}, "bardlet.resume: minutes=0.1 changes the schedule of the run: 0.1 minutes more make "
                               "about 6 steps; add allow_change=True"),
            ({"minutes": 0.1, "steps": 9}, "both set the end of the run; drop one"),
            ({"minutes": 0}, "bardlet.resume: minutes=0: must be more than 0")):
        with pytest.raises(BardletError) as error:
            bardlet.resume(tmp_path / "run", **keywords)  # type: ignore[arg-type]
        assert message in str(error.value)
    assert bardlet.resume(tmp_path / "run", minutes=0.1, allow_change=True).record.steps == 6


# ---------------------------------------------------------------------------------- fine-tuning


def test_sft_trains_on_conversations(chat: bardlet.Run, run: bardlet.Run, chats: Path) -> None:
    assert isinstance(chat.record, ConversationsRecord) and chat.record.finished
    assert chat.config.stage == "sft" and chat.config.init == str(run.folder) and chat.config.text == (str(chats),)
    assert chat.record.val_loss_before > 0 and chat.record.steps == 4


def test_a_fine_tuned_model_chats(chat: bardlet.Run) -> None:
    assert chat.model.answers
    answer = chat.model.chat("bard 3", max_new_tokens=8, seed=1)
    assert isinstance(answer, str) and chat.model.chat("bard 3", max_new_tokens=8, seed=1) == answer
    session = chat.model.session(max_new_tokens=8, seed=1)
    assert "".join(session.ask("bard 3")) == answer
    assert [message["role"] for message in session.transcript()] == ["user", "assistant"]


# ---------------------------------------------------------------------------------- evaluate, runs


def test_evaluate_on_the_validation_split(run: bardlet.Run, chat: bardlet.Run) -> None:
    """The loss is that of the run."""
    result = bardlet.evaluate(run.folder)
    assert result.name == "validation split of rhyme"
    assert result.score.loss == pytest.approx(run.record.val_loss, abs=1e-4)
    result = bardlet.evaluate(chat.folder)
    assert result.name == "held-out completions of chats"
    assert result.score.loss == pytest.approx(chat.record.val_loss, abs=1e-4)


def test_evaluate_on_a_text(run: bardlet.Run, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text("the bards sang other songs\n" * 30, encoding="utf-8")
    result = bardlet.evaluate(run.folder, path)
    assert result.name == "other" and result.score.loss > 0 and result.skipped_characters == 0
    assert bardlet.evaluate(str(run.folder), [path]).score == result.score
    shorter = bardlet.evaluate(run.folder, path, context=8)
    assert shorter.score.loss != result.score.loss


def test_runs_lists_summaries(run: bardlet.Run) -> None:
    [summary] = bardlet.runs(run.folder.parent)
    assert (summary.folder, summary.state, summary.steps) == (str(run.folder), "finished", 6)
    assert summary.val_loss == run.record.val_loss and summary.parameters == run.record.parameters


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("settings", "message"), [
    ({"stepz": 3}, "bardlet.train: unknown setting 'stepz'; did you mean 'steps'?"),
    ({"steps": "3"}, "bardlet.train: steps = '3': must be a whole number"),
    ({"keep": "first"}, "bardlet.train: keep = 'first': must be one of best, last, average"),
    ({"dropout": 2.0}, "bardlet.train: dropout=2: must be at least 0 and below 1"),
    ({"pack": True}, "bardlet.train: pack is a setting of `bardlet sft`; drop it"),
    ({"batch_tokens": 64}, "bardlet.train: batch_tokens is a setting of translation; drop it"),
    ({"model": "bigram", "dropout": 0.1}, "bardlet.train: dropout=0.1: does not apply to bigram; drop it"),
    ({"minutes": -1.0}, "bardlet.train: minutes=-1: must be more than 0"),
    ({"minutes": 1, "steps": 1}, "steps and minutes: give one of them"),
    ({"model": "encdec"}, "name sentence pairs with source=FILE target=FILE"),
    ({"zzz": 1}, "unknown setting 'zzz'; `bardlet train --help-all` lists the settings (write _ for -)"),
])
def test_a_setting_that_does_not_fit_is_refused(settings: dict[str, Any], message: str, text: Path,
                                                tmp_path: Path) -> None:  # fmt: skip
    """Before anything is written."""
    with pytest.raises(BardletError) as error:
        bardlet.train(text, out=tmp_path / "run", **settings)
    assert message in str(error.value) and "--" not in str(error.value).replace("--help-all", "")
    assert not (tmp_path / "run").exists()


def test_a_setting_of_another_stage_is_refused(run: bardlet.Run, chats: Path, tmp_path: Path) -> None:
    for settings, message in (({"model": "gpt2"}, "bardlet.sft: model does not apply to `bardlet sft`; drop it"),
                              ({"group": 4}, "bardlet.sft: group is a setting of `bardlet grpo`; drop it"),
                              ({"sepz": 4}, "bardlet.sft: unknown setting 'sepz'")):
        with pytest.raises(BardletError) as error:
            bardlet.sft(run.folder, chats, out=tmp_path / "run", **settings)
        assert message in str(error.value)


def test_errors_of_the_other_functions(run: bardlet.Run, tmp_path: Path) -> None:
    for call, message in (
        (lambda: bardlet.evaluate(run.folder, limits=3), "unknown option 'limits'; did you mean 'limit'?"),
        (lambda: bardlet.evaluate(run.folder, protocol="ful"), "protocol = 'ful': must be one of full, random"),
        (lambda: bardlet.evaluate(run.folder, dtype="fp16"), "dtype = 'fp16': must be one of fp32, bf16"),
        (lambda: bardlet.evaluate(run.folder, task="arc"), 'bardlet.evaluate: task="arc": no such task'),
        (lambda: bardlet.evaluate(run.folder, limit=3), "limit: needs task"),
        (lambda: bardlet.load(tmp_path / "gone"), "no such folder"),
        (lambda: bardlet.load(run.folder, dtype="fp16"),
         "bardlet.load: dtype = 'fp16': must be one of auto, fp32, bf16, int8"),
        (lambda: bardlet.load(run.folder, device="gpu"), 'device="gpu": no such device; use device="cpu"'),
        (lambda: bardlet.load(""), "bardlet.load: folder = '': an empty path"),
        (lambda: bardlet.export_model(run, to=["html"]), "bardlet.export_model: to = ['html']: must be one of html"),
        (lambda: bardlet.export_model(run, to="pdf"), "bardlet.export_model: to = 'pdf': must be one of html"),
        (lambda: bardlet.export_model(run, to="html", dtype="f16"),
         'bardlet.export_model: dtype="f16": must be int8, fp16 or fp32 for to="html"'),
        (lambda: bardlet.open_run(tmp_path), "no run.toml, so this is not a run folder"),
        (lambda: bardlet.resume(tmp_path / "gone"), "no such folder"),
        (lambda: bardlet.resume(run.folder, steps=9),
         "bardlet.resume: steps=9 changes the schedule of the run; add allow_change=True"),
        (lambda: bardlet.resume(run.folder), f"--init {run.folder}`"),
        (lambda: bardlet.plan("x", minutes=-1.0), "bardlet.plan: minutes=-1:"),
        (lambda: bardlet.runs(tmp_path / "gone"), "no such folder"),
        (lambda: bardlet.train(tmp_path / "gone.txt", steps=1), "gone.txt: no such file"),
        (lambda: run.model.translate(["the"]), "was not trained to translate"),
        (lambda: run.model.generate(temperature=-1), "generate: temperature=-1"),
        (lambda: run.model.generate(max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
        (lambda: run.model.chat("the", max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
        (lambda: run.model.generate(top_k=0), "top_k=0: must be at least 1"),
        (lambda: run.model.generate(top_p=2), "top_p=2: must be above 0"),
    ):
        with pytest.raises(BardletError) as error:
            call()
        assert message in str(error.value)
        assert "--" not in re.sub("`[^`]*`", "", str(error.value))


A_PATH = "must be a path"


@pytest.mark.parametrize(("function", "arguments", "keywords", "message"), [
    ("train", [5], {}, A_PATH), ("train", [None], {}, A_PATH), ("train", [[5]], {}, A_PATH),
    ("train", [[]], {}, "an empty list"), ("train", ["x"], {"out": 5}, A_PATH), ("train", [], {"config": 5}, A_PATH),
    ("plan", [5], {}, A_PATH), ("sft", [5, "x"], {}, A_PATH), ("sft", [None, "x"], {}, A_PATH),
    ("sft", ["runs/g", 5], {}, A_PATH), ("evaluate", [5], {}, A_PATH), ("evaluate", [None], {}, A_PATH),
    ("evaluate", ["runs/g", 5], {}, A_PATH), ("evaluate", ["runs/g"], {"task": 5}, "must be a name or a list of names"),
    ("runs", [5], {}, A_PATH), ("runs", [None], {}, A_PATH), ("resume", [5], {}, A_PATH), ("delete", [5], {}, A_PATH),
    ("resume", ["runs/g"], {"allow_change": "yes"}, "allow_change = 'yes': must be true or false"),
    ("resume", ["runs/g"], {"reward": 5}, "reward = 5: must be a string"),
    ("resume", ["runs/g"], {"steps": "5"}, "steps = '5': must be a whole number"),
    ("open_run", [5], {}, A_PATH), ("Run", [5], {}, A_PATH), ("load", [5], {}, A_PATH),
    ("load", ["runs/g"], {"device": 5}, "device = 5: must be a string"),
])
def test_another_type_is_refused(function: str, arguments: list[Any], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(BardletError, match=f"^bardlet.*{message}"):
        getattr(bardlet, function)(*arguments, **keywords)


@pytest.mark.parametrize(("method", "arguments", "message"), [
    ("generate", {"prompt": 5}, "prompt = 5: must be a string"),
    ("generate", {"max_new_tokens": "9"}, "max_new_tokens = '9': must be a whole number"),
    ("complete", {"prompts": 5}, "prompts = 5: must be a list"),
    ("complete", {"prompts": ["the", 5]}, "prompts = 5: must be a string"),
    ("chat", {"message": 5}, "message = 5: must be a string"),
    ("session", {"system": 5}, "system = 5: must be a string"),
])
def test_another_type_is_refused_by_a_model(run: bardlet.Run, method: str, arguments: dict[str, Any],
                                            message: str) -> None:  # fmt: skip
    with pytest.raises(BardletError, match=message):
        getattr(run.model, method)(**arguments)


def test_errors_name_keywords() -> None:
    """Quoted commands, flags of other functions, and the type of the error stay."""

    def resume(allow_change: bool = False, reward: str = "") -> None:
        raise Stopped(Path("runs/--reward"), 3, 2) if allow_change else BardletError(
            "--reward 'score --reward x': add --allow-change or --no-allow-change, not --json; `bardlet --reward`")

    with pytest.raises(BardletError) as error:
        names_keywords(resume)()
    assert str(error.value) == ("reward='score --reward x': add allow_change=True or allow_change=False, not --json; "
                                "`bardlet --reward`")
    with pytest.raises(Stopped, match="`bardlet resume runs/--reward`"):
        names_keywords(resume)(allow_change=True)


def test_delete_removes_a_run(run: bardlet.Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "copy")
    bardlet.delete(bardlet.open_run(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    with pytest.raises(BardletError, match="not a run folder"):
        bardlet.delete(tmp_path)
