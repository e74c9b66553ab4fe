"""The models of a server: listed from their folders, loaded when a request names them, removed for others.

`Models` is used in the event loop's thread. torch is imported when the first model is loaded, in a worker thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet.errors import BardletError, Unsupported, is_out_of_memory
from bardlet.server import folders
from bardlet.server.errors import Refusal, internal_error, public_message
from bardlet.server.settings import ServerSettings

if TYPE_CHECKING:
    from bardlet.api.models import Model

log = logging.getLogger("bardlet")

NAMED = 10
"""Models that the message about an unknown one names."""
CACHE_SHARE = 0.25
"""Share of the memory for models that the cache of one model takes at most."""
NO_RETRY = {"x-should-retry": "false"}
"""The header that keeps the openai client from sending a request again."""


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    slot: the engine's object; None for an encoder-decoder, which translates only. size: bytes of weights and cache.
    users: requests that use it, so that it stays. used: time of the last use. defaults: sampling options of its folder.
    """

    name: str
    folder: Path
    model: Model
    slot: Any
    size: int
    stamp: tuple[Any, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    users: int = 0
    used: float = 0.0

    @property
    def window(self) -> int:
        """Tokens of the context window."""
        return int(self.model.module.config.block_size)

    def public(self, error: BaseException) -> str:
        """Return an error's message with the model's name in place of its folder."""
        return public_message(BardletError(str(error).replace(str(self.folder), self.name)), [str(self.folder)])


class Models:
    """The registry of a server's models."""

    def __init__(self, roots: Sequence[str], settings: ServerSettings, engine: Any = None) -> None:
        """roots: folders of models, or folders with models below them. engine: for tests, in place of the real one."""
        self.roots, self.settings, self._engine = tuple(roots), settings, engine
        self._folders: dict[str, Path] = {}
        self._loaded: dict[Path, Loaded] = {}
        self._loading: dict[Path, asyncio.Task[Loaded]] = {}
        self._one_load = asyncio.Lock()

    # ---------------------------------------------------------------- listing

    def names(self) -> list[str]:
        """Return the names of all models, sorted; the folders are listed anew."""
        self._folders = folders.find(self.roots)
        return sorted(name for name, folder in self._folders.items() if not folders.is_reward_model(folder))

    def folders(self) -> dict[str, Path]:
        """Return the folder of each model, by name."""
        return {name: self._folders[name] for name in self.names()}

    def card(self, name: str) -> dict[str, Any]:
        """Return a model as /v1/models describes it. Refuse an unknown name."""
        folder = self._known(name) or self._listed(name, self.names())
        return {"id": name, "object": "model", "created": folders.created(folder), "owned_by": "bardlet",
                "max_model_len": folders.context(folder), "has_chat_template": folders.has_chat_template(folder),
                "translates": folders.translates(folder)}

    def cards(self) -> list[dict[str, Any]]:
        """Return the cards of all models."""
        return [self.card(name) for name in self.names()]

    @property
    def engine(self) -> Any:
        """The inference engine; None until a model is loaded."""
        return self._engine

    @property
    def running(self) -> int:
        """Sequences that generate now."""
        return 0 if self._engine is None else int(self._engine.running)

    @property
    def waiting(self) -> int:
        """Sequences in the engine's queue."""
        return 0 if self._engine is None else int(self._engine.waiting)

    def is_full(self) -> bool:
        """Return True if the engine's queue has no room for a single sequence."""
        return self._engine is not None and self.waiting >= self.settings.max_waiting

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory."""
        return [model.name for model in self._loaded.values()]

    # ---------------------------------------------------------------- loading

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Loaded]:
        """Load a model if necessary, and keep it in memory for the `async with` block."""
        loaded = await self.get(name)
        while self._loaded.get(loaded.folder) is not loaded:  # removed since it was loaded
            loaded = await self.get(name)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()

    async def get(self, name: str) -> Loaded:
        """Return a model, loaded in a worker thread; requests for the same one share the load.

        Raises:
            Refusal: no such model (404), one that cannot generate (400), no memory now (503), a damaged folder (500).
        """
        folder = self._known(name) or self._listed(name, await asyncio.to_thread(self.names))
        loaded = self._loaded.get(folder)
        if loaded and not (self._is_idle(loaded) and loaded.stamp != folders.stamp(folder)):
            loaded.name, loaded.used = name, time.monotonic()
            return loaded
        task = self._loading.get(folder)
        if task is None:
            task = self._loading[folder] = asyncio.create_task(self._load(name, folder))
            task.add_done_callback(lambda done: self._finished(folder, done))
        return await asyncio.shield(task)  # a client that leaves does not stop the load for others

    def close(self) -> None:
        """End all sequences and the inference thread."""
        if self._engine is not None:
            self._engine.close()

    def _known(self, name: str) -> Path | None:
        """Return the folder of a model, if it is known and still there."""
        folder = self._folders.get(name)
        return folder if folder is not None and folders.is_model(folder) else None

    def _listed(self, name: str, names: Sequence[str]) -> Path:
        """Return the folder of a model after a new listing. Refuse an unknown name, and say which names exist."""
        if (folder := self._folders.get(name)) is not None:
            return folder
        shown = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
        short = name if len(name) <= 80 else f"{name[:77]}..."
        raise Refusal(404, f"the model '{short}' does not exist; " + (
            f"the models here: {shown}" if names else "there are no models yet; train one with `bardlet train`"),
            param="model", code="model_not_found")

    def _finished(self, folder: Path, task: asyncio.Task[Loaded]) -> None:
        del self._loading[folder]
        if not task.cancelled():
            task.exception()  # asyncio warns of an exception that nobody fetched; all clients may have left

    async def _load(self, name: str, folder: Path) -> Loaded:
        """Load a model, or load it anew, after others have made room for it."""
        if folders.is_reward_model(folder):
            raise Refusal(400, f"{name}: a reward model, which scores texts and cannot write any; name a language "
                          "model", param="model", code="model_not_supported")
        async with self._one_load:
            old = self._loaded.get(folder)
            stamp = folders.stamp(folder)
            if old:
                try:
                    return await self._load_into_memory(name, folder, stamp)
                except Refusal as refusal:  # a checkpoint may be replaced while it is read
                    log.warning("%s: not loaded anew: %s", name, refusal)
                    old.stamp = stamp
                    return old
            return await self._load_into_memory(name, folder, stamp)

    async def _load_into_memory(self, name: str, folder: Path, stamp: tuple[Any, ...]) -> Loaded:
        self._make_room(folders.weight_bytes(folder), folder)
        model = await asyncio.to_thread(self._read, name, folder)
        cache = self._cache_bytes(model.module)
        size = await asyncio.to_thread(self._weight_bytes, model) + cache
        self._make_room(size, folder)
        if (old := self._loaded.get(folder)) and not self._remove(old):
            return old  # a request came for it meanwhile
        slot = await asyncio.to_thread(self._add, name, folder, model, cache)
        loaded = Loaded(name, folder, model, slot, size, stamp, sampling_defaults(folder), used=time.monotonic())
        self._loaded[folder] = loaded
        return loaded

    def _read(self, name: str, folder: Path) -> Model:
        """Read a model from its folder. Runs in a worker thread, and imports torch."""
        from bardlet.server import loading

        if folders.weight_bytes(folder) == 0 and (folder / "run.toml").is_file():
            raise _later(f"{name}: its training has not saved a checkpoint yet", "model_not_ready", 30)
        try:
            if self._engine is None:
                from bardlet.inference.engine import Engine

                self._engine = Engine(max_waiting=self.settings.max_waiting, max_rows=self.settings.max_rows)
            return loading.read(folder, self.settings.device, self.settings.dtype)
        except Exception as error:
            raise self._refusal(name, folder, error) from error

    def _weight_bytes(self, model: Model) -> int:
        """Return the bytes of a model's weights here. Runs in a worker thread: it may compile the decoding step."""
        from bardlet.server import loading

        return loading.weight_bytes(model)

    def _add(self, name: str, folder: Path, model: Model, cache: int) -> Any:
        """Make a model ready for the engine; an encoder-decoder needs no place there. Runs in a worker thread."""
        from bardlet.server import loading

        try:
            encdec = model.module.config.model == "encdec"
            return None if encdec else loading.add(self._engine, model, cache)
        except Exception as error:
            raise self._refusal(name, folder, error) from error

    def _refusal(self, name: str, folder: Path, error: Exception) -> Refusal:
        """Return the refusal for an error while loading, without paths."""
        if isinstance(error, Refusal):
            return error
        if is_out_of_memory(error):
            return _later(f"{name}: not enough memory to load it now", "out_of_memory", 10)
        if not isinstance(error, BardletError):
            return internal_error(error)
        message = public_message(BardletError(str(error).replace(str(folder), name)), [str(folder)])
        if isinstance(error, Unsupported):
            return Refusal(400, message, param="model", code="model_not_supported")
        refusal = Refusal(500, message, type="server_error", param="model", code="model_not_loadable")
        refusal.headers = dict(NO_RETRY)
        return refusal

    # ---------------------------------------------------------------- memory

    def _is_idle(self, loaded: Loaded) -> bool:
        return loaded.users == 0 and (loaded.slot is None or self._engine.idle(loaded.slot))

    def _remove(self, loaded: Loaded) -> bool:
        """Remove a model from memory; return False if it is in use."""
        if not self._is_idle(loaded) or (loaded.slot is not None and not self._engine.remove(loaded.slot)):
            return False
        del self._loaded[loaded.folder]
        return True

    def _make_room(self, size: int, folder: Path) -> None:
        """Remove the least recently used idle models until `size` bytes fit beside the rest."""
        budget = self.settings.memory_gb * 1e9
        if size > budget:
            refusal = Refusal(503, f"the model needs {size / 1e9:.1f} GB, more than the {self.settings.memory_gb:g} GB "
                              "of --memory; start the server with more", type="server_error", param="model",
                              code="model_too_large")
            refusal.headers = dict(NO_RETRY)
            raise refusal
        others = sorted((model for model in self._loaded.values() if model.folder != folder), key=lambda m: m.used)
        used = sum(model.size for model in others)
        for model in others:
            if used + size <= budget:
                return
            if self._remove(model):
                used -= model.size
        if used + size > budget:
            raise _later("other models are in use and take all the memory", "models_busy", 5)

    def _cache_bytes(self, module: Any) -> int:
        """Return the memory for keys and values: of `max_rows` whole windows, or a share of all, or one window."""
        config = module.config
        window = 2 * 4 * config.n_layer * max(config.n_kv_head, 1) * max(config.head_dim, 1) * config.block_size
        share = int(self.settings.memory_gb * 1e9 * CACHE_SHARE)
        return max(window, min(window * self.settings.max_rows, share))


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return temperature, top_k and top_p of a folder's generation_config.json, without values out of range."""
    values = folders.generation_config(folder)
    valid = {"temperature": lambda x: 0 <= x <= 100, "top_p": lambda x: 0 < x <= 1,
             "top_k": lambda x: type(x) is int and 0 < x < 2**31}  # fmt: skip
    return {name: values[name] for name, is_valid in valid.items()
            if type(values.get(name)) in (int, float) and is_valid(values[name])}


def _later(message: str, code: str, seconds: int) -> Refusal:
    """Return a refusal that says when to try again."""
    refusal = Refusal(503, f"{message}; try again later", type="server_error", param="model", code=code)
    refusal.headers = {"Retry-After": str(seconds)}
    return refusal
