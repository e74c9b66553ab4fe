"""The maths of the lecture as experiments: that they find what is known, and print nothing else than they found."""

from __future__ import annotations

import math
from pathlib import Path
from string import Formatter

import pytest
import torch

from bardlet.errors import BardletError
from bardlet.ladder import experiments, pictures
from bardlet.ladder.experiment import Experiment, seeded
from bardlet.ladder.experiments import EXPERIMENTS
from bardlet.ladder.experiments_attention import entropy, slope


@pytest.fixture(scope="module")
def found() -> dict[str, Experiment]:
    """Every experiment, run once."""
    return {experiment.name: experiment for experiment in experiments.run()}


def test_loop_matrix_and_softmax_are_one_average(found: dict[str, Experiment]) -> None:
    f = found["averages"].figures
    assert f["forms"] < 1e-6


def test_a_head_without_queries_or_keys_averages(found: dict[str, Experiment]) -> None:
    f = found["averages"].figures
    assert f["no_query"] < 1e-6 and f["no_key"] < 1e-6 and f["zero"] == 0
    assert f["equal"] == pytest.approx(1 / 8) and f["least"] < 0.1 < 0.2 < f["most"] and f["chosen"] > 0.1


def test_the_mask_hides_the_future_exactly(found: dict[str, Experiment]) -> None:
    f = found["mask"].figures
    assert f["future"] == 0 and f["earlier"] == 0 and f["later"] > 0.1
    assert f["least_sum"] == pytest.approx(1, abs=1e-6) and f["most_sum"] == pytest.approx(1, abs=1e-6)


def test_the_variance_of_scores_is_the_head_size(found: dict[str, Experiment]) -> None:
    """16 and 1 within 5 %, by so many scores that 5 % are dozens of standard errors."""
    f = found["variance"].figures
    assert f["raw"] == pytest.approx(16, rel=0.05) and f["scaled"] == pytest.approx(1, rel=0.05)
    assert f["scores"] >= 2e6 and f["error"] < 0.05 * 16 / 20 and abs(f["raw"] - 16) < 5 * f["error"]
    assert f["smallest"] == pytest.approx(4, rel=0.05) and f["largest"] == pytest.approx(256, rel=0.05)
    assert 0.95 < f["low"] <= f["high"] < 1.05


def test_softmax_of_unscaled_scores_is_sharp(found: dict[str, Experiment]) -> None:
    f = found["variance"].figures
    assert f["raw_most"] > 0.7 and f["scaled_most"] < 0.4
    assert f["raw_entropy"] < 0.8 and 1.6 < f["scaled_entropy"] < math.log(8) == f["even"]
    assert f["raw_slope"] < f["scaled_slope"] and f["raw_flat"] > 0.2 and f["scaled_flat"] < 0.01
    scores = torch.tensor([0.1, -0.2, 0.3, -0.2, 0.5])
    assert f["example"] == pytest.approx(float(scores.exp()[-1] / scores.exp().sum()))
    assert f["example_times"] == pytest.approx(0.8, abs=0.01)


def test_entropy_and_slope_are_those_of_softmax() -> None:
    score = torch.tensor([0.3, -1.0, 2.0, 0.5])
    weight = score.softmax(-1)
    jacobian = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), score)
    assert float(slope(weight)) == pytest.approx(float(jacobian.norm()), rel=1e-5)
    assert float(entropy(weight)) == pytest.approx(float(torch.distributions.Categorical(weight).entropy()), rel=1e-5)
    one = torch.tensor([1.0, 0.0, 0.0])
    assert float(slope(one)) == 0 and float(entropy(one)) == pytest.approx(0, abs=1e-6)


def test_residual_connections_keep_the_gradient(found: dict[str, Experiment]) -> None:
    f = found["residual"].figures
    assert 0 < f["plain"] < 1e-20 and f["plain_shallow"] < 0.1
    for name in ("residual", "norm", "residual_shallow", "norm_shallow"):
        assert 1 < f[name] < 10
    assert f["norm"] < f["residual"]


def test_dropout_keeps_the_mean_of_what_is_linear(found: dict[str, Experiment]) -> None:
    f = found["dropout"].figures
    assert f["zeros"] == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / f["numbers"]))
    assert f["kept"] == 1.25 and f["mean"] == pytest.approx(1, abs=0.0025)
    assert f["linear"] < 4 < 20 < f["nonlinear"]  # standard errors: the largest of 32 by chance, and no chance
    assert 0 < f["gap"] < 0.2 * f["size"]
    assert f["train"] > 0.01 and f["eval"] == 0


def test_layernorm_evens_out_rows_and_batch_norm_columns(found: dict[str, Experiment]) -> None:
    f = found["layernorm"].figures
    for even in ("row", "batch_column"):
        assert f[f"{even}_mean"] < 1e-6 and f[f"{even}_variance"] == pytest.approx(1, abs=1e-4)
    for uneven in ("before", "column", "batch_row"):
        assert f[f"{uneven}_mean"] > 0.5 and abs(f[f"{uneven}_variance"] - 1) > 0.5
    assert f["scale_free"] < 1e-4 and f["square"] == pytest.approx(1, abs=1e-4) and f["rms_mean"] > 0.1


def test_masks_of_encoder_decoder_and_prefix(found: dict[str, Experiment]) -> None:
    f = found["masks"].figures
    assert (f["encoder"], f["decoder"], f["prefix"]) == (64, 8 * 9 / 2, 8 * 9 / 2 + 5 * 4 / 2)
    assert (f["encoder_first"], f["decoder_first"], f["prefix_first"]) == (8, 1, 5)
    assert f["decoder_from_triangle"] == 0


def test_the_first_loss(found: dict[str, Experiment]) -> None:
    f = found["first_loss"].figures
    assert f["uniform"] == pytest.approx(-math.log(1 / 65), abs=1e-5)
    assert f["small"] == pytest.approx(math.log(65), abs=0.005) and f["careful"] == pytest.approx(math.log(65), abs=0.1)
    error = f["batch"] * math.sqrt(f["tokens"] / 20_000)  # batch is the deviation of a mean of 32, this one of 20,000
    assert abs(f["gaussian"] - f["finite"]) < 4 * error < 0.03 and f["gaussian"] < f["law"]
    assert f["bigram"] > f["uniform"] + 0.2 and f["default"] > f["uniform"]


def test_rotary_scores_depend_on_the_distance(found: dict[str, Experiment]) -> None:
    f = found["rotary"].figures
    assert f["turned"] < 2e-6 and f["turned_far"] < 1e-4 and f["added"] > 0.5 and f["size"] > 0.5


def test_heads_one_by_one_and_at_once(found: dict[str, Experiment]) -> None:
    f = found["heads"].figures
    assert f["difference"] < 1e-6 and f["one_by_one"] == f["at_once"]


def test_lines_print_figures_and_no_other_number(found: dict[str, Experiment]) -> None:
    """Outside the places for figures a sentence holds no digit; every figure is a finite number."""
    for name, experiment in found.items():
        assert experiment.conclusion and experiment.name == name in EXPERIMENTS
        for sentence in experiment.conclusion:
            parts = list(Formatter().parse(sentence))
            assert not any(c.isdigit() for literal, *_ in parts for c in literal), sentence
            assert any(field for _, field, *_ in parts), f"{name} says without a number: {sentence}"
        assert not any(c.isdigit() for c in experiment.title + experiment.question)
        assert all(math.isfinite(value) for value in experiment.figures.values())


def test_text_fits_a_terminal(found: dict[str, Experiment]) -> None:
    for experiment in found.values():
        lines = experiments.text(experiment).splitlines()
        assert max(map(len, lines)) <= 78 and lines[0] == experiment.title
        words = " ".join(" ".join(lines).split())
        assert all(" ".join(line.split()) in words for line in experiment.lines)


def test_experiments_give_the_same_numbers_and_leave_the_generator_alone(found: dict[str, Experiment]) -> None:
    """Whatever the global generator's state is: the figures are the same, and it goes on as if nothing had been."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for again in experiments.run():
        assert again.figures == found[again.name].figures, again.name
        assert again.lines == found[again.name].lines
        assert torch.equal(torch.get_rng_state(), before), again.name


def test_seeded_restores_the_generator_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        first = torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(1):
        assert torch.equal(torch.rand(3), first)


def test_experiments_are_chosen_by_name() -> None:
    assert [e.name for e in experiments.run(["masks", "heads"])] == ["masks", "heads"]
    with pytest.raises(BardletError, match="'attention' is no experiment; choose from first_loss, averages, mask"):
        experiments.run(["attention"])


def test_pictures_are_written_light_and_dark(
    found: dict[str, Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two PNG files for each, in different colours, and no figure is left open."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(pictures, "DPI", 40)  # small ones are drawn sooner
    before = plt.get_fignums()
    drawn = experiments.pictures(tmp_path, found.values())
    assert drawn == list(EXPERIMENTS)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}{s}.png" for n in drawn for s in ("", "-dark")}
    for name in drawn:
        light, dark = ((tmp_path / f"{name}{suffix}.png").read_bytes() for suffix in ("", "-dark"))
        assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
    assert plt.get_fignums() == before
