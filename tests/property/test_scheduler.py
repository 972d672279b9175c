"""Whatever arrives, the plan keeps its promises and every request ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.kv import BlockPool, root_key
from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams

STOP_TOKEN = 5

arrival = st.tuples(
    st.integers(0, 12),  # step of arrival
    st.integers(1, 24),  # prompt tokens
    st.integers(1, 12),  # most generated tokens
    st.integers(0, 3),  # slot
    st.one_of(st.none(), st.integers(0, 15)),  # aborted so many steps after its arrival
)


def make_sequence(number: int, num_prompt: int, max_tokens: int, slot: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP_TOKEN}))
    request = EngineRequest(f"r{number}", f"m{slot}", tuple(range(10, 10 + num_prompt)), params)
    # Few different prompts: beginnings are often shared, within a slot only.
    return Sequence(request, slot, seed=0, root=root_key(f"delta{slot}", ""))


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    pool = scheduler.pool
    assert plan.num_tokens <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert not set(scheduler.running) & set(scheduler.waiting)
    assert [r.seq.slot for r in plan.rows] == sorted(r.seq.slot for r in plan.rows)
    pool.check([block for seq in scheduler.running for block in seq.blocks])
    users: dict[int, int] = {}
    for seq in scheduler.running:
        assert len(set(seq.blocks)) == len(seq.blocks)
        for block in seq.blocks:
            assert users.setdefault(block, seq.slot) == seq.slot
    assert not any(seq.blocks for seq in scheduler.waiting)
    for row in plan.rows:
        assert row.seq in scheduler.running
        assert row.num_new > 0
        assert row.start == row.seq.num_computed
        assert row.start + row.num_new <= row.seq.num_tokens
        assert len(row.seq.blocks) * pool.block_size >= row.start + row.num_new
        written = row.seq.blocks[row.start // pool.block_size :]
        others = [b for seq in scheduler.running if seq is not row.seq for b in seq.blocks]
        assert not set(written) & set(others), "a shared block would be written"


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(arrival, min_size=1, max_size=12),
    num_blocks=st.integers(9, 30),
    budget=st.integers(4, 40),
    max_num_seqs=st.integers(1, 4),
    tokens=st.randoms(use_true_random=False),
)
def test_plan_invariants_hold_and_every_request_ends(
    arrivals: list[tuple[int, int, int, int, int | None]],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    tokens,
) -> None:
    pool = BlockPool(num_blocks, block_size=4)
    scheduler = Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    pending = {
        n: (step, make_sequence(n, prompt, most, slot), abort)
        for n, (step, prompt, most, slot, abort) in enumerate(arrivals)
    }
    generated = {seq.request.request_id: 0 for _, seq, _ in pending.values()}
    ended: dict[str, FinishReason] = {}
    for step in range(2000):
        for arrived, seq, abort in pending.values():
            if arrived == step:
                scheduler.add(seq)
            if abort is not None and arrived + abort == step:
                event = scheduler.abort(seq.request.request_id)
                if event is not None:
                    ended[event.request_id] = FinishReason.ABORT
        plan = scheduler.plan()
        check_plan(scheduler, plan)
        sampled = {row.seq: tokens.randint(4, 30) for row in plan.rows if row.samples}
        for event in scheduler.commit(plan, sampled):
            assert event.request_id not in ended
            generated[event.request_id] += 1
            if event.finish_reason is not None:
                ended[event.request_id] = event.finish_reason
        if step > 30 and not scheduler.has_work():
            break
    assert set(ended) == set(generated)
    assert pool.num_used == 0
    for _, seq, _ in pending.values():
        name = seq.request.request_id
        assert generated[name] <= seq.request.sampling.max_tokens
        if ended[name] is FinishReason.LENGTH:
            assert generated[name] == seq.request.sampling.max_tokens
        if ended[name] is FinishReason.STOP:
            assert seq.token_ids[-1] == STOP_TOKEN


@given(st.lists(st.integers(1, 8), max_size=12))
def test_first_come_is_first_served(prompt_lengths: list[int]) -> None:
    """With equal work, requests finish in the order in which they came."""
    scheduler = Scheduler(BlockPool(64, 4), max_num_seqs=2, max_num_batched_tokens=64)
    for n, length in enumerate(prompt_lengths):
        scheduler.add(make_sequence(n, length, max_tokens=3, slot=n % 3))
    finished = []
    while scheduler.has_work():
        plan = scheduler.plan()
        sampled = {row.seq: 9 for row in plan.rows if row.samples}
        done = [e.request_id for e in scheduler.commit(plan, sampled) if e.finish_reason]
        finished += sorted(done, key=lambda name: int(name[1:]))
    assert finished == [f"r{n}" for n in range(len(prompt_lengths))]
