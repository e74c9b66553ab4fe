"""Minutes, a machine and a text become a plan: tokenizer, model, batch, regularisation, and the loss to expect.

Each choice is a rule with its reason, taken from measured runs (LOG.md has the table). What somebody sets himself
stays as it is. How many steps fit in the end is decided by the run's own first steps (`clock.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bardlet import __version__, clock, kept, loss, memory, models
from bardlet import dist as distributed
from bardlet import tokenizer as tokenizers
from bardlet.config import TrainConfig, option
from bardlet.dist import Dist
from bardlet.errors import BardletError
from bardlet.survey import Survey
from bardlet.train import Stage, Trainer

# ---------------------------------------------------------------- the machine

SHAPES = ((2, 2, 64), (3, 3, 96), (4, 4, 128), (4, 4, 192), (4, 4, 256), (6, 4, 256), (6, 5, 320), (6, 6, 384),
          (8, 8, 512), (12, 12, 768), (16, 16, 1024), (24, 16, 1024))
"""The models to choose from, as layers, heads and channels: 0.1 to 300 million weights in their blocks."""

TIMED = ((4, 4, 128), (6, 4, 256), (8, 8, 512))
"""Those whose steps are timed to know a machine."""

COMPILED, COMPILED_PAIRS = 1.7, 1.1
"""How many times as fast a compiled step is, about; and one of sentence pairs, whose short rows have less attention."""

COLD, WARM = 40.0, 8.0
"""Seconds of compilation, measured on 2 cores: the first time, and from the compiler's own cache."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains, uncompiled."""

    points: tuple[tuple[float, float], ...]
    """(floating-point operations of a token, seconds of a token), by growing operations."""

    def compiled(self) -> Speed:
        """The same machine with compiled blocks."""
        return Speed(tuple((x, y / COMPILED) for x, y in self.points))

    def seconds(self, operations: float) -> float:
        """The time of a token that takes so many operations: between the timed models on a line in logarithms, beyond
        the largest in proportion; a smaller one than the smallest counts as that."""
        x, y = np.log(np.array(self.points)).T
        wanted = math.log(operations)
        return float(np.exp(np.interp(wanted, x, y) + max(0.0, wanted - x[-1])))


def worth_compiling(seconds: float, takes: float = COLD, gain: float = COMPILED) -> bool:
    """Whether a run of so many seconds wins back what compilation takes."""
    return seconds * (1 - 1 / gain) > takes


def operations(config: TrainConfig, vocab_size: int) -> float:
    """Floating-point operations of a token in training: 6 for each weight that multiplies it, and attention's."""
    return 6.0 * (weights(config) + config.n_layer * config.n_embd * config.block_size + config.n_embd * vocab_size)


def weights(config: TrainConfig) -> int:
    """The weights of the blocks' matrices: 12 n_embd^2 in each block, as a rule. Embeddings are not counted."""
    c = config.model_config(1)
    attention, inner = 2 * c.head_dim * (c.n_head + c.n_kv_head), (3 if c.model == "qwen3" else 2) * c.n_inner
    crossing = attention if c.model == "encdec" else 0
    return c.n_embd * (c.n_layer * (attention + crossing + inner) + c.n_encoder_layer * (attention + inner))


def calibrate(dist: Dist, dtype: str, threads: int, cache: Path, seconds: float = math.inf) -> Speed:
    """How fast this machine trains, from a few steps of three models: seconds the first time, then from the cache.

    The smallest is timed each time: where it is half as fast or slow again as it was, the machine was busy then or is
    so now, and what was kept is not believed.

    Args:
        dtype: fp32 or bf16, the precision of the matrix products.
        threads: those of a CPU.
        cache: the cache's folder; what was measured is kept for this machine, torch and bardlet.
        seconds: how long the run will be that wants to know: a short one cannot wait for all three.
    """
    key = {**distributed.machine(dist, dtype, threads), "bardlet": __version__}
    begun = time.monotonic()
    points, known = [_time_model(TIMED[0], dist, dtype)], _known(cache, key)
    if dist.from_main(len(known) > 0 and 1 / 1.5 < points[0][1] / known[0][1] < 1.5):
        points = known or points  # of another machine's process the cache may be empty
    else:
        for shape in TIMED[1:]:
            # a machine that takes a second for a step is not asked for a larger model
            slow, hurry = points[-1][1] * _timed_rows(dist) * 128 > 1.0, time.monotonic() - begun > 0.03 * seconds
            if dist.from_main(int(slow or hurry)):
                break
            try:
                points.append(_time_model(shape, dist, dtype))
            except BardletError:  # too large for the memory, in all processes
                break
        if dist.main and (len(points) == len(TIMED) or slow):
            kept.write(cache / "machines", key, {"points": points})
    # in each process the first one's watch counts: all must choose the same model
    points = (points + [points[0]] * len(TIMED))[:dist.from_main(len(points))]
    return Speed(tuple((float(dist.from_main(round(x))), dist.from_main(round(y * 1e15)) / 1e15) for x, y in points))


def _known(cache: Path, key: dict[str, object]) -> list[tuple[float, float]]:
    """What the cache has for this machine."""
    found = kept.read(cache / "machines", key)
    return [(x, y) for x, y in found["points"]] if found else []


def _time_model(shape: tuple[int, int, int], dist: Dist, dtype: str) -> tuple[float, float]:
    """(operations, seconds) of a token of a model, from a few training steps.

    Raises BardletError where they do not fit into memory.
    """
    config = with_shape(TrainConfig(block_size=128, batch_size=_timed_rows(dist) * dist.world), shape)
    tokens = torch.randint(256, (config.batch_size, config.block_size + 1))
    batch: loss.Batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:]}
    model = models.build(config.model_config(256)).to(dist.device)
    stage = Stage(lambda step: batch, loss.next_token, loss.count_targets, lambda model: 0.0)
    t = Trainer(Path(), model, [], stage, config, dist, {"dtype": dtype}, {})
    rows, _, free = memory.rows_that_fit(t)
    if rows < config.batch_size // dist.world:
        raise BardletError(f"{free / 1e6:,.0f} MB of memory are free, too little to find out how fast this machine is; "
                           "take --steps for --minutes, or free some")
    return operations(config, 256), clock.seconds_per_step(t, 3, patience=1.0) / batch["idx"].numel()


def _timed_rows(dist: Dist) -> int:
    """Windows of 128 tokens that a process has in a timed step: more on a GPU, where launching a small one is all."""
    return 16 if dist.device.type == "cpu" else 256


def with_shape(config: TrainConfig, shape: tuple[int, int, int]) -> TrainConfig:
    """`config` with a shape of SHAPES."""
    return replace(config, n_layer=shape[0], n_head=shape[1], n_embd=shape[2])


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


# ---------------------------------------------------------------- the loss to expect

UNTOLD = {*SHAPE, "model", "tokenizer", "vocab_size", "block_size", "dropout", "batch_size", "grad_accum", "optimizer",
          "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_share", "weight_decay", "beta1", "beta2",
          "grad_clip"}
"""No loss is foretold of a run for which one of these was set: LAW knows the plans of `choose` alone."""

LAW = (-0.1137, 0.4254, -0.0628, 0.4426, 1.0245)
"""Least squares over runs on development splits: `python benchmarks/dial.py law`."""

REREAD = 8.0
"""How many fresh readings of a text its repetition can be worth at most; LAW depends on it. (Chosen with runs of the
dial, on the validation part, in sight: LOG.md.)"""

BAND = 0.15
"""Half the width of the band around the expected loss, as a share of it: twice what laws fitted to the other texts were
off for a text (root mean square; `dial.py law`)."""


def features(counting: Sequence[float], characters: float, epochs: float) -> tuple[float, ...]:
    """What the loss to expect is computed from: the logarithm of its ratio to counting's is a weighted sum of these.

    Args:
        counting: of a `Survey`.
        characters: how many are learned from, those read again counted again.
        epochs: how often the text is read.

    Returns:
        (1, what counting would gain by that many more characters, how many million they are, what a long context and
        what letters are worth to counting), all but the first as logarithms; what is read again counts less and less.
    """
    most, fewer, counted, *worth = counting
    gain = math.log(most / fewer) / math.log(4)  # of the logarithm of the loss, for each of the number of characters
    fresh = characters if epochs <= 1 else characters / epochs * (1 + REREAD * (1 - math.exp((1 - epochs) / REREAD)))
    return 1.0, gain * math.log(fresh / counted), math.log(fresh / 1e6), *worth


def expected_loss(counting: Sequence[float], characters: float, epochs: float) -> float:
    """The validation loss to expect of a plan of `choose`, in nats per character.

    An n-gram model that counted the text knows how hard it is, and two that counted more and less of it know what more
    text is worth. A network is better by a factor that depends little on the text (the arguments: see `features`).
    What is read again is worth less and less (Muennighoff et al., 2023, equation 5).
    """
    of = features(counting, characters, epochs)
    return counting[0] * math.exp(sum(a * x for a, x in zip(LAW, of, strict=True)))
