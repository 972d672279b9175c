"""Where time and tokens went: per request, per step, per tenant and per model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from deltaserve.engine.types import RequestTiming, Usage

if TYPE_CHECKING:
    from deltaserve.engine.scheduler import StepPlan
    from deltaserve.engine.sequence import Sequence

OTHERS = "(others)"
MAX_NAMES = 256
"""Tenants, and models, that are counted by name; all further ones together."""


class Phase(IntEnum):
    """What a request is doing; the fields of RequestTiming, in their order."""

    QUEUED = 0
    LOAD = 1
    PREFILL = 2
    DECODE = 3


class Stopwatch:
    """Seconds that a request spent in each phase, to which it may return."""

    __slots__ = ("_seconds", "_since", "phase")

    def __init__(self) -> None:
        self.phase = Phase.QUEUED
        self._since: float | None = None
        self._seconds = [0.0] * len(Phase)

    def enter(self, phase: Phase, now: float) -> None:
        if self._since is not None:
            self._seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now

    def read(self, now: float) -> RequestTiming:
        self.enter(self.phase, now)
        return RequestTiming(*self._seconds)


@dataclass(slots=True)
class StepCounters:
    """What happened in all steps since the start; times in seconds."""

    steps: int = 0
    mixed_steps: int = 0
    max_models_in_step: int = 0
    delta_segments: int = 0
    plan_s: float = 0.0
    execute_s: float = 0.0
    commit_s: float = 0.0

    def count(self, plan: StepPlan, plan_s: float, execute_s: float, commit_s: float) -> None:
        """Add a committed step."""
        num_models = plan.num_models
        self.steps += 1
        self.delta_segments += len({row.seq.slot for row in plan.rows} - {0})  # 0 is the base
        self.mixed_steps += num_models > 1
        self.max_models_in_step = max(self.max_models_in_step, num_models)
        self.plan_s += plan_s
        self.execute_s += execute_s
        self.commit_s += commit_s


class UsageCounters:
    """Tokens and seconds of all requests together, of each tenant, and of each model."""

    def __init__(self) -> None:
        self.total = Usage()
        self.tenants: dict[str, Usage] = {}
        self.models: dict[str, Usage] = {}

    def begin(self, seq: Sequence) -> None:
        request = seq.request
        seq.usages = (
            self.total,
            _row(self.tenants, request.tenant),
            _row(self.models, request.model),
        )
        for usage in seq.usages:
            usage.requests += 1

    @staticmethod
    def drew(seq: Sequence) -> None:
        """A token was drawn; the prompt counts with the first one."""
        for usage in seq.usages:
            usage.generation_tokens += seq.request.sampling.max_tokens > 0
        if seq.num_generated == 1:
            for usage in seq.usages:
                usage.prompt_tokens += seq.num_prompt
                usage.cached_tokens += seq.num_cached or 0

    @staticmethod
    def preempted(seq: Sequence) -> None:
        for usage in seq.usages:
            usage.preemptions += 1

    @staticmethod
    def end(seq: Sequence, timing: RequestTiming) -> None:
        for usage in seq.usages:
            usage.queued_s += timing.queued
            usage.load_s += timing.load
            usage.prefill_s += timing.prefill
            usage.decode_s += timing.decode


def copy_table(table: dict[str, Usage]) -> dict[str, Usage]:
    """As it is now; may be called beside the thread that counts."""
    return {name: replace(usage) for name, usage in table.copy().items()}


def _row(table: dict[str, Usage], name: str) -> Usage:
    if name not in table and len(table) >= MAX_NAMES:
        name = OTHERS
    return table.setdefault(name, Usage())
