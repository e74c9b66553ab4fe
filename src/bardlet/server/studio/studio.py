"""The studio of a server: its files, jobs and runs, and the commands behind its routes."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from bardlet.server.errors import Refusal, public_message
from bardlet.server.studio import processes
from bardlet.server.studio.commands import Climb, Selection, Training, arguments, file_names, run_name, shown
from bardlet.server.studio.files import Files
from bardlet.server.studio.jobs import Job, Jobs
from bardlet.server.studio.runs import Runs

Format = Literal["folder", "gguf", "html"]
LADDER = "ladder-tinyshakespeare"
"""The folder of the tab Learn's ladder, as `bardlet ladder` names it."""
PREVIEW_SECONDS, PLAN_SECONDS, DOCTOR_SECONDS, EXPORT_SECONDS = 120, 300, 120, 600
DOWNLOAD, DOWNLOAD_SECONDS = re.compile(r"[0-9a-f]{16}"), 3600
"""The id of a packed file, and the time after which it is deleted if nobody fetched it."""
LEFT_OUT = ("checkpoints", ".lock", ".holder")
"""Parts of a run folder that a download leaves out: checkpoints are most of it, and only `resume` needs them."""


class Studio:
    """The files, jobs and runs below one folder."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        """most_bytes: of an uploaded file."""
        hidden = root / ".studio"
        self.root, self.hidden, self.directory = root, hidden, Path.cwd()
        self.downloads = hidden / "downloads"
        self.files = Files(hidden / "files", most_bytes)
        self.jobs, self.runs = Jobs(hidden / "jobs", self.directory), Runs(root, hidden)
        self._one_plan, self._naming = asyncio.Lock(), Lock()

    # ---------------------------------------------------------------- training

    async def preview(self, form: Selection) -> dict[str, Any]:
        """Return what a training would read from files, and the notices about what it leaves out."""
        words = ["data", "show", *await asyncio.to_thread(file_names, form, self._file), "--kind", form.kind]
        output = await processes.run(words, self.directory, PREVIEW_SECONDS, self._folders)
        inside = self._shown(self.hidden / "files") + os.sep
        notes = [public_message(ValueError(note.removeprefix("note: ").replace(inside, "")), self._folders)
                 for note in output.notes]
        return {"command": shown(words), "notes": notes, **output.value}

    async def plan(self, form: Training) -> dict[str, Any]:
        """Return the plan of a form: lines of text, reasons, forecast, and the command line."""
        words = await asyncio.to_thread(self._named, form)
        async with self._one_plan:
            output = await processes.run([*words, "--plan"], self.directory, PLAN_SECONDS, self._folders)
        return {"command": shown(words), "lines": output.lines, "notes": output.notes, "plan": output.value}

    def start(self, form: Training) -> Job:
        """Queue a training."""
        with self._naming:  # two that come at once get two names
            words = self._named(form)
            return self.jobs.add(words, Path(words[-1]).name, form.kind)

    def climb(self, form: Climb) -> Job:
        """Queue a ladder. It continues the one that is there."""
        waiting = (job for job in self.jobs.all() if job.kind == "ladder" and job.state in ("waiting", "running"))
        if any(waiting):
            raise Refusal(409, "A ladder is in the queue already.", code="in_use")
        words = ["ladder", "--rungs", form.rungs, "--out", self._shown(self.root / LADDER)]
        return self.jobs.add(words, LADDER, "ladder")

    def resume(self, name: str) -> Job:
        """Queue that a stopped run goes on."""
        folder = self.runs.folder(name)
        if any(job.run == name and job.state in ("waiting", "running") for job in self.jobs.all()):
            raise Refusal(409, f"{name} is in the queue already.", code="in_use")
        if self.runs.row(folder)["state"] != "stopped":
            raise Refusal(409, f"{name} is not a stopped run.", code="not_stopped")
        return self.jobs.add(["resume", self._shown(folder)], name, "resume")

    def _named(self, form: Training) -> list[str]:
        """Return the command line of a form; it ends with the run folder."""
        words = arguments(form, self._file, lambda name: self._shown(self.runs.folder(name)))
        waiting = {job.run for job in self.jobs.all() if job.state in ("waiting", "running")}
        name = run_name(form, lambda name: self.runs.exists(name) or name in waiting)
        return [*words, "--out", self._shown(self.root / name)]

    def _file(self, name: str) -> str:
        """Return the path of a stored file, for a command line."""
        return self._shown(self.files.path(name))

    @property
    def _folders(self) -> tuple[str, ...]:
        return (str(self.root), str(self.hidden / "files"))

    def _shown(self, path: Path) -> str:
        """Return a path as the working directory of the commands sees it, and never as an option of a command."""
        relative = os.path.relpath(path, self.directory)
        return f"./{relative}" if relative.startswith("-") else relative

    # ---------------------------------------------------------------- runs

    def name_models(self, served: Mapping[str, Path]) -> list[dict[str, Any]]:
        """Return for each served model its name, its folder for commands, and the name of its run, if it is one.

        served: the folder of each model, by name.
        """
        root = self.root.resolve()
        return [{"id": name, "folder": self._shown(folder),
                 "run": folder.relative_to(root).as_posix() if folder.is_relative_to(root) else None}
                for name, folder in served.items()]

    async def health(self, name: str) -> dict[str, Any]:
        """Return the findings of the doctor."""
        words = ["doctor", self._shown(await asyncio.to_thread(self.runs.folder, name))]
        output = await processes.run(words, self.directory, DOCTOR_SECONDS, self._folders)
        return {"command": shown(words), **output.value}

    async def pack(self, name: str, format: Format) -> dict[str, Any]:
        """Make a file of a run: a zip archive of its folder, or an export. Return its id and name, for `packed`."""
        folder = await asyncio.to_thread(self.runs.folder, name)
        await asyncio.to_thread(self._forget_downloads)
        target = self.downloads / secrets.token_hex(8)
        target.mkdir(parents=True)
        try:
            if format == "folder":
                path = target / f"{folder.name}.zip"
                await asyncio.to_thread(_pack, folder, path)
            else:
                path = target / f"{folder.name}.{format}"
                words = ["export", self._shown(folder), "--to", format, "--out", self._shown(path)]
                await processes.run(words, self.directory, EXPORT_SECONDS, self._folders)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return {"id": target.name, "name": path.name, "bytes": path.stat().st_size}

    def packed(self, id: str) -> Path:
        """Return the file that `pack` made. Refuse an id that none has."""
        folder = self.downloads / id
        files = list(folder.iterdir()) if DOWNLOAD.fullmatch(id) and folder.is_dir() else []
        if len(files) != 1:
            raise Refusal(404, "This file is gone; ask for it again.", code="file_not_found")
        return files[0]

    def _forget_downloads(self, seconds: float = DOWNLOAD_SECONDS) -> None:
        """Delete the files that nobody fetched."""
        for folder in self.downloads.glob("*"):
            with suppress(OSError):
                if folder.stat().st_mtime <= time.time() - seconds:
                    shutil.rmtree(folder, ignore_errors=True)

    # ---------------------------------------------------------------- life

    async def live(self) -> None:
        """Run the queue, as long as the server runs."""
        await asyncio.to_thread(self.runs.empty_trash)
        await asyncio.to_thread(self._forget_downloads, 0)
        await self.jobs.run()


def _pack(folder: Path, target: Path) -> None:
    """Write a folder as an uncompressed zip archive: weights do not get smaller."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if path.is_file() and not path.is_symlink() and parts[0] not in LEFT_OUT:
                archive.write(path, "/".join((folder.name, *parts)))
