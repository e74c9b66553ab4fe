"""The tests of each exercise: the learner's functions against results that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.check import misses
from bardlet.ladder.check.attempt import Attempt, Test, Wrong, kind, layer, same
from bardlet.ladder.check.sizes import SIZES
from bardlet.models.layers import apply_rope, rope_cos_sin
from bardlet.training.optimizers import orthogonalize

B, T, C = 3, 13, int(SIZES["n_embd"])
H, D, V = int(SIZES["n_head"]), int(SIZES["head_size"]), 11
LONG = int(SIZES["block_size"])


def called(value: object) -> Any:
    """Return a function's result, or complain that it returns nothing."""
    if value is None:
        raise Wrong("it returns None; return the result")
    return value


# ---------------------------------------------------------------------------------- rungs 1 and 2


def bigram_forward(attempt: Attempt) -> None:
    """Logits are rows of the table; the loss is the mean cross-entropy."""
    model = attempt.module("BigramLanguageModel", V)
    idx, targets = torch.randint(V, (2, B, T))
    table = layer(model, "token_embedding_table").weight
    logits, loss = pair(model(idx, targets))
    if isinstance(logits, Tensor) and logits.numel() == B * T * V:
        logits = logits.reshape(B, T, V)
    same(logits, table[idx], "the logits of a token are its row of the table")
    same(loss, F.cross_entropy(table[idx].flatten(0, 1), targets.flatten()), "the loss is the mean cross-entropy")
    logits, loss = pair(model(idx))
    same(logits, table[idx], "the logits of a token are its row of the table")
    if loss is not None:
        raise Wrong("without targets, the loss is None")


def pair(value: object) -> tuple[Any, Any]:
    """Return logits and loss."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"it returns {kind(value)}; return logits, loss")
    return value[0], value[1]


def bigram_generate(attempt: Attempt) -> None:
    """A table with one certain successor gives one text, and one of zeros gives many."""
    model = attempt.module("BigramLanguageModel", V)
    table = layer(model, "token_embedding_table").weight
    with torch.no_grad():
        table.copy_(1e4 * torch.eye(V).roll(1, dims=1))
    idx = torch.tensor([[3, 5], [2, 0]])
    found = called(model.generate(idx, 4))
    if not isinstance(found, Tensor) or found.shape != (2, 6):
        shape = tuple(found.shape) if isinstance(found, Tensor) else kind(found)
        raise Wrong(f"for 2 texts of 2 tokens and 4 new ones it returns {shape}, not (2, 6)")
    expected = torch.cat((idx, (idx[:, -1:] + torch.arange(1, 5)) % V), dim=1)
    if not bool((found == expected).all()):
        raise Wrong("it does not follow the last token; sample from logits[:, -1, :], and append to idx")
    with torch.no_grad():
        table.zero_()
    if len(model.generate(idx, 60)[:, 2:].unique()) < 3:
        raise Wrong("it always takes the likeliest token; sample with torch.multinomial")


def averages(name: str) -> Test:
    """Return the test of one of the three averages."""
    def run(attempt: Attempt) -> None:
        x = torch.randn(B, T, 2)
        given = x.clone()
        mean = x.cumsum(dim=1) / torch.arange(1, T + 1)[:, None]
        same(attempt.named(name)(x), mean, "position t is the mean of the positions 0 to t")
        if not bool((x == given).all()):
            raise Wrong("it changes its input; write to a new tensor")

    return Test(name, "the mean over each position and all before it", run)


# ---------------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention: (..., T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def one_head(attempt: Attempt) -> None:
    """The weighted sum of values, for two lengths."""
    for size, length in ((D, LONG), (12, T)):  # a size written out fits one of them
        head, x = attempt.module("Head", size), torch.randn(B, length, C)
        q, k, v = (layer(head, name)(x) for name in ("query", "key", "value"))
        same(head(x), attention(q, k, v), "softmax of q k / sqrt(head size), of the past alone, times v")


def several_heads(attempt: Attempt) -> None:
    """The outputs of separate heads, side by side."""
    module, x = attempt.module("MultiHeadAttention", H, D), torch.randn(B, T, C)
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        raise Wrong("it has no nn.ModuleList; keep the heads in one, so that PyTorch finds their weights")
    heads = list(lists[0])
    if len(heads) != H or len({id(head) for head in heads}) != H:
        raise Wrong(f"for num_heads {H} it has {len({id(head) for head in heads})} different heads")
    same(module(x), torch.cat([head(x) for head in heads], dim=-1), "the outputs of the heads, side by side")


def heads_at_once(attempt: Attempt) -> None:
    """The same as a loop over the heads."""
    module = attempt.module("MultiHeadAttention")
    for length in (LONG, T):
        x = torch.randn(B, length, C)
        q, k, v = (layer(module, name)(x) for name in ("query", "key", "value"))
        looped = [attention(*(each[..., i * D : (i + 1) * D] for each in (q, k, v))) for i in range(H)]
        same(module(x), layer(module, "proj")(torch.cat(looped, dim=-1)), "a loop over the heads gives another result")


def qk_norm(attempt: Attempt) -> None:
    """Norm, rotation, attention, projection."""
    module, x = attempt.module("Attention"), torch.randn(B, T, C)
    q, k, v = (layer(module, name)(x).view(B, T, H, D) for name in ("query", "key", "value"))
    cos, sin = rope_cos_sin(torch.arange(T)[None], D, 10_000.0)
    norms = {name: layer(module, f"{name}_norm").weight for name in ("query", "key")}
    q, k = (apply_rope(F.rms_norm(each, (D,), norms[name], 1e-6), cos, sin)
            for each, name in ((q, "query"), (k, "key")))
    out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).reshape(B, T, C)
    same(module(x), layer(module, "proj")(out), "attention whose queries and keys are normalized, then rotated")


# ---------------------------------------------------------------------------------- layers and blocks


def linears(module: nn.Module, shapes: Sequence[tuple[int, int]]) -> list[nn.Linear]:
    """Return the linear layers of a module, which have these inputs and outputs."""
    found = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if [(each.in_features, each.out_features) for each in found] != list(shapes):
        sizes = ", ".join(f"{each.in_features} to {each.out_features}" for each in found) or "none"
        wanted = ", ".join(f"{first} to {last}" for first, last in shapes)
        raise Wrong(f"its linear layers are {sizes}; for n_embd {C} they are {wanted}")
    return found


def feed_forward(attempt: Attempt) -> None:
    """A linear layer and a ReLU."""
    module, x = attempt.module("FeedForward", C), torch.randn(B, T, C)
    [first] = linears(module, [(C, C)])
    same(module(x), first(x).relu(), "the ReLU of the linear layer, for each position")


def wide_feed_forward(attempt: Attempt) -> None:
    """Four times as wide inside."""
    module, x = attempt.module("FeedForward"), torch.randn(B, T, C)
    first, second = linears(module, [(C, 4 * C), (4 * C, C)])
    same(module(x), second(first(x).relu()), "a linear layer, a ReLU, a linear layer")


def residual(attempt: Attempt) -> None:
    """Each part adds to x."""
    block, x = attempt.module("Block"), torch.randn(B, T, C)
    y = x + layer(block, "sa")(x)
    same(block(x.clone()), y + layer(block, "ffwd")(y), "x + sa(x) is the new x, and x + ffwd(x) the result")
    stays(block, x)


def stays(module: nn.Module, x: Tensor) -> None:
    """Complain if a module changes its input: `x += ...` breaks the backward pass."""
    given = x.clone()
    module(x)
    if not torch.equal(x, given):
        raise Wrong("it changes its input in place, which breaks the backward pass; write x = x + ...")


def layer_norm(attempt: Attempt) -> None:
    """Rows of mean 0 and variance 1, scaled and shifted."""
    norm = attempt.module("LayerNorm", C)
    for x in (3 + 2 * torch.randn(B, T, C), 1e-3 * torch.randn(B, T, C)):  # eps shows in the second
        weight, bias = layer(norm, "weight"), layer(norm, "bias")
        same(norm(x), F.layer_norm(x, (C,), weight, bias), "as nn.LayerNorm over the channels, with eps 0.00001",
             known=misses.layer_norm(x, weight, bias))


def pre_norm(attempt: Attempt) -> None:
    """A norm before each part, whatever the norm computes."""
    block, x = attempt.module("Block"), 3 + torch.randn(B, T, C)
    for name, size in (("ln1", 1.5), ("ln2", 0.5)):
        layer(block, name)
        setattr(block, name, Scale(size))
    y = x + layer(block, "sa")(1.5 * x)
    expected = y + layer(block, "ffwd")(0.5 * y)
    same(block(x.clone()), expected, "x + sa(ln1(x)) is the new x, and x + ffwd(ln2(x)) the result",
         known=misses.block(x, (block.sa, block.ffwd), (block.ln1, block.ln2)))
    stays(block, x)


class Scale(nn.Module):
    """Stands for a norm whose result is known."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by a number."""
        return self.size * x


def dropout(attempt: Attempt) -> None:
    """Values are 0 with probability p, the mean stays, and evaluation changes nothing."""
    module, x = attempt.module("Dropout", 0.25), torch.rand(400, 500) + 0.5
    same(module(x), x, "at evaluation, x stays as it is")
    module.train()
    first, second = called(module(x)), called(module(x))
    zeros = float((first == 0).float().mean())
    if abs(zeros - 0.25) > 0.02:  # 20 standard deviations
        raise Wrong(f"with p 0.25, {zeros:.0%} of the values become 0".replace("%", " percent"))
    same(first, torch.where(first == 0, 0.0, x / 0.75), "the values that stay are divided by 1 - p")
    if bool(((first == 0) == (second == 0)).all()):
        raise Wrong("each call must draw new random numbers")
    if bool((first == 0).all(dim=0).any()) or bool((first == 0).all(dim=1).any()):
        raise Wrong("whole rows or columns become 0; draw a random number for each value")


def rms_norm(attempt: Attempt) -> None:
    """Rows of mean square 1, scaled."""
    norm = attempt.module("RMSNorm", C)
    for x in (3 + 2 * torch.randn(B, T, C), 1e-3 * torch.randn(B, T, C)):
        same(norm(x), F.rms_norm(x, (C,), layer(norm, "weight"), 1e-6), "as nn.RMSNorm over the channels, eps inside "
             "the root")


def rotation(attempt: Attempt) -> None:
    """Pairs (i, i + D/2), rotated by their angles."""
    cos, sin = (each[0, :, 0] for each in rope_cos_sin(torch.arange(T)[None], D, 10_000.0))
    for x in (torch.randn(T, D), torch.randn(B, H, T, D)):
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
        same(attempt.named("rotate")(x, cos, sin), x * cos + turned * sin, "a cos - b sin on the left, b cos + a sin "
             "on the right")


def swiglu(attempt: Attempt) -> None:
    """One half gates the other."""
    module, x = attempt.module("SwiGLU"), torch.randn(B, T, C)
    gate, up, down = (layer(module, name) for name in ("gate", "up", "down"))
    same(module(x), down(F.silu(gate(x)) * up(x)), "down of silu(gate) times up")


def squared_relu(attempt: Attempt) -> None:
    """The square of the ReLU, before the projection back."""
    module, x = attempt.module("FeedForward"), torch.randn(B, T, C)
    up, down = layer(module, "up"), layer(module, "down")
    same(module(x), down(up(x).relu().square()), "down of the squared ReLU of up")


# ---------------------------------------------------------------------------------- training


def muon(attempt: Attempt) -> None:
    """The five steps, as bardlet computes them."""
    for rows, columns in ((24, 24), (16, 32), (32, 16)):
        x = torch.randn(rows, columns) @ torch.diag(torch.logspace(0, -1, columns))
        expected = orthogonalize(x[None], torch.float32)[0]
        given = x.clone()
        found = called(attempt.named("orthogonalize")(x))
        if isinstance(found, Tensor) and found.shape == expected.shape and not misses.close(found, expected, 1e-3):
            muon_miss(attempt, given, expected)
        same(found, expected, f"five steps for a matrix {rows} x {columns}", 1e-3)
        if not torch.equal(x, given):
            raise Wrong("it changes the gradient that it gets; write to a new tensor")


def muon_miss(attempt: Attempt, gradient: Tensor, expected: Tensor) -> None:
    """Name the mistake of an orthogonalize that is known to be wrong, if another matrix shows it.

    Raises:
        Wrong: it does.
    """
    orthogonalize = attempt.named("orthogonalize")
    if misses.close(orthogonalize(gradient / gradient.norm()), expected, 1e-3):
        raise Wrong("the gradient is not divided by its norm before the steps")
    scales, turned = torch.logspace(0, -1, 24).diag(), torch.linalg.qr(torch.randn(24, 24)).Q
    for gentle in (scales + 0.05 * torch.randn(24, 24), scales @ turned, turned @ scales):  # few mistakes grow on these
        if said := misses.named(orthogonalize(gentle.clone()), misses.muon(gentle), 1e-3):
            raise Wrong(said)


def average(attempt: Attempt) -> None:
    """The mean of five models; the models stay as they are."""
    models = [nn.Linear(4, 3) for _ in range(5)]
    mean = {name: torch.full_like(weight, 9.0).detach() for name, weight in models[0].named_parameters()}
    for n, model in enumerate(models, start=1):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        attempt.named("add_to_average")(mean, model, n)
        for name, weight in model.named_parameters():
            same(weight, before[name], "the model itself must stay as it is")
            expected = torch.stack([dict(each.named_parameters())[name].detach() for each in models[:n]]).mean(dim=0)
            same(mean.get(name), expected, f"after {n} models, average is the mean of their weights")


def write_sum(attempt: Attempt) -> None:
    """Sums as text, with a carry, with zeros."""
    for a, b, text in ((123, 456, "123+456=9750"), (7, 5, "007+005=2100"), (999, 999, "999+999=8991"),
                       (0, 0, "000+000=0000"), (60, 48, "060+048=8010")):
        found = attempt.named("write_sum")(a, b)
        if found != text:
            said = f"'{found}'" if isinstance(found, str) else kind(found)
            raise Wrong(f"write_sum({a}, {b}) is {said}, not '{text}'")


def make_batch(attempt: Attempt) -> None:
    """The next characters as targets, those of the question masked."""
    texts = ["123+456=9750", "007+005=2100", "999+999=8991"]
    ids = torch.tensor([["0123456789+=".index(each) for each in text] for text in texts])
    idx, targets = pair_of_ids(attempt.named("make_batch")(texts))
    same(idx, ids[:, :-1], "idx is the first 11 characters of each sum")
    answer = ids[:, 8:]
    if isinstance(targets, Tensor) and targets.shape == (3, 11):
        same(targets[:, 7:], answer, "the last four targets are the digits of the answer")
        if bool((targets[:, :7] != -100).any()):
            raise Wrong("the first seven targets belong to the question: set them to -100")
    same(targets, torch.cat((torch.full((3, 7), -100), answer), dim=1), "targets is the character after each")


def pair_of_ids(value: object) -> tuple[Any, Any]:
    """Return idx and targets."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"it returns {kind(value)}; return idx, targets")
    return value[0], value[1]


def start_from(attempt: Attempt) -> None:
    """Copies of weights that fit; the rest keeps its values and is named."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "block": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    other = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "block": nn.Linear(4, 4), "extra": nn.Linear(2, 2)})
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = {name: weight.clone() for name, weight in other.state_dict().items()}
    found = called(attempt.named("start_from")(model, weights))
    new = ["embedding.weight", "head.weight", "head.bias"]
    for name, weight in model.named_parameters():
        expected = own[name] if name in new else other.state_dict()[name]
        same(weight, expected, f"{name} {'keeps its values' if name in new else 'is copied'}")
        if not weight.requires_grad or not weight.is_leaf:
            raise Wrong(f"{name} is no longer trainable; copy the values into the model's own parameter")
    if not isinstance(found, list | tuple) or list(found) != new:
        raise Wrong(f"it returns {', '.join(map(str, found)) if isinstance(found, list | tuple) else kind(found)}; the "
                    f"weights that stay are {', '.join(new)}")
    with torch.no_grad():
        weights["block.weight"].add_(1)
    same(model["block"].weight, other.state_dict()["block.weight"], "the model shares memory with the other weights")


TESTS: dict[str, tuple[Test, ...]] = {
    "bigram": (Test("BigramLanguageModel.forward", "logits and loss", bigram_forward),
               Test("BigramLanguageModel.generate", "samples that follow the table", bigram_generate)),
    "averaging": tuple(map(averages, ("average_by_loop", "average_by_matrix", "average_by_softmax"))),
    "one-head": (Test("Head.forward", "scores, scale, mask, softmax and values", one_head),),
    "multi-head": (Test("MultiHeadAttention", "separate heads, side by side", several_heads),),
    "feed-forward": (Test("FeedForward", "each position alone, with a ReLU", feed_forward),),
    "residual": (Test("FeedForward", "four times as wide inside", wide_feed_forward),
                 Test("Block.forward", "each part adds to x", residual)),
    "layer-norm": (Test("LayerNorm.forward", "rows of mean 0 and variance 1", layer_norm),
                   Test("Block.forward", "a norm before each part", pre_norm)),
    "dropout": (Test("Dropout.forward", "zeros in training, nothing at evaluation", dropout),),
    "rotary": (Test("RMSNorm.forward", "rows of mean square 1", rms_norm),
               Test("rotate", "pairs rotated by their angles", rotation)),
    "swiglu": (Test("SwiGLU.forward", "one half gates the other", swiglu),),
    "qk-norm": (Test("Attention.forward", "a norm, then a rotation, then attention", qk_norm),),
    "muon": (Test("orthogonalize", "singular values near 1", muon),),
    "average": (Test("add_to_average", "the mean of five models", average),),
    "heads": (Test("MultiHeadAttention.forward", "the same as a loop over the heads", heads_at_once),),
    "addition": (Test("write_sum", "sums as text", write_sum),
                 Test("make_batch", "the mask of the targets", make_batch)),
    "finetune": (Test("start_from", "what fits is copied, the rest is named", start_from),),
    "paper": (Test("FeedForward.forward", "a squared ReLU", squared_relu),),
}
