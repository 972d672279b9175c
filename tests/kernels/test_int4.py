"""``int`` deltas in the layout of torch's 4-bit matmul: the same numbers as the codec's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import delta_matmul, int4


def encode(rows: int, columns: int, **params: object) -> Encoded:
    return get_codec("int").encode(torch.randn(rows, columns), None, **params)


def apply(encs: list[Encoded], x: torch.Tensor) -> torch.Tensor:
    rows = sum(enc.shape[0] for enc in encs)
    y = torch.zeros(len(x), rows, dtype=x.dtype)
    for plane in int4.pack(encs):
        assert plane.shape == (rows, x.shape[1])
        delta_matmul(y, x, plane)
    return y


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3),
    axis=st.sampled_from(["group", "row", "tensor"]),
    group_size=st.sampled_from([0, 32, 64, 96]),
    planes=st.integers(1, 2),
    groups=st.integers(1, 4),
    tokens=st.sampled_from([1, 3, 40]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_matrices_of_one_input_are_applied_as_the_codec_decodes_them(
    bits: list[int],
    axis: str,
    group_size: int,
    planes: int,
    groups: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = 32 * groups
    params = {"scale_axis": axis, "planes": planes}
    if axis == "group":
        params["group_size"] = group_size
    encs = [encode(16 * (1 + i), columns, bits=b, **params) for i, b in enumerate(bits)]
    assert int4.fusable(encs)
    x = torch.randn(tokens, columns).to(dtype)
    delta = torch.cat([get_codec("int").delta(enc) for enc in encs]).double()
    expected = x.double() @ delta.T
    # Inputs and, for each plane, the sum are rounded once, relative to the size of the terms.
    terms = x.double().abs() @ delta.abs().T
    eps = torch.finfo(int4.COMPUTED_IN).eps
    assert ((apply(encs, x).double() - expected).abs() <= 3 * terms * eps).all()


def test_nothing_is_rounded_by_the_layout() -> None:
    """One input at a time picks single weights: each must be the codec's very number."""
    for bits in (1, 2, 3, 4):
        enc = encode(32, 64, bits=bits, group_size=32)
        weights = apply([enc], torch.eye(64)).T
        assert torch.equal(weights, get_codec("int").delta(enc).bfloat16().float())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3),
    size=st.sampled_from([0, 32, 64]),
    blocks=st.integers(1, 3),
    groups=st.integers(1, 4),
    unpacked=st.sampled_from([1, 5000, int4.UNPACKED]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_difference_is_added_to_a_plain_weight(
    bits: list[int],
    size: int,
    blocks: int,
    groups: int,
    unpacked: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    encs = [encode(64 * blocks, 64 * groups, bits=b, group_size=size) for b in bits]
    (packed,) = int4.pack(encs)
    delta_NK = torch.cat([get_codec("int").delta(enc) for enc in encs])
    base_NK = torch.randn(delta_NK.shape).to(dtype)
    weight_NK = base_NK.clone()
    if not int4.unpacks(packed):
        pytest.skip("this processor's operator has another order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int4, "UNPACKED", unpacked)
        int4.add_to(weight_NK, packed)
    exact = base_NK.double() + delta_NK.double()
    close = torch.finfo(dtype).eps * exact.abs() + 1e-6 * delta_NK.abs()  # one rounding of the sum
    assert bool(((weight_NK.double() - exact).abs() <= close).all())


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_order_of_the_weights_is_found_on_each_processor(capability: str) -> None:
    """It is the operator's own: what ``unpacks`` says yes to must be what it multiplies by."""
    script = """
import torch
from deltaserve.artifact.codecs import get_codec
from deltaserve.kernels.delta_matmul import delta_matmul, int4

for bits in (2, 4):
    (enc,) = int4.pack([get_codec("int").encode(torch.randn(128, 64), None, bits=bits)])
    if int4.unpacks(enc):
        dense, product = torch.zeros(128, 64), torch.zeros(64, 128)
        int4.add_to(dense, enc)
        delta_matmul(product, torch.eye(64), enc)
        print(torch.equal(dense.bfloat16(), product.T.bfloat16()))
    else:
        print("another order")
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split("\n")[:2] in (["True"] * 2, ["another order"] * 2), done.stderr


@pytest.mark.parametrize(
    ("rows", "columns", "params"),
    [
        (24, 64, {"bits": 2}),  # rows no multiple of 16
        (32, 48, {"bits": 2, "group_size": 16}),  # groups smaller than the operator's
        (32, 40, {"bits": 2, "group_size": 0}),
        (32, 64, {"bits": 8}),
        (32, 64, {"bits": 2, "symmetric": False}),
        (32, 64, {"bits": 2, "scale_axis": "column"}),
    ],
)
def test_what_the_operator_cannot_take_is_left_to_others(
    rows: int, columns: int, params: dict[str, object]
) -> None:
    assert not int4.supports(encode(rows, columns, **params))


def test_matrices_of_different_planes_stay_apart() -> None:
    encs = [encode(16, 64, bits=1, planes=planes) for planes in (1, 2)]
    assert all(int4.supports(enc) for enc in encs)
    assert not int4.fusable(encs)


@pytest.mark.parametrize("rows", [(16,), (512,), (528, 1040), (80, 432, 1056), (2048, 16)])
def test_matrices_of_many_rows_are_converted_in_blocks(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    encs = [encode(count, 64, bits=2 + 2 * (i % 2), group_size=32) for i, count in enumerate(rows)]
    rests: list[None] = []
    (blocks,) = int4.pack(encs, lambda: rests.append(None))
    assert len(rests) == -(-sum(rows) // int4.BLOCK_ROWS)
    monkeypatch.setattr(int4, "BLOCK_ROWS", sum(rows))
    (whole,) = int4.pack(encs)
    assert torch.equal(blocks.tensors["packed"], whole.tensors["packed"])
    assert torch.equal(blocks.tensors["scales"], whole.tensors["scales"])
