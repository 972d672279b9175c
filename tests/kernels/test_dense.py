"""Packed weights give what plain ones give, whatever the shapes; nothing of them is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.engine.layers import DeltaHead, DeltaLinear
from deltaserve.engine.model import load_base, make_delta_aware
from deltaserve.engine.projections import part_of
from deltaserve.engine.routing import StepContext
from deltaserve.kernels import dense
from tests.families import make_base

SIZES = st.integers(1, 130)
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if dense.has_arithmetic(dtype)]


@given(
    rows=st.integers(0, 70), outputs=SIZES, inputs=SIZES, bias=st.booleans(), wider=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_with_a_packed_weight(rows, outputs, inputs, bias, wider, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x_TK = torch.randn(rows, inputs + 3 * wider, generator=generator).to(dtype)[:, :inputs]
    bias_N = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    packed = dense.pack(weight_NK)
    assert torch.equal(dense.unpack(packed), weight_NK)
    assert (packed.shape, packed.dtype, packed.nbytes) == (
        weight_NK.shape, weight_NK.dtype, weight_NK.nbytes,
    )  # fmt: skip
    y_TN = dense.linear(x_TK, packed, bias_N)
    exact = F.linear(x_TK.double(), weight_NK.double(), None if bias_N is None else bias_N.double())
    sizes = F.linear(x_TK.double().abs(), weight_NK.double().abs())  # of what is summed
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * sizes
    assert y_TN.dtype == dtype
    assert bool(((y_TN.double() - exact).abs() <= 4 * rounding).all())


@given(rows=st.integers(0, 100_000))
def test_a_few_rows_more_are_computed(rows):
    assert rows <= dense.padded(rows) <= max(16, rows + rows // 8)
    assert dense.padded(dense.padded(rows)) == dense.padded(rows)


def test_there_are_few_numbers_of_rows():
    assert len({dense.padded(rows) for rows in range(1, 2049)}) == 16 + 7 * 8


GROWTH = """
import psutil, torch
from deltaserve.kernels import dense

dtype = torch.bfloat16 if dense.has_arithmetic(torch.bfloat16) else torch.float32
plain = [torch.ones(16 * n, 64, dtype=dtype) for n in range(1, 5)]
weights = plain + [dense.pack(weight) for weight in plain]

def run(rows):
    for weight in weights:
        dense.linear(torch.ones(rows, 64, dtype=dtype), weight)

for rows in {dense.padded(rows) for rows in range(1, 401)}:
    run(rows)
before = psutil.Process().memory_info().rss
for rows in range(1, 401):
    run(rows)
print(psutil.Process().memory_info().rss - before)
"""


def test_memory_does_not_grow_with_every_number_of_rows():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True)
    assert int(done.stdout) < 40e6, done.stderr


def test_what_cannot_be_packed_is_multiplied_as_it_is():
    weight_NK = torch.randn(6, 5, dtype=torch.float64)
    x_TK = torch.randn(2, 5, dtype=torch.float64)
    assert not dense.packs(weight_NK)
    assert torch.equal(dense.linear(x_TK, weight_NK), x_TK @ weight_NK.T)
    assert not dense.packs(dense.pack(torch.randn(6, 5)))


@pytest.mark.parametrize("family", ["llama-tied", "llama"])
def test_each_weight_of_the_base_is_in_memory_once(family: str, tmp_path: Path):
    base = Checkpoint.open(make_base(family, tmp_path / "base"))
    model = load_base(base, torch.bfloat16, "cpu")
    packs = dense.packs(torch.empty(1, 1, dtype=torch.bfloat16))
    modules = make_delta_aware(model, base.architecture, StepContext())
    layers = {part_of(module)[0] for module in modules.values()}
    linears = [layer for layer in layers if isinstance(layer, DeltaLinear)]
    assert linears
    for layer in linears:
        tied = family == "llama-tied" and isinstance(layer, DeltaHead)
        assert layer.base_NK.is_mkldnn is (packs and not tied)
        assert layer.inner.weight.shape == layer.base_NK.shape
        stored = layer.inner.weight.untyped_storage().nbytes()
        plain = tied or not packs
        assert stored == (layer.base_NK.nbytes if plain else torch.bfloat16.itemsize)
