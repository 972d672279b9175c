"""Limits under any sequence of requests: kept in every window, conserved, free of races."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deltaserve.errors import LimitError
from deltaserve.tenancy.limits import GRAIN, WINDOW, Limiter, Subject, Ticket, Window, period_of
from deltaserve.tenancy.tenants import Limits

ROUNDING = 1e-6

TENANT = Subject(
    "tenant acme",
    Limits(
        rpm_limit=5,
        tpm_limit=100,
        max_parallel_requests=3,
        daily_token_budget=400,
        monthly_token_budget=1000,
    ),
)
KEYS = [Subject("key a", Limits(rpm_limit=3)), Subject("key b", Limits(tpm_limit=60))]


@dataclass
class Request:
    at: float
    wall: float
    subjects: list[Subject]
    ticket: Ticket
    tokens: int
    """Reserved while it runs, then used."""
    running: bool = True


class LimitMachine(RuleBasedStateMachine):
    """Requests of one tenant, by two keys, come and go while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limiter = Limiter(lambda: self.now, self.wall)
        self.requests: list[Request] = []
        self.waits: list[float] = []
        self.entered: list[tuple[float, Subject]] = []

    def wall(self) -> float:
        return 1_700_000_000 + self.now

    @rule(seconds=st.sampled_from([0.01, 0.05, 1.0, 20.0, 59.9, 60.0, 40_000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=st.sampled_from(KEYS), tokens=st.integers(1, 120))
    def come(self, key: Subject, tokens: int) -> None:
        subjects = [TENANT, key]
        if (ticket := self.enter(subjects)) is None:
            return
        try:
            ticket.reserve(tokens)
        except LimitError as error:
            ticket.settle(0)
            self.waits.append(error.retry_after_s)
        else:
            self.requests.append(Request(self.now, self.wall(), subjects, ticket, tokens))

    def enter(self, subjects: list[Subject]) -> Ticket | None:
        try:
            ticket = self.limiter.enter(subjects)
        except LimitError as error:
            self.waits.append(error.retry_after_s)
            return None
        self.entered += [(self.now, subject) for subject in subjects]
        return ticket

    @rule(which=st.integers(0, 10), part=st.floats(0, 1))
    def go(self, which: int, part: float) -> None:
        running = [request for request in self.requests if request.running]
        if running:
            request = running[which % len(running)]
            request.running = False
            request.tokens = int(request.tokens * part)
            request.ticket.settle(request.tokens)
            request.ticket.settle(10**6)  # without effect

    @invariant()
    def no_window_holds_more_than_the_limit(self) -> None:
        for subject in (TENANT, *KEYS):
            starts = [at for at, who in self.entered if who is subject]
            if (rpm := subject.limits.rpm_limit) is not None:
                for start in starts:
                    assert sum(start <= at < start + WINDOW for at in starts) <= rpm
            if (tpm := subject.limits.tpm_limit) is not None:
                mine = [r for r in self.requests if subject in r.subjects]
                for start in (r.at for r in mine):
                    within = [r.tokens for r in mine if start <= r.at < start + WINDOW]
                    assert sum(within) <= tpm

    @invariant()
    def who_is_refused_is_told_how_long(self) -> None:
        assert all(wait > 0 for wait in self.waits)

    @invariant()
    def budgets_hold_and_are_counted_exactly(self) -> None:
        meter = self.limiter.meter(TENANT.name)
        for kind, budget, limit in (("day", meter.day, 400), ("month", meter.month, 1000)):
            present = period_of(kind, self.wall())
            mine = [r.tokens for r in self.requests if period_of(kind, r.wall) == present]
            assert budget.total(self.wall()) == sum(mine) <= limit

    @invariant()
    def places_in_use_are_those_of_running_requests(self) -> None:
        running = sum(request.running for request in self.requests)
        assert self.limiter.meter(TENANT.name).parallel == running <= 3


LimitMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLimits = LimitMachine.TestCase


amounts = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1, max_size=30)


@given(taken=amounts, amount=st.integers(1, 120))
def test_waiting_as_long_as_told_is_enough_and_hardly_more_than_needed(taken, amount):
    window, now = Window(), 0.0
    for pause, tokens in taken:
        now += pause
        window.take(now, tokens)
    wait = window.wait(now, amount, 100)
    if amount > 100:
        assert math.isinf(wait)
        return
    assert window.wait(now + wait + ROUNDING, amount, 100) == 0
    # Exactly, entry by entry, without the grain:
    ends, end = [], 0.0
    for pause, tokens in taken:
        end += pause
        ends.append((end + WINDOW, tokens))
    needed = min(
        at for at in [now, *(e for e, _ in ends)]
        if at >= now and sum(tokens for e, tokens in ends if e > at) + amount <= 100
    )  # fmt: skip
    assert now + wait <= needed + GRAIN + ROUNDING


@given(taken=amounts)
def test_a_window_forgets_everything_in_the_end(taken):
    window, now, entries = Window(), 0.0, []
    for pause, tokens in taken:
        now += pause
        entries.append((window.take(now, tokens), tokens))
        if len(entries) % 3 == 0:
            entry, reserved = entries.pop(0)
            window.change(entry, -reserved)
    assert window.total(now) >= 0
    assert window.total(now + WINDOW + ROUNDING) == 0
    for entry, reserved in entries:  # too late to matter
        window.change(entry, -reserved)
    assert window.total(now + WINDOW + ROUNDING) == 0


def test_memory_of_a_window_is_bounded():
    window = Window()
    for tick in range(200_000):
        window.take(tick * 0.001, 1)
        window.total(tick * 0.001)
    assert len(window._entries) <= WINDOW / GRAIN + 2


@pytest.mark.parametrize("field", ["rpm_limit", "max_parallel_requests", "tpm_limit"])
def test_threads_together_get_no_more_than_the_limit(field):
    limiter = Limiter()
    subject = Subject("tenant acme", Limits(**{field: 50}))
    admitted: list[Ticket] = []
    start = threading.Barrier(8)

    def hammer() -> None:
        start.wait()
        for _ in range(40):
            try:
                ticket = limiter.enter([subject])
                ticket.reserve(1)
                admitted.append(ticket)
            except LimitError:
                pass

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 50
