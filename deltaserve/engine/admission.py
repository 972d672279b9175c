"""How many bytes a step may read, so that each output token comes in time."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from deltaserve.engine.deltas import DeltaStore
from deltaserve.engine.sequence import Sequence

SMOOTHING = 0.1
"""Weight of the newest step in the measured bandwidth."""


class ByteBudget:
    """Admits while a decode step, which is bound by memory, stays under ``slo_tpot_ms``.

    A step reads the base, the distinct deltas of its rows, and their KV. How many bytes a second
    that makes is measured on real steps; until there was one, everything is admitted.
    """

    def __init__(
        self, slo_tpot_ms: float | None = None, *, base_bytes: int = 0, kv_bytes_per_token: int = 0
    ) -> None:
        """slo_tpot_ms: milliseconds per output token; None admits everything."""
        self.slo_tpot_ms = slo_tpot_ms
        self.bytes_per_s: float | None = None
        self._base_bytes = base_bytes
        self._kv_bytes_per_token = kv_bytes_per_token

    def step_bytes(self, seqs: Iterable[Sequence], deltas: DeltaStore) -> int:
        """Bytes that one decode step of ``seqs`` reads."""
        slots, num_tokens = set(), 0
        for seq in seqs:
            slots.add(seq.slot)
            num_tokens += seq.num_tokens
        read = sum(deltas.step_bytes(slot) for slot in slots)
        return self._base_bytes + read + num_tokens * self._kv_bytes_per_token

    def measure(self, num_bytes: int, seconds: float) -> None:
        """A step that only decoded read so many bytes in so many seconds."""
        rate = num_bytes / max(seconds, 1e-9)
        known = rate if self.bytes_per_s is None else self.bytes_per_s
        self.bytes_per_s = known + SMOOTHING * (rate - known)

    def fits(self, running: Collection[Sequence], seq: Sequence, deltas: DeltaStore) -> bool:
        """May ``seq`` join? Alone it always may. ``seq.slot`` must be set."""
        if self.slo_tpot_ms is None or self.bytes_per_s is None or not running:
            return True
        num_bytes = self.step_bytes([*running, seq], deltas)
        return num_bytes / self.bytes_per_s * 1000 <= self.slo_tpot_ms
