"""Pages for the browser, and signing in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from bardlet.server.errors import Refusal
from bardlet.server.files import STATIC, page
from bardlet.server.security import Sessions, cookie, set_cookie

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def home() -> Response:
    """Return the studio, which first signs the browser in."""
    return page("studio.html")


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> Response:
    """Return the page of the API."""
    return page("docs.html")


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
async def static(name: str) -> Response:
    """Return a script or a style sheet."""
    if f"/static/{name}" not in STATIC:
        raise Refusal(404, "There is no such path; GET /docs lists the paths.", code="unknown_path")
    return page(name)


@router.get("/session")
async def signed_in(request: Request) -> dict[str, bool]:
    """Answer 200 to a client that is signed in. studio: this server trains, too."""
    return {"signed_in": True, "studio": request.app.state.studio is not None}


@router.post("/session", status_code=204)
async def sign_in(request: Request, token: Annotated[str, Body()] = "", key: Annotated[str, Body()] = "") -> Response:
    """Exchange the one-time token of a printed link, or the key, for a session cookie."""
    sessions: Sessions = request.app.state.sessions
    session = sessions.redeem(token) if token else sessions.sign_in(key)
    if session is None:
        reason = ("This link was used before, or it is older than 10 minutes. Sign in with the key, or start "
                  "`bardlet serve` again for a new link." if token else "The key is wrong; `bardlet serve` prints it.")
        raise Refusal(401, reason, type="authentication_error", code="invalid_token" if token else "invalid_api_key")
    return Response(status_code=204, headers={"set-cookie": set_cookie(request.scope, session)})


@router.delete("/session", status_code=204)
async def sign_out(request: Request) -> Response:
    """Sign a browser out."""
    sessions: Sessions = request.app.state.sessions
    sessions.end(cookie(request.scope) or "")
    return Response(status_code=204, headers={"set-cookie": set_cookie(request.scope, None)})


def add_pages(app: Any) -> None:
    """Add the pages to an app."""
    app.include_router(router)
