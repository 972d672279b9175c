"""Rows in the order of a consumer's grants: the place where a plan is cut in two.

Workers run the part below (rows by position, no order needed), the part above (packing, batching)
runs where its elements are used, over a feed. The feed is the same whoever prepared the rows, and
so are the elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fetch = Callable[[int], list[Any] | None]


class Feed:
    """fetch: the rows of grant number n, None after the last. State: {"grant", "row"}, the
    place of the next row."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._grant, self._row = 0, 0
        self._rows: list[Any] | None = None
        self._ended = False

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        while not self._ended:
            if self._rows is None:
                self._rows = self._fetch(self._grant)
                if self._rows is None:
                    self._ended = True
                    break
            if self._row < len(self._rows):
                self._row += 1
                return self._rows[self._row - 1]
            self._grant, self._row, self._rows = self._grant + 1, 0, None
        raise StopIteration

    def get_state(self) -> dict[str, int]:
        return {"grant": self._grant, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        if state["grant"] != self._grant:
            self._rows = None
        self._grant, self._row, self._ended = state["grant"], state["row"], False
