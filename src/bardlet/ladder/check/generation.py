"""Tests of generation: the context is cropped to block_size, and the next token is sampled from the last position."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bardlet.ladder.check.build import Model, tensors
from bardlet.ladder.check.load import Loaded, raised
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.sizes import size_of, value_of
from bardlet.ladder.check.trace import Trace, trace

NAMES = re.compile(r"(?i)^_?(generate|sample|complete|write|predict_next|inference)")
CONTEXT = re.compile(r"(?i)^(idx|x|ids?|context|ctx|input\w*|tokens?|token_ids|start\w*|prompt\w*|seq\w*|seed\w*|index|"
                     r"prefix|inp|initial\w*|idx_\w*)$")
NUMBER = re.compile(r"(?i)^(max_new_tokens|max_tokens|num_tokens|n_tokens|new_tokens|length|max_length|max_len|steps|n|"
                    r"num|num_new_tokens|n_new|n_new_tokens|count|num_steps|max_new|n_steps|num_chars|tokens_to_generate|"
                    r"gen_len|max_gen_len|num_generate|size|k|max_iters|new|how_many|total|amount|n_chars)$")
GLOBALS = ("model", "m", "gpt")
"""Names of the model that a function of a script expects among its globals."""
CHOICES = ("multinomial", "argmax", "topk", "sort", "max")


@dataclass
class Calls:
    """The calls of a model during generation: what it got and what it returned."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)
    """Number of operations before the end of each call."""


def generator(loaded: Loaded, model: Model) -> Callable[[Any, int], Tensor] | None:
    """Return the learner's function that continues a context; None if there is none that check can call."""
    names = [name for name, value in inspect.getmembers(model.module, inspect.ismethod) if NAMES.match(name)]
    functions = [getattr(model.module, name) for name in sorted(names, key=len)]
    functions += [value for name, value in loaded.names.items() if inspect.isfunction(value) and NAMES.match(name)]
    for function in functions:
        plan = _plan(function)
        if plan is not None:
            return partial(_call, function, plan, model)
    return None


def _call(function: Callable[..., Any], plan: dict[str, Any], model: Model, context: Any, number: int) -> Tensor:
    """Call the learner's function with a context and the number of new tokens."""
    known = {"context": context, "number": number, "model": model.module}
    values = {name: known.get(what, what) if isinstance(what, str) else what for name, what in plan.items()}
    return _first(function(**values))


def _first(result: Any) -> Tensor:
    found = tensors(result)
    return found[0] if found else torch.empty(0)


def _plan(function: Any) -> dict[str, Any] | None:
    """Return what to pass for each argument; None if one is unknown."""
    plan: dict[str, Any] = {}
    for each in inspect.signature(function).parameters.values():
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
            continue
        if CONTEXT.match(each.name) and "context" not in plan.values():
            plan[each.name] = "context"
        elif NUMBER.match(each.name) and "number" not in plan.values():
            plan[each.name] = "number"
        elif each.name in ("model", "m", "gpt", "net", "lm") and each.default is each.empty:
            plan[each.name] = "model"
        elif each.name == "device":
            plan[each.name] = "cpu"
        elif size_of(each.name):
            if each.default is each.empty:
                plan[each.name] = value_of(size_of(each.name))
        elif each.name in ("temperature", "temp", "tau") and each.default is each.empty:
            plan[each.name] = 1.0
        elif each.default is each.empty:
            return None
    return plan if {"context", "number"} <= {each for each in plan.values() if isinstance(each, str)} else None


def findings(name: str, loaded: Loaded, model: Model) -> tuple[list[Finding], str]:
    """Return the mistakes of generation, and a note if it could not be tested."""
    generate = generator(loaded, model)
    if generate is None:
        return [], "generation: no function generate(idx, max_new_tokens) was found"
    for each in GLOBALS:
        loaded.names.setdefault(each, model.module)
    context = model.ids(1, 5, seed=9)
    calls, original = Calls(), model.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        idx = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        logits = next((each for each in tensors(result) if each.dim() >= 2), None)
        if idx is not None and logits is not None and idx.dim() == 2:
            calls.inputs.append(idx.detach().clone())
            calls.outputs.append(logits.detach().reshape(*idx.shape, -1) if (logits.numel() % idx.numel() == 0
                                 and logits.shape[-2] == idx.shape[-1]) or logits.shape[0] == idx.numel()
                                 else logits.detach())
            calls.operations.append(len(record.nodes))
        return result

    model.module.forward = forward
    try:
        with torch.no_grad(), trace() as record:
            try:
                context = _accepted(generate, context)
            except Exception as error:
                if _takes_all(record, context.shape[1]):
                    return [Finding("wrong-position", name, "all positions at once")], ""
                return [], f"generation: for a context of 5 tokens it raises {raised(error)}"
        found = _position(name, calls, record)
        calls = Calls()
        start = model.longest - 2
        long = "the end of this text"[:start] if isinstance(context, str) else model.ids(1, start, seed=10)
        with torch.no_grad(), trace() as record:
            try:
                whole = generate(long, 6)
            except Exception:
                longest = max((each.shape[1] for each in calls.inputs), default=model.longest)
                where = f"it fails past {max(longest, start)} tokens, block_size is {model.longest}"
                return [*found, Finding("no-crop", name, where)], ""
        return [*found, *(_crop(name, calls, whole, start) if whole.numel() else [])], ""
    finally:
        del model.module.forward


def _accepted(generate: Callable[[Any, int], Tensor], context: Tensor) -> Any:
    """Return the context, or a text of as many characters if the learner's function takes a text."""
    try:
        generate(context, 3)
        return context
    except Exception:
        try:
            generate("these", 3)
        except Exception:
            generate(context, 3)  # raises the first error again
        return "these"


def _takes_all(record: Trace, length: int) -> bool:
    """Return True if generation drew a token for every position."""
    failure = record.failure
    if failure and failure.name == "multinomial":
        return any(len(shape) == 3 for shape in failure.shapes)
    return any(node.name == "multinomial" and node.parents and node.parents[0].value.dim() == 2
               and node.parents[0].value.shape[0] == length for node in record.nodes)


def _position(name: str, calls: Calls, record: Trace) -> list[Finding]:
    """Compare what was sampled from with the logits of every position of the call before."""
    ends = [*calls.operations[1:], len(record.nodes)]
    for output, start, end in zip(calls.outputs, calls.operations, ends, strict=True):
        if output.dim() != 3 or output.shape[1] < 2:
            return []
        for node in record.nodes[start:end]:
            if node.name not in CHOICES or not node.parents:
                continue
            chosen = node.parents[0].value.float()
            if chosen.shape[-1] != output.shape[-1] or chosen.numel() != output.shape[-1]:
                continue
            fits = [_fit(chosen.flatten(), output[0, i]) for i in range(output.shape[1])]
            best = max(range(len(fits)), key=lambda i: fits[i])
            if fits[best] > 0.9999 and best != len(fits) - 1 and fits[-1] < 0.999:
                return [Finding("wrong-position", name, f"{best} of {len(fits)} instead of the last")]
            break
    return []


def _fit(chosen: Tensor, logits: Tensor) -> float:
    """Return the correlation of what was sampled from, probabilities or logits, with logits."""
    if (chosen >= 0).all():
        chosen = chosen.log()
    kept = chosen.isfinite()
    if kept.sum() < 3:
        return 0.0
    return float(torch.corrcoef(torch.stack((chosen[kept], logits[kept])))[0, 1])


def _crop(name: str, calls: Calls, whole: Tensor, start: int) -> list[Finding]:
    """Compare each context with the sequence so far: it must be its end."""
    whole = whole.reshape(1, -1)
    for step, given in enumerate(calls.inputs):
        so_far = whole[:, : start + step]
        length = given.shape[1]
        if whole.shape[1] < start + step or length >= so_far.shape[1] or length < 2 or given.shape[0] != 1:
            continue
        first, last = so_far[:, :length], so_far[:, -length:]
        if torch.equal(given, first) and not torch.equal(given, last):
            return [Finding("wrong-crop", name, f"it passes the first {length} of {so_far.shape[1]} tokens")]
    return []
