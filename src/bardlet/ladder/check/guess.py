"""The rung that a learner's file follows, if the command line names none."""

from __future__ import annotations

import ast

from torch import nn

from bardlet.ladder.check import generation, model, modules
from bardlet.ladder.check.attention import attentions
from bardlet.ladder.check.load import Loaded
from bardlet.ladder.check.trace import Trace


def seen_rung(record: Trace, module: nn.Module) -> int:
    """Return the rung that a model probably follows, from what its forward pass does."""
    found = attentions(record)
    attending = [each for each in found if each.head_size]
    if not attending and not model.is_opaque(record):
        return 2 if found else 1
    if any("norm" in type(each).__name__.lower() for each in module.modules()):
        return 8 if any(isinstance(each, nn.Dropout) for each in module.modules()) else 7
    if modules.blocks(record):
        return 6
    if any(node.name in modules.ACTIVATIONS for node in record.nodes):
        return 5
    several = len(attending) > 1 or any(each.weights.dim() > 3 for each in attending)
    return 4 if several else 3


def guess(loaded: Loaded) -> int:
    """Return the rung that a file probably follows, from the names and parts of its classes."""
    text = "\n".join(ast.unparse(each).lower() for name, node in loaded.source.classes.items() if name in loaded.modules
                     for each in node.body if not generation.NAMES.match(getattr(each, "name", "")))
    names = " ".join(loaded.modules).lower()

    def has(*words: str) -> bool:
        return any(word in text for word in words)

    if not has("softmax", "scaled_dot_product_attention", "multiheadattention"):
        return 2 if has("tril") else 1
    if has("layernorm", "layer_norm", "rmsnorm"):
        return 8 if has("dropout") else 7
    if "block" in names or "layer" in names:
        return 6
    if has("relu", "gelu"):
        return 5
    return 4 if "multi" in names or has("n_head", "num_heads") else 3
