"""Fixtures: a separate cache, the command line in this process, a simulated clock, and tiny settings."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from clocks import Clock, install
from hypothesis import HealthCheck
from matplotlib.figure import Figure
from safetensors.torch import load_file

from bardlet.config.pretraining import ABSENT_IN
from bardlet.runtime import contention
from bardlet.runtime.device import processor

hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4", "--log-every",
        "1", "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off"]
"""Settings of a model that trains in milliseconds."""


def settings_of(model: str, argv: Sequence[str]) -> list[str]:
    """Return `argv`, pairs of --NAME and VALUE, without the settings that `model` does not have."""
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [argument for name, value in pairs if model not in ABSENT_IN.get(name[2:].replace("-", "_"), ())
            for argument in (name, value)]


def assert_same_run(whole: Path, again: Path, step: int) -> None:
    """Assert that two runs have the same weights, and the same trainer state at `step`, bit for bit."""
    for name in ("model.safetensors", f"checkpoints/step-{step:08}/trainer.safetensors"):
        expected, actual = load_file(whole / name), load_file(again / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items()), name


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary cache for the session, but keep compiled graphs across sessions."""
    kind = hashlib.sha256(processor().encode()).hexdigest()[:12]  # code compiled for another processor crashes
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}" / kind
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    before = os.environ.get("BARDLET_CACHE")
    cache, kept = tmp_path_factory.mktemp("cache"), Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "bardlet"
    kept.mkdir(parents=True, exist_ok=True)
    (cache / "compiled").symlink_to(kept)
    os.environ["BARDLET_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["BARDLET_CACHE"]
    else:
        os.environ["BARDLET_CACHE"] = before


LONG = ("test_translation", "test_cli", "test_timed_runs", "test_run", "test_kills", "test_resume", "test_bad_input",
        "test_rl", "test_heartbeat", "test_trainer", "test_benchmarks", "test_equivalence", "test_exits")
"""The slowest files, which run first, so that parallel test processes finish at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_configure() -> None:
    """Use one thread, here and in subprocesses: models this small get slower with a second one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see a quiet machine, whatever else runs here."""
    monkeypatch.setattr(contention, "_factor", lambda tasks: 1.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Reset the number of threads, which a run sets and which changes floating-point sums."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


SAVEFIG, DRAW = Figure.savefig, Figure.draw


@pytest.fixture(scope="module", autouse=True)
def short_endings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shorten the end of a run: a short sample, figures drawn once and without a layout, nothing flushed to the disk.

    Does not apply to tests/acceptance. No test of a killed process can tell whether a file was flushed: the system
    keeps what was written.
    """
    from bardlet.stages import pretrain

    def without_layout(self: Figure, *args: Any, **kwargs: Any) -> None:
        self.set_layout_engine("none")
        SAVEFIG(self, *args, **kwargs)

    def once(self: Figure, renderer: Any) -> None:
        if "draw_path" not in vars(renderer):  # `savefig` first draws on a renderer without ink, for the layout
            DRAW(self, renderer)

    with pytest.MonkeyPatch.context() as patch:
        if "acceptance" not in request.path.parts:
            patch.setattr(Figure, "savefig", without_layout)
            patch.setattr(Figure, "draw", once)
            patch.setattr(pretrain, "SAMPLE_TOKENS", 40)
            patch.setattr(os, "fsync", os.fstat)  # fails for what is no open file
        yield


@pytest.fixture(autouse=True)
def laid_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save figures as for users in tests marked `laid_out`."""
    if request.node.get_closest_marker("laid_out"):
        monkeypatch.setattr(Figure, "savefig", SAVEFIG)
        monkeypatch.setattr(Figure, "draw", DRAW)


@pytest.fixture
def bardlet(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run `bardlet ARGV --json` in this process, assert that it succeeds, and return the JSON object."""

    def run(*argv: str | Path) -> dict[str, Any]:
        from bardlet.cli import main

        code = main([*map(str, argv), "--json", "--debug"])
        out = capsys.readouterr().out
        assert code == 0, out
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The simulated clock of runs with --minutes in this process."""
    return install(Clock(), monkeypatch)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictable text of 6,000 characters."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200)), encoding="utf-8")
    return path
