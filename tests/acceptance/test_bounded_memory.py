"""Tokenizing a corpus needs memory that does not grow with the corpus (row 2 of the issue's deliverables).

Each case runs in its own process, which reports the growth of its peak memory after the imports.
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
dataset = shards.tokenize_corpus(corpus.find([sys.argv[1]]), sys.argv[2], cache=Path(sys.argv[3]))
seconds, tokens, documents = time.monotonic() - start, len(dataset.train) + len(dataset.val), dataset.documents
print(json.dumps({"grown_mib": peak() - before, "seconds": seconds, "tokens": tokens, "documents": documents,
                  "chars": dataset.train_chars + dataset.val_chars, "kind": dataset.tokenizer.kind}))
"""


def measure(text: str, kind: str, cache: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, text, kind, str(cache)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason="BARDLET_DATA is not a folder")
def test_64_mb_of_novels(tmp_path):
    """63 million characters in 99 documents of up to a few MB: memory contains one novel and the BPE trainer."""
    result = measure("eltec-eng", "auto", tmp_path)
    assert result["documents"] == 99 and result["kind"] == "bpe" and result["chars"] > 63_000_000
    assert result["tokens"] < result["chars"] / 4
    assert result["grown_mib"] < 250


@pytest.mark.parametrize("kind", ["auto", "byte", "char"])
def test_one_line_of_50_mb(tmp_path, kind):
    """Memory contains the document as bytes and as text while it is read, but never all its tokens and offsets."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(20_000)]
    path = tmp_path / "line.txt"
    path.write_text(" ".join(rng.choices(words, k=10_000_000))[:50_000_000])
    result = measure(str(path), kind, tmp_path / "cache")
    assert result["chars"] == 50_000_000 and result["documents"] == 1
    assert result["grown_mib"] < 300


def test_one_line_of_50_mb_without_a_space(tmp_path):
    """The worst case for BPE: no word boundaries and no repeated words."""
    path = tmp_path / "line.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50_000_000)))
    result = measure(str(path), "auto", tmp_path / "cache")
    assert result["kind"] == "bpe" and result["chars"] == 50_000_000
    assert result["grown_mib"] < 800
