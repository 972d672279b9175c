"""Which tokens run in the next step, and what follows from what they gave: FCFS.

Pure Python. A step is planned under one token budget and has no phases: a sequence's
``num_computed`` chases its ``num_tokens``, so that chunked prefill, decode and the
recomputation of a preempted sequence are the same case.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from deltaserve.engine.kv import BlockPool
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import FinishReason, TokenEvent


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


class Scheduler:
    """Continuous batching: ``plan`` a step, ``commit`` its tokens."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def plan(self) -> StepPlan:
        rows: list[Row] = []
        budget = self._continue_running(rows, self.max_num_batched_tokens)
        self._admit(rows, budget)
        return StepPlan(tuple(sorted(rows, key=lambda row: row.seq.slot)))

    def commit(self, plan: StepPlan, sampled: dict[Sequence, int]) -> list[TokenEvent]:
        """Take the step's tokens; frees what finished. ``sampled`` holds the drawing rows."""
        events = []
        for row in plan.rows:
            row.seq.num_computed += row.num_new
            self._publish(row)
            if row.seq not in sampled:
                continue
            token = sampled[row.seq]
            reason = row.seq.append(token)
            if reason is not None:
                self._finish(row.seq)
            events.append(row.seq.event(token, reason))
        return events

    def abort(self, request_id: str) -> TokenEvent | None:
        """Drop a request wherever it is; None when it is not here (any more)."""
        for seq in [*self.running, *self.waiting]:
            if seq.request.request_id == request_id:
                self._finish(seq)
                return TokenEvent(request_id, (), FinishReason.ABORT)
        return None

    def _continue_running(self, rows: list[Row], budget: int) -> int:
        for seq in list(self.running):
            if budget == 0:
                break
            if seq not in self.running:  # preempted for the sake of an older one
                continue
            num_new = min(seq.num_tokens - seq.num_computed, budget)
            if self._make_room(seq, num_new):
                rows.append(Row(seq, seq.num_computed, num_new))
                budget -= num_new
        return budget

    def _admit(self, rows: list[Row], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self._take_blocks(seq):
                return
            self.waiting.popleft()
            self.running.append(seq)
            num_new = min(seq.num_tokens - seq.num_computed, budget)
            rows.append(Row(seq, seq.num_computed, num_new))
            budget -= num_new

    def _take_blocks(self, seq: Sequence) -> bool:
        """Blocks for all known tokens, the computed ones shared; False if they do not fit.

        All must fit: a half-admitted prompt would be preempted at once.
        """
        # The last token is always computed: its logits are what the step is for.
        reusable = (seq.num_tokens - 1) // self.pool.block_size
        known = self.pool.find(seq.keys_of(reusable, self.pool.block_size))
        missing = self.pool.blocks_for(seq.num_tokens) - len(known)
        if missing + self.pool.num_idle(known) > self.pool.num_free:
            return False
        self.pool.share(known)
        seq.blocks = known + self.pool.allocate(missing)
        seq.num_computed = len(known) * self.pool.block_size
        if seq.num_cached is None:  # later, after a preemption, it would find its own blocks
            seq.num_cached = seq.num_computed
        return True

    def _publish(self, row: Row) -> None:
        """Make the blocks known that this row has filled."""
        size = self.pool.block_size
        num_full = row.seq.num_computed // size
        keys = row.seq.keys_of(num_full, size)
        for index in range(row.start // size, len(keys)):
            self.pool.publish(row.seq.blocks[index], keys[index])

    def _make_room(self, seq: Sequence, num_new: int) -> bool:
        """Blocks for the next tokens of ``seq``, if need be from the youngest running ones.

        False when ``seq`` was itself the youngest and had to give way.
        """
        while True:
            missing = self.pool.blocks_for(seq.num_computed + num_new) - len(seq.blocks)
            if missing <= self.pool.num_free:
                seq.blocks += self.pool.allocate(max(missing, 0))
                return True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        """Free the blocks; the sequence is computed again from its first token."""
        self.running.remove(seq)
        self._release(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _finish(self, seq: Sequence) -> None:
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.num_computed = 0
