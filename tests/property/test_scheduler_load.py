"""Any load of tenants, bands, siblings and deltas that come and go: promises hold, all end."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import FinishReason
from tests.property.test_scheduler import check_plan
from tests.scheduler_helpers import Clock, FakeStore, make, make_scheduler

SLOTS = range(4)
STOP = 5


@dataclass(frozen=True)
class Arrival:
    at: int
    tenant: str
    weight: float
    priority: int
    slot: int
    prompt: int
    max_tokens: int
    siblings: int
    abort_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 15),
        tenant=st.sampled_from("abc"),
        weight=st.sampled_from([0.1, 1.0, 5.0]),
        priority=st.sampled_from([-1, 0, 7]),
        slot=st.sampled_from(SLOTS),
        prompt=st.integers(1, 24),
        max_tokens=st.integers(1, 12),
        siblings=st.sampled_from([0, 0, 0, 1, 3]),
        abort_after=st.one_of(st.none(), st.integers(0, 15)),
    ),
    min_size=1,
    max_size=10,
)


class Load:
    """Feeds a scheduler, and keeps what it was told."""

    def __init__(self, scheduler: Scheduler, arrivals: list[Arrival], cache: bool) -> None:
        self.scheduler = scheduler
        self.arrivals = arrivals
        self.cache = cache
        self.ended: dict[str, FinishReason] = {}
        self.drawn: dict[str, int] = {}
        self.wanted: dict[str, int] = {}

    def arrive(self, now: int) -> None:
        for number, arrival in enumerate(self.arrivals):
            if arrival.at == now:
                for sibling in range(arrival.siblings + 1):
                    self._add(f"{number}-{sibling}", f"{number}-0" if sibling else None, arrival)
            if arrival.abort_after is not None and arrival.at + arrival.abort_after == now:
                self._abort(f"{number}-0")

    def commit(self, plan: StepPlan, tokens: Random) -> None:
        sampled = {row.seq: tokens.randint(4, 30) for row in plan.rows if row.samples}
        for event in self.scheduler.commit(plan, sampled):
            self._note(event.request_id, event.finish_reason)
            self.drawn[event.request_id] += 1

    def _add(self, name: str, fork_of: str | None, arrival: Arrival) -> None:
        self.drawn[name], self.wanted[name] = 0, arrival.max_tokens
        self.scheduler.add(
            make(
                name, arrival.tenant, prompt=arrival.prompt, max_tokens=arrival.max_tokens,
                slot=arrival.slot, cache=self.cache, stop=frozenset({STOP}), fork_of=fork_of,
                weight=arrival.weight, priority=arrival.priority,
            )
        )  # fmt: skip

    def _abort(self, name: str) -> None:
        event = self.scheduler.abort(name)
        assert (event is None) == (name in self.ended)
        if event is not None:
            self._note(name, event.finish_reason)
        assert self.scheduler.abort(name) is None, "the second abort found something"

    def _note(self, name: str, reason: FinishReason | None) -> None:
        assert name not in self.ended, "an event after the last"
        if reason is not None:
            self.ended[name] = reason


def check_waiting(scheduler: Scheduler, store: FakeStore) -> None:
    waiting = list(scheduler.waiting)
    assert len(waiting) == len(set(waiting)) == len(scheduler.waiting)
    assert all(seq in scheduler.waiting for seq in waiting)
    assert {*waiting, *scheduler.running} == set(scheduler._live.values())
    held = {seq for seq in [*waiting, *scheduler.running] if seq.holds_delta}
    assert held == set(store.held)
    assert held >= set(scheduler.running)
    assert all(seq.aged for seq in held - set(scheduler.running))
    fresh = [seq for seq in waiting if seq.num_cached is None]
    assert scheduler.gate.num_requests == len(fresh)


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(["fcfs", "priority", "vtc"]),
    arrivals=arrivals,
    blocks=st.integers(9, 30),
    budget=st.integers(1, 40),
    seqs=st.integers(1, 6),  # more rows than the budget, too
    cache=st.booleans(),
    max_wait=st.sampled_from([3.0, 1e9]),
    chance=st.randoms(use_true_random=False),
)
def test_promises_hold_and_every_request_ends(
    policy: str, arrivals: list[Arrival], blocks: int, budget: int, seqs: int, cache: bool,
    max_wait: float, chance: Random,
) -> None:  # fmt: skip
    store, clock = FakeStore(ready=[0]), Clock()
    scheduler = make_scheduler(
        policy, blocks=blocks, budget=budget, seqs=seqs, deltas=store, max_wait_s=max_wait,
        clock=clock,
    )  # fmt: skip
    load = Load(scheduler, arrivals, cache)
    for now in range(4000):
        clock.now = float(now)
        load.arrive(now)
        in_use = {seq.slot for seq in store.held}
        for slot in SLOTS[1:]:  # loaded when asked for, and dropped when unused, both by chance
            if slot in store.ready and slot not in in_use and chance.random() < 0.3:
                store.ready.discard(slot)
            elif slot in store.asked and chance.random() < 0.3:
                store.ready.add(slot)
        plan = scheduler.plan()
        load.commit(plan, chance)
        check_plan_after_commit(scheduler, plan)
        check_waiting(scheduler, store)
        if now > 30 and not scheduler.has_work():
            break
    assert set(load.ended) == set(load.drawn), "somebody waits for ever"
    assert not store.held
    assert scheduler.gate.num_requests == scheduler.gate.num_tokens == 0
    scheduler.pool.check([])
    check_answers(load)


def check_plan_after_commit(scheduler: Scheduler, plan: StepPlan) -> None:
    assert plan.num_tokens <= scheduler.max_num_batched_tokens
    assert len({row.seq for row in plan.rows}) == len(plan.rows)
    assert len(scheduler.running) <= min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    assert not set(scheduler.running) & set(scheduler.waiting)
    scheduler.pool.check([block for seq in scheduler.running for block in seq.blocks])
    assert not any(seq.blocks for seq in scheduler.waiting)


def check_answers(load: Load) -> None:
    for name, reason in load.ended.items():
        assert load.drawn[name] <= load.wanted[name]
        if reason is FinishReason.LENGTH:
            assert load.drawn[name] == load.wanted[name]
    usage = load.scheduler.usage
    assert usage.total.generation_tokens == sum(load.drawn.values())
    for table in (usage.tenants, usage.models):
        assert sum(row.generation_tokens for row in table.values()) == sum(load.drawn.values())
        assert sum(row.requests for row in table.values()) == len(load.drawn)


@settings(max_examples=60, deadline=None)
@given(arrivals=arrivals, budget=st.integers(4, 40), chance=st.randoms(use_true_random=False))
def test_no_shared_block_is_written(arrivals: list[Arrival], budget: int, chance: Random) -> None:
    """Between plan and commit, where the device would write."""
    scheduler = make_scheduler(blocks=20, budget=budget)
    load = Load(scheduler, arrivals, cache=False)
    for now in range(16):
        load.arrive(now)
        plan = scheduler.plan()
        check_plan(scheduler, plan)
        load.commit(plan, chance)


@settings(max_examples=100, deadline=None)
@given(arrivals=arrivals, chance=st.randoms(use_true_random=False))
def test_a_lower_band_never_takes_the_place_of_a_higher_one(
    arrivals: list[Arrival], chance: Random
) -> None:
    scheduler = make_scheduler(blocks=14, seqs=3)
    load = Load(scheduler, arrivals, cache=False)
    for now in range(60):
        load.arrive(now)
        before = set(scheduler.running)
        plan = scheduler.plan()
        preempted = [seq for seq in before if seq not in scheduler.running]
        for victim in preempted:
            kept = [seq for seq in before if seq in scheduler.running]
            assert all(_band(seq) <= _band(victim) for seq in kept)
        admitted = [seq for seq in scheduler.running if seq not in before]
        passed = [seq for seq in scheduler.waiting if not seq.waits_for_sibling(4)]
        assert not admitted or all(_band(seq) >= max(map(_band, admitted)) for seq in passed)
        load.commit(plan, chance)


def _band(seq: Sequence) -> int:
    return seq.request.priority
