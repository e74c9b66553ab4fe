"""The settings of a run: frozen dataclasses, checked as they are made. Nothing here imports torch.

`ModelConfig` (config/model.py) is the shape of a model, `TrainConfig` everything that `bardlet train` can be told. A
field's docstring is its help text on the command line. `run.toml` in a run folder is a `TrainConfig` as resolved,
followed by a `[record]` of what happened; `bardlet train --config run.toml` repeats the run.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from bardlet.config.model import FLAT, LONGEST_SINUSOIDS, ROTARY, RUNGS, UNDIVIDED, Activation, ModelConfig
from bardlet.errors import BardletError

PARALLEL = ("multi30k",)
"""Named corpora of sentence pairs."""
OF_PAIRS = ("lowercase", "prefix_lm", "label_smoothing", "batch_tokens")
"""Settings of training on pairs, which training on a text does not have."""
OF_TEXT = ("field", "batch_size", "eval_tokens")
"""Settings of training on a text, which training on pairs does not have."""
ON_POLICY = ("reward", "rollout", "passes", "answer_tokens", "temperature", "clip")
"""Settings of the stages that learn from answers which the model itself writes."""
OF_STAGE: dict[str, tuple[str, ...]] = {"sft": ("pack",), "reward": (), "dpo": ("beta",),
                                        "ppo": (*ON_POLICY, "beta", "target_kl"), "grpo": (*ON_POLICY, "beta", "group")}
"""Settings of the stages of a chat model, which other stages do not have."""
_OWN_ANSWERS = {"schedule": "constant", "warmup_steps": 10, "keep": "last", "compile": "off"}
FINE: dict[str, dict[str, Any]] = {"sft": {"lr": 5e-4, "muon_lr": 5e-3}, "dpo": {"lr": 2e-5, "muon_lr": 2e-4},
                                   "reward": {"lr": 2e-4, "muon_lr": 2e-3},
                                   "ppo": {"lr": 2e-4, "muon_lr": 2e-3, "passes": 4, "beta": 0.05, **_OWN_ANSWERS},
                                   "grpo": {"lr": 2e-4, "muon_lr": 2e-3, "beta": 0.0, **_OWN_ANSWERS}}
"""What the stages that begin with a model that has learned already do in another way than pretraining."""
WITHOUT = {"n_layer": FLAT, "n_head": UNDIVIDED, "n_embd": ("bigram",), "n_inner": FLAT,
           "dropout": (*FLAT, "residual", "layer-norm"), "tie_embeddings": RUNGS, "optimizer": ("bigram", "averaging"),
           "muon_lr": ("bigram", "averaging")}
"""Settings that some rungs of the ladder do not have, and which. (Muon trains matrices: those two have none.)"""

Model = Literal["qwen3", "gpt2", "encdec", "bigram", "averaging", "one-head", "multi-head", "feed-forward", "residual",
                "layer-norm", "dropout", "rotary", "swiglu", "qk-norm"]
StageName = Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo"]
OF_PREFERENCES = ("reward", "dpo")
"""Stages that learn from pairs of answers."""
OF_REWARDS = ("ppo", "grpo")
"""Stages that learn from answers of their own."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run."""

    stage: StageName = "pretrain"
    """What is learned: a text (or pairs of sentences), the answers in conversations, or which answers people prefer."""
    text: tuple[str, ...] = ()
    """Named corpora, files, folders or globs; none: Tiny Shakespeare."""
    field: str = "text"
    """The field of a .jsonl record that holds its text."""
    source: str | None = None
    """Translation: the file whose lines are to be translated; with --target."""
    target: str | None = None
    """Translation: the file whose line n is the translation of line n of --source."""
    pair: str | None = None
    """Translation: from-to of a named parallel corpus, as de-en of multi30k."""
    lowercase: bool | None = None
    """Translation: have the tokenizer make all text lower case; none: as the corpus asks for, files of your own not."""
    val_part: Literal["val", "dev"] = "val"
    """What is held out: the validation text, or the development split cut from the end of the training part."""

    tokenizer: Literal["auto", "char", "byte", "bpe"] = "auto"
    """Characters, bytes or byte pairs; auto picks by the text's size and alphabet, and says why."""
    vocab_size: int | None = None
    """Vocabulary of a BPE tokenizer; none: by the size of the text."""

    model: Model = "qwen3"
    """Architecture: qwen3, gpt2, encdec (for pairs of sentences), or a rung of the lecture's ladder."""
    init: str | None = None
    """Start from the weights and the tokenizer of this run or Hugging Face folder."""
    lora: int | None = None
    """With --init: LoRA of this rank, which leaves the matrices as they are and learns a small change of each; the
    result has both in one. None: all weights are learned."""
    n_layer: int = 4
    """Blocks."""
    n_encoder_layer: int | None = None
    """Blocks of the encoder (encdec); none: n_layer."""
    n_head: int = 4
    """Attention heads."""
    n_kv_head: int | None = None
    """Key and value heads (qwen3); none: n_head."""
    n_embd: int = 192
    """Channels of the residual stream."""
    n_inner: int | None = None
    """Width of the feed-forward layer; none: 4 n_embd in gpt2, 8/3 n_embd in qwen3 (three matrices, the same cost)."""
    block_size: int = 128
    """Context window, in tokens."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    prefix_lm: bool = False
    """Translation by a decoder-only model: it sees the source both ways, as an encoder does."""
    label_smoothing: float = 0.0
    """Translation: the part of each target that is spread evenly over the vocabulary (in the training loss alone)."""
    pack: bool = True
    """Conversations: several in a row, none of which sees another; without it a row for each, filled up."""
    beta: float = 0.1
    """DPO, PPO, GRPO: how much it costs to leave the model that it began with; lower goes further."""
    reward: str | None = None
    """PPO, GRPO: what an answer is worth (has to be said): `exact` (1 for an answer that ended and is the one in the
    data, else 0), a run folder of `bardlet reward`, or a command that reads a line of JSON for each answer (messages;
    answer, what the model wrote; ended; reference, the answer in the data or null) and prints a number for each."""
    rollout: int = 128
    """PPO, GRPO: answers that the model writes before it learns from them, over all processes."""
    passes: int = 1
    """PPO, GRPO: how often each answer is learned from."""
    group: int = 8
    """GRPO: answers to each question, which are compared with each other."""
    answer_tokens: int = 64
    """PPO, GRPO: tokens of the longest answer."""
    temperature: float = 1.0
    """PPO, GRPO: of the answers."""
    clip: float = 0.2
    """PPO, GRPO: by how much a token's probability may change, as a share, before it is learned no more."""
    target_kl: float | None = None
    """PPO: beta follows, so that answers are so far (nats) from the model that it began with; none: it stays."""
    tie_embeddings: bool = True
    """One table for the embedding and the head."""
    activation: Activation | None = None
    """Of the feed-forward layer; none: gelu_new in gpt2, its own approximation, and relu in encdec (qwen3 has silu)."""

    steps: int | None = None
    """Optimizer steps; none: by --minutes."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: 5 minutes)."""
    batch_size: int = 32
    """Windows of a micro-batch, over all processes."""
    batch_tokens: int = 4096
    """Translation: tokens of a micro-batch with its padding, of the longer side, over all processes."""
    grad_accum: int = 1
    """Micro-batches of a step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = "stable-decay"
    """What follows the warm-up: constant then a linear decay, a half cosine, a line, or nothing."""
    warmup_steps: int = 50
    """Steps from zero to the peak learning rate (at most a fifth of the run)."""
    decay_share: float = 0.8
    """Share of the steps that the decay of stable-decay takes."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (not of norms and biases)."""
    beta1: float = 0.9
    """AdamW's average of gradients."""
    beta2: float = 0.99
    """AdamW's average of squared gradients."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    keep: Literal["best", "last", "average"] = "best"
    """Weights of the result: of the last step, their mean over the last fifth of the steps, or the best of these and of
    all evaluated steps by the validation loss."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not a number: stop, or skip the step (ten in a row stop)."""
    eval_every: int | None = None
    """Steps between evaluations; none: about 20 in a run, or fewer than would take longer than training; 0: only at the
    end."""
    eval_tokens: int = 131_072
    """Validation tokens of one evaluation, evenly spread; 0: all."""
    save_every: int | None = None
    """Steps between checkpoints; none: about 10 in a run; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are removed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    seed: int = 1337
    """Seed of the weights, the batches and the dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes an NVIDIA GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; auto: bf16 where the processor has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the blocks; auto: where a compiler is found and the run is long enough to gain."""
    threads: int | None = None
    """CPU threads; none: all cores."""
    deterministic: bool = False
    """Deterministic algorithms on a GPU too (a CPU always has them)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """Log to this Weights & Biases project."""

    replans: tuple[tuple[int, int], ...] = ()
    """(step, steps planned from there on): what a clock decided in the run that wrote this file."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "batch_tokens", "grad_accum",
                     "keep_checkpoints", "log_every", "rollout", "passes", "answer_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "minutes", "target_kl", "temperature", "clip", "vocab_size",
                     "n_encoder_layer", "n_kv_head", "n_inner", "threads"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "more than 0, and finite")
        for name in ("eval_every", "save_every", "eval_tokens", "warmup_steps", "weight_decay", "grad_clip", "seed"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, name, value, "0 or more, and finite")
        # beyond these the libraries below fail in ways that nobody can read
        for name, most in (("seed", 2**63 - 1), ("vocab_size", 2**24), ("threads", 1024), ("block_size", 2**24)):
            value = getattr(self, name)
            _require(value is None or value <= most, name, value, f"at most {most}")
        for name in ("lr", "muon_lr"):
            _require(0 < getattr(self, name) < 100, name, getattr(self, name), "more than 0 (and a plausible rate)")
        for name in ("dropout", "label_smoothing", "beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        for name in ("min_lr_ratio", "decay_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        _require(self.lora is None or self.lora >= 1, "lora", self.lora, "at least 1")
        if self.lora and self.init is None and self.stage == "pretrain":
            raise BardletError(f"--lora {self.lora}: is a change of a model that has learned already: name it with "
                               "--init DIR, or leave it out")
        if self.steps is not None and self.minutes is not None and not self.replans:
            raise BardletError("--steps and --minutes are both given: keep the one that should decide")
        if self.model not in UNDIVIDED and self.init is None:  # the weights of --init have a shape of their own
            self._check_heads()
        if self.model in RUNGS and self.n_kv_head not in (None, self.n_head):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: the rungs of the ladder have a key and a value for each "
                               "head; leave it out, or take --model qwen3")
        if self.activation and self.model not in ("gpt2", "encdec"):
            raise BardletError(f"--activation {self.activation}: {self.model} has none to choose; "
                               "leave it out, or take --model gpt2")
        if self.model in ("gpt2", "encdec") and self.n_kv_head not in (None, self.n_head):
            raise BardletError(f"--n-kv-head {self.n_kv_head}: {self.model} has a key and a value for each of its "
                               f"{self.n_head} heads; leave it out, or take --model qwen3")
        self._check_pairs()
        if self.stage == "dpo":
            _require(self.beta > 0, "beta", self.beta, "more than 0")
        _require(0 <= self.beta < 100, "beta", self.beta, "at least 0 and below 100")
        if self.stage in OF_REWARDS:
            self._check_rollout()

    @property
    def parallel(self) -> bool:
        """Whether this run learns from pairs of sentences, not from a text."""
        named = bool(self.text) and self.text[0] in PARALLEL
        return named or any(given is not None for given in (self.pair, self.source, self.target))

    @property
    def varying(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return self.parallel or self.stage in (*OF_PREFERENCES, *OF_REWARDS) or (self.stage == "sft" and not self.pack)

    @property
    def others(self) -> tuple[str, ...]:
        """The settings that only other stages have."""
        mine = OF_STAGE.get(self.stage, ())
        of_stages = sorted({name for names in OF_STAGE.values() for name in names} - {*mine})
        if self.stage != "pretrain":
            own = ("eval_tokens",) if self.stage in OF_REWARDS else ()
            return (*OF_PAIRS, "pair", "source", "target", "field", *own, *of_stages)
        return (*(OF_TEXT if self.parallel else OF_PAIRS), *of_stages)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch; of one of pairs at most."""
        rows = self.batch_tokens if self.parallel else self.batch_size * self.block_size
        return rows * self.grad_accum * (2 if self.stage in OF_PREFERENCES else 1)  # two answers

    def _check_heads(self) -> None:
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = min(fits, key=lambda h: abs(h - self.n_head))
            raise BardletError(f"--n-embd {self.n_embd} cannot be divided among --n-head {self.n_head} heads: "
                               f"take --n-head {near} or --n-embd {-(-self.n_embd // self.n_head) * self.n_head}")
        if self.model in ("qwen3", *ROTARY) and (self.n_embd // self.n_head) % 2:
            raise BardletError(f"--n-embd {self.n_embd} with --n-head {self.n_head} gives heads of "
                               f"{self.n_embd // self.n_head} channels; rotary positions turn pairs: make it even")
        if self.n_head % (self.n_kv_head or self.n_head):
            raise BardletError(f"--n-head {self.n_head} is no multiple of --n-kv-head {self.n_kv_head}: "
                               "each key and value head serves the same number of query heads")

    def _check_rollout(self) -> None:
        update = self.batch_size * self.grad_accum
        if self.rollout % update:
            raise BardletError(f"--rollout {self.rollout} cannot be cut into updates of {update} answers (--batch-size "
                               f"{self.batch_size}{f' x --grad-accum {self.grad_accum}' if self.grad_accum > 1 else ''}"
                               f"): take --rollout {-(-self.rollout // update) * update}")
        if self.target_kl is not None and not self.beta:
            raise BardletError(f"--target-kl {self.target_kl:g} with --beta 0: a beta of 0 cannot follow it; "
                               "give another, as 0.05")
        if self.stage == "grpo":
            _require(self.group >= 2, "group", self.group, "at least 2: answers are compared with each other")
            if self.rollout % self.group:
                raise BardletError(f"--rollout {self.rollout} is no multiple of --group {self.group}: "
                                   f"take --rollout {-(-self.rollout // self.group) * self.group}")

    def _check_pairs(self) -> None:
        if self.parallel and self.tokenizer in ("char", "byte"):
            raise BardletError(f"--tokenizer {self.tokenizer}: pairs are translated with bpe, which has a token for "
                               "padding; leave it out")
        if self.model == "encdec":
            most = LONGEST_SINUSOIDS
            _require(self.block_size <= most, "block_size", self.block_size, f"at most {most} (encdec)")
            if self.prefix_lm:
                raise BardletError("--prefix-lm: an encoder sees its source both ways already; "
                                   "leave it out, or take --model qwen3 or gpt2")
            if not self.tie_embeddings:
                raise BardletError("--no-tie-embeddings: encdec has one table for source, target and head; "
                                   "leave it out")
        elif self.n_encoder_layer is not None:
            raise BardletError(f"--n-encoder-layer {self.n_encoder_layer}: {self.model} has no encoder; leave it out, "
                               "or take --model encdec")
        elif self.parallel and self.model in RUNGS:
            raise BardletError(f"--model {self.model}: a rung of the ladder does not translate; "
                               "take encdec, qwen3 or gpt2")

    def unused(self, given: Collection[str]) -> list[str]:
        """The settings that are not at their defaults though this run does not have them: its model, or its stage.

        Raises BardletError for one that is among `given`, those that somebody typed: it would do nothing.
        """
        found = []
        for name in self.others:
            if name in given:
                raise BardletError(f"{option(name)}: {self._why_not(name)}")
            if getattr(self, name) != getattr(TrainConfig, name):
                found.append(name)
        for name, rungs in WITHOUT.items():
            value, default = getattr(self, name), getattr(TrainConfig, name)
            # an untied head and AdamW are all that these rungs know: what they lack is the default itself
            lacks_default = name in ("tie_embeddings", "optimizer")
            asked = value == default and name in given if lacks_default else value != default
            if self.model not in rungs or not asked:
                continue
            if name in given:
                *some, last = [model for model in (*RUNGS, "gpt2", "qwen3") if model not in rungs]
                flag = option(name) + ("" if value is True else f" {value}")
                raise BardletError(f"{flag}: {self.model} does not have that; leave it out, or take --model "
                                   f"{', '.join(some)} or {last}")
            found.append(name)
        return found

    def _why_not(self, name: str) -> str:
        """Why this stage does not have a setting, and what to do."""
        stages = [f"`bardlet {stage}`" for stage, names in OF_STAGE.items() if name in names]
        if stages:
            return f"is for {', '.join(stages)}; leave it out"
        if self.stage != "pretrain":
            return f"`bardlet {self.stage}` does not have that; leave it out"
        if self.parallel:
            return "pairs of sentences have none; leave it out" + ", or give --batch-tokens" * (name == "batch_size")
        return "is for translation; leave it out, or give --source F --target F or --pair"

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The shape of the model that these settings and a tokenizer of `vocab_size` tokens ask for."""
        if self.model in RUNGS:
            return self._rung(vocab_size)
        qwen3 = self.model == "qwen3"
        return ModelConfig(
            model=self.model, vocab_size=vocab_size, block_size=self.block_size, n_layer=self.n_layer,
            n_encoder_layer=(self.n_encoder_layer or self.n_layer) if self.model == "encdec" else 0,
            n_head=self.n_head, n_kv_head=self.n_kv_head or self.n_head, n_embd=self.n_embd,
            head_dim=self.n_embd // self.n_head,
            n_inner=self.n_inner or (self._gated_width() if qwen3 else 4 * self.n_embd),
            dropout=self.dropout, tie_embeddings=self.tie_embeddings,
            activation="silu" if qwen3 else self.activation or ("gelu_new" if self.model == "gpt2" else "relu"),
            norm_eps=1e-6 if qwen3 else 1e-5,
        )

    def _gated_width(self) -> int:
        """Two thirds of 4 n_embd, rounded up to a multiple of 32: three matrices then cost what two did."""
        return -(-8 * self.n_embd // (3 * 32)) * 32

    def _rung(self, vocab_size: int) -> ModelConfig:
        """The shape of a rung of the ladder: what it does not have yet counts 1, and its head is its own."""
        gated, modern = self.model in ("swiglu", "qk-norm"), self.model in ROTARY
        n_head = 1 if self.model in UNDIVIDED else self.n_head
        wide = self._gated_width() if gated else 4 * self.n_embd
        return ModelConfig(
            model=self.model, vocab_size=vocab_size, block_size=self.block_size,
            n_layer=1 if self.model in FLAT else self.n_layer, n_head=n_head, n_kv_head=n_head, n_embd=self.n_embd,
            head_dim=self.n_embd // n_head,
            n_inner=self.n_embd if self.model == "feed-forward" else self.n_inner or wide,
            dropout=self.dropout if self.model not in (*FLAT, "residual", "layer-norm") else 0.0,
            tie_embeddings=False, activation="silu" if gated else "relu", norm_eps=1e-6 if modern else 1e-5,
        )


def option(name: str) -> str:
    """A setting as it is typed."""
    return "--" + name.replace("_", "-")


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise BardletError(f"{option(name)} {value}: it must be {what}")
