"""Is the placement what trying every placement finds, and is the bound never above it?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.policy.placement import Stage, balanced, first_of_classes, stage_seconds
from tests.strategies import MANY, seeds


def stages_of(rng: np.random.Generator, n: int, most: int, classes: int) -> list[Stage]:
    """Random stages, their classes the most frequent first."""
    found = []
    for _ in range(n):
        k = int(rng.integers(1, classes + 1))
        found.append(Stage(np.sort(rng.random(k))[::-1], rng.integers(0, most + 1, k).astype(np.float64),
                           float(rng.integers(1, 6)), float(rng.choice([0.0, 0.3, 2.0]))))
    return found


def by_trying_all(stages: list[Stage], room: float, fast_s: float, slow_s: float) -> float:
    """The least seconds over every choice of units, hottest first or not."""
    options = []
    for stage in stages:
        choices = np.array(list(itertools.product(*(range(int(n) + 1) for n in stage.units))), np.float64).T
        options.append(list(zip((choices.sum(axis=0) * stage.unit_bytes).tolist(),
                                stage_seconds(stage, choices, fast_s, slow_s).tolist(), strict=True)))
    return float(min(sum(s for _, s in chosen) for chosen in itertools.product(*options)
                     if sum(b for b, _ in chosen) <= room + 1e-9))


@MANY
@given(seeds(), st.integers(1, 3), st.sampled_from([0.05, 0.3, 1.0]))
def test_nothing_beats_the_bound_and_the_gap_says_how_far_it_can_be(rng: np.random.Generator, n: int, fast_s: float
                                                                    ) -> None:
    stages = stages_of(rng, n, 3, 3)
    total = sum(float(s.units.sum()) * s.unit_bytes for s in stages)
    rooms = np.array([0.0, 0.2, 0.5, 0.8, 1.0]) * total
    placed = balanced(stages, rooms, fast_s, 1.0)
    held = sum(units.sum(axis=0) * s.unit_bytes for units, s in zip(placed.units, stages, strict=True))
    assert (held <= rooms + 1e-6).all()
    for i, room in enumerate(rooms.tolist()):
        best = by_trying_all(stages, room, fast_s, 1.0)
        assert placed.bound_s[i] <= best * (1 + 1e-9) + 1e-12
        assert best <= placed.seconds[i] * (1 + 1e-9) + 1e-12
        assert best >= placed.seconds[i] * (1 - placed.gap[i]) * (1 - 1e-9) - 1e-12


def test_the_first_units_of_stages_are_counted_class_by_class() -> None:
    units, counts = np.array([[2.0, 0.0, 3.0], [1.0, 4.0, 0.0]]), np.array([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])
    assert first_of_classes(units, counts).tolist() == [[[0, 2, 2], [0, 0, 0], [0, 0, 2]],
                                                        [[1, 1, 1], [0, 2, 4], [0, 0, 0]]]
    for stage, most in zip(units, counts, strict=True):  # one by one
        assert first_of_classes(stage, most).tolist() == first_of_classes(units, counts)[
            units.tolist().index(stage.tolist())].tolist()


@pytest.mark.parametrize("slow_over_fast", [2.0, 20.0, 200.0])
def test_the_gap_is_under_a_hundredth_where_units_are_many(slow_over_fast: float) -> None:
    rng = np.random.default_rng(7)
    ffn = [Stage(np.linspace(1, 0, 33), rng.integers(10, 900, 33).astype(np.float64), 28e3, 0.03) for _ in range(24)]
    attention = [Stage(np.array([0.4]), np.array([56.0]), 7.3e6, 0.03)] * 24  # a join is a fiftieth of what is joined
    stages = [*attention, *ffn]
    total = sum(float(s.units.sum()) * s.unit_bytes for s in stages)
    placed = balanced(stages, np.linspace(0, total, 65), 1e-8 / slow_over_fast, 1e-8)
    assert placed.gap.max() < 0.01
    assert (np.diff(placed.bound_s) <= 1e-12).all()


def test_neither_side_is_given_more_than_evens_them_out() -> None:
    """With room for everything, the slow one still takes its part, unless handing over costs more than that saves."""
    stage = Stage(np.array([1.0]), np.array([1000.0]), 1.0, 0.0)
    placed = balanced([stage], np.array([1e9]), 1.0, 9.0)
    assert placed.units[0][0, 0] == 900
    assert placed.seconds[0] == placed.bound_s[0] == 900
    dear = Stage(stage.frequency, stage.units, 1.0, 101.0)
    assert balanced([dear], np.array([1e9]), 1.0, 9.0).units[0][0, 0] == 1000
