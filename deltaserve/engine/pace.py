"""How much of a processor the loads and merges of deltas may take from those who decode.

On a CPU a delta is prepared by the cores that compute the steps. A loading thread therefore works
in short slices and rests between them, so that everyone's next token comes a little later instead
of a few tokens much later. Merging is for those who decode: the more of them gain by it, the sooner
it shall be done.
"""

from __future__ import annotations

import threading
import time

LEAST_SHARE = 0.1
"""Of a core, for each loading thread while others decode and nobody waits for what it does."""
LONGEST_REST_S = 0.5


class Pace:
    """One thread sets it, the loading threads keep it.

    share: of a core, for a thread that loads; merge_share: for one that merges.
    """

    def __init__(self) -> None:
        self.share = self.merge_share = 1.0
        self._worked = threading.local()

    def divide(self, decoding: int, waiting: int, gaining: int = 0) -> None:
        """A core's time by heads: requests that decode, and requests that wait for loads.

        gaining: those of them that decode with the delta that is being merged.
        """
        if not decoding:
            self.share = self.merge_share = 1.0
            return
        self.share = max(waiting / (decoding + waiting), LEAST_SHARE)
        self.merge_share = max(gaining / decoding, LEAST_SHARE)

    def rest(self) -> None:
        """Called between slices of a load; sleeps as long as the slice before was too much."""
        self._rest(self.share)

    def rest_merging(self) -> None:
        """As ``rest``, of a merge."""
        self._rest(self.merge_share)

    def _rest(self, share: float) -> None:
        worked = time.thread_time()
        since = getattr(self._worked, "until", worked)
        if share < 1.0:
            time.sleep(min((worked - since) * (1 / share - 1), LONGEST_REST_S))
        self._worked.until = time.thread_time()
