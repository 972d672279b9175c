"""Random numbers by place, and the end of a budget found by histograms."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.select.backends.local import Local
from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.kth import LOWEST, first_beyond, kth_largest
from deltaserve.select.problem import Problem
from deltaserve.select.random import draw, permuted, uniform
from deltaserve.select.state import OUT, UNDECIDED


@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_permuted_is_a_permutation(size: int, seed: int, round_: int) -> None:
    places = [permuted(i, size, seed, round_, 0) for i in range(size)]
    assert sorted(places) == list(range(size))


def test_permutations_of_other_rounds_are_unrelated() -> None:
    size = 5000
    first = np.array([permuted(i, size, 1, 1, 0) for i in range(size)])
    second = np.array([permuted(i, size, 1, 2, 0) for i in range(size)])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05
    # Neighbours in the order do not stay together: the trap of partitions that follow the data.
    assert abs(np.mean(first[1:] % 16 == first[:-1] % 16) - 1 / 16) < 0.015


def test_draws_are_uniform_and_differ_in_every_key() -> None:
    values = np.array([uniform(np.uint64(draw(3, 1, v))) for v in range(20000)])
    counts, _ = np.histogram(values, 20, (0, 1))
    assert np.abs(counts - 1000).max() < 150
    base = draw(1, 2, 3, 4)
    assert len({base, draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5)}) == 5


@given(
    n=st.integers(1, 80),
    seed=st.integers(0, 2**32),
    shards=st.integers(1, 4),
    few=st.booleans(),
    num_groups=st.integers(1, 4),
    weighed=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_cut_is_where_the_sorted_order_exceeds_the_room(
    n: int, seed: int, shards: int, few: bool, num_groups: int, weighed: bool
) -> None:
    rng = np.random.default_rng(seed)
    wide = np.iinfo(np.int64)
    values = rng.integers(-2, 3, n) if few else rng.integers(wide.min + 1, wide.max, n)
    groups = rng.integers(0, num_groups, n)
    groups[0] = num_groups - 1
    labels = {int(g): 1 for g in np.unique(groups)}
    groups = np.unique(groups, return_inverse=True)[1]
    length = rng.integers(1, 9, n)
    active = rng.random(n) < 0.8
    empty = np.empty(0, int)
    graph = Graph.from_edges(n, empty, empty, np.empty(0), shards=min(n, shards))
    counts = dict.fromkeys(range(len(labels)), 1)
    budget = Budget(groups=groups, counts=counts, tokens=10 * n, lengths=length)
    problem = Problem(graph, np.ones(n, np.float32), budget)
    room = rng.integers(0, 3 * n // len(labels) + 2, len(labels))
    with Local().open(graph, problem.instance, None) as session:
        session.write("gain", slice(None), values)
        session.write("status", np.flatnonzero(~active), OUT)
        cut = first_beyond(session, "gain", room, status=UNDECIDED, weighed=weighed)
        for g in range(len(labels)):
            members = np.flatnonzero((groups == g) & active)
            order = members[np.lexsort((members, -values[members].astype(object)))]
            used = np.cumsum(length[order] if weighed else np.ones(len(order), int))
            fits = order[used <= room[g]]
            key, last = cut.keys[g], cut.ids[g]
            before = [v for v in members if values[v] > key or (values[v] == key and v < last)]
            assert sorted(fits.tolist()) == sorted(before)
            if len(fits) == len(members):
                assert (key, last) == (LOWEST, -1)
        rank = np.array(
            [max(1, np.count_nonzero((groups == g) & active)) for g in range(len(labels))]
        )
        least = kth_largest(session, "gain", rank, status=UNDECIDED)
        for g in range(len(labels)):
            members = values[(groups == g) & active]
            assert not len(members) or least[g] == members.min()
