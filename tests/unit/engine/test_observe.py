"""Where time and tokens went: per request, per tenant and model, per step."""

from __future__ import annotations

import json

import pytest

from deltaserve.engine import observe
from deltaserve.engine.observe import OTHERS, UsageCounters
from deltaserve.engine.types import RequestTiming
from tests.scheduler_helpers import Clock, FakeStore, make, make_scheduler, step


def test_a_request_says_where_its_time_went() -> None:
    clock, store = Clock(), FakeStore()
    scheduler = make_scheduler(seqs=1, budget=4, deltas=store, clock=clock)
    scheduler.add(make("a", "acme", slot=1, prompt=8, max_tokens=3))
    clock.now = 1.0
    step(scheduler)  # the delta is not in memory
    clock.now = 3.0
    store.ready.add(1)
    step(scheduler)  # half of the prompt
    clock.now = 7.0
    step(scheduler)  # the other half, and a token
    clock.now = 15.0
    step(scheduler)
    clock.now = 31.0
    _, (event,) = step(scheduler)
    assert event.timing == RequestTiming(queued=1.0, load=2.0, prefill=4.0, decode=24.0)
    usage = scheduler.usage.tenants["acme"]
    assert (usage.requests, usage.prompt_tokens, usage.generation_tokens) == (1, 8, 3)
    assert (usage.queued_s, usage.load_s, usage.prefill_s, usage.decode_s) == (1, 2, 4, 24)
    assert scheduler.usage.models["m1"] == usage == scheduler.usage.total


def test_preemption_is_waiting_and_computing_again() -> None:
    clock = Clock()
    scheduler = make_scheduler("fcfs", blocks=10, seqs=2, clock=clock)
    scheduler.add(make("a", prompt=12, max_tokens=12))
    scheduler.add(make("b", prompt=12, max_tokens=12))
    timings = {}
    while scheduler.has_work():
        clock.now += 1.0
        for event in step(scheduler)[1]:
            if event.timing is not None:
                timings[event.request_id] = event.timing
    assert scheduler.num_preemptions > 0
    assert timings["a"].queued == 1.0
    assert timings["b"].queued > 1.0
    assert sum((t.queued + t.prefill + t.decode) for t in timings.values()) == 12 + clock.now


def test_only_the_last_event_has_the_times_and_an_abort_has_them_too() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", max_tokens=2))
    scheduler.add(make("b"))
    _, events = step(scheduler)
    assert [event.timing for event in events] == [None, None]
    aborted = scheduler.abort("b")
    assert aborted is not None
    assert aborted.timing is not None


def test_names_are_counted_up_to_a_limit_and_the_rest_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "MAX_NAMES", 3)
    counters = UsageCounters()
    for number in range(10):
        counters.begin(make(f"r{number}", f"tenant {number}"))
    assert {name: usage.requests for name, usage in counters.tenants.items()} == {
        "tenant 0": 1, "tenant 1": 1, "tenant 2": 1, OTHERS: 7,
    }  # fmt: skip
    assert counters.total.requests == 10


def test_the_dump_is_json_and_holds_no_prompt() -> None:
    scheduler = make_scheduler(seqs=1, clock=Clock())
    scheduler.add(make("a", "acme", prompt=(777, 777), priority=-3))
    scheduler.add(make("b", "acme", prompt=(777, 777)))
    step(scheduler)
    text = json.dumps(scheduler.dump())
    assert "777" not in text
    state = json.loads(text)
    assert state["served"] == {"acme": 4.0}
    (running,), (waiting,) = state["running"], state["waiting"]
    assert (running["request_id"], running["priority"], running["phase"]) == ("a", -3, "decode")
    assert (waiting["request_id"], waiting["blocks"], waiting["phase"]) == ("b", 0, "queued")


def test_a_lost_block_is_found_when_nothing_runs() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.pool.allocate(1)  # by nobody
    scheduler.add(make("a", max_tokens=1))
    clock.now = 5.0
    with pytest.raises(AssertionError, match="block uses do not add up"):
        step(scheduler)


def test_what_is_aborted_while_its_step_runs_says_nothing_more() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    scheduler.add(make("b"))
    plan = scheduler.plan()
    scheduler.abort("a")
    events = scheduler.commit(plan, {row.seq: 9 for row in plan.rows})
    assert [event.request_id for event in events] == ["b"]
    scheduler.pool.check([block for seq in scheduler.running for block in seq.blocks])


def test_a_storm_of_aborts_leaves_nothing_behind() -> None:
    scheduler = make_scheduler(blocks=200, seqs=16)
    for number in range(2000):
        scheduler.add(make(f"r{number}", f"t{number % 50}"))
    step(scheduler)
    for number in reversed(range(2000)):
        assert scheduler.abort(f"r{number}") is not None
        assert scheduler.abort(f"r{number}") is None
    assert not scheduler.has_work()
    assert not scheduler.plan().rows
    assert scheduler.gate.num_requests == len(scheduler.waiting) == scheduler.pool.num_used == 0
