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
OTHERS = ["/detokenize", "/translate", "/v1/embeddings"]
"""The other operations with a body. Those without one have nothing to vary."""
SLOW = 30
"""Seconds after which a request counts as hanging."""
ROUNDS = 10
"""Runs with another seed, until there were enough requests: a run ends early when it has found no new one for long."""
GROWTH = 40
"""MB by which the server may grow once it has answered all kinds of requests: the first ones fill bounded caches."""

pytestmark = [pytest.mark.skipif(FOLDER is None, reason="needs BARDLET_SCHEMATHESIS"),
              pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")]


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    """Examples, boundary values, random requests of both modes, and operations in a row."""
    runs = served.train(tmp_path)
    with served.serving(runs, tmp_path / "log") as server:
        fuzz(server, tmp_path, "warm-up", max(10, CASES // 20), "all")
        answers, memory = {}, {"warm": server.memory()}
        for mode in ("positive", "negative", "again"):
            for path in (*MANY, None):
                cases = (CASES if path else CASES // 10) // (4 if mode == "again" else 1)
                answers[mode, path] = until_enough(server, tmp_path, cases, mode, path)
            memory[mode] = server.memory()
        assert server.process.poll() is None
        log = server.log.read_text()
    print("\nMB:", json.dumps(memory))
    for (mode, path), counts in answers.items():
        print(mode, path or "the others", json.dumps(counts))
    assert "internal error" not in log, log[-3000:]
    assert memory["again"] - memory["positive"] < GROWTH
    statuses = {status for counts in answers.values() for operation in counts.values() for status in operation}
    assert not {status for status in statuses if status.startswith("5")} - {"503"}, statuses


def until_enough(server: served.Server, folder: Path, cases: int, mode: str, path: str | None
                 ) -> dict[str, Counter[str]]:  # fmt: skip
    """Run schemathesis with one seed after the other until each operation has had its requests; return the answers."""
    counts: dict[str, Counter[str]] = {}
    for number in range(ROUNDS):
        name = f"{mode}-{(path or 'others').strip('/').replace('/', '-')}-{number}"
        report = fuzz(server, folder, name, cases if path else 2 * cases, mode.replace("again", "positive"), path,
                      seed=number + ROUNDS * (mode == "again"))
        for operation, statuses in report["answers"].items():
            counts.setdefault(operation, Counter()).update(statuses)
        if all(sum(counts[f"POST {each}"].values()) >= cases for each in ([path] if path else OTHERS)):
            return counts
    raise AssertionError((mode, path, counts))


def fuzz(server: served.Server, folder: Path, name: str, cases: int, mode: str,
         path: str | None = None, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Run schemathesis; return its report, with the number of answers for each operation and status.

    path: test this operation alone; None: all operations, also in a row.
    """
    assert FOLDER is not None
    config, report, answered = (folder / f"{name}.{ending}" for ending in ("toml", "json", "jsonl"))
    config.write_text(f"""
continue-on-failure = true
request-timeout = {SLOW}
generation.max-examples = {cases}
generation.allow-x00 = true
generation.database = "none"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
""", encoding="utf-8")
    models = {"/v1/completions": served.BASE, "/v1/chat/completions": served.CHAT, "/translate": served.TRANSLATOR,
              "vocabulary": served.VOCABULARY, "channels": served.CHANNELS}
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", program, "--config-file", str(config), "run", f"{server.url}/openapi.json",
               "-H", f"Authorization: Bearer {served.KEY}", "--mode", mode, "--seed", str(seed), "--workers", "4",
               "--no-color", "--no-shrink", "--report", "json", "--report-json-path", str(report),
               *(["--include-path", path, "--phases", "examples,coverage,fuzzing"] if path else [])]
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
