"""States of iterators in files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaserve.errors import PipelineError


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises PipelineError: it cannot be written; what was there stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PipelineError(f"the state cannot be saved to {path}: {cause.strerror}") from None


def load_state(path: Path) -> dict[str, Any]:
    """Raises PipelineError: unreadable, or not a state."""
    try:
        state = json.loads(path.read_text())
    except OSError as cause:
        raise PipelineError(f"{path} cannot be read: {cause.strerror}") from None
    except ValueError as cause:
        raise PipelineError(f"{path} is not a saved state: {cause}") from None
    if not isinstance(state, dict):
        raise PipelineError(f"{path} is not a saved state of a pipeline")
    return state
