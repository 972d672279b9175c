"""Types that ``compress`` and ``export`` share."""

from __future__ import annotations

import os
from collections.abc import Callable

# What is being done, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]
PathLike = str | os.PathLike[str]


def silent(phase: str, done: int, total: int) -> None:
    """The progress of callers who do not ask for it."""
