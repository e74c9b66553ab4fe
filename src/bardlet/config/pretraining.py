"""Settings of `bardlet train`: pretraining on a text, or translation on sentence pairs. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, cast

from bardlet.config.model import (
    LLAMA,
    MAX_SINUSOIDS,
    ROTARY,
    RUNGS,
    WITHOUT_BLOCKS,
    WITHOUT_HEADS,
    Activation,
    ModelConfig,
)
from bardlet.config.settings import AUTO, Auto, Rows, Settings, as_typed, flag
from bardlet.errors import BardletError

Model = Literal["qwen3", "gpt2", "llama", "mistral", "qwen2", "smollm3", "encdec", "bigram", "averaging",
                "one-head", "multi-head", "feed-forward", "residual", "layer-norm", "dropout", "rotary", "swiglu",
                "qk-norm"]

ABSENT_IN = {"n_layer": WITHOUT_BLOCKS, "n_head": WITHOUT_HEADS, "n_embd": ("bigram",), "n_inner": WITHOUT_BLOCKS,
             "dropout": (*WITHOUT_BLOCKS, "residual", "layer-norm"), "tie_embeddings": RUNGS,
             "optimizer": ("bigram", "averaging"), "muon_lr": ("bigram", "averaging")}
"""Settings that do nothing for some rungs of the ladder. (Two rungs have no matrices for Muon.)"""


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a model and its tokenizer; with --init they come from the weights."""

    tokenizer: Literal["auto", "char", "byte", "bpe"] = "auto"
    """Characters, bytes or byte-level BPE. auto chooses by the size and alphabet of the text."""
    vocab_size: int | None = None
    """BPE vocabulary size (default: depends on the size of the text)."""
    model: Model = "qwen3"
    """Architecture: qwen3 or a relative (llama, mistral, qwen2, smollm3), gpt2, encdec or a rung. The rungs of the
    ladder are bigram, averaging, one-head, multi-head, feed-forward, residual, layer-norm, dropout, rotary, swiglu and
    qk-norm. For sentence pairs: encdec."""
    n_layer: Auto[int] = AUTO
    """Transformer blocks (default: chosen for --minutes). With --steps, or a rung of the ladder: 4."""
    n_encoder_layer: int | None = None
    """Encoder blocks of encdec (default: n_layer)."""
    n_head: Auto[int] = AUTO
    """Attention heads (default: chosen for --minutes). With --steps, or a rung of the ladder: 4."""
    n_kv_head: int | None = None
    """Key and value heads of qwen3 and its relatives (default: n_head). Fewer is grouped-query attention."""
    n_embd: Auto[int] = AUTO
    """Embedding dimension (default: chosen for --minutes). With --steps, or a rung of the ladder: 192."""
    n_inner: int | None = None
    """Width of the feed-forward layer (default: 4 n_embd; 8/3 n_embd in qwen3 and its relatives). Both cost the
    same, since these have three matrices."""
    tie_embeddings: bool = True
    """Share one matrix between the token embedding and the output head."""
    activation: Activation | None = None
    """Activation of the feed-forward layer (default: gelu_new in gpt2, relu in encdec). The others always use silu."""
    bias: bool = True
    """Train the biases of gpt2. With --no-bias they stay at zero, as if the layers had none (nanoGPT's default)."""


SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
"""Settings that make up a shape; if the user sets any, the plan does not choose a shape."""

SET_BY_WEIGHTS = tuple(field.name for field in fields(ModelSettings))
"""Settings that come from the weights of --init."""


@dataclass(frozen=True)
class FromScratch(ModelSettings, Settings):
    """Settings of a run that builds a new model, unless --init names one."""

    stage, command, default_minutes = "pretrain", "train", 5.0
    auto_defaults: ClassVar[dict[str, Any]] = {**Settings.auto_defaults, "n_layer": 4, "n_head": 4, "n_embd": 192,
                                               "block_size": 128}

    block_size: Auto[int] = AUTO
    """Context window in tokens (default: chosen for --minutes). With --steps, or a rung of the ladder: 128; sentence
    pairs: 256; with --init: that of the weights."""
    dropout: Auto[float] = AUTO
    """Dropout probability (default: chosen for --minutes). With --steps, or a rung of the ladder: 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "n_layer", "n_head", "n_embd")
        self.require(lambda x: x > 0, "more than 0, and finite", "vocab_size", "n_encoder_layer", "n_kv_head",
                     "n_inner")
        # a million layers take minutes to count, even without memory
        for maximum, names in ((2**24, ("vocab_size",)), (1000, ("n_layer", "n_encoder_layer")),
                               (2**20, ("n_head",))):
            self.require(lambda x, maximum=maximum: x <= maximum, f"at most {maximum}", *names)
        if self.lora and self.init is None:
            raise BardletError(f"--lora {self.lora}: LoRA adapts a trained model; name it with --init DIR, or "
                               "drop --lora")
        if self.init is None:  # else the weights decide the shape
            if self.model not in WITHOUT_HEADS:
                self._check_heads()
            self._check_model()

    def _check_model(self) -> None:
        """Raise BardletError if a setting does not apply to the architecture."""
        if self.model in RUNGS and self.n_kv_head not in (None, self._or_default("n_head")):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: the rungs of the ladder have a key and a value for each "
                               "head; drop it, or use --model qwen3")
        if self.activation and self.model not in ("gpt2", "encdec"):
            raise BardletError(f"--activation {self.activation}: {self.model} has a fixed activation; "
                               "drop it, or use --model gpt2")
        if not self.bias and self.model != "gpt2":
            raise BardletError(f"--no-bias: only gpt2 can leave out its biases, not {self.model}; drop it, or use "
                               "--model gpt2")
        if self.model in ("gpt2", "encdec") and self.n_kv_head not in (None, heads := self._or_default("n_head")):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: {self.model} has a key and a value for each of its "
                               f"{heads} heads; drop it, or use --model qwen3")

    def _or_default(self, name: str) -> int:
        """Return a setting of the shape, or its default while the plan has not chosen."""
        value = getattr(self, name)
        return cast(int, self.auto_defaults[name] if value is None else value)

    def _check_heads(self) -> None:
        n_embd, n_head = self._or_default("n_embd"), self._or_default("n_head")
        if n_embd % n_head:
            near = next(h for d in range(n_head) for h in (n_head - d, n_head + d) if n_embd % h == 0)
            raise BardletError(f"--n-embd {n_embd} does not divide among --n-head {n_head} heads; "
                               f"use --n-head {near} or --n-embd {-(-n_embd // n_head) * n_head}")
        if self.model in (*LLAMA, *ROTARY) and (n_embd // n_head) % 2:
            raise BardletError(f"--n-embd {n_embd} with --n-head {n_head} gives heads of {n_embd // n_head} channels; "
                               "rotary positions need an even number; change one of them")
        if self.n_kv_head and n_head % self.n_kv_head:
            near = next(h for h in range(self.n_kv_head, 0, -1) if n_head % h == 0)
            raise BardletError(f"--n-kv-head {self.n_kv_head} does not divide --n-head {n_head}; each key and value "
                               f"head serves the same number of query heads: use --n-kv-head {near}")

    def lacks(self, name: str) -> bool:
        """Return True if the setting does nothing for this model."""
        return self.model in ABSENT_IN.get(name, ())

    def unused(self, named: Collection[str] = ()) -> list[str]:
        """Return the names of settings that do nothing for this model.

        named: settings that the user typed; they count even if the value is the default.
        """
        unused = []
        for name in ABSENT_IN:
            value, default = getattr(self, name), getattr(type(self), name)
            # these rungs have an untied head and AdamW only: for them the default itself does nothing
            chosen = value == default and name in named if name in ("tie_embeddings", "optimizer") else value != default
            if chosen and self.lacks(name) and not (self.init and name in SET_BY_WEIGHTS):
                unused.append(name)
        return unused

    def refuse_unused(self, named: Collection[str] = ()) -> None:
        """Raise BardletError for the first `unused` setting."""
        for name in self.unused(named):
            *others, last = [model for model in (*RUNGS, "gpt2", "qwen3") if model not in ABSENT_IN[name]]
            value = getattr(self, name)
            setting = flag(name) + ("" if value is True else f" {value}")
            raise BardletError(f"{setting}: does not apply to {self.model}; drop it, or use --model "
                               f"{', '.join(others)} or {last}")

    def as_model(self, shape: ModelConfig) -> Self:
        """Return the settings with the shape of given weights; the context window may be shorter."""
        config = replace(self, model=cast(Model, shape.model), n_layer=shape.n_layer, n_head=shape.n_head,
                         n_encoder_layer=shape.n_encoder_layer or None, n_kv_head=shape.n_kv_head,
                         n_embd=shape.n_embd, n_inner=shape.n_inner, tie_embeddings=shape.tie_embeddings,
                         block_size=min(shape.block_size, self.block_size or shape.block_size))
        config._check_model()
        return config

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the shape of the model for a tokenizer with `vocab_size` tokens."""
        c = self.resolved()
        if c.model in RUNGS:
            return c._rung(vocab_size)
        gated = c.model in LLAMA
        return ModelConfig(
            model=c.model, vocab_size=vocab_size, block_size=c.block_size, n_layer=c.n_layer,
            n_encoder_layer=(c.n_encoder_layer or c.n_layer) if c.model == "encdec" else 0,
            n_head=c.n_head, n_kv_head=c.n_kv_head or c.n_head, n_embd=c.n_embd,
            head_dim=c.n_embd // c.n_head,
            n_inner=c.n_inner or (c._gated_width() if gated else 4 * c.n_embd),
            dropout=c.dropout, tie_embeddings=c.tie_embeddings,
            activation="silu" if gated else c.activation or ("gelu_new" if c.model == "gpt2" else "relu"),
            norm_eps=1e-6 if gated else 1e-5,
            layers_without_positions=tuple(range(3, c.n_layer, 4)) if c.model == "smollm3" else (),
        )

    def _gated_width(self) -> int:
        """Return 8/3 n_embd, rounded up to a multiple of 32: three matrices for the cost of two of width 4 n_embd."""
        return -(-8 * self.n_embd // (3 * 32)) * 32

    def _rung(self, vocab_size: int) -> ModelConfig:
        """Return the shape of a rung of the ladder; parts that it lacks count as 1, and its head is not tied."""
        gated, modern = self.model in ("swiglu", "qk-norm"), self.model in ROTARY
        n_head = 1 if self.model in WITHOUT_HEADS else self.n_head
        wide = self._gated_width() if gated else 4 * self.n_embd
        return ModelConfig(
            model=self.model, vocab_size=vocab_size, block_size=self.block_size,
            n_layer=1 if self.model in WITHOUT_BLOCKS else self.n_layer, n_head=n_head, n_kv_head=n_head,
            n_embd=self.n_embd, head_dim=self.n_embd // n_head,
            n_inner=self.n_embd if self.model == "feed-forward" else self.n_inner or wide,
            dropout=0.0 if self.lacks("dropout") else self.dropout,
            tie_embeddings=False, activation="silu" if gated else "relu", norm_eps=1e-6 if modern else 1e-5,
        )


@dataclass(frozen=True)
class TrainConfig(Rows, FromScratch):
    """Settings of pretraining on a text."""

    auto_defaults: ClassVar[dict[str, Any]] = {**FromScratch.auto_defaults, "batch_size": 32, "eval_tokens": 131_072}

    text: tuple[str, ...] = ()
    """Files, folders, globs or named corpora (default: Tiny Shakespeare). `bardlet data` lists the named corpora."""
    field: str = "text"
    """Field of a row (.jsonl, .json, .csv, .tsv, .parquet) that holds the text. A path, as data.text, also works."""
    separator: str = "auto"
    """Text between the documents of a text file; \\n is a line break. auto: <|endoftext|> if the file has it, a line
    break in a list of names or words; none: each file is one document."""
    normalize: Literal["nfc"] | None = None
    """Unicode form of the text and of prompts (default: as they are). nfc: one character per accented letter."""
    replay: float | None = None
    """Share of each batch from the text of --init (default: none). Against forgetting it. At least 0, below 1. The
    validation loss on both texts is shown; 0 only measures it."""
    replay_text: str | None = None
    """The text for --replay: a file, folder, glob or named corpus (default: the text in the run.toml of --init)."""
    batch_size: Auto[int] = AUTO
    """Windows per micro-batch (default: chosen for --minutes). With --steps, or a rung of the ladder: 32. Over all
    processes."""
    eval_tokens: Auto[int] = AUTO
    """Validation tokens per evaluation (default: 131,072, fewer in a short run). Evenly spread; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_size")
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")
        self.require(lambda x: 0 <= x < 1, "at least 0 and below 1 (0.2: a fifth of each batch)", "replay")
        if self.replay is not None and self.init is None:
            raise BardletError(f"--replay {as_typed(self.replay)}: it repeats the text of a trained model; name the "
                               "model with --init DIR, or drop --replay")
        if self.replay_text is not None and self.replay is None:
            raise BardletError(f"--replay-text {self.replay_text}: add the share of each batch, as in --replay 0.2")

    def _check_model(self) -> None:
        super()._check_model()
        if self.model == "encdec":
            raise BardletError("--model encdec translates: name sentence pairs with --source FILE "
                               "--target FILE, or with --pair de-en")
        if self.n_encoder_layer is not None:
            raise BardletError(f"--n-encoder-layer {self.n_encoder_layer}: {self.model} has no encoder; drop it, "
                               "or use --model encdec")


@dataclass(frozen=True)
class TranslationConfig(FromScratch):
    """Settings of translation: training on sentence pairs."""

    auto_defaults: ClassVar[dict[str, Any]] = {**FromScratch.auto_defaults, "block_size": 256, "lr": 8e-3,
                                               "muon_lr": 4e-2}
    short_rows = True
    batch_setting = "batch_tokens"

    text: tuple[str, ...] = ()
    """A named parallel corpus: multi30k."""
    source: str | None = None
    """File with the sentences to translate, one per line."""
    target: str | None = None
    """File with the translation of each line of --source."""
    pair: str | None = None
    """Language pair of a named parallel corpus, as in de-en."""
    lowercase: bool | None = None
    """Lowercase all text in the tokenizer (default: only if the named corpus asks for it)."""
    model: Model = "encdec"
    """Architecture: encdec, qwen3 or gpt2."""
    prefix_lm: bool = False
    """Let a decoder-only model attend to the source bidirectionally."""
    label_smoothing: float = 0.1
    """Label smoothing of the training loss on sentence pairs."""
    batch_tokens: int = 4096
    """Tokens per micro-batch of sentence pairs. Counted on the longer side with padding, over all processes."""
    lr: Auto[float] = AUTO
    """Peak learning rate of AdamW (default: 8e-3, with --init 2e-3)."""
    muon_lr: Auto[float] = AUTO
    """Peak learning rate of Muon (default: 4e-2, with --init 2e-2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_tokens")
        self.require(lambda x: 0 <= x < 1, "at least 0 and below 1", "label_smoothing")
        if self.tokenizer in ("char", "byte"):
            raise BardletError(f"--tokenizer {self.tokenizer}: translation needs bpe, which has a padding token; "
                               "drop it")

    def _check_model(self) -> None:
        super()._check_model()
        if self.model in RUNGS:
            raise BardletError(f"--model {self.model}: a rung of the ladder does not translate; "
                               "use encdec, qwen3 or gpt2")
        if self.model != "encdec" and self.n_encoder_layer is not None:
            raise BardletError(f"--n-encoder-layer {self.n_encoder_layer}: {self.model} has no encoder; drop it, "
                               "or use --model encdec")
        if self.model == "encdec":
            self.require(lambda x: x <= MAX_SINUSOIDS, f"at most {MAX_SINUSOIDS} (encdec)", "block_size")
            if self.prefix_lm:
                raise BardletError("--prefix-lm: an encoder is bidirectional already; "
                                   "drop it, or use --model qwen3 or gpt2")
            if not self.tie_embeddings:
                raise BardletError("--no-tie-embeddings: encdec shares one matrix between source, target and head; "
                                   "drop it")

    @property
    def rows_vary(self) -> bool:
        """True if the width of the rows varies between steps."""
        return True

    @property
    def tokens_per_step(self) -> int:
        """Maximum number of tokens of the global batch, on the longer side."""
        return self.batch_tokens * self.grad_accum

    def with_micro_batches_of(self, rows: int, unsplit_rows: int, world: int) -> Self:
        """Return the same pairs in smaller micro-batches (`Settings.with_micro_batches_of`)."""
        pieces = next(n for n in range(-(-unsplit_rows // rows), self.batch_tokens + 1) if self.batch_tokens % n == 0)
        return replace(self, batch_tokens=self.batch_tokens // pieces, grad_accum=self.grad_accum * pieces)
