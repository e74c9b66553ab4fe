"""The decoders of gpt2 and Llama in compiled code: `step.cpp`, on a CPU with a C++ compiler.

The classes below have the fields of its structures, in the same order. Shape suffixes: `pages.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import LLAMA
from bardlet.data.named import cache_folder
from bardlet.inference.decoders.pages import PAGE, Pages, page_dtype
from bardlet.models.layers import RMSNorm, rope_frequencies
from bardlet.ops.linear import computing_dtype, quantized
from bardlet.runtime import native

PANEL = 64
"""Outputs of a weight that are stored together."""
GROUP = 32
"""Inputs of an int8 weight with a scale of their own."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"silu": 0, "gelu_new": 1, "gelu": 2, "relu": 3}


class Matrix(Structure):
    """A linear layer; kind: see KINDS."""

    _fields_ = [("panels", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("inputs", c_int64),
                ("outputs", c_int64), ("kind", c_int64)]


class Norm(Structure):
    """A LayerNorm, which is centered, or an RMSNorm; without a weight: none."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("centered", c_int64), ("eps", c_float)]


class Layer(Structure):
    """A block; a `gate` without panels: none."""

    _fields_ = [("norm1", Norm), ("norm2", Norm), ("q_norm", Norm), ("k_norm", Norm), ("qkv", Matrix), ("o", Matrix),
                ("gate", Matrix), ("up", Matrix), ("down", Matrix), ("rotates", c_int64)]


class Model(Structure):
    """The weights and the shape of a model; activation: see ACTIVATIONS, cache_kind: see KINDS."""

    _fields_ = [("layers", POINTER(Layer)), ("norm", Norm), ("head", Matrix), ("frequencies", c_void_p),
                ("n_layer", c_int64), ("channels", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
                ("head_dim", c_int64), ("inner", c_int64), ("activation", c_int64), ("cache_kind", c_int64)]


class Step(Structure):
    """The tensors of a step."""

    _fields_ = [("position", c_void_p), ("table", c_void_p), ("keys", c_void_p), ("values", c_void_p),
                ("x", c_void_p), ("scratch", c_void_p), ("rows", c_int64), ("width", c_int64), ("pages", c_int64),
                ("threads", c_int64)]


class PageTable:
    """The rows of a step: a position each, and the pages of its sequence."""

    def __init__(self, pages: Pages, table: Sequence[Sequence[int]], position: Sequence[int]) -> None:
        """See `pages.PagedStep`."""
        self.pages, self.width = pages, max(at // PAGE + 1 for at in position)
        padded = [[*row[:self.width], *[0] * (self.width - len(row))] for row in table]
        self.table_BP, self.position = torch.tensor(padded), torch.tensor(position)

    def advance(self) -> None:
        """Move each row on by one token, on the same page."""
        self.position += 1


class Decoder:
    """Read one token per row by `step.cpp`; a test compares it with `forward` of the models.

    The weights are packed: fp32, bf16, or int8 with a scale for each GROUP inputs of an output. The
    residual stream is fp32; int8 weights are multiplied by inputs that are rounded to 16 bits.
    """

    step_class = PageTable

    def __init__(self, library: ctypes.CDLL, model: Any, dtype: torch.dtype | None) -> None:
        c = model.config
        self._library, self._kept = library, list[Any]()
        self._weights = dtype or next(model.parameters()).dtype
        self.dtype = computing_dtype(next(model.parameters()), dtype)
        layers, norm, head, frequencies = (self._llama if c.model in LLAMA else self._gpt2)(model)
        self.model = Model(
            (Layer * c.n_layer)(*layers), norm, head, self._keep(frequencies), c.n_layer, c.n_embd, c.n_head,
            c.n_kv_head, c.head_dim, c.n_inner, ACTIVATIONS[c.activation],
            KINDS[page_dtype(torch.device("cpu"), self.dtype)])
        self._library.scratch_size.restype = c_int64

    def hidden(self, idx_B: Tensor, step: PageTable) -> Tensor:
        """Read a token (int64) per row, at the positions of `step`, and return the hidden states: (B, C)."""
        x_BC = torch.embedding(self._embedding, idx_B).float()
        if self._positions is not None:
            x_BC += self._positions[step.position]
        rows, threads, pages = len(idx_B), torch.get_num_threads(), step.pages
        scratch = self._scratch(rows, step.width, threads)
        self._library.step(byref(self.model), byref(Step(
            step.position.data_ptr(), step.table_BP.data_ptr(), pages.k_LNKDR.data_ptr(), pages.v_LNKRD.data_ptr(),
            x_BC.data_ptr(), scratch.data_ptr(), rows, step.width, pages.number + 1, threads)))
        return x_BC

    def logits(self, x_BC: Tensor) -> Tensor:
        """Apply the last norm and the head: (B, V)."""
        x_BC, rows, threads = x_BC.contiguous(), len(x_BC), torch.get_num_threads()
        out_BV, scratch = torch.empty(rows, self.model.head.outputs), self._scratch(rows, 0, threads)
        self._library.logits(byref(self.model), c_int64(rows), *(c_void_p(t.data_ptr()) for t in
                             (x_BC, scratch, out_BV)), c_int64(threads))  # fmt: skip
        return out_BV

    def _scratch(self, rows: int, width: int, threads: int) -> Tensor:
        return torch.empty(self._library.scratch_size(byref(self.model), *map(c_int64, (rows, width, threads))))

    def _llama(self, model: Any) -> tuple[list[Layer], Norm, Matrix, Tensor]:
        c, body = model.config, model.model
        self._embedding, self._positions = body.embed_tokens.weight.detach(), None
        layers = []
        for block in body.layers:
            a, m = block.self_attn, block.mlp
            qkv = [a.q_proj, a.k_proj, a.v_proj]
            bias = None if a.q_proj.bias is None else torch.cat([part.bias for part in qkv])
            layers.append(Layer(
                self._norm(block.input_layernorm), self._norm(block.post_attention_layernorm), self._norm(a.q_norm),
                self._norm(a.k_norm), self._matrix(torch.cat([part.weight for part in qkv]), bias),
                self._matrix(a.o_proj.weight, a.o_proj.bias), self._matrix(m.gate_proj.weight),
                self._matrix(m.up_proj.weight), self._matrix(m.down_proj.weight), a.rotates))
        head = body.embed_tokens if model.lm_head is None else model.lm_head
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return layers, self._norm(body.norm), self._matrix(head.weight), frequencies

    def _gpt2(self, model: Any) -> tuple[list[Layer], Norm, Matrix, None]:
        body = model.transformer
        self._embedding, self._positions = body.wte.weight.detach(), body.wpe.weight.detach().float()
        layers = [Layer(
            self._norm(block.ln_1), self._norm(block.ln_2), self._norm(None), self._norm(None),
            self._matrix(block.attn.c_attn.weight, block.attn.c_attn.bias),
            self._matrix(block.attn.c_proj.weight, block.attn.c_proj.bias), Matrix(),
            self._matrix(block.mlp.c_fc.weight, block.mlp.c_fc.bias),
            self._matrix(block.mlp.c_proj.weight, block.mlp.c_proj.bias), 0) for block in body.h]
        head = body.wte if model.lm_head is None else model.lm_head
        return layers, self._norm(body.ln_f), self._matrix(head.weight), None

    def _keep(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor, which lives as long as the decoder."""
        self._kept.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    def _vector(self, vector: Tensor | None) -> int | None:
        return self._keep(None if vector is None else vector.detach().float().contiguous())

    def _norm(self, norm: RMSNorm | nn.LayerNorm | None) -> Norm:
        if norm is None:
            return Norm()
        return Norm(self._vector(norm.weight), self._vector(getattr(norm, "bias", None)),
                    isinstance(norm, nn.LayerNorm), norm.eps)

    def _matrix(self, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        outputs, inputs = weight.shape
        scale = None
        if self._weights == torch.int8:
            weight, scale_OG = quantized(weight, GROUP)
            weight = F.pad(weight, (0, -inputs % GROUP))
            scale = self._keep(_panels(scale_OG))
        panels = _panels(weight.detach().to(self._weights), 2 if self._weights == torch.int8 else 1)
        return Matrix(self._keep(panels), scale, self._vector(bias), inputs, outputs, KINDS[panels.dtype])


def _panels(weight_OI: Tensor, together: int = 1) -> Tensor:
    """Return a weight as panels: (outputs / PANEL, inputs, PANEL), with some inputs of an output together."""
    outputs, inputs = weight_OI.shape
    padded = F.pad(weight_OI, (0, 0, 0, -outputs % PANEL)).view(-1, PANEL, inputs // together, together)
    return padded.transpose(1, 2).contiguous()


def decoder(model: Any, dtype: torch.dtype | None) -> Decoder | None:
    """Return a decoder with the current weights of `model`; None if this machine or the model has none.

    dtype: of the weights: fp32, bf16 or int8; None: the model's own.
    """
    own = next(model.parameters())
    if model.config.model not in ("gpt2", *LLAMA) or own.device.type != "cpu" or (dtype or own.dtype) not in KINDS:
        return None
    library = _library()
    return None if library is None else Decoder(library, model, dtype)


def is_there() -> bool:
    """Return True if this machine has the compiled step."""
    return _library() is not None


def _library() -> ctypes.CDLL | None:
    return native.library(Path(__file__).with_name("step.cpp"), cache_folder() / "compiled")
