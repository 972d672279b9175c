"""n > 1: a prompt is computed once, and its full blocks belong to all of its answers."""

from __future__ import annotations

import pytest

from deltaserve.engine.scheduler import Scheduler
from tests.scheduler_helpers import finish_order, make, make_scheduler, names, step

PROMPT = 18  # four full blocks and two tokens
FULL = 4


def add_family(scheduler: Scheduler, count: int = 3, cache: bool = False) -> None:
    for number in range(count):
        fork_of = "s0" if number else None
        scheduler.add(make(f"s{number}", prompt=PROMPT, cache=cache, fork_of=fork_of))


@pytest.mark.parametrize("cache", [False, True])
def test_the_prompt_is_computed_once_and_its_full_blocks_are_shared(cache: bool) -> None:
    scheduler = make_scheduler(blocks=20)
    add_family(scheduler, cache=cache)
    plan, _ = step(scheduler)
    assert names(row.seq for row in plan.rows) == ["s0"], "the siblings wait for it"
    plan, _ = step(scheduler)
    assert [(row.start, row.num_new) for row in plan.rows] == [(18, 1), (16, 2), (16, 2)]
    first, *others = scheduler.running
    assert all(seq.blocks[:FULL] == first.blocks[:FULL] for seq in others)
    assert len({seq.blocks[FULL] for seq in scheduler.running}) == 3, "each has its own last block"
    assert scheduler.pool.num_used == FULL + 3
    scheduler.pool.check([block for seq in scheduler.running for block in seq.blocks])
    assert sorted(finish_order(scheduler)) == ["s0", "s1", "s2"]
    scheduler.pool.check([])


def test_siblings_that_come_later_find_what_is_computed() -> None:
    scheduler = make_scheduler(blocks=20)
    scheduler.add(make("s0", prompt=PROMPT, max_tokens=9))
    step(scheduler)
    scheduler.add(make("s1", prompt=PROMPT, fork_of="s0"))
    plan, _ = step(scheduler)
    assert (plan.rows[1].start, plan.rows[1].num_new) == (16, 2)


def test_an_answer_of_one_token_still_leaves_its_prompt_to_the_others() -> None:
    scheduler = make_scheduler(blocks=20)
    for number in range(3):
        fork_of = "s0" if number else None
        scheduler.add(make(f"s{number}", prompt=PROMPT, max_tokens=1, fork_of=fork_of))
    assert finish_order(scheduler)[0] == "s0"
    assert scheduler.usage.total.cached_tokens == 2 * 4 * FULL


def test_an_aborted_first_one_leaves_the_prompt_to_the_next() -> None:
    scheduler = make_scheduler(blocks=40, budget=8)
    add_family(scheduler, cache=False)
    step(scheduler)
    scheduler.abort("s0")
    plan, _ = step(scheduler)
    assert [(row.seq.request.request_id, row.start) for row in plan.rows] == [("s1", 8)], (
        "what s0 had computed is used, and s2 waits again"
    )
    assert sorted(finish_order(scheduler)) == ["s1", "s2"]


def test_siblings_do_not_hold_up_others() -> None:
    scheduler = make_scheduler("fcfs", blocks=40, budget=20)
    add_family(scheduler)
    scheduler.add(make("other", prompt=2))
    plan, _ = step(scheduler)
    assert names(row.seq for row in plan.rows) == ["s0", "other"]


@pytest.mark.parametrize(
    "difference", [{"prompt": 17}, {"slot": 1}, {"tenant": "b"}, {"cache_salt": "x"}]
)
def test_who_only_claims_to_be_a_sibling_shares_nothing(difference: dict[str, object]) -> None:
    scheduler = make_scheduler(blocks=40)
    scheduler.add(make("s0", "a", prompt=PROMPT))
    options = {"tenant": "a", "prompt": PROMPT, **difference}
    scheduler.add(make("s1", fork_of="s0", **options))  # type: ignore[arg-type]
    scheduler.add(make("s2", prompt=PROMPT, fork_of="never heard of"))
    assert len(step(scheduler)[0].rows) == 3, "nobody waits for anybody"
    first, second, third = scheduler.running
    assert not {*first.blocks} & {*second.blocks} & {*third.blocks}


def test_a_later_request_with_the_same_id_is_another_family() -> None:
    scheduler = make_scheduler(blocks=40)
    add_family(scheduler)
    finish_order(scheduler)
    cached = scheduler.usage.total.cached_tokens
    scheduler.add(make("s0", prompt=PROMPT, slot=1))
    scheduler.add(make("s1", prompt=PROMPT, slot=1, fork_of="s0"))
    finish_order(scheduler)
    assert scheduler.usage.total.cached_tokens - cached == 4 * FULL, "s0's own prompt was not found"
