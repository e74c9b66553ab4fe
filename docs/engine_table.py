"""The directive that shows which engines write the same tokens, from benchmarks/results/engines.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from course import ROOT, Course, Missing

RESULTS = "benchmarks/results/engines.jsonl"


def engines(course: Course, argument: str, page: str) -> str:
    """Show a table with a row for each engine, then every first difference. Only the newest line of each pair counts.

    Raises Missing.
    """
    path = ROOT / RESULTS
    if not path.exists():
        raise Missing(f"{RESULTS} is missing: run BARDLET_ENGINES={RESULTS} make engines")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    newest = {(line["engine"], line["model"]): line for line in lines}
    return table(list(newest.values()))


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as Markdown."""
    of_engine: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        of_engine[line["engine"]].append(line)
    rows = ["| engine | models | texts with equal ids | prompts with equal tokens | of these, near ties |",
            "| --- | --- | --- | --- | --- |"]
    for engine, group in sorted(of_engine.items()):
        versions = sorted({line["version"] for line in group} - {""})
        shown = f"{engine} ({', '.join(versions)})" if versions else engine
        sums = [sum(line[name] for line in group) for name in ("texts", "prompts")]
        rows.append(f"| {shown} | {len(group)} | {sums[0]:,} | {sums[1]:,} | "
                    f"{sum(len(line['ties']) for line in group)} |")
    ties = [f"- {line['engine']}, {line['model']}: {', '.join(f'{gap:.1e}' for gap in line['ties'])}"
            for line in sorted(lines, key=lambda line: (line["engine"], line["model"])) if line["ties"]]
    rounded = [line for line in lines if "differ" in line and line["model"].startswith("gpt2")]
    if rounded:
        differ, prompts = (sum(line[name] for line in rounded) for name in ("differ", "prompts"))
        rows += ["", "llama.cpp computes the GELU of gpt2 from a table of 16-bit numbers, so it is compared with "
                 f"bardlet with the same table. From bardlet in fp32 it differs after {differ} of {prompts:,} prompts. "
                 "Each time, the two best logits are closer than 2e-3 at the first difference."]
    if ties:
        rows += ["", "Every near tie, with the difference of bardlet's two best logits there:", "", *ties]
    return "\n".join(rows)
