"""Random selection problems, and what they are checked against: plain and slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from deltaserve.select.backends.local import Local
from deltaserve.select.budgets import Budget
from deltaserve.select.compiled import kernel
from deltaserve.select.graph import Graph
from deltaserve.select.problem import Problem
from deltaserve.select.run import Run
from deltaserve.select.state import CHOSEN


def random_graph(rng: np.random.Generator, n: int, degree: float, ties: bool, shards: int) -> Graph:
    m = int(rng.integers(0, max(1, int(n * degree / 2)) + 1))
    rows, cols = rng.integers(0, n, m), rng.integers(0, n, m)
    keep = rows != cols
    weights = rng.integers(0, 4, m) if ties else rng.random(m)
    return Graph.from_edges(n, rows[keep], cols[keep], weights[keep], shards=min(n, shards))


def random_utility(rng: np.random.Generator, n: int, ties: bool) -> np.ndarray[Any, Any]:
    return (rng.integers(0, 5, n) if ties else rng.random(n)).astype(np.float32)


def random_problem(
    rng: np.random.Generator,
    n: int,
    *,
    degree: float = 4.0,
    ties: bool = False,
    k: int | None = None,
    alpha: float | None = None,
    shards: int = 1,
) -> Problem:
    """With ties, utilities and similarities are small integers. Some points are isolated."""
    return Problem(
        random_graph(rng, n, degree, ties, shards),
        random_utility(rng, n, ties),
        Budget(int(rng.integers(1, n + 1)) if k is None else k),
        alpha=float(rng.choice([0.9, 0.7, 0.5])) if alpha is None else alpha,
    )


def monotone_problem(rng: np.random.Generator, n: int) -> Problem:
    """Every point is worth more than all its similarities together."""
    graph = random_graph(rng, n, 4.0, False, 1)
    weight = np.array([row.sum() for row in dense(graph)])
    alpha = float(rng.choice([0.9, 0.7, 0.5]))
    utility = (weight * (1 - alpha) / alpha + rng.random(n) * 0.5 + 0.01).astype(np.float32)
    return Problem(graph, utility, Budget(int(rng.integers(1, n + 1))), alpha=alpha)


def dense(graph: Graph) -> np.ndarray[Any, Any]:
    """The matrix of similarities."""
    matrix = np.zeros((graph.num_points, graph.num_points))
    for shard in graph.shards:
        degrees = np.diff(shard.indptr)
        rows = np.repeat(np.arange(shard.start, shard.stop), degrees)
        matrix[rows, shard.indices] = shard.weights
    return matrix


def integers(problem: Problem) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The problem in its own units: worth of the points, costs of the edges [n, n]."""
    i = problem.instance
    worth = np.rint(problem.utility.astype(np.float64) * i.alpha).astype(np.int64)
    return worth, np.rint(dense(problem.graph) * i.beta).astype(np.int64)


@kernel
def _enumerate(worth, cost, k):
    n = len(worth)
    best, common, union, found = np.int64(0), 0, 0, False
    for mask in range(1 << n):
        size = 0
        for v in range(n):
            size += (mask >> v) & 1
        if size != k:
            continue
        value = np.int64(0)
        for v in range(n):
            if (mask >> v) & 1:
                value += worth[v]
                for w in range(v):
                    if (mask >> w) & 1:
                        value -= cost[v, w]
        if not found or value > best:
            best, common, union, found = value, mask, mask, True
        elif value == best:
            common &= mask
            union |= mask
    return best, common, union


def brute_force(problem: Problem) -> tuple[int, set[int], set[int]]:
    """The best value in the problem's units; the points of all best sets; those of any."""
    worth, cost = integers(problem)
    best, common, union = _enumerate(worth, cost, problem.limits.k)
    n = len(worth)
    return (
        int(best),
        {v for v in range(n) if common >> v & 1},
        {v for v in range(n) if union >> v & 1},
    )


def value_of(problem: Problem, members: np.ndarray[Any, Any]) -> int:
    worth, cost = integers(problem)
    return int(worth[members].sum() - cost[np.ix_(members, members)].sum() // 2)


def naive_greedy(problem: Problem) -> list[int]:
    """Algorithm 1: look at every point in every step."""
    limits = problem.limits
    worth, cost = integers(problem)
    gain, n = worth.copy(), len(worth)
    free = np.ones(n, bool)
    if problem.chosen is not None:
        gain -= cost[:, problem.chosen].sum(axis=1)
        free &= ~problem.chosen
    room, tokens = limits.caps.copy(), limits.tokens
    taken: list[int] = []
    while free.any() and len(taken) < limits.k:
        divisor = problem.instance.divisor
        key = gain // divisor if len(divisor) else gain
        v = int(np.flatnonzero(free)[np.argmax(key[free])])
        free[v] = False
        group = limits.group[v] if len(limits.group) else 0
        length = int(limits.length[v]) if len(limits.length) else 0
        if room[group] == 0 or length > tokens:
            continue
        room[group] -= 1
        tokens -= length
        taken.append(v)
        gain -= cost[:, v]
    return taken


@contextmanager
def started(problem: Problem, backend: Local | None = None, seed: int = 0) -> Iterator[Run]:
    """A run at its beginning, for solvers to be called on."""
    backend = backend or Local()
    with backend.open(problem.graph, problem.instance, None) as session:
        count = 0
        if problem.chosen is not None:
            session.write("status", np.flatnonzero(problem.chosen), CHOSEN)
            count = int(problem.chosen.sum())
        yield Run(
            session=session,
            limits=problem.limits,
            seed=seed,
            scale=problem.instance.scale,
            num_chosen=count,
            place={"stage": "begin"},
        )
