"""What comes in: by room in the queue, by blocks, by bytes, and once its delta is in memory."""

from __future__ import annotations

import pytest

from deltaserve.engine.admission import ByteBudget
from deltaserve.engine.gate import LONGEST_RETRY_S, QueueGate
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams
from deltaserve.errors import QueueFullError, RequestError
from tests.scheduler_helpers import (
    Clock,
    FakeStore,
    finish_order,
    make,
    make_scheduler,
    names,
    step,
)


def test_a_full_queue_refuses_at_once_and_changes_nothing() -> None:
    scheduler = make_scheduler(seqs=1, gate=QueueGate(max_requests=2), clock=Clock())
    for name in ("a", "b"):
        scheduler.add(make(name))
    before = scheduler.dump()
    with pytest.raises(QueueFullError, match="2 requests wait, max_queued_requests is 2"):
        scheduler.add(make("c"))
    assert scheduler.dump() == before
    step(scheduler)  # one is admitted, and makes room
    scheduler.add(make("c"))
    assert finish_order(scheduler) == ["a", "b", "c"]


def test_tokens_that_wait_are_limited_but_an_empty_queue_takes_anything() -> None:
    scheduler = make_scheduler(seqs=1, gate=QueueGate(max_tokens=20))
    scheduler.add(make("huge", prompt=50))
    with pytest.raises(QueueFullError, match="50 prompt tokens wait, max_queued_tokens is 20"):
        scheduler.add(make("small", prompt=1))
    step(scheduler)
    scheduler.add(make("ten", prompt=10))
    scheduler.add(make("ten more", prompt=10))
    with pytest.raises(QueueFullError):
        scheduler.add(make("one more", prompt=1))


def ask(tenant: str, number: int, prompt: int = 4) -> EngineRequest:
    return EngineRequest(
        f"{tenant}-{number}", "base", tuple(range(prompt)), SamplingParams(4), tenant=tenant
    )


def flood(gate: QueueGate, tenant: str, prompt: int = 4) -> int:
    """How many requests of a tenant come in before one is refused."""
    for number in range(1000):
        request = ask(tenant, number, prompt)
        try:
            gate.check(request, 0.0)
        except QueueFullError:
            return number
        gate.enter(request)
    raise AssertionError("nothing is refused")


def test_a_tenant_who_fills_the_queue_does_not_shut_others_out() -> None:
    gate = QueueGate(max_requests=60)
    assert flood(gate, "greedy") == 60
    with pytest.raises(QueueFullError, match="60 requests of greedy wait"):
        gate.check(ask("greedy", 60), 0.0)
    assert flood(gate, "polite") == 30
    assert flood(gate, "third") == 20
    assert gate.num_requests == 110
    for number in range(200):
        for tenant in ("greedy", "polite", "third"):
            gate.leave(f"{tenant}-{number}")
    assert (gate.num_requests, gate.num_tokens) == (0, 0)
    assert flood(gate, "greedy") == 60


def test_nor_by_prompt_tokens() -> None:
    gate = QueueGate(max_tokens=1000)
    assert flood(gate, "greedy", prompt=10) == 100
    assert flood(gate, "polite", prompt=10) == 50


def test_what_was_accepted_once_is_never_refused_again() -> None:
    """Preempted requests wait, too, but do not count."""
    scheduler = make_scheduler(blocks=10, seqs=2, gate=QueueGate(max_requests=1))
    scheduler.add(make("a", prompt=12, max_tokens=12))
    step(scheduler)
    scheduler.add(make("b", prompt=12, max_tokens=12))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.gate.num_requests == 0
    scheduler.add(make("c"))
    assert sorted(finish_order(scheduler)) == ["a", "b", "c"]


def test_when_to_come_back_follows_the_rate_of_admissions() -> None:
    clock = Clock()
    scheduler = make_scheduler(seqs=1, gate=QueueGate(max_requests=3), clock=clock)
    for number in range(9):  # one request every ten seconds
        scheduler.add(make(f"r{number}", max_tokens=1))
        step(scheduler)
        clock.now += 10.0
    for number in range(3):
        scheduler.add(make(f"w{number}"))
    with pytest.raises(QueueFullError, match="try again in 10 s") as refused:
        scheduler.add(make("late"))
    assert refused.value.retry_after_s == 10
    clock.now += 10_000.0  # nothing moved for long
    with pytest.raises(QueueFullError) as refused:
        scheduler.add(make("late"))
    assert refused.value.retry_after_s == LONGEST_RETRY_S


def test_an_aborted_request_leaves_the_queue() -> None:
    scheduler = make_scheduler(seqs=1, gate=QueueGate(max_requests=1))
    scheduler.add(make("a"))
    scheduler.abort("a")
    scheduler.add(make("b"))
    assert scheduler.gate.num_tokens == 4


def test_an_id_in_use_is_refused_until_it_is_free() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(make("a"))
    step(scheduler)
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(make("a"))
    scheduler.abort("a")
    scheduler.add(make("a"))
    assert finish_order(scheduler) == ["a"]


def test_the_first_that_does_not_fit_is_not_overtaken_by_smaller_ones() -> None:
    scheduler = make_scheduler(blocks=10)
    scheduler.add(make("long", prompt=16, max_tokens=8))
    step(scheduler)
    scheduler.add(make("large", prompt=36, max_tokens=1))
    scheduler.add(make("small", prompt=1, max_tokens=1))
    assert finish_order(scheduler) == ["long", "large", "small"]


def test_a_prompt_may_fill_all_memory() -> None:
    scheduler = make_scheduler(blocks=4, block_size=4, budget=5)
    scheduler.add(make("full", prompt=16, max_tokens=1))
    scheduler.add(make("next", prompt=16, max_tokens=1))
    assert finish_order(scheduler) == ["full", "next"]
    with pytest.raises(AssertionError, match="could never run"):
        scheduler.add(make("too long", prompt=16, max_tokens=2))
    with pytest.raises(AssertionError, match="starts with a token"):
        scheduler.add(make("empty", prompt=0))


def test_a_request_whose_delta_loads_blocks_nobody() -> None:
    store = FakeStore(ready=[0])
    scheduler = make_scheduler("fcfs", deltas=store)
    for name, slot in [("cold", 1), ("warm", 0), ("cold too", 1), ("other", 2)]:
        scheduler.add(make(name, slot=slot))
    assert names(row.seq for row in step(scheduler)[0].rows) == ["warm"]
    assert store.asked == {1, 2}
    store.ready.add(1)
    assert sorted(names(row.seq for row in step(scheduler)[0].rows)) == ["cold", "cold too", "warm"]
    event = scheduler.abort("other", FinishReason.ERROR, "its delta is damaged")
    assert event is not None
    assert (event.finish_reason, event.error) == ("error", "its delta is damaged")
    assert sorted(finish_order(scheduler)) == ["cold", "cold too", "warm"]
    assert not store.held


def test_bytes_limit_what_runs_together_but_never_all() -> None:
    """Base 100, deltas 50 each, 1 per token of KV; a step may read 200 bytes."""
    store = FakeStore(ready=range(9), bytes_of_slot=50)
    budget = ByteBudget(slo_tpot_ms=20.0, base_bytes=100, kv_bytes_per_token=1)
    scheduler = make_scheduler("fcfs", deltas=store, byte_budget=budget)
    budget.measure(10_000, seconds=1.0)
    for name, slot in [("a", 1), ("b", 1), ("c", 2), ("d", 1)]:
        scheduler.add(make(name, slot=slot, prompt=10))
    step(scheduler)
    assert names(scheduler.running) == ["a", "b"], "c's delta is too much, and d must not pass it"
    assert sorted(store.held, key=id) == sorted(scheduler.running, key=id)
    assert finish_order(scheduler) == ["a", "b", "c", "d"]
    budget.slo_tpot_ms = 0.001  # not even the base
    for name in ("x", "y"):
        scheduler.add(make(name))
    assert finish_order(scheduler) == ["x", "y"]


def test_the_bandwidth_is_measured_on_steps_that_only_decode() -> None:
    budget = ByteBudget(slo_tpot_ms=20.0, base_bytes=100, kv_bytes_per_token=1)
    scheduler = make_scheduler(byte_budget=budget)
    scheduler.add(make("a", prompt=10, max_tokens=9))
    plan, _ = step(scheduler)
    scheduler.observe(plan, 1.0)
    assert budget.bytes_per_s is None, "a prefill is bound by arithmetic"
    plan, _ = step(scheduler)
    scheduler.observe(plan, 0.5)
    assert budget.bytes_per_s == (100 + 12) / 0.5
    budget.measure(448, seconds=1.0)
    assert budget.bytes_per_s == pytest.approx(0.9 * 224 + 0.1 * 448)


def test_without_an_objective_bytes_do_not_matter() -> None:
    budget = ByteBudget(None, base_bytes=10**15)
    budget.measure(1, seconds=1.0)
    scheduler = make_scheduler(byte_budget=budget)
    for name in "abcd":
        scheduler.add(make(name))
    step(scheduler)
    assert len(scheduler.running) == 4
