"""Delta matmul and delta embedding against the decoded fine-tune in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_embedding import delta_embedding
from deltaserve.kernels.delta_matmul import cpu, delta_matmul, dispatch, reference

CASES: list[tuple[str, dict[str, Any]]] = [
    ("raw", {}),
    ("rows", {}),
    ("rows", {"bits": 4}),
    ("int", {"bits": 1, "scale_axis": "tensor"}),
    ("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    ("int", {"bits": 2, "group_size": 16}),
    ("int", {"bits": 3, "group_size": 0}),
    ("int", {"bits": 4, "symmetric": False}),
    ("int", {"bits": 8, "scale_axis": "column"}),
    ("nm24", {"bits": 4}),
    ("lowrank", {"rank": 5}),
    ("nf4", {}),
]


def make(
    codec: str, params: dict[str, Any], rows: int, *, base_rows: int, columns: int
) -> tuple[torch.Tensor, Encoded, torch.Tensor]:
    """(base, stored, decoded fine-tune); only every third row changes, and the added ones."""
    torch.manual_seed(rows * columns)
    base = torch.randn(base_rows, columns)
    tuned = torch.cat([base, torch.zeros(max(0, rows - base_rows), columns)])[:rows].clone()
    tuned[::3] += 0.1 * torch.randn_like(tuned[::3])
    tuned[base_rows:] += torch.randn_like(tuned[base_rows:])
    enc = get_codec(codec).encode(tuned, base, **params)
    return base, enc, get_codec(codec).decode(enc, base)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [48, 37, 20])
@pytest.mark.parametrize(("codec", "params"), CASES)
def test_matmul(codec: str, params: dict[str, Any], columns: int, bias: bool) -> None:
    base, enc, tuned = make(codec, params, 21, base_rows=21, columns=columns)
    x, own_bias = torch.randn(5, columns), torch.randn(21) if bias else None
    expected = F.linear(x.double(), tuned.double(), None if own_bias is None else own_bias.double())
    for implementation in (delta_matmul, reference.delta_matmul):
        y = F.linear(x, base, own_bias)
        implementation(y, x, enc, own_bias)
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 4]),
    axis=st.sampled_from(["group", "row", "tensor"]),
    group_size=st.sampled_from([8, 16, 64]),
    planes=st.integers(1, 3),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_table_decodes_as_the_codec_does(
    bits: int, axis: str, group_size: int, planes: int, rows: int, groups: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    delta = torch.randn(rows, group_size * groups)
    params = {"bits": bits, "scale_axis": axis, "group_size": group_size, "planes": planes}
    enc = get_codec("int").encode(delta, None, **params)
    assert cpu.supports(enc)
    decoded = cpu.dequantise(enc, dtype).double()
    exact = get_codec("int").delta(enc).double()
    # Each plane is rounded to the dtype, and so is each sum.
    size = exact.abs().max() * 2 * planes
    assert (decoded - exact).abs().max() <= size * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [30, 36, 24])
@pytest.mark.parametrize(("codec", "params"), CASES)
def test_embedding(codec: str, params: dict[str, Any], rows: int) -> None:
    """Same vocabulary as the base, grown, and cut."""
    base, enc, tuned = make(codec, params, rows, base_rows=30, columns=20)
    ids = torch.tensor([0, rows - 1, 3, 3, 4, 17, 23, 9])
    torch.testing.assert_close(delta_embedding(ids, base, enc), tuned[ids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("codec", "params"), [case for case in CASES if case[0] != "raw"])
def test_operands_stay_on_their_device(codec: str, params: dict[str, Any]) -> None:
    """``meta`` stands for a GPU: any tensor made on the CPU on the way would not mix with it."""
    base, enc, _ = make(codec, params, 21, base_rows=21, columns=48)
    moved = replace(enc, tensors={name: part.to("meta") for name, part in enc.tensors.items()})
    y, x = torch.zeros(5, 21, device="meta"), torch.zeros(5, 48, device="meta")
    delta_matmul(y, x, moved)
    ids = torch.zeros(3, dtype=torch.long, device="meta")
    assert delta_embedding(ids, base.to("meta"), moved).device.type == "meta"


def test_no_changed_rows_leaves_the_base() -> None:
    base = torch.randn(6, 4)
    enc = get_codec("rows").encode(base.clone(), base)
    ids = torch.tensor([5, 0])
    assert torch.equal(delta_embedding(ids, base, enc), base[ids])


def test_a_dtype_without_kernels_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    weight = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for _ in range(2):
        assert not dispatch.has_kernels("layer.weight", weight)  # type: ignore[arg-type]
    assert caplog.text.count("computed by the slow reference") == 1
    assert dispatch.has_kernels(
        "layer.weight",
        SimpleNamespace(is_cuda=True, dtype=torch.bfloat16),
    )  # type: ignore[arg-type]
