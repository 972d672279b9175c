"""What is asked, in floats (``Problem``) and in integers (``Instance``), and the answer.

    f(S) = alpha * sum of u(v) over S  -  beta * sum of s(v, w) over undirected edges inside S

(Boether et al., "On distributed larger-than-memory subset selection with pairwise submodular
functions", MLSys 2025, section 3). Every term alpha * u and beta * s is rounded once to a
multiple of a power of two, 40 bits below the largest term, and everything after that is
integer arithmetic. So sums do not depend on their order: any number of shards and workers
finds the same set, bit for bit, and ties are real ties, broken by the lower id.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.budgets import Budget, Limits, make_limits
from deltaserve.select.graph import Graph

BITS = 40
MAX_DEGREE = 1 << (62 - BITS)
CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Problem:
    """Which points of a pool to select. Raises SelectionError when something does not fit.

    utility: float32 [points], finite, not negative. beta: 1 - alpha unless given. chosen:
    bool [points], what was selected before: it counts for the similarities, not for the budget.
    """

    graph: Graph
    utility: NDArray[np.float32]
    budget: Budget
    alpha: float = 0.9
    beta: float | None = None
    chosen: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        size = self.graph.num_points
        object.__setattr__(self, "utility", np.asarray(self.utility, np.float32))
        if self.utility.shape != (size,):
            raise SelectionError(
                f"{self.utility.size} utilities for {size} points of the graph: give one each"
            )
        for start in range(0, size, CHUNK):
            part = self.utility[start : start + CHUNK]
            wrong = np.flatnonzero(~np.isfinite(part) | (part < 0))
            if len(wrong):
                at = int(wrong[0])
                raise SelectionError(
                    f"the utility of point {start + at} is {part[at]}: utilities must be finite "
                    "and 0 or more (shift them by their minimum)"
                )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise SelectionError(f"alpha is {self.alpha}, but must be above 0")
        if self.beta is None:
            object.__setattr__(self, "beta", 1.0 - self.alpha)
        assert self.beta is not None
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise SelectionError(f"beta is {self.beta}, but must be 0 or more")
        if self.chosen is not None and (
            self.chosen.shape != (size,) or self.chosen.dtype != np.bool_
        ):
            raise SelectionError("chosen must be one boolean for each point")
        if self.graph.max_degree > MAX_DEGREE:
            raise SelectionError(
                f"a point has {self.graph.max_degree} neighbours, but {MAX_DEGREE} is the most"
            )
        # A budget that cannot be met is an error here, not after hours of work.
        _ = self.limits

    @cached_property
    def limits(self) -> Limits:
        return make_limits(self.budget, self.graph.num_points, self.chosen)

    @cached_property
    def instance(self) -> Instance:
        assert self.beta is not None
        top = max(
            self.alpha * float(self.utility.max(initial=0.0)), self.beta * self.graph.max_weight
        )
        scale = math.ldexp(1.0, min(BITS - math.frexp(top)[1], 900)) if top > 0 else 1.0
        return Instance(
            utility=self.utility,
            alpha=self.alpha * scale,
            beta=self.beta * scale,
            scale=scale,
            length=self.limits.length,
            per_token=self.limits.per_token,
            group=self.limits.group,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the answer."""
        limits, whole = self.limits, hashlib.sha256()
        numbers = (self.alpha, self.beta, limits.k, limits.tokens, limits.per_token)
        whole.update(repr((self.graph.digest, *numbers)).encode())
        chosen = np.empty(0, bool) if self.chosen is None else self.chosen
        for array in (self.utility, chosen, limits.group, limits.caps, limits.length):
            whole.update(repr(array.shape).encode())
            whole.update(np.ascontiguousarray(array).view(np.uint8).data)
        return whole.hexdigest()


@dataclass(frozen=True, eq=False)
class Instance:
    """The objective in integers: a point is worth rint(alpha * u), an edge rint(beta * s).

    alpha and beta are scaled; ``scale`` leads back to the user's units. length: int64 [points]
    or empty; group: int32 [points] or empty.
    """

    utility: NDArray[np.float32]
    alpha: float
    beta: float
    scale: float
    length: NDArray[np.int64]
    per_token: bool
    group: NDArray[np.int32]

    @property
    def divisor(self) -> NDArray[np.int64]:
        """[points] what gains are divided by for the order; empty for 1."""
        return self.length if self.per_token else self.length[:0]


@dataclass(frozen=True, eq=False)
class Selection:
    """What was selected.

    ids: int64, in the order of selection. gains: float64, what each added to f when it was
    selected; they add up to ``objective`` (f of everything selected and chosen) less f of what
    was chosen before. log: one entry for each pass, sweep or round. bounded: how many points
    bounding included, excluded and left undecided; None if it did not run.
    """

    ids: NDArray[np.int64]
    gains: NDArray[np.float64]
    objective: float
    log: list[dict[str, Any]]
    bounded: dict[str, int] | None
