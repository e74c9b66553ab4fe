"""Small trained models of each kind, and processes of `bardlet serve` for them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bardlet.cli import main

KEY = "a-key-of-the-tests"
WINDOW, CHANNELS, VOCABULARY = 128, 32, 300
BASE, LETTERS, CHAT, TRANSLATOR = "verses", "letters", "chat", "translator"
WORDS = ["the", "bards", "of", "a", "village", "sang", "about", "rivers", "and", "kings", "while", "small", "birds",
         "sat", "on", "old", "gates", "and", "rain", "fell", "on", "naïve", "cafés"]


def train(parent: Path) -> Path:
    """Train a model of BPE, one of characters, one that chats, and a translator; return the folder of their folders."""
    rng, runs = random.Random(0), parent / "runs"
    verses = "".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + ".\n" for _ in range(1500))
    chats = [{"messages": [{"role": "user", "content": f"How many birds on day {n}?"},
                           {"role": "assistant", "content": f"{n} birds."}]} for n in range(60)]
    sides = [" ".join(rng.choices(["ein", "hund", "rennt", "im", "park", "und", "ruht"], k=6)) for _ in range(300)]
    text, pairs = write(parent / "verses.txt", verses), write(parent / "pairs.de", "\n".join(sides) + "\n")
    rows = write(parent / "chats.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats))
    shape = ("--n-layer", 2, "--n-embd", CHANNELS, "--n-head", 2, "--block-size", WINDOW, "--batch-size", 8,
             "--compile", "off", "--dtype", "fp32")
    run("train", text, "--out", runs / BASE, "--tokenizer", "bpe", "--vocab-size", VOCABULARY, "--model", "qwen3",
        "--steps", 60, *shape)
    run("train", text, "--out", runs / LETTERS, "--tokenizer", "char", "--model", "gpt2", "--steps", 20, *shape)
    run("sft", runs / BASE, rows, "--out", runs / CHAT, "--steps", 20, "--compile", "off", "--dtype", "fp32")
    run("train", "--source", pairs, "--target", pairs, "--out", runs / TRANSLATOR, "--n-layer", 1, "--n-head", 2,
        "--n-embd", CHANNELS, "--vocab-size", 280, "--batch-tokens", 256, "--steps", 4, "--compile", "off")
    return runs


def write(path: Path, text: str) -> Path:
    """Write a file and return its path."""
    path.write_text(text, encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    """Run a command of bardlet."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


@dataclass
class Server:
    """A process of the server."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    link: str = ""

    def memory(self) -> float:
        """Return its resident memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000


@contextmanager
def serving(folder: Path, log: Path, *options: object, cwd: Path | None = None) -> Iterator[Server]:
    """Run `bardlet serve` for the models in a folder, with KEY."""
    command = [sys.executable, "-m", "bardlet", "serve", str(folder), "--port", "0", "--json", *map(str, options)]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   cwd=cwd, env={**os.environ, "BARDLET_API_KEY": KEY})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-3000:]
        facts = json.loads(line)
        yield Server(facts["url"], process, log, facts["link"])
    finally:
        process.kill()
        process.communicate()
