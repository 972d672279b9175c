"""The solvers against plain greedy, each other, and any way to cut the work."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.bench.select_instances import (
    dense,
    naive_greedy,
    random_graph,
    random_problem,
    random_utility,
    started,
)
from deltaserve.select.backends.local import Local
from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.options import Bounding, Partition
from deltaserve.select.problem import Problem
from deltaserve.select.solve import objective, solve
from deltaserve.select.solvers.partition import deal, keep_in_round, partition
from deltaserve.select.state import NO_PART, UNDECIDED


def with_budget(rng: np.random.Generator, kind: str, n: int, ties: bool) -> Problem:
    graph, utility = random_graph(rng, n, 6, ties, 3), random_utility(rng, n, ties)
    groups, lengths = rng.integers(0, 4, n), rng.integers(1, 12, n)
    sizes = {int(g): int(c) for g, c in zip(*np.unique(groups, return_counts=True), strict=True)}
    k = int(rng.integers(1, n + 1))
    tokens = int(rng.integers(12, 6 * n + 12))
    some = {g: int(rng.integers(0, size + 1)) for g, size in sizes.items()}
    some[int(groups[0])] = max(1, some[int(groups[0])])
    budget = {
        "k": Budget(k),
        "exact counts": Budget(groups=groups, counts=some),
        "upper counts": Budget(max(1, sum(some.values()) // 2), groups=groups, counts=some),
        "tokens": Budget(tokens=tokens, lengths=lengths),
        "tokens by gain": Budget(tokens=tokens, lengths=lengths, per_token=False),
        "everything": Budget(k, groups, sizes, tokens, lengths),
    }[kind]
    chosen = rng.random(n) < 0.1 if rng.random() < 0.5 and kind.startswith("tok") else None
    return Problem(graph, utility, budget, float(rng.choice([0.9, 0.5, 0.1])), chosen=chosen)


KINDS = ["k", "exact counts", "upper counts", "tokens", "tokens by gain", "everything"]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dominance_and_heap_take_what_plain_greedy_takes_in_its_order(
    kind: str, ties: bool
) -> None:
    for seed in range(35):
        rng = np.random.default_rng(seed)
        problem = with_budget(rng, kind, int(rng.integers(2, 201)), ties)
        expected = naive_greedy(problem)
        for solver in ("greedy", "dominance"):
            found = solve(problem, solver=solver, bounding=None)  # type: ignore[arg-type]
            assert found.ids.tolist() == expected, (solver, seed)


@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
    alpha=st.floats(0.05, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_the_objective_is_that_of_the_dense_matrix_and_the_sum_of_gains(
    n: int, seed: int, ties: bool, alpha: float
) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, n, ties=ties, alpha=alpha, shards=4)
    found = solve(problem)
    x = np.zeros(n)
    x[found.ids] = 1
    matrix = dense(problem.graph)
    f = alpha * (problem.utility @ x) - (1 - alpha) / 2 * (x @ matrix @ x)
    size = alpha * (problem.utility @ x) + (1 - alpha) * (x @ matrix @ x) + 1e-9
    assert abs(found.objective - f) <= 1e-6 * size
    assert math.isclose(found.gains.sum(), found.objective, rel_tol=1e-9, abs_tol=1e-9 * size)
    assert objective(problem, found.ids) == found.objective


SOLVES: dict[str, dict[str, Any]] = {
    "dominance": {"bounding": None},
    "greedy": {"solver": "greedy", "bounding": None},
    "bounded": {"bounding": "exact"},
    "top-up": {"bounding": Bounding(0.3)},
    "Bernoulli": {"bounding": Bounding(0.5, "bernoulli", "weighted")},
    "partition": {"solver": "partition", "bounding": None, "partition": Partition(5, 3)},
    "both": {"solver": "partition", "bounding": "approximate", "partition": Partition(3, 2)},
}


@pytest.mark.parametrize("name", SOLVES)
def test_shards_and_workers_do_not_change_the_result(name: str) -> None:
    for seed in range(6):
        problem = random_problem(
            np.random.default_rng(seed), 150, degree=8, ties=seed % 2 == 0, k=40
        )
        found = []
        for shards, workers in ((1, 1), (2, 2), (7, 1), (7, 2)):
            cut = Problem(
                problem.graph.resharded(shards), problem.utility, problem.budget, problem.alpha
            )
            found.append(solve(cut, backend=Local(workers), seed=seed, **SOLVES[name]))
        for other in found[1:]:
            assert np.array_equal(other.ids, found[0].ids)
            assert np.array_equal(other.gains, found[0].gains)
            assert other.objective == found[0].objective
            assert other.bounded == found[0].bounded


@given(
    size=st.integers(1, 10**6),
    share=st.floats(0, 1),
    gamma=st.floats(0.01, 1),
    rounds=st.integers(1, 40),
)
def test_rounds_fall_to_the_budget_and_never_below(
    size: int, share: float, gamma: float, rounds: int
) -> None:
    k = max(1, int(size * share))
    kept = [keep_in_round(size, k, gamma, rounds, number) for number in range(1, rounds + 1)]
    assert kept[-1] == k
    assert all(a >= b >= k for a, b in pairwise(kept))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_no_partition_exceeds_its_cap_and_the_size_is_exact(adaptive: bool, grouped: bool) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        groups = rng.integers(0, 3, 120)
        counts = {g: int(np.sum(groups == g)) // 4 + 1 for g in range(3)}
        budget = Budget(groups=groups, counts=counts) if grouped else Budget(30)
        problem = Problem(
            random_graph(rng, 120, 8, False, 3), random_utility(rng, 120, False), budget
        )
        options = Partition(int(rng.integers(1, 12)), int(rng.integers(1, 6)), adaptive=adaptive)
        cap = math.ceil(120 / options.partitions)
        with started(problem) as run:
            plain = run.session.map

            def looking(step: Any, *arguments: Any) -> list[Any]:
                found = plain(step, *arguments)  # noqa: B023
                if step is deal:
                    state = run.session.state
                    parts = state.part[state.part != NO_PART]
                    assert len(parts) == np.count_nonzero(state.status == UNDECIDED)
                    assert np.bincount(parts).max() <= cap  # noqa: B023
                return found

            run.session.map = looking  # type: ignore[method-assign]
            partition(run, options)
            used = run.usage()
        assert used.taken.tolist() == problem.limits.caps.tolist()


def test_one_partition_is_centralised_greedy() -> None:
    for seed in range(20):
        problem = random_problem(np.random.default_rng(seed), 90, ties=seed % 2 == 0, k=25)
        expected = solve(problem, solver="greedy", bounding=None)
        for rounds in (1, 4):
            found = solve(
                problem, solver="partition", bounding=None, partition=Partition(1, rounds)
            )
            assert set(found.ids.tolist()) == set(expected.ids.tolist())


def test_solvers_take_what_bounding_leaves_when_that_is_the_budget() -> None:
    empty = np.empty(0, int)
    graph = Graph.from_edges(50, empty, empty, np.empty(0), shards=3)
    utility = np.random.default_rng(0).permutation(50).astype(np.float32)
    for solver in ("dominance", "greedy", "partition"):
        found = solve(Problem(graph, utility, Budget(7)), solver=solver)  # type: ignore[arg-type]
        assert found.ids.tolist() == np.argsort(-utility)[:7].tolist()
        assert found.bounded is not None
        assert found.bounded["excluded"] == 43


def test_selecting_more_continues_what_was_selected() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 80, degree=8, ties=seed % 2 == 0, k=40)
        whole = solve(problem, bounding=None)
        first = np.zeros(80, bool)
        first[whole.ids[:15]] = True
        for solver in ("dominance", "greedy"):
            more = solve(
                Problem(problem.graph, problem.utility, Budget(25), problem.alpha, chosen=first),
                solver=solver,  # type: ignore[arg-type]
                bounding=None,
            )
            assert more.ids.tolist() == whole.ids[15:].tolist()
            assert more.objective == whole.objective
            assert np.array_equal(more.gains, whole.gains[15:])
