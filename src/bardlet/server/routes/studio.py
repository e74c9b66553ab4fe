"""The routes of the studio's page. They are not part of the API that /docs describes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from bardlet.data.named import EMBEDDED, NAMED, locate
from bardlet.server import lessons
from bardlet.server.errors import Refusal
from bardlet.server.reply import Answer, Context, Reply
from bardlet.server.studio.commands import Climb, Selection, Training
from bardlet.server.studio.studio import Format, Studio
from bardlet.server.validation import Route

router = APIRouter(route_class=Route, include_in_schema=False, prefix="/studio")
CHUNK = 1 << 20
"""Bytes of a download that are read at once."""

Name = Annotated[str, Query(max_length=500)]


def studio_of(request: Request) -> Studio:
    """Return the studio of the server. Refuse if it has none."""
    studio: Studio | None = request.app.state.studio
    if studio is None:
        raise Refusal(404, "This server only serves models. To train in the browser, start `bardlet serve` without a "
                      "folder, or with a folder of runs.", code="no_studio")
    return studio


def _answer(request: Request, work: Callable[[Studio], Awaitable[dict[str, Any]]]) -> Answer:
    """Return the response of work that takes time, and ends if the client leaves."""
    studio, state = studio_of(request), request.app.state

    async def send(reply: Reply) -> None:
        await reply.json(await work(studio))

    return Answer(send, Context(float(state.settings.timeout), state.metrics))


# ---------------------------------------------------------------- training


@router.get("/files")
async def files(request: Request) -> dict[str, Any]:
    """List the stored files and the named texts."""
    stored = await asyncio.to_thread(studio_of(request).files.all)
    return {"files": [asdict(file) for file in stored], "corpora": await asyncio.to_thread(corpora)}


def corpora() -> dict[str, str]:
    """Return the named texts that are here or can be downloaded, with their descriptions."""
    return {name: each.description for name, each in NAMED.items()
            if each.url or name == EMBEDDED or locate(name)}


@router.post("/files", status_code=201)
async def upload(request: Request, name: Name = "text.txt") -> dict[str, Any]:
    """Store the body of the request as a file."""
    return asdict(await studio_of(request).files.receive(name, request.stream()))


@router.post("/previews")
async def preview(form: Selection, request: Request) -> Any:
    """Return what a training would read from files."""
    return _answer(request, lambda studio: studio.preview(form))


@router.post("/plans")
async def plan(form: Training, request: Request) -> Any:
    """Return the plan of a training."""
    return _answer(request, lambda studio: studio.plan(form))


@router.get("/jobs")
async def jobs(request: Request) -> dict[str, Any]:
    """List the jobs. has_run: the run folder is there; before that, the text is read."""
    studio = studio_of(request)
    listed = await asyncio.to_thread(studio.jobs.all)
    return {"jobs": [job.as_json() | {"has_run": studio.runs.has(job.run)} for job in listed[:200]]}


@router.post("/jobs", status_code=201)
async def start(form: Training, request: Request) -> dict[str, Any]:
    """Queue a training."""
    return (await asyncio.to_thread(studio_of(request).start, form)).as_json()


@router.get("/jobs/{job}/log")
async def log(job: str, request: Request) -> dict[str, str]:
    """Return the end of what a job printed."""
    return {"log": await asyncio.to_thread(studio_of(request).jobs.log, job)}


@router.post("/jobs/{job}/stop")
async def stop(job: str, request: Request) -> dict[str, Any]:
    """Stop a job."""
    return (await asyncio.to_thread(studio_of(request).jobs.stop, job)).as_json()


# ---------------------------------------------------------------- lessons


@router.get("/lessons")
async def overview(request: Request) -> dict[str, Any]:
    """List the rungs of the ladder, with the newest run of each."""
    table = await asyncio.to_thread(studio_of(request).runs.table)
    return {"rungs": await asyncio.to_thread(lessons.overview, table)}


@router.get("/lessons/{number}")
async def lesson(number: int, request: Request) -> dict[str, Any]:
    """Return the lesson of a rung."""
    studio_of(request)
    return await asyncio.to_thread(lessons.lesson, number)


@router.post("/ladder", status_code=201)
async def climb(form: Climb, request: Request) -> dict[str, Any]:
    """Queue a ladder."""
    return (await asyncio.to_thread(studio_of(request).climb, form)).as_json()


# ---------------------------------------------------------------- runs


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """List the served models with their folders and the names of their runs: both may have several parts."""
    studio, served = studio_of(request), request.app.state.models
    return {"models": await asyncio.to_thread(lambda: studio.name_models(served.folders()))}


@router.get("/runs")
async def runs(request: Request) -> dict[str, Any]:
    """List the runs, and those that were deleted."""
    studio = studio_of(request)
    return {"runs": await asyncio.to_thread(studio.runs.table),
            "deleted": await asyncio.to_thread(studio.runs.deleted)}


@router.get("/progress")
async def progress(run: Name, request: Request, version: int | None = None) -> dict[str, Any]:
    """Return the curve of a run."""
    return await asyncio.to_thread(studio_of(request).runs.progress, run, version)


@router.get("/details")
async def details(run: Name, request: Request) -> dict[str, Any]:
    """Return the settings and results of a run."""
    return await asyncio.to_thread(studio_of(request).runs.details, run)


@router.get("/health")
async def health(run: Name, request: Request) -> Any:
    """Return the doctor's findings."""
    return _answer(request, lambda studio: studio.health(run))


@router.post("/downloads", status_code=201)
async def pack(run: Name, request: Request, format: Format = "folder") -> Any:
    """Make a file of a run."""
    return _answer(request, lambda studio: studio.pack(run, format))


@router.get("/downloads/{id}")
async def download(id: str, request: Request) -> Response:
    """Return a file that was made, once."""
    path = await asyncio.to_thread(studio_of(request).packed, id)

    async def parts() -> AsyncIterator[bytes]:
        try:
            with open(path, "rb") as file:
                while part := await asyncio.to_thread(file.read, CHUNK):
                    yield part
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)  # not awaited: a client that leaves cancels this

    return StreamingResponse(parts(), headers={
        "content-disposition": f"attachment; filename*=UTF-8''{quote(path.name)}",
        "content-length": str(path.stat().st_size), "content-type": "application/octet-stream"})


@router.post("/runs/resume", status_code=201)
async def resume(run: Name, request: Request) -> dict[str, Any]:
    """Queue that a stopped run goes on."""
    return (await asyncio.to_thread(studio_of(request).resume, run)).as_json()


@router.post("/runs/delete")
async def delete(run: Name, request: Request) -> dict[str, str]:
    """Move a run to the trash."""
    return {"deleted": await asyncio.to_thread(studio_of(request).runs.delete, run)}


@router.post("/runs/restore")
async def restore(deleted: Name, request: Request) -> dict[str, str]:
    """Bring a deleted run back."""
    return {"name": await asyncio.to_thread(studio_of(request).runs.restore, deleted)}
