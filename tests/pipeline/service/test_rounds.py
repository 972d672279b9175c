"""Rounds: near-equal costs, every row once, exact states, no pattern in the order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.bench.pipeline_rounds import measure_packed
from deltaserve.pipeline.service.rounds import Arrangement, Cost, Rounds


class Count:
    """Rows 0, 1, 2, ... with a state."""

    def __init__(self, rows):
        self.rows, self.at = rows, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.rows):
            raise StopIteration
        self.at += 1
        return self.rows[self.at - 1]

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def rounds(costs, consumers, batch, look_ahead=8):
    arrangement = Arrangement(consumers, batch, look_ahead, seed=3)
    rows = list(enumerate(costs))
    return Rounds(Count(rows), arrangement, lambda row: row[1], list)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=150),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_every_row_comes_once_and_any_cut_resumes_exactly(costs, consumers, batch, cut):
    whole = list(rounds(costs, consumers, batch))
    assert all(len(each) == consumers for each in whole)
    assert all(len({len(b) for b in each}) == 1 for each in whole)
    seen = [row[0] for each in whole for rows in each for row in rows]
    assert len(seen) == len(set(seen)) == len(costs) - len(costs) % consumers
    first = rounds(costs, consumers, batch)
    begun = list(itertools.islice(first, cut))
    second = rounds(costs, consumers, batch)
    second.set_state(first.get_state())
    assert begun + list(second) == whole


def test_costs_are_near_equal_and_nobody_is_favoured():
    costs = np.random.default_rng(0).lognormal(5, 1, 8 * 64 * 20)
    made = list(rounds(costs, 8, 1, look_ahead=64))
    sums = np.array([[sum(row[1] for row in rows) for rows in each] for each in made])
    apart = costs.reshape(-1, 8)
    assert np.mean(apart.max(1) / apart.mean(1)) > 2
    # What is left is the tail: a window's dearest eight rows differ.
    assert np.mean(sums.max(1) / sums.mean(1)) < 1.06
    each = sums.sum(0)
    assert each.max() / each.mean() < 1.02
    # Costs do not rise or fall along a window, nor follow one another.
    means = sums.mean(1)
    place = np.tile(np.arange(64), 20)
    assert abs(np.corrcoef(np.log(means), place)[0, 1]) < 0.1
    assert abs(np.corrcoef(np.log(means[1:]), np.log(means[:-1]))[0, 1]) < 0.1


def test_batches_of_several_rows_are_balanced_by_their_sums():
    costs = np.random.default_rng(1).lognormal(5, 1, 4 * 6 * 64)
    made = list(rounds(costs, 4, 6, look_ahead=64))
    sums = np.array([[sum(row[1] for row in rows) for rows in each] for each in made])
    assert np.mean(sums.max(1) / sums.mean(1)) < 1.01


def test_packed_rows_are_near_equal_although_a_packing_window_ends_with_one_that_is_not_full(
    tmp_path,
):
    found = measure_packed(tmp_path, rows=14_000)["max/mean cost of a round"]
    for shares in found.values():
        assert shares["as packed"] > 1.06
        assert shares["coordinated"] <= 1.01


def test_a_cost_is_found_again_from_step_times():
    rng = np.random.default_rng(2)
    rows = [rng.integers(16, 500, 6) for _ in range(50)]
    true = Cost(2e-6, 3e-9)
    times = [true.of(row) * rng.normal(1, 0.01) for row in rows]
    found = Cost.fit(rows, times)
    assert found.token == pytest.approx(true.token, rel=0.1)
    assert found.square == pytest.approx(true.square, rel=0.1)
    assert Cost.fit(rows, [sum(row) * 1.0 for row in rows]).square == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two or more"):
        Cost.fit(rows[:1], times[:1])
