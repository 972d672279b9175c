"""How much of a processor the loads of deltas may take from those who decode.

On a CPU a delta is prepared by the cores that compute the steps. A loading thread therefore works
in short slices and rests between them, so that everyone's next token comes a little later instead
of a few tokens much later.
"""

from __future__ import annotations

import threading
import time

LEAST_SHARE = 0.1
"""Of a core, for each loading thread while others decode and nobody waits for what it loads."""
LONGEST_REST_S = 0.5


class Pace:
    """One thread sets it, the loading threads keep it."""

    def __init__(self) -> None:
        self.share = 1.0
        self._worked = threading.local()

    def divide(self, decoding: int, waiting: int) -> None:
        """A core's time by heads: requests that decode, and requests that wait for loads."""
        everyone = decoding + waiting
        self.share = max(waiting / everyone, LEAST_SHARE) if decoding else 1.0

    def rest(self) -> None:
        """Called between slices of work; sleeps as long as the slice before was too much."""
        worked = time.thread_time()
        since = getattr(self._worked, "until", worked)
        share = self.share
        if share < 1.0:
            time.sleep(min((worked - since) * (1 / share - 1), LONGEST_REST_S))
        self._worked.until = time.thread_time()
