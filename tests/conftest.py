"""Shared by the tests: a cache of their own, the command line in this process, a clock, and a very small run."""

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
from safetensors.torch import load_file

from bardlet.config.pretraining import ABSENT_IN
from bardlet.runtime.device import processor

hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4", "--log-every",
        "1", "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off"]
"""Settings of a model that trains in milliseconds."""


def settings_of(model: str, words: Sequence[str]) -> list[str]:
    """`words`, which are pairs of --NAME and VALUE, without the settings that a rung of the ladder does not have."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if model not in ABSENT_IN.get(name[2:].replace("-", "_"), ())
            for word in (name, value)]


def assert_same_run(whole: Path, again: Path, step: int) -> None:
    """The weights at both roots are the same bits, and so is what the checkpoint of `step` keeps besides."""
    for name in ("model.safetensors", f"checkpoints/step-{step:08}/trainer.safetensors"):
        one, other = load_file(whole / name), load_file(again / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token shards of the tests go to a folder of theirs, made once for the session; what was compiled stays."""
    kind = hashlib.sha256(processor().encode()).hexdigest()[:12]  # what was compiled for another processor aborts
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}" / kind
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    before = os.environ.get("BARDLET_CACHE")
    os.environ["BARDLET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["BARDLET_CACHE"]
    else:
        os.environ["BARDLET_CACHE"] = before


LONG = ("test_translation", "test_cli", "test_run", "test_kills", "test_resume", "test_bad_input", "test_rl",
        "test_heartbeat", "test_trainer", "test_benchmarks", "test_equivalence")
"""Files that take longest, which several processes begin with: the last ones to end are then short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_configure() -> None:
    """One thread, here and in the processes that tests start: such small models lose time with a second."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A run pins the number of threads, and sums differ by it: no test and no fixture finds that of another."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def short_endings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the sample at the end of a run, and draw figures without laying them out first: a third of the time.

    Not in tests/acceptance, and not in a test that is marked `laid_out`.
    """
    if "acceptance" in request.path.parts or request.node.get_closest_marker("laid_out"):
        return
    from matplotlib.figure import Figure

    from bardlet.stages import pretrain

    save = Figure.savefig

    def sketch(self: Figure, *args: Any, **kwargs: Any) -> None:
        self.set_layout_engine("none")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", sketch)
    monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 40)


@pytest.fixture
def bardlet(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """`bardlet ARGV --json` in this process; returns the object it prints, and fails where it fails."""

    def run(*argv: str | Path) -> dict[str, Any]:
        from bardlet.cli import main

        code = main([*map(str, argv), "--json", "--debug"])
        out = capsys.readouterr().out
        assert code == 0, out
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of runs with --minutes in this process."""
    return install(Clock(), monkeypatch)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6,000 characters in which the next one can be guessed."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(f"the {n} little bards sang {n * n % 97} songs\n" for n in range(200)), encoding="utf-8")
    return path
