"""The experiments: their figures match theory, and their text prints only their figures."""

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
def results() -> dict[str, Experiment]:
    """The result of every experiment, run once."""
    return {experiment.name: experiment for experiment in experiments.run()}


def test_loop_matrix_and_softmax_give_the_same_average(results: dict[str, Experiment]) -> None:
    f = results["averages"].figures
    assert f["forms"] < 1e-6


def test_head_without_queries_or_keys_averages(results: dict[str, Experiment]) -> None:
    f = results["averages"].figures
    assert f["no_query"] < 1e-6 and f["no_key"] < 1e-6 and f["zero"] == 0
    assert f["equal"] == pytest.approx(1 / 8) and f["least"] < 0.1 < 0.2 < f["most"] and f["chosen"] > 0.1


def test_mask_hides_the_future_exactly(results: dict[str, Experiment]) -> None:
    f = results["mask"].figures
    assert f["future"] == 0 and f["earlier"] == 0 and f["later"] > 0.1
    assert f["one"] == 1 and f["sum_error"] < 1e-6


def test_variance_of_scores_equals_the_head_size(results: dict[str, Experiment]) -> None:
    """16 and 1 within 5 %, with enough scores that 5 % is at least 20 standard errors."""
    f = results["variance"].figures
    assert f["raw"] == pytest.approx(16, rel=0.05) and f["scaled"] == pytest.approx(1, rel=0.05)
    assert f["scores"] >= 2e6 and f["error"] < 0.05 * 16 / 20 and abs(f["raw"] - 16) < 5 * f["error"]
    assert f["smallest"] == pytest.approx(4, rel=0.05) and f["largest"] == pytest.approx(256, rel=0.05)
    assert 0.95 < f["low"] <= f["high"] < 1.05


def test_unscaled_scores_make_softmax_sharp(results: dict[str, Experiment]) -> None:
    f = results["variance"].figures
    assert f["raw_most"] > 0.7 and f["scaled_most"] < 0.4
    assert f["raw_entropy"] < 0.8 and 1.6 < f["scaled_entropy"] < math.log(8) == f["even"]
    assert f["raw_slope"] < f["scaled_slope"] and f["raw_flat"] > 0.2 and f["scaled_flat"] < 0.01
    scores = torch.tensor([0.1, -0.2, 0.3, -0.2, 0.5])
    assert f["example"] == pytest.approx(float(scores.exp()[-1] / scores.exp().sum()))
    assert f["example_times"] == pytest.approx(0.8, abs=0.01)


def test_entropy_and_slope_match_torch() -> None:
    score = torch.tensor([0.3, -1.0, 2.0, 0.5])
    weight = score.softmax(-1)
    jacobian = torch.autograd.functional.jacobian(lambda z: z.softmax(-1), score)
    assert float(slope(weight)) == pytest.approx(float(jacobian.norm()), rel=1e-5)
    assert float(entropy(weight)) == pytest.approx(float(torch.distributions.Categorical(weight).entropy()), rel=1e-5)
    one_hot = torch.tensor([1.0, 0.0, 0.0])
    assert float(slope(one_hot)) == 0 and float(entropy(one_hot)) == pytest.approx(0, abs=1e-6)


def test_residual_connections_keep_the_gradient(results: dict[str, Experiment]) -> None:
    f = results["residual"].figures
    assert 0 < f["plain"] < 1e-20 and f["plain_shallow"] < 0.1
    for name in ("residual", "norm", "residual_shallow", "norm_shallow"):
        assert 1 < f[name] < 10
    assert f["norm"] < f["residual"]


def test_dropout_keeps_the_mean_of_linear_layers_only(results: dict[str, Experiment]) -> None:
    f = results["dropout"].figures
    assert f["zeros"] == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / f["numbers"]))
    assert f["kept"] == 1.25 and f["mean"] == pytest.approx(1, abs=0.0025)
    assert f["linear"] < 4 < 20 < f["nonlinear"]  # standard errors: chance over 32 units, and not chance
    assert 0 < f["gap"] < 0.2 * f["size"]
    assert f["train"] > 0.01 and f["eval"] == 0


def test_layernorm_normalizes_rows_and_batch_norm_columns(results: dict[str, Experiment]) -> None:
    f = results["layernorm"].figures
    for even in ("row", "batch_column"):
        assert f[f"{even}_mean"] < 1e-6 and f[f"{even}_variance"] == pytest.approx(1, abs=1e-4)
    for uneven in ("before", "column", "batch_row"):
        assert f[f"{uneven}_mean"] > 0.5 and abs(f[f"{uneven}_variance"] - 1) > 0.5
    assert f["scale_free"] < 1e-4 and f["square"] == pytest.approx(1, abs=1e-4) and f["rms_mean"] > 0.1


def test_masks_of_encoder_decoder_and_prefix(results: dict[str, Experiment]) -> None:
    f = results["masks"].figures
    assert (f["encoder"], f["decoder"], f["prefix"]) == (64, 8 * 9 / 2, 8 * 9 / 2 + 5 * 4 / 2)
    assert (f["encoder_first"], f["decoder_first"], f["prefix_first"]) == (8, 1, 5)
    assert f["decoder_from_triangle"] == 0


def test_first_loss_matches_theory(results: dict[str, Experiment]) -> None:
    f = results["first_loss"].figures
    assert f["uniform"] == pytest.approx(-math.log(1 / 65), abs=1e-5)
    assert f["small"] == pytest.approx(math.log(65), abs=0.005) and f["careful"] == pytest.approx(math.log(65), abs=0.1)
    error = f["batch"] * math.sqrt(f["tokens"] / 20_000)  # from the deviation over 32 tokens to 20,000
    assert abs(f["gaussian"] - f["finite"]) < 4 * error < 0.03 and f["gaussian"] < f["law"]
    assert f["bigram"] > f["uniform"] + 0.2 and f["default"] > f["uniform"]


def test_rotary_scores_depend_on_the_distance(results: dict[str, Experiment]) -> None:
    f = results["rotary"].figures
    assert f["turned"] < 2e-6 and f["turned_far"] < 1e-4 and f["added"] > 0.5 and f["size"] > 0.5


def test_separate_and_batched_heads_agree(results: dict[str, Experiment]) -> None:
    f = results["heads"].figures
    assert f["difference"] < 1e-6 and f["one_by_one"] == f["at_once"]


def test_sentences_contain_no_literal_numbers(results: dict[str, Experiment]) -> None:
    """Every number in a sentence comes from a figure, and every figure is finite."""
    for name, experiment in results.items():
        assert experiment.conclusion and experiment.name == name in EXPERIMENTS
        for sentence in experiment.conclusion:
            parts = list(Formatter().parse(sentence))
            assert not any(c.isdigit() for literal, *_ in parts for c in literal), sentence
            assert any(field for _, field, *_ in parts), f"{name}: a sentence without a figure: {sentence}"
        assert not any(c.isdigit() for c in experiment.title + experiment.question)
        assert all(math.isfinite(value) for value in experiment.figures.values())


def test_text_is_at_most_78_columns_wide(results: dict[str, Experiment]) -> None:
    for experiment in results.values():
        lines = experiments.text(experiment).splitlines()
        assert max(map(len, lines)) <= 78 and lines[0] == experiment.title
        text = " ".join(" ".join(lines).split())
        assert all(" ".join(line.split()) in text for line in experiment.lines)


def test_experiments_are_reproducible_and_keep_the_global_generator(results: dict[str, Experiment]) -> None:
    """The figures do not depend on the global generator, and its state is unchanged afterwards."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for rerun in experiments.run():
        assert rerun.figures == results[rerun.name].figures, rerun.name
        assert rerun.lines == results[rerun.name].lines
        assert torch.equal(torch.get_rng_state(), before), rerun.name


def test_seeded_restores_the_generator_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        first = torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(1):
        assert torch.equal(torch.rand(3), first)


def test_experiments_are_selected_by_name() -> None:
    assert [e.name for e in experiments.run(["masks", "heads"])] == ["masks", "heads"]
    with pytest.raises(BardletError, match="unknown experiment 'attention'; choose from first_loss, averages, mask"):
        experiments.run(["attention"])


def test_pictures_are_written_light_and_dark(
    results: dict[str, Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two PNG files per experiment, in different colors, and no figure stays open."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(pictures, "DPI", 40)  # smaller pictures draw faster
    before = plt.get_fignums()
    drawn = experiments.pictures(tmp_path, results.values())
    assert drawn == list(EXPERIMENTS)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}{s}.png" for n in drawn for s in ("", "-dark")}
    for name in drawn:
        light, dark = ((tmp_path / f"{name}{suffix}.png").read_bytes() for suffix in ("", "-dark"))
        assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
    assert plt.get_fignums() == before
