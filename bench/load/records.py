"""What was measured of one request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended. All but OK and CANCELLED are failures."""

    OK = "ok"
    CANCELLED = "cancelled"
    """By the workload, as planned."""
    UNFINISHED = "unfinished"
    """Cut by the end of the run."""
    CONNECT = "connection failed"
    DISCONNECTED = "disconnected"
    """The answer ended too early."""
    TIMEOUT = "timed out"
    STREAM = "error in the stream"
    MALFORMED = "malformed answer"
    HTTP = "http"
    """Refused; ``Record.status`` says with what."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds since the start of the run, by a clock that never jumps.

    scheduled: when it should have been sent; latencies are counted from here. token_times: when
    the parts of the answer came that carry text. finished: when the answer was complete, or had
    failed. Tokens are the server's count; where it gave none (``counted``), a part counts as a
    token. retry_after: seconds that a refusal asks to wait.
    """

    tenant: str
    model: str
    scheduled: float
    sent: float
    finished: float
    outcome: Outcome
    token_times: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted: bool = True
    turn: int = 0
    probe: bool = False
    status: int | None = None
    message: str = ""
    retry_after: float | None = None

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def failed(self) -> bool:
        return self.outcome not in (Outcome.OK, Outcome.CANCELLED)

    @property
    def error(self) -> str:
        """The kind of failure: "http 429"; empty where there is none."""
        if not self.failed:
            return ""
        return f"http {self.status}" if self.outcome is Outcome.HTTP else str(self.outcome)

    @property
    def lateness(self) -> float:
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        """To the first text; to the end of an answer without any."""
        first = self.token_times[0] if self.token_times else self.finished
        return first - self.scheduled

    @property
    def e2e(self) -> float:
        return self.finished - self.scheduled

    @property
    def tpot(self) -> float | None:
        """(E2E - TTFT) / (tokens - 1); None for fewer than two tokens, or parts with text: one
        part tells nothing of the time between its tokens."""
        if self.output_tokens < 2 or self.in_one_piece:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def in_one_piece(self) -> bool:
        """Several tokens, of which not two came apart."""
        return self.output_tokens > 1 and len(self.token_times) < 2

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times)]
