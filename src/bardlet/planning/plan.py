"""Minutes, a machine and a text become a plan: tokenizer, model, batch, and regularisation.

Each choice is a rule with its reason, taken from measured runs (LOG.md has the table). What somebody sets himself
stays as it is. How many steps fit in the end is decided by the run's own first steps (`planning/clock.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from bardlet import tokenizer as tokenizers
from bardlet.config.settings import TrainConfig, option
from bardlet.data.statistics import Survey
from bardlet.planning import clock
from bardlet.planning.calibrate import Speed, operations, weights, with_shape

# ---------------------------------------------------------------- the machine

SHAPES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (4, 4, 192), (4, 4, 256), (6, 4, 256), (6, 5, 320), (6, 6, 384),
          (8, 8, 512), (12, 12, 768), (16, 16, 1024), (24, 16, 1024))
"""The models to choose from, as layers, heads and channels: 0.1 to 300 million weights in their blocks."""


# ---------------------------------------------------------------- the plan

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

MOST_HEART = 330
"""How far a text is learned by heart, as its epochs times the weights for each of its tokens: no run goes beyond this.
(Names, 0.33 M weights, weight decay 1: 2.355 after 10 epochs, which is 83; 2.323 after 40, with dropout.)"""

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
"""The settings of which a shape consists: who sets one of them chooses the shape himself."""


@dataclass(frozen=True)
class Plan:
    """What was chosen for a run, and why."""

    config: TrainConfig
    reasons: tuple[str, ...]
    """A line for each choice."""
    steps: int
    """How many will fit, by the speed of the machine; the run's own first steps know better."""
    most_steps: int | None
    """More would only learn the text by heart; None: nobody knows."""
    compiled: bool = False
    """Whether `steps` counts on compiled blocks."""


def choose_vocabulary(config: TrainConfig, given: Collection[str], seen: Survey, seconds: float, speed: Speed,
                      most_parameters: float = math.inf) -> tuple[TrainConfig, str]:
    """`config` with the number of byte pairs for a text that wants them and the model that `seconds` will train.

    The head multiplies each token by the whole vocabulary: a third more than the blocks is what it may cost, of the
    model that the same time would train with 2,048 pieces. (With more, `choose` may take the next smaller model, whose
    head then costs more than that.)

    Returns:
        (config, the reason as a sentence; empty where nothing was chosen).
    """
    if "vocab_size" in given or ("tokenizer" in given and config.tokenizer != "bpe"):
        return config, ""
    kind, size, reason = tokenizers.choose(seen.characters, len(seen.alphabet))
    if "tokenizer" in given:
        kind, size = "bpe", tokenizers.suggest_vocab_size(seen.characters, len(seen.alphabet))
        reason = f"bpe: as asked for, so {size:,} tokens stand for its most frequent pieces"
    if kind != "bpe" or size is None:
        return config, ""
    characters = seen.train_characters  # as many tokens, at most
    model = _fitting(config, given, characters, characters, 2048, seconds, speed, most_parameters)
    afford = 2 ** int(math.log2(16 * model.n_layer * model.n_embd))
    if afford < size:
        reason = (f"{reason.partition(', so ')[0]}; of {size:,} pieces that it could have, {max(512, afford):,} suit "
                  "the size of the model")
    return replace(config, tokenizer="bpe", vocab_size=max(512, min(size, afford))), reason


def choose(config: TrainConfig, given: Collection[str], tokens: int, characters: int, documents: int, vocab_size: int,
           seconds: float, speed: Speed, processes: int = 1, most_parameters: float = math.inf) -> Plan:
    """Model, context, batch and regularisation for `seconds` of training on a text.

    Args:
        config: the settings; those that are not in `given` may change.
        given: the names of the settings that somebody set.
        tokens, characters: of the training part.
        documents: of the text.
        seconds: what is left for training steps.
        speed: of the machine, in the way that the run will be computed.
        processes: they share the windows of a batch equally.
        most_parameters: how many the memory can take.
    """
    config = _fitting(config, given, tokens, characters, vocab_size, seconds, speed, most_parameters)
    why = []
    if by_hand := [option(name) for name in SHAPE if name in given]:
        why.append(f"{config.n_layer} layers of {config.n_embd} channels, whatever the time: a shape is chosen where "
                   f"{', '.join(by_hand)} is not set")
    if "block_size" not in given:
        context, because = _context(config, tokens, documents)
        config = replace(config, block_size=context)
        why.append(f"context {context}: {because}")
    learned, most = seconds / speed.seconds(operations(config, vocab_size)), math.inf
    if not {*SHAPE, "dropout", "weight_decay"} & set(given):  # else he has a plan of his own; --keep best does the rest
        most = _most_learned(config, tokens)
    learned = min(learned, most)
    if not {"batch_size", "grad_accum"} & set(given):
        at_once = min(4096 * math.sqrt(learned / 6e6), tokens / 48)  # larger where there is more to average
        at_once = 2 ** round(math.log2(min(max(at_once, 256), 2**19)))
        rows = round(at_once / config.block_size / processes)
        config = replace(config, batch_size=max(1, rows) * processes)
    decay, dropout = regularisation(heart(config, learned / tokens, tokens))
    if "weight_decay" not in given:
        config = replace(config, weight_decay=decay)
    if "dropout" not in given:
        config = replace(config, dropout=dropout)
    steps = max(1, round(learned / config.tokens_per_step))
    return Plan(config, (*reasons(config, tokens, learned, learned == most), *why), steps,
                None if most == math.inf else max(1, math.ceil(most / config.tokens_per_step)))


def reasons(config: TrainConfig, tokens: int, learned: float, enough: bool) -> tuple[str, str]:
    """What is said of a model that learns from so many tokens of a text of `tokens`: two lines.

    enough: whether more would only learn the text by heart.
    """
    return (
        f"{short(weights(config) / 1e6)} million weights in the blocks: about {short(learned / 1e6)} million tokens "
        f"can be learned from, {short(learned / weights(config))} for each",
        f"the text is read {short(learned / tokens)} times, with weight decay {config.weight_decay:g} and dropout "
        f"{config.dropout:g}" + (", and no more, or it would be known by heart" if enough else ""),
    )


def short(x: float) -> str:
    """A number by its two first digits, or as a whole one."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _fitting(config: TrainConfig, given: Collection[str], tokens: int, characters: int, vocab_size: int,
             seconds: float, speed: Speed, most_parameters: float) -> TrainConfig:
    """`config` with the largest shape that time, text and memory allow, unless somebody chose one."""
    if set(SHAPE) & set(given):
        return config
    fitting = with_shape(config, SHAPES[0])
    for shape in SHAPES[1:]:
        larger = with_shape(config, shape)
        learned = min(seconds / speed.seconds(operations(larger, vocab_size)), _most_learned(larger, tokens))
        parameters = weights(larger) + (1 if larger.tie_embeddings else 2) * larger.n_embd * vocab_size
        if (learned >= _wanted(weights(larger)) and weights(larger) <= WEIGHTS_PER_CHARACTER * characters
                and parameters <= most_parameters):
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
         f"the documents are short, about {short(tokens / documents)} tokens each"),
        (2 ** int(math.log2(max(8, tokens / 64))), "the text is short"), key=lambda found: found[0])


def evaluation_tokens(config: TrainConfig, vocab_size: int, seconds: float, speed: Speed) -> int:
    """How many tokens an evaluation of `config` can look at in its share of a run of so many seconds.

    As many as the settings say, or half of them, a quarter ... (so that runs that differ little look at the same).
    speed: uncompiled, as evaluations are. A forward pass is a third of a training step.
    """
    if config.eval_tokens == 0:  # all, and somebody asked for that
        return 0
    fitting = 3 * clock.EVALUATING * seconds / speed.seconds(operations(config, vocab_size))
    halvings = math.ceil(math.log2(config.eval_tokens / fitting))
    return max(1, config.eval_tokens >> max(0, halvings))


def heart(config: TrainConfig, epochs: float, tokens: int) -> float:
    """How far a text of so many tokens is learned by heart: what MOST_HEART counts."""
    return weights(config) / tokens * epochs


def _most_learned(config: TrainConfig, tokens: int) -> float:
    """How many tokens, those read again counted again, a model learns from until MOST_HEART."""
    return MOST_HEART / heart(config, 1, tokens) * tokens


def regularisation(heart: float) -> tuple[float, float]:
    """(weight decay, dropout) that keep a text from being learned by heart, from what `heart` says of the run."""
    least, most = DECAY
    begins, dropout = DROPOUT
    return round(min(max(least, heart / HEART_PER_DECAY), most), 2), dropout if heart > begins else 0.0
