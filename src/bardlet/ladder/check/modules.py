"""Tests of layers: attention, blocks with their residual path and norms, the feed-forward layer, lists of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.ladder.check.attention import NEAR, Attention, attentions
from bardlet.ladder.check.build import tensors
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.check.trace import Trace, Visit

ACTIVATIONS = ("relu", "relu_", "gelu", "silu", "leaky_relu", "tanh", "elu", "sigmoid", "mish", "hardswish", "celu",
               "selu", "softplus", "relu6", "clamp", "maximum", "erf", "glu", "threshold", "swish", "clamp_min")
OPAQUE = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd", "_native_multi_head_attention")
"""Attention as one operation, whose weights the record does not show."""
BIDIRECTIONAL = ("encoder", "cross", "bidirectional", "bert")
"""Parts of the name of a class whose attention need not be causal; "decoder" overrides them."""


def class_of(modules: tuple[nn.Module, ...], own: set[type]) -> str:
    """Return the innermost class of the file among modules."""
    return next((type(module).__name__ for module in reversed(modules) if type(module) in own), "")


def is_causal(modules: tuple[nn.Module, ...], own: set[type]) -> bool:
    """Return True if an attention within these modules has to hide the future."""
    names = [type(module).__name__.lower() for module in modules if type(module) in own]
    return not any(word in name and "decoder" not in name for name in names for word in BIDIRECTIONAL)


# ---------------------------------------------------------------------------------- attention


def attention_findings(trace: Trace, own: set[type], masked_outside: bool = False) -> list[Finding]:
    """Return the mistakes of every attention in a forward pass."""
    findings: dict[Finding, None] = {}
    for attention in attentions(trace):
        where = class_of(attention.modules, own) or "the model"
        causal = attention.is_self and is_causal(attention.modules, own) and not masked_outside
        for name, detail in _mistakes(attention, causal):
            findings[Finding(name, where, detail)] = None
    return list(findings)


def _mistakes(attention: Attention, causal: bool) -> Iterator[tuple[str, str]]:
    if attention.mixed:
        yield "heads-view", ""
    scale = _scale(attention)
    if scale:
        yield scale
    rows = attention.weights.sum(-1)
    if not attention.summed:
        yield "no-sum", ""
    if not attention.axis_ok:
        yield "softmax-axis", ""
    elif causal and (mask := _mask(attention)):
        yield mask
    elif attention.summed and (rows - 1).abs().max() > 1e-3 and not torch.isnan(rows).any():
        hidden = (attention.weights == 0) & (attention.softmax > 0)
        if hidden.any():
            yield "mask-after-softmax", ""


def _scale(attention: Attention) -> tuple[str, str] | None:
    """Return the mistake of the scale, if it is known."""
    factor, size, channels = attention.factor, attention.head_size, attention.channels
    if factor is None or not size or abs(factor - size**-0.5) < NEAR:
        return None
    if attention.modules and any("norm" in type(each).__name__.lower() for each in attention.modules[-1].children()):
        return None  # normed queries and keys have a scale of their own
    if abs(factor - 1) < NEAR:
        return "no-scale", f"here sqrt({size})"
    if channels and channels != size and abs(factor - channels**-0.5) < NEAR:
        return "scale-n-embd", f"here sqrt({channels}), not of the head size, sqrt({size})"
    return "wrong-scale", f"{factor:.4g} instead of 1/sqrt({size}) = {size**-0.5:.4g}"


def _mask(attention: Attention) -> tuple[str, str] | None:
    """Return the mistake of a mask that should hide the future."""
    seen = attention.seen()
    T = len(seen)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    flat = attention.softmax.reshape(-1, T, T)
    before = (flat.nan_to_num(0).abs() > 1e-9).any(0)
    later = attention.summed and attention.weights.shape == attention.softmax.shape
    if later and before[future].all() and not seen[future].any():
        rows = attention.weights.sum(-1)
        return ("mask-after-softmax", "") if (rows - 1).abs().max() > 1e-3 else None
    past = future.T
    if not seen[future].any():
        if not seen.diagonal().any():
            return "mask-diagonal", "a position does not see itself"
        return None
    if not seen[past].any():
        return "mask-side", ""
    if seen.diagonal(1).all() and not seen.triu(2).any():
        return "mask-diagonal", "position 0 sees position 1"
    query, key = (int(each) for each in (seen & future).nonzero()[0])
    return "mask-missing", f"position {query} sees position {key}"


# ---------------------------------------------------------------------------------- causality


def leak(outputs: Callable[[Tensor], Tensor], x: Tensor, change: Callable[[Tensor, int], Tensor]) -> str:
    """Return a pair of positions between which the future leaks, as a sentence; empty if there is none.

    outputs: maps an input (B, T, ...) to outputs (B, T, ...); change: returns x with other values at a position. Each
    row of the batch changes another position.
    """
    T = x.shape[1]
    with torch.no_grad():
        before = outputs(x[:1].repeat(T - 1, *[1] * (x.dim() - 1)))
        after = outputs(torch.cat([change(x[:1], position) for position in range(1, T)]))
    moved = (after - before).abs().amax(-1) > 1e-4 * before.abs().max().clamp_min(1e-6)
    for later in range(T - 1, 0, -1):
        if moved[later - 1, :later].any():
            return f"position {int(moved[later - 1, :later].nonzero()[0])} changes when position {later} does"
    return ""


def changed(x: Tensor, position: int) -> Tensor:
    """Return activations with other values at one position."""
    x = x.clone()
    x[:, position] = torch.randn(x[:, position].shape, generator=torch.Generator().manual_seed(position))
    return x


# ---------------------------------------------------------------------------------- blocks


def blocks(trace: Trace) -> list[Visit]:
    """Return the calls of blocks: the smallest modules that hold both an attention and a feed-forward layer.

    A block maps activations to activations of the same shape. An activation function tells its feed-forward layer from
    the projection of the heads.
    """
    attending = [each.modules for each in attentions(trace)]
    attending += [node.modules for node in trace.nodes if node.name in OPAQUE]
    computing = [node.modules for node in trace.nodes if node.name in ACTIVATIONS]
    found: list[Visit] = []
    for visit in trace.visits:
        has_both = all(any(any(module is visit.module for module in modules) for modules in lists)
                       for lists in (attending, computing))
        inside = any(any(other.module is each for each in visit.module.modules()) for other in found)
        same_shape = (visit.output is not None and len(visit.inputs) > 0
                      and visit.inputs[0].value.is_floating_point()
                      and visit.inputs[0].value.shape == visit.output.value.shape)
        if has_both and same_shape and not inside and not isinstance(visit.module, nn.ModuleList | nn.Sequential):
            found.append(visit)
    return found


def block_findings(visits: list[Visit], own: set[type], norm: bool = True) -> list[Finding]:
    """Return the mistakes of the residual path, one for each class. norm: False if norms come later in the lecture.

    With every layer set to zero, a block returns its input: x + 0. A norm on the path returns the normed input, and
    x + x + 0 a multiple. A norm of a layer's output does not, but then no norm reads the block's input.
    """
    findings: dict[str, Finding] = {}
    for visit in visits:
        name = type(visit.module).__name__
        encoder = not is_causal((visit.module,), {type(visit.module)})
        if name in findings or type(visit.module) not in own:
            continue
        x = visit.inputs[0].value
        try:
            out, other = _silenced(visit.module, visit.args[1:], x, x.flip(0) + 1)
        except Exception:  # it needs an argument that came by keyword
            continue
        encoder = encoder or (len(visit.inputs) > 1 and visit.inputs[1].value.dim() == 3)
        if (out - x).abs().max() < NEAR:
            if norm and not encoder and not _norms_first(visit.module, visit.args[1:], x):
                findings[name] = Finding("post-norm", name)
            continue
        if (out - other).abs().max() < NEAR:
            findings[name] = Finding("no-residual", name, "with all its layers at zero, the input is lost")
        elif (times := _multiple(out, x)) is not None:  # a factor of its own choice, such as 0.7, is no mistake
            if round(times) > 1 and abs(times - round(times)) < NEAR:
                detail = f"with all its layers at zero, it returns {round(times)} x"
                findings[name] = Finding("double-residual", name, detail)
        elif norm and not encoder and (_normed(out) - _normed(x)).abs().max() < 0.05:
            findings[name] = Finding("post-norm", name)
    return list(findings.values())


def _multiple(out: Tensor, x: Tensor) -> float | None:
    """Return the number by which a block multiplies its input; None if it does not multiply alone."""
    times = float((out * x).sum() / x.square().sum())
    return times if (out - times * x).abs().max() < NEAR * max(1.0, times) * float(x.abs().max()) else None


def _norms_first(block: nn.Module, others: tuple[Any, ...], x: Tensor) -> bool:
    """Return True if a norm of the block reads the block's input, or if the block has none."""
    read: list[Tensor] = []
    norms = [module for module in block.modules() if _is_norm(module)]
    hooks = [module.register_forward_hook(lambda module, args, out: read.append(args[0])) for module in norms]
    try:
        with torch.no_grad():
            block(x.clone(), *others)
    finally:
        for hook in hooks:
            hook.remove()
    return not read or any(each.shape == x.shape and torch.equal(each, x) for each in read)


def _silenced(block: nn.Module, others: tuple[Any, ...], *inputs: Tensor) -> list[Tensor]:
    """Return a block's outputs with every layer but its norms at zero."""
    kept = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    norms = [module for module in block.modules() if _is_norm(module)]
    spared = {id(parameter) for module in norms for parameter in module.parameters()}
    try:
        with torch.no_grad():
            for parameter in block.parameters():
                if id(parameter) not in spared:
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
            for module in norms:
                for name, parameter in module.named_parameters():
                    if any(word in name for word in ("bias", "beta", "shift")):
                        parameter.zero_()
            return [tensors(block(x.clone(), *others))[0] for x in inputs]
    finally:
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(kept[name])


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(isinstance(each, nn.Linear) for each in module.modules())


def _normed(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / centered.std(-1, keepdim=True).clamp_min(1e-6)


# ---------------------------------------------------------------------------------- feed-forward and lists


def feed_forward_findings(name: str, part: Callable[[Tensor], Tensor], channels: int) -> list[Finding]:
    """Return the mistakes of a feed-forward layer: it treats each position alone, and is not linear."""
    x = torch.randn(2, 7, channels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = part(x), part(changed(x, 3))
        if before.dim() == 3 and before.shape[1] == 7:
            moved = (after - before).abs().amax(dim=(0, 2))
            others = [i for i in range(7) if i != 3 and moved[i] > 1e-5]
            if others:
                return [Finding("mixes-positions", name, f"position {others[0]} changes when position 3 does")]
        middle = part((x + x.flip(0)) / 2)
        if (middle - (before + part(x.flip(0))) / 2).abs().max() < 1e-6 * max(1.0, float(before.abs().max())):
            return [Finding("linear-feed-forward", name)]
    return []


def list_findings(module: nn.Module) -> list[Finding]:
    """Return the layers in plain lists, and those that one list holds several times.

    The layers in plain lists, which .eval() does not reach, go into evaluation mode, too.
    """
    findings = []
    registered = {id(parameter) for parameter in module.parameters()}
    for owner in module.modules():
        for name, value in vars(owner).items():
            values = value.values() if isinstance(value, dict) else value
            if isinstance(value, list | tuple | dict) and name not in ("_modules", "_parameters", "_buffers"):
                layers = [each for each in values if isinstance(each, nn.Module)]
                for each in layers:
                    each.train(module.training)
                lost = [p for each in layers for p in each.parameters() if id(p) not in registered]
                if lost:
                    findings.append(Finding("plain-list", type(owner).__name__, f"self.{name}"))
                findings += _repeated(type(owner).__name__, name, layers)
        for name, child in owner._modules.items():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                findings += _repeated(type(owner).__name__, name, list(child._modules.values()))
    return list(dict.fromkeys(findings))


def mask_findings(module: nn.Module, longest: int) -> list[Finding]:
    """Return the triangular masks that are as long as another size than block_size: n_embd, say."""
    if longest != SIZES["block_size"]:
        return []  # the file fixes its sizes
    others = {int(value): size for size, value in SIZES.items() if value == int(value) and value != longest}
    findings = []
    for owner in module.modules():
        values = {**vars(owner), **owner._buffers}
        for name, value in values.items():
            square = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == value.shape[-2]
            if square and value.numel() == value.shape[-1] ** 2 and value.shape[-1] in others and len(value) != 1:
                flat = value.reshape(value.shape[-2:]).float().nan_to_num(neginf=0)
                kinds = {len(torch.unique(each)) for each in (flat.tril(-1), flat.triu(1))}
                if kinds == {1, 2} or (kinds == {1} and len(torch.unique(flat)) == 2):
                    detail = f"self.{name} is as long as {others[value.shape[-1]]}"
                    findings.append(Finding("tril-length", type(owner).__name__, detail))
    return list(dict.fromkeys(findings))


def _repeated(owner: str, name: str, layers: Sequence[nn.Module | None]) -> list[Finding]:
    weighty = [id(each) for each in layers if each is not None and any(True for _ in each.parameters())]
    if any(a == b for a, b in pairwise(sorted(weighty))):
        return [Finding("shared-heads", owner, f"self.{name}")]
    return []


def dropout_findings(name: str, run: Callable[[], Tensor]) -> list[Finding]:
    """Return a finding if two calls in evaluation mode differ."""
    with torch.no_grad():
        torch.manual_seed(0)
        first = run()
        torch.manual_seed(1)
        second = run()
    if first.shape == second.shape and (first - second).abs().max() > 1e-6:
        detail = "two calls after .eval() differ; use nn.Dropout, or pass training=self.training"
        return [Finding("no-eval", name, detail)]
    return []


def finite(name: str, output: Tensor) -> list[Finding]:
    """Return a finding if an output has values that are not numbers."""
    bad = ~torch.isfinite(output)
    if not bad.any():
        return []
    place = bad.nonzero()[0].tolist()
    return [Finding("not-a-number", name, f"the first at position {place[1] if len(place) > 1 else place[0]}")]
