"""Tests of a model that translates: a source and a target in, logits of the target's tokens or their loss out."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from bardlet.ladder.check.build import MASK, Answer, Untestable, tensors
from bardlet.ladder.check.load import raised
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.model import dead_parameters
from bardlet.ladder.check.modules import dropout_findings, leak
from bardlet.ladder.check.sizes import SIZES

B, S, T = 3, 17, 13
"""Texts, and tokens in each source and target."""


class Translator:
    """A learner's model that takes two texts."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        required = [each.name for each in inspect.signature(module.forward).parameters.values()
                    if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        if len(required) < 2 or not all(MASK.search(name) for name in required[2:]):
            raise Untestable("it takes two texts and more; check tests only its layers")
        self.masks = len(required) - 2

    def __call__(self, source: Tensor, target: Tensor) -> Answer:
        """Call the model: logits (B, T or T - 1, V), the loss, or both.

        Raises:
            Untestable: it fails, or returns neither.
        """
        try:
            found = tensors(self.module(source, target, *[None] * self.masks))
        except Exception as error:
            raise Untestable(f"its forward raises {raised(error)}") from None
        loss = next((each for each in found if each.is_floating_point() and each.numel() == 1), None)
        logits = next((each for each in found if each.dim() == 3 and len(each) == len(target)
                       and each.shape[1] in (T, T - 1)), None)
        if logits is None and loss is None:
            raise Untestable("its forward returns neither logits for every position of the target nor a loss")
        return Answer(logits, loss)

    def output(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits, or the loss of a model that returns no logits."""
        answer = self(source, target)
        found = answer.loss if answer.logits is None else answer.logits
        assert found is not None
        return found


def ids(length: int, seed: int, rows: int = B) -> Tensor:
    """Return random tokens: (rows, length); none is 0, which often stands for padding."""
    return torch.randint(1, int(SIZES["vocab_size"]), (rows, length), generator=torch.Generator().manual_seed(seed))


def findings(name: str, module: nn.Module) -> tuple[list[Finding], list[str], str]:
    """Return the mistakes of a model that translates, what holds, and a note on what is not tested."""
    model = Translator(module)
    with torch.no_grad():
        answer = model(ids(S, 1), ids(T, 3))
    tests = {"evaluation without dropout": lambda: dropout_findings(name, lambda: model.output(ids(S, 1), ids(T, 3))),
             "an effect of the source": lambda: source_findings(name, model),
             "gradients": lambda: gradient_findings(name, model)}
    if answer.logits is not None:
        tests["no leak"] = lambda: leak_findings(name, model)
    found = {what: test() for what, test in tests.items()}
    note = "" if answer.logits is not None else (
        "it returns the loss alone, so neither that loss nor a leak from the target's future is tested")
    return [each for some in found.values() for each in some], [what for what, some in found.items() if not some], note


def source_findings(name: str, model: Translator) -> list[Finding]:
    """Return a finding if another source changes nothing."""
    with torch.no_grad():
        one, other = (model.output(ids(S, seed), ids(T, 3)) for seed in (1, 2))
    return [Finding("ignores-source", name)] if (one - other).abs().max() < 1e-6 else []


def leak_findings(name: str, model: Translator) -> list[Finding]:
    """Return where the future of the target leaks; nothing for a model that returns the loss alone."""
    def logits(target: Tensor) -> Tensor:
        answer = model(ids(S, 1, len(target)), target)
        assert answer.logits is not None
        return answer.logits

    def change(target: Tensor, position: int) -> Tensor:
        target = target.clone()
        target[:, position] = target[:, position] % (int(SIZES["vocab_size"]) - 1) + 1
        return target

    with torch.no_grad():
        found = leak(logits, ids(T, 3), change)
    return [Finding("leak", name, found)] if found else []


def gradient_findings(name: str, model: Translator) -> list[Finding]:
    """Return the weights that no gradient reaches."""
    model.module.zero_grad(set_to_none=True)
    answer = model(ids(S, 1), ids(T, 3))
    loss = answer.loss
    if loss is None:
        assert answer.logits is not None
        loss = answer.logits.log_softmax(-1)[..., 0].mean()
    if not loss.requires_grad:
        return [Finding("dead-parameter", name, "any parameter: the output has no gradient")]
    loss.backward()
    return dead_parameters(name, model.module)
