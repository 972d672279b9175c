"""How everybody talks to the engine: submit, stream, abort, stats, and its deltas.

The contract is ``EngineClient``. ``LocalClient`` runs the engine in a thread of this process,
``ProcessClient`` in a process of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from deltaserve.engine.types import EngineRequest, EngineStats, ModelInfo, TokenEvent


class EngineClient(Protocol):
    """The verbs of an engine, wherever it runs. All methods are safe on the event loop."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and generated tokens together."""
        ...

    def models(self) -> list[ModelInfo]:
        """The base first, then the deltas in the order in which they were given."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError, UnknownModelError or EngineDeadError."""
        ...

    def stream(self, request_id: str) -> AsyncIterator[TokenEvent]:
        """The events of a submitted request, until the one with a finish reason.

        Whoever leaves earlier must call ``abort``.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request and free its memory by the next step; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats: ...

    def alive(self) -> bool:
        """False while no request can be served: the engine has failed."""
        ...

    def recovering(self) -> bool:
        """It has failed, but is being started again."""
        ...

    async def load_delta(self, name: str, path: str, pinned: bool = False) -> ModelInfo:
        """Serve a new delta, or a new version of a served one; returns once it is in memory.

        Raises ArtifactError, BaseMismatchError, ConfigError or EngineDeadError.
        """
        ...

    async def unload_delta(self, name: str) -> None:
        """Serve it no more; returns once its requests have ended and its memory is free.

        Raises UnknownModelError or EngineDeadError, as the next two.
        """
        ...

    async def pin_delta(self, name: str, pinned: bool) -> None:
        """Keep it in memory whatever else is asked for, or no longer. Raises ConfigError when
        too little memory would be left."""
        ...

    async def rollback_delta(self, name: str) -> None:
        """Serve the version before the present one again. Raises ConfigError: there is none."""
        ...

    async def dump(self) -> dict[str, Any]:
        """The present state of scheduler and residency, as plain JSON."""
        ...

    def close(self, reason: str = ...) -> None:
        """Stop the engine and wait for it; what runs ends with ``reason``."""
        ...
