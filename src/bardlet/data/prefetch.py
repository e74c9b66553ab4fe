"""Read a corpus in a thread while the main thread imports PyTorch, which takes as long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from bardlet.data import corpus
from bardlet.data.corpus import Corpus
from bardlet.data.named import NAMED, locate

Key = tuple[tuple[str, ...], str, str, str | None]
_reading: dict[Key, Future[Corpus]] = {}


@contextlib.contextmanager
def reading(text: Sequence[str], field: str, separator: str, normalize: str | None) -> Iterator[None]:
    """Read a corpus whose files are all on this machine for the next `find` with the same arguments in this context.

    A corpus that nothing asked for is forgotten at the end: later, its files may have changed.
    """
    if not text or any(locate(name) is None if name in NAMED else not Path(name).exists() for name in text):
        yield
        return
    key = tuple(text), field, separator, normalize
    future = _reading[key] = Future()
    # a daemon: Ctrl-C need not wait for the end of a long text
    threading.Thread(target=_read, args=(future, text, field, separator, normalize), daemon=True).start()
    try:
        yield
    finally:
        _reading.pop(key, None)


def _read(future: Future[Corpus], text: Sequence[str], field: str, separator: str, normalize: str | None) -> None:
    try:
        source = corpus.find(text, field, separator=separator, normalize=normalize)
        _ = source.store
        future.set_result(source)
    except BaseException as error:  # `find` raises it
        future.set_exception(error)


def find(text: Sequence[str], field: str, separator: str, normalize: str | None) -> Corpus:
    """Return `corpus.find(...)`, read already in the context of `reading`. Raise what reading it raised."""
    future = _reading.pop((tuple(text), field, separator, normalize), None)
    if future is not None:
        return future.result()
    return corpus.find(text, field, separator=separator, normalize=normalize)
