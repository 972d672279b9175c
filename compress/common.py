"""Types that ``compress`` and ``export`` share."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from deltaserve.errors import ConfigError

# What is being done, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]
PathLike = str | os.PathLike[str]


def silent(phase: str, done: int, total: int) -> None:
    """The progress of callers who do not ask for it."""


def check_device(device: str) -> None:
    """Raises ConfigError for a device that this machine or this torch does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as cause:
        reason = str(cause).splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used here: {reason}") from None
