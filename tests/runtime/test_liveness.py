"""Heartbeats: who watches whom, how many messages that takes, and patience with a process that computes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import HANGS

from bardlet.runtime import heartbeat
from bardlet.runtime.signals import signals


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


def test_a_closed_connection_shortens_the_patience(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """After an error of a collective, a silent process on another machine is named within ten seconds."""
    hearts = [heartbeat.Heartbeat(rank, 2) for rank in range(2)]
    beat(hearts, world)
    world.store.words[f"{hearts.pop(1).prefix}/1"] = "77 elsewhere 3"
    hearts[0].error = True
    for _ in range(10):
        beat(hearts, world)
    assert "process 1 of 2 (pid 77 on elsewhere) has been silent for" in capsys.readouterr().err
    assert not hearts


def test_a_call_that_never_returns(world: Any, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is cut: the thread that reads the store waits for hours, and another one names process 0."""
    left, forever = threading.Event(), threading.Event()
    heart = heartbeat.Heartbeat(1, 2)
    world.store.words[f"{heart.prefix}/0"] = "77 elsewhere 3"
    heart.check_peers()

    def check(keys: list[str]) -> bool:
        world.now += heartbeat.FROZEN_SECONDS  # no more: it is not this process that was suspended
        forever.wait(HANGS)
        return False

    def leave(code: int) -> None:
        left.set()
        forever.wait(HANGS)

    monkeypatch.setattr(world.store, "check", check)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 4.0)
    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    heart.start()
    assert left.wait(HANGS)
    for event in (heart.ended, heart.closed, forever):
        event.set()
    heart.join(HANGS)
    named = "process 0 of 2 (pid 77 on elsewhere), or its launcher, has been silent for 5 s: killed, stopped or"
    assert named in capsys.readouterr().err


def test_launchers_that_count_differently_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes get an id that entries of an earlier start lack."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(server.port)), ("GROUP_WORLD_SIZE", "3"),
                        ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(heartbeat, "_agreed", [])
    ids = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            started = [threads.submit(heartbeat.agree, rank, 3, timedelta(seconds=HANGS)) for rank in (2, 0, 1)]
            [common] = {each.result() for each in started}
        ids.append(common)
        assert heartbeat.attempt() == common
    assert len(set(ids)) == 2


def test_a_run_is_found_by_its_name_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """On several machines: the launcher of one may have been started anew, at another address."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def launch(name: str, port: str, *argv: str) -> str:
        monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setattr(sys, "argv", ["bardlet", "train", *argv])
        return heartbeat.launch()

    assert launch("mine", "1", "text") == launch("mine", "2", "text")
    assert len({launch("mine", "1", "text"), launch("yours", "1", "text"), launch("mine", "1", "text", "--steps", "9"),
                launch("none", "1", "text"), launch("none", "2", "text")}) == 5
    assert heartbeat.restarted()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert not heartbeat.restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert heartbeat.restarted()


@pytest.mark.parametrize(("torchrun", "number", "acts"), [
    (True, signal.SIGTERM, False), (False, signal.SIGTERM, True), (True, signal.SIGINT, True),
])  # fmt: skip
def test_a_second_signal(torchrun: bool, number: int, acts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts at once. Not SIGTERM under torchrun: Slurm and torchrun may each send one, and the run must be saved."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    if not torchrun:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with signals() as request:
        handler = signal.getsignal(number)
        assert callable(handler)
        for _ in range(2):
            handler(number, None)
    assert request.number == number
    assert raised == [number] * acts


def test_a_store_that_is_gone_is_left_alone(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call would print a warning of PyTorch, until a line that names the process is lost among them."""
    heart, calls = heartbeat.Heartbeat(1, 2), []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise RuntimeError("Connection was likely closed")

    for name in ("set", "check", "get"):
        monkeypatch.setattr(world.store, name, fail)
    with pytest.raises(Gone):
        for _ in range(20):
            world.now += 1
            heart.beat()
            heart.check_peers()
    assert len(calls) == 1
