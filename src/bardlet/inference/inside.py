"""Look into a model: attention weights, the logit lens, losses of tokens, neighbors of tokens, heads switched off.

Texts are lists of token ids. Shape suffixes: `models/layers.py`. All calls leave the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import LLAMA, RUNGS, WITHOUT_HEADS
from bardlet.errors import BardletError, Unsupported
from bardlet.inference.generate import eval_mode
from bardlet.inference.sampling import check_finite, not_finite

LONGEST = 256
"""Tokens of the longest text that can be looked at."""

Heads = Collection[tuple[int, int]]
"""Attention heads as (layer, head), both counted from 0."""


@dataclass(frozen=True)
class Layer:
    """A layer with attention.

    weights: takes the arguments of `attention.forward`, returns the weights (H, T, T) of a batch of one row.
    projection: its input has the outputs of the heads, side by side; None for a rung that only concatenates them.
    """

    attention: nn.Module
    weights: Callable[..., Tensor]
    projection: nn.Module | None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, whatever its family.

    steps: each reads the residual stream and returns the next one, all (B, T, C). norm: comes before the head.
    """

    steps: dict[str, nn.Module]
    layers: list[Layer]
    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    n_head: int


@dataclass(frozen=True)
class Reading:
    """A text, and the values that a model computed from it.

    stream_STC: the residual stream after the embedding and after each of `steps`. attention_LHTT: float32; row t has
    the weights with which token t attends to each token. logits_TV: float32.
    """

    ids: list[int]
    steps: list[str]
    stream_STC: Tensor
    attention_LHTT: Tensor
    logits_TV: Tensor


@dataclass(frozen=True)
class Guess:
    """The prediction after a token. following: probability of the token that follows; None for the last token."""

    token: int
    probability: float
    following: float | None


@dataclass(frozen=True)
class Neighbor:
    """A token whose embedding is near. similarity: cosine of the angle between both embeddings."""

    token: int
    similarity: float


# ---------------------------------------------------------------------------- the parts of a model


def anatomy(model: Any) -> Anatomy:
    """Return the parts of a gpt2, one of LLAMA or a rung with attention. Raises Unsupported for other models."""
    config = model.config
    kind, n_head = config.model, 1 if config.model in WITHOUT_HEADS else config.n_head
    if config.scores:
        raise Unsupported("a reward model scores texts and predicts no tokens; choose a language model")
    if kind in LLAMA:
        body, blocks = model.model, list(model.model.layers)
        layers = [Layer(b.self_attn, partial(_weights_of_llama, b.self_attn), b.self_attn.o_proj) for b in blocks]
        return Anatomy(_numbered(blocks), layers, body.norm, model.logits, n_head)
    if kind == "gpt2":
        body, blocks = model.transformer, list(model.transformer.h)
        layers = [Layer(b.attn, partial(_weights_of_gpt2, b.attn), b.attn.c_proj) for b in blocks]
        return Anatomy(_numbered(blocks), layers, body.ln_f, model.logits, n_head)
    if kind in ("bigram", "averaging"):
        raise Unsupported(f"the rung {kind} has no attention heads; choose a later rung")
    if kind not in RUNGS:
        raise Unsupported(f"{kind}: only gpt2, Llama-like models and the rungs of the ladder can be looked at; "
                          "choose one of these")
    blocks = list(getattr(model, "blocks", []))
    if blocks:
        steps, attentions = _numbered(blocks), [block.sa for block in blocks]
    else:  # the rungs before blocks
        attention = model.sa_head if kind == "one-head" else model.sa_heads
        steps, attentions = {"attention": attention}, [attention]
        if kind == "feed-forward":
            steps["feed-forward"] = model.ffwd
    layers = [Layer(each, partial(_weights_of_rung, each), getattr(each, "proj", None)) for each in attentions]
    return Anatomy(steps, layers, getattr(model, "ln_f", nn.Identity()), model.lm_head, n_head)


def limit(model: Any) -> int:
    """Return the number of tokens of the longest text that can be looked at."""
    return min(int(model.config.block_size), LONGEST)


def _numbered(blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    return {f"block {number}": block for number, block in enumerate(blocks, 1)}


def attention_weights(q_BTHD: Tensor, k_BTKD: Tensor) -> Tensor:
    """Return the causal attention weights of queries and keys: (B, H, T, T), float32."""
    H, K = q_BTHD.shape[2], k_BTKD.shape[2]
    q_BHTD = q_BTHD.transpose(1, 2).float()
    k_BHTD = k_BTKD.transpose(1, 2).float().repeat_interleave(H // K, dim=1)
    score_BHTT = q_BHTD @ k_BHTD.transpose(-2, -1) * q_BHTD.shape[-1] ** -0.5
    hide_TT = torch.full(score_BHTT.shape[-2:], float("-inf"), device=score_BHTT.device).triu(1)
    return F.softmax(score_BHTT + hide_TT, dim=-1)


def _weights_of_llama(attention: Any, x_BTC: Tensor, cos: Tensor, sin: Tensor, *unused: Any) -> Tensor:
    q_BTHD, k_BTKD, _ = attention.project(x_BTC, cos, sin)
    return attention_weights(q_BTHD, k_BTKD)[0]


def _weights_of_gpt2(attention: Any, x_BTC: Tensor, *unused: Any) -> Tensor:
    q_BTHD, k_BTHD, _ = attention.project(x_BTC)
    return attention_weights(q_BTHD, k_BTHD)[0]


def _weights_of_rung(attention: Any, x_BTC: Tensor) -> Tensor:
    if not hasattr(attention, "weights"):
        return torch.cat([head.weights(x_BTC) for head in attention.heads]).float()
    weights: Tensor = attention.weights(x_BTC)[0].float()
    return weights if weights.dim() == 3 else weights[None]  # rung 3 has a single head


# ---------------------------------------------------------------------------- heads switched off


@contextmanager
def switched_off(model: Any, off: Heads) -> Iterator[None]:
    """Replace the outputs of attention heads by zeros for the `with` block.

    Raises:
        Unsupported: the model has no attention heads. BardletError: a head of `off` does not exist.
    """
    if not off:
        yield
        return
    parts, heads = anatomy(model), dict[int, list[int]]()
    for number, head in sorted(set(off)):
        if not (0 <= number < len(parts.layers) and 0 <= head < parts.n_head):
            raise BardletError(f"there is no head {head} in layer {number}; the model has {len(parts.layers)} layers "
                               f"of {parts.n_head} heads, both counted from 0")
        heads.setdefault(number, []).append(head)
    with ExitStack() as hooks:
        for number, silent in heads.items():
            hooks.callback(_silence(parts.layers[number], silent, parts.n_head).remove)
        yield


def _silence(layer: Layer, heads: list[int], n_head: int) -> Any:
    """Hook zeros in place of the outputs of `heads`; return the hook's handle."""
    def silent(y_BTC: Tensor) -> Tensor:
        y_BTHD = y_BTC.unflatten(-1, (n_head, -1)).clone()
        y_BTHD[:, :, heads] = 0
        return y_BTHD.flatten(-2)

    if layer.projection is None:
        return layer.attention.register_forward_hook(lambda module, args, y: silent(y))
    return layer.projection.register_forward_pre_hook(lambda module, args: (silent(args[0]),))


# ---------------------------------------------------------------------------- reading a text


@torch.inference_mode()
def read(model: Any, ids: Sequence[int], off: Heads = ()) -> Reading:
    """Run a model over a text of 1 to `limit(model)` tokens, and keep its streams, attention weights and logits.

    Raises:
        Unsupported: a model without attention heads, or of another family.
        BardletError: no token, too many tokens, a head of `off` that does not exist, or logits that are not finite.
    """
    parts = anatomy(model)
    if not 1 <= len(ids) <= limit(model):
        raise BardletError(f"the text has {len(ids)} tokens; this view reads 1 to {limit(model)} tokens")
    idx_BT = torch.tensor([list(ids)], device=next(model.parameters()).device)
    stream: list[Tensor] = []
    arguments: list[tuple[Any, ...]] = []
    with eval_mode(model), switched_off(model, off), ExitStack() as hooks:
        steps = list(parts.steps.values())
        hooks.callback(steps[0].register_forward_pre_hook(lambda module, args: stream.append(args[0][0])).remove)
        for step in steps:
            hooks.callback(step.register_forward_hook(lambda module, args, y: stream.append(y[0])).remove)
        for layer in parts.layers:
            hooks.callback(layer.attention.register_forward_pre_hook(
                lambda module, args: arguments.append(args)).remove)
        logits_TV = model(idx_BT)[0].float()
    check_finite(logits_TV)
    with eval_mode(model):
        weights = [layer.weights(*args) for layer, args in zip(parts.layers, arguments, strict=True)]
    return Reading(list(ids), ["embedding", *parts.steps], torch.stack(stream), torch.stack(weights), logits_TV)


@torch.inference_mode()
def lens(model: Any, reading: Reading, step: int) -> list[Guess]:
    """Return the prediction that the residual stream of `reading.steps[step]` holds at each token.

    The final norm and the head read each stream as if it were the last (nostalgebraist 2020, *interpreting GPT: the
    logit lens*).
    """
    parts = anatomy(model)
    p_TV = F.softmax(parts.head(parts.norm(reading.stream_STC[step])).float(), dim=-1)
    best_T, token_T = p_TV.max(dim=-1)
    next_T = torch.tensor(reading.ids[1:], dtype=torch.int64, device=p_TV.device)
    following = p_TV[:-1].gather(1, next_T[:, None])[:, 0].tolist()
    return [Guess(*each) for each in zip(token_T.tolist(), best_T.tolist(), [*following, None], strict=True)]


def losses(reading: Reading) -> list[float]:
    """Return the loss of each token but the first, in nats: T - 1 numbers."""
    target_T = torch.tensor(reading.ids[1:], dtype=torch.int64, device=reading.logits_TV.device)
    return F.cross_entropy(reading.logits_TV[:-1], target_T, reduction="none").tolist()


@torch.inference_mode()
def loss_in_windows(model: Any, ids: Sequence[int]) -> float | None:
    """Return the mean loss of every token but the first, in nats; None for a single token.

    Works for models of any context: windows of block_size tokens with a stride of block_size, each token predicted
    once. Raises BardletError if the logits are not finite.
    """
    size, device, total = int(model.config.block_size), next(model.parameters()).device, 0.0
    with eval_mode(model):
        for start in range(0, len(ids) - 1, size):
            idx_T = torch.tensor(ids[start : start + size + 1], device=device)
            logits_TV = model(idx_T[None, :-1])[0].float()
            check_finite(logits_TV)
            total += float(F.cross_entropy(logits_TV, idx_T[1:], reduction="sum"))
    return total / (len(ids) - 1) if len(ids) > 1 else None


@torch.inference_mode()
def neighbors(model: Any, token: int, count: int = 10, vocab_size: int | None = None) -> list[Neighbor]:
    """Return the tokens whose embeddings are nearest to a token's, the nearest first, without the token itself.

    Args:
        vocab_size: number of tokens of the tokenizer; a vocabulary may be padded after them.

    Raises:
        Unsupported: another family. BardletError: the embeddings are not finite.
    """
    weight_VC = _embedding(model).weight[:vocab_size].float()
    unit_VC = F.normalize(weight_VC, dim=-1)
    similarity_V = unit_VC @ unit_VC[token]
    if not bool(similarity_V.isfinite().all()):
        raise not_finite()
    similarity_V[token] = -torch.inf
    best = similarity_V.topk(min(count, len(similarity_V) - 1))
    return [Neighbor(*each) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _embedding(model: Any) -> Any:
    kind = model.config.model
    if kind in LLAMA:
        return model.model.embed_tokens
    if kind == "gpt2":
        return model.transformer.wte
    if kind not in RUNGS:
        raise Unsupported(f"{kind}: only gpt2, Llama-like models and the rungs of the ladder can be looked at; "
                          "choose one of these")
    return model.token_embedding_table


# ---------------------------------------------------------------------------- writing on


class Greedy:
    """A text that a model continues with its likeliest token, by the model's own modules, so that hooks count.

    `generate.generate` at temperature 0 writes the same tokens with packed weights.
    """

    def __init__(self, model: Any, ids: Sequence[int], off: Heads = ()) -> None:
        """ids: at least one token; the last block_size are read. off: heads that are switched off."""
        self.model, self.off = model, off
        self.window = int(model.config.block_size)
        self.ids = list(ids[-self.window :])
        self.device = next(model.parameters()).device
        self._cache: Any = None

    @torch.inference_mode()
    def write(self, count: int) -> list[int]:
        """Return the next `count` tokens. Raises BardletError if the logits are not finite."""
        written = []
        with eval_mode(self.model), switched_off(self.model, self.off):
            for _ in range(count):
                logits_V = self._next_logits()
                check_finite(logits_V)
                written.append(int(logits_V.argmax()))
                self._append(written[-1])
        return written

    def _append(self, token: int) -> None:
        """Append a token. A full window begins anew, as in `generate.stream`."""
        self.ids.append(token)
        if len(self.ids) > self.window:
            keep = self.window if not hasattr(self.model, "new_cache") else max(1, self.window // 2)
            self.ids, self._cache = self.ids[-keep:], None

    def _next_logits(self) -> Tensor:
        """Return the logits after the last token: (V,)."""
        if not hasattr(self.model, "new_cache"):  # a rung
            return self.model(torch.tensor([self.ids], device=self.device))[0, -1]
        unread = self.ids if self._cache is None else self.ids[-1:]
        self._cache = self.model.new_cache(1) if self._cache is None else self._cache
        x_BTC = self.model.hidden(torch.tensor([unread], device=self.device), self._cache)
        return self.model.logits(x_BTC[:, -1])[0]
