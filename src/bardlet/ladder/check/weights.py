"""The rung's own model with the learner's weights: the same logits, if both compute the same.

Weights are mapped by their role and shape, in the order of the file. Queries, keys and values have the same shape, and
so have the two norms of a block: every order of these is tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.ladder.check.build import Model
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.rungs import LADDER
from bardlet.models import build as build_rung

Roles = dict[tuple[object, ...], list[Tensor]]
NEAR = 1e-4
TRAINED_ALIKE = 11
"""The rungs after this one train the same model in another way."""


def rung_model(number: int, vocab: int) -> nn.Module:
    """Return the model of a rung in check's sizes, without dropout."""
    size = {name: int(value) for name, value in SIZES.items()}
    module = build_rung(ModelConfig(
        LADDER[number - 1].model, vocab_size=vocab, block_size=size["block_size"], n_layer=size["n_layer"],
        n_head=size["n_head"], n_embd=size["n_embd"], n_inner=size["n_inner"], dropout=0.0))
    assert isinstance(module, nn.Module)
    return module


def comparison(learner: Model) -> str:
    """Return the rung that has the learner's weights and computes the same logits, in words; empty if there is none.

    Other logits are no mistake: the order of the weights may differ, or the activation.
    """
    own = _roles(learner.module)
    for rung in LADDER[:TRAINED_ALIKE]:
        theirs = rung_model(rung.number, learner.vocab).eval()
        if _counts(_roles(theirs)) == _counts(own) and _same(learner, theirs):
            return f"the same output as rung {rung.number} with the same weights"
    return ""


def _roles(module: nn.Module) -> Roles:
    """Return the weights by role and shape, each once, in order."""
    roles: Roles = defaultdict(list)
    seen: set[int] = set()
    for owner in module.modules():
        weight, bias = getattr(owner, "weight", None), getattr(owner, "bias", None)
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
                kind = "embedding" if isinstance(owner, nn.Embedding) else "layer"
                roles[kind, name, shape, tuple(parameter.shape), bias is None].append(parameter)
    return roles


def _counts(roles: Roles) -> dict[tuple[object, ...], int]:
    return {role: len(parameters) for role, parameters in roles.items()}


@torch.no_grad()
def _same(learner: Model, rung: nn.Module) -> bool:
    """Return True if some order of the learner's weights gives the rung the learner's logits."""
    idx = learner.ids(2, learner.short, seed=11)
    wanted = learner.logits(idx)
    own, theirs = _roles(learner.module), _roles(rung)
    for order in _orders():
        for role, parameters in theirs.items():
            for target, source in zip(parameters, _ordered(own[role], *order), strict=True):
                target.copy_(source)
        if (rung(idx) - wanted).abs().max() < NEAR * wanted.abs().max().clamp_min(1.0):
            return True
    return False


def _orders() -> Iterator[tuple[tuple[int, ...], bool]]:
    """Yield orders of three weights of one shape, and whether the two norms of a block change places."""
    for three in permutations(range(3)):
        yield three, False
        yield three, True


def _ordered(parameters: list[Tensor], three: tuple[int, ...], swap: bool) -> list[Tensor]:
    """Return weights of one role in another order: each three of matrices, each pair of vectors but a last one."""
    made = list(parameters)
    if parameters[0].dim() == 2 and len(parameters) % 3 == 0:
        return [parameters[i - i % 3 + three[i % 3]] for i in range(len(parameters))]
    if swap and parameters[0].dim() == 1 and len(parameters) > 2 and len(parameters) % 2:
        for i in range(0, len(parameters) - 1, 2):
            made[i], made[i + 1] = made[i + 1], made[i]
    return made
