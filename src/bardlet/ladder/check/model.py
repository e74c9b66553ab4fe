"""Tests of a whole language model: shapes, causality, the loss, positions, gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.check.attention import FUSED, NEAR, attentions
from bardlet.ladder.check.build import LENGTHS, Model, Untestable
from bardlet.ladder.check.load import raised
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.modules import OPAQUE, class_of, leak
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.check.trace import Node, Trace, trace

B = int(SIZES["batch_size"])
MASKING = ("masked_fill", "masked_fill_", "where", "mul", "mul_", "add", "add_", "expand", FUSED)
"""Operations that fail if a mask has another length than the scores."""
LEAKS = {"mask-side", "mask-missing", "mask-after-softmax", "mask-diagonal", "softmax-axis", "heads-view"}
"""Mistakes that also let the future leak."""


def fit(model: Model) -> None:
    """Use a shorter context if the file fixes its block_size to the lecture's 8, and fewer tokens if it has fewer."""
    record, _ = _tried(model)
    rows = _rows(record)
    if rows and rows not in SIZES.values():  # of the table of tokens, or of that of positions
        usual, model.vocab = model.vocab, min(model.vocab, rows)
        record, V = _tried(model)
        if _rows(record) == rows or V not in (0, rows):
            model.vocab = usual
    if _rows(record) or has_fixed_mask(record):
        model.longest, model.short = LENGTHS[1]


def _tried(model: Model) -> tuple[Trace, int]:
    """Return the record of a model's longest context, and the number of its logits; 0 if it fails."""
    with torch.no_grad(), trace() as record, suppress(Exception):
        return record, model.logits(model.ids(B, model.longest, seed=1)).shape[-1]
    return record, 0


def _rows(record: Trace) -> int:
    """Return the length of the table in which an index was too high; 0 if no table failed."""
    failure = record.failure
    if failure is None or not failure.index or failure.name not in ("embedding", "__getitem__"):
        return 0
    tables = [shape for shape in failure.shapes if len(shape) == 2]
    return tables[-1 if failure.name == "embedding" else 0][0] if tables else LENGTHS[0][0]


def has_fixed_mask(record: Trace) -> bool:
    """Return True if the operation that failed got a square mask that is as long as none of check's sizes."""
    failure = record.failure
    if failure is None or failure.name not in MASKING:
        return False
    sides = [shape[-1] for shape in failure.shapes if len(shape) >= 2 and shape[-1] == shape[-2]]
    return any(side not in (*SIZES.values(), *LENGTHS[0]) and side >= LENGTHS[1][0] for side in sides)


def run_once(name: str, model: Model, length: int, own: set[type]) -> tuple[Trace, Tensor | None, list[Finding]]:
    """Run a model on random tokens; return the record, the logits, and a finding if its mask does not fit.

    Raises:
        Untestable: it fails for another reason.
    """
    with torch.no_grad(), trace() as record:
        try:
            logits = model.logits(model.ids(B, length, seed=1))
        except Untestable:
            raise
        except Exception as error:
            if record.failure and mask_failed(record, length):
                where = class_of(record.failure.modules, own) or name
                detail = f"a context of {length} tokens, block_size is {model.longest}"
                return record, None, [Finding("tril-length", where, detail)]
            raise Untestable(f"its forward raises {raised(error)}") from None
    return record, logits, []


def mask_failed(record: Trace, length: int) -> bool:
    """Return True if the operation that failed got scores of `length` positions and a square mask of another size."""
    failure = record.failure
    if failure is None or failure.name not in MASKING:
        return False
    scores = any(shape[-2:] == (length, length) for shape in failure.shapes)
    masks = any(len(shape) >= 2 and shape[-1] == shape[-2] != length for shape in failure.shapes)
    return (scores and masks) or (failure.name == FUSED and masks)


def leak_findings(name: str, model: Model, known: set[str]) -> list[Finding]:
    """Return where the future leaks, unless a known mistake explains it."""
    if known & LEAKS or "encoder" in name.lower():
        return []

    def change(idx: Tensor, position: int) -> Tensor:
        idx = idx.clone()
        idx[:, position] = (idx[:, position] + min(7, model.vocab - 1)) % model.vocab
        return idx

    with torch.no_grad(), trace() as record:
        found = leak(model.logits, model.ids(B, model.short, seed=2), change)
    return [Finding(leak_name(record), name, found)] if found else []


def leak_name(record: Trace) -> str:
    """Return the mistake behind a leak: that of the mask of PyTorch's own attention, else unknown."""
    for node in record.nodes:
        mask = node.kwargs.get("attn_mask") if node.name in OPAQUE else None
        if isinstance(mask, Node) and mask.value.dim() == 2:
            hidden = mask.value if mask.value.dtype == torch.bool else mask.value < -1e4
            if hidden.tril(-1).any() and not hidden.triu(1).any():
                return "mask-side"
    return "mask-missing" if is_opaque(record) else "leak"


def is_opaque(record: Trace) -> bool:
    """Return True if a record has attention as one operation."""
    return any(node.name in OPAQUE for node in record.nodes)


# ---------------------------------------------------------------------------------- the loss


def loss_findings(name: str, model: Model) -> tuple[list[Finding], str]:
    """Compare the model's loss with the cross-entropy of its logits; name the mistake that gives its value.

    Returns the findings, and why the loss is not tested; empty if it is.
    """
    idx, y = model.ids(B, model.short, seed=3), model.ids(B, model.short, seed=4)
    with torch.no_grad(), trace() as record:
        try:
            logits = model.logits(idx)
            answer = model(idx, y)
        except Untestable as error:
            return [], str(error)
        except Exception as error:
            failure = record.failure
            if failure and failure.name in ("cross_entropy", "nll_loss"):
                return [Finding("loss-axis", name)], ""
            raise Untestable(f"its loss raises {raised(error)}") from None
    if answer.loss is None:
        return [], "it returns none with targets"
    compared = compare(float(answer.loss), logits, idx, y)
    model.shifts, model.own_loss = compared.shifts, not compared.unknown
    return compared.findings(name), compared.unknown


def own_loss_findings(name: str, model: Model) -> list[Finding]:
    """Name the mistake of a model that makes its targets from its inputs: each token as its own target."""
    idx = model.ids(B, model.short, seed=3)
    with torch.no_grad():
        answer = model(idx)
    if answer.loss is None or answer.logits is None or answer.logits.shape[:2] != idx.shape:
        return []
    if abs(float(answer.loss) - float(_entropy(answer.logits, idx))) < 1e-4:
        return [Finding("targets-not-shifted", name, "the loss compares with the inputs")]
    return []


@dataclass(frozen=True)
class Compared:
    """A loss in comparison with the cross-entropy.

    mistake: its name and detail, None if there is none; shifts: True if the loss shifts the targets itself; unknown:
    why it cannot be compared.
    """

    mistake: tuple[str, str] | None = None
    shifts: bool = False
    unknown: str = ""

    def findings(self, where: str) -> list[Finding]:
        """Return the mistake as a finding."""
        return [Finding(self.mistake[0], where, self.mistake[1])] if self.mistake else []


def compare(loss: float, logits: Tensor, idx: Tensor, y: Tensor) -> Compared:
    """Compare a loss with those of right models and of known mistakes."""
    if loss != loss:
        return Compared(("not-a-number", "the loss"))
    if _is_probability(logits) and abs(loss - float(_entropy(logits.clamp_min(1e-9).log(), y))) > 1e-3:
        return Compared(("softmax-before-loss", ""))
    right = list(_right(logits, idx, y))
    for shifts, value in right:
        if abs(loss - value) < 1e-4 * max(1, value):
            return Compared(shifts=shifts)
    for mistake, detail, value in _wrong(logits, idx, y):
        if abs(loss - value) < 1e-4 * max(1, abs(value)):
            return Compared((mistake, detail))
    return Compared(unknown=f"it is {loss:.4f}, the mean cross-entropy {right[0][1]:.4f}; check "
                            "cannot compare one with ignore_index, label_smoothing, weights or other terms")


def _entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def _is_probability(logits: Tensor) -> bool:
    return bool((logits >= 0).all() and ((logits.sum(-1) - 1).abs() < 1e-4).all())


def _right(logits: Tensor, idx: Tensor, y: Tensor) -> Iterator[tuple[bool, float]]:
    """Yield the losses of right models, and whether such a model shifts the targets itself."""
    yield False, float(_entropy(logits, y))
    yield True, float(_entropy(logits[:, :-1], y[:, 1:]))
    yield True, float(_entropy(logits[:, :-1], idx[:, 1:]))


def _wrong(logits: Tensor, idx: Tensor, y: Tensor) -> Iterator[tuple[str, str, float]]:
    """Yield mistakes with the loss that each would give."""
    rows, length, V = logits.shape
    yield "softmax-before-loss", "", float(_entropy(logits.softmax(-1), y))
    yield "targets-not-shifted", "the loss compares with the inputs", float(_entropy(logits, idx))
    yield "loss-axis", "", float(F.cross_entropy(logits.reshape(rows, V, length), y))
    yield "loss-axis", "", float(_entropy(logits.transpose(1, 2).reshape(-1, V), y))
    yield "loss-axis", "", float(_entropy(logits, y.T))
    for dim in (0, 1):
        yield "loss-axis", "", float(-logits.log_softmax(dim).gather(-1, y[..., None]).mean())
    flat = logits.reshape(-1, V).log_softmax(0)
    yield "loss-axis", "", float(-flat.gather(-1, y.reshape(-1, 1)).mean())
    yield "wrong-loss", "it is the sum over all positions", float(_entropy(logits, y)) * rows * length
    yield "wrong-loss", "it is that of the last position alone", float(_entropy(logits[:, -1], y[:, -1]))


def start_findings(name: str, model: Model) -> list[Finding]:
    """Return a finding if the loss at the start is far above ln V, before the weights are stirred."""
    with torch.no_grad():
        idx, y = model.ids(B, model.short, seed=5), model.ids(B, model.short, seed=6)
        logits = model.logits(idx)
    loss = float(_entropy(logits, y))
    usual = math.log(logits.shape[-1])
    if loss > usual + 3:
        return [Finding("start-loss", name, f"{loss:.1f}, not near ln({logits.shape[-1]}) = {usual:.1f}")]
    return []


# ---------------------------------------------------------------------------------- positions


def position_findings(name: str, model: Model) -> list[Finding]:
    """Give the model one token everywhere: scores and logits that are alike at all positions know no position."""
    with torch.no_grad(), trace() as record:
        logits = model.logits(torch.full((1, model.short), min(7, model.vocab - 1)))
    found = [each for each in attentions(record) if each.is_self and each.scores is not None and each.head_size]
    inputs = [node.parents[0].value for node in record.nodes if node.name in OPAQUE and node.parents]
    if not found and not inputs:
        return []
    if not all(_alike(_product(each.scores)) for each in found if each.scores is not None):
        return []
    if not all(_alike(x.reshape(-1, x.shape[-1]).T) for x in inputs):
        return []
    alike = bool((logits - logits[:, :1]).abs().max() < NEAR * max(1.0, float(logits.abs().max())))
    return [Finding("no-positions" if alike else "positions-after", name)]


def _product(scores: Tensor) -> Tensor:
    """Return the scores of the last query, which a causal mask leaves whole; of the first, if it hides them."""
    flat = scores.reshape(-1, *scores.shape[-2:])
    last, first = flat[:, -1], flat[:, 0]
    visible = last.isfinite() & (last > -1e4)
    return last if visible.float().mean() > 0.5 else first


def _alike(row: Tensor) -> bool:
    return bool((row - row[:, :1]).abs().max() < NEAR * max(1.0, float(row.abs().max())))


# ---------------------------------------------------------------------------------- gradients


def gradient_findings(name: str, model: Model) -> list[Finding]:
    """Return the weights that no gradient reaches, and a model whose output does not depend on its input."""
    idx, y = model.ids(B, model.longest, seed=7), model.ids(B, model.longest, seed=8)
    model.module.zero_grad(set_to_none=True)
    logits = model.logits(idx)
    if (logits - logits[:1, :1]).abs().max() < 1e-6:
        return [Finding("same-output", name, "all logits are alike")]
    if not logits.requires_grad:
        return [Finding("dead-parameter", name, "any parameter: the logits have no gradient")]
    _entropy(logits, y).backward()
    return dead_parameters(name, model.module)


def dead_parameters(name: str, module: nn.Module) -> list[Finding]:
    """Return the weights that a backward pass does not reach, and matrices whose gradient is 0 everywhere.

    (The gradient of a key's bias is 0 by its nature.)
    """
    dead = [key for key, parameter in module.named_parameters() if parameter.requires_grad
            and (parameter.grad is None or (parameter.dim() >= 2 and not parameter.grad.abs().max() > 0))]
    if not dead:
        return []
    more = f" and {len(dead) - 2} more" if len(dead) > 2 else ""
    return [Finding("dead-parameter", name, ", ".join(dead[:2]) + more)]
