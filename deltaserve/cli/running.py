"""``deltaserve pipeline run``: the loop over a plan's elements, and its state in a file."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from deltaserve.cli.progress import count_bar, stop_between
from deltaserve.errors import PipelineError
from deltaserve.pipeline.saving import load_state, save_state


class StateFile:
    """Where a run stands. What was printed is written out before each save, so that the first
    ``position`` elements of a run that was killed are in its output.

    Raises PipelineError: it cannot be read or written, or is of another plan.
    """

    def __init__(self, path: Path, every_s: float, elements: Any) -> None:
        self._path, self._every_s, self._elements = path, every_s, elements
        if path.exists():
            elements.set_state(load_state(path))
        self.save()

    def save(self) -> None:
        sys.stdout.flush()
        save_state(self._path, self._elements.get_state())
        self._due = time.monotonic() + self._every_s

    def save_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self.save()


def run_elements(
    elements: Any, *, limit: int | None, shown: int, state: Path | None, save_every_s: float
) -> None:
    """Take elements to the end, or ``limit`` of them; print the first ``shown`` and a summary.

    Raises KeyboardInterrupt: after the element at which Ctrl-C or SIGTERM came if a state is
    saved, else at once.
    """
    counts = Counts()
    saved = StateFile(state, save_every_s, elements) if state is not None else None
    stopping = stop_between() if saved else nullcontext(lambda: False)
    try:
        with stopping as stopped, count_bar() as progress:
            while (limit is None or counts.elements < limit) and not stopped():
                try:
                    element = next(elements, None)
                except PipelineError:
                    if saved:
                        saved.save()
                    raise
                if element is None:
                    break
                counts.add(element)
                if counts.elements <= shown:
                    print(json.dumps(element, default=_plain))
                progress("elements", counts.elements, limit or 0)
                if saved:
                    saved.save_if_due()
            if saved:
                saved.save()
            if stopped():
                raise KeyboardInterrupt
    finally:
        print(counts.summary(elements.skipped))


class Counts:
    """What came out."""

    def __init__(self) -> None:
        self.elements = self.tokens = self.places = 0
        self._began = time.perf_counter()

    def add(self, element: Any) -> None:
        self.elements += 1
        ids = element.get("input_ids")
        if ids is None or not hasattr(ids, "size"):
            return
        used = element.get("segment_ids", element.get("attention_mask"))
        self.places += ids.size
        self.tokens += ids.size if used is None else int((used > 0).sum())

    def summary(self, skipped: int) -> str:
        seconds = time.perf_counter() - self._began
        words = [f"{self.elements:,} elements in {seconds:.1f} s"]
        if self.places:
            words.append(f"{self.tokens:,} tokens ({self.tokens / seconds:,.0f}/s)")
            words.append(f"{self.tokens / self.places:.2%} of places filled")
        if skipped:
            words.append(f"{skipped:,} broken rows skipped")
        return ", ".join(words)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
