"""Whatever shares a step: any codecs with any of their settings, any rows, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels.delta_matmul import DENSE_ROWS, Segment, cut, dispatch
from tests.kernels.test_triton_delta import DEVICE, Layer, check, encode, make_layer, segments

Case = tuple[str, dict[str, Any]]
GROUPS = st.sampled_from([16, 32, 48, 64, 80, 128, 256, 0])
SCALES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda size: {"scale_axis": "group", "group_size": size}, GROUPS),
    st.sampled_from([{"scale_axis": "row"}, {"scale_axis": "tensor"}]),
)
INT = st.builds(
    lambda bits, scales, planes: ("int", {"bits": bits, "planes": planes} | scales),
    st.sampled_from([1, 2, 3, 4, 8]),
    SCALES,
    st.integers(1, 3),
)
NM24 = st.builds(
    lambda bits, size: ("nm24", {"bits": bits, "group_size": size}),
    st.sampled_from([2, 4]),
    st.sampled_from([64, 128, 192, 0]),
)
LOWRANK = st.builds(lambda rank: ("lowrank", {"rank": rank}), st.integers(1, 100))
ROWS = st.builds(
    lambda bits, size: ("rows", {"bits": bits, "group_size": size} if bits else {}),
    st.sampled_from([0, 1, 2, 3, 4, 8]),
    st.sampled_from([16, 64, 0]),
)
CASES: st.SearchStrategy[Case] = st.one_of(INT, NM24, LOWRANK, ROWS)
COUNTS = st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 40))


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Case], list[tuple[int, int]]]:
    """Codecs by slot, and (slot, rows) in the order of the step, the base's rows anywhere."""
    cases = draw(st.lists(CASES, min_size=1, max_size=6))
    order = draw(st.permutations(range(1, len(cases) + 1)))
    rows_of: list[tuple[int, int]] = []
    for slot in order:
        rows_of += [(0, draw(st.integers(0, 2))), (slot, draw(COUNTS))]
    return cases, [*rows_of, (0, 1)]


@settings(max_examples=16, deadline=None)
@given(
    steps(),
    st.integers(1, 140),
    st.integers(4, 600),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([{}, {"capacity": 40}, {"dense_rows": 12}, {"capacity": 9, "dense_rows": 33}]),
)
def test_any_codecs_rows_and_shapes(
    step: tuple[list[Case], list[tuple[int, int]]],
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    cutting: dict[str, int],
) -> None:
    cases, rows_of = step
    check(make_layer(cases, outputs=outputs, inputs=inputs, dtype=dtype), rows_of, **cutting)


@settings(max_examples=3, deadline=None)
@given(st.lists(CASES, min_size=3, max_size=5), st.randoms(use_true_random=False))
def test_many_tenants_of_mixed_codecs(cases: list[Case], random: Any) -> None:
    """Sixty slots beyond those of the first table, of which a step has some, in any order."""
    base_NK = 0.2 * torch.randn(24, 96)
    layer = make_layer([], outputs=24, inputs=96, dtype=torch.float32)
    layer.base_NK.copy_(base_NK)
    encs = [encode(base_NK, *case, seed=i) for i, case in enumerate(cases)]
    for slot in random.sample(range(1, 130), 60):
        layer.operands[slot] = encs[slot % len(encs)]
        assert layer.grouped.attach(slot, layer.operands[slot])
    for slot in random.sample(sorted(layer.operands), 20):  # gone, and another has its place
        layer.grouped.detach(slot)
        layer.operands[slot] = encs[random.randrange(len(encs))]
        layer.grouped.attach(slot, layer.operands[slot])
    present = random.sample(sorted(layer.operands), 40)
    check(layer, [(slot, random.choice([0, 1, 1, 2, 5])) for slot in present], capacity=64)


@settings(max_examples=5, deadline=None)
@given(steps(), st.integers(1, 90), st.integers(4, 900))
def test_each_segment_is_the_same_alone(
    step: tuple[list[Case], list[tuple[int, int]]], outputs: int, inputs: int
) -> None:
    """Bit for bit, whatever the others are."""
    cases, rows_of = step
    layer = make_layer(cases, outputs=outputs, inputs=inputs, dtype=torch.float32)
    found = segments(rows_of)
    x = torch.randn(sum(rows for _, rows in rows_of), inputs, device=DEVICE)
    among = F.linear(x, layer.base_NK)
    before = among.clone()
    layer.grouped.apply(among, x, cut(found, DEVICE, dense_rows=DENSE_ROWS))
    for segment in found:
        rows = slice(segment.start, segment.start + 1)
        assert torch.equal(among[rows], alone(layer, segment.slot, before[rows], x[rows]))


def alone(layer: Layer, slot: int, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = base.clone()
    layer.grouped.apply(y, x, cut([Segment(slot, 0, 1)], DEVICE))
    return y
