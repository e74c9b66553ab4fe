"""Keys and values in pages, which the sequences of a model share: `PagedAttention`, Kwon et al. 2023, section 4.

A page holds PAGE positions of one sequence, for all layers. A sequence is a list of pages; sequences that begin with
the same tokens can have the same pages. In one step, each row is one token of some sequence, generated or of a prompt.
The result of a row depends on its own sequence only, bit for bit, whatever the other rows are.

Inference only. Shape suffixes: `models/layers.py`; N pages of a pool, B rows of a step, P pages a row reads, R
positions of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.config.model import ModelConfig
from bardlet.ops.linear import has_fast_embedding_bag

PAGE = 64
"""Positions of a page. Measured with 6 heads of 64 and one row of 512 positions, us per layer: pages of 16 take 77, of
32 59, of 64 and 128 48."""
EMPTY = 0
"""The page that pads the page lists of a step; it is never written."""


def page_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of keys and values for a decoder that computes in `dtype`.

    Without the fast `embedding_bag`, attention of one query is eight times faster in fp32 on a CPU.
    """
    return torch.float32 if device.type == "cpu" and not has_fast_embedding_bag(device, dtype) else dtype


class Pages:
    """The keys and values of all sequences of a model. Page EMPTY is not for use."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, number: int) -> None:
        """number: pages for use. Memory is allocated, but on a CPU the system provides it when a page is first used."""
        L, K, D = config.n_layer, config.n_kv_head, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.number = config.n_head, K, D, number
        # values are rows, keys are columns, as `embedding_bag` reads them
        self.k_LNKDR = torch.empty((L, number + 1, K, D, PAGE), dtype=dtype, device=device)
        self.v_LNKRD = torch.empty((L, number + 1, K, PAGE, D), dtype=dtype, device=device)
        self.clear(EMPTY)
        self.bags = has_fast_embedding_bag(device, dtype)

    @staticmethod
    def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return the size of a page in bytes."""
        return 2 * config.n_layer * config.n_kv_head * config.head_dim * PAGE * dtype.itemsize

    def clear(self, page: int) -> None:
        """Fill a page with zeros: a masked attention weight of 0 times an old NaN would be a NaN."""
        self.k_LNKDR[:, page], self.v_LNKRD[:, page] = 0, 0

    def copy(self, page: int, source: int, positions: int) -> None:
        """Copy the first positions of the page `source` to `page`."""
        self.k_LNKDR[:, page, ..., :positions] = self.k_LNKDR[:, source, ..., :positions]
        self.v_LNKRD[:, page, :, :positions] = self.v_LNKRD[:, source, :, :positions]


class PagedStep:
    """One more token for each row: its position, and its attention to the tokens before it.

    A row's key and value are written before any row reads: rows may be consecutive tokens of one sequence.
    """

    def __init__(self, pages: Pages, table: Sequence[Sequence[int]], position: Sequence[int]) -> None:
        """table: the pages of each row's sequence, up to that of its own position. position: if rows of similar length
        are neighbors, they are computed together."""
        self.pages, device = pages, pages.k_LNKDR.device
        self.position = torch.tensor(position, device=device)
        page_B = torch.tensor([row[at // PAGE] for row, at in zip(table, position, strict=True)], device=device)
        offset_B, kv_K = self.position % PAGE, torch.arange(pages.kv_heads, device=device)
        head_BK = page_B[:, None] * pages.kv_heads + kv_K
        self.v_slot_BK = head_BK * PAGE + offset_B[:, None]
        d_D = torch.arange(pages.head_dim, device=device)
        self.k_slot_BKD = (head_BK[..., None] * pages.head_dim + d_D) * PAGE + offset_B[:, None, None]
        self.groups, start = [], 0
        needed = [at // PAGE + 1 for at in position]
        most = max(needed)
        together = len(needed) * most <= 2 * sum(needed)  # calls cost more than a few pages that are read in vain
        for width, rows in groupby(most if together else _power_of_two(number) for number in needed):
            stop = start + len(list(rows))
            self.groups.append(_Group(pages, slice(start, stop), width, table[start:stop], self.position[start:stop]))
            start = stop
        self.k_LX, self.v_LXD = pages.k_LNKDR.flatten(1).unbind(0), pages.v_LNKRD.flatten(1, 3).unbind(0)

    def advance(self) -> None:
        """Move each row on by one token, on the same page."""
        self.position += 1
        self.v_slot_BK += 1
        self.k_slot_BKD += 1
        for group in self.groups:
            group.advance()

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        """Write each row's key and value, and return its attention output: (B, H D).

        The queries must already be divided by sqrt(D).
        """
        k_X, v_XD = self.k_LX[layer], self.v_LXD[layer]
        k_X[self.k_slot_BKD] = k_BKD.to(k_X.dtype)
        v_XD[self.v_slot_BK] = v_BKD.to(v_XD.dtype)
        q_BHD = q_BHD.to(k_X.dtype)
        outputs = [group.attend(layer, k_X, v_XD, q_BHD[group.rows]) for group in self.groups]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(v_BKD.dtype)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class _Group:
    """Consecutive rows of a step that read the same number of pages, some of them EMPTY."""

    def __init__(self, pages: Pages, rows: slice, width: int, table: Sequence[Sequence[int]],
                 position_B: Tensor) -> None:
        self.rows, self.width, self.pages = rows, width, pages
        H, K, D, device = pages.heads, pages.kv_heads, pages.head_dim, position_B.device
        padded = [[*row[:width], *[EMPTY] * (width - len(row))] for row in table]
        self.table_BP = torch.tensor(padded, device=device)
        self.position_B, self.row_B = position_B, torch.arange(len(padded), device=device)
        hidden_BR = torch.arange(width * PAGE, device=device) > position_B[:, None]
        self.mask_B1R = torch.zeros(hidden_BR.shape, dtype=pages.k_LNKDR.dtype, device=device).masked_fill_(
            hidden_BR, float("-inf")).unsqueeze(1)  # fmt: skip
        if not pages.bags:
            return
        # one bag for the scores of a page: the rows of K^T; one bag for the output of a head: the rows of V
        head_BHP = self.table_BP.int()[:, None] * K + (torch.arange(H, dtype=torch.int32) // (H // K))[:, None]
        self.k_index = (head_BHP[..., None] * D + torch.arange(D, dtype=torch.int32)).view(-1)
        self.v_index = (head_BHP[..., None] * PAGE + torch.arange(PAGE, dtype=torch.int32)).view(-1)
        bags = len(padded) * H
        self.k_start = torch.arange(0, bags * width * D, D, dtype=torch.int32)
        self.v_start = torch.arange(0, bags * width * PAGE, width * PAGE, dtype=torch.int32)

    def advance(self) -> None:
        """Show each row one more position; `position_B` is a view of the step's."""
        self.mask_B1R[self.row_B, 0, self.position_B] = 0

    def attend(self, layer: int, k_X: Tensor, v_XD: Tensor, q_BHD: Tensor) -> Tensor:
        """Return the attention output of these rows: (B, H D)."""
        if not self.pages.bags:
            return self._attend_gathered(layer, q_BHD)
        B, H, D = q_BHD.shape
        q = q_BHD.unsqueeze(2).expand(B, H, self.width, D).reshape(-1)
        score = torch.embedding_bag(k_X.view(-1, PAGE), self.k_index, self.k_start, False, 0, False, q)[0]
        weight = score.view(B, H, -1).add_(self.mask_B1R).softmax(-1).view(-1)
        return torch.embedding_bag(v_XD, self.v_index, self.v_start, False, 0, False, weight)[0].view(B, -1)

    def _attend_gathered(self, layer: int, q_BHD: Tensor) -> Tensor:
        """Return the same by PyTorch's attention, from a copy of the pages: where bags are slow."""
        k_BKSD = self.pages.k_LNKDR[layer][self.table_BP].permute(0, 2, 1, 4, 3).flatten(2, 3)
        v_BKSD = self.pages.v_LNKRD[layer][self.table_BP].transpose(1, 2).flatten(2, 3)
        y_BH1D = F.scaled_dot_product_attention(q_BHD.unsqueeze(2), k_BKSD, v_BKSD, self.mask_B1R.unsqueeze(2),
                                                enable_gqa=self.pages.heads != self.pages.kv_heads, scale=1.0)
        return y_BH1D.flatten(1)
