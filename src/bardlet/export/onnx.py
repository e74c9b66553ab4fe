"""Write a model for onnxruntime and transformers.js: an ONNX graph with a cache of keys and values.

The graph is built operation by operation from the canonical weights, with Hugging Face's names of inputs and outputs
(Optimum, "text-generation-with-past"):

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T), past_key_values.N.{key, value} (B, K, P, D)
    -> logits (B, T, V), present.N.{key, value} (B, K, P + T, D)

B rows of a batch, T new positions, P positions in the cache, K key-value heads of D channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bardlet.config.model import LLAMA
from bardlet.errors import BardletError
from bardlet.export import canonical
from bardlet.runtime import atomic, manifest
from bardlet.tokenizer import Tokenizer

OPSET = 18
"""Version of ONNX's operators (2022): onnxruntime 1.14 and everything since has them."""
FAMILIES = ("gpt2", *LLAMA)
"""Models that have a graph here."""
MAX_BYTES = 2_000_000_000
"""Size of the largest file in ONNX's format (protobuf)."""
HIDDEN = float(np.finfo(np.float32).min)
"""Score of a position that must not be seen."""


def library() -> Any:
    """Return the package onnx. BardletError if it is not installed."""
    try:
        import onnx
    except ImportError:
        raise BardletError("--to onnx needs the package onnx; install it with: pip install 'bardlet[export]'") from None
    return onnx


def check(model: Any) -> None:
    """Raise BardletError if there is no graph for such a model, or the extra is not installed."""
    config = model.config
    if config.model not in FAMILIES or config.scores:
        kind = "a reward model" if config.scores else config.model
        raise BardletError(f"--to onnx is for gpt2 and Llama-like language models, not for {kind}; "
                           f"use --to hf{' or --to html' * (not config.scores)}")
    library()
    if (size := 4 * sum(p.numel() for p in model.parameters())) >= MAX_BYTES:
        raise BardletError(f"--to onnx: the weights have {size / 1e9:.1f} GB, and a file of ONNX holds 2; use --to hf, "
                           "and Optimum to convert the folder")


def write(path: Path, model: Any) -> None:
    """Write the graph and its weights to the file `path`, in float32."""
    named = canonical.weights(model)
    graph = Graph(named, canonical.describe(model, named))
    graph.build()
    data = graph.serialize()
    atomic.write_atomically(path, lambda temporary: temporary.write_bytes(data), len(data))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Replace the tokenizer.json of a tokenizer of characters by one that transformers.js can use; ids stay.

    transformers.js has no WordLevel, and raises an error at a character that is not in the vocabulary. BPE without
    merges has the same ids, and replaces such a character by the same one, in every library.
    """
    if tokenizer.kind != "char":
        return
    pipeline = json.loads(tokenizer.json)
    words = pipeline["model"]
    pipeline["model"] = {"type": "BPE", "dropout": None, "unk_token": words["unk_token"],
                         "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                         "byte_fallback": False, "ignore_merges": False, "vocab": words["vocab"], "merges": []}
    text = json.dumps(pipeline, ensure_ascii=False, indent=2)
    manifest.replace_file(folder, "tokenizer.json", lambda path: path.write_bytes(text.encode()), len(text.encode()))


class Graph:
    """An ONNX graph under construction. Each method adds nodes and returns the name of the result."""

    def __init__(self, weights: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
        self.onnx, self.spec = library(), spec
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.outputs: list[str] = []

    # ---------------------------------------------------------------- nodes

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """Add a node; return its output, or a list of its outputs."""
        made = [name or f"{kind}_{len(self.nodes)}"] if outputs == 1 else [f"{kind}_{len(self.nodes)}_{n}"
                                                                           for n in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), made, **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant."""
        array = np.asarray(value, dtype)
        key = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        name = f"constant_{hashlib.sha256(key).hexdigest()[:16]}"
        self.constants.setdefault(name, self.onnx.numpy_helper.from_array(array, name))
        return name

    def whole(self, *values: int) -> str:
        """Add a constant vector of integers: a shape, or axes."""
        return self.constant(values, np.int64)

    def weight(self, name: str, transposed: bool = False) -> str:
        """Add a weight of the model."""
        key = f"{name}.transposed" if transposed else name
        array = self.weights[name].numpy()
        stored = np.ascontiguousarray(array.T if transposed else array)
        self.constants.setdefault(key, self.onnx.numpy_helper.from_array(stored, key))
        return key

    # ---------------------------------------------------------------- layers

    def linear(self, layer: str, x: str) -> str:
        """(..., inputs) -> (..., outputs)."""
        y = self.op("MatMul", x, self.weight(f"{layer}.weight", transposed=True))
        return self.op("Add", y, self.weight(f"{layer}.bias")) if f"{layer}.bias" in self.weights else y

    def norm(self, layer: str, x: str) -> str:
        """LayerNorm (with a bias) or RMSNorm (without), over the last dimension."""
        eps = float(self.spec["eps"])
        if f"{layer}.bias" in self.weights:
            return self.op("LayerNormalization", x, self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias"),
                           axis=-1, epsilon=eps)
        square = self.op("ReduceMean", self.op("Mul", x, x), self.whole(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", square, self.constant(eps)))
        return self.op("Mul", self.op("Div", x, root), self.weight(f"{layer}.weight"))

    def activation(self, x: str) -> str:
        """The nonlinearity of the feed-forward layer."""
        kind, half = self.spec["activation"], self.constant(0.5)
        if kind == "relu":
            return self.op("Relu", x)
        if kind == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if kind == "gelu":
            bent = self.op("Erf", self.op("Mul", x, self.constant(math.sqrt(0.5))))
        else:
            cube = self.op("Mul", self.op("Mul", x, self.op("Mul", x, x)), self.constant(0.044715))
            bent = self.op("Tanh", self.op("Mul", self.op("Add", x, cube), self.constant(math.sqrt(2 / math.pi))))
        return self.op("Mul", self.op("Mul", x, half), self.op("Add", bent, self.constant(1.0)))

    def heads(self, x: str, count: int) -> str:
        """(B, T, heads D) -> (B, heads, T, D)."""
        split = self.op("Reshape", x, self.whole(0, 0, count, self.spec["headSize"]))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotate(self, x: str, cos: str, sin: str) -> str:
        """Rotate channel pairs across the halves of each head. cos, sin: (B, 1, T, D)."""
        left, right = self.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        turned = self.op("Concat", self.op("Neg", right), left, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def attention(self, block: str, n: int, x: str, mask: str, angles: tuple[str, str] | None) -> str:
        """Self-attention of block n, with its cache."""
        H, K, D = (self.spec[name] for name in ("heads", "kvHeads", "headSize"))
        q, k, v = (self.heads(self.linear(f"{block}.{name}", x), count) for name, count in
                   (("q", H), ("k", K), ("v", K)))
        if f"{block}.qNorm.weight" in self.weights:
            q, k = self.norm(f"{block}.qNorm", q), self.norm(f"{block}.kNorm", k)
        if angles and n not in self.spec["withoutPositions"]:
            q, k = self.rotate(q, *angles), self.rotate(k, *angles)
        k, v = (self.op("Concat", f"past_key_values.{n}.{name}", new, axis=2, name=f"present.{n}.{name}")
                for name, new in (("key", k), ("value", v)))
        self.outputs += [k, v]
        if K < H:
            k, v = self.shared(k, H // K), self.shared(v, H // K)
        score = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        score = self.op("Add", self.op("Mul", score, self.constant(1 / math.sqrt(D))), mask)
        y = self.op("Transpose", self.op("MatMul", self.op("Softmax", score, axis=-1), v), perm=[0, 2, 1, 3])
        return self.linear(f"{block}.o", self.op("Reshape", y, self.whole(0, 0, H * D)))

    def shared(self, x: str, times: int) -> str:
        """Repeat each of K heads for the queries that share it: (B, K, S, D) -> (B, K times, S, D)."""
        wide = self.op("Concat", *[self.op("Unsqueeze", x, self.whole(2))] * times, axis=2)
        shape = self.op("Shape", x)
        rows, rest = (self.op("Slice", shape, self.whole(a), self.whole(b)) for a, b in ((0, 1), (2, 4)))
        return self.op("Reshape", wide, self.op("Concat", rows, self.whole(self.spec["kvHeads"] * times), rest, axis=0))

    # ---------------------------------------------------------------- the whole

    def build(self) -> None:
        """Add the nodes of the model."""
        x = self.op("Gather", self.weight("embed.weight"), "input_ids")
        if self.spec["positions"] == "learned":
            x = self.op("Add", x, self.op("Gather", self.weight("positions.weight"), "position_ids"))
        mask, angles = self.mask(), self.angles() if self.spec["positions"] == "rotary" else None
        for n in range(self.spec["layers"]):
            block = f"blocks.{n}"
            x = self.op("Add", x, self.attention(block, n, self.norm(f"{block}.norm1", x), mask, angles))
            h = self.norm(f"{block}.norm2", x)
            inner = self.linear(f"{block}.up", h)
            if f"{block}.gate.weight" in self.weights:
                inner = self.op("Mul", self.activation(self.linear(f"{block}.gate", h)), inner)
            else:
                inner = self.activation(inner)
            x = self.op("Add", x, self.linear(f"{block}.down", inner))
        own = self.spec["head"] == "own"  # otherwise the file has the shared matrix once
        head = (self.weight("head.weight", transposed=True) if own
                else self.op("Transpose", self.weight("embed.weight"), perm=[1, 0]))
        self.op("MatMul", self.norm("norm", x), head, name="logits")

    def mask(self) -> str:
        """0 where a query may see a key, HIDDEN in the future and in padding: (B, 1, T, P + T)."""
        new, whole = (self.op("Slice", self.op("Shape", name), self.whole(1), self.whole(2))
                      for name in ("input_ids", "attention_mask"))
        scalar = self.whole()
        new, whole = (self.op("Reshape", length, scalar) for length in (new, whole))
        zero, one = self.constant(0, np.int64), self.constant(1, np.int64)
        key = self.op("Range", zero, whole, one)
        query = self.op("Range", self.op("Sub", whole, new), whole, one)
        past = self.op("LessOrEqual", key, self.op("Unsqueeze", query, self.whole(1)))  # (T, P + T)
        real = self.op("Unsqueeze", self.op("Cast", "attention_mask", to=self.onnx.TensorProto.BOOL), self.whole(1, 2))
        return self.op("Where", self.op("And", past, real), self.constant(0.0), self.constant(HIDDEN))

    def angles(self) -> tuple[str, str]:
        """Cosine and sine of the rotary angles of each position: two (B, 1, T, D)."""
        frequency = np.array(self.spec["frequencies"], dtype=np.float32)
        position = self.op("Cast", "position_ids", to=self.onnx.TensorProto.FLOAT)
        angle = self.op("Mul", self.op("Unsqueeze", position, self.whole(1, 3)), self.constant(frequency))
        both = self.op("Concat", angle, angle, axis=-1)
        return self.op("Cos", both), self.op("Sin", both)

    def serialize(self) -> bytes:
        """Return the finished model as bytes."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        K, D = self.spec["kvHeads"], self.spec["headSize"]

        def tensor(name: str, dtype: int, *shape: Any) -> Any:
            return helper.make_tensor_value_info(name, dtype, list(shape))

        names = [f"{n}.{kind}" for n in range(self.spec["layers"]) for kind in ("key", "value")]
        inputs = [tensor("input_ids", types.INT64, "batch", "length"),
                  tensor("attention_mask", types.INT64, "batch", "total"),
                  tensor("position_ids", types.INT64, "batch", "length"),
                  *(tensor(f"past_key_values.{name}", types.FLOAT, "batch", K, "past", D) for name in names)]
        outputs = [tensor("logits", types.FLOAT, "batch", "length", self.spec["vocab"]),
                   *(tensor(f"present.{name}", types.FLOAT, "batch", K, "total", D) for name in names)]
        graph = helper.make_graph(self.nodes, "bardlet", inputs, outputs, list(self.constants.values()))
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, producer_name="bardlet", opset_imports=opset, ir_version=8)
        self.onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


