"""Settings of bounding and of partition greedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltaserve.errors import SelectionError


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SelectionError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Bounding:
    """How bounding estimates the least gain of a point (Boether et al. 2025, section 4.2).

    The exact bound subtracts all neighbours that may be taken. The approximate one subtracts
    those in the set and a sample of the others, so it decides more points, with a small loss.
    """

    fraction: float = 1.0
    """Share of the neighbourhood that counts; 1 is exact."""
    sampling: Literal["topup", "bernoulli"] = "topup"
    """"topup" samples so many that, with those in the set, the share is met (the paper's
    implementation); "bernoulli" samples each neighbour alone (the paper's theorem)."""
    weighting: Literal["uniform", "weighted"] = "uniform"
    """Neighbours are sampled alike, or by similarity."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise SelectionError(f"fraction is {self.fraction}, but must be above 0 and at most 1")
        _require("sampling", self.sampling, ("topup", "bernoulli"))
        _require("weighting", self.weighting, ("uniform", "weighted"))


EXACT = Bounding()
APPROXIMATE = Bounding(fraction=0.3)


@dataclass(frozen=True)
class Partition:
    """Settings of multi-round partition greedy (section 4.4)."""

    partitions: int = 8
    """In the first round; each holds at most ceil(points / partitions)."""
    rounds: int = 8
    gamma: float = 0.75
    """How slowly the rounds approach the budget; smaller keeps fewer points early."""
    adaptive: bool = True
    """Use fewer partitions as points fall out; otherwise always as many."""

    def __post_init__(self) -> None:
        if not 1 <= self.partitions < 1 << 16:
            raise SelectionError(f"partitions is {self.partitions}, but must be from 1 to 65535")
        if self.rounds < 1:
            raise SelectionError(f"rounds is {self.rounds}, but must be at least 1")
        if not 0 < self.gamma <= 1:
            raise SelectionError(f"gamma is {self.gamma}, but must be above 0 and at most 1")


PARTITION = Partition()
