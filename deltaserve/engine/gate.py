"""How long the queue may get; whoever comes then is refused at once, and told when to return."""

from __future__ import annotations

import math
from collections import deque

from deltaserve.engine.types import EngineRequest
from deltaserve.errors import QueueFullError

REMEMBERED_ADMISSIONS = 64
LONGEST_RETRY_S = 300


class QueueGate:
    """Counts the requests that have not run yet, and their prompt tokens.

    One that was preempted counts no more: it was accepted long ago. An empty queue takes
    anything. When to try again is told by the rate of the latest admissions.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        """None is no limit."""
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._queued: dict[str, int] = {}
        self._admissions: deque[tuple[float, int]] = deque(maxlen=REMEMBERED_ADMISSIONS)

    @property
    def num_requests(self) -> int:
        return len(self._queued)

    def check(self, request: EngineRequest, now: float) -> None:
        """Raises QueueFullError if there is no room for it. Thread-safe."""
        requests, tokens = len(self._queued), self.num_tokens
        admissions = tuple(self._admissions)  # of one moment: this may be another thread
        since = admissions[0][0] if admissions else now
        if not requests:
            return
        if self.max_requests is not None and requests >= self.max_requests:
            share = (requests + 1 - self.max_requests) / max(len(admissions), 1)
            limit = f"{requests} requests wait, max_queued_requests is {self.max_requests}"
            raise _full(limit, (now - since) * share)
        if self.max_tokens is not None and tokens + _tokens(request) > self.max_tokens:
            excess = tokens + _tokens(request) - self.max_tokens
            share = excess / max(sum(count for _, count in admissions), 1)
            limit = f"{tokens} prompt tokens wait, max_queued_tokens is {self.max_tokens}"
            raise _full(limit, (now - since) * share)

    def enter(self, request: EngineRequest) -> None:
        self._queued[request.request_id] = _tokens(request)
        self.num_tokens += _tokens(request)

    def admit(self, request_id: str, now: float) -> None:
        """It runs, perhaps not for the first time."""
        tokens = self.leave(request_id)
        if tokens is not None:
            self._admissions.append((now, tokens))

    def leave(self, request_id: str) -> int | None:
        """It waits no more, if it did: its tokens."""
        tokens = self._queued.pop(request_id, None)
        self.num_tokens -= tokens or 0
        return tokens


def _full(limit: str, seconds: float) -> QueueFullError:
    """seconds: in which as much left the queue as has to."""
    retry_after_s = min(max(math.ceil(seconds), 1), LONGEST_RETRY_S)
    message = f"the queue is full: {limit}; try again in {retry_after_s} s"
    return QueueFullError(message, retry_after_s=retry_after_s)


def _tokens(request: EngineRequest) -> int:
    """Prompt tokens to be computed; a sibling shares all but the last of them."""
    return 1 if request.fork_of is not None else len(request.prompt_ids)
