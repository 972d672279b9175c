"""The deltas' memory: extents never overlap, gaps are joined, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.engine.arena import ALIGNMENT, Arena, reserve

DTYPES = (torch.uint8, torch.int32, torch.bfloat16)


@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.sampled_from(DTYPES), st.integers(0, 3)), max_size=40
    ),
    st.randoms(use_true_random=False),
)
def test_tensors_keep_their_values_until_they_are_given_back(
    asked: list[tuple[int, torch.dtype, int]], random: object
) -> None:
    arena = Arena(8192, "cpu")
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, (count, dtype, leaving) in enumerate(asked):
        values = torch.full((count,), number % 100, dtype=dtype)
        placed = arena.empty_like(values)
        placed.copy_(values)
        assert placed.shape == values.shape
        assert placed.dtype == dtype
        held.append((placed, values))
        for _ in range(min(leaving, len(held))):
            left = held.pop(random.randrange(len(held)))  # type: ignore[attr-defined]
            arena.give_back(left[0])
        for tensor, expected in held:
            assert torch.equal(tensor, expected)
    for tensor, _ in held:
        arena.give_back(tensor)
    assert arena.num_free == 8192
    whole = arena.empty_like(torch.empty(8192, dtype=torch.uint8))
    assert whole.data_ptr() == arena.memory.data_ptr(), "the gaps were not joined"


def test_extents_are_aligned() -> None:
    arena = Arena(1000, "cpu")
    first, second = (arena.empty_like(torch.empty(3, dtype=torch.int64)) for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT


def test_what_finds_no_gap_is_allocated_beside_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arena = Arena(512, "cpu")
    for _ in range(2):
        tensor = arena.empty_like(torch.empty(600, dtype=torch.uint8))
        assert tensor.nbytes == 600
        arena.give_back(tensor)
    (record,) = caplog.records
    assert "no gap of 600 bytes, 512 are free" in record.message


def test_a_cpu_needs_none() -> None:
    assert reserve(1 << 20, "cpu") is None
