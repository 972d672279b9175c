"""Tokens that nobody reads as they come, told several at a time.

Each report costs the server's process Python for every request in it, on a core that the step
could use; an answer that is sent whole needs its tokens only at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltaserve.engine.types import EngineRequest, TokenEvent

HOLD_SECONDS = 0.25
"""A token is held back for no longer: what a request has cost so far is known even if it ends
before its answer does."""


class Bundles:
    """Joins the events of requests that are not streamed. Their first and last go at once."""

    def __init__(self) -> None:
        self._held: dict[str, list[TokenEvent] | None] = {}
        """By request; None before its first event."""
        self._emptied_at = 0.0

    def open(self, request: EngineRequest) -> None:
        if not request.streamed:
            self._held[request.request_id] = None

    def take(self, events: Sequence[TokenEvent], now: float) -> list[TokenEvent]:
        """What there is to tell, of these events and of those that were held back. now: seconds."""
        told: list[TokenEvent] = []
        for event in events:
            name = event.request_id
            if name not in self._held:
                told.append(event)
            elif event.finish_reason is not None:
                told += _joined([*(self._held.pop(name) or ()), event])
            elif (held := self._held[name]) is None:
                self._held[name] = []
                told.append(event)
            else:
                held.append(event)
        if now - self._emptied_at >= HOLD_SECONDS:
            self._emptied_at = now
            for waiting in self._held.values():
                if waiting:
                    told += _joined(waiting)
                    waiting.clear()
        return told


def _joined(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """The events of one request as one; an end without tokens, such as an error, stays apart."""
    *held, last = events
    if not held:
        return [last]
    if not last.token_ids:
        return [*_joined(held), last]
    logprobs = [event.logprobs for event in events if event.logprobs is not None]
    return [
        replace(
            last,
            token_ids=tuple(token for event in events for token in event.token_ids),
            logprobs=tuple(found for some in logprobs for found in some) if logprobs else None,
        )
    ]
