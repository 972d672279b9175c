"""Prices of the candidates of one matrix: bytes by their layout, nats by what they leave over.

Where rows are stored apart, a sample of them is encoded, see ``spread``. What must be fitted to
the whole matrix is fitted only if the best matrix of its rank would be worth its bytes.

N outputs, K inputs, S rows that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import dense_bytes, difference
from deltaserve.artifact.codecs.rows import changed_rows
from deltaserve.compress.allocate import Candidate, hull
from deltaserve.compress.delta_come import BandParams
from deltaserve.compress.encode import BLOCK, encode, stored_apart
from deltaserve.compress.gptq import Solver
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import SKIP, CodecChoice
from deltaserve.compress.sensitivity import Cost, LookupCost
from deltaserve.compress.spread import Spread
from deltaserve.compress.weights import reconstruct

# Few bits gain much from being fitted to the end, and must not be judged before it; many do not.
FEW_BITS, SOON = 1, Solver(rounds=1)
# Rows of a matrix that are encoded to price what stores them apart.
DRAWN = 1 << 9
# How far a bound may lie from what others reach, in what is left and in what is gained: it is of
# the text that codes are fitted on, and they are judged on another.
NEAR = 1.1
Costs = Sequence[Cost | LookupCost]


def priced(
    tensor: torch.Tensor,
    reference: torch.Tensor,
    choices: Sequence[CodecChoice],
    hessian: Hessian | None,
    costs: Costs,
) -> list[Candidate]:
    """Those of the choices [N, K] that no other one beats in both bytes and nats, smallest first.

    reference: the base's, of fewer or more rows where the vocabulary changed. costs: what errors
    cost, added up; a tied embedding has two.
    """
    lost_N = _lost(tensor, reference, costs)
    lost = float(lost_N.sum())
    found = [Candidate(SKIP, 0, lost)] if tensor.shape == reference.shape else []
    drawn = Spread.over(lost_N, DRAWN)

    def add(choice: CodecChoice) -> None:
        error_SK = _error(choice, tensor, reference, hessian, drawn.rows_S)
        nats_S = _by_row(costs, error_SK, drawn.rows_S)
        found.append(Candidate(choice, _size(choice, tensor, reference), drawn.total(nats_S)))

    for choice in filter(stored_apart, choices):
        add(choice)
    together = [choice for choice in choices if not stored_apart(choice)]
    if together and isinstance(costs[0], Cost):
        left_R = costs[0].left_over(difference(tensor, reference))
        best = hull(found)
        for choice in together:
            least = _least(choice, tuple(tensor.shape), lost, left_R, found)
            others = best(_size(choice, tensor, reference))
            if least <= NEAR * others and lost - others <= NEAR * (lost - least):
                add(choice)
    return _undominated(found)


def _lost(tensor: torch.Tensor, reference: torch.Tensor, costs: Costs) -> torch.Tensor:
    """Nats per token [N], float64, that it costs to leave each row as the base has it."""
    found = []
    for start in range(0, len(tensor), BLOCK):
        some = slice(start, min(start + BLOCK, len(tensor)))
        found.append(_by_row(costs, difference(tensor[some], reference[some]), some))
    return torch.cat(found)


def _by_row(costs: Costs, error_SK: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    return torch.stack([cost.by_row(error_SK, rows).double().cpu() for cost in costs]).sum(0)


def _error(
    choice: CodecChoice,
    tensor: torch.Tensor,
    reference: torch.Tensor,
    hessian: Hessian | None,
    rows_S: torch.Tensor,
) -> torch.Tensor:
    """What the choice gets wrong in some rows, of which alone it is fitted to, if it can be."""
    solver = SOON if choice.params.get("bits", 0) > FEW_BITS else Solver()
    every = len(rows_S) == len(tensor)
    if stored_apart(choice) and not every:
        # Added tokens come last; the base lacks them.
        tensor, reference = tensor[rows_S], reference[rows_S[rows_S < len(reference)]]
        every = True
    enc = encode(choice, tensor, reference, hessian, solver)
    error_NK = reconstruct(enc, reference).sub_(tensor)
    return error_NK if every else error_NK[rows_S]


def _size(choice: CodecChoice, tensor: torch.Tensor, reference: torch.Tensor) -> int:
    """Bytes in memory of the whole matrix."""
    params: dict[str, Any] = dict(choice.params)
    if choice.codec == "rows":
        params["rows"] = len(changed_rows(tensor, reference))
    if choice.codec == "sum":
        params = {"terms": BandParams(**params).of(tuple(tensor.shape))}
    layout = get_codec(choice.codec).layout(params, tuple(tensor.shape), tensor.dtype)
    return sum(dense_bytes(shape, dtype) for dtype, shape in layout.values())


def _least(
    choice: CodecChoice,
    shape: tuple[int, ...],
    lost: float,
    left_R: torch.Tensor,
    found: list[Candidate],
) -> float:
    """Nats that stay at least: of those lost without the change what no matrix of that rank
    reaches, and of it, where single bits stand beside, as much as they leave of the whole."""
    terms = [{"codec": choice.codec, **choice.params}]
    if choice.codec == "sum":
        terms = BandParams(**choice.params).of(shape)
    rank = sum(term["rank"] for term in terms if term["codec"] == "lowrank")
    if not rank or not lost:
        return 0.0
    least = lost * float(left_R[min(rank, len(left_R) - 1)])
    for term in terms:
        alone = [c.error / lost for c in found if {"codec": "int", **c.choice.params} == term]
        least *= alone[0] if alone else 1.0
    return least


def _undominated(found: list[Candidate]) -> list[Candidate]:
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.bytes, c.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return kept
