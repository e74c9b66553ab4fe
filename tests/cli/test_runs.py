"""`bardlet runs`: list, compare and delete run folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, settings_of

from bardlet.api.runs import RunSummary
from bardlet.cli import main
from bardlet.cli.runs import print_table
from bardlet.run import folder as run_folder
from bardlet.run import lock
from bardlet.training import trainer

LADDER = "runs/ladder-rhyme/03-one-head/seed-1337"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with runs/: finished, stopped, damaged, and a run of a ladder."""
    folder = tmp_path_factory.mktemp("trained")
    train = ["train", str(text), "--steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*train, *TINY, "--out", "runs/finished"]) == 0
        assert main([*train, *settings_of("one-head", TINY), "--model", "one-head", "--out", LADDER]) == 0
        patch.setattr(trainer, "finish", lambda trainer: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*train, *TINY, "--model", "gpt2", "--lr", "1e-3", "--out", "runs/stopped"]) != 0
        shutil.copytree("runs/finished", "runs/damaged")
        Path("runs/damaged/run.toml").write_text("steps = = 3\n", encoding="utf-8")
        Path("runs/empty").mkdir()
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with a copy of `trained`."""
    shutil.copytree(trained, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[str]]:
    """Pretend that the user answers on a terminal (None: Ctrl-D), and return the list of the questions."""
    def answer(word: str | None) -> list[str]:
        questions: list[str] = []

        def ask(question: str) -> str:
            questions.append(question)
            if word is None:
                raise EOFError
            return word

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", ask)
        return questions

    return answer


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on standard error."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("bardlet: ") and "internal error" not in line
    return line


def table_of(out: str) -> dict[str, list[str]]:
    """Return the words of each row of a table by the first word."""
    return {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}


def test_the_table_lists_every_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of ladders, and damaged ones; not other folders."""
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    table = table_of(out)
    assert err == "" and set(table) == {"run", "runs/finished", "runs/stopped", "runs/damaged", LADDER}
    for name, model, state in (("runs/finished", "qwen3", "finished"), ("runs/stopped", "gpt2", "stopped"),
                               (LADDER, "one-head", "finished")):
        words = table[name]
        assert words[:3] == ["train", "rhyme", model] and words[5:7] == [state, "3"]
    assert table["runs/finished"][-1] == "nats/char" and table["runs/stopped"][-1] == "nats/char"
    assert table["runs/damaged"][:2] == ["?", "damaged"]


def test_json_has_the_figures_of_each_run(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    runs = {run["folder"]: run for run in bardlet("runs")["runs"]}
    assert len(runs) == 4
    finished, stopped, damaged = (runs[f"runs/{name}"] for name in ("finished", "stopped", "damaged"))
    assert (finished["state"], finished["steps"], finished["command"]) == ("finished", 3, "train")
    assert finished["parameters"] > 10_000 and finished["megabytes"] > 0
    assert finished["result"].endswith("nats/char") and finished["val_loss"] > 0 and finished["reward"] is None
    assert (stopped["state"], stopped["steps"]) == ("stopped", 3) and stopped["val_loss"] > 0
    assert damaged["state"] == "damaged" and damaged["val_loss"] is None and damaged["steps"] is None


def test_a_stopped_run_shows_the_step_that_resume_continues_from(workspace: Path,
                                                                 bardlet: Callable[..., dict[str, Any]]) -> None:
    """The last line of metrics may be of another step; a run without a checkpoint starts over."""
    path = Path("runs/stopped/metrics.jsonl")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 3' not in line))
    assert bardlet("runs", "runs/stopped")["runs"][0]["steps"] == 3
    config, record = run_folder.read_run(Path("runs/stopped"))
    run_folder.write_run(Path("runs/stopped"), config, {k: v for k, v in record.items() if k != "saved"})
    assert bardlet("runs", "runs/stopped")["runs"][0]["steps"] == 0


def test_results_in_two_units_are_said_not_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    def summary(result: str) -> RunSummary:
        return RunSummary("a", "train", "t", "qwen3", 1, "finished", 1, 1.0, None, result, 1.0, 1.0, 0.0)

    for other, units in (("2.0 nats/char", 1), ("2.0 nats/token", 2), ("", 1)):
        print_table([summary("1.0 nats/char"), summary(other)])
        assert ("results in nats/char and nats/token are not comparable" in capsys.readouterr().out) == (units == 2)


def test_the_newest_run_is_the_first(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    runs = bardlet("runs")["runs"]
    assert [run["modified"] for run in runs] == sorted((run["modified"] for run in runs), reverse=True)


def test_a_run_that_a_process_trains_is_running(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    with lock.locked(Path("runs/stopped")):
        assert bardlet("runs", "runs/stopped")["runs"][0]["state"] == "running"
    assert bardlet("runs", "runs/stopped")["runs"][0]["state"] == "stopped"


def test_a_record_of_the_wrong_type_is_damage(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    path = Path("runs/finished/run.toml")
    for line in ('seconds = "long"', "text = 5", 'val_loss = "low"', "finished = 1"):
        name = line.split()[0]
        record = path.read_text(encoding="utf-8").partition("[record]\n")[2].splitlines()
        lines = [line, *(each for each in record if not each.startswith((f"{name} ", "#")))]
        Path("runs/damaged/run.toml").write_text("\n".join(["[record]", *lines]), encoding="utf-8")
        assert bardlet("runs", "runs/damaged")["runs"][0]["state"] == "damaged", line


def test_two_runs_are_compared(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the settings that differ are printed."""
    assert main(["runs", "runs/finished", "runs/stopped"]) == 0
    table, _, differences = capsys.readouterr().out.partition("\nsettings that differ:\n")
    assert list(table_of(table)) == ["run", "runs/finished", "runs/stopped"]
    assert table_of(differences) == {"setting": ["runs/finished", "runs/stopped"], "lr": ["0.002", "0.001"],
                                     "model": ["qwen3", "gpt2"]}


def test_the_comparison_shows_the_steps_done_and_warns_of_different_texts(
        workspace: Path, capsys: pytest.CaptureFixture[str], bardlet: Callable[..., dict[str, Any]]) -> None:
    from bardlet.runtime.signals import Stopped

    Path("other.txt").write_text("Twinkle, twinkle, little star, how I wonder what you are.\n" * 40, encoding="utf-8")

    def stop(trainer: Any) -> None:
        raise Stopped(trainer.run, 3, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "finish", stop)
        assert main(["train", "other.txt", *TINY, "--steps", "3", "--out", "runs/other"]) != 0
    path = Path("runs/other/run.toml")
    path.write_text(path.read_text(encoding="utf-8").replace("steps = 3", "steps = 9", 1), encoding="utf-8")
    assert main(["runs", "runs/finished", "runs/other"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("  steps"))
    assert row.split(maxsplit=2) == ["steps", "3", "9 (3 done, stopped)"]
    assert '["other.txt"]' in out and out.endswith("\nlosses on different texts are not comparable\n")


def test_a_setting_that_a_run_lacks_is_a_dash(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "runs/finished", LADDER]) == 0
    differences = table_of(capsys.readouterr().out.partition("\nsettings that differ:\n")[2])
    assert differences["model"] == ["qwen3", "one-head"] and differences["n_layer"] == ["2", "-"]


def test_equal_runs_have_no_differences(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/finished", "runs/copy")
    assert main(["runs", "runs/finished", "runs/copy"]) == 0
    assert capsys.readouterr().out.endswith("\nthe settings are the same\n")


def test_another_root(workspace: Path, bardlet: Callable[..., dict[str, Any]],
                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert [run["folder"] for run in bardlet("runs", "--root", "runs/ladder-rhyme")["runs"]] == [LADDER]
    assert main(["runs", "--root", "runs/empty"]) == 0
    assert "no runs yet; `bardlet train" in capsys.readouterr().out
    assert bardlet("runs", "--root", "runs/empty") == {"runs": []}


@pytest.mark.parametrize(("argv", "message"), [
    ("--root gone", "gone: no such folder; `bardlet train` creates runs"),
    ("runs/finished gone", "gone: not a run folder; `bardlet runs` lists them"),
    ("runs/empty", "runs/empty: not a run folder; `bardlet runs` lists them"),
    ("runs/finished/config.json", "runs/finished/config.json: not a run folder; `bardlet runs` lists them"),
    ("--delete", "--delete: name the runs to delete, as in `bardlet runs runs/a --delete`"),
    ("runs/finished --yes", "--yes: only confirms --delete; add --delete, or drop --yes"),
])
def test_an_error_is_one_line(argv: str, message: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *argv.split()]) == 1
    assert error_line(capsys) == f"bardlet: {message}"


# ---------------------------------------------------------------------------------- deletion


def test_delete_with_yes(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The named runs are removed, also a damaged one; the others stay."""
    assert bardlet("runs", "runs/stopped", "runs/damaged", "--delete", "--yes") == {
        "deleted": ["runs/stopped", "runs/damaged"]}
    assert {run["folder"] for run in bardlet("runs")["runs"]} == {"runs/finished", LADDER}
    assert not Path("runs/stopped").exists() and not Path("runs/damaged").exists()


def test_delete_the_working_directory(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("runs/finished")
    assert main(["runs", ".", "--delete", "--yes"]) == 0
    assert not (workspace / "runs/finished").exists()


@pytest.mark.parametrize(("answer", "deleted"), [
    ("y", True), (" Yes ", True), ("n", False), ("", False), (None, False)])
def test_delete_asks_on_a_terminal(answer: str | None, deleted: bool, workspace: Path,
                                   terminal: Callable[[str | None], list[str]],
                                   bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """The question names state, size and result; only yes deletes."""
    questions = terminal(answer)
    assert bardlet("runs", "runs/finished", "--delete") == {"deleted": ["runs/finished"] * deleted}
    [question] = questions
    assert re.fullmatch(r"delete runs/finished \(finished, <?\d+ MB, [\d.]+ nats/char\)\? \[y/N\] ", question)
    assert Path("runs/finished/model.safetensors").exists() != deleted


def test_delete_without_a_terminal_needs_yes(workspace: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["runs", "runs/finished", "--delete"]) == 1
    line = error_line(capsys)
    assert "runs/finished: standard input is not a terminal" in line and "--yes" in line
    assert Path("runs/finished/model.safetensors").exists()


@pytest.fixture
def not_runs(workspace: Path) -> Iterator[list[str]]:
    """Names that are no run folder: a folder, a file, nothing, and a link to a run."""
    Path("runs/link").symlink_to("finished")
    yield ["runs", "runs/empty", "runs/ladder-rhyme", "runs/finished/config.json", "gone", "runs/link"]


def test_delete_refuses_what_is_no_run(not_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path("runs").rglob("*"))
    for name in not_runs:
        assert main(["runs", name, "--delete", "--yes"]) == 1
        assert error_line(capsys) == f"bardlet: {name}: not a run folder (it has no run.toml); nothing was deleted"
    assert sorted(Path("runs").rglob("*")) == before


def test_links_to_runs_are_not_listed(workspace: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    Path("runs/link").symlink_to("finished")
    assert "runs/link" not in {run["folder"] for run in bardlet("runs")["runs"]}


def test_delete_refuses_a_run_that_is_in_use(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock.locked(Path("runs/stopped")):
        assert main(["runs", "runs/stopped", "--delete", "--yes"]) == 1
        line = error_line(capsys)
    assert "runs/stopped: in use by process" in line and "wait for it to finish, or stop it" in line
    assert json.loads(Path("runs/stopped/config.json").read_text(encoding="utf-8"))


def test_a_folder_with_other_runs_in_it_is_not_deleted(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """`--out runs` makes a run of the folder of all runs."""
    for folder in ("nest", "nest/inner"):
        bardlet("train", text, *TINY, "--steps", "2", "--out", tmp_path / folder)
    assert main(["runs", str(tmp_path / "nest" / "inner"), str(tmp_path / "nest"), "--delete", "--yes"]) == 1
    assert "contains other runs" in capsys.readouterr().err
    assert (tmp_path / "nest" / "inner" / "run.toml").exists(), "all names are checked before anything is deleted"
