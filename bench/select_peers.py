"""apricot and submodlib beside ours: graph cut on a sparse graph, which all three know.

    f(S) = lambda * sum of row sums over S - sum of s(v, w) over ordered pairs in S

is our objective with u = row sums, alpha = lambda and beta = 2. All get the same matrix and
run greedy; values are those of our objective. What a library cannot do is shown as its error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from deltaserve.bench.select_check import Report
from deltaserve.bench.select_fixture import Fixture
from deltaserve.select.budgets import Budget
from deltaserve.select.problem import Problem
from deltaserve.select.solve import objective, solve

LAMBDA = 0.5
# submodlib takes a dense matrix as lists of Python floats.
MAX_DENSE = 5_000


def make(points: int, seed: int) -> tuple[Problem, csr_matrix]:
    graph = Fixture(seed, points).graph
    whole = graph.merged()
    matrix = csr_matrix(
        (whole.weights.astype(np.float64), whole.indices, whole.indptr), (points, points)
    )
    sums = np.asarray(matrix.sum(axis=1)).ravel().astype(np.float32)
    return Problem(graph, sums, Budget(points // 10), LAMBDA, 2.0), matrix


def by_apricot(matrix: csr_matrix, k: int, optimizer: str) -> Any:
    from apricot import GraphCutSelection

    selector = GraphCutSelection(k, metric="precomputed", alpha=LAMBDA, optimizer=optimizer)
    return selector.fit(matrix).ranking


def by_submodlib(matrix: csr_matrix, k: int, mode: str) -> Any:
    from submodlib import GraphCutFunction

    size = matrix.shape[0]
    options: dict[str, Any] = {"ggsijs": matrix, "num_neighbors": 10}
    if mode == "dense":
        options = {"ggsijs": matrix.toarray(), "separate_rep": False}
    function = GraphCutFunction(size, mode, 1 / LAMBDA, **options)
    chosen = function.maximize(
        budget=k, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False,
        show_progress=False,
    )  # fmt: skip
    return np.array([v for v, _ in chosen])


def ways(problem: Problem, matrix: csr_matrix) -> dict[str, Callable[[], Any]]:
    k = problem.limits.k
    found: dict[str, Callable[[], Any]] = {
        "deltaserve, greedy": lambda: solve(problem, solver="greedy", bounding=None).ids,
        "deltaserve, dominance": lambda: solve(problem, bounding=None).ids,
        "apricot, naive, sparse": lambda: by_apricot(matrix, k, "naive"),
        "apricot, lazy, sparse": lambda: by_apricot(matrix, k, "lazy"),
        "submodlib, lazy, sparse": lambda: by_submodlib(matrix, k, "sparse"),
    }
    if matrix.shape[0] <= MAX_DENSE:
        found["submodlib, lazy, dense"] = lambda: by_submodlib(matrix, k, "dense")
    return found


def peers(report: Report, seed: int) -> None:
    # What is compiled at the first call is compiled before the clock starts.
    for way in ways(*make(500, seed)).values():
        with contextlib.suppress(Exception):
            way()
    for points in (2_000, 5_000, 20_000):
        problem, matrix = make(points, seed)
        every = ways(problem, matrix)
        best = objective(problem, every["deltaserve, greedy"]())
        for name, way in every.items():
            _measure(report, f"{points:,} points, {name}", problem, best, way)


def _measure(
    report: Report, name: str, problem: Problem, best: float, way: Callable[[], Any]
) -> None:
    start, clock = time.perf_counter(), time.process_time()
    try:
        ids = np.asarray(way())
    except Exception as error:
        report.fact("peers", f"{name}: failed", f"{type(error).__name__}: {error}"[:60])
        return
    wall, busy = time.perf_counter() - start, time.process_time() - clock
    report.fact("peers", f"{name}: seconds", wall)
    report.fact("peers", f"{name}: CPU seconds", busy)
    report.fact("peers", f"{name}: f, share of greedy's", objective(problem, ids) / best)
