"""Shares of service: the published bound, no credit for idleness, and an end to all waiting."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.fairness import KEPT_COUNTERS, VirtualTokenCounters
from deltaserve.engine.scheduler import Scheduler
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, SamplingParams
from tests.scheduler_helpers import (
    TOKEN,
    Clock,
    FakeStore,
    finish_order,
    make,
    make_scheduler,
    names,
    step,
)

BLOCK = 4


class Backlog:
    """Keeps requests of some tenants waiting, and counts by itself what each was served."""

    def __init__(self, scheduler: Scheduler, chance: Random, prompt: int, answer: int) -> None:
        self.scheduler = scheduler
        self.chance = chance
        self.longest = prompt, answer
        self.served: dict[str, float] = defaultdict(float)
        self._seen: set[Sequence] = set()
        self._count = 0

    def fill(self, tenant: str, weight: float = 1.0, least: int = 2) -> None:
        """So that the tenant has requests waiting, whatever the step admits."""
        queued = sum(seq.request.tenant == tenant for seq in self.scheduler.waiting)
        for _ in range(least + self.scheduler.max_num_seqs - queued):
            self._count += 1
            prompt, answer = (self.chance.randint(1, most) for most in self.longest)
            start = self.chance.randint(10, 12)  # some prompts begin alike
            self.scheduler.add(
                make(
                    f"{tenant}{self._count}", tenant, prompt=tuple(range(start, start + prompt)),
                    max_tokens=answer, slot=self.chance.randint(0, 2), weight=weight, cache=True,
                )
            )  # fmt: skip

    def step(self) -> None:
        plan = self.scheduler.plan()
        drawing = {row.seq: TOKEN for row in plan.rows if row.samples}
        self.scheduler.commit(plan, drawing)
        for row in plan.rows:
            tenant = row.seq.request.tenant
            if row.seq not in self._seen:
                self._seen.add(row.seq)
                cached = row.seq.num_cached or 0
                self.served[tenant] += row.seq.num_prompt - cached + 0.1 * cached
            self.served[tenant] += 2.0 * (row.seq in drawing)


@settings(max_examples=80, deadline=None)
@given(
    weights=st.tuples(*[st.sampled_from([0.25, 1.0, 3.0])] * 3),
    blocks=st.integers(10, 60),
    seqs=st.integers(1, 6),
    budget=st.integers(6, 64),
    prompt=st.integers(1, 20),
    answer=st.integers(1, 20),
    third=st.booleans(),
    chance=st.randoms(use_true_random=False),
)
def test_backlogged_tenants_stay_within_the_published_bound(
    weights: tuple[float, float, float], blocks: int, seqs: int, budget: int, prompt: int,
    answer: int, third: bool, chance: Random,
) -> None:  # fmt: skip
    scheduler = make_scheduler(blocks=blocks, block_size=BLOCK, seqs=seqs, budget=budget)
    load = Backlog(scheduler, chance, prompt, answer)
    gaps = [0.0]
    for now in range(100):
        load.fill("f", weights[0])
        load.fill("g", weights[1])
        if third and now == 40:  # comes and goes; f and g must not notice
            load.fill("h", weights[2])
        load.step()
        gaps.append(load.served["f"] / weights[0] - load.served["g"] / weights[1])
    gap = max(gaps) - min(gaps) - 1e-6  # over every interval [t1, t2), up to rounding
    memory = blocks * BLOCK
    always = prompt + 2 * seqs * answer
    published = max(prompt, 2 * memory)
    assert gap <= 2 * always / min(weights[:2])
    if seqs * answer <= memory - prompt:
        assert gap <= 2 * published / min(weights[:2])


@pytest.mark.parametrize(("policy", "fair"), [("vtc", True), ("fcfs", False)])
def test_a_flood_takes_no_more_than_its_share(policy: str, fair: bool) -> None:
    """Short requests against eight times as many that are six times as long."""
    scheduler = make_scheduler(policy, blocks=100, seqs=8)
    load = Backlog(scheduler, Random(0), 6, 6)
    flood = Backlog(scheduler, Random(1), 36, 36)
    for _ in range(400):
        load.fill("light", least=4)
        flood.fill("flood", least=80)
        load.step()
    ratio = load.served["light"] / load.served["flood"]
    assert (ratio > 0.9) is fair
    assert fair or ratio < 0.3


def test_service_follows_the_weights() -> None:
    scheduler = make_scheduler(blocks=200, seqs=8)
    load = Backlog(scheduler, Random(0), 12, 12)
    for _ in range(600):
        load.fill("one", weight=1.0)
        load.fill("three", weight=3.0)
        load.step()
    assert load.served["three"] / load.served["one"] == pytest.approx(3.0, rel=0.1)


def test_an_idle_tenant_cannot_hoard_credit() -> None:
    """It comes back lifted to the least served of those that wait: they share evenly from then."""
    scheduler = make_scheduler(blocks=100)
    load = Backlog(scheduler, Random(0), 8, 8)
    load.fill("idle", least=1)
    for _ in range(300):
        load.fill("busy")
        load.step()
    before = dict(load.served)
    for _ in range(100):
        load.fill("busy")
        load.fill("idle")
        load.step()
    gained = {name: load.served[name] - before[name] for name in before}
    assert gained["idle"] < 1.3 * gained["busy"]
    assert gained["busy"] < 1.3 * gained["idle"]


def request_of(tenant: str, prompt: int = 10, **fields: object) -> EngineRequest:
    params = SamplingParams(max_tokens=1)
    return EngineRequest("r", "m", tuple(range(prompt)), params, tenant=tenant, **fields)  # type: ignore[arg-type]


def test_a_newcomer_is_lifted_to_the_least_served_that_waits_in_its_band() -> None:
    counters = VirtualTokenCounters()
    counters.served = {"a": 70.0, "b": 50.0, "other band": 5.0}
    counters.arrive((0, "new"), [(0, "a"), (0, "b"), (1, "other band")])
    assert counters.served["new"] == 50.0
    counters.served["rich"] = 90.0
    counters.arrive((0, "rich"), [(0, "a")])
    assert counters.served["rich"] == 90.0, "a debt stays"


def test_with_nobody_waiting_a_newcomer_is_lifted_to_the_last_that_left() -> None:
    counters = VirtualTokenCounters()
    counters.served = {"a": 70.0, "b": 50.0}
    counters.leave((0, "a"))
    counters.leave((0, "b"))
    counters.charge_output(request_of("b"))  # it still runs
    counters.arrive((0, "new"), [])
    assert counters.served["new"] == 52.0
    counters.arrive((3, "first of its band"), [])
    assert counters.served["first of its band"] == 0.0


def test_prices_are_one_two_and_a_tenth_divided_by_the_weight() -> None:
    counters = VirtualTokenCounters()
    counters.charge_input(request_of("a", weight=2.0), num_cached=0)
    assert counters.served["a"] == 5.0
    counters.charge_input(request_of("a", weight=2.0), num_cached=10)
    assert counters.served["a"] == 5.5
    counters.charge_output(request_of("a", weight=2.0))
    assert counters.served["a"] == 6.5


def test_counters_that_a_lift_would_overwrite_are_forgotten() -> None:
    counters = VirtualTokenCounters()
    for number in range(3 * KEPT_COUNTERS):
        counters.arrive((0, f"t{number}"), [])
        counters.charge_input(request_of(f"t{number}"), num_cached=0)
        counters.leave((0, f"t{number}"))
    assert len(counters.served) <= KEPT_COUNTERS + 1
    assert counters.served[f"t{number}"] == 30 * KEPT_COUNTERS, "one pays no less for it"


def test_recomputation_after_a_preemption_is_not_charged() -> None:
    scheduler = make_scheduler(blocks=10, seqs=2)
    scheduler.add(make("a", "a", prompt=12, max_tokens=12))
    scheduler.add(make("b", "b", prompt=12, max_tokens=12))
    finish_order(scheduler)
    assert scheduler.num_preemptions > 0
    assert scheduler.policy.dump() == {"a": 36.0, "b": 36.0}


def test_the_youngest_of_the_most_served_tenant_gives_way() -> None:
    scheduler = make_scheduler(blocks=16, seqs=4)
    for name, tenant in [("old", "rich"), ("young", "rich"), ("last", "poor")]:
        scheduler.add(make(name, tenant, prompt=8, max_tokens=20))
    step(scheduler)
    assert names(scheduler.running) == ["old", "last", "young"]
    while not scheduler.num_preemptions:
        step(scheduler)
    assert names(scheduler.waiting) == ["young"]


def test_a_request_that_is_itself_the_last_gives_way() -> None:
    scheduler = make_scheduler("fcfs", blocks=8, seqs=2)
    scheduler.add(make("first", prompt=8, max_tokens=16))
    scheduler.add(make("second", prompt=11, max_tokens=8))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert names(scheduler.waiting) == ["second"]
    assert finish_order(scheduler) == ["first", "second"]


def test_priority_goes_before_fairness_and_fairness_before_age() -> None:
    order = {}
    for policy in ("fcfs", "priority", "vtc"):
        scheduler = make_scheduler(policy, seqs=1)
        for name, tenant, priority in [
            ("a1", "a", 0), ("a2", "a", 0), ("b1", "b", 0), ("a0", "a", -1),
        ]:  # fmt: skip
            scheduler.add(make(name, tenant, priority=priority, max_tokens=2))
        order[policy] = finish_order(scheduler)
    assert order["fcfs"] == ["a1", "a2", "b1", "a0"]
    assert order["priority"] == ["a0", "a1", "a2", "b1"]
    assert order["vtc"] == ["a0", "b1", "a1", "a2"]


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(["priority", "vtc"]),
    prompt=st.integers(1, 60),
    seed=st.integers(0, 99),
    max_wait=st.integers(5, 60),
)
def test_nobody_waits_for_ever_behind_higher_bands_and_smaller_requests(
    policy: str, prompt: int, seed: int, max_wait: int
) -> None:
    """A request that needs most of the memory runs soon after ``max_wait_s``."""
    clock, chance = Clock(), Random(seed)
    scheduler = make_scheduler(policy, blocks=20, seqs=4, max_wait_s=float(max_wait), clock=clock)
    load = Backlog(scheduler, chance, 6, 10)
    patient = make("patient", "z", prompt=prompt, max_tokens=8, priority=5, weight=0.01)
    scheduler.add(patient)
    while patient not in scheduler.running:
        load.fill("crowd", least=1)
        load.step()
        clock.now += 1.0
        # What runs when it is due may take its ten tokens to end; nobody else comes in.
        assert clock.now <= max_wait + 12, "somebody overtook it"
    while patient in scheduler.running:
        load.fill("crowd", least=1)
        load.step()
    assert scheduler.usage.tenants["z"].preemptions == 0
    assert patient.num_generated == 8


def test_a_floods_own_backlog_does_not_make_its_requests_go_first() -> None:
    """All of its requests are old, but it is served all the time."""
    clock = Clock()
    scheduler = make_scheduler(seqs=2, max_wait_s=30.0, clock=clock)
    load = Backlog(scheduler, Random(0), 4, 4)
    load.fill("flood", least=300)
    for _ in range(100):
        load.step()
        clock.now += 1.0
    scheduler.add(make("light", "light"))
    step(scheduler)
    for _ in range(6):
        step(scheduler)
    assert "light" not in names(scheduler.waiting)


def test_who_waits_for_its_delta_blocks_nobody_and_goes_first_once_it_aged() -> None:
    clock, store = Clock(), FakeStore(ready=[0])
    scheduler = make_scheduler(seqs=1, deltas=store, max_wait_s=10.0, clock=clock)
    scheduler.add(make("cold", "a", slot=1, priority=9))
    scheduler.add(make("warm", "b"))
    assert names(row.seq for row in step(scheduler)[0].rows) == ["warm"]
    clock.now = 11.0
    finish_order_of_running = [e for _ in range(4) for e in step(scheduler)[1] if e.finish_reason]
    assert [event.request_id for event in finish_order_of_running] == ["warm"]
    step(scheduler)
    (cold,) = scheduler.waiting
    assert cold.aged, "the store is told that it is urgent"
    scheduler.add(make("urgent", "b", priority=-9))
    store.ready.add(1)
    assert names(row.seq for row in step(scheduler)[0].rows) == ["cold"]


def test_who_went_first_because_of_age_does_so_again_after_a_preemption() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_wait_s=10.0, clock=clock)
    scheduler.add(make("old", "b", priority=5))
    clock.now = 10.0
    scheduler.add(make("young", "a"))
    queue = scheduler.waiting
    first = next(queue.in_order(clock.now, set()))
    queue.remove(first, clock.now)
    first.num_cached = 0  # it ran
    queue.push(first, clock.now)
    assert names(queue.in_order(clock.now, set())) == ["old", "young"]


def test_the_order_follows_charges_between_two_lanes_of_a_tenant() -> None:
    """A tenant with requests for many models does not get more for it."""
    scheduler = make_scheduler(seqs=2)
    for slot in range(3):
        scheduler.add(make(f"many {slot}", "many", slot=slot))
    for number in range(3):
        scheduler.add(make(f"one {number}", "one"))
    step(scheduler)
    assert names(scheduler.running) == ["many 0", "one 0"]


def test_a_preempted_request_waits_before_those_of_its_tenant_that_came_later() -> None:
    scheduler = make_scheduler("fcfs", blocks=9, seqs=2)
    for name in ("a", "b", "c", "d"):
        scheduler.add(make(name, prompt=12, max_tokens=12))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert names(scheduler.waiting) == ["b", "c", "d"]
