"""A1 to A8 on fresh instances: counts of violations, which must all be 0."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from deltaserve.bench.select_check import Report
from deltaserve.bench.select_fixture import Fixture
from deltaserve.bench.select_instances import (
    brute_force,
    monotone_problem,
    naive_greedy,
    random_problem,
    started,
    value_of,
)
from deltaserve.select.backends.local import Local
from deltaserve.select.backends.processes import Processes
from deltaserve.select.options import EXACT, Bounding, Partition
from deltaserve.select.problem import Problem
from deltaserve.select.solve import solve
from deltaserve.select.solvers.bounding import bounding
from deltaserve.select.state import INCLUDED, OUT


def small_problem(seed: int) -> Problem:
    """2 to 10 points; every third with ties, some with k = 1 or k = n or isolated points."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 11))
    k = {0: 1, 1: n}.get(seed % 8, int(rng.integers(1, n + 1)))
    degree = float(rng.choice([0.5, 2, 5]))
    problem = random_problem(rng, n, ties=seed % 3 == 0, k=k, degree=degree)
    if seed % 2:  # utility in command, so that bounding decides something
        utility = problem.utility * np.float32(8)
        problem = Problem(problem.graph, utility, problem.budget, problem.alpha)
    return problem


def bounding_violations(seeds: range) -> tuple[int, int]:
    """(violations, instances with a decision) of exact bounding against brute force: an
    included point that some best set lacks, an excluded one that some has, a lost optimum."""
    violations = decided = 0
    for seed in seeds:
        problem = small_problem(seed)
        best, common, union = brute_force(problem)
        with started(problem) as run:
            bounding(run, EXACT)
            status = run.session.state.status
            included = set(np.flatnonzero(status == INCLUDED).tolist())
            excluded = set(np.flatnonzero(status == OUT).tolist())
        rest = [v for v in range(len(status)) if v not in excluded]
        good = included <= common and not excluded & union
        good &= len(included) <= problem.limits.k <= len(rest)
        good = good and (not excluded or _best_within(problem, rest, included) == best)
        violations += not good
        decided += bool(included or excluded)
    return violations, decided


def _best_within(problem: Problem, allowed: list[int], included: set[int]) -> int:
    free = [v for v in allowed if v not in included]
    sets = combinations(free, problem.limits.k - len(included))
    return max(value_of(problem, np.array([*included, *more], int)) for more in sets)


def worst_ratio(seeds: range, bounds: Bounding) -> float:
    """Least share of the optimum that bounding and greedy reach on monotone instances."""
    worst = 1.0
    for seed in seeds:
        problem = monotone_problem(np.random.default_rng(seed), 8)
        best, _, _ = brute_force(problem)
        found = solve(problem, bounding=bounds, seed=seed)
        worst = min(worst, value_of(problem, found.ids) / best)
    return worst


def greedy_differences(seeds: range, largest: int = 200) -> int:
    """Graphs on which the heap or dominance differ from plain greedy, in set or order."""
    different = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, largest + 1))
        problem = random_problem(rng, n, degree=6, ties=seed % 2 == 0, shards=3)
        expected = naive_greedy(problem)
        heap = solve(problem, solver="greedy", bounding=None).ids.tolist()
        different += not (heap == expected == solve(problem, bounding=None).ids.tolist())
    return different


def cut_differences(seeds: range) -> int:
    """Runs whose result depends on the number of shards, workers, or the backend."""
    different = 0
    options = (
        {"bounding": Bounding(0.3)},
        {"solver": "partition", "bounding": None, "partition": Partition(5, 3)},
    )
    for seed in seeds:
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, 3000, degree=8, ties=seed % 2 == 0, k=600)
        for given in options:
            expected = solve(problem, seed=seed, **given)
            for shards, backend in ((2, Local(2)), (7, Local(1)), (7, Processes(2))):
                graph = problem.graph.resharded(shards)
                cut = Problem(graph, problem.utility, problem.budget, problem.alpha)
                found = solve(cut, backend=backend, seed=seed, **given)
                different += not np.array_equal(found.ids, expected.ids)
                different += found.objective != expected.objective
    return different


def fixture_differences(fixture: Fixture) -> int:
    """Configurations of the 50,000 points on which dominance differs from the heap."""
    different = 0
    for alpha in (0.9, 0.5, 0.1):
        for share in (0.1, 0.5, 0.8):
            problem = fixture.problem(share, alpha)
            heap = solve(problem, solver="greedy", bounding=None)
            different += not np.array_equal(heap.ids, solve(problem, bounding=None).ids)
    return different


def exactness(report: Report, seed: int) -> None:
    first = 1_000_000 * (seed + 1)
    violations, decided = bounding_violations(range(first, first + 3000))
    report.at_most("A1", "violations in 3,000 brute-forced instances", violations, 0)
    report.fact("A1", "instances among them where bounding decided something", decided)
    monotone = range(first, first + 500)
    worst = worst_ratio(monotone, EXACT)
    report.at_least("A3", "exact, greedy: least share of the optimum", worst, 1 - 1 / math.e)
    for bounds in (Bounding(0.3), Bounding(0.3, "bernoulli")):
        name = f"{bounds.sampling} 30 %, greedy: least share of the optimum"
        report.fact("A4", name, worst_ratio(monotone, bounds))
    different = greedy_differences(range(first, first + 400))
    report.at_most("A6", "400 graphs: heap or dominance unlike plain greedy", different, 0)
    different = fixture_differences(Fixture(seed))
    report.at_most("A6", "50,000 points, 9 configurations: dominance unlike heap", different, 0)
    different = cut_differences(range(first, first + 4))
    report.at_most("A8", "results that depend on shards, workers or backend", different, 0)
