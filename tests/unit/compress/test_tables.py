"""Rows of embeddings and heads: the numbers that the whole parameter has, in every codec."""

from __future__ import annotations

import pytest
import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs import rows as rows_module
from deltaserve.artifact.codecs.rows import changed_rows
from deltaserve.compress import encode as encoding
from deltaserve.compress import weights
from deltaserve.compress.encode import blocks_of, encode_measured
from deltaserve.compress.plan import CodecChoice
from deltaserve.compress.weights import Source, Table, reconstruct

CODECS = {
    "raw": {},
    "xor": {},
    "int": {"bits": 2, "group_size": 16},
    "nm24": {"bits": 4},
    "lowrank": {"rank": 3},
    "rows": {},
    "nf4": {},
    "sum": {"terms": [{"codec": "int", "bits": 1}, {"codec": "lowrank", "rank": 2, "bits": 4}]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [0, 5])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_those_of_the_whole(
    codec: str, added: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 32).to(dtype)
    tuned = torch.cat([base, base[:added]])
    tuned[3:30] += 0.01 * torch.randn(27, 32).to(dtype)
    enc = get_codec(codec).encode(tuned, base, **CODECS[codec])
    source = Source(lambda _: (enc, base))
    expected = reconstruct(enc, base)
    assert torch.equal(source("any"), expected)
    table = source.table("any")
    assert (len(table), table.shape) == (40 + added, (40 + added, 32))
    ids = torch.tensor([7, 0, 39 + added, 7])
    torch.testing.assert_close(table.rows(ids), expected[ids], rtol=0, atol=1e-6)
    for chunk, step in ((7 * 32, 7), (5 * 64, 5)):  # too large to be kept whole, and as logits
        monkeypatch.setattr(weights, "CHUNK", chunk)
        places, blocks = zip(*source.table("any").blocks(chunk // step), strict=True)
        assert [len(block) for block in blocks[:-1]] == [step] * ((39 + added) // step)
        assert [(p.start, p.stop - p.start) for p in places] == [
            (number * step, len(block)) for number, block in enumerate(blocks)
        ]
        torch.testing.assert_close(torch.cat(blocks), expected, rtol=0, atol=1e-6)


def test_unchanged_rows_are_the_bases() -> None:
    base = torch.randn(9, 4).bfloat16()
    table = Table(None, base)
    assert torch.equal(torch.cat([rows for _, rows in table.blocks(1)]), base.float())
    assert torch.equal(table.rows(torch.tensor([8, 2])), base[[8, 2]].float())


CHOICES = [
    CodecChoice("int", {"bits": 4, "group_size": 16}),
    CodecChoice("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    CodecChoice("int", {"bits": 2, "group_size": 0, "symmetric": False}),
    CodecChoice("rows"),
    CodecChoice("rows", {"bits": 4, "group_size": 16}),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("rows", [20, 40, 47])
def test_blocks_of_rows_are_stored_as_the_whole(
    choice: CodecChoice, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block is unchanged, and where the vocabulary grew or shrank."""
    torch.manual_seed(1)
    base = torch.randn(40, 32).bfloat16()
    tuned = torch.cat([base, torch.randn(7, 32).bfloat16()])[:rows].clone()
    tuned[2:6] += 0.01 * torch.randn(4, 32).bfloat16()
    tuned[15:19] += 0.01 * torch.randn(4, 32).bfloat16()
    whole, error = encode_measured(choice, tuned, base)
    monkeypatch.setattr(encoding, "BLOCK", 7)
    stacked, same_error = encode_measured(choice, tuned, base)
    assert len(blocks_of(choice, tuple(tuned.shape))) > 1
    assert (stacked.params, stacked.shape) == (whole.params, whole.shape)
    assert stacked.tensors.keys() == whole.tensors.keys()
    for name, part in whole.tensors.items():
        assert torch.equal(stacked.tensors[name], part), name
    assert same_error == pytest.approx(error, rel=1e-9)


def test_what_all_rows_share_is_not_stored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BLOCK", 7)
    for params in ({"bits": 1, "scale_axis": "tensor"}, {"bits": 1, "scale_axis": "column"}):
        assert blocks_of(CodecChoice("int", params), (40, 32)) == [slice(None)]
    assert blocks_of(CodecChoice("lowrank", {"rank": 2}), (40, 32)) == [slice(None)]


def test_changed_rows_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK", 4)
    base = torch.zeros(10, 3)
    tuned = torch.zeros(13, 3)
    tuned[1, 2], tuned[9, 0], tuned[11, 1], tuned[4, 0] = 1.0, 2.0, 3.0, -0.0
    assert changed_rows(tuned, base).tolist() == [1, 4, 9, 11]
    assert changed_rows(tuned[:8], base).tolist() == [1, 4]
    assert changed_rows(tuned[:, 0], base[:, 0]).tolist() == [4, 9]
    assert changed_rows(tuned, None).tolist() == [1, 4, 9, 11]
