"""The API with a fake engine: a plugin of the tests that name it.

A second conftest.py would hide the first one from `import conftest`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from small_server import BPE, LETTERS, app_of, chat_tokenizer, registry, write


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a model of each kind."""
    root = tmp_path_factory.mktemp("models")
    write(root / "bytes", vocab_size=270)
    write(root / "letters", LETTERS)
    write(root / "chat", chat_tokenizer())
    write(root / "deep" / "bpe", BPE)
    write(root / "translator", BPE, "encdec", n_encoder_layer=1)
    return root


@pytest.fixture(scope="session")
def session_client(root: Path) -> Iterator[TestClient]:
    """One app for all tests, so that models are loaded once."""
    engine = FakeEngine()
    with TestClient(app_of(registry(root, engine))) as client:
        client.engine = engine
        yield client
    engine.close()


@pytest.fixture
def client(session_client: TestClient) -> Iterator[TestClient]:
    """The app; its engine is `client.engine`, with all settings as at the start."""
    engine = session_client.engine
    engine.script, engine.error, engine.infinite = (lambda request: [104, 105]), None, False
    engine.late = engine.busy = engine.stuck = False
    engine.after = 0
    engine.handles.clear()
    yield session_client
    engine.resume()
