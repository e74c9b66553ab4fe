"""Turning minutes into steps: the arithmetic, without a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardlet.planning import clock
from bardlet.training.state import State


@given(seconds=st.floats(1, 1e5), per_step=st.floats(1e-3, 100), per_evaluation=st.floats(1e-3, 100))
def test_a_plan_fits_in_its_time(seconds: float, per_step: float, per_evaluation: float) -> None:
    """Steps and evaluations fit in the time, unless a single one of them does not."""
    evaluations = clock.evaluations_for(seconds, per_evaluation)
    steps = clock.steps_for(seconds, per_step, evaluations * per_evaluation)
    assert 1 <= evaluations <= 20 and steps >= 1
    if evaluations > 1:
        assert evaluations * per_evaluation <= 0.05 * seconds * (1 + 1e-9)
    if steps > 1:
        assert steps * per_step + evaluations * per_evaluation <= seconds


def simulate(seconds: float, pace: Callable[[int], float], planned: int,
             evaluation: float = 0.0) -> tuple[State, float]:
    """Simulate a run of `planned` steps at first and ten evaluations; step i takes pace(i). Return (state, end)."""
    state, replan = State(steps=planned, prepared=0.0, replans=[(0, planned)]), clock.replanner(seconds)
    while state.step < state.steps:
        steps = replan(state)
        if steps is not None:
            assert state.step <= 0.9 * state.steps + 1
            state.steps = max(steps, state.step + 1)
            state.replans.append((state.step, state.steps))
        state.seconds += pace(state.step)
        state.step += 1
        state.elapsed = state.seconds + state.step // (planned // 10) * evaluation
    return state, state.elapsed


def test_slow_steps_are_replanned_at_the_checks() -> None:
    """A run whose steps take twice as long as planned still ends on time."""
    state, ended = simulate(100.0, lambda step: 0.2, 970)
    assert len(state.replans) == 1 + len(clock.RATE_CHECKS) and 0.9 * 100 < ended <= 100


@pytest.mark.parametrize("later", [0.6, 1.5])
def test_a_change_of_pace_still_ends_on_time(later: float) -> None:
    """Faster or slower after about three fifths of the steps."""
    _, ended = simulate(600.0, lambda step: 0.2 * (later if step > 1_700 else 1), 2_900)
    assert abs(ended - (1 - clock.RESERVE) * 600) < 0.03 * 600


@pytest.mark.parametrize("evaluation", [0.5, 4.0])
def test_evaluations_do_not_count_as_slow_steps(evaluation: float) -> None:
    """The plan stays nearly the same whether or not an evaluation falls between two checks."""
    state, ended = simulate(180.0, lambda step: 0.1, 1_400, evaluation)
    plans = [steps for _, steps in state.replans[1:]]
    assert max(plans) - min(plans) < 0.08 * max(plans)
    assert abs(ended - (1 - clock.RESERVE) * 180) < 0.03 * 180 + evaluation


def test_time_before_the_first_step_is_not_counted_as_training() -> None:
    """After 40 of 100 seconds of preparation and compilation, the rest is planned with the true pace."""
    state = State(steps=100, step=10, prepared=40.0, elapsed=45.0, seconds=4.0, replans=[(0, 100)])
    assert clock.replanner(100.0)(state) == 10 + int((100 * (1 - clock.RESERVE) - 45.0) / 0.5)
