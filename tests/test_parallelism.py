"""Tokens per forward, and accuracy under parallelism: values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softar.evals.parallelism import add_aup, aup

SHARE = st.floats(0.2, 1.0)


def test_a_setting_alone_is_its_rectangle():
    assert aup([(2.0, 0.8)], 0.8) == pytest.approx(160)


def test_by_hand():
    """Two trapezia over a rectangle; the last point is more than 5 points below the first."""
    points = [(4.0, 0.76), (1.0, 0.8), (2.0, 0.78), (8.0, 0.74)]

    def weighted(y):
        return y * math.exp(-3 * (1 - y / 80))

    area = 80 + (weighted(80) + weighted(78)) / 2 + 2 * (weighted(78) + weighted(76)) / 2
    assert aup(points, 0.8) == pytest.approx(area)


@given(st.lists(st.tuples(st.floats(0.5, 20), SHARE), min_size=1, max_size=6))
def test_order_does_not_matter_and_a_faster_equal_setting_never_hurts(points):
    best = max(y for _, y in points)
    value = aup(points, best)
    assert aup(points[::-1], best) == pytest.approx(value)
    slowest = min(points)
    faster = max(r for r, _ in points) + 1, slowest[1]
    assert aup([*points, faster], best) >= value - 1e-9


@pytest.mark.parametrize("points", [[], [(None, 0.5)], [(1.0, None)], [(0.0, 0.5)]])
def test_what_has_none(points):
    assert aup(points, 0.5) is None
    assert aup([(1.0, 0.0)], 0.0) is None


def test_each_decoder_has_its_own_and_the_best_is_that_of_its_task():
    rows = [
        dict(task=task, decoder=decoder, tpf=tpf, accuracy=accuracy)
        for task, decoder, tpf, accuracy in (
            ("a", "x", 1.0, 0.5),
            ("a", "x", 2.0, 0.5),
            ("a", "y", 1.0, 1.0),
            ("b", "x", 1.0, 0.5),
            ("b", "x", 2.0, 0.5),
        )
    ]
    add_aup(rows, ("task", "decoder"), among=("task",))
    assert [row["aup"] for row in rows] == pytest.approx(
        [50 + 50 * math.exp(-1.5)] * 2 + [100] + [100] * 2
    )
