"""A scheduler without an engine: a clock to turn, deltas that load when told, invented tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from deltaserve.engine.fairness import make_policy
from deltaserve.engine.kv import BlockPool, root_key
from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, SamplingParams, TokenEvent

TOKEN = 9
"""What is drawn unless a test says otherwise."""


class Clock:
    """Seconds, when somebody turns it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeStore:
    """A DeltaStore whose deltas are ready when the test says so; it keeps the books."""

    def __init__(self, ready: Iterable[int] = (), bytes_of_slot: int = 0) -> None:
        self.ready = set(ready)
        self.bytes_of_slot = bytes_of_slot
        self.held: Counter[Sequence] = Counter()
        self.asked: set[int] = set()

    def acquire(self, seq: Sequence) -> bool:
        assert not self.held[seq], "acquired twice"
        if seq.slot in self.ready:
            self.held[seq] = 1
            return True
        self.asked.add(seq.slot)
        return False

    def release(self, seq: Sequence) -> None:
        assert self.held[seq], "released without a hold"
        del self.held[seq]

    def step_bytes(self, slot: int) -> int:
        return self.bytes_of_slot if slot else 0


def make_scheduler(
    policy: str = "vtc", *, blocks: int = 64, block_size: int = 4, seqs: int = 4, budget: int = 64,
    **options: object,
) -> Scheduler:  # fmt: skip
    return Scheduler(
        BlockPool(blocks, block_size),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        policy=make_policy(policy),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


def make(
    name: str, tenant: str = "", *, prompt: int | tuple[int, ...] = 4, max_tokens: int = 4,
    slot: int = 0, cache: bool = False, stop: frozenset[int] = frozenset(), **fields: object,
) -> Sequence:  # fmt: skip
    """A sequence; ``prompt``: its tokens, or how many."""
    tokens = prompt if isinstance(prompt, tuple) else tuple(range(10, 10 + prompt))
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
    request = EngineRequest(name, f"m{slot}", tokens, params, tenant=tenant, **fields)  # type: ignore[arg-type]
    root = root_key(f"delta{slot}", "", tenant) if cache else None
    return Sequence(request, slot, seed=0, root=root)


def step(
    scheduler: Scheduler, draw: Callable[[], int] = lambda: TOKEN
) -> tuple[StepPlan, list[TokenEvent]]:
    plan = scheduler.plan()
    return plan, scheduler.commit(plan, {row.seq: draw() for row in plan.rows if row.samples})


def names(seqs: Iterable[Sequence]) -> list[str]:
    return [seq.request.request_id for seq in seqs]


def finish_order(scheduler: Scheduler, limit: int = 2000) -> list[str]:
    """Step until done; who ended, in that order."""
    ended: list[str] = []
    for _ in range(limit):
        if not scheduler.has_work():
            return ended
        ended += [event.request_id for event in step(scheduler)[1] if event.finish_reason]
    raise AssertionError(f"still at work: {scheduler.dump()}")
