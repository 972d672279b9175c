"""Which tokens run in the next step, and what follows from what they gave.

Pure Python. A step is planned under one token budget and has no phases: a sequence's
``num_computed`` chases its ``num_tokens``, so that chunked prefill, decode and the
recomputation of a preempted sequence are the same case.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltaserve.engine.admission import ByteBudget
from deltaserve.engine.deltas import DeltaStore, ResidentDeltas
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.kv import BlockPool, root_key
from deltaserve.engine.observe import Phase, UsageCounters
from deltaserve.engine.policy import Fcfs, Policy
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.sharing import PATIENCE_S, over_share
from deltaserve.engine.types import EngineRequest, FinishReason, TokenEvent
from deltaserve.engine.waiting import WaitingQueue
from deltaserve.errors import RequestError

CHECK_EVERY_S = 1.0
"""The integrity of an idle block pool is checked at most so often."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens ``start .. start + num_new`` of one sequence, to be computed in this step."""

    seq: Sequence
    start: int
    num_new: int

    @property
    def samples(self) -> bool:
        """Does the step reach the end of the known tokens, so that a new one is drawn?"""
        return self.start + self.num_new == self.seq.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step, sorted by delta: each delta's rows are one contiguous segment."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new for row in self.rows)

    @property
    def num_models(self) -> int:
        return len({row.seq.slot for row in self.rows})

    @property
    def rows_of_slot(self) -> dict[int, int]:
        """Tokens of each slot."""
        counts: Counter[int] = Counter()
        for row in self.rows:
            counts[row.seq.slot] += row.num_new
        return counts


class Scheduler:
    """Continuous batching: ``plan`` a step, ``commit`` its tokens.

    What runs goes on, as long as there are blocks for it; the last in the order of the policy
    gives way. Then, what waits is admitted in the same order. Passed over are those whose delta
    is not in memory, and siblings of a prompt that is being computed; the first of the others
    that does not fit ends it, so that nobody is overtaken for ever by what is smaller.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy | None = None,
        deltas: DeltaStore | None = None,
        byte_budget: ByteBudget | None = None,
        gate: QueueGate | None = None,
        max_wait_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """policy: FCFS unless given. deltas: all in memory unless given."""
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy or Fcfs()
        self.deltas = deltas or ResidentDeltas()
        self.byte_budget = byte_budget or ByteBudget()
        self.gate = gate or QueueGate()
        self.clock = clock
        self.usage = UsageCounters()
        self.waiting = WaitingQueue(self.policy, max_wait_s)
        self.running: dict[Sequence, None] = {}
        self._live: dict[str, Sequence] = {}
        self._numbers = itertools.count(1)
        self._checked_at = -math.inf

    @property
    def num_preemptions(self) -> int:
        return self.usage.total.preemptions

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError for an id that is in use, QueueFullError for lack of room."""
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use")
        self.gate.check(request, self.clock())

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises what ``check`` raises, and then has changed nothing."""
        last = seq.num_prompt + max(seq.request.sampling.max_tokens, 1) - 1
        assert seq.num_prompt > 0, "a sequence starts with a token"
        assert self.pool.blocks_for(last) <= self.pool.num_blocks, "it could never run"
        self.check(seq.request)
        now = self.clock()
        seq.number = next(self._numbers)
        self._live[seq.request.request_id] = seq
        self._join_siblings(seq)
        self.gate.enter(seq.request)
        self.usage.begin(seq)
        seq.watch.enter(Phase.QUEUED, now)
        self.waiting.push(seq, now)

    def has_work(self) -> bool:
        return bool(self._live)

    def plan(self) -> StepPlan:
        rows: list[Row] = []
        now = self.clock()
        self._share(now)
        budget = self._continue(rows, self.max_num_batched_tokens, now)
        self._admit(rows, budget, now)
        return StepPlan(tuple(sorted(rows, key=lambda row: row.seq.slot)))

    def commit(self, plan: StepPlan, sampled: Mapping[Sequence, int]) -> list[TokenEvent]:
        """Take the step's tokens; frees what finished. ``sampled`` holds the drawing rows."""
        events, now = [], self.clock()
        for row in plan.rows:
            if row.seq not in self.running:  # aborted while the step ran
                continue
            row.seq.num_computed += row.num_new
            self._publish(row.seq, row.start)
            if row.seq in sampled:
                events.append(self._take(row.seq, sampled[row.seq], now))
        self._check_when_idle(now)
        return events

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Tell how long the device took for a step: measures what a byte costs."""
        if self.byte_budget.slo_tpot_ms is not None and plan.num_tokens == len(plan.rows):
            seqs = [row.seq for row in plan.rows]
            self.byte_budget.measure(self.byte_budget.step_bytes(seqs, self.deltas), seconds)

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        error: str | None = None,
    ) -> TokenEvent | None:
        """Drop a request wherever it is -> its last event; None when it is not here (any more)."""
        seq = self._live.get(request_id)
        return None if seq is None else self._end(seq, TokenEvent(request_id, (), reason, error))

    def _share(self, now: float) -> None:
        """Room for a tenant who waits and has less than his share, from one who has more: else
        who holds all rows or blocks would keep others waiting until his answers end."""
        first = self._next_in_line(now)
        if first is None or first.first_since is None or now - first.first_since < PATIENCE_S:
            return
        if len(self.running) >= self.max_num_seqs:
            found = over_share(self.running, first, self.policy, lambda _: 1, self.max_num_seqs)
        elif not self._fit(first):
            blocks, total = lambda seq: len(seq.blocks), self.pool.num_blocks
            found = over_share(self.running, first, self.policy, blocks, total)
        else:
            return
        if found and self._hold_delta(first, now):
            if not first.aged:  # this step's tokens may all go to prompts that run already
                self._release(first)
            self._preempt(max(found, key=self._precedence), now)

    def _next_in_line(self, now: float) -> Sequence | None:
        return next(
            (
                seq
                for seq in self.waiting.in_order(now, set())
                if not seq.waits_for_sibling(self.pool.block_size)
            ),
            None,
        )

    def _fit(self, seq: Sequence) -> bool:
        """Would its blocks, none of them shared, and one more for each that runs?"""
        return self.pool.blocks_for(seq.num_tokens) + len(self.running) <= self.pool.num_free

    def _continue(self, rows: list[Row], budget: int, now: float) -> int:
        """Rows of what runs, one token at least for each -> what is left of the budget."""
        order = deque(sorted(self.running, key=self._precedence))
        while order:
            seq = order.popleft()
            num_new = min(seq.num_tokens - seq.num_computed, budget - len(order))
            if self._make_room(seq, num_new, order, now):
                rows.append(Row(seq, seq.num_computed, num_new))
                budget -= num_new
        return budget

    def _admit(self, rows: list[Row], budget: int, now: float) -> None:
        loading: set[Hashable] = set()
        admitted: list[Sequence] = []
        queue = self.waiting.in_order(now, loading)
        while budget > 0 and len(self.running) < self.max_num_seqs:
            seq = next(queue, None)
            if seq is None:
                break
            if seq.waits_for_sibling(self.pool.block_size):
                continue
            if not self._hold_delta(seq, now):
                loading.add(seq.delta_key)
                continue
            if not self._take_room(seq):
                break
            admitted.append(seq)
            self._start(seq, now)
            num_new = min(seq.num_tokens - seq.num_computed, budget)
            rows.append(Row(seq, seq.num_computed, num_new))
            budget -= num_new
        for seq in admitted:
            self.waiting.remove(seq, now)

    def _precedence(self, seq: Sequence) -> tuple[bool, int, float, int]:
        """The order of the policy among what runs. Who went first because of age, stays so, and
        before those that aged later: the oldest of all always gets on."""
        if seq.first_since is not None:
            return False, 0, seq.first_since, seq.number
        flow = self.policy.flow(seq.request)
        return True, flow[0], self.policy.rank(flow), seq.number

    def _make_room(self, seq: Sequence, num_new: int, order: deque[Sequence], now: float) -> bool:
        """Blocks for the next tokens of ``seq``, if need be from the last in ``order``.

        False when ``seq`` was itself the last and had to give way. This ends: each
        preemption is for a token that is drawn in this step, or of a sequence that has drawn one
        since it was admitted.
        """
        while True:
            missing = self.pool.blocks_for(seq.num_computed + num_new) - len(seq.blocks)
            if missing <= self.pool.num_free:
                seq.blocks += self.pool.allocate(max(missing, 0))
                return True
            victim = order.pop() if order else seq
            self._preempt(victim, now)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence, now: float) -> None:
        """Free the blocks; the sequence is computed again from its first token."""
        del self.running[seq]
        self._release(seq)
        seq.watch.enter(Phase.QUEUED, now)
        self.waiting.push(seq, now)
        self.usage.preempted(seq)

    def _hold_delta(self, seq: Sequence, now: float) -> bool:
        """Its delta is in memory, and stays there."""
        seq.holds_delta = seq.holds_delta or self.deltas.acquire(seq)
        phase = Phase.QUEUED if seq.holds_delta else Phase.LOAD
        if seq.watch.phase is not phase:
            seq.watch.enter(phase, now)
        return seq.holds_delta

    def _take_room(self, seq: Sequence) -> bool:
        """Bytes of the step and blocks for ``seq``. One that has aged keeps its delta meanwhile."""
        fits = self.byte_budget.fits(self.running, seq, self.deltas) and self._take_blocks(seq)
        if not fits and not seq.aged:
            self._release(seq)
        return fits

    def _take_blocks(self, seq: Sequence) -> bool:
        """Blocks for all known tokens, the computed ones shared; False if they do not fit.

        All must fit, and one more for each that runs: else it would soon be preempted.
        """
        # The last token is always computed: its logits are what the step is for.
        reusable = (seq.num_tokens - 1) // self.pool.block_size
        known = self.pool.find(seq.keys_of(reusable, self.pool.block_size))
        missing = self.pool.blocks_for(seq.num_tokens) - len(known)
        if missing + self.pool.num_idle(known) + len(self.running) > self.pool.num_free:
            return False
        self.pool.share(known)
        seq.blocks = known + self.pool.allocate(missing)
        seq.num_computed = len(known) * self.pool.block_size
        return True

    def _start(self, seq: Sequence, now: float) -> None:
        """What has room runs; only the first time is charged, and lets others queue."""
        self.running[seq] = None
        seq.watch.enter(Phase.PREFILL, now)
        if seq.num_cached is None:  # later, after a preemption, it would find its own blocks
            seq.num_cached = seq.num_computed
            self.policy.charge_input(seq.request, seq.num_cached)
            self.gate.admit(seq.request.request_id, now)

    def _take(self, seq: Sequence, token: int, now: float) -> TokenEvent:
        """A drawn token: charge it, tell it, and end the sequence if it says so."""
        reason = seq.append(token)
        event = seq.event(token, reason)
        if seq.request.sampling.max_tokens > 0:  # else it only marks the end of the prompt
            self.policy.charge_output(seq.request)
        self.usage.drew(seq)
        if seq.watch.phase is Phase.PREFILL:
            seq.watch.enter(Phase.DECODE, now)
        return event if reason is None else self._end(seq, event)

    def _publish(self, seq: Sequence, start: int) -> None:
        """Make the blocks known that were filled from ``start`` on."""
        size = self.pool.block_size
        first, last = start // size, seq.num_computed // size
        if first < last:
            for index, key in enumerate(seq.keys_of(last, size)[first:], first):
                self.pool.publish(seq.blocks[index], key)

    def _join_siblings(self, seq: Sequence) -> None:
        """Share the blocks of ``fork_of`` by a chain of keys that, at need, only they know."""
        eldest = self._live.get(seq.request.fork_of) if seq.request.fork_of is not None else None
        if eldest is None or not seq.is_sibling(eldest):
            return
        if any(s.request.sampling.prompt_logprobs is not None for s in (seq, eldest)):
            return  # each computes its prompt: what is shared has no logits
        if eldest.root is None:  # the prefix cache is off
            eldest.root = root_key("family", str(eldest.number))
            self._publish(eldest, 0)
        seq.root = eldest.root
        if eldest.family is None:
            eldest.family = {eldest: None}
        seq.family = eldest.family
        seq.family[seq] = None

    def _end(self, seq: Sequence, event: TokenEvent) -> TokenEvent:
        """Forget a sequence and free what it held; its last event, with the times."""
        now = self.clock()
        if seq in self.running:
            del self.running[seq]
        else:
            self.waiting.remove(seq, now)
            self.gate.leave(event.request_id)
        self._release(seq)
        if seq.family is not None:
            del seq.family[seq]
        del self._live[event.request_id]
        timing = seq.watch.read(now)
        self.usage.end(seq, timing)
        return replace(event, timing=timing)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.num_computed = 0
        if seq.holds_delta:
            seq.holds_delta = False
            self.deltas.release(seq)

    def _check_when_idle(self, now: float) -> None:
        if not self.running and now - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = now
            self.pool.check([])

    def dump(self) -> dict[str, Any]:
        """Its state as plain JSON, for people who look for a fault; no word of any prompt."""
        now = self.clock()
        return {
            "policy": type(self.policy).__name__,
            "served": self.policy.dump(),
            "running": [seq.describe(now) for seq in self.running],
            "waiting": [seq.describe(now) for seq in self.waiting],
            "blocks": {"total": self.pool.num_blocks, "used": self.pool.num_used},
            "queued": {"requests": self.gate.num_requests, "tokens": self.gate.num_tokens},
            "bytes_per_s": self.byte_budget.bytes_per_s,
        }
