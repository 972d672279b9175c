"""The neighbour graph against all pairs; in memory and on disk; duplicates and their removal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import SelectionError
from deltaserve.select.duplicates import (
    WORD,
    _clusters,
    keep_best,
    near_duplicates,
    similar_duplicates,
)
from deltaserve.select.graph import Graph
from deltaserve.select.minhash import signatures
from deltaserve.select.neighbours import KnnOptions, find_neighbours, neighbour_graph
from deltaserve.select.scale import fit_whitening
from tests.select.pools import clustered, sentences


def brute_force(x, k):
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    return -np.sort(-cosine, axis=1)[:, :k]


@pytest.mark.parametrize("dims", [1, 3, 16])
def test_flat_neighbours_are_those_of_brute_force(dims):
    x = clustered(300, dims, 5)
    found = find_neighbours(x, KnnOptions(neighbours=7))
    np.testing.assert_allclose(found.similarities, brute_force(x, 7), atol=1e-5)
    assert (found.ids != np.arange(300)[:, None]).all()
    assert found.recall == 1
    assert found.index == "flat"


def test_neighbours_are_those_of_the_transformed_embeddings():
    x = clustered(200, 8, 3) * 5 + 30
    whitening = fit_whitening(x)
    found = find_neighbours(x, KnnOptions(neighbours=4), whitening)
    np.testing.assert_allclose(found.similarities, brute_force(whitening(x), 4), atol=1e-5)


def test_the_recall_says_what_an_inverted_file_missed():
    x = clustered(4000, 16, 400)
    few = find_neighbours(x, KnnOptions(index="ivf", probes=1))
    many = find_neighbours(x, KnnOptions(index="ivf", probes=64))
    assert few.recall < many.recall
    assert many.recall > 0.97
    assert "ivf, 253 cells, 64 probed" in many.index
    best = brute_force(x, 10)
    true = (few.similarities >= best[:, -1:] - 1e-5) & (best > 0)
    tuned = find_neighbours(x, KnnOptions(index="ivf", min_recall=0.9))
    assert tuned.recall >= 0.9
    assert "16 probed" in find_neighbours(x, KnnOptions(index="ivf", min_recall=0.0)).index
    assert few.recall == pytest.approx(true.sum() / (best > 0).sum(), abs=0.02)


def test_an_index_on_disk_finds_what_one_in_memory_finds(monkeypatch, capfd):
    monkeypatch.setattr("deltaserve.select.neighbours.BATCH", 500)
    x = clustered(3000, 8, 30)
    inside = find_neighbours(x, KnnOptions(index="ivf"))
    outside = find_neighbours(x, KnnOptions(index="ivf", memory_bytes=40_000))
    assert "on disk" in outside.index
    assert capfd.readouterr().out == ""
    np.testing.assert_array_equal(inside.ids, outside.ids)
    np.testing.assert_array_equal(inside.similarities, outside.similarities)


def test_a_sample_is_never_its_own_neighbour_even_among_copies():
    x = np.repeat(clustered(10, 4, 3), 20, axis=0)
    found = find_neighbours(x, KnnOptions(neighbours=5))
    assert (found.ids != np.arange(200)[:, None]).all()
    assert found.recall == 1
    neighbour_graph(found).validate()


def test_pools_of_one_and_two():
    x = clustered(2, 3, 1)
    alone = find_neighbours(x[:1])
    assert neighbour_graph(alone).num_points == 1
    assert find_neighbours(x).ids.tolist() == [[1], [0]]


def test_the_graph_joins_two_if_either_is_a_neighbour_of_the_other():
    x = clustered(120, 3, 4)
    found = find_neighbours(x, KnnOptions(neighbours=3))
    graph = neighbour_graph(found, min_similarity=0.2)
    graph.validate()
    expected = set()
    for row, (ids, near) in enumerate(zip(found.ids, found.similarities, strict=True)):
        expected |= {frozenset((row, int(i))) for i, s in zip(ids, near, strict=True) if s >= 0.2}
    edges = set()
    for shard in graph.shards:
        for row in range(shard.start, shard.stop):
            start, stop = shard.indptr[row - shard.start : row - shard.start + 2]
            edges |= {frozenset((row, int(i))) for i in shard.indices[start:stop]}
    assert edges == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "at least 1 neighbour"),
        ({"index": "hnsw"}, "no index 'hnsw'"),
        ({"min_similarity": 1.0}, "min_similarity must lie in 0 to 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SelectionError, match=message):
        KnnOptions(**options)


def shingles(text, words):
    split = WORD.findall(text.lower())
    if len(split) < words:
        return {tuple(split)}
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_signatures_estimate_the_jaccard_similarity():
    texts = sentences(60, seed=3, low=20, high=40)
    texts += [" ".join(t.split()[: 2 + i % 30]) for i, t in enumerate(texts)]
    found = signatures([t.encode() for t in texts], 2, 2048)
    errors = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        one, other = shingles(texts[i], 2), shingles(texts[j], 2)
        true = len(one & other) / len(one | other)
        errors.append((found[i] == found[j]).mean() - true)
    assert abs(np.mean(errors)) < 0.002
    assert np.std(errors) < 0.011  # sqrt(1/4 / 2048) at most


def test_near_duplicates_go_and_the_first_or_the_best_stays():
    texts = sentences(200, seed=5, low=30, high=60)
    near = [f"{t} indeed" for t in texts[:40]]
    loud = [t.upper().replace(" ", ",  ") + "!" for t in texts[:20]]
    everything = texts + near + loud
    found = near_duplicates(everything, len(everything))
    assert found.keep[:200].all()
    assert not found.keep[200:].any()
    assert found.stands_for[200:240].tolist() == list(range(40))
    utility = np.arange(len(everything), dtype=float)
    best = near_duplicates(everything, len(everything), utility=utility)
    assert best.removed == found.removed
    assert best.keep[240:].all()
    assert not best.keep[:40].any()


def test_short_and_empty_texts_and_scripts_without_spaces():
    texts = [
        "yes",
        "no",
        "yes!",
        "",
        "...",
        "我们今天去公园看花好吗",
        "我们今天去公园看花好吗?",
        "我",
    ]
    found = near_duplicates(texts, len(texts))
    assert found.stands_for.tolist() == [0, 1, 0, 3, 3, 5, 5, 7]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_pairs_clearly_above_the_threshold_are_found_and_those_clearly_below_are_not(threshold):
    rng = np.random.default_rng(1)
    bases = [[f"w{rng.integers(10**6)}" for _ in range(400)] for _ in range(40)]

    def overlap(share):  # two sets of 400 words that share `share` of their union
        common = round(800 * share / (1 + share))
        return [b[:common] + [f"x{rng.integers(10**9)}" for _ in b[common:]] for b in bases]

    for share, expected in ((threshold + 0.1, True), (threshold - 0.15, False)):
        texts = [" ".join(words) for words in bases + overlap(min(share, 1))]
        found = near_duplicates(texts, 80, threshold=threshold, words=1)
        removed = found.removed / 40
        assert removed > 0.9 if expected else removed < 0.1


@given(
    st.integers(1, 25).flatmap(
        lambda n: st.tuples(
            st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))
        )
    )
)
def test_clusters_are_the_connected_components(case):
    count, pairs = case
    member = list(range(count))
    for one, other in pairs * count:
        member[one] = member[other] = min(member[one], member[other])
    found = _clusters(count, np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert found.tolist() == member


@settings(max_examples=60, deadline=None)  # the first call compiles
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_cosine_duplicates_leave_no_similar_pair_and_remove_none_without_a_stand_in(count, seed):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.5, 1, (count, count)) * (rng.random((count, count)) < 0.3), 1)
    rows, cols = np.nonzero(upper)
    graph = Graph.from_edges(count, rows, cols, upper[rows, cols].astype(np.float32))
    contents = rng.integers(0, count, count).astype(np.uint64)
    utility = rng.integers(0, 3, count).astype(float)
    found = similar_duplicates(graph, contents, threshold=0.8, utility=utility)
    alike = (upper + upper.T >= 0.8) | (contents[:, None] == contents)
    np.fill_diagonal(alike, False)
    assert not alike[np.ix_(found.keep, found.keep)].any()
    assert found.keep[found.stands_for].all()
    assert (found.stands_for[found.keep] == np.flatnonzero(found.keep)).all()
    for row in np.flatnonzero(~found.keep):
        copies = np.flatnonzero(contents == contents[row])
        stand_in = found.stands_for[row]
        same = np.flatnonzero(contents == contents[stand_in])
        assert contents[row] == contents[stand_in] or alike[np.ix_(copies, same)].any()


def test_the_best_of_each_cluster_stays():
    found = keep_best(np.array([4, 4, 9, 4, 9]), np.array([1.0, 3.0, 0.0, 3.0, 0.0]))
    assert found.keep.tolist() == [False, True, True, False, False]
    assert found.stands_for.tolist() == [1, 1, 2, 1, 2]


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(SelectionError, match="threshold in 0 to 1"):
        near_duplicates(["a"], 1, threshold=1.5)
