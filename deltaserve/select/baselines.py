"""What a selection is measured against: random, stratified random, top utility, length; and how
good a set is between the worst of them and centralised greedy.

n samples, k of them chosen.
"""

from __future__ import annotations

import numpy as np

from deltaserve.select.budgets import Limits
from deltaserve.select.compiled import kernel
from deltaserve.select.solve import Problem, objective, solve

DECILES = 10


def baselines(
    problem: Problem, lengths: np.ndarray, strata: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """Each baseline's rows, int64, within the problem's budget.

    lengths: [n]. strata: int [n], the groups of the stratified draw; None: deciles of length.
    """
    generator = np.random.default_rng(seed)
    count = len(lengths)
    if strata is None:
        ranks = np.argsort(np.argsort(lengths, kind="stable"), kind="stable")
        strata = ranks * DECILES // count
    orders = {
        "random": generator.permutation(count),
        "stratified random": stratified(strata, generator),
        "top utility": np.argsort(-problem.utility, kind="stable"),
        "length": np.argsort(-np.asarray(lengths), kind="stable"),
    }
    return {name: take(order, problem.limits, problem.chosen) for name, order in orders.items()}


def stratified(strata: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An order of all rows whose every beginning holds the strata in proportion to their sizes."""
    _, codes = np.unique(strata, return_inverse=True)
    sizes = np.bincount(codes)
    mixed = generator.permutation(len(codes))
    mixed = mixed[np.argsort(codes[mixed], kind="stable")]
    place = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The i-th of m comes at a random point of the i-th of m equal stretches.
    return mixed[np.argsort((place + generator.random(len(codes))) / sizes[codes[mixed]])]


def take(order: np.ndarray, limits: Limits, chosen: np.ndarray | None = None) -> np.ndarray:
    """The rows of ``order`` that fit the budget, each taken if it still fits: int64."""
    free = np.ones(len(order), dtype=bool) if chosen is None else ~chosen
    return _take(
        np.asarray(order, dtype=np.int64),
        free,
        limits.k,
        limits.group,
        limits.caps.copy(),
        limits.length,
        limits.tokens,
    )


@kernel
def _take(
    order: np.ndarray,
    free: np.ndarray,
    k: int,
    group: np.ndarray,
    left: np.ndarray,
    length: np.ndarray,
    tokens: int,
) -> np.ndarray:
    rows = np.empty(min(k, len(order)), dtype=np.int64)
    count = 0
    for row in order:
        if count == k:
            break
        at = group[row] if len(group) else 0
        cost = length[row] if len(length) else 0
        if free[row] and left[at] > 0 and cost <= tokens:
            rows[count] = row
            count += 1
            left[at] -= 1
            tokens -= cost
    return rows[:count]


def score(value: float, lowest: float, greedy: float) -> float | None:
    """100 for centralised greedy, 0 for the lowest baseline; None where they are equal.

    Differences, not ratios: f may be negative, and then ratios mean nothing.
    """
    return 100 * (value - lowest) / (greedy - lowest) if greedy != lowest else None


def compare(
    problem: Problem, rows: np.ndarray, others: dict[str, np.ndarray], greedy: float | None
) -> dict[str, object]:
    """f and score of a selection and of the baselines, and how much they share.

    greedy: f of centralised greedy; None: it is computed (by local dominance, which finds the
    same set).
    """
    if greedy is None:
        greedy = solve(problem, bounding=None).objective
    value = objective(problem, rows)
    values = {name: objective(problem, other) for name, other in others.items()}
    lowest = min(values.values())
    shared = {name: int(np.isin(other, rows).sum()) for name, other in others.items()}
    return {
        "objective": value,
        "centralised greedy": greedy,
        "score": score(value, lowest, greedy),
        "baselines": {
            name: {
                "objective": each,
                "score": score(each, lowest, greedy),
                "samples": len(others[name]),
                "shared": shared[name],
            }
            for name, each in values.items()
        },
    }


def gains_in_order(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """What each row adds to f after those before it: float64 [k]. They sum to f(rows), less f of
    what was chosen before."""
    count, alpha, beta = problem.graph.num_points, problem.alpha, problem.beta
    assert beta is not None
    never = len(rows) + 1
    rank = np.full(count, never, dtype=np.int64)
    rank[rows] = np.arange(1, len(rows) + 1)
    if problem.chosen is not None:
        rank[problem.chosen] = 0
    gains = alpha * problem.utility[rows].astype(np.float64)
    for shard in problem.graph.shards:
        heads = np.repeat(rank[shard.start : shard.stop], np.diff(shard.indptr))
        tails = rank[shard.indices]
        later = (heads < never) & (heads > tails)
        costs = beta * np.asarray(shard.weights[later], dtype=np.float64)
        gains -= np.bincount(heads[later] - 1, weights=costs, minlength=len(rows))
    return gains
