"""Plans from minutes, machine and corpus."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet import models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.data.statistics import CorpusStatistics
from bardlet.errors import BardletError
from bardlet.planning import calibrate, clock, memory, scaling_law
from bardlet.planning import plan as planning
from bardlet.planning.calibrate import Speed
from bardlet.planning.plan import Machine, Plan, TextStatistics
from bardlet.runtime import distributed
from bardlet.runtime.distributed import Dist

LAPTOP = Speed(((5e6, 2e-5), (3e7, 6e-5), (1.5e8, 3e-4)))
CPU = Dist(0, 1, torch.device("cpu"))


def make_plan(seconds: float, tokens: int = 1_000_000, config: TrainConfig | None = None, documents: int = 1,
              vocab_size: int = 65, speed: Speed = LAPTOP) -> Plan[TrainConfig]:  # fmt: skip
    """Return the plan for a text on a machine."""
    text = TextStatistics(tokens, tokens, documents, vocab_size)
    return planning.plan(text, Machine(seconds, speed), config or TrainConfig())


def steps_of(plan: Plan[TrainConfig], tokens: int) -> int:
    """Return the planned steps on a corpus of `tokens`."""
    return max(1, round(plan.epochs * tokens / plan.config.tokens_per_step))


def test_speed_interpolates_and_extrapolates_in_proportion() -> None:
    for flops, seconds in LAPTOP.points:
        assert LAPTOP.seconds(flops) == pytest.approx(seconds)
    assert 2e-5 < LAPTOP.seconds(1e7) < 6e-5
    assert LAPTOP.seconds(3e8) == pytest.approx(6e-4) and LAPTOP.seconds(1e6) == pytest.approx(2e-5)
    assert LAPTOP.compiled().seconds(3e7) == pytest.approx(6e-5 / calibrate.COMPILED)


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}, {"n_inner": 100}, {"model": "gpt2"}])
def test_weights_and_operations_match_the_model(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings).resolved()
    model = models.build(config.model_config(256))
    actual = sum(p.numel() for name, p in model.named_parameters()
               if p.ndim == 2 and "embed" not in name and ".wte" not in name and ".wpe" not in name)
    assert calibrate.block_weights(config) == actual
    assert calibrate.flops_per_token(config, 256) == pytest.approx(
        6 * (actual + 256 * config.n_embd + config.n_layer * config.n_embd * config.block_size))


@settings(max_examples=200)
@given(seconds=st.floats(5, 1e6), factor=st.floats(1, 100), tokens=st.integers(5_000, 10**9),
       documents=st.integers(1, 10_000), vocab_size=st.integers(2, 32_768), slow=st.floats(1e-4, 1e3))
def test_a_plan_is_trainable_and_grows_with_the_minutes(seconds: float, factor: float, tokens: int, documents: int,
                                                        vocab_size: int, slow: float) -> None:
    speed = Speed(tuple((x, y * slow) for x, y in LAPTOP.points))
    plan = make_plan(seconds, tokens, documents=documents, vocab_size=vocab_size, speed=speed)
    c = plan.config
    c.model_config(vocab_size)
    assert plan.most_steps and 1 <= steps_of(plan, tokens) <= plan.most_steps
    assert 2 * c.block_size <= tokens and c.block_size & (c.block_size - 1) == 0
    assert c.batch_size * c.block_size <= 2**19
    memorized = steps_of(plan, tokens) * c.batch_size * c.block_size / tokens * calibrate.block_weights(c) / tokens
    # the number of steps is rounded
    low, high = planning.regularization(0.8 * memorized), planning.regularization(1.3 * memorized)
    assert low[0] <= c.weight_decay <= high[0] and low[1] <= c.dropout <= high[1]
    longer = make_plan(seconds * factor, tokens, documents=documents, vocab_size=vocab_size, speed=speed).config
    assert calibrate.block_weights(longer) >= calibrate.block_weights(c) and longer.block_size >= c.block_size


def test_user_settings_stay() -> None:
    """Each setting alone, and all of them."""
    values = {"n_layer": 3, "n_head": 2, "n_embd": 80, "block_size": 48, "batch_size": 7, "grad_accum": 3,
              "dropout": 0.25, "weight_decay": 0.02}
    for names in [*((name,) for name in values), tuple(values)]:
        config = replace(TrainConfig(), **{name: values[name] for name in names})
        if names == ("n_head",):
            config = replace(config, n_head=4)
        plan = make_plan(60, config=config).config
        assert all(getattr(plan, name) == getattr(config, name) for name in names)
    assert make_plan(60, config=TrainConfig(n_embd=80)).config.n_layer == 4


def test_reasons_are_in_words_and_plain_numbers() -> None:
    """For the user's own shape, too. A char tokenizer's tokens are characters."""
    text = TextStatistics(1_000_000, 1_000_000, 1, 65, "characters")
    reasons = planning.plan(text, Machine(60, LAPTOP), TrainConfig()).reasons
    assert "million weights without the embeddings, trained on about" in reasons[0]
    assert reasons[2].endswith("channels: the largest model that the time and the text allow")
    assert reasons[3].startswith("context 128 characters: ")
    assert make_plan(0.1).reasons[2] == "2 layers of 64 channels: the smallest model that bardlet plans"
    assert make_plan(60, config=TrainConfig(n_layer=2)).reasons[2:] == (
        "2 layers of 192 channels: --n-layer is set, so bardlet did not choose the shape for the time",
        "context 128 tokens: enough for a model of this size")
    assert [planning.count(x) for x in (4.2, 12_345, 290_000)] == ["4", "12,345", "0.29 million"]


def test_a_small_text_gets_a_small_model_and_limited_epochs() -> None:
    night = make_plan(36_000, 40_000, documents=8_000)
    assert calibrate.block_weights(night.config) <= 400_000
    assert night.config.block_size <= 64 and night.config.dropout > 0
    tokens = night.config.batch_size * night.config.block_size
    epochs = steps_of(night, 40_000) * tokens / 40_000
    assert night.most_steps and steps_of(night, 40_000) <= night.most_steps
    assert epochs * calibrate.block_weights(night.config) / 40_000 <= planning.MAX_MEMORIZATION * 1.1
    hour = make_plan(3_600, 40_000, documents=8_000)
    assert hour.config == night.config and hour.epochs == night.epochs
    custom = make_plan(3_600, 40_000, TrainConfig(dropout=0.3))
    assert custom.most_steps is None and custom.epochs > hour.epochs
    fresh = make_plan(60, 60_000_000).config
    assert (fresh.weight_decay, fresh.dropout) == (0.1, 0.0) and night.config.weight_decay == 1.0


def test_a_tiny_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("Full many a glorious morning have I seen. ", encoding="utf-8")
    assert main(["train", str(tmp_path / "p.txt"), "--minutes", "1", "--plan"]) == 1
    assert "p: the text has 42 characters; use 10,000 or more" in capsys.readouterr().err


def test_a_vocabulary_is_chosen_only_for_a_long_text() -> None:
    long, short = CorpusStatistics(60_000_000, 54_000_000, "abc"), CorpusStatistics(1_000_000, 900_000, "abc")
    config = TrainConfig()
    three_minutes = Machine(180, LAPTOP)
    assert planning.plan_vocabulary(short, three_minutes, config) == (config, "")
    sizes = [planning.plan_vocabulary(long, Machine(seconds, LAPTOP), config)[0].vocab_size or 0
             for seconds in (240, 600, 1e5)]
    assert sizes == sorted(sizes) and 512 <= sizes[0] < sizes[-1] <= 32_768
    for seconds, slowdown, kind in ((60, 1, "char"), (120, 1, "char"), (240, 1, "bpe"), (240, 5, "char"),
                                    (1200, 5, "bpe")):
        machine = Machine(seconds, LAPTOP, slowdown=slowdown)
        assert planning.plan_vocabulary(long, machine, config)[0].tokenizer == kind, "bpe takes too long"
    many = CorpusStatistics(60_000_000, 54_000_000, "".join(map(chr, range(0x4e00, 0x5000))))
    assert planning.plan_vocabulary(many, Machine(60, LAPTOP), config)[0].tokenizer == "byte"
    for custom in (TrainConfig(tokenizer="char"), TrainConfig(vocab_size=700)):
        assert planning.plan_vocabulary(long, three_minutes, custom) == (custom, "")
    planned, reason = planning.plan_vocabulary(short, three_minutes, TrainConfig(tokenizer="bpe"))
    assert planned.vocab_size == 2048 and reason == "bpe: as requested; 2,048 tokens"


def test_bpe_is_trained_on_fewer_phrases_when_time_is_short() -> None:
    english, chinese = (CorpusStatistics(4_000_000, 3_600_000, alphabet)
                        for alphabet in ("abc", "".join(map(chr, range(0x4e00, 0x5000)))))
    assert planning.distinct_words(english, Machine(60, LAPTOP)) is None
    sizes = [planning.distinct_words(chinese, Machine(seconds, LAPTOP, slowdown=slowdown))
             for seconds, slowdown in ((1e-3, 1), (60, 5), (60, 1), (120, 1), (600, 1), (600, 5))]
    assert sizes == [750_000, 750_000, 750_000, 1_500_000, 6_000_000, 1_500_000]
    for seconds, slowdown, kind in ((60, 1, "bpe"), (40, 5, "byte")):
        machine = Machine(seconds, LAPTOP, slowdown=slowdown)
        assert planning.plan_vocabulary(chinese, machine, TrainConfig())[0].tokenizer == kind


def test_the_chosen_model_fits_in_memory() -> None:
    def parameters(maximum: float) -> float:
        text, machine = TextStatistics(50_000_000, 60_000_000, 1, 1024), Machine(3_600, LAPTOP, max_parameters=maximum)
        plan = planning.plan(text, machine, TrainConfig())
        return calibrate.block_weights(plan.config) + plan.config.n_embd * 1024

    sizes = [parameters(maximum) for maximum in (1e5, 1e6, 3e6, math.inf)]
    assert sizes == sorted(set(sizes)) and sizes[1] <= 1e6 and sizes[2] <= 3e6


def test_processes_that_may_share_a_model_have_room_for_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte of text, on processes with 64 GB each, far faster than a laptop."""
    monkeypatch.setattr(memory, "free_here", lambda dist: 64 * 10**9)
    monkeypatch.setattr(Dist, "all_max", lambda self, value: value)
    text, fast = TextStatistics(10**12, 4 * 10**12, 10**9, 50_000), Speed(tuple((x, y / 1e8) for x, y in LAPTOP.points))
    sizes = []
    for world, shared in ((1, True), (8, False), (8, True)):
        maximum = memory.max_parameters(Dist(0, world, torch.device("cpu")), shared)
        plan = planning.plan(text, Machine(1e6, fast, max_parameters=maximum), TrainConfig())
        sizes.append(calibrate.block_weights(plan.config) / 1e9)
        assert sizes[-1] * 1e9 <= maximum
    assert sizes == pytest.approx([1.2, 1.2, 6.4], rel=0.05)


@settings(max_examples=100)
@given(seconds=st.floats(1, 1e5), requested=st.integers(1, 10**7), slow=st.floats(1e-2, 1e5))
def test_an_evaluation_takes_no_more_than_its_share(seconds: float, requested: int, slow: float) -> None:
    """The requested tokens are halved only as often as necessary."""
    speed = Speed(tuple((x, y * slow) for x, y in LAPTOP.points))
    config = TrainConfig(eval_tokens=requested)
    per_token = speed.seconds(calibrate.flops_per_token(config, 65)) / 3
    tokens, budget = planning.evaluation_tokens(config, 65, seconds, speed), clock.ONE_EVALUATION * seconds
    assert tokens == 1 or tokens * per_token <= budget * (1 + 1e-9)
    halvings = int(math.log2(requested / tokens))
    assert tokens == 1 or (tokens == requested >> halvings and (
        tokens == requested or requested / 2 ** (halvings - 1) * per_token > budget * (1 - 1e-9)))


def test_ranks_on_two_machines_choose_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has a cached calibration, the other an empty cache: rank 0's values count."""
    monkeypatch.setattr(calibrate, "_time_model", lambda shape, dist, dtype: (shape[2] * 1e5, shape[2] * 1e-7))
    first = calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    sent: list[int] = []

    class Sender(Dist):
        def broadcast_int(self, value: int) -> int:
            sent.append(value)
            return value

    class Receiver(Dist):
        def broadcast_int(self, value: int) -> int:
            return sent.pop(0)

    assert calibrate.calibrate(Sender(0, 1, CPU.device), "fp32", 1, tmp_path) == first
    assert calibrate.calibrate(Receiver(1, 2, CPU.device), "fp32", 1, tmp_path / "empty") == first and not sent


def test_a_machine_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again if the machine or its speed changed; a calibration cut short is not cached."""
    calls: list[tuple[int, int, int]] = []
    factor = 1.0

    def timed(shape: tuple[int, int, int], dist: Dist, dtype: str) -> tuple[float, float]:
        calls.append(shape)
        return shape[2] * 1e5, shape[2] * 1e-7 * factor

    monkeypatch.setattr(calibrate, "_time_model", timed)

    def calls_of(dtype: str = "fp32", threads: int = 1, seconds: float = 1e9) -> int:
        calls.clear()
        calibrate.calibrate(CPU, dtype, threads, tmp_path, seconds)
        return len(calls)

    first = calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    assert [round(x) for x, _ in first.points] == [round(shape[2] * 1e5) for shape in calibrate.TIMED_SHAPES]
    assert calls_of() == 1 and calibrate.calibrate(CPU, "fp32", 1, tmp_path) == first
    assert calls_of(threads=2) == calls_of(dtype="bf16") == 3 and calls_of(threads=2) == 1
    factor = 1.3
    assert calls_of() == 1 and calibrate.calibrate(CPU, "fp32", 1, tmp_path) == first
    factor = 2.0
    assert calls_of() == 3 and calls_of() == 1
    monkeypatch.setattr(distributed, "processor", lambda: "another")
    assert calls_of(seconds=0.0) == 1 and calls_of() == 3


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"points": [[1.0, 1.0]]}'])
def test_a_damaged_calibration_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(calibrate, "_time_model", lambda shape, dist, dtype: (shape[2] * 1e5, shape[2] * 1e-7))
    first = calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    [file] = (tmp_path / "machines").iterdir()
    entry = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(entry | {"facts": json.loads(damage)}) if damage else "", encoding="utf-8")
    assert calibrate.calibrate(CPU, "fp32", 1, tmp_path) == first


def test_ranks_share_the_windows_of_a_batch() -> None:
    for world in (2, 3, 8):
        for tokens in (5_000, 50_000, 1_000_000):
            plan = planning.plan(TextStatistics(tokens, tokens, 1, 65), Machine(60, LAPTOP, world), TrainConfig())
            assert plan.config.batch_size % world == 0


def test_the_predicted_loss_falls_with_training() -> None:
    """More fresh characters lower the loss; repeated ones help less than new ones."""
    counting = (1.6, 1.8, 500_000.0, 0.0, 0.0)
    short, fresh, repeated = (scaling_law.predict_loss(counting, *arguments)
                              for arguments in ((1e6, 0.5), (4e6, 0.5), (4e6, 40.0)))
    assert fresh < repeated < 1.6 and fresh < short
    twenty, forty = (scaling_law.predict_loss(counting, 1e6 * n, float(n)) for n in (20, 40))
    assert abs(twenty / forty - 1) < 0.02, "further epochs barely help"


@pytest.mark.parametrize(("drift", "epochs", "rise"), [(0.14, 5.0, 0.0), (0.33, 0.2, 0.0257), (0.27, 1.9, 0.1104),
                                                       (0.33, 1e9, 0.27), (-0.3, 3.0, 0.0)])
def test_an_unlike_end_raises_the_prediction_with_the_epochs(drift: float, epochs: float, rise: float) -> None:
    """Of a text in order of time; usual texts have no rise. The band widens by half of the whole rise."""
    counting = (1.6, 1.8, 500_000.0, 0.0, 0.0)
    usual, raised = (scaling_law.predict_loss(counting, 1e6, epochs, d) for d in (0.0, drift))
    assert raised / usual - 1 == pytest.approx(rise, abs=1e-3)
    low, high = scaling_law.band(2.0, drift)
    assert (high - low) / 4 == pytest.approx(scaling_law.PREDICTION_BAND + scaling_law.price(drift) / 2)


@pytest.mark.parametrize(("loss", "bigram", "text"), [
    (0.3, 2.3, "the text itself"), (0.8, 2.3, "sentences"), (1.2, 2.5, "phrases"), (1.6, 2.5, "words, no"),
    (2.0, 2.5, "made-up"), (2.4, 2.5, "letters"), (5.2, 6.0, "")])
def test_a_loss_is_put_in_words(loss: float, bigram: float, text: str) -> None:
    """By its ratio to the bigram's of the same text; not for scripts of thousands of characters."""
    said = scaling_law.reads_like(loss, bigram)
    assert said.startswith(text) and bool(said) == bool(text)


def test_a_slow_machine_does_not_time_large_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_time_model", lambda shape, dist, dtype: (shape[2] * 1e5, shape[2] * 3e-6))
    assert len(calibrate.calibrate(CPU, "fp32", 1, tmp_path).points) == 2
    assert len(calibrate.calibrate(CPU, "fp32", 1, tmp_path).points) == 2, "cached, too"


def test_a_model_is_timed_by_its_steps(clock: Clock) -> None:
    flops, seconds = calibrate._time_model((1, 1, 8), CPU, "fp32")
    assert flops == calibrate.flops_per_token(TrainConfig(n_layer=1, n_head=1, n_embd=8), 256)
    assert seconds == pytest.approx(clock.per_step / (16 * 128))


def test_models_that_do_not_fit_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that fit suffice, but are not cached, as memory may be freed. If none fits, it is an error."""
    time_model = calibrate._time_model

    def timed(shape: tuple[int, int, int], dist: Dist, dtype: str) -> tuple[float, float]:
        return (5e6, 1e-5) if shape == calibrate.TIMED_SHAPES[0] else time_model(shape, dist, dtype)

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**8)
    with pytest.raises(BardletError, match="100 MB of memory are free, too little to time"):
        calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    monkeypatch.setattr(calibrate, "_time_model", timed)
    assert len(calibrate.calibrate(CPU, "fp32", 1, tmp_path).points) == 1 and not (tmp_path / "machines").exists()
