"""Where caches may lie, how big they are, and which is chosen."""

from __future__ import annotations

import pytest

from deltaserve.pipeline.tuning.cacheplace import Nature, place, places
from deltaserve.pipeline.tuning.rates import Demand


def demand(name, visits, cpu_s, size):
    return Demand(name, "map", name, visits, cpu_s, 0.0, element_bytes=size)


def text(**tokenise):
    """1000 rows -> half are kept -> tokens, 4 times the bytes -> dropout -> packed."""
    found = {
        "file": demand("file", 20, 0.001, 100),
        "filter": demand("filter", 10, 0.001, 100),
        "tokenise": demand("tokenise", 10, 0.02, 400),
        "dropout": demand("dropout", 10, 0.001, 400),
        "pack": demand("pack", 1, 0.001, 4000),
    }
    natures = {
        "file": Nature(rows=1000),
        "filter": Nature(("file",)),
        "tokenise": Nature(("filter",), **tokenise),
        "dropout": Nature(("tokenise",), random=True),
        "pack": Nature(("dropout",)),
    }
    return found, natures


def test_a_size_that_is_known_counts_more_than_what_a_trace_saw():
    found, natures = text(bytes=1e6)
    assert places(found, natures)["tokenise"].bytes == 1e6
    assert [each.name for each in place(found, natures, memory=1e6)] == ["filter"]
    found, natures = text(bytes=float("inf"))  # its rows cannot be kept
    assert [each.name for each in place(found, natures, memory=1e9)] == ["filter"]


def test_nearest_the_root_but_never_above_a_random_operator():
    found, natures = text()
    assert [each.name for each in place(found, natures, memory=1e9)] == ["tokenise"]
    every = places(found, natures)
    assert every["tokenise"].bytes == pytest.approx(500 * 400)
    assert (every["pack"].legal, every["pack"].why) == (False, "dropout is random")


def test_what_does_not_fit_moves_towards_the_source():
    found, natures = text()
    assert [each.name for each in place(found, natures, memory=200_000)] == ["filter"]
    assert place(found, natures, memory=10_000) == []


def test_undeclared_sizes_and_undeterministic_operators_are_not_cached():
    found, natures = text(deterministic=False)
    assert [each.name for each in place(found, natures, memory=1e9)] == ["filter"]
    natures["file"] = Nature(rows=None)
    assert place(found, natures, memory=1e9) == []
    found, natures = text(endless=True)
    assert places(found, natures)["tokenise"].why == "tokenise never ends"


def test_a_cache_that_is_slower_than_the_work_is_not_worth_it():
    found, natures = text()
    assert place(found, natures, memory=1e9, read_s=lambda size: 1.0) == []


def test_where_streams_join_the_caches_share_the_memory():
    found = {
        "a": demand("a", 1, 0.01, 100),
        "b": demand("b", 1, 0.05, 100),
        "mix": demand("mix", 2, 0.0, 100),
    }
    natures = {
        "a": Nature(rows=1000),
        "b": Nature(rows=1000),
        "mix": Nature(("a", "b"), reorders=True),
    }
    assert [each.name for each in place(found, natures, memory=1e9)] == ["a", "b"]
    assert [each.name for each in place(found, natures, memory=150_000)] == ["b"]
