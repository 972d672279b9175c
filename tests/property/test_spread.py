"""A sum over many rows, from those that are drawn by their share of another one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.compress.spread import Spread

SIZES = st.lists(st.floats(0, 1e6, width=32) | st.just(0.0), min_size=1, max_size=200)


@given(SIZES, st.integers(1, 64))
def test_what_it_was_drawn_by_is_summed_exactly(sizes: list[float], draws: int) -> None:
    lost_N = torch.tensor(sizes, dtype=torch.float64)
    spread = Spread.over(lost_N, draws)
    assert len(spread.rows_S) <= max(draws, len(sizes) if len(sizes) <= draws else 0)
    assert bool((spread.rows_S.diff() > 0).all())
    wanted = float(lost_N.sum())
    assert abs(spread.total(lost_N[spread.rows_S]) - wanted) <= 1e-9 * wanted


@given(SIZES, st.integers(1, 64), st.floats(0.0, 1.0))
def test_rows_that_lose_like_shares_are_within_them(
    sizes: list[float], draws: int, least: float
) -> None:
    """Every share between ``least`` and 1: so is what is found of the whole."""
    lost_N = torch.tensor(sizes, dtype=torch.float64)
    share_N = torch.linspace(least, 1.0, len(sizes), dtype=torch.float64)
    spread = Spread.over(lost_N, draws)
    found = spread.total((lost_N * share_N)[spread.rows_S])
    whole = float(lost_N.sum())
    assert least * whole * (1 - 1e-9) <= found <= whole * (1 + 1e-9)


def test_as_many_rows_as_are_drawn_are_all_there() -> None:
    spread = Spread.over(torch.tensor([3.0, 0.0, 1.0]), 3)
    assert spread.rows_S.tolist() == [0, 1, 2]
    assert spread.weight_S.tolist() == [1.0, 1.0, 1.0]


def test_nothing_lost_draws_evenly() -> None:
    assert Spread.over(torch.zeros(100), 4).rows_S.tolist() == [12, 37, 62, 87]
