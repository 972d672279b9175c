"""Prices of candidates: the bytes that are stored, and what the whole matrix loses."""

from __future__ import annotations

import pytest
import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.compress import price
from deltaserve.compress.candidates import LINEAR, VOCABULARY, VOCABULARY_ROWS
from deltaserve.compress.encode import encode
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import SKIP, CodecChoice
from deltaserve.compress.price import priced
from deltaserve.compress.sensitivity import Cost, LookupCost

LOW_RANK = tuple(CodecChoice("lowrank", {"rank": r, "bits": 4}) for r in (2, 6, 12))
BESIDE = CodecChoice(
    "sum", {"terms": [{"codec": "lowrank", "rank": 3, "bits": 4},
                      {"codec": "int", "bits": 1, "group_size": 0}]},
)  # fmt: skip


def matrix(rows: int, columns: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor, Cost]:
    """A fine-tune's matrix, its base's, and costs that differ a thousandfold between rows."""
    torch.manual_seed(0)
    base = torch.randn(rows, columns).bfloat16()
    delta = torch.randn(rows, columns)
    if rank:
        delta = torch.randn(rows, rank) @ torch.randn(rank, columns) + 0.01 * delta
    delta *= 0.02 * torch.rand(rows, 1)
    halves = Hessian(columns), Hessian(columns)
    mix = torch.randn(columns, columns) * torch.rand(columns)
    for half in halves:
        half.add(torch.randn(300, columns) @ mix)
    cost = Cost(*halves, 10 ** (-3 * torch.rand(rows)))
    return (base.float() + delta).bfloat16(), base, cost


@pytest.mark.parametrize("shape", [(30, 32), (700, 64)])
def test_bytes_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    tuned, base, cost = matrix(*shape, rank=2)
    tuned[: len(tuned) // 2] = base[: len(tuned) // 2]
    choices = (*LINEAR, *VOCABULARY_ROWS, *LOW_RANK, BESIDE)
    found = priced(tuned, base, choices, cost.hessian, [cost])
    assert (found[0].choice, found[0].bytes) == (SKIP, 0)
    assert len(found) > 4
    for candidate in found[1:]:
        enc = encode(candidate.choice, tuned, base, cost.hessian)
        assert candidate.bytes == get_codec(enc.codec).resident_bytes(enc), candidate.choice


def test_a_sample_of_rows_tells_what_all_of_them_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base, cost = matrix(4000, 64)
    tuned, lookup = torch.cat([tuned, tuned[:50]]), LookupCost(torch.rand(4050), torch.rand(64))
    cost = Cost(cost.hessian, cost.unseen, torch.cat([cost.slope_N, cost.slope_N[:50]]))
    sampled = {str(c.choice): c for c in priced(tuned, base, VOCABULARY, None, [lookup, cost])}
    monkeypatch.setattr(price, "DRAWN", 5000)
    whole = {str(c.choice): c for c in priced(tuned, base, VOCABULARY, None, [lookup, cost])}
    assert sampled.keys() == whole.keys()
    for choice, candidate in whole.items():
        assert sampled[choice].bytes == candidate.bytes
        assert sampled[choice].error == pytest.approx(candidate.error, rel=0.03), choice


@pytest.mark.parametrize(("rank", "kept"), [(0, False), (4, True)])
def test_only_what_could_win_is_fitted(
    rank: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    delta = torch.randn(256, rank) @ torch.randn(rank, 256) + 0.05 * torch.randn(256, 256)
    base, identity = torch.zeros(256, 256), Hessian.of(torch.eye(256))
    tuned, cost = base + delta, Cost(identity, identity, torch.ones(256))
    fitted: list[str] = []
    monkeypatch.setattr(
        price, "encode", lambda choice, *rest: fitted.append(choice.codec) or encode(choice, *rest)
    )
    found = priced(tuned, base, (*LINEAR, *LOW_RANK), cost.hessian, [cost])
    assert ("lowrank" in fitted) is kept
    assert any(c.choice.codec == "lowrank" for c in found) is kept


def test_what_a_rank_leaves_over_is_a_lower_bound() -> None:
    tuned, base, cost = matrix(96, 64, rank=10)
    cost = Cost(cost.hessian, cost.hessian, cost.slope_N)
    delta = tuned.float() - base.float()
    left_R = cost.left_over(delta)
    assert left_R.shape == (65,)
    assert float(left_R[0]) == pytest.approx(1.0)
    assert float(left_R[-1]) == pytest.approx(0.0, abs=1e-6)
    lost = float(cost.by_row(delta).sum())
    for rank in (1, 4, 16):
        enc = encode(CodecChoice("lowrank", {"rank": rank}), delta, None, cost.hessian)
        error = get_codec("lowrank").delta(enc) - delta
        assert float(cost.by_row(error).sum()) > 0.95 * float(left_R[rank]) * lost
