"""A softmax that is written out is a softmax: the same tests, the same mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bardlet.ladder.check.mistakes import MISTAKES
from ladder.check.attempts import report

HEAD = """
import torch
import torch.nn as nn

class Head(nn.Module):
    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        s = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        keep = self.tril[:T, :T]
        {lines}
        return w @ v
"""
MASK = 's = s.masked_fill(keep == 0, float("-inf"))'
MAXIMUM = "s = s - s.max(dim=-1, keepdim=True).values"
SUM = "w = w / w.sum(dim=-1, keepdim=True)"


def head(*lines: str) -> str:
    """Return a head whose weights these lines compute from the scores s and the mask keep."""
    return HEAD.replace("{lines}", "\n        ".join(lines))


RIGHT = {
    "masked-scores": (MASK, "w = torch.exp(s - s.max())", SUM),
    "maximum-of-rows": (MASK, MAXIMUM, "w = s.exp()", SUM),
    "product-with-the-mask": ("w = torch.exp(s - s.max()) * keep", SUM),
    "mask-on-the-exponentials": ("w = torch.exp(s).masked_fill(keep == 0, 0)", SUM),
    "tril-of-the-exponentials": ("w = torch.tril(s.exp())", SUM),
    "where": ("w = torch.where(keep.bool(), s.exp(), torch.zeros_like(s))", SUM),
    "assigned": ("w = s.exp()", "w[:, keep == 0] = 0", SUM),
    "in-place": (MASK, "w = s.exp_()", "w /= w.sum(-1, keepdim=True)"),
    "unsqueezed": (MASK, "w = s.exp()", "w = w / w.sum(-1).unsqueeze(-1)"),
    "twice-the-exponential": (MASK, "w = s.exp() / s.exp().sum(-1, keepdim=True)"),
    "a-small-number": ("w = s.exp() * keep", "w = w / (w.sum(-1, keepdim=True) + 1e-9)"),
    "an-inverse": (MASK, "w = s.exp()", "w = w * (1 / w.sum(-1, keepdim=True))"),
    "log-softmax": (MASK, "w = torch.log_softmax(s, dim=-1).exp()"),
    "logsumexp": (MASK, "w = (s - s.logsumexp(-1, keepdim=True)).exp()"),
    "after-the-values": (MASK, "w = s.exp()", "return (w @ v) / w.sum(-1, keepdim=True)"),
    "masked-again": (MASK, "w = torch.exp(s)", SUM, "w = w * keep", SUM),
}
WRONG = {
    "no-scale": ("no-scale", ("s = q @ k.transpose(-2, -1)", MASK, MAXIMUM, "w = s.exp()", SUM)),
    "scale-n-embd": ("scale-n-embd", ("s = q @ k.transpose(-2, -1) / C ** 0.5", "w = s.exp() * keep", SUM)),
    "axis": ("softmax-axis", (MASK, "w = s.exp()", "w = w / w.sum(dim=-2, keepdim=True)")),
    "batch-axis": ("softmax-axis", (MASK, "w = s.exp()", "w = w / w.sum(dim=0, keepdim=True)")),
    "whole-sum": ("softmax-axis", (MASK, "w = s.exp()", "w = w / w.sum()")),
    "no-keepdim": ("softmax-axis", (MASK, "w = s.exp()", "w = w / w.sum(-1)[:, None]")),
    "log-softmax-axis": ("softmax-axis", (MASK, "w = torch.log_softmax(s, dim=1).exp()")),
    "no-mask": ("mask-missing", ("w = s.exp()", SUM)),
    "other-side": ("mask-side", ("w = s.exp() * keep.T", SUM)),
    "zeros-as-scores": ("mask-missing", ("s = s * keep", "w = s.exp()", SUM)),
    "mask-after": ("mask-after-softmax", ("w = s.exp()", SUM, "w = w * keep")),
    "mask-between": ("mask-after-softmax", ("w = s.exp()", "w = (w * keep) / w.sum(-1, keepdim=True)")),
    "off-by-one": ("mask-diagonal", ("w = s.exp().tril(1)", SUM)),
    "no-sum": ("no-sum", (MASK, "w = s.exp()")),
    "no-sum-of-masked": ("no-sum", ("w = s.exp() * keep",)),
}


@pytest.mark.parametrize("lines", RIGHT.values(), ids=RIGHT)
def test_a_right_one_is_attention(lines: tuple[str, ...], tmp_path: Path) -> None:
    """No finding, and the head counts as one of rung 3."""
    found = report(head(*lines), tmp_path)
    assert [finding.sentence() for finding in found.findings] == [] and not found.untested
    assert "attention" in found.passed["Head"] and found.rung == 3


@pytest.mark.parametrize(("name", "lines"), WRONG.values(), ids=WRONG)
def test_a_mistake_has_its_name(name: str, lines: tuple[str, ...], tmp_path: Path) -> None:
    """And no other finding."""
    found = report(head(*lines), tmp_path)
    assert [finding.name for finding in found.findings] == [name], found
    assert name in MISTAKES
