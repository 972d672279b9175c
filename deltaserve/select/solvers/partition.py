"""Multi-round partition greedy (Boether et al. 2025, section 4.4, algorithm 6).

In each round the remaining points are dealt at random to partitions of at most
ceil(points / partitions); each runs greedy alone, blind to edges between partitions, and what
it does not take falls out. The number to keep falls over the rounds to the budget. No
partition ever holds the whole selection.

The number of partitions comes from the points that enter a round. (The paper's listing takes
it from those that leave, which contradicts its figures and breaks the memory cap.) Groups
are dealt evenly, so that their budgets hold within each partition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.compiled import kernel
from deltaserve.select.graph import AnyShard
from deltaserve.select.options import Partition
from deltaserve.select.random import permuted
from deltaserve.select.run import Run
from deltaserve.select.solvers.heap import heap_greedy
from deltaserve.select.state import NO_PART, OUT, SELECTED, UNDECIDED, State, writes
from deltaserve.select.steps import EVERY, begin, refresh

NO_LENGTHS = np.empty(0, np.int64)
# From so many partitions on, half of the pool or more scores below 60 % in the paper (figure 4).
POOR_PARTITIONS = 8


@kernel
def _deal(
    start: int,
    status: NDArray[np.uint8],
    part: NDArray[np.uint16],
    group: NDArray[np.int32],
    rank: NDArray[np.int64],
    sizes: NDArray[np.int64],
    parts: int,
    seed: int,
    round_: int,
) -> None:
    offset = np.cumsum(sizes) - sizes
    for i in range(len(status)):
        part[i] = NO_PART
        if status[i] == UNDECIDED:
            g = group[i] if len(group) else 0
            place = permuted(rank[g], sizes[g], seed, round_, g)
            rank[g] += 1
            # Groups follow each other, so that the partitions are equal up to one in all.
            part[i] = (offset[g] + place) % parts


@writes("part")
def deal(
    shard: AnyShard,
    state: State,
    ranks: dict[int, NDArray[np.int64]],
    sizes: NDArray[np.int64],
    parts: int,
    seed: int,
    round_: int,
) -> None:
    """Number the partition of each undecided point; ranks: undecided points before the shard."""
    rows = slice(shard.start, shard.stop)
    group = state.instance.group[rows]
    rank = ranks[shard.start].copy()
    _deal(
        shard.start, state.status[rows], state.part[rows], group, rank, sizes, parts, seed, round_
    )


@kernel
def _rows_of(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    part: NDArray[np.uint16],
    wanted: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any], NDArray[np.float32]]:
    rows, edges = 0, 0
    for i in range(len(indptr) - 1):
        if part[start + i] == wanted:
            rows += 1
            for e in range(indptr[i], indptr[i + 1]):
                edges += part[indices[e]] == wanted
    ids, degree = np.empty(rows, np.int64), np.empty(rows, np.int64)
    others, values = np.empty(edges, indices.dtype), np.empty(edges, np.float32)
    rows, edges = 0, 0
    for i in range(len(indptr) - 1):
        if part[start + i] != wanted:
            continue
        before = edges
        for e in range(indptr[i], indptr[i + 1]):
            if part[indices[e]] == wanted:
                others[edges], values[edges] = indices[e], weights[e]
                edges += 1
        ids[rows], degree[rows] = start + i, edges - before
        rows += 1
    return ids, degree, others, values


def rows_of(shard: AnyShard, state: State, part: int) -> tuple[NDArray[Any], ...]:
    """A partition's points in this shard: ids, degrees, neighbours and weights inside the
    partition, gains, groups."""
    ids, degree, others, values = _rows_of(
        shard.start, shard.indptr, shard.indices, shard.weights, state.part, part
    )
    group = state.instance.group
    return ids, degree, others, values, state.gain[ids], group[ids] if len(group) else group


def left_out(
    pieces: list[tuple[NDArray[Any], ...]], beta: float, quota: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Greedy on one partition, ``quota`` of each group; the ids that it does not take."""
    ids, degree, others, values, gain, group = map(np.concatenate, zip(*pieces, strict=True))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(degree)])
    taken, _ = heap_greedy(
        indptr,
        np.searchsorted(ids, others),
        values,
        beta,
        gain,
        np.arange(len(ids)),
        len(ids),
        group,
        quota.copy(),
        NO_LENGTHS,
        0,
        NO_LENGTHS,
    )
    return np.delete(ids, taken)


@kernel
def _pick(
    status: NDArray[np.uint8],
    part: NDArray[np.uint16],
    group: NDArray[np.int32],
    rank: NDArray[np.int64],
    sizes: NDArray[np.int64],
    keep: NDArray[np.int64],
    seed: int,
    round_: int,
) -> None:
    for i in range(len(status)):
        part[i] = NO_PART
        if status[i] == UNDECIDED:
            g = group[i] if len(group) else 0
            if permuted(rank[g], sizes[g], seed, round_, g) < keep[g]:
                part[i] = 0
            rank[g] += 1


@writes("part")
def pick(
    shard: AnyShard,
    state: State,
    ranks: dict[int, NDArray[np.int64]],
    sizes: NDArray[np.int64],
    keep: NDArray[np.int64],
    seed: int,
    round_: int,
) -> None:
    """Put ``keep`` random undecided points of each group into part 0, the rest into none."""
    rows = slice(shard.start, shard.stop)
    group, rank = state.instance.group[rows], ranks[shard.start].copy()
    _pick(state.status[rows], state.part[rows], group, rank, sizes, keep, seed, round_)


@writes("status")
def accept(shard: AnyShard, state: State) -> None:
    """Select the undecided points of part 0; the others fall out."""
    rows = slice(shard.start, shard.stop)
    status, undecided = state.status[rows], state.status[rows] == UNDECIDED
    status[undecided] = np.where(state.part[rows][undecided] == 0, SELECTED, OUT)


def keep_in_round(size: int, k: int, gamma: float, rounds: int, number: int) -> int:
    """Points to keep in round ``number`` (from 1) of all: gamma's share of a straight line."""
    return math.ceil(gamma * (rounds - number) * (size - k) / rounds) + k


def partition(run: Run, options: Partition, first: NDArray[np.uint16] | None = None) -> None:
    """first: the partition of each point in round 1, for experiments; random unless given."""
    session, limits = run.session, run.limits
    if not limits.exact:
        raise SelectionError(
            "partition greedy needs a budget of exactly k points, or exact counts of groups: "
            "use the solver dominance or greedy"
        )
    used = run.usage()
    need = limits.caps - used.taken
    if run.place["stage"] != "partition":
        # What is in the set already is the context of every partition.
        run.save(stage="partition", round=0, sizes=used.open.tolist())
    sizes = np.array(run.place["sizes"], np.int64)
    if options.partitions >= POOR_PARTITIONS and 2 * need.sum() >= sizes.sum():
        run.note("advice", text="partitions lose much at half the pool: try the solver dominance")
    cap = max(1, math.ceil(int(sizes.sum()) / options.partitions))
    session.map(refresh, EVERY)
    for number in range(run.place["round"] + 1, options.rounds + 1):
        entering = run.usage().open
        parts = max(1, math.ceil(int(entering.sum()) / cap))
        if not options.adaptive:
            parts = options.partitions
        keep = np.array(
            [
                keep_in_round(int(n), int(k), options.gamma, options.rounds, number)
                for n, k in zip(sizes, need, strict=True)
            ]
        )
        if number == 1 and first is not None:
            session.write("part", slice(None), first)
        else:
            session.map(deal, _ranks(run), entering, parts, run.seed, 2 * number)
        quota = -(-keep // parts)
        for ids in session.parts(rows_of, left_out, parts, session.state.instance.beta, quota):
            session.write("status", ids, OUT)
        run.note("round", partitions=parts, kept=int(run.usage().open.sum()), most_points=cap)
        run.save(stage="partition", round=number, sizes=sizes.tolist())
    session.map(begin)
    # Rounds of draws: even ones deal, the odd one after the last picks.
    last = 2 * options.rounds + 1
    session.map(pick, _ranks(run), run.usage().open, need, run.seed, last)
    session.map(accept)
    run.save(stage="solved")


def _ranks(run: Run) -> dict[int, NDArray[np.int64]]:
    """For each shard (by its first point): undecided points of each group before it."""
    before = np.zeros(len(run.limits.caps), np.int64)
    ranks = {}
    for shard, used in zip(run.session.graph.shards, run.usage_by_shard(), strict=True):
        ranks[shard.start] = before
        before = before + used.open
    return ranks
