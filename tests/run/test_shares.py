"""Files that each hold some rows of tensors: any number of processes writes them, any number reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.run import shares

TENSORS = {"matrix": torch.randn(7, 5), "row": torch.randn(1, 3).bfloat16(), "vector": torch.randn(10).double(),
           "step": torch.tensor(3.0), "ids": torch.arange(12).view(4, 3), "bytes": torch.arange(9, dtype=torch.uint8)}


def cut(tensor: Tensor, rank: int, ranks: int) -> shares.Rows | None:
    """Return the rows of one of several processes; a scalar is with the first."""
    if not tensor.ndim:
        return shares.Rows(tensor, 0, 1) if rank == 0 else None
    each = -(-len(tensor) // ranks)
    return shares.Rows(tensor[rank * each : (rank + 1) * each], rank * each, len(tensor))


def written(folder: Path, ranks: int) -> list[Path]:
    """Write TENSORS as so many processes would."""
    files = []
    for rank in range(ranks):
        rows = {name: part for name, x in TENSORS.items() if (part := cut(x, rank, ranks))}
        files.append(folder / f"{rank}.safetensors")
        shares.write(files[-1], rows)
    return files


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12])
def test_rows_come_back(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and in any other cut; some processes have no rows, and pieces are smaller than a row."""
    monkeypatch.setattr(shares, "PIECE_BYTES", 16)
    saved = shares.SharedTensors(written(tmp_path, ranks))
    assert set(saved) == set(TENSORS)
    for name, x in TENSORS.items():
        assert torch.equal(saved[name], x)
        assert saved[name].dtype == x.dtype
        for first in range(len(x) if x.ndim else 0):
            for count in range(1, len(x) - first + 1):
                assert torch.equal(saved.rows(name, first, count), x[first : first + count])


def test_the_library_reads_such_a_file(tmp_path: Path) -> None:
    [path] = written(tmp_path, 1)
    for name, x in load_file(path).items():
        assert torch.equal(x, TENSORS[name])


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    saved = shares.SharedTensors(written(tmp_path, 3)[::2])
    with pytest.raises(BardletError, match="rows 3 to 7 of matrix are in no file of this checkpoint"):
        saved["matrix"]


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, 2)[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BardletError, match="damaged or truncated"):
        shares.SharedTensors([path])
