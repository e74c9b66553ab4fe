"""The routes of the studio's page. They are not part of the API that /docs describes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from bardlet.data.named import EMBEDDED, NAMED, locate
from bardlet.server.errors import Refusal
from bardlet.server.studio.commands import Selection, Training
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
async def preview(form: Selection, request: Request) -> dict[str, Any]:
    """Return what a training would read from files."""
    return await studio_of(request).preview(form)


@router.post("/plans")
async def plan(form: Training, request: Request) -> dict[str, Any]:
    """Return the plan of a training."""
    return await studio_of(request).plan(form)


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


# ---------------------------------------------------------------- runs


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
async def health(run: Name, request: Request) -> dict[str, Any]:
    """Return the doctor's findings."""
    return await studio_of(request).health(run)


@router.get("/download")
async def download(run: Name, request: Request, format: Format = "folder") -> Response:
    """Return a run as a file."""
    made = studio_of(request).download(run, format)
    path = await made.__aenter__()

    async def parts() -> AsyncIterator[bytes]:
        try:
            with open(path, "rb") as file:
                while part := await asyncio.to_thread(file.read, CHUNK):
                    yield part
        finally:
            await made.__aexit__(None, None, None)

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
