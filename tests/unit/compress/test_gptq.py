"""Error feedback under a Hessian: better than rounding, the same every time, never NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.int import IntParams
from deltaserve.artifact.codecs.nm24 import Nm24Params
from deltaserve.compress.gptq import encode_int, encode_nm24, two_of_four
from deltaserve.compress.hessian import Hessian, output_error

SETTINGS = [
    ("int", {"bits": 1, "group_size": 0}),
    ("int", {"bits": 1, "group_size": 16}),
    ("int", {"bits": 2, "group_size": 24}),
    ("int", {"bits": 3, "scale_axis": "row"}),
    ("int", {"bits": 1, "scale_axis": "column"}),
    ("int", {"bits": 1, "scale_axis": "tensor"}),
    ("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    ("nm24", {"bits": 2, "group_size": 0}),
    ("nm24", {"bits": 4, "group_size": 16}),
]


def inputs(tokens, columns, seed=0, rank=None):
    """Correlated inputs of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(99)
    mix = torch.randn(rank or columns, columns, generator=generator)
    mix *= torch.logspace(0, -2, rank or columns)[:, None]
    generator.manual_seed(seed)
    return torch.randn(tokens, rank or columns, generator=generator) @ mix


def hessian_of(x_TK):
    hessian = Hessian(x_TK.shape[1])
    for some in x_TK.split(100):
        hessian.add(some)
    return hessian


def encode(codec, params, delta, hessian):
    base = torch.zeros_like(delta)
    if codec == "nm24":
        return encode_nm24(delta, base, Nm24Params(**params), hessian)
    return encode_int(delta, base, IntParams(**params), hessian)


def stored(enc):
    codec = get_codec(enc.codec)
    layout = codec.layout(enc.params, enc.shape, enc.dtype)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in enc.tensors.items()} == layout
    codec.check(enc)
    return codec.delta(enc)


@pytest.mark.parametrize(("codec", "params"), SETTINGS)
def test_unseen_inputs_see_less_error_than_with_rounding_of_the_same_size(codec, params):
    delta = 0.01 * torch.randn(48, 72, generator=torch.Generator().manual_seed(1))
    plain = get_codec(codec).encode(delta, torch.zeros_like(delta), **params)
    ours = encode(codec, params, delta, hessian_of(inputs(2000, 72)))
    assert ours.num_bytes == plain.num_bytes
    assert ours.params == plain.params
    unseen = inputs(500, 72, seed=5)
    errors = [float((unseen @ (delta - stored(e)).T).square().sum()) for e in (ours, plain)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize(("codec", "params"), SETTINGS)
@pytest.mark.parametrize("kind", ["none", "dead", "few", "rank", "huge", "tiny"])
def test_any_hessian_gives_finite_codes_that_beat_or_equal_rounding(codec, params, kind):
    x_TK = inputs(300, 72)
    if kind == "dead":
        x_TK[:, ::3] = 0
    x_TK = {
        "none": x_TK[:0],
        "few": x_TK[:2],
        "rank": inputs(300, 72, rank=3),
        "huge": x_TK * 1e8,
        "tiny": x_TK * 1e-12,
    }.get(kind, x_TK)
    hessian = hessian_of(x_TK)
    delta = torch.randn(20, 72, generator=torch.Generator().manual_seed(2))
    plain = get_codec(codec).encode(delta, torch.zeros_like(delta), **params)
    h_KK = hessian.damped()
    found = stored(encode(codec, params, delta, hessian))
    assert torch.isfinite(found).all()
    mine, theirs = (output_error(delta - d, h_KK).sum() for d in (found, stored(plain)))
    assert float(mine) <= float(theirs) * 1.001


@pytest.mark.parametrize(("codec", "params"), SETTINGS)
def test_a_delta_of_zeros_stays_zero_also_in_single_rows(codec, params):
    delta = torch.randn(6, 72, generator=torch.Generator().manual_seed(3))
    delta[2] = 0
    hessian = hessian_of(inputs(300, 72))
    if params.get("scale_axis") not in ("column", "tensor"):  # there rows share their scales
        assert bool((stored(encode(codec, params, delta, hessian))[2] == 0).all())
    assert bool((stored(encode(codec, params, 0 * delta, hessian)) == 0).all())


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from((0, 5, 16)), st.sampled_from((1, 2)))
@settings(max_examples=40, deadline=None)
def test_shapes_and_short_groups(rows, columns, group, bits):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    delta = torch.randn(rows, columns, generator=generator)
    hessian = hessian_of(torch.randn(30, columns, generator=generator))
    params = {"bits": bits, "group_size": group}
    first, second = (encode("int", params, delta, hessian) for _ in range(2))
    assert torch.equal(stored(first), stored(second))
    for part, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[part])


def test_the_factor_is_that_of_the_inverse():
    hessian = hessian_of(inputs(400, 12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    upper = hessian.inverse_factor(order)
    h_KK = hessian.damped()[order][:, order]
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ h_KK, torch.eye(12), atol=1e-3)


def test_two_of_four_are_the_largest():
    size = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 9.0]])
    mask = two_of_four(size)
    assert mask[0, :4].tolist() == [True, False, True, False]
    assert mask.unflatten(1, (-1, 4)).sum(2).tolist() == [[2, 2]]
    assert bool(mask[0, 7])
