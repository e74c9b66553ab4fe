"""The start of the server: it answers /health at once, while the rest is imported. Nothing here imports FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bardlet.server.guard import Guard, Traffic
from bardlet.server.limits import Receive, Send
from bardlet.server.metrics import Metrics
from bardlet.server.security import Scope, Sessions
from bardlet.server.settings import ServerSettings

HEALTHY = b'{"status":"ok"}'


class Starting:
    """ASGI app that calls the real one as soon as it is there; before that, requests wait, and /health does not."""

    def __init__(self, settings: ServerSettings, load: Callable[[], Any], ready: Callable[[Any], None]) -> None:
        """load: returns the real app; called in a thread. ready: called with it, in a thread too."""
        self.load, self.ready = load, ready
        self.guard = Guard(health, settings=settings, sessions=Sessions(settings.api_key), metrics=Metrics(),
                           traffic=Traffic())
        self.app: Any = None
        self.error: Exception | None = None
        """The error that kept the app from loading."""
        self.failed: Callable[[], None] = lambda: None
        """Called if there is no app."""
        self.loaded = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the start and the end of the server, or a request."""
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif self.app is None and scope["type"] == "http" and scope["path"] == "/health":
            await self.guard(scope, receive, send)
        else:
            await self.loaded.wait()
            if self.app is not None:
                await self.app(scope, receive, send)

    async def lifespan(self, receive: Receive, send: Send) -> None:
        """Let the server begin, load the app, and wait for the end."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        try:
            app = await asyncio.to_thread(self.load)
        except Exception as error:
            self.error = error
            self.loaded.set()
            self.failed()
            await receive()
        else:
            async with app.router.lifespan_context(app):
                self.app = app
                self.loaded.set()
                with suppress(OSError):  # standard output is closed
                    await asyncio.to_thread(self.ready, app)
                await receive()
        await send({"type": "lifespan.shutdown.complete"})

    def stop(self) -> None:
        """End every request."""
        self.guard.traffic.stop()
        if self.app is not None:
            self.app.state.traffic.stop()


async def health(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer that the server runs."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(HEALTHY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": HEALTHY})
