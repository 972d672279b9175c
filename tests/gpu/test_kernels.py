"""The kernels on a GPU in bfloat16, at the shapes of a real model, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.attention import PagedBatch, paged_attention, reference, write_kv
from deltaserve.kernels.delta_matmul import GroupedDeltas, Segment, cut
from deltaserve.kernels.delta_matmul.synthetic import random_operand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("int", {"bits": 1, "scale_axis": "row"}),
    ("int", {"bits": 1, "group_size": 64, "planes": 2}),
    ("int", {"bits": 2, "group_size": 64}),
    ("int", {"bits": 2, "group_size": 16}),
    ("int", {"bits": 4, "group_size": 64}),
    ("int", {"bits": 4, "scale_axis": "tensor"}),
    ("nm24", {"bits": 2, "group_size": 128}),
    ("nm24", {"bits": 4, "group_size": 64}),
    ("lowrank", {"rank": 16}),
    ("lowrank", {"rank": 200}),
]
SHAPES = [(4096, 4096), (1000, 14336), (6144, 2050)]


def exact(y: torch.Tensor, x: torch.Tensor, enc: Encoded) -> torch.Tensor:
    delta = get_codec(enc.codec).delta(enc)  # type: ignore[attr-defined]
    return y.double() + F.linear(x.double(), delta.double())


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of bfloat16 at the size of the values."""
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_all_kinds_in_one_step(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    base = torch.randn(outputs, inputs, dtype=dtype, device="cuda")
    grouped = GroupedDeltas("proj.weight", base, False)
    operands = [random_operand(*case, outputs, inputs, dtype, "cuda") for case in CASES]
    for slot, operand in enumerate(operands, start=1):
        assert grouped.attach(slot, operand)
    found, start = [], 3
    for slot in range(1, len(operands) + 1):
        rows = (1, 4, 16, 33, 200)[slot % 5]
        found.append(Segment(slot, start, start + rows))
        start += rows
    x = torch.randn(start, inputs, dtype=dtype, device="cuda")
    y = torch.randn(start, outputs, dtype=dtype, device="cuda")
    before = y.clone()
    grouped.apply(y, x, cut(found, "cuda", capacity=40))
    assert torch.equal(y[:3], before[:3])
    for segment in found:
        rows = slice(segment.start, segment.end)
        check(y[rows], exact(before[rows], x[rows], operands[segment.slot - 1]))


@pytest.mark.parametrize(("codec", "params"), CASES)
def test_a_row_does_not_depend_on_its_neighbours(codec: str, params: dict[str, Any]) -> None:
    base = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")
    grouped = GroupedDeltas("proj.weight", base, False)
    for slot in (1, 2):
        operand = random_operand(codec, params, 4096, 4096, torch.bfloat16, "cuda")
        grouped.attach(slot, operand)
    x = torch.randn(40, 4096, dtype=torch.bfloat16, device="cuda")
    alone, among = torch.zeros(2, 40, 4096, dtype=torch.bfloat16, device="cuda").unbind(0)
    grouped.apply(alone[20:21], x[20:21], cut([Segment(1, 0, 1)], "cuda"))
    grouped.apply(among, x, cut([Segment(2, 0, 19), Segment(1, 19, 40)], "cuda"))
    assert torch.equal(alone[20], among[20])


def test_a_step_can_be_captured_as_a_graph() -> None:
    """Nothing on the way waits for the device, and idle chunks keep the grid's shape."""
    base = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda")
    grouped = GroupedDeltas("proj.weight", base, False)
    for slot, case in enumerate(CASES, start=1):
        grouped.attach(slot, random_operand(*case, 512, 1024, torch.bfloat16, "cuda"))
    x = torch.randn(16, 1024, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(16, 512, dtype=torch.bfloat16, device="cuda")
    chunks = cut([Segment(slot, slot, slot + 1) for slot in range(1, 11)], "cuda", capacity=16)
    grouped.apply(y, x, chunks)
    expected, graph = y.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped.apply(y, x, chunks)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, None), (None, 30.0)])
@pytest.mark.parametrize(("heads", "dim"), [((32, 8), 128), ((8, 4), 256), ((14, 2), 64)])
def test_attention(
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Prefill chunks and decode rows of one to several spans, against the reference in float64."""
    new = [1, 1, 100, 1, 7, 1]
    lens = [1, 1500, 100, 513, 700, 40]
    num_heads, num_kv_heads = heads
    blocks = [-(-length // 16) for length in lens]
    order = torch.randperm(sum(blocks), device="cuda")
    table = torch.zeros(len(lens), max(blocks), dtype=torch.long, device="cuda")
    slots, used = [], 0
    for row, (count, length) in enumerate(zip(new, lens, strict=True)):
        table[row, : blocks[row]] = order[used : used + blocks[row]]
        used += blocks[row]
        position = torch.arange(length - count, length, device="cuda")
        slots.append(table[row][position // 16] * 16 + position % 16)
    starts = [sum(new[:row]) for row in range(len(new) + 1)]
    batch = PagedBatch(torch.cat(slots), table, lens, starts, 16)
    cache = torch.randn(2, used * 16, num_kv_heads, dim, dtype=dtype, device="cuda")
    k, v = torch.randn(2, starts[-1], num_kv_heads, dim, dtype=dtype, device="cuda")
    write_kv(cache[0], cache[1], k, v, batch.slot_mapping_T)
    assert torch.equal(cache[0][batch.slot_mapping_T], k)
    q = torch.randn(starts[-1], num_heads, dim, dtype=dtype, device="cuda")
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    out = paged_attention(q, cache[0], cache[1], batch, **options)
    wide = cache.double()
    expected = reference.paged_attention(q.double(), wide[0], wide[1], batch, **options)
    check(out, expected)
