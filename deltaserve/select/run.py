"""What the solvers share while they run: session, limits, log, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.backends.base import Session
from deltaserve.select.budgets import UNLIMITED, Limits
from deltaserve.select.checkpoint import Checkpoint
from deltaserve.select.steps import usage

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Usage:
    """taken, open: int64 [groups], points in the set (without those chosen before) and
    undecided ones; tokens: of those taken."""

    taken: NDArray[np.int64]
    open: NDArray[np.int64]
    tokens: int


@dataclass
class Run:
    """One call of ``solve``. place: the stage it is in and its counters, kept in checkpoints."""

    session: Session
    limits: Limits
    seed: int
    scale: float
    num_chosen: int
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    place: dict[str, Any] = field(default_factory=dict)
    _clock: float = field(default_factory=time.perf_counter)

    def note(self, verb: str, **facts: Any) -> None:
        """Add an entry to the log, with the seconds since the last one."""
        now = time.perf_counter()
        entry = {"verb": verb, **facts, "seconds": round(now - self._clock, 6)}
        self._clock = now
        self.log.append(entry)
        if self.progress:
            self.progress(entry)

    def save(self, **place: Any) -> None:
        """Remember that everything up to this place is done."""
        self.place = place
        if self.checkpoint:
            self.checkpoint.save(self.session.state, {"place": place, "log": self.log})

    def usage_by_shard(self) -> list[Usage]:
        found = self.session.map(usage, len(self.limits.caps))
        return [Usage(taken, open_, int(tokens)) for taken, open_, tokens in found]

    def usage(self) -> Usage:
        parts = self.usage_by_shard()
        return Usage(
            taken=np.sum([part.taken for part in parts], axis=0),
            open=np.sum([part.open for part in parts], axis=0),
            tokens=sum(part.tokens for part in parts),
        )

    def full(self, used: Usage) -> bool:
        """Whether nothing more can be taken."""
        done = used.taken.sum() >= self.limits.k or used.tokens >= self.limits.tokens
        return bool(done or not used.open.any())

    def tokens_left(self, used: Usage) -> int:
        return UNLIMITED if self.limits.tokens == UNLIMITED else self.limits.tokens - used.tokens
