"""Build a learner's classes with small sizes, and call them, whatever their arguments are called."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.errors import BardletError, is_out_of_memory
from bardlet.ladder.check.load import Loaded, raised
from bardlet.ladder.check.sizes import SIZES, Settings, size_of, value_of
from bardlet.ladder.check.source import CONFIG
from bardlet.ladder.check.uses import value_by_use

SECOND = re.compile(r"(?i)^(context|memory|mem|enc\w*|src\w*|source\w*|y|kv|x_?kv|x_?enc\w*|cross\w*|cond\w*|z|other|"
                    r"x2|ctx)$")
"""Names of the second input of cross-attention."""
MASK = re.compile(r"(?i)mask|tril|pad")
CAUSAL = ("causal", "is_causal", "masked", "use_mask", "causal_mask", "is_masked", "mask")
"""Switches of a layer that hide the future."""
SOURCE = re.compile(r"(?i)^(src|source|enc)")
"""Beginnings of the name of the first text that a translating model takes."""
TARGETS = re.compile(r"(?i)^(targets?|y|labels?|yb|target_ids|tgt_out|ys)$")

LENGTHS = ((int(SIZES["block_size"]), 13), (8, 5))
"""Two lengths of a context, block_size and a shorter one; then those for a file that fixes block_size to 8."""


class Untestable(BardletError):
    """A class that check cannot build or call; not a mistake."""


class TwoTexts(Untestable):
    """A model that takes two texts: it translates."""


def build(loaded: Loaded, name: str) -> nn.Module:
    """Return an instance of a class, in evaluation mode.

    Raises:
        Untestable: no value is known for an argument, or the constructor fails.
    """
    cls = loaded.modules[name]
    errors = []
    for settings in (True, False):
        try:
            torch.manual_seed(1337)
            module = cls(**_arguments(loaded, cls, settings))
            if not isinstance(module, nn.Module):
                raise Untestable("its constructor returns no module")
            if "_modules" not in vars(module):
                raise Untestable("its constructor does not call super().__init__()")
            return module.eval()
        except Untestable as error:
            errors.append(str(error))
        except SystemExit:
            raise Untestable("its constructor calls exit") from None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            errors.append(f"its constructor raises {raised(error)}")
    raise Untestable(errors[0])


def _arguments(loaded: Loaded, cls: type, own_settings: bool) -> dict[str, Any]:
    """Return the arguments of a constructor. own_settings: prefer the file's configuration to check's."""
    parameters = list(inspect.signature(cls).parameters.values())
    names = {each.name for each in parameters}
    values = {}
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        has_default = each.default is not each.empty
        if _is_settings(each, loaded, len(parameters) == 1):
            if not has_default or each.default is None:
                values[each.name] = _settings(loaded, each, own_settings)
        elif each.default is False and each.name in CAUSAL:
            values[each.name] = True
        elif not has_default:
            found = None if size_of(each.name) else value_by_use(loaded.source.classes.get(cls.__name__), each.name)
            values[each.name] = _value(each, names, cls.__name__) if found is None else found
    return values


def _is_settings(parameter: inspect.Parameter, loaded: Loaded, alone: bool) -> bool:
    """Return True if a parameter takes the configuration. alone: it is the only one."""
    own = loaded.names.get(_hint(parameter))  # a class of the file, under whatever name
    if dataclasses.is_dataclass(own) and inspect.isclass(own):
        return True
    if len(parameter.name) == 1 and alone and parameter.annotation is parameter.empty:
        return any(_is_own_settings(value) for value in loaded.names.values())
    return not size_of(parameter.name) and (
        bool(CONFIG.search(parameter.name)) or parameter.name in ("hp", "h_params", "c_"))


def _is_own_settings(value: Any) -> bool:
    """Return True for a dataclass with sizes."""
    return inspect.isclass(value) and dataclasses.is_dataclass(value) and sum(
        bool(size_of(each.name)) for each in dataclasses.fields(value)) > 1


def _hint(parameter: inspect.Parameter) -> str:
    """Return the name of a parameter's annotation."""
    return str(getattr(parameter.annotation, "__name__", parameter.annotation)).strip("'\"")


def _value(parameter: inspect.Parameter, names: set[str], cls: str) -> Any:
    """Return the value of a constructor argument, by its name."""
    name, plain = parameter.name, parameter.name.strip("_").lower()
    size = size_of(name)
    heads = any(size_of(other) == "n_head" for other in names)
    if size == "head_size" and plain in ("d_out", "out_dim", "output_dim", "out_features", "size") and (
            heads or re.search(r"(?i)feed|ff|mlp|multi", cls)):
        size = "n_embd"
    if "cross" in cls.lower() and plain.endswith(("_dim", "_size")) and size not in ("n_head", "block_size") and (
            plain.split("_")[0] not in ("head", "ff", "mlp", "vocab", "hidden")):
        size = "n_embd"
    if size == "n_inner" and not any(size_of(other) == "n_embd" for other in names):
        size = "n_embd"
    if size == "n_embd" and plain in ("input_size", "input_dim", "in_dim", "in_size", "dim") and "vocab" in cls.lower():
        size = "vocab_size"
    if size:
        return value_of(size)
    if plain in Settings.OTHER:
        return Settings.OTHER[plain]
    if MASK.search(name):
        return plain in ("mask", "masked", "use_mask", "causal_mask")
    raise Untestable(f"its argument {name} has no usual name; give it a default, or one like n_embd or head_size")


def _settings(loaded: Loaded, parameter: inspect.Parameter, own: bool) -> Any:
    """Return the configuration: the file's own, with check's sizes, or one that knows every size."""
    if own:
        named = loaded.names.get(parameter.name)
        if named is not None and not inspect.isclass(named) and not callable(named):
            return _with_sizes(named)
        hint = _hint(parameter)
        classes = [value for value in loaded.names.values() if inspect.isclass(value)
                   and (CONFIG.search(value.__name__) or value.__name__ == hint or _is_own_settings(value))
                   and not issubclass(value, nn.Module) and value.__module__ not in ("typing", "dataclasses")]
        classes.sort(key=lambda cls: cls.__name__ != hint)
        for cls in classes:
            try:
                wanted = [each for each in inspect.signature(cls).parameters.values() if each.default is each.empty
                          and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
                return _with_sizes(cls(**{each.name: Settings()[each.name] for each in wanted}))
            except Exception:
                continue
        for value in loaded.names.values():  # a configuration under another name
            if dataclasses.is_dataclass(value) and not inspect.isclass(value):
                return _with_sizes(value)
    return Settings()


def _with_sizes(settings: Any) -> Any:
    """Set the sizes of a configuration."""
    if isinstance(settings, dict):
        return type(settings)({key: value_of(size_of(str(key))) if size_of(str(key)) and isinstance(value, int | float)
                               and not isinstance(value, bool) else value for key, value in settings.items()})
    for name in dir(settings):
        value = getattr(settings, name, None)
        if size_of(name) and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                object.__setattr__(settings, name, value_of(size_of(name)))
            except (AttributeError, TypeError):
                continue
    return settings


# ---------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class Answer:
    """The output of a model. logits: (B, T, V); None if it returned only the loss."""

    logits: Tensor | None
    loss: Tensor | None


class Model:
    """A learner's language model: token ids in, logits and the loss out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shifts = False
        """True if its loss takes the inputs as targets and shifts them itself."""
        self.own_loss = True
        """False if its loss is another one than the mean cross-entropy."""
        self.vocab = int(SIZES["vocab_size"])
        """Number of different tokens that the tests use."""
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        self.takes_targets = len(self.names) > 1 and bool(TARGETS.match(self.names[1]))
        self.needs_targets = self.takes_targets and list(parameters)[1].default is inspect.Parameter.empty
        self.longest, self.short = LENGTHS[0]
        """Lengths of the contexts that the tests use."""
        others = [each for each in list(parameters)[1 + self.takes_targets:] if each.default is each.empty
                  and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        self.extra = {each.name: None for each in others}
        two = self.takes_targets and bool(SOURCE.match(self.names[0]))
        if two or any(SECOND.match(each.name) or each.name in ("tgt", "trg") for each in others):
            raise TwoTexts("it takes two texts, a source and a target")

    def ids(self, B: int, T: int, seed: int) -> Tensor:
        """Return random tokens: (B, T)."""
        return torch.randint(self.vocab, (B, T), generator=torch.Generator().manual_seed(seed))

    def __call__(self, idx: Tensor, targets: Tensor | None = None) -> Answer:
        """Call the model.

        Raises:
            Untestable: it returns neither logits nor a loss.
        """
        if self.takes_targets:
            targets = idx if targets is None and self.needs_targets else targets
            result = self.module(idx, targets, **self.extra)
        else:
            result = self.module(idx, **self.extra)
        return _answer(result, *idx.shape)

    def logits(self, idx: Tensor) -> Tensor:
        """Return the logits of every position: (B, T, V)."""
        answer = self(idx)
        if answer.logits is None or answer.logits.shape[1] != idx.shape[1]:
            answer = self(idx, idx)  # without targets, some models return the last position alone
        if answer.logits is None or answer.logits.shape[:2] != idx.shape:
            raise Untestable("its forward returns no logits for every position")
        return answer.logits


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of an output: of a tuple, a dict or an object."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [tensor for each in result for tensor in tensors(each)]
    return tensors(list(vars(result).values())) if dataclasses.is_dataclass(result) else []


def _answer(result: Any, B: int, T: int) -> Answer:
    logits = loss = None
    for tensor in tensors(result):
        if tensor.is_floating_point() and tensor.numel() == 1 and tensor.dim() < 2 and loss is None:
            loss = tensor.reshape(())
        elif tensor.is_floating_point() and tensor.dim() >= 2 and logits is None:
            logits = tensor
    if logits is not None and logits.dim() == 2:
        if logits.shape[0] == B * T:
            logits = logits.view(B, T, -1)
        elif logits.shape[0] == B:
            logits = logits[:, None]
    if logits is None and loss is None:
        raise Untestable("its forward returns neither logits nor a loss")
    return Answer(logits if logits is not None and logits.dim() == 3 else None, loss)


def embeds(node: ast.ClassDef) -> bool:
    """Return True if a class makes an embedding, or indexes a table by tokens."""
    return any((isinstance(each, ast.Attribute) and each.attr in ("Embedding", "embedding", "one_hot"))
               or (isinstance(each, ast.Name) and each.id == "Embedding") for each in ast.walk(node))


@dataclass(frozen=True)
class Part:
    """A learner's layer: x (B, T, C) in, and out.

    second: True if it also takes the other text, as cross-attention does. given_mask: True if the mask is an argument.
    """

    module: nn.Module
    call: Callable[..., Any]
    second: bool
    given_mask: bool

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the first tensor of the output."""
        found = tensors(self.call(x, x if other is None else other))
        if not found:
            raise Untestable("its forward returns no tensor")
        return found[0]


def part(module: nn.Module) -> Part:
    """Return how to call a layer.

    Raises:
        Untestable: its forward has an argument that check does not know.
    """
    parameters = [each for each in inspect.signature(module.forward).parameters.values()
                  if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    required = [each.name for each in parameters if each.default is each.empty]
    three = [name.lower().strip("_")[:1] for name in required[:3]] == ["q", "k", "v"]
    plan = ["x"]
    for name in required[1:]:
        if MASK.search(name):
            plan.append("none")
        elif three:
            plan.append("x")
        elif SECOND.match(name):
            plan.append("other")
        else:
            raise Untestable(f"its forward takes {name}, which check cannot supply")
    given = any(MASK.search(each.name) for each in parameters[1:])

    def call(x: Tensor, other: Tensor) -> Any:
        values = {"x": x, "other": other, "none": None, "mask": torch.ones(x.shape[1], other.shape[1]).tril() > 0}
        return module(*(values[what] for what in plan))

    if "none" in plan and not _runs(call, module):
        plan = ["mask" if what == "none" else what for what in plan]
    return Part(module, call, "other" in plan, given)


def _runs(call: Callable[..., Any], module: nn.Module) -> bool:
    """Return True if a layer accepts None as its mask."""
    x = torch.zeros(2, LENGTHS[1][0], width(module))
    try:
        with torch.no_grad():
            call(x, x)
    except Exception:
        return False
    return True


def width(module: nn.Module) -> int:
    """Return the number of channels that a layer expects: those of its first linear layer or norm."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            return each.in_features
        if isinstance(each, nn.LayerNorm):
            return int(each.normalized_shape[-1])
    return int(SIZES["n_embd"])


def stirred(module: nn.Module) -> None:
    """Add noise to every weight, so that weights which start at zero hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
