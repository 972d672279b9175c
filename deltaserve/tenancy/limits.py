"""Limits on requests, tokens and concurrency, and token budgets, of tenants and of keys.

A request takes its place in two steps: ``enter`` before any work (requests, concurrency), then
``reserve`` once its prompt is counted (tokens: prompt and the longest answer allowed). When it
ends, ``settle`` gives back what it did not use. What is refused has taken nothing.

Tokens count for the moment at which their request came: in any window, the requests that came
in it have used, together, no more than the limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from deltaserve.errors import LimitError
from deltaserve.tenancy.tenants import Limits

WINDOW = 60.0
GRAIN = WINDOW / 600
"""Entries so close together are one, of the later time: memory is bounded, no limit exceeded."""

MAX_HELD_BYTES = 2**28
"""Of bodies of a tenant's requests in progress: they are kept in memory while they are read, and as
prompts while they wait."""

Period = Literal["day", "month"]


@dataclass(slots=True)
class Entry:
    first: float
    last: float
    amount: int = 0


class Window:
    """How much was taken within the last ``WINDOW`` seconds."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._total = 0

    def total(self, now: float) -> int:
        while self._entries and self._entries[0].last <= now - WINDOW:
            self._total -= self._entries.popleft().amount
        return self._total

    def wait(self, now: float, amount: int, limit: int) -> float:
        """Seconds until ``amount`` fits: 0 if it does now, infinite if it never will."""
        excess = self.total(now) + amount - limit
        if excess <= 0:
            return 0.0
        for entry in self._entries:
            excess -= entry.amount
            if excess <= 0:
                return entry.last + WINDOW - now
        return math.inf

    def take(self, now: float, amount: int) -> Entry:
        if not self._entries or now - self._entries[-1].first >= GRAIN:
            self._entries.append(Entry(now, now))
        entry = self._entries[-1]
        entry.last = now
        entry.amount += amount
        self._total += amount
        return entry

    def change(self, entry: Entry, difference: int) -> None:
        """Correct what was taken. No effect once the entry has left the window."""
        if self._entries and entry.last >= self._entries[0].last:
            entry.amount += difference
            self._total += difference


@dataclass(slots=True)
class Budget:
    """Tokens used in the present day or month (UTC), reserved ones included."""

    kind: Period
    period: str = ""
    used: int = 0

    def total(self, now: float) -> int:
        period = period_of(self.kind, now)
        if period != self.period:
            self.period, self.used = period, 0
        return self.used

    def change(self, period: str, difference: int) -> None:
        if period == self.period:
            self.used += difference


def period_of(kind: Period, now: float) -> str:
    """``2030-01-31`` or ``2030-01``."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d" if kind == "day" else "%Y-%m")


def period_end(kind: Period, now: float) -> float:
    start = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if kind == "day":
        return (start + timedelta(days=1)).timestamp()
    return (start.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


@dataclass(slots=True)
class Meter:
    """What one tenant or one key has in use."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    parallel: int = 0
    held: int = 0
    """Bytes of the bodies of requests in progress."""
    day: Budget = field(default_factory=lambda: Budget("day"))
    month: Budget = field(default_factory=lambda: Budget("month"))


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is limited: a tenant or a key, and its limits as they are now."""

    name: str
    """As in ``tenant acme``; it is what the client reads."""
    limits: Limits


class Limiter:
    """All meters. Safe across threads; ``clock`` and ``wall`` (Unix time) give seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self.wall = wall
        self.lock = threading.Lock()
        self._meters: dict[str, Meter] = {}

    def load(self, used: Mapping[str, tuple[int, int]]) -> None:
        """Begin with the tokens that each subject used in the present day and month."""
        now = self.wall()
        for name, tokens in used.items():
            meter = self.meter(name)
            for budget, amount in zip((meter.day, meter.month), tokens, strict=True):
                budget.total(now)  # opens the period
                budget.used = amount

    def meter(self, name: str) -> Meter:
        return self._meters.setdefault(name, Meter())

    def used(self, name: str) -> dict[str, int]:
        """What a subject has in use, reserved tokens included, under the names of its limits."""
        with self.lock:
            now, wall, meter = self.clock(), self.wall(), self.meter(name)
            return {
                "rpm_limit": meter.requests.total(now),
                "tpm_limit": meter.tokens.total(now),
                "max_parallel_requests": meter.parallel,
                "daily_token_budget": meter.day.total(wall),
                "monthly_token_budget": meter.month.total(wall),
            }

    def enter(self, subjects: Sequence[Subject]) -> Ticket:
        """Count a request of ``subjects``. Raises LimitError."""
        with self.lock:
            now = self.clock()
            for subject in subjects:
                self._check_entry(subject, now)
            for subject in subjects:
                meter = self.meter(subject.name)
                meter.requests.take(now, 1)
                meter.parallel += 1
        return Ticket(self, subjects)

    def headers(self, subjects: Sequence[Subject]) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``, of the subject that has least left."""
        with self.lock:
            now = self.clock()
            headers: dict[str, str] = {}
            for unit in ("requests", "tokens"):
                headers |= self._headers(subjects, unit, now)
        return headers

    def _check_entry(self, subject: Subject, now: float) -> None:
        meter, limits = self.meter(subject.name), subject.limits
        if limits.rpm_limit is not None:
            wait = meter.requests.wait(now, 1, limits.rpm_limit)
            if wait:
                raise LimitError(
                    f"{subject.name} has used its {limits.rpm_limit} requests per minute",
                    limit="rpm_limit",
                    retry_after_s=wait,
                )
        most = limits.max_parallel_requests
        if most is not None and meter.parallel >= most:
            raise LimitError(
                f"{subject.name} has its {most} requests at a time in progress",
                limit="max_parallel_requests",
                retry_after_s=1.0,
            )

    def _headers(self, subjects: Sequence[Subject], unit: str, now: float) -> dict[str, str]:
        found = []
        for subject in subjects:
            meter = self.meter(subject.name)
            window = meter.requests if unit == "requests" else meter.tokens
            limits = subject.limits
            limit = limits.rpm_limit if unit == "requests" else limits.tpm_limit
            if limit is not None:
                used = window.total(now)
                found.append((max(limit - used, 0), limit, window.wait(now, limit, limit)))
        if not found:
            return {}
        remaining, limit, reset = min(found)
        return {
            f"x-ratelimit-limit-{unit}": str(limit),
            f"x-ratelimit-remaining-{unit}": str(remaining),
            f"x-ratelimit-reset-{unit}": f"{reset:.3f}s",
        }


class Ticket:
    """The place of one request. ``settle`` must be called when it is over, however it ended."""

    def __init__(self, limiter: Limiter, subjects: Sequence[Subject]) -> None:
        self.subjects = subjects
        self._limiter = limiter
        self._reserved = 0
        self._held = 0
        self._entries: list[Entry] = []
        self._at = limiter.wall()
        self._open = True

    @property
    def at(self) -> float:
        """Unix time at which the request came; its tokens belong to that day."""
        return self._at

    def hold(self, bytes_: int) -> None:
        """So much more of the request's body has come. Raises LimitError, unless nothing else of
        the tenant is in progress: how large one may be is not decided here."""
        limiter, tenant = self._limiter, self.subjects[0].name
        with limiter.lock:
            assert self._open
            meter = limiter.meter(tenant)
            if meter.held > self._held and meter.held + bytes_ > MAX_HELD_BYTES:
                raise LimitError(
                    f"{tenant} has requests of {meter.held} bytes in progress",
                    limit="request_bytes",
                    retry_after_s=1.0,
                )
            meter.held += bytes_
            self._held += bytes_

    def reserve(self, tokens: int) -> None:
        """Set aside what the request may use at most. Raises LimitError. Once for a ticket."""
        assert self._open
        assert not self._entries
        limiter = self._limiter
        with limiter.lock:
            now = limiter.clock()
            self._at = limiter.wall()
            for subject in self.subjects:
                self._check_tokens(subject, tokens, now)
            for subject in self.subjects:
                meter = limiter.meter(subject.name)
                self._entries.append(meter.tokens.take(now, tokens))
                meter.day.used += tokens
                meter.month.used += tokens
            self._reserved = tokens

    def settle(self, tokens: int) -> None:
        """End the request, which used ``tokens``. Further calls have no effect."""
        limiter = self._limiter
        with limiter.lock:
            if not self._open:
                return
            self._open = False
            limiter.meter(self.subjects[0].name).held -= self._held
            difference = tokens - self._reserved
            for index, subject in enumerate(self.subjects):
                meter = limiter.meter(subject.name)
                meter.parallel -= 1
                if self._entries:
                    meter.tokens.change(self._entries[index], difference)
                    meter.day.change(period_of("day", self._at), difference)
                    meter.month.change(period_of("month", self._at), difference)

    def _check_tokens(self, subject: Subject, tokens: int, now: float) -> None:
        meter, limits = self._limiter.meter(subject.name), subject.limits
        asked = f"this request may use up to {tokens} (its prompt and max_tokens)"
        if limits.tpm_limit is not None:
            wait = meter.tokens.wait(now, tokens, limits.tpm_limit)
            if wait:
                raise LimitError(
                    f"{subject.name} has {limits.tpm_limit} tokens per minute, "
                    f"{meter.tokens.total(now)} of them used or reserved; {asked}",
                    limit="tpm_limit",
                    retry_after_s=wait,
                )
        for name, budget, limit in (
            ("daily_token_budget", meter.day, limits.daily_token_budget),
            ("monthly_token_budget", meter.month, limits.monthly_token_budget),
        ):
            used = budget.total(self._at)  # also without a limit: it opens the period
            if limit is not None and used + tokens > limit:
                wait = period_end(budget.kind, self._at) - self._at
                raise LimitError(
                    f"{subject.name} has a budget of {limit} tokens a {budget.kind}, {used} of "
                    f"them used or reserved; {asked}",
                    limit=name,
                    retry_after_s=wait if tokens <= limit else math.inf,
                )
