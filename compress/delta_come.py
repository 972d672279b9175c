"""Mixed-precision singular vectors: the leading ones at 8 bits, the next at 3, the rest at 2.

Delta-CoMe (Ping et al., NeurIPS 2024). Its bands were chosen for a hidden size of 4096; here
they shrink with the matrix, and the last one fills up the bits that it may have. Each band is a
``lowrank`` term of a ``sum`` and mends what the ones before it left over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deltaserve.artifact.codecs.base import matrix_shape
from deltaserve.artifact.codecs.sum import SumParams
from deltaserve.errors import CodecError

HIDDEN, BANDS, REST_BITS = 4096, ((8, 2), (3, 32)), 2


@dataclass(frozen=True)
class BandParams:
    """terms: of the ``sum``, as given; none: the bands, with ``share`` bits per value in all."""

    terms: list[Any] = field(default_factory=list)
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.terms:
            SumParams(self.terms)
            if self.share != 1.0:
                raise CodecError("codec sum: share chooses the terms; give one of the two")
        if not 0 < self.share <= 16:
            raise CodecError(f"codec sum: share must lie above 0 and up to 16, not {self.share}")

    def of(self, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """The terms for a parameter of this shape."""
        return self.terms or bands(matrix_shape(shape), self.share)


def bands(shape: tuple[int, int], share: float) -> list[dict[str, Any]]:
    """Terms for a matrix [N, K] at ``share`` bits per value, scales not counted."""
    line, most = sum(shape), min(shape)
    left = share * shape[0] * shape[1]
    terms = []
    for bits, rank in BANDS:
        rank = max(1, round(rank * most / HIDDEN))
        terms.append({"codec": "lowrank", "bits": bits, "rank": rank})
        left -= bits * rank * line
    rank = max(1, min(int(left // (REST_BITS * line)), most))
    return [*terms, {"codec": "lowrank", "bits": REST_BITS, "rank": rank}]
