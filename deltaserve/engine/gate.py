"""How long the queue may get; whoever comes then is refused at once, and told when to return."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from deltaserve.engine.types import EngineRequest
from deltaserve.errors import QueueFullError

REMEMBERED_ADMISSIONS = 64
LONGEST_RETRY_S = 300


@dataclass(slots=True)
class Waiting:
    """What one tenant has in the queue, or all together."""

    requests: int = 0
    tokens: int = 0

    def change(self, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens


class QueueGate:
    """Counts the requests that have not run yet, and their prompt tokens.

    One that was preempted counts no more: it was accepted long ago. An empty queue takes
    anything. When to try again is told by the rate of the latest admissions.

    A tenant is refused once the queue is full *and* his own requests fill an equal share of it,
    so that nobody can shut the others out. The queue may thus grow beyond its limit, by at most
    limit/2 + ... + limit/T with T tenants waiting.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        """None is no limit."""
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self._all = Waiting()
        self._queued: dict[str, EngineRequest] = {}
        self._tenants: dict[str, Waiting] = {}
        self._admissions: deque[tuple[float, int]] = deque(maxlen=REMEMBERED_ADMISSIONS)

    @property
    def num_requests(self) -> int:
        return self._all.requests

    @property
    def num_tokens(self) -> int:
        return self._all.tokens

    def check(self, request: EngineRequest, now: float) -> None:
        """Raises QueueFullError if there is no room for it. Thread-safe."""
        requests, tokens, more = self._all.requests, self._all.tokens, _tokens(request)
        own = self._tenants.get(request.tenant)
        # Whoever has nothing in the queue comes in, as into an empty one.
        if own is None:
            return
        admissions = tuple(self._admissions)  # of one moment: this may be another thread
        since = admissions[0][0] if admissions else now
        sharers = len(self._tenants)
        full = self.max_requests is not None and requests >= self.max_requests
        if full and own.requests * sharers >= (self.max_requests or 0):
            excess = (requests + 1 - (self.max_requests or 0)) / max(len(admissions), 1)
            waiting = _waiting(request, f"{own.requests} requests")
            limit = f"{waiting} wait, max_queued_requests is {self.max_requests}"
            raise _full(limit, (now - since) * excess)
        full = self.max_tokens is not None and tokens + more > self.max_tokens
        if full and (own.tokens + more) * sharers > (self.max_tokens or 0):
            excess = tokens + more - (self.max_tokens or 0)
            excess /= max(sum(count for _, count in admissions), 1)
            waiting = _waiting(request, f"{own.tokens} prompt tokens")
            limit = f"{waiting} wait, max_queued_tokens is {self.max_tokens}"
            raise _full(limit, (now - since) * excess)

    def enter(self, request: EngineRequest) -> None:
        self._queued[request.request_id] = request
        for counts in (self._all, self._tenants.setdefault(request.tenant, Waiting())):
            counts.change(1, _tokens(request))

    def admit(self, request_id: str, now: float) -> None:
        """It runs, perhaps not for the first time."""
        tokens = self.leave(request_id)
        if tokens is not None:
            self._admissions.append((now, tokens))

    def leave(self, request_id: str) -> int | None:
        """It waits no more, if it did: its tokens."""
        request = self._queued.pop(request_id, None)
        if request is None:
            return None
        own = self._tenants[request.tenant]
        for counts in (self._all, own):
            counts.change(-1, -_tokens(request))
        if not own.requests:
            del self._tenants[request.tenant]
        return _tokens(request)


def _waiting(request: EngineRequest, what: str) -> str:
    """A tenant is told of himself only: how many of the others wait is their business."""
    return f"{what} of {request.tenant}" if request.tenant else what


def _full(limit: str, seconds: float) -> QueueFullError:
    """seconds: in which as much left the queue as has to."""
    retry_after_s = min(max(math.ceil(seconds), 1), LONGEST_RETRY_S)
    message = f"the queue is full: {limit}; try again in {retry_after_s} s"
    return QueueFullError(message, retry_after_s=retry_after_s)


def _tokens(request: EngineRequest) -> int:
    """Prompt tokens to be computed; a sibling shares all but the last of them."""
    return 1 if request.fork_of is not None else len(request.prompt_ids)
