"""Bounding: points that every best set contains, and points that none does.

U_max(v) is the gain of v given what is in the set; U_min(v) also subtracts all undecided
neighbours. With k points missing, a point whose U_min exceeds the k-th largest U_max is in
every best set (*grow*), and one whose U_max is below the k-th largest U_min is in none
(*shrink*): Boether et al. 2025, section 4.1, lemmas 4.3 and 4.4, algorithm 5. Both follow by
swapping v with a point of the best set, so they hold for non-monotone objectives too, and
within each group of a budget that takes exactly so many of each group. Strict inequalities
matter: ties stay undecided.

The approximate form (section 4.2) subtracts only a sample of the undecided neighbours. It
cannot include more than k points (the paper subsamples in that case): its U_min is at most
U_max, at most k - 1 points have a U_max above the k-th largest, and k is what is missing
before each pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.graph import AnyShard
from deltaserve.select.kth import LOWEST, kth_largest
from deltaserve.select.options import Bounding
from deltaserve.select.random import draw, uniform
from deltaserve.select.run import Run, Usage
from deltaserve.select.state import INCLUDED, OUT, UNDECIDED, State, writes
from deltaserve.select.steps import cost, inside, worth

HIGHEST = np.iinfo(np.int64).max


@kernel
def _sampled_cost(
    keys: NDArray[np.float64],
    costs: NDArray[np.int64],
    similarity: NDArray[np.float32],
    count: int,
    taken: int,
    fraction: float,
    bernoulli: bool,
    weighted: bool,
) -> np.int64:
    """Cost of a sample of ``count`` undecided neighbours; keys are uniform in (0, 1)."""
    total = np.int64(0)
    if bernoulli:
        mean = 0.0
        for j in range(count):
            mean += similarity[j] / count
        for j in range(count):
            p = fraction * similarity[j] / mean if weighted and mean > 0 else fraction
            if keys[j] < p:
                total += costs[j]
        return total
    # Top up to the share of all neighbours; what is in the set counts first.
    size = np.int64(np.rint(fraction * (taken + count))) - taken
    if size <= 0:
        return np.int64(0)
    if weighted:
        # The smallest of exponential times with these rates (Efraimidis and Spirakis 2006).
        for j in range(count):
            keys[j] = -np.log(keys[j]) / similarity[j] if similarity[j] > 0 else np.inf
    order = np.argsort(keys[:count], kind="mergesort")
    for j in order[:size]:
        total += costs[j]
    return total


@kernel
def _bounds(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    status: NDArray[np.uint8],
    high: NDArray[np.int64],
    low: NDArray[np.int64],
    utility: NDArray[np.float32],
    alpha: float,
    beta: float,
    seed: int,
    number: int,
    fraction: float,
    bernoulli: bool,
    weighted: bool,
) -> None:
    widest = 0
    for i in range(len(indptr) - 1):
        widest = max(widest, indptr[i + 1] - indptr[i])
    keys, costs = np.empty(widest), np.empty(widest, np.int64)
    similarity = np.empty(widest, np.float32)
    for i in range(len(indptr) - 1):
        v = start + i
        if status[v] != UNDECIDED:
            continue
        value, rest = worth(utility[v], alpha), np.int64(0)
        taken, count = 0, 0
        for e in range(indptr[i], indptr[i + 1]):
            w = indices[e]
            term = cost(weights[e], beta)
            if inside(status[w]):
                value -= term
                taken += 1
            elif status[w] == UNDECIDED:
                rest += term
                if fraction < 1.0:
                    keys[count] = uniform(draw(seed, number, v, w))
                    costs[count], similarity[count] = term, weights[e]
                    count += 1
        if fraction < 1.0:
            rest = _sampled_cost(
                keys, costs, similarity, count, taken, fraction, bernoulli, weighted
            )
        high[v], low[v] = value, value - rest


@writes("gain", "low")
def bounds(shard: AnyShard, state: State, options: Bounding, seed: int, number: int) -> None:
    """U_max of the undecided points into ``gain``, U_min into ``low``, for pass ``number``."""
    i = state.instance
    _bounds(
        shard.start,
        shard.indptr,
        shard.indices,
        shard.weights,
        state.status,
        state.gain,
        state.low,
        i.utility,
        i.alpha,
        i.beta,
        seed,
        number,
        options.fraction,
        options.sampling == "bernoulli",
        options.weighting == "weighted",
    )


@writes("status")
def drop(shard: AnyShard, state: State, least: NDArray[np.int64]) -> None:
    """Exclude the undecided points with U_max below their group's number."""
    rows = slice(shard.start, shard.stop)
    status, group = state.status[rows], state.instance.group[rows]
    limit = least[group] if len(group) else least[0]
    status[(status == UNDECIDED) & (state.gain[rows] < limit)] = OUT


@writes("status")
def include(shard: AnyShard, state: State, least: NDArray[np.int64]) -> None:
    """Include the undecided points with U_min above their group's number."""
    rows = slice(shard.start, shard.stop)
    status, group = state.status[rows], state.instance.group[rows]
    limit = least[group] if len(group) else least[0]
    status[(status == UNDECIDED) & (state.low[rows] > limit)] = INCLUDED


def bounding(run: Run, options: Bounding) -> None:
    """Decide points until a shrink and a grow in turn change nothing (algorithm 5)."""
    if run.place["stage"] == "begin":
        run.place = {"stage": "bounding", "pass": 0, "verb": "shrink", "changed": False}
    place = run.place
    while place["stage"] == "bounding":
        used = run.usage()
        missing = run.limits.caps - used.taken
        if np.all((used.open <= missing) | (missing == 0)):
            break
        verb = place["verb"]
        run.session.map(bounds, options, run.seed, place["pass"])
        if verb == "shrink":
            run.session.map(drop, _thresholds(run, "low", used, missing, LOWEST))
        else:
            run.session.map(include, _thresholds(run, "gain", used, missing, HIGHEST))
        decided = int(used.open.sum() - run.usage().open.sum())
        place = {**place, "pass": place["pass"] + 1, "changed": place["changed"] or decided > 0}
        if decided == 0:
            place = _turn(place)
        run.note(verb, decided=decided, undecided=int(used.open.sum()) - decided)
        if place["stage"] == "bounding":
            run.save(**place)
    used, size = run.usage(), run.session.graph.num_points
    included, undecided = int(used.taken.sum()), int(used.open.sum())
    excluded = size - included - undecided - run.num_chosen
    run.note("bounded", included=included, excluded=excluded, undecided=undecided)
    run.save(stage="bounded")


def _turn(place: dict[str, Any]) -> dict[str, Any]:
    """From shrink to grow; from grow to shrink, or to the end when neither changed anything."""
    if place["verb"] == "shrink":
        return {**place, "verb": "grow"}
    if not place["changed"]:
        return {**place, "stage": "bounded"}
    return {**place, "verb": "shrink", "changed": False}


def _thresholds(
    run: Run, name: str, used: Usage, missing: NDArray[np.int64], nothing: int
) -> NDArray[np.int64]:
    """The k-th largest in each group; ``nothing`` where no point is to be decided by it."""
    open_ = (missing > 0) & (used.open > missing)
    rank = np.where(open_, missing, 1)
    return np.where(open_, kth_largest(run.session, name, rank, status=UNDECIDED), nothing)
