"""Minutes, a machine and the statistics of a corpus become a plan: tokenizer, model, batch, and regularisation.

Each choice is a rule with its reason, taken from measured runs (LOG.md has the table). A setting that somebody chose
stays as it is. How many steps fit in the end is decided by the run's own first steps (`planning/clock.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from bardlet import tokenizer as tokenization
from bardlet.config.pretraining import FromScratch, TrainConfig, TranslationConfig
from bardlet.config.settings import flag
from bardlet.data.statistics import CorpusStatistics
from bardlet.planning import clock
from bardlet.planning.calibrate import Speed, operations, weights, with_shape

C = TypeVar("C", bound=FromScratch)

# ---------------------------------------------------------------- the rules for a text

SHAPES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (4, 4, 192), (4, 4, 256), (6, 4, 256), (6, 5, 320), (6, 6, 384),
          (8, 8, 512), (12, 12, 768), (16, 16, 1024), (24, 16, 1024))
"""The models to choose from, as layers, heads and channels: 0.1 to 300 million weights in their blocks."""

MODELS = ("qwen3", "gpt2")
"""Those that a plan can be made for; the rungs of the ladder have the lecture's settings."""

CONTEXTS = ((3e6, 128), (30e6, 256), (100e6, 512), (math.inf, 1024))
"""(most weights, context in tokens): a small model has no use for what is far away."""

DECAY, HEART_PER_DECAY, DROPOUT = (0.1, 1.0), 75, (120, 0.1)
"""(least, most) weight decay, and between them what MOST_HEART counts over HEART_PER_DECAY; (from where on, dropout).
Against learning by heart weight decay costs no time and less of the loss than dropout: Tiny Shakespeare read 12.7
times, 1.421 with 0.1, 1.400 with dropout 0.05 besides, 1.378 with 0.3 alone; stories read 14.5 times, 0.693, and 0.640
with 0.3."""

TOKENS_PER_WEIGHT = (1.4, 0.75, 20.0)
"""(a, b, most): the largest model is taken that learns from a * (millions of weights)^b tokens for each weight, or from
`most` (Hoffmann et al., 2022). a and b: with 1.2 tokens for each weight 0.8 M was better than 0.3 M in the same minute,
with 1.8 for each 1.8 M was worse than 0.8 M in the same three."""

WEIGHTS_PER_CHARACTER = 10
"""No model has more weights than so many for each character of its text."""

MAX_MEMORIZATION = 330
"""How far a text is learned by heart, as its epochs times the weights for each of its tokens: no run goes beyond this.
(Names, 0.33 M weights, weight decay 1: 2.355 after 10 epochs, which is 83; 2.323 after 40, with dropout.)"""

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
"""The settings of which a shape consists: who sets one of them chooses the shape himself."""


# ---------------------------------------------------------------- the rules for pairs of sentences

PAIR_SHAPES = ((2, 2, 64), (2, 4, 128), (3, 4, 128), (3, 4, 192), (3, 4, 256), (4, 6, 384), (6, 8, 512))
"""The models to choose from, as layers (of encoder and decoder each), heads and channels."""

PAIR_TOKENS_PER_WEIGHT, WEIGHTS_PER_PAIR_TOKEN = 0.7, 15.0
"""The largest model is taken that learns from so many target tokens for each of its weights, and that has no more
weights than so many for each target token there is. On two cores, Multi30k de-en, BLEU of the validation part: in one
minute 33.1 with 1.3 tokens for each weight, 28.7 with 0.2; in five 40.5 with 0.9, 39.9 with 2.5."""

PAIR_DROPOUTS = ((4, 0.1), (25, 0.2), (math.inf, 0.3))
"""(most epochs, dropout)."""


# ---------------------------------------------------------------- what a plan is made of


@dataclass(frozen=True)
class TextStatistics:
    """The size of a text, tokens and characters of its training part."""

    tokens: int
    characters: int
    documents: int
    vocab_size: int


@dataclass(frozen=True)
class PairStatistics:
    """The size of the training pairs: tokens of their sources and their targets."""

    source_tokens: float
    target_tokens: float
    vocab_size: int


@dataclass(frozen=True)
class Machine:
    """What a run has to train with."""

    seconds: float
    """What is left for training steps."""
    speed: Speed
    """Of the machine, in the way that the run will be computed."""
    processes: int = 1
    """They share the windows of a batch equally."""
    most_parameters: float = math.inf
    """How many the memory can take."""
    compiled: bool = False
    """Whether `speed` is that of compiled blocks."""


@dataclass(frozen=True)
class Plan(Generic[C]):
    """What was chosen for a run, and why."""

    config: C
    """The settings, resolved."""
    reasons: tuple[str, ...]
    """A line for each choice."""
    epochs: float
    """How often the corpus will be read, by the speed of the machine; the run's own first steps know better."""
    most_steps: int | None = None
    """More would only learn the text by heart; None: nobody knows."""
    compiled: bool = False
    """Whether `epochs` counts on compiled blocks."""


def plan_vocabulary(seen: CorpusStatistics, machine: Machine, config: TrainConfig) -> tuple[TrainConfig, str]:
    """`config` with the number of byte pairs for a text that wants them and the model that the time will train.

    The head multiplies each token by the whole vocabulary: a third more than the blocks is what it may cost, of the
    model that the same time would train with 2,048 pieces. (With more, `plan` may take the next smaller model, whose
    head then costs more than that.)

    Returns:
        (config, the reason as a sentence; empty where nothing was chosen).
    """
    if config.vocab_size is not None or config.tokenizer in ("char", "byte"):
        return config, ""
    kind, size, reason = tokenization.choose_kind(seen.characters, len(seen.alphabet))
    if config.tokenizer == "bpe":
        kind, size = "bpe", tokenization.suggest_vocab_size(seen.characters, len(seen.alphabet))
        reason = f"bpe: as asked for, so {size:,} tokens stand for its most frequent pieces"
    if kind != "bpe" or size is None:
        return config, ""
    characters = seen.train_characters  # as many tokens, at most
    model = _fitting(TextStatistics(characters, characters, 1, 2048), machine, config)
    afford = 2 ** int(math.log2(16 * model.n_layer * model.n_embd))
    if afford < size:
        reason = (f"{reason.partition(', so ')[0]}; of {size:,} pieces that it could have, {max(512, afford):,} suit "
                  "the size of the model")
    return replace(config, tokenizer="bpe", vocab_size=max(512, min(size, afford))), reason


def plan(data: TextStatistics, machine: Machine, config: TrainConfig) -> Plan[TrainConfig]:
    """Model, context, batch and regularisation for the seconds that `machine` has: the settings resolved."""
    open_ = {name for name, value in vars(config).items() if value is None}
    tokens, by_hand = data.tokens, [flag(name) for name in SHAPE if name not in open_]
    config, why = _fitting(data, machine, config), []
    if by_hand:
        why.append(f"{config.n_layer} layers of {config.n_embd} channels, whatever the time: a shape is chosen where "
                   f"{', '.join(by_hand)} is not set")
    if "block_size" in open_:
        context, because = _context(config, tokens, data.documents)
        config = replace(config, block_size=context)
        why.append(f"context {context}: {because}")
    learned, most = machine.seconds / machine.speed.seconds(operations(config, data.vocab_size)), math.inf
    if not by_hand and {"dropout", "weight_decay"} <= open_:  # else he has a plan of his own; --keep best does the rest
        most = _max_training_tokens(config, tokens)
    learned = min(learned, most)
    if "batch_size" in open_ and config.grad_accum == 1:
        at_once = min(4096 * math.sqrt(learned / 6e6), tokens / 48)  # larger where there is more to average
        at_once = 2 ** round(math.log2(min(max(at_once, 256), 2**19)))
        rows = round(at_once / config.block_size / machine.processes)
        config = replace(config, batch_size=max(1, rows) * machine.processes)
    decay, dropout = regularization(memorization(config, learned / tokens, tokens))
    config = config.resolved(weight_decay=decay, dropout=dropout)
    return Plan(config, (*reasons(config, tokens, learned, learned == most), *why), learned / tokens,
                None if most == math.inf else max(1, math.ceil(most / config.tokens_per_step)), machine.compiled)


def plan_pairs(data: PairStatistics, machine: Machine, config: TranslationConfig) -> Plan[TranslationConfig]:
    """Model and dropout for the seconds that `machine` has: the settings resolved."""
    source, target, vocabulary = data.source_tokens, data.target_tokens, data.vocab_size

    def learned(c: TranslationConfig) -> float:
        """Target tokens that fit into the time."""
        size = weights(c)
        if c.model == "encdec":  # each of its tokens meets one half of it
            encoder = size * 3 / 7 * source / target
            operations = 6 * (size * 4 / 7 + encoder + c.n_embd * vocabulary)
        else:
            operations = 6 * (size * (1 + source / target) + c.n_embd * vocabulary)
        return machine.seconds / machine.speed.seconds(operations)

    if all(getattr(config, name) is None for name in (*SHAPE, "n_encoder_layer")):
        fitting = _pair_shape(config, PAIR_SHAPES[0])
        for shape in PAIR_SHAPES[1:]:
            larger = _pair_shape(config, shape)
            size = weights(larger)
            if (learned(larger) >= PAIR_TOKENS_PER_WEIGHT * size and size <= WEIGHTS_PER_PAIR_TOKEN * target
                    and size + larger.n_embd * vocabulary <= machine.most_parameters):
                fitting = larger
        config = fitting
    config = config.resolved("n_layer", "n_head", "n_embd")
    size, epochs = weights(config), learned(config) / target
    config = config.resolved(dropout=next(dropout for most, dropout in PAIR_DROPOUTS if epochs <= most))
    reason = (f"{size / 1e6:.1f} million weights in the blocks: the pairs can be read about {epochs:.1f} times, "
              f"{epochs * target / size:.1f} target tokens for each weight; dropout {config.dropout:g}")
    return Plan(config, (reason,), epochs)


def _pair_shape(config: TranslationConfig, shape: tuple[int, int, int]) -> TranslationConfig:
    """`config` with one of PAIR_SHAPES; a decoder-only model has as many weights in more blocks."""
    layers = shape[0] if config.model == "encdec" else round(shape[0] * 7 / 3)  # 12 and 16 C^2, or 12 C^2 each
    return with_shape(config, (layers, *shape[1:]))


def reasons(config: TrainConfig, tokens: int, learned: float, enough: bool) -> tuple[str, str]:
    """What is said of a model that learns from so many tokens of a text of `tokens`: two lines.

    enough: whether more would only learn the text by heart.
    """
    return (
        f"{short_number(weights(config) / 1e6)} million weights in the blocks: about {short_number(learned / 1e6)} million tokens "
        f"can be learned from, {short_number(learned / weights(config))} for each",
        f"the text is read {short_number(learned / tokens)} times, with weight decay {config.weight_decay:g} and dropout "
        f"{config.dropout:g}" + (", and no more, or it would be known by heart" if enough else ""),
    )


def short_number(x: float) -> str:
    """A number by its two first digits, or as a whole one."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _fitting(data: TextStatistics, machine: Machine, config: TrainConfig) -> TrainConfig:
    """`config` with the largest shape that time, text and memory allow, unless somebody chose one."""
    if any(getattr(config, name) is not None for name in SHAPE):
        return config.resolved("n_layer", "n_head", "n_embd")
    fitting = with_shape(config, SHAPES[0])
    for shape in SHAPES[1:]:
        larger = with_shape(config, shape)
        size, time = weights(larger), machine.speed.seconds(operations(larger, data.vocab_size))
        learned = min(machine.seconds / time, _max_training_tokens(larger, data.tokens))
        parameters = size + (1 if larger.tie_embeddings else 2) * larger.n_embd * data.vocab_size
        if (learned >= _wanted(size) and size <= WEIGHTS_PER_CHARACTER * data.characters
                and parameters <= machine.most_parameters):
            fitting = larger
    return fitting


def _wanted(size: int) -> float:
    """How many tokens a model of so many weights should learn from."""
    a, b, most = TOKENS_PER_WEIGHT
    return size * min(a * (size / 1e6) ** b, most)


def _context(config: TrainConfig, tokens: int, documents: int) -> tuple[int, str]:
    """A context that the model can make use of and the text can fill, a power of two; and which of these it is.

    Nothing is to be learned from other documents: a context has room for some of their usual length, and for no more.
    """
    return min(
        (next(context for most, context in CONTEXTS if weights(config) <= most), "what a model of this size can use"),
        (2 ** math.ceil(math.log2(8 * tokens / documents)),
         f"the documents are short, about {short_number(tokens / documents)} tokens each"),
        (2 ** int(math.log2(max(8, tokens / 64))), "the text is short"), key=lambda found: found[0])


def evaluation_tokens(config: TrainConfig, vocab_size: int, seconds: float, speed: Speed) -> int:
    """How many tokens an evaluation of `config` can look at in its share of a run of so many seconds.

    As many as the settings say, or half of them, a quarter ... (so that runs that differ little look at the same).
    speed: uncompiled, as evaluations are. A forward pass is a third of a training step.
    """
    fitting = 3 * clock.EVALUATION_SHARE * seconds / speed.seconds(operations(config, vocab_size))
    halvings = math.ceil(math.log2(config.eval_tokens / fitting))
    return max(1, config.eval_tokens >> max(0, halvings))


def memorization(config: TrainConfig, epochs: float, tokens: int) -> float:
    """How far a text of so many tokens is learned by heart: what MOST_HEART counts."""
    return weights(config) / tokens * epochs


def _max_training_tokens(config: TrainConfig, tokens: int) -> float:
    """How many tokens, those read again counted again, a model learns from until MOST_HEART."""
    return MAX_MEMORIZATION / memorization(config, 1, tokens) * tokens


def regularization(heart: float) -> tuple[float, float]:
    """(weight decay, dropout) that keep a text from being learned by heart, from what `heart` says of the run."""
    least, most = DECAY
    begins, dropout = DROPOUT
    return round(min(max(least, heart / HEART_PER_DECAY), most), 2), dropout if heart > begins else 0.0
