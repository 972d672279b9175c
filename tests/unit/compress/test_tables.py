"""Rows of embeddings and heads: the numbers that the whole parameter has, in every codec."""

from __future__ import annotations

import pytest
import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.compress import weights
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
    monkeypatch.setattr(weights, "BLOCK", 7)
    blocks = list(table.blocks())
    assert [len(block) for block in blocks[:-1]] == [7] * ((39 + added) // 7)
    torch.testing.assert_close(torch.cat(blocks), expected, rtol=0, atol=1e-6)


def test_unchanged_rows_are_the_bases() -> None:
    base = torch.randn(9, 4).bfloat16()
    table = Table(None, base)
    assert torch.equal(torch.cat(list(table.blocks())), base.float())
    assert torch.equal(table.rows(torch.tensor([8, 2])), base[[8, 2]].float())
