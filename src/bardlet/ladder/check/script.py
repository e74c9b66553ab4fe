"""The parts of a learner's file that check reads and never runs: the training loop, and the batches."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.ladder.check.load import Loaded, supplies
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.model import compare
from bardlet.ladder.check.sizes import size_of, value_of
from bardlet.ladder.check.source import Source
from bardlet.ladder.check.trace import trace

Loop = ast.For | ast.While


def findings(source: Source, has_dropout: bool) -> list[Finding]:
    """Return the mistakes in the training loop. has_dropout: a model of the file has dropout."""
    return [*_zero_grad(source.tree), *(_no_eval(source.tree) if has_dropout else ())]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (each for each in ast.walk(node) if isinstance(each, ast.Call))


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _function(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else _method(call)


# ---------------------------------------------------------------------------------- gradients


def _zero_grad(tree: ast.Module) -> list[Finding]:
    """Return a finding if a loop calls backward and step, and nothing in it clears the gradients before backward."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for loop in (node for node in ast.walk(tree) if isinstance(node, Loop)):
        reached = _reached(loop, functions)
        called = [_method(call) for node in reached for call in _calls(node)]
        if "backward" not in called or not {"step", "add_", "sub_"} & set(called) or _holds_loop(loop):
            continue
        if not any(_clears(node) for node in reached):
            return [Finding("zero-grad", "the training loop")]
        order = _order(loop, reached)
        if "backward" in order and "clear" in order and "step" in order:
            i = order.index("backward")
            following = order[i + 1:]
            if "clear" in following and "step" in following and following.index("clear") < following.index("step"):
                return [Finding("zero-grad", "the training loop")]
    return []


def _holds_loop(loop: Loop) -> bool:
    """Return True if an inner loop has the backward pass: it is tested itself, unless it gathers gradients."""
    inner = [node for node in ast.walk(loop) if isinstance(node, Loop) and node is not loop]
    return any({"backward", "step"} <= {_method(call) for call in _calls(node)} for node in inner)


def _reached(loop: ast.AST, functions: dict[str, ast.FunctionDef]) -> list[ast.AST]:
    """Return the loop and the functions of the file that it calls."""
    reached: list[ast.AST] = [loop]
    for node in reached:
        for call in _calls(node):
            function = functions.get(_function(call))
            if function is not None and function not in reached and len(reached) < 20:
                reached.append(function)
    return reached


def _clears(node: ast.AST) -> bool:
    return any(_word(each) == "clear" for each in ast.walk(node) if isinstance(each, ast.Call | ast.Assign))


def _order(loop: Loop, reached: list[ast.AST]) -> list[str]:
    """Return backward, clear and step as they follow in the text of the loop or function that has backward."""
    for node in reached:
        parts = [each for each in ast.walk(node) if isinstance(each, ast.Call | ast.Assign)]
        parts.sort(key=lambda each: (each.lineno, each.col_offset))
        words = [word for each in parts if (word := _word(each))]
        if "backward" in words:
            return words
    return []


def _word(part: ast.Call | ast.Assign) -> str:
    """Return backward, clear or step; empty for another part of a loop."""
    if isinstance(part, ast.Assign):
        cleared = any(isinstance(target, ast.Attribute) and target.attr == "grad" for target in part.targets)
        return "clear" if cleared else ""
    method = _method(part)
    if method == "zero_grad" or (method in ("zero_", "fill_") and "grad" in ast.unparse(part.func)):
        return "clear"
    if method == "step":
        return "" if "sched" in ast.unparse(part.func) else "step"
    return "backward" if method == "backward" else ""


# ---------------------------------------------------------------------------------- evaluation


def _no_eval(tree: ast.Module) -> list[Finding]:
    """Return a finding if the file trains, and measures a loss or generates without a call of .eval()."""
    if not any(_method(call) == "backward" for call in _calls(tree)) or _dropout_is_zero(tree):
        return []
    methods = {id(node) for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for node in ast.walk(cls)}
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and id(node) not in methods and _measures(node) and not any(
                _switches(each) for each in _reached(node, functions)):
            callers = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | Loop | ast.If)
                       and any(_function(call) == node.name for call in _calls(each))]
            if not any(_switches(each) for each in (*callers, *_top_level(tree, callers))):
                return [Finding("no-eval", node.name, "it measures the loss without model.eval()")]
    if _switches(tree):
        return []
    for call in _calls(tree):
        if id(call) not in methods and _function(call).startswith("generate"):
            return [Finding("no-eval", "the script", "it generates without model.eval()")]
    return []


def _measures(function: ast.FunctionDef) -> bool:
    """Return True for a function like estimate_loss: it evaluates, and does not train."""
    words = ("estimate", "eval", "valid", "val_loss", "test_loss")
    called = {_function(call) for call in _calls(function)}
    return any(word in function.name.lower() for word in words) and "backward" not in called and bool(
        called & {"model", "m", "gpt", "net", "lm", "get_batch"})


def _switches(node: ast.AST) -> bool:
    """Return True if a part of the file switches to evaluation: .eval() or .train(False)."""
    for call in _calls(node):
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        if (_method(call) == "eval" and not call.args) or (_method(call) == "train" and values and not any(
                isinstance(value, ast.Constant) and value.value is True for value in values)):
            return True
    return False


def _top_level(tree: ast.Module, callers: Sequence[ast.AST]) -> list[ast.AST]:
    """Return the statements of the file itself, if a call stands among them and in no function or loop."""
    return [] if callers else [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _dropout_is_zero(tree: ast.Module) -> bool:
    """Return True if every dropout that the file sets is 0."""
    values = []
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs = [(node.target.id, node.value)]
        elif isinstance(node, ast.keyword) and node.arg:
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Call) and _function(node) == "Dropout" and node.args:
            pairs = [("dropout", node.args[0])]
        values += [value.value for name, value in pairs
                   if size_of(name) == "dropout" and isinstance(value, ast.Constant)]
    return bool(values) and not any(values)


# ---------------------------------------------------------------------------------- batches


def batch_findings(loaded: Loaded) -> list[Finding]:
    """Return a finding if the targets of a batch are not the next tokens.

    get_batch runs, or the first item of a data set; without them, the slices of the file are compared.
    """
    if _shifts(loaded):
        return []  # the file shifts logits or targets itself
    for name, value in list(loaded.names.items()):
        if getattr(value, "__module__", "") != loaded.module.__name__:
            continue
        pair = None
        if inspect.isfunction(value) and "batch" in name.lower():
            pair = _batch(value, loaded)
        elif isinstance(value, type) and "__getitem__" in vars(value):
            pair = _item(value, loaded)
        if pair is not None:
            detail = _shift(*pair)
            return [Finding("targets-not-shifted", name, detail)] if detail else []
    return _same_slices(loaded.source.tree)


def _shift(x: Tensor, y: Tensor) -> str:
    """Return the mistake in the targets of a batch; empty if they are the next tokens, or something else."""
    if torch.equal(x, y):
        return "they are the inputs themselves"
    if torch.equal(x[..., 1:], y[..., :-1]):
        return ""
    for shift in (2, 3):
        if torch.equal(x[..., shift:], y[..., :-shift]):
            return f"they are {shift} tokens ahead"
    return "they are the tokens before" if torch.equal(x[..., :-1], y[..., 1:]) else ""


def _pair(result: Any) -> tuple[Tensor, Tensor] | None:
    if isinstance(result, list | tuple) and len(result) == 2 and all(isinstance(each, Tensor) for each in result):
        x, y = result
        return (x, y) if x.shape == y.shape and x.dim() in (1, 2) and x.numel() > 1 else None
    return None


def _batch(function: Any, loaded: Loaded) -> tuple[Tensor, Tensor] | None:
    names = loaded.names
    data = names.get("train_data")
    if not isinstance(data, Tensor):
        data = supplies(loaded.text)["train_data"]
    values: dict[str, Any] = {}
    for each in inspect.signature(function).parameters.values():
        if each.name in ("split", "mode", "which", "kind", "phase", "partition"):
            values[each.name] = "train"
        elif "data" in each.name or each.name in ("tokens", "ids", "source", "corpus", "x", "d"):
            values[each.name] = data
        elif each.name == "device":
            values[each.name] = "cpu"
        elif size_of(each.name):
            values[each.name] = value_of(size_of(each.name))
        elif each.default is each.empty:
            return None
    try:
        return _pair(function(**values))
    except Exception:
        return None


def _item(cls: Any, loaded: Loaded) -> tuple[Tensor, Tensor] | None:
    for data in (supplies(loaded.text)["train_data"], loaded.text):
        values: dict[str, Any] = {}
        for each in list(inspect.signature(cls.__init__).parameters.values())[1:]:
            if size_of(each.name):
                values[each.name] = value_of(size_of(each.name))
            elif not values:
                values[each.name] = data
        try:
            return _pair(cls(**values)[0])
        except Exception:
            continue
    return None


def _shifts(loaded: Loaded) -> bool:
    """Return True if the file shifts logits or targets somewhere: logits[:, :-1], targets[:, 1:]."""
    text = re.sub(r"\b(shape|size\(\))\[:-1\]", "", ast.unparse(loaded.source.tree))
    return "[:, :-1" in text or "[..., :-1" in text or "[:-1]" in text


PAIRS = (("x", "y"), ("xb", "yb"), ("inputs", "targets"), ("input_ids", "labels"), ("inp", "tgt"), ("src", "tgt"),
         ("x_batch", "y_batch"), ("xs", "ys"), ("input", "target"), ("inp", "target"), ("context", "target"))


def _same_slices(tree: ast.Module) -> list[Finding]:
    """Return a finding if x and y of a batch are made by the same expression, or a model gets x twice."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        made: dict[str, str] = {}
        for statement in body if isinstance(body, list) else []:
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                continue
            target, value = statement.targets[0], statement.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for one, what in pairs:
                text = ast.unparse(what)
                if isinstance(one, ast.Name) and "[" in text and ":" in text:
                    made[one.id.lower()] = text
        if any(x in made and made.get(y) == made[x] for x, y in PAIRS):
            where = getattr(node, "name", "the script")
            return [Finding("targets-not-shifted", where, "they are the inputs themselves")]
    for call in _calls(tree):
        words = [each.id for each in call.args if isinstance(each, ast.Name)]
        if _function(call) in ("model", "m", "gpt", "net", "lm") and len(call.args) == 2 and len(words) == 2 and (
                words[0] == words[1]):
            return [Finding("targets-not-shifted", "the script", "the model gets its inputs as targets")]
    return []


# ---------------------------------------------------------------------------------- losses outside the model


def loss_findings(loaded: Loaded, model: nn.Module, idx: Tensor, y: Tensor,
                  logits: Tensor) -> tuple[list[Finding], str]:
    """Return the mistake of a function of the file that returns the loss of logits, or of a model on a batch.

    Also returns why that loss is not tested; empty if it is, or if there is none.
    """
    known = {"logits": logits, "model": model, "inputs": idx, "targets": y, "device": "cpu"}
    for name, function in loaded.names.items():
        if not inspect.isfunction(function) or "loss" not in name.lower():
            continue
        parameters = inspect.signature(function).parameters.values()
        plan = {each.name: _role(each.name) for each in parameters if each.default is each.empty}
        if None in plan.values() or "targets" not in plan.values():
            continue
        with torch.no_grad(), trace() as record:
            try:
                loss = function(**{key: known[role] for key, role in plan.items() if role})
            except Exception:
                failed = record.failure is not None and record.failure.name in ("cross_entropy", "nll_loss")
                flattened_outside = "logits" in plan.values()
                return ([Finding("loss-axis", name)] if failed and not flattened_outside else []), ""
        if isinstance(loss, Tensor) and loss.numel() == 1:
            compared = compare(float(loss), logits, idx, y)
            return compared.findings(name), compared.unknown
    return [], ""


ROLES = {"logits": r"logits?|preds?|predictions?|outputs?|out|y_?hat|y_pred", "model": r"model|m|net|gpt",
         "inputs": r"x|xb|x_?batch|inputs?|input_batch|idx|input_ids|inp", "device": r"device",
         "targets": r"y|yb|y_?batch|targets?|target_batch|labels?|y_true|tgt"}
"""Names of the arguments of a loss."""


def _role(name: str) -> str | None:
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, name.lower())), None)


def softmax_findings(tree: ast.Module) -> list[Finding]:
    """Return a finding if a call of a cross-entropy has a softmax as its first argument."""
    for call in _calls(tree):
        if _function(call) in ("cross_entropy", "criterion", "loss_fn", "CrossEntropyLoss") and call.args:
            inner = [_function(each) for each in _calls(call.args[0])]
            if "softmax" in inner:
                return [Finding("softmax-before-loss", "the script")]
    return []
