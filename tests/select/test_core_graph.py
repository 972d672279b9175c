"""Building, storing and checking the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.bench.select_instances import dense, random_graph
from deltaserve.errors import OutputExistsError, SelectionError
from deltaserve.select.graph import Graph, MappedShard, Shard


@given(n=st.integers(1, 30), seed=st.integers(0, 2**32), shards=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_edges_become_a_symmetric_graph_of_their_largest_weights(
    n: int, seed: int, shards: int
) -> None:
    rng = np.random.default_rng(seed)
    m = int(rng.integers(0, 80))
    rows, cols = rng.integers(0, n, m), rng.integers(0, n, m)
    keep = rows != cols
    rows, cols, weights = rows[keep], cols[keep], rng.random(m).astype(np.float32)[keep]
    expected = np.zeros((n, n), np.float32)
    np.maximum.at(expected, (rows, cols), weights)
    expected = np.maximum(expected, expected.T)
    graph = Graph.from_edges(n, rows, cols, weights, shards=min(shards, n))
    graph.validate()
    assert np.array_equal(dense(graph), expected)
    assert graph.num_edges == np.count_nonzero(np.triu(expected))
    assert len(graph.shards) == min(shards, n)


def test_lists_of_neighbours_give_the_graph_of_their_edges(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    neighbours = np.array([rng.choice(np.delete(np.arange(40), v), 5, False) for v in range(40)])
    weights = rng.random((40, 5)).astype(np.float32)
    neighbours[3, 2:] = -1
    used = neighbours >= 0
    rows = np.broadcast_to(np.arange(40)[:, None], (40, 5))[used]
    plain = Graph.from_edges(40, rows, neighbours[used], weights[used])
    listed = Graph.from_neighbours(neighbours, weights, shards=3)
    stored = Graph.from_neighbours(neighbours, weights, shards=3, path=tmp_path / "graph")
    assert plain.digest == listed.digest == stored.digest


def test_a_saved_graph_opens_mapped_and_equal(tmp_path: Path) -> None:
    graph = random_graph(np.random.default_rng(1), 50, 6, False, 4)
    graph.save(tmp_path / "graph")
    opened = Graph.open(tmp_path / "graph")
    assert all(isinstance(shard, MappedShard) for shard in opened.shards)
    assert isinstance(opened.shards[0].indices.base, np.memmap)
    assert np.array_equal(dense(opened), dense(graph))
    assert opened.digest == graph.digest
    opened.validate()


def test_the_digest_does_not_depend_on_the_cut_but_on_every_weight() -> None:
    graph = random_graph(np.random.default_rng(2), 50, 6, False, 1)
    assert {graph.resharded(shards).digest for shards in (1, 2, 7)} == {graph.digest}
    changed = graph.shards[0].weights.copy()
    changed[0] = np.nextafter(changed[0], np.float32(2))
    shard = graph.shards[0]
    other = Graph([Shard(0, 50, shard.indptr, shard.indices, changed)])
    assert other.digest != graph.digest


def test_saving_leaves_a_directory_that_is_there_alone(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "mine").write_text("")
    with pytest.raises(OutputExistsError):
        random_graph(np.random.default_rng(1), 5, 2, False, 1).save(tmp_path / "graph")
    assert [p.name for p in tmp_path.rglob("*")] == ["graph", "mine"]


@pytest.mark.parametrize(
    ("rows", "cols", "weights", "message"),
    [
        ([0], [0], [1.0], "point 0 is its own neighbour"),
        ([0], [3], [1.0], "point 0 has the neighbour 3, which does not exist"),
        ([-1], [1], [1.0], "the neighbour -1, which does not exist"),
        ([0], [1], [np.nan], "between points 0 and 1 is negative or not finite"),
        ([0], [1], [-0.5], "between points 0 and 1 is negative or not finite"),
        ([0, 1], [1], [1.0], "2 rows, 1 columns"),
    ],
)
def test_edges_that_make_no_graph_are_refused(
    rows: list[int], cols: list[int], weights: list[float], message: str, tmp_path: Path
) -> None:
    arrays = np.array(rows), np.array(cols), np.array(weights)
    with pytest.raises(SelectionError, match=message):
        Graph.from_edges(3, *arrays, path=tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def shard(start: int, indptr: list[int], indices: list[int], weights: list[float]) -> Shard:
    return Shard(
        start,
        start + len(indptr) - 1,
        np.array(indptr, np.int64),
        np.array(indices, np.int32),
        np.array(weights, np.float32),
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (shard(0, [0, 1, 1], [1], [0.5]), "not symmetric: an edge of point 0"),
        (shard(0, [0, 1, 2], [1, 0], [0.5, 0.4]), "not symmetric: an edge of point 0"),
        (shard(0, [0, 1, 2], [0, 1], [0.5, 0.5]), "point 0 is its own neighbour"),
        (shard(0, [0, 1, 2], [2, 0], [0.5, 0.5]), "point 0 has the neighbour 2"),
        (shard(0, [0, 2, 4], [1, 1, 0, 0], [0.5] * 4), "point 0 are not ascending at 1"),
        (shard(0, [0, 1, 2], [1, 0], [np.inf, np.inf]), "not finite"),
        (shard(0, [0, 1, 3], [1, 0], [0.5, 0.5]), "damaged"),
    ],
)
def test_a_wrong_graph_does_not_validate(bad: Shard, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Graph([bad]).validate()


def test_empty_and_missing_shards_are_refused() -> None:
    with pytest.raises(SelectionError, match="no shards"):
        Graph([])
    with pytest.raises(SelectionError, match="the shard at point 0 is empty"):
        Graph([shard(0, [0], [], [])])
    with pytest.raises(SelectionError, match="starts at point 2, but 1 comes next"):
        Graph([shard(0, [0, 0], [], []), shard(2, [0, 0], [], [])])
    with pytest.raises(SelectionError, match="8 shards for 5 points"):
        random_graph(np.random.default_rng(0), 5, 2, False, 1).resharded(8)
    with pytest.raises(SelectionError, match="the pool is empty"):
        Graph.from_edges(0, *(np.empty(0, int),) * 2, np.empty(0))


@pytest.mark.parametrize("spoil", ["graph.json", "weights-00001.npy", "indptr-00000.npy"])
def test_a_damaged_directory_is_no_graph(spoil: str, tmp_path: Path) -> None:
    random_graph(np.random.default_rng(1), 20, 4, False, 2).save(tmp_path / "graph")
    file: Any = tmp_path / "graph" / spoil
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(SelectionError, match="damaged"):
        Graph.open(tmp_path / "graph")
    file.unlink()
    with pytest.raises(SelectionError, match=r"missing or damaged|damaged"):
        Graph.open(tmp_path / "graph")
