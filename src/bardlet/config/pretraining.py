"""The settings of a model that learns from nothing: `bardlet train`, on a text or on pairs of sentences. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, cast

from bardlet.config.model import MAX_SINUSOIDS, ROTARY, RUNGS, WITHOUT_BLOCKS, WITHOUT_HEADS, Activation, ModelConfig
from bardlet.config.settings import AUTO, Auto, Rows, Settings, flag
from bardlet.errors import BardletError

Model = Literal["qwen3", "gpt2", "encdec", "bigram", "averaging", "one-head", "multi-head", "feed-forward", "residual",
                "layer-norm", "dropout", "rotary", "swiglu", "qk-norm"]

ABSENT_IN = {"n_layer": WITHOUT_BLOCKS, "n_head": WITHOUT_HEADS, "n_embd": ("bigram",), "n_inner": WITHOUT_BLOCKS,
           "dropout": (*WITHOUT_BLOCKS, "residual", "layer-norm"), "tie_embeddings": RUNGS, "optimizer": ("bigram", "averaging"),
           "muon_lr": ("bigram", "averaging")}
"""The rungs of the ladder that do not have a part yet. (Muon trains matrices: two of them have none.)"""


@dataclass(frozen=True)
class ModelSettings:
    """The settings of a model and its tokenizer; with --init they follow from the weights."""

    tokenizer: Literal["auto", "char", "byte", "bpe"] = "auto"
    """Characters, bytes or byte pairs; auto picks by the text's size and alphabet, and says why."""
    vocab_size: int | None = None
    """Vocabulary of a BPE tokenizer; none: by the size of the text."""
    model: Model = "qwen3"
    """Architecture: qwen3, gpt2, encdec (for pairs of sentences), or a rung of the lecture's ladder."""
    n_layer: Auto[int] = AUTO
    """Blocks; none: 4, or by the plan."""
    n_encoder_layer: int | None = None
    """Blocks of the encoder (encdec); none: n_layer."""
    n_head: Auto[int] = AUTO
    """Attention heads; none: 4, or by the plan."""
    n_kv_head: int | None = None
    """Key and value heads (qwen3); none: n_head."""
    n_embd: Auto[int] = AUTO
    """Channels of the residual stream; none: 192, or by the plan."""
    n_inner: int | None = None
    """Width of the feed-forward layer; none: 4 n_embd in gpt2, 8/3 n_embd in qwen3 (three matrices, the same cost)."""
    tie_embeddings: bool = True
    """One table for the embedding and the head."""
    activation: Activation | None = None
    """Of the feed-forward layer; none: gelu_new in gpt2, its own approximation, and relu in encdec (qwen3 has silu)."""


SET_BY_WEIGHTS = tuple(field.name for field in fields(ModelSettings))
"""The settings that the weights of --init decide."""


@dataclass(frozen=True)
class FromScratch(ModelSettings, Settings):
    """A run whose model is new, unless --init names one."""

    stage, command, default_minutes = "pretrain", "train", 5.0
    auto_defaults: ClassVar[dict[str, Any]] = {**Settings.auto_defaults, "n_layer": 4, "n_head": 4, "n_embd": 192, "block_size": 128}

    block_size: Auto[int] = AUTO
    """Context window, in tokens; none: 128, by the plan, or that of --init."""
    dropout: Auto[float] = AUTO
    """Probability of dropping an activation in training; none: 0, or by the plan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "n_layer", "n_head", "n_embd")
        self.require(lambda x: x > 0, "more than 0, and finite", "vocab_size", "n_encoder_layer", "n_kv_head",
                     "n_inner")
        self.require(lambda x: x <= 2**24, f"at most {2**24}", "vocab_size")
        if self.lora and self.init is None:
            raise BardletError(f"--lora {self.lora}: is a change of a model that has learned already: name it with "
                               "--init DIR, or leave it out")
        if self.init is None:  # else the weights have a shape of their own
            if self.model not in WITHOUT_HEADS:
                self._check_heads()
            self._check_model()

    def _check_model(self) -> None:
        """Raise BardletError where the settings do not go with the architecture."""
        if self.model in RUNGS and self.n_kv_head not in (None, self._or_default("n_head")):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: the rungs of the ladder have a key and a value for each "
                               "head; leave it out, or take --model qwen3")
        if self.activation and self.model not in ("gpt2", "encdec"):
            raise BardletError(f"--activation {self.activation}: {self.model} has none to choose; "
                               "leave it out, or take --model gpt2")
        if self.model in ("gpt2", "encdec") and self.n_kv_head not in (None, heads := self._or_default("n_head")):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: {self.model} has a key and a value for each of its "
                               f"{heads} heads; leave it out, or take --model qwen3")

    def _or_default(self, name: str) -> int:
        """A setting of the shape, which a plan may still choose where none of them is set."""
        value = getattr(self, name)
        return cast(int, self.auto_defaults[name] if value is None else value)

    def _check_heads(self) -> None:
        n_embd, n_head = self._or_default("n_embd"), self._or_default("n_head")
        if n_embd % n_head:
            fits = [h for h in range(1, n_embd + 1) if n_embd % h == 0]
            near = min(fits, key=lambda h: abs(h - n_head))
            raise BardletError(f"--n-embd {n_embd} cannot be divided among --n-head {n_head} heads: "
                               f"take --n-head {near} or --n-embd {-(-n_embd // n_head) * n_head}")
        if self.model in ("qwen3", *ROTARY) and (n_embd // n_head) % 2:
            raise BardletError(f"--n-embd {n_embd} with --n-head {n_head} gives heads of {n_embd // n_head} channels; "
                               "rotary positions turn pairs: make it even")
        if n_head % (self.n_kv_head or n_head):
            raise BardletError(f"--n-head {n_head} is no multiple of --n-kv-head {self.n_kv_head}: "
                               "each key and value head serves the same number of query heads")

    def lacks(self, name: str) -> bool:
        """Whether the model has no part that this setting describes."""
        return self.model in ABSENT_IN.get(name, ())

    def unused(self, named: Collection[str] = ()) -> list[str]:
        """The settings that would do nothing, since the model does not have what they describe.

        named: settings that somebody typed, which count although their value is the default.
        """
        found = []
        for name in ABSENT_IN:
            value, default = getattr(self, name), getattr(type(self), name)
            # an untied head and AdamW are all that these rungs know: what they lack is the default itself
            asked = value == default and name in named if name in ("tie_embeddings", "optimizer") else value != default
            if asked and self.lacks(name) and not (self.init and name in SET_BY_WEIGHTS):
                found.append(name)
        return found

    def refuse_unused(self, named: Collection[str] = ()) -> None:
        """Raise BardletError for the first of the `unused` settings."""
        for name in self.unused(named):
            *some, last = [model for model in (*RUNGS, "gpt2", "qwen3") if model not in ABSENT_IN[name]]
            value = getattr(self, name)
            setting = flag(name) + ("" if value is True else f" {value}")
            raise BardletError(f"{setting}: {self.model} does not have that; leave it out, or take --model "
                               f"{', '.join(some)} or {last}")

    def as_model(self, shape: ModelConfig) -> Self:
        """The settings with the shape of the weights that training starts from; its windows may be shorter."""
        config = replace(self, model=cast(Model, shape.model), n_layer=shape.n_layer, n_head=shape.n_head,
                         n_encoder_layer=shape.n_encoder_layer or None, n_kv_head=shape.n_kv_head,
                         n_embd=shape.n_embd, n_inner=shape.n_inner, tie_embeddings=shape.tie_embeddings,
                         block_size=min(shape.block_size, self.block_size or shape.block_size))
        config._check_model()
        return config

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The shape of the model that these settings and a tokenizer of `vocab_size` tokens ask for."""
        c = self.resolved()
        if c.model in RUNGS:
            return c._rung(vocab_size)
        qwen3 = c.model == "qwen3"
        return ModelConfig(
            model=c.model, vocab_size=vocab_size, block_size=c.block_size, n_layer=c.n_layer,
            n_encoder_layer=(c.n_encoder_layer or c.n_layer) if c.model == "encdec" else 0,
            n_head=c.n_head, n_kv_head=c.n_kv_head or c.n_head, n_embd=c.n_embd,
            head_dim=c.n_embd // c.n_head,
            n_inner=c.n_inner or (c._gated_width() if qwen3 else 4 * c.n_embd),
            dropout=c.dropout, tie_embeddings=c.tie_embeddings,
            activation="silu" if qwen3 else c.activation or ("gelu_new" if c.model == "gpt2" else "relu"),
            norm_eps=1e-6 if qwen3 else 1e-5,
        )

    def _gated_width(self) -> int:
        """Two thirds of 4 n_embd, rounded up to a multiple of 32: three matrices then cost what two did."""
        return -(-8 * self.n_embd // (3 * 32)) * 32

    def _rung(self, vocab_size: int) -> ModelConfig:
        """The shape of a rung of the ladder: what it does not have yet counts 1, and its head is its own."""
        gated, modern = self.model in ("swiglu", "qk-norm"), self.model in ROTARY
        n_head = 1 if self.model in WITHOUT_HEADS else self.n_head
        wide = self._gated_width() if gated else 4 * self.n_embd
        return ModelConfig(
            model=self.model, vocab_size=vocab_size, block_size=self.block_size,
            n_layer=1 if self.model in WITHOUT_BLOCKS else self.n_layer, n_head=n_head, n_kv_head=n_head, n_embd=self.n_embd,
            head_dim=self.n_embd // n_head,
            n_inner=self.n_embd if self.model == "feed-forward" else self.n_inner or wide,
            dropout=0.0 if self.lacks("dropout") else self.dropout,
            tie_embeddings=False, activation="silu" if gated else "relu", norm_eps=1e-6 if modern else 1e-5,
        )


@dataclass(frozen=True)
class TrainConfig(Rows, FromScratch):
    """Pretraining on a text."""

    auto_defaults: ClassVar[dict[str, Any]] = {**FromScratch.auto_defaults, "batch_size": 32, "eval_tokens": 131_072}

    text: tuple[str, ...] = ()
    """Named corpora, files, folders or globs; none: Tiny Shakespeare."""
    field: str = "text"
    """The field of a .jsonl record that holds its text."""
    batch_size: Auto[int] = AUTO
    """Windows of a micro-batch, over all processes; none: 32, or by the plan."""
    eval_tokens: Auto[int] = AUTO
    """Validation tokens of one evaluation, evenly spread; none: 131,072, or fewer in a short run; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_size")
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")

    def _check_model(self) -> None:
        super()._check_model()
        if self.model == "encdec":
            raise BardletError("an encoder-decoder translates: name its pairs, with --source F --target F or --pair "
                               "de-en")
        if self.n_encoder_layer is not None:
            raise BardletError(f"--n-encoder-layer {self.n_encoder_layer}: {self.model} has no encoder; leave it out, "
                               "or take --model encdec")


@dataclass(frozen=True)
class TranslationConfig(FromScratch):
    """Training on pairs of sentences: each source with its translation."""

    auto_defaults: ClassVar[dict[str, Any]] = {**FromScratch.auto_defaults, "block_size": 256, "lr": 8e-3, "muon_lr": 4e-2}
    short_rows = True
    batch_setting = "batch_tokens"

    text: tuple[str, ...] = ()
    """A named parallel corpus, multi30k."""
    source: str | None = None
    """The file whose lines are to be translated; with --target."""
    target: str | None = None
    """The file whose line n is the translation of line n of --source."""
    pair: str | None = None
    """from-to of a named parallel corpus, as de-en of multi30k."""
    lowercase: bool | None = None
    """Have the tokenizer make all text lower case; none: as the corpus asks for, files of your own not."""
    model: Model = "encdec"
    """Architecture: encdec, qwen3 or gpt2."""
    prefix_lm: bool = False
    """A decoder-only model sees the source both ways, as an encoder does."""
    label_smoothing: float = 0.1
    """The part of each target that is spread evenly over the vocabulary (in the training loss alone)."""
    batch_tokens: int = 4096
    """Tokens of a micro-batch with its padding, of the longer side, over all processes."""
    lr: Auto[float] = AUTO
    """Peak learning rate of AdamW; none: 8e-3, with --init 2e-3."""
    muon_lr: Auto[float] = AUTO
    """Peak learning rate of Muon; none: 4e-2, with --init 2e-2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_tokens")
        self.require(lambda x: 0 <= x < 1, "at least 0 and below 1", "label_smoothing")
        if self.tokenizer in ("char", "byte"):
            raise BardletError(f"--tokenizer {self.tokenizer}: pairs are translated with bpe, which has a token for "
                               "padding; leave it out")

    def _check_model(self) -> None:
        super()._check_model()
        if self.model in RUNGS:
            raise BardletError(f"--model {self.model}: a rung of the ladder does not translate; "
                               "take encdec, qwen3 or gpt2")
        if self.model != "encdec" and self.n_encoder_layer is not None:
            raise BardletError(f"--n-encoder-layer {self.n_encoder_layer}: {self.model} has no encoder; leave it out, "
                               "or take --model encdec")
        if self.model == "encdec":
            most = MAX_SINUSOIDS
            self.require(lambda x: x <= most, f"at most {most} (encdec)", "block_size")
            if self.prefix_lm:
                raise BardletError("--prefix-lm: an encoder sees its source both ways already; "
                                   "leave it out, or take --model qwen3 or gpt2")
            if not self.tie_embeddings:
                raise BardletError("--no-tie-embeddings: encdec has one table for source, target and head; "
                                   "leave it out")

    @property
    def rows_vary(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return True

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the longer side of the global batch, at most."""
        return self.batch_tokens * self.grad_accum

    def with_micro_batches_of(self, rows: int, asked: int, world: int) -> Self:
        """The same pairs in more and smaller micro-batches (`Settings.with_micro_batches_of`)."""
        pieces = next(n for n in range(-(-asked // rows), self.batch_tokens + 1) if self.batch_tokens % n == 0)
        return replace(self, batch_tokens=self.batch_tokens // pieces, grad_accum=self.grad_accum * pieces)
