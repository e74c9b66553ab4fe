"""Findings about rollouts; each problem next to a run that is like it and has none."""

from __future__ import annotations

from typing import Any

import pytest

from bardlet.config.finetuning import GRPOConfig, RolloutConfig
from bardlet.run import rollout_diagnosis

CONFIG, EXACT = (GRPOConfig(reward=reward, steps=400) for reward in ("a-command", "exact"))
START: dict[str, Any] = {"reward": 0.2, "kl": 0.0, "answer_tokens": 20.0, "ended": 0.9, "different": 0.8,
                         "deviation": 0.4}


def lines(number: int = 12, every: int = 10, **last: float) -> list[dict[str, Any]]:
    """Return a line of each rollout, from START to START with `last`, in equal steps."""
    rows = []
    for n in range(number):
        share = n / (number - 1)
        figures = {name: START.get(name, 0.0) + share * (last.get(name, START.get(name, 0.0)) - START.get(name, 0.0))
                   for name in START}
        if "accuracy" in last:
            figures["accuracy"] = 0.4 + share * (last["accuracy"] - 0.4)
        rows.append({"step": every * (n + 1), "rollout": n, "train_loss": 0.001 * n, **figures})
    return rows


def found(rows: list[dict[str, Any]], config: RolloutConfig = CONFIG, steps: int = 400, **record: float) -> str:
    return " | ".join(f"{finding.verdict}: {finding.message}"
                      for finding in rollout_diagnosis.of_rollouts(rows, config, steps, record))


def test_a_reward_that_rises_has_no_finding() -> None:
    assert found(lines(reward=0.9, kl=3.0)) == ""
    assert found(lines(reward=0.9, kl=3.0, accuracy=0.8, different=0.2)) == "", "right answers are alike"
    assert found([]) == found(lines()[:2]) == ""


@pytest.mark.parametrize(("reward", "text"), [(0.0, "warning: no signal: since step 10 all"), (1.0, "ok: every")])
def test_equal_rewards(reward: float, text: str) -> None:
    rows = [{**START, "step": 10 * n, "rollout": n, "reward": reward, "deviation": 0.0, "kl": n / 100}
            for n in range(1, 5)]
    assert found(rows, EXACT).startswith(text)
    rows[-1]["deviation"] = 0.1
    assert "no signal" not in found(rows)


def test_a_few_distinct_rewards_are_a_signal() -> None:
    assert found(lines(deviation=0.01, reward=0.6, kl=1.0)) == ""


def test_collapse() -> None:
    """Alike, endless or worse answers, far from the model before, with no higher reward."""
    for change, text in (({"different": 0.1}, "are distinct, 80% at the start"), ({"ended": 0.1}, "of them end, 90%"),
                         ({"reward": -0.3}, "the reward fell from 0.2 to"), ({}, "its answers are no better")):
        said = found(lines(kl=30.0, **change))
        assert "the policy collapsed" in said and text in said
        assert "collapsed" not in found(lines(kl=0.01, **change)), "it is still the model before"
    assert "collapsed" in found(lines(kl=5.0, different=0.1, ended=0.1)), "two signs, not so far"
    assert "collapsed" not in found(lines(kl=5.0, different=0.1)) + found(lines(kl=30.0, different=0.1, reward=0.9))


def test_a_collapse_before_the_first_line_is_measured_against_the_model_before() -> None:
    rows = [{**START, "step": 10 * n, "rollout": n, "reward": 0.0, "deviation": 0.0, "kl": 30.0} for n in range(1, 5)]
    assert "the policy collapsed: the reward fell from 0.3 to 0" in found(rows, reward_mean=0.3, reward_deviation=0.45)
    assert "no signal" in found([{**row, "kl": 0.02} for row in rows], reward_mean=0.0, reward_deviation=1.0)


def test_gaming() -> None:
    """The reward rises; right answers become fewer or, where nobody knows them, lengths or variety run away."""
    assert "the reward is gamed" in found(lines(reward=2.0, kl=5.0, accuracy=0.05))
    assert "fell from 40% to" in found(lines(reward=2.0, kl=5.0, accuracy=0.05))
    assert found(lines(reward=2.0, kl=5.0, answer_tokens=200.0)).startswith("warning: the reward may be gamed")
    assert "may be gamed" in found(lines(reward=2.0, kl=5.0, different=0.1))
    assert found(lines(reward=2.0, kl=5.0, answer_tokens=200.0, accuracy=0.9)) == "", "longer and right"


def test_an_exact_reward_is_not_gamed() -> None:
    assert found(lines(reward=1.5, kl=5.0, answer_tokens=200.0), EXACT) == ""


def test_answers_learned_by_heart() -> None:
    """The reward rises on the training prompts, and not on the held-out ones."""
    evaluations = [{"step": 40 * n, "val_loss": -0.2} for n in range(1, 4)]
    assert "on the training prompts only" in found([*lines(reward=0.9, kl=3.0), *evaluations])
    evaluations[-1]["val_loss"] = -0.4
    assert found([*lines(reward=0.9, kl=3.0), *evaluations]) == ""
    assert found([*lines(reward=0.3, kl=3.0), *evaluations], steps=4000) == ""


def test_a_reward_that_stays() -> None:
    still, moved = found(lines(kl=0.01)), found(lines(kl=2.0))
    assert "does not rise" in still and "hardly moved" in still and "raise --lr" in still
    assert "chance differences" in moved
    assert found(lines(kl=0.01), steps=4000) == "", "too early"


def test_several_lines_of_a_rollout_are_one_point() -> None:
    rows = lines()
    doubled = [{**row, "step": row["step"] + more} for row in rows for more in (0, 5)]
    assert rollout_diagnosis.points_of(doubled) == rollout_diagnosis.points_of(rows)
    assert len(rollout_diagnosis.points_of(rows)) == len(rows)
    assert rollout_diagnosis.points_of([{"step": 1, "val_loss": 0.5}]) == []


def test_the_loss_is_explained() -> None:
    [finding] = rollout_diagnosis.of_loss(lines())
    assert finding.verdict == "ok" and finding.message.startswith("0.0000 at first, 0.0110 now")
    assert list(rollout_diagnosis.of_loss([])) == []
