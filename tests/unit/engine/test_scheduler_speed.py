"""Planning stays far below a step, however many wait."""

from __future__ import annotations

import time

import pytest

from tests.scheduler_helpers import TOKEN, make, make_scheduler


@pytest.mark.parametrize("policy", ["fcfs", "priority", "vtc"])
def test_planning_and_committing_cost_less_than_a_millisecond(policy: str) -> None:
    """CPU time, 32 running and 1,000 waiting requests of 100 tenants in two bands."""
    scheduler = make_scheduler(
        policy, blocks=4096, block_size=16, seqs=32, budget=2048, max_wait_s=300.0
    )
    for number in range(1400):
        tenant, slot = f"t{number % 100}", number % 8
        options = {"priority": number % 2, "max_tokens": 20 + number % 60}
        scheduler.add(make(f"r{number}", tenant, prompt=64, slot=slot, cache=True, **options))
    steps, seconds = 0, 0.0
    while len(scheduler.waiting) > 1000:
        start = time.process_time()
        plan = scheduler.plan()
        sampled = {row.seq: TOKEN for row in plan.rows if row.samples}
        scheduler.commit(plan, sampled)
        seconds += time.process_time() - start
        steps += 1
    assert len(scheduler.running) == 32
    print(f"{policy}: {seconds / steps * 1e6:.0f} us a step, {steps} steps")
    assert seconds / steps < 1e-3
