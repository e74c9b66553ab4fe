"""Files of safetensors that each hold some rows of tensors: what one process of a shared model saves.

The header's metadata says which rows of which whole tensor a file has, so any number of processes can read them again.
Files are written and read in pieces: safetensors' own writer, and PyTorch's DCP, which calls it, copy a file's tensors
twice before they write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.run import stored

PIECE_BYTES = 1 << 24
"""Bytes that are copied to the CPU and written at a time."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.uint8: "U8"}
"""The header's names of dtypes."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: all with `first` 0 and `total` their number. A scalar counts as one row."""

    tensor: Tensor
    first: int
    total: int


def write(path: Path, rows: Mapping[str, Rows]) -> None:
    """Write rows of tensors to a new file, without flushing it."""
    held = {name: each for name, each in rows.items() if each.tensor.numel()}
    known = json.dumps({name: [each.first, each.total] for name, each in held.items()})
    write_whole(path, {name: each.tensor for name, each in held.items()},
                (each.tensor for each in held.values()), {"rows": known})


def write_whole(path: Path, tensors: Mapping[str, Tensor], pieces: Iterable[Tensor],
                metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a new file, without flushing it.

    Args:
        tensors: their names, shapes and dtypes; the numbers are those of `pieces`.
        pieces: the numbers of all tensors in their order, in pieces of any size.
        metadata: entries of the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.writelines(_parts(text, pieces))


def _parts(header: bytes, pieces: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file in parts."""
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        for part in flat.split(max(1, PIECE_BYTES // flat.itemsize)):
            yield memoryview(part.cpu().contiguous().view(torch.uint8).numpy())


class SharedTensors(Mapping[str, Tensor]):
    """The tensors of several files of rows, whole or in part, on the CPU; each is read when it is asked for.

    Raises BardletError for a damaged file, and for rows that are in no file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._where: dict[str, list[tuple[int, int, Path]]] = {}
        self._totals: dict[str, int] = {}
        for path in files:
            with stored.reading(path), stored.opened(path) as file:
                for name, (first, total) in json.loads((file.metadata() or {})["rows"]).items():
                    shape = file.get_slice(name).get_shape()
                    self._where.setdefault(name, []).append((int(first), int(first) + (shape[0] if shape else 1), path))
                    self._totals[name] = int(total)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self._totals[name])

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` rows of a tensor from row `first` on; a scalar has one."""
        parts, position = [], first
        for start, end, path in sorted(self._where[name]):
            if start <= position < min(end, first + count):
                stop = min(end, first + count)
                with stored.reading(path), stored.opened(path) as file:
                    part = file.get_slice(name)
                    parts.append(part[position - start : stop - start].clone() if part.get_shape()
                                 else file.get_tensor(name).clone())
                position = stop
        if position < first + count:
            raise BardletError(f"rows {position} to {first + count} of {name} are in no file of this checkpoint; use "
                               "another one")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
