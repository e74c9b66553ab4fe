"""Row 2 of the issue's deliverables: a corpus is prepared in memory that does not grow with it.

Each case runs in a process of its own, which reports how far its peak grew over what the imports took.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

DATA = os.environ.get("BARDLET_DATA")

CHILD = """
import json, resource, sys, time
from pathlib import Path
from bardlet.data import corpus, shards

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

before, start = peak(), time.monotonic()
made = shards.tokenize_corpus(corpus.find([sys.argv[1]]), sys.argv[2], cache=Path(sys.argv[3]))
seconds, tokens, documents = time.monotonic() - start, len(made.train) + len(made.val), made.documents
print(json.dumps({"grown_mib": peak() - before, "seconds": seconds, "tokens": tokens, "documents": documents,
                  "chars": made.train_chars + made.val_chars, "kind": made.tokenizer.kind}))
"""


def measure(what: str, kind: str, cache: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what, kind, str(cache)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason="BARDLET_DATA names no folder of data sets")
def test_64_mb_of_novels(tmp_path):
    """63 million characters, 99 documents of up to a few MB: what is in memory is a novel and the BPE trainer."""
    found = measure("eltec-eng", "auto", tmp_path)
    assert found["documents"] == 99 and found["kind"] == "bpe" and found["chars"] > 63_000_000
    assert found["tokens"] < found["chars"] / 4
    assert found["grown_mib"] < 250


@pytest.mark.parametrize("kind", ["auto", "byte", "char"])
def test_one_line_of_50_mb(tmp_path, kind):
    """A document is in memory as bytes and as text while it is read; its tokens and offsets never are."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(20_000)]
    path = tmp_path / "line.txt"
    path.write_text(" ".join(rng.choices(words, k=10_000_000))[:50_000_000])
    found = measure(str(path), kind, tmp_path / "cache")
    assert found["chars"] == 50_000_000 and found["documents"] == 1
    assert found["grown_mib"] < 300


def test_one_line_of_50_mb_without_a_space(tmp_path):
    """The worst there is for BPE: no place to cut, no word twice."""
    path = tmp_path / "line.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50_000_000)))
    found = measure(str(path), "auto", tmp_path / "cache")
    assert found["kind"] == "bpe" and found["chars"] == 50_000_000
    assert found["grown_mib"] < 800
