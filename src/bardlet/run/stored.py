"""Tensors of a model folder, read one after the other: no more than a few are in memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bardlet.errors import BardletError, one_line
from bardlet.runtime import manifest

MAX_HEADER_BYTES = 2**22
"""Bytes of the longest safetensors header accepted: enough for 30,000 tensors."""
MAPPED_BYTES = 2**24
"""Bytes to read of a file before it is opened again: what was read stays in memory while the file is open."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""The header's names of dtypes that matter; any other one counts as float32."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, on the CPU; each is read when it is asked for.

    Raises BardletError for a damaged file.
    """

    def __init__(self, files: Sequence[Path], dtype: torch.dtype | None = torch.float32) -> None:
        """dtype: of the tensors; None: bf16 if all files have it in bf16, otherwise fp32."""
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        dtypes = set()
        for path in files:
            with reading(path), opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = file.get_slice(name)
                    self._where[name], self._shapes[name] = path, part.get_shape()
                    dtypes.add(DTYPES.get(part.get_dtype(), torch.float32))
        self.dtype = dtype or (torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32)
        self._file: Any = None
        self._path: Path | None = None
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        path = self._where[name]
        with reading(path):
            if path != self._path or self._read > MAPPED_BYTES:
                self._file, self._path, self._read = None, path, 0  # closed before the next one is opened
                self._file = opened(path).__enter__()
            tensor: Tensor = self._file.get_tensor(name)
            self._read += tensor.nbytes
            return tensor.to(self.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def on_meta(self) -> dict[str, Tensor]:
        """Return tensors of the same shapes that take no memory."""
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in self._shapes.items()}


class reading:
    """Turn the errors of reading a file into a BardletError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (SafetensorError, OSError, ValueError)):
            raise BardletError(f"{self.path}: damaged or truncated ({one_line(error)}); copy it again, "
                               "or use another checkpoint") from None


def opened(path: Path) -> Any:
    """Open a safetensors file; the library checks the header and every offset."""
    manifest.inside(path.parent, path.name)
    with open(path, "rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise BardletError(f"{path}: damaged: it claims a header of {header:,} bytes; copy it again")
    return safe_open(path, framework="pt")
