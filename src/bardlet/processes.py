"""Rows shared by forked processes: each core has rows of its own, and nobody waits for anybody.

One token of a small model is some hundred operations on small tensors. Most of them are too small for a second core,
and between them Python runs, on one. Two threads of one process would take turns at Python; two processes do not.
What a child found comes back as lines of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch

from bardlet.errors import BardletError

Part = Callable[[], Iterator[Any]]
"""What is to be iterated over, in this process or in a child; of values that JSON has."""


def together(parts: Sequence[Part]) -> Iterator[tuple[Any, ...]]:
    """The next value of every part, step by step, None for one that has ended: as `itertools.zip_longest`.

    The first part is iterated over in this process, each other one in a child; all with one thread, this process, too,
    until the iterator is done or closed. Then no child is left.

    Raises:
        BardletError: of a part; and where a child ended without a word.
        RuntimeError: with its traceback, where anything else was raised in a child.
    """
    children: list[tuple[int, IO[str]]] = []
    with _one_thread():
        try:
            for part in parts[1:]:
                children.append(_fork(part))
            yield from itertools.zip_longest(parts[0](), *(_said(pipe) for _, pipe in children))
        finally:
            for child, pipe in children:
                pipe.close()
                os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
                os.waitpid(child, 0)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fork(part: Part) -> tuple[int, IO[str]]:
    """(number, pipe) of a child that iterates over `part`: a line for each value, an object for how it ended."""
    # the tokenizers library warns at a fork unless somebody said what it shall do
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        # since 3.12: a fork beside other threads; OpenMP's, which rest here, and are not used by a child of one thread
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        os.close(writes)
        return child, open(reads, encoding="utf-8")
    try:  # from here on in the child, which must not get any further than to the end
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends its children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        with open(writes, "w", encoding="utf-8", buffering=1) as pipe:
            try:
                for value in part():
                    pipe.write(json.dumps(value) + "\n")
                end: dict[str, str] = {}
            except BardletError as error:
                end = {"error": str(error)}
            except Exception:
                end = {"bug": traceback.format_exc()}
            pipe.write(json.dumps(end) + "\n")
    finally:
        os._exit(0)


def _said(pipe: IO[str]) -> Iterator[Any]:
    """The values that a child writes, until it says that it has ended."""
    for line in pipe:
        value = json.loads(line)
        if not isinstance(value, dict):
            yield value
            continue
        if "bug" in value:
            raise RuntimeError(f"in a process that computed a share of the rows:\n{value['bug']}")
        if "error" in value:
            raise BardletError(value["error"])
        return
    raise BardletError("a process that computed a share of the rows ended without a word: is there enough memory?")
