"""Bounding against brute force (acceptance A1 to A4 of the room's anchors)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaserve.bench.select_exactness import bounding_violations, small_problem, worst_ratio
from deltaserve.bench.select_instances import (
    brute_force,
    integers,
    monotone_problem,
    random_graph,
    random_problem,
    random_utility,
    started,
    value_of,
)
from deltaserve.select.backends.local import LocalSession
from deltaserve.select.budgets import Budget
from deltaserve.select.options import EXACT, Bounding
from deltaserve.select.problem import Problem
from deltaserve.select.run import Run
from deltaserve.select.solve import solve
from deltaserve.select.solvers.bounding import bounding, bounds
from deltaserve.select.state import INCLUDED, OUT, UNDECIDED


def test_no_best_set_contradicts_exact_bounding_on_2000_instances() -> None:
    violations, decided = bounding_violations(range(2000))
    assert violations == 0
    assert decided > 1000


def watched(run: Run, look: Callable[[Any], None]) -> None:
    """Call ``look(state)`` after every pass of bounds."""
    session = run.session
    plain = session.map

    def map_(step: Callable[..., Any], *arguments: Any) -> list[Any]:
        found = plain(step, *arguments)
        if step is bounds:
            look(session.state)
        return found

    assert isinstance(session, LocalSession)
    session.map = map_  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(40))
def test_bounds_enclose_every_completion_and_only_tighten(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = small_problem(2 * seed + 1)
    _, cost = integers(problem)
    worth = integers(problem)[0]
    last: dict[str, Any] = {}

    def look(state: Any) -> None:
        undecided = np.flatnonzero(state.status == UNDECIDED)
        included = np.flatnonzero(state.status == INCLUDED)
        assert len(included) <= problem.limits.k <= len(included) + len(undecided)
        for v in undecided:
            others = undecided[(rng.random(len(undecided)) < 0.5) & (undecided != v)]
            marginal = worth[v] - cost[v, included].sum() - cost[v, others].sum()
            assert state.low[v] <= marginal <= state.gain[v]
            if last:
                assert state.low[v] >= last["low"][v]
                assert state.gain[v] <= last["gain"][v]
        last.update(low=state.low.copy(), gain=state.gain.copy())

    with started(problem) as run:
        watched(run, look)
        bounding(run, EXACT)
        before = run.session.state.status.copy()
        run.place = {"stage": "begin"}
        bounding(run, EXACT)
        assert np.array_equal(run.session.state.status, before), "not a fixpoint"


def test_bounding_with_greedy_keeps_its_guarantee_on_monotone_instances() -> None:
    worst = worst_ratio(range(300), EXACT)
    assert worst >= 1 - 1 / math.e
    assert worst > 0.9


@pytest.mark.parametrize("sampling", ["topup", "bernoulli"])
@pytest.mark.parametrize("weighting", ["uniform", "weighted"])
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_approximate_bounding_keeps_the_guarantee_of_its_realised_ratio(
    sampling: Any, weighting: Any, fraction: float
) -> None:
    options = Bounding(fraction, sampling, weighting)
    for seed in range(40):
        problem = monotone_problem(np.random.default_rng(seed), 9)
        worth, cost = integers(problem)
        ratio = [1.0]

        def look(state: Any) -> None:
            undecided = state.status == UNDECIDED
            member = undecided | (state.status == INCLUDED)
            exact = worth - cost[:, member].sum(axis=1)  # noqa: B023
            assert np.all(state.low[undecided] >= exact[undecided])
            ratio.append(float((state.low[undecided] / exact[undecided]).max()))  # noqa: B023

        best, _, _ = brute_force(problem)
        with started(problem, seed=seed) as run:
            watched(run, look)
            bounding(run, options)
        found = solve(problem, bounding=options, seed=seed)
        assert value_of(problem, found.ids) >= best / (2 * max(ratio))


@pytest.mark.parametrize("sampling", ["topup", "bernoulli"])
def test_a_sample_of_everything_is_the_exact_bound(sampling: Any) -> None:
    for seed in range(60):
        problem = small_problem(seed)
        found = []
        for options in (EXACT, Bounding(1 - 1e-12, sampling)):
            with started(problem) as run:
                bounding(run, options)
                found.append(run.session.state.status.copy())
        assert np.array_equal(*found)


def test_approximate_bounding_never_includes_more_than_the_budget() -> None:
    most = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 60, degree=12, k=12, alpha=0.9, shards=3)
        options = Bounding(0.4)
        with started(problem, seed=seed) as run:
            bounding(run, options)
            included = np.count_nonzero(run.session.state.status == INCLUDED)
        most = max(most, included)
        assert included <= 12
        assert len(solve(problem, bounding=options, seed=seed).ids) == 12
    assert most >= 6


def test_bounding_holds_within_groups_of_exact_counts() -> None:
    """The lemmas by brute force, for a budget of so many of each group."""
    from itertools import combinations

    decided = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
        counts = {0: int(rng.integers(0, 5)), 1: int(rng.integers(1, 5))}
        ties = seed % 3 == 0
        utility = random_utility(rng, 8, ties) * np.float32(6)
        problem = Problem(
            random_graph(rng, 8, 5, ties, 2), utility, Budget(groups=groups, counts=counts)
        )
        sets = [
            np.array(a + b, int)
            for a in combinations(range(4), counts[0])
            for b in combinations(range(4, 8), counts[1])
        ]
        values = [value_of(problem, members) for members in sets]
        best = [
            set(s.tolist()) for s, value in zip(sets, values, strict=True) if value == max(values)
        ]
        with started(problem) as run:
            bounding(run, EXACT)
            status = run.session.state.status
        included = set(np.flatnonzero(status == INCLUDED).tolist())
        excluded = set(np.flatnonzero(status == OUT).tolist())
        assert all(included <= members and not excluded & members for members in best), seed
        decided += bool(included or excluded)
    assert decided > 50
