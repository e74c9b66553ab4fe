"""Plan a run from minutes, machine and corpus statistics: tokenizer, model, batch and regularization.

Each choice is a rule from measured runs (table in LOG.md), with its reason. Settings that the user chose are left
alone. The run's own first steps decide how many steps fit (`planning/clock.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from bardlet import tokenizer as tokenization
from bardlet.config.pretraining import SHAPE, FromScratch, TrainConfig, TranslationConfig
from bardlet.config.settings import flag
from bardlet.data.statistics import CorpusStatistics
from bardlet.planning import clock
from bardlet.planning.calibrate import Speed, block_weights, flops_per_token, with_shape

C = TypeVar("C", bound=FromScratch)

# ---------------------------------------------------------------- rules for text

SHAPES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (4, 4, 192), (4, 4, 256), (6, 4, 256), (6, 5, 320), (6, 6, 384),
          (8, 8, 512), (12, 12, 768), (16, 16, 1024), (24, 16, 1024), (24, 12, 1536), (24, 16, 2048), (32, 20, 2560),
          (32, 32, 4096))
"""Candidate models as (layers, heads, channels), with 0.1 million to 6.4 billion weights in their blocks. From 0.7
billion on, depths and widths are those of GPT-3 (Brown et al. 2020, table 2.1), with heads of 128 channels."""

MODELS = ("qwen3", "gpt2")
"""Models that `plan` supports; the rungs of the ladder use the lecture's settings."""

CONTEXTS = ((3e6, 128), (30e6, 256), (100e6, 512), (1e9, 1024), (math.inf, 2048))
"""(maximum weights, context in tokens): a small model cannot use distant tokens."""

DECAY, MEMORIZATION_PER_DECAY, DROPOUT = (0.1, 1.0), 75, (120, 0.1)
"""(minimum, maximum) weight decay, and in between `memorization` / MEMORIZATION_PER_DECAY; (memorization above which
dropout is used, dropout). Against memorization, weight decay costs no time and hurts the loss less than dropout: Tiny
Shakespeare, 12.7 epochs: 1.421 with 0.1, 1.400 with dropout 0.05 added, 1.378 with 0.3 alone; stories, 14.5 epochs:
0.693 with 0.1, 0.640 with 0.3."""

TOKENS_PER_WEIGHT = (1.4, 0.75, 20.0)
"""(a, b, maximum): `plan` takes the largest model that trains on a * (millions of weights)^b tokens per weight, or on
`maximum` (Hoffmann et al., 2022). Evidence for a, b: with 1.2 tokens per weight, 0.8 M beat 0.3 M in the same minute;
with 1.8, 1.8 M lost to 0.8 M in the same three."""

WEIGHTS_PER_CHARACTER = 10
"""Maximum number of weights per character of the corpus."""

MAX_MEMORIZATION = 330
"""Memorization budget: maximum epochs x weights per training token. (Names, 0.33 M weights, weight decay 1: loss 2.355
after 10 epochs, which is 83; 2.323 after 40, with dropout.)"""

MIN_EPOCHS = 3
"""Epochs that a pretrained model may train at least: by the budget a large one could not train on a short text at all.
"""

BPE_SECONDS, BPE_SHARE = 0.36e-6, 0.12
"""(Seconds per character of training a BPE tokenizer and encoding with it on two cores, share of the time that it may
take). 61 million characters take 22 seconds: with a minute in all, they came to 1.53 nats
per character, and to 1.51 as single characters."""

DISTINCT_SECONDS, DISTINCT_SHARE, MAX_DISTINCT, DISTINCT_STEPS = 2e-6, 0.03, 6_000_000, 3
"""For a large alphabet, often of a language without spaces, whose words are whole phrases: (seconds per byte of
distinct words that BPE is trained on, share of the time for it, maximum of these bytes, number of times that it may be
halved).
Chinese poems, 2,048 tokens: 7.8 seconds and 0.9195 characters per token with 6 MB, 1.3 and 0.9170 with 0.7 MB."""


# ---------------------------------------------------------------- rules for sentence pairs

PAIR_SHAPES = ((2, 2, 64), (2, 4, 128), (3, 4, 128), (3, 4, 192), (3, 4, 256), (4, 6, 384), (6, 8, 512))
"""Candidate models as (layers in encoder and decoder each, heads, channels)."""

PAIR_TOKENS_PER_WEIGHT, WEIGHTS_PER_PAIR_TOKEN = 0.7, 15.0
"""`plan_pairs` takes the largest model that trains on at least this many target tokens per weight, and has at most this
many weights per target token of the corpus. Multi30k de-en on two cores, validation BLEU: in one minute 33.1 with 1.3
tokens per weight, 28.7 with 0.2; in five minutes 40.5 with 0.9, 39.9 with 2.5."""

PAIR_DROPOUTS = ((4, 0.1), (25, 0.2), (math.inf, 0.3))
"""(maximum epochs, dropout)."""


# ---------------------------------------------------------------- plans


@dataclass(frozen=True)
class TextStatistics:
    """Size of the training split of a corpus."""

    tokens: int
    characters: int
    documents: int
    vocab_size: int
    unit: str = "tokens"
    """A word for the tokens: "characters" if each token is one."""


@dataclass(frozen=True)
class PairStatistics:
    """Size of the training pairs, in source and target tokens."""

    source_tokens: float
    target_tokens: float
    vocab_size: int


@dataclass(frozen=True)
class Machine:
    """Time and hardware of a run."""

    seconds: float
    """Seconds for training steps."""
    speed: Speed
    """Training speed, compiled or not, as the run will be."""
    parts: int = 1
    """Equal parts into which the windows of a batch are cut: one for each process, or --elastic."""
    max_parameters: float = math.inf
    """Maximum number of parameters that fit in memory."""
    compiled: bool = False
    """True if `speed` is with compiled blocks."""
    slowdown: float = 1.0
    """Factor by which other programs slow it down."""


@dataclass(frozen=True)
class Plan(Generic[C]):
    """The settings chosen for a run, with reasons."""

    config: C
    """Resolved settings."""
    reasons: tuple[str, ...]
    """One line per choice."""
    epochs: float
    """Estimated epochs, from the machine's speed; timing the run's first steps improves on it."""
    most_steps: int | None = None
    """Steps beyond which the model only memorizes the corpus; None: unknown."""
    compiled: bool = False
    """True if `epochs` assumes compiled blocks."""


def plan_vocabulary(statistics: CorpusStatistics, machine: Machine, config: TrainConfig) -> tuple[TrainConfig, str]:
    """Choose the BPE vocabulary size, if the corpus calls for BPE, by the model that fits the time.

    The head multiplies each token by the whole vocabulary. It may cost a third more than the blocks of the model that
    the same time would train with 2,048 tokens. (With a larger vocabulary `plan` may take the next smaller model, whose
    head then costs more than that.)

    Returns:
        (config, the reason as a sentence; empty if nothing was chosen).
    """
    if config.vocab_size is not None or config.tokenizer in ("char", "byte"):
        return config, ""
    kind, size, reason = tokenization.choose_kind(statistics.characters, len(statistics.alphabet))
    if config.tokenizer == "bpe":
        kind, size = "bpe", tokenization.suggest_vocab_size(statistics.characters, len(statistics.alphabet))
        reason = f"bpe: as requested; {size:,} tokens"
    if kind != "bpe" or size is None:
        return config, ""
    waiting = BPE_SECONDS * statistics.characters + DISTINCT_SECONDS * (distinct_words(statistics, machine) or 0)
    waiting *= machine.slowdown
    if config.tokenizer == "auto" and waiting > BPE_SHARE * machine.seconds:
        kind = "char" if len(statistics.alphabet) <= tokenization.MAX_ALPHABET else "byte"
        return replace(config, tokenizer=cast(Any, kind)), (
            f"{kind}: to tokenize {count(statistics.characters)} characters with bpe would take about {waiting:.0f} "
            "seconds")
    characters = statistics.train_characters  # an upper bound on the tokens
    model = _with_largest_shape(TextStatistics(characters, characters, 1, 2048), machine, config)
    affordable = 2 ** int(math.log2(16 * model.n_layer * model.n_embd))
    if affordable < size:
        reason = (f"{reason.partition('; ')[0]}; {max(512, affordable):,} tokens instead of {size:,}, to suit the size "
                  "of the model")
    return replace(config, tokenizer="bpe", vocab_size=max(512, min(size, affordable))), reason


def distinct_words(statistics: CorpusStatistics, machine: Machine) -> int | None:
    """Return the maximum size of the distinct words that BPE is trained on, in bytes; None: the tokenizer's own.

    A power of two less than MAX_DISTINCT, so that runs of about the same time share their tokens.
    """
    if len(statistics.alphabet) <= tokenization.MAX_ALPHABET:
        return None
    affordable = DISTINCT_SHARE * machine.seconds / (DISTINCT_SECONDS * machine.slowdown)
    halved = math.ceil(math.log2(MAX_DISTINCT / max(affordable, 1)))
    return MAX_DISTINCT >> min(max(halved, 0), DISTINCT_STEPS)


def plan(data: TextStatistics, machine: Machine, config: TrainConfig) -> Plan[TrainConfig]:
    """Plan model, context, batch and regularization for the machine's time; settings in `config` stay."""
    unset = {name for name, value in vars(config).items() if value is None}
    tokens, shape_flags = data.tokens, [flag(name) for name in SHAPE if name not in unset]
    config = _with_largest_shape(data, machine, config)
    notes = [_shape_note(config, shape_flags, SHAPES[0][-1], "text")]
    if "block_size" in unset:
        context, reason = _context(config, data)
        config = replace(config, block_size=context)
        notes.append(f"context {context} {data.unit}: {reason}")
    trained, limit = machine.seconds / machine.speed.seconds(flops_per_token(config, data.vocab_size)), math.inf
    if not shape_flags and {"dropout", "weight_decay"} <= unset:  # no limit for the user's own plan; use --keep best
        limit = _max_training_tokens(config, tokens)
    trained = min(trained, limit)
    if "batch_size" in unset and config.grad_accum == 1:
        batch_tokens = min(4096 * math.sqrt(trained / 6e6), tokens / 48)  # a longer run gains from less gradient noise
        batch_tokens = 2 ** round(math.log2(min(max(batch_tokens, 256), 2**19)))
        rows = round(batch_tokens / config.block_size / machine.parts)
        config = replace(config, batch_size=max(1, rows) * machine.parts)
    decay, dropout = regularization(memorization(config, trained / tokens, tokens))
    config = config.resolved(weight_decay=decay, dropout=dropout)
    return Plan(config, (*reasons(config, data, trained, trained == limit), *notes), trained / tokens,
                None if limit == math.inf else max(1, math.ceil(limit / config.tokens_per_step)), machine.compiled)


def most_steps(config: TrainConfig, tokens: int) -> int:
    """Return the steps beyond which a pretrained model only memorizes a text of `tokens`, at least MIN_EPOCHS epochs.
    """
    return math.ceil(max(_max_training_tokens(config, tokens), MIN_EPOCHS * tokens) / config.tokens_per_step)


def _shape_note(config: FromScratch, shape_flags: list[str], smallest: int, material: str) -> str:
    """Return the shape of a model and the reason for it. smallest: channels of the smallest candidate."""
    if shape_flags:
        verb = "is" if len(shape_flags) == 1 else "are"
        reason = f"{', '.join(shape_flags)} {verb} set, so bardlet did not choose the shape for the time"
    elif config.n_embd == smallest:
        reason = "the smallest model that bardlet plans"
    else:
        reason = f"the largest model that the time and the {material} allow"
    return f"{config.n_layer} layer{'s' * (config.n_layer != 1)} of {config.n_embd} channels: {reason}"


def plan_pairs(data: PairStatistics, machine: Machine, config: TranslationConfig) -> Plan[TranslationConfig]:
    """Plan model and dropout for the machine's time; settings in `config` stay."""
    source, target, vocabulary = data.source_tokens, data.target_tokens, data.vocab_size

    def trained(c: TranslationConfig) -> float:
        """Return the number of target tokens that fit in the time."""
        size = block_weights(c)
        if c.model == "encdec":  # a token passes only the encoder or only the decoder
            encoder = size * 3 / 7 * source / target
            flops = 6 * (size * 4 / 7 + encoder + c.n_embd * vocabulary)
        else:
            flops = 6 * (size * (1 + source / target) + c.n_embd * vocabulary)
        return machine.seconds / machine.speed.seconds(flops)

    if not (shape_flags := [flag(name) for name in (*SHAPE, "n_encoder_layer") if getattr(config, name) is not None]):
        largest = _with_pair_shape(config, PAIR_SHAPES[0])
        for shape in PAIR_SHAPES[1:]:
            candidate = _with_pair_shape(config, shape)
            size = block_weights(candidate)
            if (trained(candidate) >= PAIR_TOKENS_PER_WEIGHT * size and size <= WEIGHTS_PER_PAIR_TOKEN * target
                    and size + candidate.n_embd * vocabulary <= machine.max_parameters):
                largest = candidate
        config = largest
    config = config.resolved("n_layer", "n_head", "n_embd")
    size, epochs = block_weights(config), trained(config) / target
    config = config.resolved(dropout=next(dropout for max_epochs, dropout in PAIR_DROPOUTS if epochs <= max_epochs))
    note = _shape_note(config, shape_flags, PAIR_SHAPES[0][-1], "pairs")
    return Plan(config, (f"{count(size)} weights without the embeddings; dropout {config.dropout:g}", note), epochs)


def _with_pair_shape(config: TranslationConfig, shape: tuple[int, int, int]) -> TranslationConfig:
    """Return `config` with a shape of PAIR_SHAPES; decoder-only models get more blocks, for equal weights."""
    layers = shape[0] if config.model == "encdec" else round(shape[0] * 7 / 3)  # 12 and 16 C^2, or 12 C^2 each
    return with_shape(config, (layers, *shape[1:]))


def reasons(config: TrainConfig, data: TextStatistics, trained: float, at_limit: bool) -> tuple[str, str]:
    """Return two lines on a model that trains on `trained` tokens of a corpus, repeated if that is more than it has.

    at_limit: True if more training would only memorize the corpus.
    """
    return (
        f"{count(block_weights(config))} weights without the embeddings, trained on about {count(trained)} {data.unit}",
        f"epochs: {short_number(trained / data.tokens)}, with weight decay {config.weight_decay:g} and dropout "
        f"{config.dropout:g}" + ("; more would only memorize the text" if at_limit else ""),
    )


def short_number(x: float) -> str:
    """Format `x` as an integer, or with two significant digits if it is below 10."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def count(x: float) -> str:
    """Format a count, as in "42,000" or "0.29 million"."""
    return f"{short_number(x / 1e6)} million" if x >= 1e5 else f"{x:,.0f}"


def _with_largest_shape(data: TextStatistics, machine: Machine, config: TrainConfig) -> TrainConfig:
    """Return `config` with the largest shape that time, corpus and memory allow, unless the user set a shape."""
    if any(getattr(config, name) is not None for name in SHAPE):
        return config.resolved("n_layer", "n_head", "n_embd")
    largest = with_shape(config, SHAPES[0])
    for shape in SHAPES[1:]:
        candidate = with_shape(config, shape)
        size, per_token = block_weights(candidate), machine.speed.seconds(flops_per_token(candidate, data.vocab_size))
        trained = min(machine.seconds / per_token, _max_training_tokens(candidate, data.tokens))
        parameters = size + (1 if candidate.tie_embeddings else 2) * candidate.n_embd * data.vocab_size
        if (trained >= _min_training_tokens(size) and size <= WEIGHTS_PER_CHARACTER * data.characters
                and parameters <= machine.max_parameters):
            largest = candidate
    return largest


def _min_training_tokens(size: int) -> float:
    """Return the number of tokens that a model of `size` weights should at least train on."""
    a, b, maximum = TOKENS_PER_WEIGHT
    return size * min(a * (size / 1e6) ** b, maximum)


def _context(config: TrainConfig, data: TextStatistics) -> tuple[int, str]:
    """Return (context, reason): the largest power of two that the model can use and the corpus can fill.

    Tokens of other documents do not help prediction, so a context holds a few typical documents at most.
    """
    tokens, documents = data.tokens, data.documents
    return min(
        (next(context for max_weights, context in CONTEXTS if block_weights(config) <= max_weights),
         "enough for a model of this size"),
        (2 ** math.ceil(math.log2(8 * tokens / documents)),
         f"the documents are short, about {short_number(tokens / documents)} {data.unit} each"),
        (2 ** int(math.log2(max(8, tokens / 64))), "the text is short"), key=lambda candidate: candidate[0])


def evaluation_tokens(config: TrainConfig, vocab_size: int, seconds: float, speed: Speed) -> int:
    """Return the number of tokens that an evaluation can score in its share of a run of `seconds`.

    It is `eval_tokens`, halved until it fits, so that similar runs score the same tokens. speed: uncompiled, as
    evaluations are; a forward pass takes a third of a training step.
    """
    fitting = 3 * clock.ONE_EVALUATION * seconds / speed.seconds(flops_per_token(config, vocab_size))
    halvings = math.ceil(math.log2(config.eval_tokens / fitting))
    return max(1, config.eval_tokens >> max(0, halvings))


def memorization(config: TrainConfig, epochs: float, tokens: int) -> float:
    """Return epochs x weights per token of a corpus of `tokens`, a measure of how much is memorized."""
    return block_weights(config) / tokens * epochs


def _max_training_tokens(config: TrainConfig, tokens: int) -> float:
    """Return the training tokens, over all epochs, that reach MAX_MEMORIZATION."""
    return MAX_MEMORIZATION / memorization(config, 1, tokens) * tokens


def regularization(memorized: float) -> tuple[float, float]:
    """Return (weight decay, dropout) for a run whose `memorization` is `memorized`."""
    minimum, maximum = DECAY
    threshold, dropout = DROPOUT
    return (round(min(max(minimum, memorized / MEMORIZATION_PER_DECAY), maximum), 2),
            dropout if memorized > threshold else 0.0)
