"""Heartbeats: who watches whom, how many messages that takes, and patience with a process that computes."""

from __future__ import annotations

import os
import socket
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from bardlet.runtime import heartbeat


class Store:
    """A store in memory that counts its messages."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.messages: Counter[str] = Counter()

    def set(self, key: str, word: str) -> None:
        self.messages["set"] += 1
        self.words[key] = word

    def check(self, keys: list[str]) -> bool:
        self.messages["check"] += 1
        return all(key in self.words for key in keys)

    def get(self, key: str) -> bytes:
        self.messages["get"] += 1
        return self.words[key].encode()


class Gone(Exception):
    """A process that has exited."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A store, a clock, and what the processes say when they leave."""
    shared = SimpleNamespace(store=Store(), now=100.0, left=[])

    def leave(code: int) -> None:
        shared.left.append(code)
        raise Gone

    monkeypatch.setattr(heartbeat, "store", lambda timeout: shared.store)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: shared.now, sleep=lambda seconds: None))
    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    return shared


def beat(hearts: list[heartbeat.Heartbeat], world: Any, seconds: float = 1.0) -> None:
    """Let a second pass for these processes; those that leave are removed."""
    world.now += seconds
    for heart in list(hearts):
        heart.beat()
        try:
            heart.check_peers()
        except Gone:
            hearts.remove(heart)


@pytest.mark.parametrize("ranks", [4, 32])
def test_messages_are_linear_in_the_ranks(ranks: int, world: Any) -> None:
    """A second of n processes takes at most 8 n messages."""
    hearts = [heartbeat.Heartbeat(rank, ranks) for rank in range(ranks)]
    beat(hearts, world)
    world.store.messages.clear()
    beat(hearts, world)
    assert sum(world.store.messages.values()) <= 8 * ranks
    assert not world.left


def test_all_name_the_lost_process(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 2 of 4 falls silent on another machine: within 30 seconds rank 0 says so, and the others repeat it."""
    hearts = [heartbeat.Heartbeat(rank, 4) for rank in range(4)]
    beat(hearts, world)
    world.store.words[f"{hearts[2].prefix}/2"] = "77 elsewhere 3"
    hearts.pop(2)
    for _ in range(30):
        beat(hearts, world)
    lines = [line for line in capsys.readouterr().err.splitlines() if "process 2 of 4 (pid 77 on elsewhere)" in line]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert not hearts


def test_the_others_notice_a_lost_rank_0(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hearts = [heartbeat.Heartbeat(rank, 3) for rank in range(3)]
    beat(hearts, world)
    world.store.words[f"{hearts.pop(0).prefix}/0"] = "77 elsewhere 3"
    for _ in range(29):
        beat(hearts, world)
    err = capsys.readouterr().err
    assert "process 0 of 3 (pid 77 on elsewhere) has been silent for" in err


@pytest.mark.parametrize("works", [True, False])
def test_a_process_that_computes_is_not_lost(works: bool, world: Any, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that holds Python's lock keeps it from sending, but its processor time grows."""
    ticks = iter(range(1000))
    monkeypatch.setattr(heartbeat, "_stat", lambda pid: ["R", "1", *["0"] * 9, str(next(ticks) if works else 5), "0"])
    hearts = [heartbeat.Heartbeat(rank, 2) for rank in range(2)]
    beat(hearts, world)
    world.store.words[f"{hearts.pop(1).prefix}/1"] = f"{os.getpid()} {socket.gethostname()} 3"
    for _ in range(40):
        beat(hearts, world)
    assert bool(world.left) == (not works)
    assert ("has been silent for" in capsys.readouterr().err) == (not works)
