"""The wheel and the sdist: built, installed into an empty environment, and used there."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--steps", "4",
         "--compile", "off"]


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command outside the repository, without its source on the path; return its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env["BARDLET_CACHE"] = str(folder / "cache")
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two archives in dist/, an environment in env/ with the wheel in it, and a text."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "venv", folder / "env"], folder)
    pip = [folder / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    try:
        run([*pip, f"{version}+cpu"], folder)
    except AssertionError:  # no such build for this system: the default one
        run([*pip, version], folder)
    run([*pip[:-2], "build"], folder)
    run([folder / "env" / "bin" / "python", "-m", "build", "--outdir", folder / "dist", ROOT], folder)
    run([*pip, next((folder / "dist").glob("*.whl"))], folder)
    (folder / "my.txt").write_text("To be, or not to be, that is the question:\n" * 60, encoding="utf-8")
    return folder


def test_the_wheel_holds_the_package_and_its_data(folder: Path) -> None:
    [wheel] = (folder / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "bardlet").rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}
    assert source <= names, sorted(source - names)
    assert {name for name in source if name.endswith((".jinja", ".html"))}
    assert len([name for name in names if name.startswith("bardlet/ladder/starters/") and name.endswith(".py")]) == 17
    assert not [name for name in names if name.startswith("tests")]
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1


def test_it_works_without_the_repository(folder: Path) -> None:
    bardlet = folder / "env" / "bin" / "bardlet"
    assert "bardlet train" in run([bardlet], folder)
    run([bardlet, "train", "my.txt", *SMALL, "--out", "run"], folder)
    assert (folder / "run" / "README.md").exists()
    run([bardlet, "sample", "run", "--tokens", "5"], folder)
    assert "17 starter files copied" in run([bardlet, "check", "--start", "exercises"], folder)
    assert "hint 1 of 3" in run([bardlet, "check", "exercises/03_one_head.py", "--hint"], folder)
    assert "ok" in run([bardlet, "doctor", "run"], folder)
    assert "run" in run([bardlet, "runs", "--root", "."], folder)
    run([bardlet, "export", "run", "--to", "html", "--out", "page.html"], folder)
    assert (folder / "page.html").stat().st_size > 50_000
    run([bardlet, "ladder", "my.txt", "--rungs", "1", "--out", "ladder"], folder)
    assert (folder / "ladder" / "report.html").stat().st_size > 10_000
    run([folder / "env" / "bin" / "python", "-c",
         "import bardlet; print(bardlet.load('run').generate('To', max_new_tokens=5))"], folder)
