"""Every codec gives back what it promises, over any shape, dtype and magnitude it accepts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.codecs import CODECS, get_codec
from deltaserve.artifact.codecs.base import difference
from deltaserve.artifact.packing import WIDTHS, pack_bits, packed_size, unpack_bits
from deltaserve.errors import CodecError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1e-15, 1e-7, 1e-3, 1.0, 1e3)
quick = settings(max_examples=60, deadline=None)


@st.composite
def pairs(draw, min_dims=1, max_dims=3, max_side=37, grow=False):
    """(fine-tune, base): random values, some exact zeros in the difference, zero rows."""
    shape = draw(st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims))
    dtype = draw(st.sampled_from(FLOATS))
    scale = draw(st.sampled_from(SCALES if dtype != torch.float16 else SCALES[2:]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base_shape = list(shape)
    if grow:
        base_shape[0] = draw(st.integers(1, max_side))
    base = torch.randn(base_shape, generator=gen) * draw(st.sampled_from((0.0, scale, 3 * scale)))
    common = min(shape[0], base_shape[0])
    tensor = torch.randn(shape, generator=gen) * scale
    tensor[:common] += base[:common]
    keep = torch.rand(shape[0], generator=gen) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    keep[common:] = False
    base = base.to(dtype)
    tensor = tensor.to(dtype)
    tensor[keep] = base[: shape[0]][keep[: base_shape[0]]] if grow else base[keep]
    return tensor, base


def int_params():
    return st.fixed_dictionaries(
        {
            "bits": st.sampled_from(WIDTHS),
            "group_size": st.sampled_from((0, 1, 3, 4, 16, 64)),
            "scale_axis": st.sampled_from(("group", "row", "column", "tensor")),
            "symmetric": st.booleans(),
            "planes": st.integers(1, 3),
            "clip": st.sampled_from(("mse", "absmax")),
        }
    )


def check_layout(enc):
    """The parts are those that the params announce, and the byte count is theirs."""
    codec = get_codec(enc.codec)
    layout = codec.layout(enc.params, enc.shape, enc.dtype)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in enc.tensors.items()} == layout
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    assert enc.num_bytes == size
    codec.check(enc)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def round_trip(name, tensor, base, **params):
    codec = CODECS[name]
    enc = codec.encode(tensor, base, **params)
    check_layout(enc)
    decoded = codec.decode(enc, base)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == tensor.dtype
    return enc, decoded


@given(st.data())
@quick
def test_packing_is_an_identity_of_the_exact_size(data):
    width = data.draw(st.sampled_from(WIDTHS))
    count = data.draw(st.integers(1, 70))
    values = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count))
    codes = torch.tensor([values, values[::-1]], dtype=torch.uint8)
    packed = pack_bits(codes, width)
    assert packed.shape == (2, packed_size(count, width))
    assert torch.equal(unpack_bits(packed, width, count), codes)
    stream = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert [(stream >> (i * width)) & (2**width - 1) for i in range(count)] == values


@pytest.mark.parametrize("name", ["raw", "rows"])
@given(data=st.data())
@quick
def test_exact_codecs_return_every_bit(name, data):
    tensor, base = data.draw(pairs(grow=name == "rows"))
    _, decoded = round_trip(name, tensor, base)
    assert torch.equal(bits(decoded), bits(tensor))


@given(pairs(grow=True), st.integers(0, 2**32 - 1))
@quick
def test_xor_returns_every_bit_even_of_nan_and_negative_zero(pair, pattern):
    tensor, base = pair
    tensor = tensor.clone()
    signed = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    width = 8 * tensor.element_size()
    value = pattern % 2**width
    tensor.view(signed).view(-1)[0] = value - 2**width if value >= 2 ** (width - 1) else value
    tensor.view(-1)[-1] = -0.0
    enc, decoded = round_trip("xor", tensor, base)
    assert torch.equal(bits(decoded), bits(tensor))
    assert CODECS["xor"].resident_bytes(enc) == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", ["raw", "xor"])
@given(pair=pairs(max_dims=2, max_side=9))
@quick
def test_any_dtype_and_scalars_for_lossless_codecs(name, pair):
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float64):
        tensor, base = (t.to(dtype) for t in pair)
        _, decoded = round_trip(name, tensor, base)
        assert torch.equal(bits(decoded), bits(tensor))
        scalar, reference = tensor.flatten()[0], base.flatten()[0]
        assert torch.equal(round_trip(name, scalar, reference)[1], scalar)


@given(pairs(grow=True), int_params())
@quick
def test_int_is_within_half_a_step_and_exact_zeros_stay(pair, params):
    tensor, base = pair
    params |= {"planes": 1, "clip": "absmax"}
    enc, _ = round_trip("int", tensor, base, **params)
    exact = (
        difference(tensor, base).flatten(0, -2)
        if tensor.dim() > 1
        else (difference(tensor, base)[None])
    )
    stored = CODECS["int"].delta(enc).view(exact.shape)
    step = _expand_scales(enc, exact.shape)
    # bf16 keeps 8 bits of the scale; the range that it spans moves by as much.
    slack = 2**-8 * 2 ** params["bits"] * step + 2**-22 * exact.abs()
    assert bool(((stored - exact).abs() <= step / 2 + slack).all())
    assert bool((stored[step.expand_as(stored) == 0] == 0).all())
    if not params["symmetric"]:
        assert bool((stored[exact == 0] == 0).all())


def _expand_scales(enc, shape):
    scales = enc.tensors["scales"][0].float()
    size = enc.params["group_size"]
    if enc.params["scale_axis"] == "group" and size:
        scales = scales.repeat_interleave(size, dim=1)[:, : shape[1]]
    return scales.expand(shape)


@given(pairs(), int_params())
@quick
def test_searched_scales_are_never_worse_than_absmax(pair, params):
    tensor, base = pair
    exact = difference(tensor, base).double()
    params |= {"planes": 1}
    errors = {}
    for clip in ("mse", "absmax"):
        enc, _ = round_trip("int", tensor, base, **(params | {"clip": clip}))
        errors[clip] = float((CODECS["int"].delta(enc).double() - exact).square().sum())
    assert errors["mse"] <= errors["absmax"] * (1 + 1e-4)


@given(pairs(), int_params())
@quick
def test_further_planes_only_help(pair, params):
    tensor, base = pair
    exact = difference(tensor, base).double()
    errors = []
    for planes in (1, 2, 3):
        enc, _ = round_trip("int", tensor, base, **(params | {"planes": planes, "clip": "mse"}))
        errors.append(float((CODECS["int"].delta(enc).double() - exact).square().sum()))
    floor = 1e-12 * float(exact.square().sum())
    assert errors[1] <= errors[0] * (1 + 1e-4) + floor
    assert errors[2] <= errors[1] * (1 + 1e-4) + floor


@given(pairs(grow=True), st.sampled_from(WIDTHS), st.sampled_from((0, 4, 8, 64)))
@quick
def test_nm24_keeps_the_two_largest_of_four(pair, width, group):
    tensor, base = pair
    enc, _ = round_trip("nm24", tensor, base, bits=width, group_size=group)
    columns = tensor.shape[-1]
    exact = difference(tensor, base).reshape(-1, columns)
    stored = CODECS["nm24"].delta(enc).reshape(-1, columns)
    for start in range(0, columns, 4):
        mine, kept = exact[:, start : start + 4], stored[:, start : start + 4] != 0
        assert int(kept.sum(1).max()) <= 2
        dropped = torch.where(kept, 0.0, mine.abs()).amax(1)
        # What was dropped is no larger than what was kept, zero scales aside.
        least = torch.where(kept, mine.abs(), math.inf).amin(1)
        full = kept.sum(1) == min(2, mine.shape[1])
        assert bool((dropped[full] <= least[full]).all())


@given(pairs(), st.integers(1, 40))
@quick
def test_lowrank_of_full_rank_is_close_and_of_low_rank_is_bounded(pair, rank):
    tensor, base = (t.float() for t in pair)
    enc, _ = round_trip("lowrank", tensor, base, rank=rank)
    columns = tensor.shape[-1]
    exact = difference(tensor, base).reshape(-1, columns).double()
    size = float(exact.abs().max()) or 1.0
    left = torch.linalg.svdvals(exact / size)[enc.params["rank"] :].square().sum().sqrt()
    wrong = (CODECS["lowrank"].delta(enc).reshape(-1, columns) - exact).norm() / size
    assert float(wrong) <= float(left) + 1e-4 * float((exact / size).norm())


@given(pairs(grow=True))
@quick
def test_nf4_is_within_half_of_the_widest_gap(pair):
    tensor, base = pair
    enc, _ = round_trip("nf4", tensor, base)
    exact = difference(tensor, base).flatten()
    wrong = (CODECS["nf4"].delta(enc).flatten() - exact).abs()
    largest = enc.tensors["absmax"].repeat_interleave(64)[: len(exact)]
    assert bool((wrong <= 0.153 * largest + 1e-30).all())


@given(pairs(min_dims=2, grow=True), st.sampled_from(WIDTHS))
@quick
def test_quantised_rows_leave_the_others_alone(pair, width):
    tensor, base = pair
    enc, decoded = round_trip("rows", tensor, base, bits=width)
    untouched = torch.ones(len(tensor), dtype=torch.bool)
    untouched[enc.tensors["index"].long()] = False
    assert torch.equal(bits(decoded[untouched]), bits(tensor[untouched]))


@given(pairs(min_dims=2))
@quick
def test_sparse_keeps_every_value_that_differs_and_nothing_else(pair):
    tensor, base = pair
    enc, _ = round_trip("sparse", tensor, base)
    exact = difference(tensor, base)
    assert enc.params["count"] == int((exact.reshape(-1, tensor.shape[-1]) != 0).sum())
    assert torch.equal(CODECS["sparse"].delta(enc), exact.to(tensor.dtype).float())


@given(pairs(min_dims=2), st.sampled_from((1, 2, 4)), st.sampled_from((1, 3)))
@quick
def test_a_sum_is_the_sum_of_its_terms_and_each_mends_the_ones_before(pair, width, rank):
    tensor, base = pair
    terms = [{"codec": "int", "bits": width, "group_size": 4}, {"codec": "lowrank", "rank": rank}]
    enc, _ = round_trip("sum", tensor, base, terms=terms)
    codec, exact = CODECS["sum"], difference(tensor, base)
    parts = [get_codec(term.codec).delta(term) for term in codec.terms(enc)]
    assert torch.equal(codec.delta(enc), (parts[0] + parts[1]).view(exact.shape))
    exact = exact.reshape(parts[0].shape)
    first = (exact - parts[0]).norm()
    # The factors are stored in the parameter's dtype.
    assert (exact - parts[0] - parts[1]).norm() <= first * 1.02 + 1e-6 * exact.norm()


# What a codec needs to be told; the others need nothing.
SETTINGS = {"sum": {"terms": [{"codec": "int"}]}}


@pytest.mark.parametrize("name", [n for n in CODECS if n != "xor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name, bad):
    tensor = torch.zeros(4, 8)
    tensor[2, 3] = bad
    with pytest.raises(CodecError, match="NaN"):
        CODECS[name].encode(tensor, torch.zeros(4, 8), **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", ["int", "nm24", "lowrank", "nf4"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_shapes_without_values_are_refused(name, shape):
    with pytest.raises(CodecError, match="raw"):
        CODECS[name].encode(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("name", ["raw", "xor", "rows"])
def test_empty_tensors_round_trip_exactly(name):
    _, decoded = round_trip(name, torch.zeros(0, 3), torch.zeros(0, 3))
    assert decoded.shape == (0, 3)


@pytest.mark.parametrize("name", [n for n in CODECS if n != "raw"])
def test_a_base_of_another_width_is_refused(name):
    with pytest.raises(CodecError, match="align"):
        CODECS[name].encode(torch.ones(4, 8), torch.ones(4, 7), **SETTINGS.get(name, {}))
