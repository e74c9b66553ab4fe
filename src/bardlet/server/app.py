"""The app: its layers from the outside in, and the routes that are not of the OpenAI API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from bardlet import __version__
from bardlet.errors import BardletError
from bardlet.server.errors import Refusal, error_response, public_message, too_busy
from bardlet.server.guard import Guard, Traffic
from bardlet.server.limits import Bodies
from bardlet.server.metrics import Metrics
from bardlet.server.pages import add_pages
from bardlet.server.responses import ERRORS
from bardlet.server.routes import ROUTERS
from bardlet.server.security import Sessions
from bardlet.server.settings import ServerSettings
from bardlet.server.studio.studio import Studio
from bardlet.server.validation import refusal_of

log = logging.getLogger("bardlet")


def create_app(settings: ServerSettings, models: Any) -> FastAPI:
    """Return the app. models: the registry of models that the routes use; it is closed with the app.

    app.state has `settings`, `models`, `metrics`, `sessions`, `traffic` and `studio`.
    """
    app = FastAPI(title="bardlet", version=__version__, openapi_url="/openapi.json", docs_url=None, redoc_url=None,
                  lifespan=lifespan, redirect_slashes=False)
    state = app.state
    state.settings, state.models, state.metrics = settings, models, Metrics()
    state.sessions, state.traffic = Sessions(settings.api_key), Traffic()
    state.studio = Studio(settings.runs, settings.limits.upload) if settings.runs else None
    state.metrics.watch(lambda: figure(models, "running"), lambda: figure(models, "waiting"))
    app.add_middleware(Bodies, limits=settings.limits, busy=lambda: full_queue(models))
    app.add_middleware(Guard, settings=settings, sessions=state.sessions, metrics=state.metrics, traffic=state.traffic)
    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(BardletError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_invalid_field)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_api_route("/health", health, methods=["GET"], summary="Answer if the server runs")
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response,
                      summary="Return figures in Prometheus' text format",
                      responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    for router in ROUTERS:
        app.include_router(router)
    add_pages(app)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


def figure(models: Any, name: str) -> float:
    """Return the number of running or waiting sequences of the engine; 0 before there is one."""
    return float(getattr(getattr(models, "engine", None), name, 0))


def full_queue(models: Any) -> Refusal | None:
    """Return the refusal of a request that needs a place in the engine's queue, if that is full."""
    return too_busy(models.engine.busy()) if models is not None and models.is_full() else None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the queue of the studio; close the models when the server ends."""
    studio: Studio | None = app.state.studio
    queue = asyncio.create_task(studio.live()) if studio is not None else None
    yield
    if queue is not None:
        queue.cancel()
    if close := getattr(app.state.models, "close", None):
        await asyncio.to_thread(close)


async def health() -> dict[str, str]:
    """Answer that the server runs."""
    return {"status": "ok"}


async def metrics(request: Request) -> Response:
    """Return the figures."""
    figures: Metrics = request.app.state.metrics
    return Response(figures.text(), headers={"content-type": figures.content_type})


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    """Return the response of a refusal."""
    assert isinstance(error, Refusal)
    request.app.state.metrics.refused(error.code or error.type)
    return error.response()


async def on_user_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response of an error that the user can fix, without paths of this machine."""
    return error_response(400, public_message(error, request.app.state.settings.folders))


async def on_invalid_field(request: Request, error: Exception) -> JSONResponse:
    """Return the response of a body or a query that does not fit its schema: it names the first field."""
    assert isinstance(error, RequestValidationError)
    return await on_refusal(request, refusal_of(error.errors()))


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response of an error of the framework: an unknown path or method."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = "There is no such path; GET /docs lists the paths.", "unknown_path"
    elif error.status_code == 405:
        message, code = "This path has no such method; GET /docs lists its methods.", "unknown_method"
    return error_response(error.status_code, message, code=code, headers=error.headers)


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the description of the API, with the key and the refusals of every route."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes,
                             description="An OpenAI-compatible API for models that bardlet trained.")
        components = schema.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, error in ERRORS.items():  # also of routes that declare none, such as /health
                    operation["responses"].setdefault(str(status), {"description": error["description"],
                                                                    "content": content})
                if path == "/health":
                    operation["security"] = []
        app.openapi_schema = schema
    return app.openapi_schema
