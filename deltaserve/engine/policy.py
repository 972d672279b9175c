"""Who goes first: the order of requests, and what their service costs those who asked.

A policy sorts requests into *flows*: (band, tenant). A lower band goes first. Inside a band the
flow with the lowest rank goes first, inside a flow the oldest request. The same order, read
backwards, says who gives way when memory is short.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from deltaserve.engine.types import EngineRequest

Flow = tuple[int, str]
"""(band, tenant); policies without tenants use "" for all."""


class Policy(Protocol):
    """The order of flows. Pure numbers: it knows neither queues nor memory."""

    def flow(self, request: EngineRequest) -> Flow:
        """Where a request belongs; the same answer for its whole life."""
        ...

    def rank(self, flow: Flow) -> float:
        """The lowest of a band goes first. It may only grow, but for ``arrive``."""
        ...

    def arrive(self, flow: Flow, waiting: Collection[Flow]) -> None:
        """``flow``, of which nothing waited, gets a request; ``waiting`` are the others."""
        ...

    def leave(self, flow: Flow) -> None:
        """Nothing of ``flow`` waits any more."""
        ...

    def charge_input(self, request: EngineRequest, num_cached: int) -> None:
        """A request is admitted for the first time; ``num_cached`` of its prompt was found."""
        ...

    def charge_output(self, request: EngineRequest) -> None:
        """A token was drawn for a request."""
        ...

    def dump(self) -> dict[str, float]:
        """What each tenant has been charged, for people who debug."""
        ...


class Fcfs:
    """First come, first served."""

    def flow(self, request: EngineRequest) -> Flow:
        return 0, ""

    def rank(self, flow: Flow) -> float:
        return 0.0

    def arrive(self, flow: Flow, waiting: Collection[Flow]) -> None: ...

    def leave(self, flow: Flow) -> None: ...

    def charge_input(self, request: EngineRequest, num_cached: int) -> None: ...

    def charge_output(self, request: EngineRequest) -> None: ...

    def dump(self) -> dict[str, float]:
        return {}


class Priority(Fcfs):
    """Lower ``priority`` first, then first come, first served."""

    def flow(self, request: EngineRequest) -> Flow:
        return request.priority, ""
