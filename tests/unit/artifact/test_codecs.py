"""Single facts about codecs that are worth a name of their own."""

from __future__ import annotations

import pytest
import torch
import zstandard

from deltaserve.artifact.codecs import CODECS, get_codec
from deltaserve.artifact.codecs.lowrank import LowRankCodec
from deltaserve.artifact.codecs.nm24 import kept_columns
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.errors import CodecError


def test_one_bit_per_tensor_is_bitdelta():
    delta = torch.randn(32, 48)
    enc = CODECS["int"].encode(delta, None, bits=1, scale_axis="tensor")
    alpha = delta.abs().mean()
    expected = delta.sign() * alpha
    assert torch.allclose(CODECS["int"].delta(enc), expected, rtol=2**-8)
    assert enc.num_bytes == 32 * 48 // 8 + 2


def test_a_short_last_group_is_scaled_by_its_own_values_only():
    delta = torch.cat((torch.full((1, 64), 8.0), torch.full((1, 3), 0.5)), dim=1)
    enc = CODECS["int"].encode(delta, None, bits=1, group_size=64)
    assert enc.tensors["scales"].flatten().tolist() == [16.0, 1.0]
    assert torch.equal(CODECS["int"].delta(enc), delta)


def test_nm24_scale_ignores_the_padding_column():
    delta = torch.full((2, 5), 0.5)
    enc = CODECS["nm24"].encode(delta, None, bits=1, group_size=4)
    assert enc.tensors["codes"].shape == (2, (kept_columns(5) + 7) // 8)
    assert torch.equal(CODECS["nm24"].delta(enc)[:, 4], delta[:, 4])


@pytest.mark.parametrize("shape", [(64, 64), (3, 50), (7, 9), (1, 1), (5,), (2, 3, 43)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes_bit_for_bit(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(len(shape))
    delta = (torch.randn(shape) * 1e-3).to(dtype)
    delta.view(-1)[:64] = 0.0
    enc = CODECS["nf4"].encode(delta, None)
    packed, state = functional.quantize_4bit(delta, quant_type="nf4", blocksize=64)
    assert torch.equal(enc.tensors["codes"], packed.flatten())
    assert torch.equal(enc.tensors["absmax"], state.absmax)
    theirs = functional.dequantize_4bit(packed, state).float()
    assert torch.equal(CODECS["nf4"].delta(enc).to(dtype).float(), theirs)


def test_lowrank_keeps_given_factors_exactly_in_their_dtype():
    u, v = torch.randn(6, 2), torch.randn(2, 5)
    enc = LowRankCodec().from_factors(u, v, 0.5, (6, 5), torch.bfloat16)
    assert torch.equal(enc.tensors["u"], u)
    assert torch.equal(enc.tensors["v"], v)
    assert torch.allclose(LowRankCodec().delta(enc), 0.5 * (u @ v))
    assert LowRankCodec().decode(enc, torch.zeros(6, 5).bfloat16()).dtype == torch.bfloat16


def test_lowrank_of_a_large_matrix_finds_its_rank():
    torch.manual_seed(0)
    delta = (torch.randn(1100, 4) @ torch.randn(4, 1100)) * 1e-4
    enc = LowRankCodec().encode(delta, None, rank=4)
    error = (LowRankCodec().delta(enc) - delta).norm() / delta.norm()
    assert float(error) < 1e-5


def test_lowrank_refuses_factors_that_do_not_fit():
    with pytest.raises(CodecError, match="do not make shape"):
        LowRankCodec().from_factors(torch.ones(6, 2), torch.ones(3, 5), 1.0, (6, 5), torch.float32)


def test_rows_tells_an_engine_what_to_patch():
    base = torch.randn(10, 4)
    grown = torch.cat((base, torch.randn(2, 4)))
    grown[3] += 1
    index, values, additive = RowsCodec().rows(RowsCodec().encode(grown, base))
    assert (index.tolist(), additive) == ([3, 10, 11], False)
    assert torch.equal(values, grown[index])
    coarse = RowsCodec().encode(grown, base, bits=8)
    index, values, additive = RowsCodec().rows(coarse)
    assert additive
    assert torch.allclose(values[0], grown[3] - base[3], atol=0.02)
    assert torch.allclose(values[1:], grown[10:], atol=0.02)


def test_rows_of_a_cut_vocabulary():
    base = torch.randn(10, 4)
    enc = RowsCodec().encode(base[:7], base)
    assert enc.params["rows"] == 0
    assert torch.equal(RowsCodec().decode(enc, base), base[:7])


def test_xor_needs_equal_dtypes():
    with pytest.raises(CodecError, match="equal dtypes"):
        CODECS["xor"].encode(torch.ones(3).half(), torch.ones(3))


@pytest.mark.parametrize("changed", [0.0005, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("size", [0.002, 0.3])
def test_xor_is_at_most_zstd_19_of_the_plain_difference(changed, size):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(320, 320, generator=generator)
    moved = torch.rand(320, 320, generator=generator) < changed
    tuned = base * (1 + moved * size * torch.randn(320, 320, generator=generator))
    base, tuned = base.bfloat16(), tuned.bfloat16()
    bits = base.view(torch.uint8) ^ tuned.view(torch.uint8)
    plain = zstandard.ZstdCompressor(level=19).compress(bits.numpy().tobytes())
    enc = CODECS["xor"].encode(tuned, base, level=19)
    assert enc.num_bytes <= len(plain)
    CODECS["xor"].check(enc)
    assert torch.equal(CODECS["xor"].decode(enc, base).view(torch.uint8), tuned.view(torch.uint8))


def test_both_orders_of_bytes_occur():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 256, generator=generator).bfloat16()
    few, all_of_them = base.clone(), base * 1.01
    place = torch.randint(256, (2, 64), generator=generator)
    few[place[0], place[1]] *= 3 + torch.randn(64, generator=generator).bfloat16()
    orders = [CODECS["xor"].encode(t, base, level=19).params["split"] for t in (few, all_of_them)]
    assert orders == [False, True]


def test_xor_of_sparse_updates_is_small():
    base = torch.randn(256, 256).bfloat16()
    tuned = base.clone()
    tuned[::16, ::16] *= 1.5
    assert CODECS["xor"].encode(tuned, base).num_bytes < tuned.numel() * 2 / 20


@pytest.mark.parametrize(
    ("codec", "params", "words"),
    [
        ("int", {"bits": 5}, "bits must be one of"),
        ("int", {"bits": True}, "bits must be int"),
        ("int", {"group_size": -1}, "at least 0"),
        ("int", {"colour": 1}, "no setting 'colour'"),
        ("nm24", {"group_size": 6}, "multiple of 4"),
        ("lowrank", {"rank": 0}, "at least 1"),
        ("raw", {"bits": 2}, "it has: none"),
        ("xor", {"level": 40}, "level must be"),
    ],
)
def test_wrong_settings_are_named(codec, params, words):
    with pytest.raises(CodecError, match=words):
        get_codec(codec).encode(torch.ones(8, 8), torch.zeros(8, 8), **params)


def test_unknown_codec_lists_the_known():
    with pytest.raises(CodecError, match=r"unknown codec 'gzip'.*nm24"):
        get_codec("gzip")
