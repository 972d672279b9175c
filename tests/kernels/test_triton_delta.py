"""The grouped kernels against the reference: on a GPU, or in Triton's interpreter without one.

The interpreter's bfloat16 product is wrong, so mixes run in float32 and float16 here; bfloat16
is checked where nothing is multiplied, and in ``tests/gpu``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import GroupedDeltas, Segment, cut, dispatch, launch
from deltaserve.kernels.delta_matmul.grouped import TABLE_STEP
from deltaserve.kernels.delta_matmul.layout import MAX_INPUTS, MAX_OUTPUTS, lay_out, refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PACKED: list[tuple[str, dict[str, Any]]] = [
    ("int", {"bits": 1, "scale_axis": "tensor"}),
    ("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    ("int", {"bits": 1, "group_size": 128}),
    ("int", {"bits": 2, "group_size": 16}),
    ("int", {"bits": 2, "group_size": 64, "planes": 3}),
    ("int", {"bits": 4, "group_size": 96}),
    ("int", {"bits": 4, "group_size": 0}),
    ("nm24", {"bits": 2, "group_size": 64}),
    ("nm24", {"bits": 4, "group_size": 128}),
    ("nm24", {"bits": 4, "group_size": 0}),
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *PACKED,
    ("lowrank", {"rank": 4}),
    ("lowrank", {"rank": 33}),
    ("rows", {}),
    ("rows", {"bits": 4, "group_size": 32}),
]


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)


@dataclass
class Layer:
    """A base projection and the operands of some slots."""

    grouped: GroupedDeltas
    base_NK: torch.Tensor
    operands: dict[int, Encoded]


def encode(
    base_NK: torch.Tensor, codec: str, params: dict[str, Any], seed: int, *, added: int = 0
) -> Encoded:
    """A fine-tune of the base in which every second row changed, ``added`` rows longer."""
    torch.manual_seed(seed)
    tuned = torch.cat([base_NK, torch.randn(added, base_NK.shape[1], dtype=base_NK.dtype)])
    tuned[::2] += 0.1 * torch.randn_like(tuned[::2])
    enc = get_codec(codec).encode(tuned, base_NK, **params)
    parts = {name: part.to(DEVICE) for name, part in enc.tensors.items()}
    if codec in ("lowrank", "rows"):
        # As the engine holds them: all floats in the dtype of the activations.
        floats = {name for name, part in parts.items() if part.is_floating_point()}
        parts |= {name: parts[name].to(base_NK.dtype) for name in floats}
    return replace(enc, tensors=parts)


def make_layer(
    cases: list[tuple[str, dict[str, Any]]], *, outputs: int, inputs: int, dtype: torch.dtype
) -> Layer:
    torch.manual_seed(outputs + inputs)
    base_NK = (0.2 * torch.randn(outputs, inputs)).to(dtype)
    grouped = GroupedDeltas("proj.weight", base_NK.to(DEVICE), False)
    operands = {slot: encode(base_NK, *case, seed=slot) for slot, case in enumerate(cases, start=1)}
    for slot, enc in operands.items():
        assert grouped.attach(slot, enc)
    return Layer(grouped, base_NK.to(DEVICE), operands)


def segments(rows_of: list[tuple[int, int]]) -> list[Segment]:
    """(slot, rows) in order -> segments; slot 0 is the base, which makes none."""
    found, start = [], 0
    for slot, rows in rows_of:
        if slot and rows:
            found.append(Segment(slot, start, start + rows))
        start += rows
    return found


def check(layer: Layer, rows_of: list[tuple[int, int]], **cutting: int) -> None:
    """The grouped kernels against base and codec in float64, bounded by the dtype's rounding."""
    dtype = layer.base_NK.dtype
    num_rows = sum(rows for _, rows in rows_of)
    x = (torch.randn(num_rows, layer.base_NK.shape[1])).to(DEVICE, dtype)
    y = F.linear(x, layer.base_NK)
    expected = y.double()
    found = segments(rows_of)
    for segment in found:
        rows = slice(segment.start, segment.end)
        expected[rows] = wanted(expected[rows], x[rows], layer.operands[segment.slot])
    layer.grouped.apply(y, x, cut(found, DEVICE, **cutting))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance / 4)


def wanted(y: torch.Tensor, x: torch.Tensor, enc: Encoded) -> torch.Tensor:
    if enc.codec != "rows":
        delta = get_codec(enc.codec).delta(enc)  # type: ignore[attr-defined]
        return y + F.linear(x.double(), delta.double())
    index, values, additive = get_codec("rows").rows(enc)  # type: ignore[attr-defined]
    part = F.linear(x.double(), values.double())
    return y.index_add(1, index, part) if additive else y.index_copy(1, index, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("codec", "params"), CASES)
def test_one_delta(codec: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    """Neither inputs nor outputs nor rows fill a block; one row alone as well."""
    layer = make_layer([(codec, params)], outputs=83, inputs=605, dtype=dtype)
    check(layer, [(0, 3), (1, 1)])
    check(layer, [(1, 21), (0, 2)], capacity=5)


def test_all_kinds_share_a_step() -> None:
    layer = make_layer(CASES, outputs=40, inputs=130, dtype=torch.float32)
    check(layer, [(0, 2), *((slot, slot % 4) for slot in layer.operands)])


def test_many_tenants() -> None:
    cases = [("int", {"bits": bits, "group_size": 64}) for bits in (1, 2, 4)] * 11
    check(
        make_layer(cases, outputs=24, inputs=96, dtype=torch.float32),
        [(slot, 1 + slot % 2) for slot in range(1, 34)],
    )


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(CASES), st.integers(0, 18)), min_size=1, max_size=5),
    st.integers(1, 70),
    st.sampled_from([20, 64, 100, 513]),
    st.integers(0, 2),
)
def test_any_mix(
    mix: list[tuple[tuple[str, dict[str, Any]], int]], outputs: int, inputs: int, idle: int
) -> None:
    layer = make_layer(
        [case for case, _ in mix], outputs=outputs, inputs=inputs, dtype=torch.float32
    )
    rows_of = [(0, 1), *((slot, rows) for slot, (_, rows) in enumerate(mix, start=1))]
    check(layer, rows_of, capacity=idle)


@pytest.mark.parametrize(("codec", "params"), [*PACKED, *CASES[-2:]])
def test_long_segments_are_dequantised(codec: str, params: dict[str, Any]) -> None:
    layer = make_layer([(codec, params)] * 2, outputs=40, inputs=130, dtype=torch.float32)
    check(layer, [(1, 7), (0, 1), (2, 5)], dense_rows=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("codec", "params"), PACKED)
def test_dequantised_is_the_codecs_difference(
    codec: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    enc = encode(torch.randn(30, 530), codec, params, seed=3)
    found = launch.dequantised(lay_out(enc), 530, dtype)
    expected = get_codec(codec).delta(enc)  # type: ignore[attr-defined]
    # The interpreter cuts off where a GPU rounds to bfloat16.
    size = float(expected.abs().max()) * torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, atol=size, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: alone, among rows of its own delta, and among other deltas."""
    layer = make_layer(
        [("int", {"bits": 2}), ("nm24", {}), ("lowrank", {"rank": 8})],
        outputs=70,
        inputs=1100,
        dtype=torch.float32,
    )
    x, base = torch.randn(9, 1100, device=DEVICE), torch.randn(9, 70, device=DEVICE)
    for slot in layer.operands:
        alone, among = base[4:5].clone(), base.clone()
        layer.grouped.apply(alone, x[4:5], cut([Segment(slot, 0, 1)], DEVICE))
        other = slot % 3 + 1
        layer.grouped.apply(
            among, x, cut([Segment(other, 0, 2), Segment(slot, 2, 9)], DEVICE, capacity=4)
        )
        assert torch.equal(among[4:5], alone)


def test_a_wider_vocabulary_fills_its_own_columns() -> None:
    """The head's output is as wide as the widest vocabulary of the step."""
    base = torch.randn(20, 64)
    grouped = GroupedDeltas("lm_head.weight", base.to(DEVICE), False)
    enc = encode(base, "int", {"bits": 4}, seed=1, added=3)
    grouped.attach(1, enc)
    grouped.attach(2, encode(base, "int", {"bits": 4}, seed=2))
    x, y = torch.randn(4, 64, device=DEVICE), torch.zeros(4, 23, device=DEVICE)
    grouped.apply(y, x, cut([Segment(1, 0, 2), Segment(2, 2, 4)], DEVICE))
    expected = wanted(torch.zeros(2, 23, device=DEVICE).double(), x[:2], enc)
    torch.testing.assert_close(y[:2].double(), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(y[2:, 20:], torch.zeros(2, 3, device=DEVICE))


def test_detached_operands_do_nothing() -> None:
    layer = make_layer([("int", {"bits": 4})] * 2, outputs=20, inputs=64, dtype=torch.float32)
    layer.grouped.detach(1)
    x, y = torch.randn(2, 64, device=DEVICE), torch.zeros(2, 20, device=DEVICE)
    layer.grouped.apply(y, x, cut([Segment(1, 0, 1), Segment(2, 1, 2)], DEVICE))
    assert not y[0].any()
    assert y[1].any()
    layer.grouped.detach(2)
    assert not layer.grouped


@pytest.mark.parametrize(
    ("codec", "params", "reason"),
    [
        ("int", {"bits": 4, "symmetric": False}, "asymmetric"),
        ("int", {"bits": 2, "scale_axis": "column"}, "per column"),
        ("int", {"bits": 2, "group_size": 24}, "group size 24"),
        ("nm24", {"bits": 4, "group_size": 32}, "group size 32"),
        ("nm24", {"bits": 8}, "8 bits"),
        ("rows", {"bits": 4, "group_size": 24}, "group size 24"),
    ],
)
def test_what_no_kernel_takes_is_named_once(
    codec: str, params: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = torch.randn(12, 64)
    dispatch._warned.cache_clear()
    enc = encode(base, codec, params, seed=1)
    grouped = GroupedDeltas("layers.3.proj.weight", base.to(DEVICE), False)
    assert not grouped.attach(1, enc)
    assert not grouped.attach(2, enc)
    assert reason in str(refusal(enc, torch.float32))
    (record,) = caplog.records
    assert "layers.3.proj.weight [12, 64]" in record.message
    assert reason in record.message


@pytest.mark.parametrize(
    ("codec", "shape", "planes", "reason"),
    [
        ("int", (MAX_OUTPUTS + 1, 64), 1, "outputs"),
        ("nm24", (64, MAX_INPUTS + 64), 1, "inputs"),
        ("lowrank", (MAX_OUTPUTS + 1, 64), 1, "outputs"),
        ("int", (128_256, 16_384), 3, "3 plane"),
    ],
)
def test_a_projection_wider_than_a_kernel_takes_is_named_once(
    codec: str,
    shape: tuple[int, int],
    planes: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where indices or grids would overflow, results would be wrong. Without the weights, which
    nobody has."""
    dispatch._warned.cache_clear()
    params = {"bits": 2, "group_size": 64, "scale_axis": "group", "symmetric": True}
    enc = Encoded(codec, params | {"planes": planes}, shape, torch.float32, {})
    for _ in range(2):
        assert not dispatch.takes_kernel("layers.7.wide.weight", enc, torch.float16, bias=False)
    (record,) = caplog.records
    assert f"layers.7.wide.weight {list(shape)}" in record.message
    assert reason in record.message
    fits = replace(enc, shape=(MAX_OUTPUTS, 1024), params=params | {"planes": 1})
    if codec != "lowrank":
        assert refusal(fits, torch.float16) is None


def test_tables_of_other_kinds_end_before_a_high_slot() -> None:
    """A table grows with the slots of its own kind; chunks name all slots of the step, also those
    that change nothing in this layer."""
    layer = make_layer(
        [CASES[3], CASES[8], *CASES[-4:]], outputs=30, inputs=96, dtype=torch.float32
    )
    high = max(layer.operands) + 2 * TABLE_STEP
    layer.operands[high] = encode(layer.base_NK.cpu(), *CASES[6], seed=7)
    assert layer.grouped.attach(high, layer.operands[high])
    assert {len(table.scale_S) for table in layer.grouped.tables.values()} > {TABLE_STEP}
    check(layer, [(high, 3), *((slot, 2) for slot in layer.operands if slot != high)])
    x = torch.randn(3, 96, device=DEVICE)
    y = F.linear(x, layer.base_NK)
    before = y.clone()
    layer.grouped.apply(y, x, cut([Segment(9 * TABLE_STEP, 0, 2), Segment(1, 2, 3)], DEVICE))
    assert torch.equal(y[:2], before[:2])
