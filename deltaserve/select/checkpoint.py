"""A run's progress on disk: one file, replaced after every pass, sweep or round.

The file holds the status of each point, the gains of those already selected, where the run
was, and its log; gains of the rest follow from the status. A resumed run comes to the same
set, because all solvers are deterministic from there on.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.artifact.staging import replacing
from deltaserve.errors import SelectionError
from deltaserve.select.state import SELECTED, State

FORMAT = "deltaserve-selection/1"


class Checkpoint:
    """identity: digest of problem and options; a file of another run is refused."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity

    def save(self, state: State, progress: dict[str, Any]) -> None:
        head = {"format": FORMAT, "identity": self.identity, **progress}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path, durable=True) as partial, partial.open("wb") as file:
                np.savez(
                    file,
                    head=np.frombuffer(json.dumps(head).encode(), np.uint8),
                    status=state.status,
                    gain=state.gain[state.status == SELECTED],
                )
        except OSError as error:
            raise SelectionError(f"cannot write the checkpoint {self.path}: {error}") from None

    def load(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]] | None:
        """(status, gains of the selected points, progress), or None if there is no file."""
        if not self.path.exists():
            return None
        try:
            with np.load(self.path) as file:
                head = json.loads(file["head"].tobytes())
                status, gain = file["status"], file["gain"]
                found, identity = head["format"], head["identity"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise SelectionError(
                f"the checkpoint {self.path} is damaged: remove it to start again"
            ) from None
        if (found, identity) != (FORMAT, self.identity):
            raise SelectionError(
                f"the checkpoint {self.path} is of another selection (pool, budget, options or "
                "seed differ): remove it, or name another file"
            )
        return status, gain, head
