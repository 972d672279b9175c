"""Problems and budgets that cannot be solved are refused before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deltaserve.errors import SelectionError
from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.options import Bounding, Partition
from deltaserve.select.problem import Problem
from deltaserve.select.solve import objective, solve

GRAPH = Graph.from_edges(4, np.array([0, 1]), np.array([1, 2]), np.array([0.5, 0.5]))
TWO = Budget(2)
LABELS = np.array(["a", "a", "b", "b"])


def problem(budget: Budget = TWO, **changes: Any) -> Problem:
    return Problem(
        **{"graph": GRAPH, "utility": np.ones(4, np.float32), "budget": budget} | changes
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(5), "k is 5, but the pool has only 4 points"),
        (Budget(0), "k is 0, but must be at least 1"),
        (Budget(), "the budget is empty"),
        (Budget(groups=LABELS), "needs both the groups and their counts"),
        (Budget(groups=LABELS[:2], counts={"a": 1}), "2 group labels for 4 points"),
        (Budget(groups=LABELS, counts={"c": 1}), "no point of the pool is in the group 'c'"),
        (Budget(groups=LABELS, counts={"a": -1}), "negative"),
        (
            Budget(groups=LABELS, counts={"a": 3, "b": 1}),
            "the groups cannot meet the budget of 4: 'a' has 2 of 3",
        ),
        (Budget(4, groups=LABELS, counts={"a": 1, "b": 2}), "add up to 3"),
        (Budget(tokens=5), "needs both the tokens and the points' lengths"),
        (Budget(tokens=5, lengths=np.array([9, 9, 9, 9])), "no point of the pool is that short"),
        (Budget(tokens=5, lengths=np.array([1, 0, 1, 1])), "point 1 has length 0"),
        (Budget(tokens=5, lengths=np.ones(3, int)), "3 lengths for 4 points"),
    ],
)
def test_a_budget_that_the_pool_cannot_meet_is_refused(budget: Budget, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        problem(budget)


def test_what_was_chosen_before_is_not_in_the_pool() -> None:
    chosen = np.array([True, True, True, False])
    with pytest.raises(SelectionError, match="only 1 points that are not chosen yet"):
        problem(chosen=chosen)
    assert solve(problem(Budget(1), chosen=chosen)).ids.tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utility": np.array([1, np.nan, 1, 1], np.float32)}, "utility of point 1 is nan"),
        ({"utility": np.array([1, 1, np.inf, 1], np.float32)}, "utility of point 2 is inf"),
        ({"utility": np.array([1, 1, 1, -1], np.float32)}, "utility of point 3 is -1"),
        ({"utility": np.ones(3, np.float32)}, "3 utilities for 4 points"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"alpha": 1.5}, "beta is -0.5"),
        ({"chosen": np.ones(4, int)}, "chosen must be one boolean"),
    ],
)
def test_a_wrong_problem_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        problem(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "best"}, "solver is 'best'"),
        ({"bounding": "tight"}, "bounding is 'tight'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        solve(problem(), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bounding(0.0), "fraction is 0.0"),
        (lambda: Bounding(0.5, "half"), "sampling is 'half'"),  # type: ignore[arg-type]
        (lambda: Partition(0), "partitions is 0"),
        (lambda: Partition(rounds=0), "rounds is 0"),
        (lambda: Partition(gamma=0), "gamma is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        make()


def test_partition_greedy_refuses_budgets_without_exact_counts() -> None:
    tokens = Budget(tokens=3, lengths=np.ones(4, int))
    with pytest.raises(SelectionError, match="partition greedy needs a budget of exactly"):
        solve(problem(tokens), solver="partition")


def test_bounding_that_does_not_apply_is_skipped_and_says_so() -> None:
    found = solve(problem(Budget(tokens=3, lengths=np.ones(4, int))), bounding="exact")
    assert found.log[0]["verb"] == "bounding skipped"
    assert found.bounded is None
    assert len(found.ids) == 3


def test_ids_out_of_range_have_no_objective() -> None:
    with pytest.raises(SelectionError, match="between 0 and 3"):
        objective(problem(), np.array([4]))


def test_tiny_and_huge_utilities_are_told_apart() -> None:
    """The unit follows the largest term, so no scale of utilities loses its order."""
    for scale in (1e-30, 1e-6, 1.0, 1e12, 1e30):
        utility = (np.array([1, 3, 2, 4]) * scale).astype(np.float32)
        found = solve(problem(Budget(2), utility=utility, beta=0.0))
        assert found.ids.tolist() == [3, 1]
        assert np.isclose(found.objective, 0.9 * 7 * scale)
