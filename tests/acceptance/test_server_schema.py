"""schemathesis sends the server requests that fit /openapi.json and requests that do not, and checks the answers.

Variables:

    BARDLET_SCHEMATHESIS   the folder of `pip install --target` with schemathesis; `make engines` prepares it
    BARDLET_SCHEMA_CASES   generated requests in each mode for completions, chat and tokenize: 2000 if unset; at least
                           a tenth of them for the other operations with a body
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from server import served

FOLDER = os.environ.get("BARDLET_SCHEMATHESIS")
CASES = int(os.environ.get("BARDLET_SCHEMA_CASES", "2000"))
MANY = ["/v1/completions", "/v1/chat/completions", "/tokenize"]
WITH_BODY = [*MANY, "/detokenize", "/translate", "/v1/embeddings"]
SLOW = 30
"""Seconds after which a request counts as hanging."""
GROWTH = 40
"""MB by which the server may grow after it has loaded all models and answered one run."""

pytestmark = [pytest.mark.skipif(FOLDER is None, reason="needs BARDLET_SCHEMATHESIS"),
              pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")]


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    """Examples, boundary values, random requests of both modes, and operations in a row."""
    runs = served.train(tmp_path)
    with served.serving(runs, tmp_path / "log") as server:
        fuzz(server, tmp_path, "warm-up", max(10, CASES // 20), "all")
        before = server.memory()
        reports = [fuzz(server, tmp_path, mode, CASES, mode) for mode in ("positive", "negative")]
        after = server.memory()
        assert server.process.poll() is None
        log = server.log.read_text()
    print(f"\nmemory: {before:.0f} MB, then {after:.0f} MB")
    for report in reports:
        print(json.dumps(report["answers"], indent=1))
    assert "internal error" not in log, log[-3000:]
    assert after - before < GROWTH
    for report, mode in zip(reports, ("positive", "negative"), strict=True):
        for path in WITH_BODY:
            number = sum(report["answers"][f"POST {path}"].values())
            assert number >= (CASES if path in MANY else CASES // 10), (mode, path, number)
        statuses = {status for answers in report["answers"].values() for status in answers}
        assert not {status for status in statuses if status.startswith("5")} - {"503"}, statuses


def fuzz(server: served.Server, folder: Path, name: str, cases: int, mode: str) -> dict[str, Any]:
    """Run schemathesis; return its report, with the number of answers for each operation and status."""
    assert FOLDER is not None
    config, report, answered = (folder / f"{name}.{ending}" for ending in ("toml", "json", "jsonl"))
    config.write_text(f"""
continue-on-failure = true
request-timeout = {SLOW}
generation.max-examples = {max(1, cases // 5)}
generation.allow-x00 = true
generation.database = "none"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]

[[operations]]
include-path = {json.dumps(MANY)}
generation.max-examples = {cases}
""", encoding="utf-8")
    models = {"/v1/completions": served.BASE, "/v1/chat/completions": served.CHAT, "/translate": served.TRANSLATOR,
              "vocabulary": served.VOCABULARY, "channels": served.CHANNELS}
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", program, "--config-file", str(config), "run", f"{server.url}/openapi.json",
               "-H", f"Authorization: Bearer {served.KEY}", "--mode", mode, "--workers", "4", "--no-color",
               "--no-shrink", "--report", "json", "--report-json-path", str(report)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join((FOLDER, str(Path(__file__).parent / "server"))),
        "SCHEMATHESIS_HOOKS": "schema_hooks", "BARDLET_SERVED": json.dumps(models), "BARDLET_CASES": str(answered)})
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(report.read_text())
    assert result["complete"] and not result["failures"] and not result["errors"], done.stdout[-20_000:]
    answers: dict[str, Counter[str]] = {}
    for line in answered.read_text().splitlines():
        operation, _, status, seconds = json.loads(line)
        answers.setdefault(operation, Counter())[str(status)] += 1
        assert seconds < SLOW
    return {**result, "answers": answers}
