"""Minutes into steps: the arithmetic, without a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardlet.planning import clock
from bardlet.training.state import State


@given(seconds=st.floats(1, 1e5), per_step=st.floats(1e-3, 100), per_evaluation=st.floats(1e-3, 100))
def test_a_plan_fits_into_its_time(seconds: float, per_step: float, per_evaluation: float) -> None:
    """Steps and evaluations end before the time does, unless a single one of them is longer than it."""
    evaluations = clock.evaluations_for(seconds, per_evaluation)
    steps = clock.steps_for(seconds, per_step, evaluations * per_evaluation)
    assert 1 <= evaluations <= 20 and steps >= 1
    if evaluations > 1:
        assert evaluations * per_evaluation <= 0.05 * seconds * (1 + 1e-9)
    if steps > 1:
        assert steps * per_step + evaluations * per_evaluation <= seconds


def drive(seconds: float, pace: Callable[[int], float], planned: int, evaluation: float = 0.0) -> tuple[State, float]:
    """A run of `planned` steps at first, the i-th of which takes pace(i), with ten evaluations: where it ends, when."""
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


def test_the_clock_looks_a_few_times() -> None:
    """A run whose steps take twice as long as planned ends on time all the same, after a few decisions."""
    state, ended = drive(100.0, lambda step: 0.2, 970)
    assert len(state.replans) == 1 + len(clock.RATE_CHECKS) and 0.9 * 100 < ended <= 100


@pytest.mark.parametrize("later", [0.6, 1.5])
def test_a_machine_that_changes_its_pace_ends_on_time(later: float) -> None:
    """Faster or slower from three fifths of the steps on."""
    _, ended = drive(600.0, lambda step: 0.2 * (later if step > 1_700 else 1), 2_900)
    assert abs(ended - 0.97 * 600) < 0.03 * 600


@pytest.mark.parametrize("evaluation", [0.5, 4.0])
def test_evaluations_do_not_look_like_slow_steps(evaluation: float) -> None:
    """Whether one falls between two looks or not, the plan stays nearly the same."""
    state, ended = drive(180.0, lambda step: 0.1, 1_400, evaluation)
    plans = [steps for _, steps in state.replans[1:]]
    assert max(plans) - min(plans) < 0.08 * max(plans) and abs(ended - 0.97 * 180) < 0.03 * 180 + evaluation


def test_time_before_the_first_step_is_not_counted_as_training() -> None:
    """40 of 100 seconds went to preparation and compilation: what is left is planned with the true pace."""
    state = State(steps=100, step=10, prepared=40.0, elapsed=45.0, seconds=4.0, replans=[(0, 100)])
    assert clock.replanner(100.0)(state) == 10 + int((97.0 - 45.0) / 0.5)
