"""Pages, scripts and style sheets of the package's web/ folder, by name. Nothing here imports FastAPI."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

from starlette.responses import Response

TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}

STATIC = {f"/static/{name}": name for name in (
    "home.js", "session.js", "docs.js", "docs.css", "page.css", "studio.css", "charts.js", "views.js", "forward.js",
    *(f"studio/{part}.js" for part in ("app", "api", "parts", "train", "training", "runs", "write", "inside", "chat",
                                       "translate", "learn")))}
"""Files that need no key, by path. They hold no data. A path that is not here does not exist."""


@cache
def read(name: str) -> bytes:
    """Return a file of web/."""
    return (resources.files("bardlet") / "web" / name).read_bytes()


def page(name: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response with a file of web/."""
    own = {"content-type": TYPES[name.rpartition(".")[2]], "cache-control": "no-cache"}
    return Response(read(name), status, own | dict(headers or {}))
